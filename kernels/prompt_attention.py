"""Attention with a learned bias that each sample picks by its mode, forward and backward.

Four kernels: the forward; the gradient of the queries (and δ = Σ dO·O, which the others read); those of keys and
values; that of the bias, whose tiles each loop over the samples of their mode and are written once, without atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modafill.kernels.philox import words
from modafill.kernels.rows import row_id_at, value_at
from modafill.kernels.tuned import capability_of, launch, tuned

DROPOUT = tl.constexpr(4)  # Draw.DROPOUT

# The bias gradient is summed in groups of samples: enough of them for this many programs, within these bytes.
_PROGRAMS, _GROUP_SAMPLES, _GROUP_BYTES = 1024, 8, 1 << 24


@triton.jit
def _tile(pointer, strides, b, h, rows, columns, count, width):
    """Rows of a head of ``[B, H, L, d]``; zeros outside."""
    at = rows[:, None] * strides[2] + columns[None, :]
    return tl.load(
        pointer + b * strides[0] + h * strides[1] + at,
        mask=(rows[:, None] < count) & (columns[None, :] < width),
        other=0.0,
    )


@triton.jit
def _write(pointer, strides, b, h, rows, columns, count, width, value):
    at = pointer + b * strides[0] + h * strides[1] + (rows[:, None] * strides[2] + columns[None, :])
    tl.store(at, value.to(pointer.dtype.element_ty), mask=(rows[:, None] < count) & (columns[None, :] < width))


@triton.jit
def _sample(mode, key_lengths, b, modes, keys):
    """Mode and number of keys of sample ``b``, and what poisons its logits where one of them is out of range."""
    table, seen, poison = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64) + keys, 0.0
    if mode is not None:
        found = tl.load(mode + b)
        inside = (found >= 0) & (found < modes)
        table = tl.where(inside, found, 0)
        poison = tl.where(inside, poison, float("nan"))
    if key_lengths is not None:
        found = tl.load(key_lengths + b)
        inside = (found >= 0) & (found <= keys)
        seen = tl.where(inside, found, keys)
        poison = tl.where(inside, poison, float("nan"))
    return table, seen.to(tl.int32), poison


@triton.jit
def _own(bias, mode, key_lengths, seeds, seed, row_ids, b, h, queries, keys, modes, bias_heads):
    """What head ``h`` of sample ``b`` reads: its table of the bias, the number of keys, poison, seed and row id."""
    table, seen, poison = _sample(mode, key_lengths, b, modes, keys)
    if bias is not None:
        bias += (table * bias_heads + h % bias_heads) * queries * keys
    return bias, seen, poison, value_at(seeds, 0, seed, b), row_id_at(row_ids, b)


@triton.jit
def _products(
    a, a_strides, x, x_strides, b, h, rows, columns, count, seen, width,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of ``a`` times rows of ``x``, contracted ``BLOCK_K`` at a time: fewer registers than all at once."""
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c0 in range(0, BLOCK_D, BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K)
        left = _tile(a, a_strides, b, h, rows, c, count, width)
        right = _tile(x, x_strides, b, h, columns, c, seen, width)
        result = tl.dot(left, tl.trans(right), result, input_precision=PRECISION)
    return result


@triton.jit
def _logits(products, scale, bias, i, j, queries, keys, seen, offset, CAUSAL: tl.constexpr):
    """Logits ``[i, j]`` of one head; ``bias`` points to its table."""
    visible = (i[:, None] < queries) & (j[None, :] < seen)
    if CAUSAL:
        visible = visible & (j[None, :] <= i[:, None] + offset)
    logits = products * scale
    if bias is not None:
        logits += tl.load(bias + i[:, None] * keys + j[None, :], mask=visible, other=0.0).to(tl.float32)
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def _keep(p, seed, row_id, h, i, j0, queries, keys, dropped, kept, BLOCK_N: tl.constexpr):
    """``p`` where dropout keeps it, times ``kept``, and 0 elsewhere; j0 is a multiple of 4."""
    quad = (h * queries + i)[:, None] * tl.cdiv(keys, 4) + (j0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1, w2, w3 = words(seed, row_id, tl.full([], 0, tl.int64), DROPOUT, quad)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.where(word >= dropped.to(tl.uint32), p * kept, 0.0)


@triton.jit(do_not_specialize=["seed", "dropped"])
def forward_kernel(
    out, logsumexp, q, k, v, bias, mode, key_lengths, seeds, seed: tl.int64, row_ids,
    out_strides, q_strides, k_strides, v_strides,
    batch, heads, queries, keys, width, modes, bias_heads, offset, scale, dropped: tl.int64, kept,
    CAUSAL: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    # Heads change last: the tables of one head stay in the cache.
    b, h = (tl.program_id(0) // blocks % batch).to(tl.int64), tl.program_id(0) // blocks // batch
    i, c = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    bias, seen, poison, seed, row_id = _own(
        bias, mode, key_lengths, seeds, seed, row_ids, b, h, queries, keys, modes, bias_heads
    )
    end = tl.minimum(seen, first + BLOCK_M + offset) if CAUSAL else seen
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32) + poison
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j0 in range(0, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        products = _products(
            q, q_strides, k, k_strides, b, h, i, j, queries, seen, width,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        s = _logits(products, scale, bias, i, j, queries, keys, seen, offset, CAUSAL)
        now = tl.maximum(most, tl.max(s, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(most - base)
        total = total * shrink + tl.sum(p, 1)
        if DROPS:
            p = _keep(p, seed, row_id, h, i, j0, queries, keys, dropped, kept, BLOCK_N)
        v_tile = _tile(v, v_strides, b, h, j, c, seen, width)
        result = tl.dot(p.to(v_tile.dtype), v_tile, result * shrink[:, None], input_precision=PRECISION)
        most = now
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    _write(out, out_strides, b, h, i, c, queries, width, result / total[:, None])
    if logsumexp is not None:
        row = (b * heads + h) * queries + i
        tl.store(logsumexp + row, tl.where(nothing, float("inf"), most + tl.log(total)), mask=i < queries)


@triton.jit(do_not_specialize=["seed", "dropped"])
def queries_kernel(
    q_grad, delta, grad, out, logsumexp, q, k, v, bias, mode, key_lengths, seeds, seed: tl.int64, row_ids,
    q_grad_strides, grad_strides, out_strides, q_strides, k_strides, v_strides,
    batch, heads, queries, keys, width, modes, bias_heads, offset, scale, dropped: tl.int64, kept,
    CAUSAL: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    b, h = (tl.program_id(0) // blocks % batch).to(tl.int64), tl.program_id(0) // blocks // batch
    i, c = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    grad_tile = _tile(grad, grad_strides, b, h, i, c, queries, width)
    out_tile = _tile(out, out_strides, b, h, i, c, queries, width)
    mean = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    row = (b * heads + h) * queries + i
    tl.store(delta + row, mean, mask=i < queries)
    if q_grad is not None:
        bias, seen, poison, seed, row_id = _own(
            bias, mode, key_lengths, seeds, seed, row_ids, b, h, queries, keys, modes, bias_heads
        )
        end = tl.minimum(seen, first + BLOCK_M + offset) if CAUSAL else seen
        norm = tl.load(logsumexp + row, mask=i < queries, other=float("inf"))
        result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + poison
        for j0 in range(0, end, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            k_tile = _tile(k, k_strides, b, h, j, c, seen, width)
            products = _products(
                q, q_strides, k, k_strides, b, h, i, j, queries, seen, width,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            s = _logits(products, scale, bias, i, j, queries, keys, seen, offset, CAUSAL)
            dp = _products(
                grad, grad_strides, v, v_strides, b, h, i, j, queries, seen, width,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            if DROPS:
                dp = _keep(dp, seed, row_id, h, i, j0, queries, keys, dropped, kept, BLOCK_N)
            ds = tl.exp(s - norm[:, None]) * (dp - mean[:, None])
            result = tl.dot(ds.to(k_tile.dtype), k_tile, result, input_precision=PRECISION)
        _write(q_grad, q_grad_strides, b, h, i, c, queries, width, result * scale)


@triton.jit(do_not_specialize=["seed", "dropped"])
def keys_kernel(
    k_grad, v_grad, delta, grad, logsumexp, q, k, v, bias, mode, key_lengths, seeds, seed: tl.int64, row_ids,
    k_grad_strides, v_grad_strides, grad_strides, q_strides, k_strides, v_strides,
    batch, heads, queries, keys, width, modes, bias_heads, offset, scale, dropped: tl.int64, kept,
    CAUSAL: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK_N)
    j0 = tl.program_id(0) % blocks * BLOCK_N
    b, h = (tl.program_id(0) // blocks % batch).to(tl.int64), tl.program_id(0) // blocks // batch
    j, c = j0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # Poison is in the log-sum-exp.
    bias, seen, _, seed, row_id = _own(
        bias, mode, key_lengths, seeds, seed, row_ids, b, h, queries, keys, modes, bias_heads
    )
    k_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = tl.maximum(j0 - offset, 0) // BLOCK_M * BLOCK_M if CAUSAL else 0
    for i0 in range(begin, tl.where(j0 < seen, queries, 0), BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        row = (b * heads + h) * queries + i
        q_tile = _tile(q, q_strides, b, h, i, c, queries, width)
        grad_tile = _tile(grad, grad_strides, b, h, i, c, queries, width)
        norm = tl.load(logsumexp + row, mask=i < queries, other=float("inf"))
        products = _products(
            q, q_strides, k, k_strides, b, h, i, j, queries, seen, width,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        s = _logits(products, scale, bias, i, j, queries, keys, seen, offset, CAUSAL)
        p = tl.exp(s - norm[:, None])
        if v_grad is not None:
            kept_p = _keep(p, seed, row_id, h, i, j0, queries, keys, dropped, kept, BLOCK_N) if DROPS else p
            v_sum = tl.dot(tl.trans(kept_p.to(q_tile.dtype)), grad_tile, v_sum, input_precision=PRECISION)
        if k_grad is not None:
            dp = _products(
                grad, grad_strides, v, v_strides, b, h, i, j, queries, seen, width,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            if DROPS:
                dp = _keep(dp, seed, row_id, h, i, j0, queries, keys, dropped, kept, BLOCK_N)
            ds = p * (dp - tl.load(delta + row, mask=i < queries, other=0.0)[:, None])
            k_sum = tl.dot(tl.trans(ds.to(q_tile.dtype)), q_tile, k_sum, input_precision=PRECISION)
    if k_grad is not None:
        _write(k_grad, k_grad_strides, b, h, j, c, keys, width, k_sum * scale)
    if v_grad is not None:
        _write(v_grad, v_grad_strides, b, h, j, c, keys, width, v_sum)


@triton.jit(do_not_specialize=["seed", "dropped"])
def bias_kernel(
    bias_grad, delta, grad, logsumexp, q, k, v, bias, mode, key_lengths, seeds, seed: tl.int64, row_ids,
    grad_strides, q_strides, k_strides, v_strides,
    batch, heads, queries, keys, width, modes, bias_heads, offset, scale, dropped: tl.int64, kept, groups,
    CAUSAL: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m_blocks, n_blocks = tl.cdiv(queries, BLOCK_M), tl.cdiv(keys, BLOCK_N)
    tile, rest = tl.program_id(0) % (m_blocks * n_blocks), tl.program_id(0) // (m_blocks * n_blocks)
    group, own = rest % groups, rest // groups  # own: the table, [modes, bias_heads]
    i0, j0 = tile // n_blocks * BLOCK_M, tile % n_blocks * BLOCK_N
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    reach = i0 + BLOCK_M + offset if CAUSAL else keys
    bias += own.to(tl.int64) * queries * keys
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin, end = group.to(tl.int64) * batch // groups, (group + 1).to(tl.int64) * batch // groups
    for step in range((end - begin).to(tl.int32)):
        b = begin + step
        table, seen, _ = _sample(mode, key_lengths, b, modes, keys)
        if (table == own // bias_heads) & (j0 < tl.minimum(seen, reach)):
            seed_b, row_id = value_at(seeds, 0, seed, b), row_id_at(row_ids, b)
            # One head, or all of them where they share the table.
            for shared in range(heads // bias_heads):
                h = own % bias_heads + shared
                row = (b * heads + h) * queries + i
                norm = tl.load(logsumexp + row, mask=i < queries, other=float("inf"))
                mean = tl.load(delta + row, mask=i < queries, other=0.0)
                products = _products(
                    q, q_strides, k, k_strides, b, h, i, j, queries, seen, width,
                    PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
                )  # fmt: skip
                s = _logits(products, scale, bias, i, j, queries, keys, seen, offset, CAUSAL)
                dp = _products(
                    grad, grad_strides, v, v_strides, b, h, i, j, queries, seen, width,
                    PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_K,
                )  # fmt: skip
                if DROPS:
                    dp = _keep(dp, seed_b, row_id, h, i, j0, queries, keys, dropped, kept, BLOCK_N)
                result += tl.exp(s - norm[:, None]) * (dp - mean[:, None])
    at = (group.to(tl.int64) * modes * bias_heads + own) * queries * keys + i[:, None] * keys + j[None, :]
    inside = (i[:, None] < queries) & (j[None, :] < keys)
    tl.store(bias_grad + at, result.to(bias_grad.dtype.element_ty), mask=inside)


def config(kernel: str, capability: int, bytes_each: int, width: int, queries: int, keys: int) -> dict[str, int]:
    """Launch configuration of one of the four kernels: the narrowest listed one that fits, its blocks cut to lengths.

    Args:
        kernel: ``"forward"``, ``"queries"``, ``"keys"`` or ``"bias"``.
        capability: 10·major + minor.
        bytes_each: of an element, 2 or 4.
        width: of a head.
    """
    block_d = max(16, triton.next_power_of_2(width))
    fitting = [c for c in tuned("prompt_attention", capability)[kernel] if c["bytes"] == bytes_each]
    found = min((c for c in fitting if c["width"] >= block_d), key=lambda c: c["width"])
    block_m = min(found["BLOCK_M"], max(16, triton.next_power_of_2(queries)))
    block_n = min(found["BLOCK_N"], max(16, triton.next_power_of_2(keys)))
    # Where blocks were cut, a warp for every 512 elements of the logits is enough.
    cut = (block_m, block_n) != (found["BLOCK_M"], found["BLOCK_N"])
    warps = max(1, min(found["num_warps"], block_m * block_n // 512)) if cut else found["num_warps"]
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "BLOCK_K": min(found["BLOCK_K"], block_d),
        "num_warps": warps,
        "num_stages": found["num_stages"],
    }


def _settings(kernel: str, q: Tensor, k: Tensor) -> dict[str, Any]:
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    found = config(kernel, capability_of(q), q.element_size(), q.shape[3], q.shape[2], k.shape[2])
    return {"PRECISION": "tf32" if tf32 else "tf32x3", **found}


def _groups(q: Tensor, bias: Tensor, tiles: int) -> int:
    """How many groups of samples the bias gradient is summed in: a function of the shapes alone."""
    wanted = _PROGRAMS // max(1, bias.shape[0] * bias.shape[1] * tiles)
    return max(1, min(wanted, len(q) // _GROUP_SAMPLES, _GROUP_BYTES // max(1, 4 * bias.numel())))


def _described(
    q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float, dropout: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The numbers that all kernels take, and the constants."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    modes, bias_heads = (1, 1) if bias is None else bias.shape[:2]
    numbers = batch, heads, queries, keys, width, modes, bias_heads, abs(keys - queries), scale
    dropped = int(dropout * 2**32), 1.0 / (1.0 - dropout)
    return (*numbers, *dropped), {"CAUSAL": causal, "DROPS": dropout > 0.0}


def prompt_attention(
    out: Tensor,
    logsumexp: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mode: Tensor | None,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
) -> None:
    """Write the attention of ``q, k, v [B, H, L, d]`` (dense last dimension) into ``out``, and its log-sum-exp."""
    numbers, constants = _described(q, k, bias, causal, scale, dropout)
    settings = _settings("forward", q, k)
    launch(
        forward_kernel,
        triton.cdiv(q.shape[2], settings["BLOCK_M"]) * q.shape[0] * q.shape[1],
        q,
        *(out, logsumexp, q, k, v, bias, mode, key_lengths, seed_tensor, seed, row_id),
        *(x.stride()[:3] for x in (out, q, k, v)),
        *numbers,
        **constants,
        **settings,
    )


def prompt_attention_backward(
    grads: list[Tensor | None],
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mode: Tensor | None,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
) -> None:
    """Write the gradients of q, k, v and bias that ``grads`` has tensors for."""
    q_grad, k_grad, v_grad, bias_grad = grads
    batch, heads, queries, _ = q.shape
    numbers, constants = _described(q, k, bias, causal, scale, dropout)
    inputs = q, k, v, bias, mode, key_lengths, seed_tensor, seed, row_id
    strides = [x.stride()[:3] for x in (q, k, v)]
    delta = torch.empty_like(logsumexp)
    if q_grad is not None or k_grad is not None or bias_grad is not None:
        settings = _settings("queries", q, k)
        launch(
            queries_kernel,
            triton.cdiv(queries, settings["BLOCK_M"]) * batch * heads,
            q,
            *(q_grad, delta, grad, out, logsumexp, *inputs),
            *((0, 0, 0) if x is None else x.stride()[:3] for x in (q_grad, grad, out)),
            *strides,
            *numbers,
            **constants,
            **settings,
        )
    if k_grad is not None or v_grad is not None:
        settings = _settings("keys", q, k)
        launch(
            keys_kernel,
            triton.cdiv(k.shape[2], settings["BLOCK_N"]) * batch * heads,
            q,
            *(k_grad, v_grad, delta, grad, logsumexp, *inputs),
            *((0, 0, 0) if x is None else x.stride()[:3] for x in (k_grad, v_grad, grad)),
            *strides,
            *numbers,
            **constants,
            **settings,
        )
    if bias is not None and bias_grad is not None:
        settings = _settings("bias", q, k)
        tiles = triton.cdiv(queries, settings["BLOCK_M"]) * triton.cdiv(k.shape[2], settings["BLOCK_N"])
        groups = _groups(q, bias, tiles)
        sums = bias_grad if groups == 1 else bias_grad.new_empty((groups, *bias.shape), dtype=torch.float32)
        launch(
            bias_kernel,
            tiles * groups * bias.shape[0] * bias.shape[1],
            q,
            *(sums, delta, grad, logsumexp, *inputs),
            *(grad.stride()[:3], *strides),
            *numbers,
            groups,
            **constants,
            **settings,
        )
        if groups > 1:
            torch.sum(sums, 0, out=bias_grad) if bias_grad.dtype == torch.float32 else bias_grad.copy_(sums.sum(0))
