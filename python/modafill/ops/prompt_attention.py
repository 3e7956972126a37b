"""Attention with a learned bias that each sample picks by its missing mode."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from modafill.ops import backends, reference
from modafill.ops.backends import _C

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mode, bool causal, Tensor? key_lengths, float scale,"
    " float dropout, SymInt seed, Tensor? seed_tensor, Tensor? row_id, bool need_logsumexp, str backend)"
    " -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mode, bool causal, Tensor? key_lengths,"
    " float scale, float dropout, SymInt seed, Tensor? seed_tensor, Tensor? row_id, Tensor? out, Tensor logsumexp,"
    " bool[] need, str backend) -> Tensor[]"
)

MAX_LENGTH = 2048
MAX_WIDTH = 128
# The gradient of the bias is summed in groups of samples, each with a table of its own.
_GROUP_BYTES = 1 << 24
_GROUP_SAMPLES = 8
_GROUP_TASKS = 32


def _check(
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
    dtype, device = q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        backends.check_tensor(name, x)
        if x.ndim != 4 or not dtype.is_floating_point:
            raise ValueError(f"{name}: got {backends.describe(x)}, expected a floating-point tensor [B, H, L, d]")
        if x.dtype != dtype or x.device != device:
            raise ValueError(
                f"{name}: got {backends.describe(x)}, expected {backends.dtype_name(dtype)} on {device}, as q"
            )
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    if k.shape != (batch, heads, keys, width):
        raise ValueError(f"k: got {list(k.shape)}, expected [{batch}, {heads}, Lk, {width}], as q")
    if v.shape != k.shape:
        raise ValueError(f"v: got {list(v.shape)}, expected {list(k.shape)}, as k")
    if width % 4 or not 4 <= width <= MAX_WIDTH:
        raise ValueError(f"q: got heads of width {width}, expected a multiple of 4 in 4…{MAX_WIDTH}")
    if max(queries, keys) > MAX_LENGTH:
        raise ValueError(f"q, k: got lengths {queries} and {keys}, expected at most {MAX_LENGTH}")
    if bias is not None:
        backends.check_tensor("bias", bias)
        shape = bias.shape
        if (
            len(shape) != 4
            or shape[0] < 1
            or shape[1] not in (1, heads)
            or shape[2] != queries
            or shape[3] != keys
            or bias.dtype != dtype
            or bias.device != device
        ):
            expected = f"{backends.dtype_name(dtype)} [P, {heads} or 1, {queries}, {keys}] on {device}"
            raise ValueError(f"bias: got {backends.describe(bias)}, expected {expected}")
        if mode is None and shape[0] > 1:
            raise ValueError(f"mode: got None, expected int64 [{batch}] because bias has {bias.shape[0]} tables")
    elif mode is not None:
        raise ValueError(f"mode: got {backends.describe(mode)}, expected None without a bias")
    for name, value in (("mode", mode), ("key_lengths", key_lengths), ("row_id", row_id)):
        if value is None:
            continue
        backends.check_tensor(name, value)
        if value.dtype != torch.int64 or value.shape != (batch,) or value.device != device:
            raise ValueError(f"{name}: got {backends.describe(value)}, expected int64 [{batch}] on {device}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: got {dropout}, expected a value in [0, 1)")
    backends.check_noise(seed_tensor, None, batch, device)


def _check_values(q: Tensor, k: Tensor, bias: Tensor | None, mode: Tensor | None, key_lengths: Tensor | None) -> None:
    """The reference's check of what lies in CPU tensors; the extension has its own."""
    for name, value, most in (
        ("mode", mode, 0 if bias is None else bias.shape[0] - 1),
        ("key_lengths", key_lengths, k.shape[2]),
    ):
        if value is not None and value.is_cpu and value.numel():
            for found in (int(value.min()), int(value.max())):
                if not 0 <= found <= most:
                    raise ValueError(f"{name}: got {found}, expected 0…{most}")


def _dense(x: Tensor) -> Tensor:
    """``x`` as the kernels read it: a dense last dimension, heads and the rows of each within 32-bit offsets."""
    _, head, row, element = x.stride()
    return x if element == 1 and row * MAX_LENGTH < 2**31 and head * x.shape[1] < 2**31 else x.contiguous()


def _attention(
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
) -> Any:
    """The extension's description of a call; all tensors have a dense last dimension or are contiguous."""
    return _C.PromptAttentionArgs(
        backends.DTYPE_CODES[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        q.stride()[:3],
        k.stride()[:3],
        v.stride()[:3],
        backends.pointer(bias),
        backends.pointer(mode),
        backends.pointer(key_lengths),
        *q.shape[:3],
        k.shape[2],
        q.shape[3],
        1 if bias is None else bias.shape[0],
        1 if bias is None else bias.shape[1],
        scale,
        causal,
        dropout,
        backends.pointer(seed_tensor),
        seed,
        backends.pointer(row_id),
    )


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward(
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
    need_logsumexp: bool,
    backend: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    _check(q, k, v, bias, mode, causal, key_lengths, scale, dropout, seed, seed_tensor, row_id)
    backend = backends.select("prompt_attention", q.device, q.dtype, backend)
    if out is not None:
        # Keys are read after results are written.
        backends.check_out(out, q.shape, q.dtype, q.device, q, k, v, bias)
    if backend == "reference":
        _check_values(q, k, bias, mode, key_lengths)
        result = reference.prompt_attention(
            q,
            k,
            v,
            bias,
            mode,
            causal=causal,
            key_lengths=key_lengths,
            scale=scale,
            dropout=dropout,
            seed=seed if seed_tensor is None else seed_tensor,
            row_id=row_id,
        )
        return (_like(q) if out is None else out).copy_(result), None
    q, k, v = _dense(q), _dense(k), _dense(v)
    bias, mode, key_lengths, row_id = map(backends.contiguous, (bias, mode, key_lengths, row_id))
    if out is None:
        out = backends.fresh(_like(q), backend)
    logsumexp = q.new_empty(q.shape[:3], dtype=_compute_dtype(q)) if need_logsumexp else None
    args = q, k, v, bias, mode, causal, key_lengths, scale, dropout, seed, seed_tensor, row_id
    if out.numel() == 0:
        pass
    elif backend == "triton":
        backends.launch_triton("prompt_attention", out, logsumexp, *args)
    else:
        results = out.data_ptr(), out.stride()[:3], backends.pointer(logsumexp)
        backends.launch("prompt_attention", backend, q.device, _attention(*args), *results)
    return out, logsumexp


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    """As the registered op has it: empty where there is no log-sum-exp."""
    out, logsumexp = _forward(*args)
    return out, out.new_empty(0, dtype=_compute_dtype(out)) if logsumexp is None else logsumexp


def _like(x: Tensor) -> Tensor:
    """A result or gradient: laid out as ``x`` is, ``[B, L, H, d]`` in memory where that is what was projected."""
    result = torch.empty_like(_dense(x))
    # Of a tensor whose elements overlap PyTorch makes strides of its own.
    return result if result.stride(3) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(
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
    need_logsumexp: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, bias, mode, causal, key_lengths, scale, dropout, seed, seed_tensor, row_id)
    chosen = backends.select("prompt_attention", q.device, q.dtype, backend)
    kept = need_logsumexp and chosen != "reference"
    return _like(q), q.new_empty(q.shape[:3] if kept else 0, dtype=_compute_dtype(q))


def _groups(q: Tensor, bias: Tensor) -> int:
    """How many groups the bias gradient is summed in: a function of the shapes alone, so that its bits are too."""
    size = bias.numel() * (8 if q.dtype == torch.float64 else 4)
    return max(1, min(_GROUP_TASKS // bias.shape[1], len(q) // _GROUP_SAMPLES, _GROUP_BYTES // max(size, 1)))


def _check_backward(grad: Tensor, q: Tensor, out: Tensor | None, logsumexp: Tensor, backend: str) -> str:
    """The backend that makes the gradients; what it needs beside the forward's inputs is there."""
    backends.check_described("grad", grad, q.shape, q.dtype, q.device)
    backend = backends.select("prompt_attention", q.device, q.dtype, backend)
    if backend != "reference":
        backends.check_described("logsumexp", logsumexp, q.shape[:3], _compute_dtype(q), q.device)
    if backend == "triton":
        if out is None:
            raise ValueError("out: got None, expected the forward's")
        backends.check_described("out", out, q.shape, q.dtype, q.device)
    return backend


def _run_backward(
    grad: Tensor,
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
    out: Tensor | None,
    logsumexp: Tensor,
    need: list[bool],
    backend: str,
) -> list[Tensor]:
    _check(q, k, v, bias, mode, causal, key_lengths, scale, dropout, seed, seed_tensor, row_id)
    backend = _check_backward(grad, q, out, logsumexp, backend)
    if backend == "reference":
        _check_values(q, k, bias, mode, key_lengths)
        attention = functools.partial(
            reference.prompt_attention,
            mode=mode,
            causal=causal,
            key_lengths=key_lengths,
            scale=scale,
            dropout=dropout,
            seed=seed if seed_tensor is None else seed_tensor,
            row_id=row_id,
        )
        like = _fake_backward(
            grad, q, k, v, bias, mode, causal, key_lengths, scale, dropout, seed, seed_tensor, row_id, out, logsumexp,
            need, backend,
        )  # fmt: skip
        return backends.gradients(attention, (q, k, v, bias), need, grad, like)
    grad, q, k, v, logsumexp = _dense(grad), _dense(q), _dense(k), _dense(v), logsumexp.contiguous()
    out = None if out is None else _dense(out)
    bias, mode, key_lengths, row_id = map(backends.contiguous, (bias, mode, key_lengths, row_id))
    args = q, k, v, bias, mode, causal, key_lengths, scale, dropout, seed, seed_tensor, row_id
    empty = q.numel() == 0 or k.numel() == 0
    grads = [backends.fresh(_like(x), backend) if n else None for x, n in zip((q, k, v), need[:3], strict=True)]
    if empty:
        for g in grads:
            if g is not None:
                g.zero_()
    if backend == "triton":
        make = torch.zeros_like if empty else torch.empty_like
        grads.append(make(bias) if need[3] and bias is not None else None)
        if not empty:
            backends.launch_triton(
                "prompt_attention", grads, grad, out, logsumexp, *args, function="prompt_attention_backward"
            )
        return [g for g in grads if g is not None]
    bias_grad = partial = None
    groups = 1
    if need[3] and bias is not None:
        groups = _groups(q, bias)
        bias_grad = backends.fresh(torch.empty_like(bias), backend).zero_()
        dtype = _compute_dtype(q)
        # Sums of the first group are the result where that is not rounded.
        tables = groups - 1 if dtype == bias.dtype else groups
        if groups > 1:
            partial = backends.fresh(bias.new_empty((tables, *bias.shape), dtype=dtype), backend).zero_()
    if not empty:
        backends.launch(
            "prompt_attention_backward",
            backend,
            q.device,
            _attention(*args),
            grad.data_ptr(),
            grad.stride()[:3],
            logsumexp.data_ptr(),
            *(backends.pointer(g) for g in (*grads, bias_grad, partial)),
            *((0, 0, 0) if g is None else g.stride()[:3] for g in grads),
            groups,
        )
    return [g for g in (*grads, bias_grad) if g is not None]


def _fake_backward(
    grad: Tensor,
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
    out: Tensor | None,
    logsumexp: Tensor,
    need: list[bool],
    backend: str,
) -> list[Tensor]:
    _check(q, k, v, bias, mode, causal, key_lengths, scale, dropout, seed, seed_tensor, row_id)
    _check_backward(grad, q, out, logsumexp, backend)
    grads = [_like(x) for x, n in zip((q, k, v), need[:3], strict=True) if n]
    if need[3] and bias is not None:
        grads.append(torch.empty_like(bias, memory_format=torch.contiguous_format))
    return grads


_Backward = backends.once_differentiable("prompt_attention", lambda: _backward_op)


class _Function(backends.Function):
    op = "prompt_attention"

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, bias, mode, causal, key_lengths, scale, dropout, seed, seed_tensor, row_id, _, backend = inputs
        ctx.mark_non_differentiable(output[1])
        backend = backends.select("prompt_attention", q.device, q.dtype, backend)
        # The CPU makes Σ dO·O from rows that it holds anyway.
        out = output[0] if backend == "triton" else None
        ctx.save_for_backward(q, k, v, bias, mode, key_lengths, seed_tensor, row_id, out, output[1])
        ctx.numbers = causal, scale, dropout, seed, backend

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mode, key_lengths, seed_tensor, row_id, out, logsumexp = ctx.saved_tensors
        causal, scale, dropout, seed, backend = ctx.numbers
        need = list(ctx.needs_input_grad[:4])
        args = (
            grad, q, k, v, bias, mode, causal, key_lengths, scale, dropout, seed, seed_tensor, row_id, out, logsumexp,
            need, backend,
        )  # fmt: skip
        if backends.runs_directly(*args):
            found = iter(_run_backward(*args))
        else:
            found = iter(backends.dispatch(_backward_op, _Backward, *args))
        return (*(next(found) if n else None for n in need), *[None] * 10)


class _Eager(_Function):
    """For calls that nothing but autograd need see: past the dispatcher."""

    forward = staticmethod(_run)


def _differentiable(*args: Any) -> tuple[Tensor, Tensor]:
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:4])
    return _Function.apply(*args[:12], wanted or args[12], args[13])


_op = backends.register("prompt_attention", _SCHEMA, _run, _fake, _differentiable)
_backward_op: Any = backends.register(
    "prompt_attention_backward",
    _BACKWARD_SCHEMA,
    _run_backward,
    _fake_backward,
    lambda *args: list(_Backward.apply(*args)),
)


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mode: Tensor | None = None,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    row_id: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(QKᵀ·scale + bias[mode]) V, the attention of CDTP's backbone (CDTP eq. 13; MulT, Tsai et al. 2019).

    Each sample picks its table of the bias by its mode; no ``[B, H, Lq, Lk]`` tensor exists, forward or backward. The
    gradient of the bias is summed over samples in a fixed order. A query with nothing to attend to gives 0. Keys and
    values behind ``key_lengths`` are never read; NaN in one that exists may come through to every query of its sample
    and head, those that ``causal`` or the bias hide it from included.

    Args:
        q: ``[B, H, Lq, d]``, any strides with a dense last dimension; d a multiple of 4 in 4…128, lengths to 2048.
        k, v: ``[B, H, Lk, d]``, like ``q``.
        bias: ``[P, H or 1, Lq, Lk]``, like ``q``; −inf hides a key. None = no bias.
        mode: int64 ``[B]``, 0…P−1; on a GPU, where it is not read back, another value gives NaN. None where P = 1.
        causal: MulT's mask: query i reads keys 0…i + |Lk − Lq|.
        key_lengths: int64 ``[B]``, 0…Lk: how many keys exist; on a GPU another value gives NaN. None = all.
        scale: of the products; None = d^−½.
        dropout: share of the softmax that is dropped, the rest scaled up; from the same Philox as all noise here. The
            counter of (head h, query i, key j) is (h·Lq + i)·⌈Lk/4⌉ + ⌊j/4⌋: a row keeps its dropout in any batch, but
            not when it is padded to another Lq or Lk.
        seed: 64-bit integer or int64 ``[]`` on the device; needed where ``dropout`` > 0.
        row_id: int64 ``[B]``, the identity of each sample's dropout; None = 0…B−1.
        out: like ``q``, contiguous; no input may overlap it. Only where no gradient is needed.
        backend: ``"auto"`` or one of :data:`modafill.ops.backends.BACKENDS`; see :func:`modafill.ops.explain`.

    Returns:
        ``[B, H, Lq, d]`` in the dtype and memory layout of ``q``, under autocast in its dtype
        (:mod:`modafill.ops.backends`); differentiable once in ``q``, ``k``, ``v`` and ``bias``.

    Raises:
        TypeError: an argument is no tensor, number or bool where one is expected.
        ValueError: a shape, dtype, device or value does not fit, or ``seed`` is missing.
        NotImplementedError: a second derivative is asked for.
        RuntimeError: ``backend`` names one that cannot run here.
    """
    backends.check_tensor("q", q)
    if scale is not None:
        scale = backends.number("scale", scale)
    else:
        # A tensor without a width is refused below.
        scale = q.shape[-1] ** -0.5 if q.ndim and q.shape[-1] else 1.0
    dropout = backends.number("dropout", dropout)
    backends.check_flag("causal", causal)
    if dropout > 0.0 and seed is None:
        raise ValueError("seed: got None, expected an integer because dropout > 0")
    q, k, v, bias = backends.autocast(q, k, v, bias)
    args = (
        q,
        k,
        v,
        bias,
        mode,
        causal,
        key_lengths,
        scale,
        dropout,
        *backends.split_seed(0 if seed is None else seed),
        row_id,
        False,
    )
    if backends.runs_directly(q, k, v, bias, mode, key_lengths, seed, row_id, out):
        return backends.written(_forward(*args, backend, out)[0], out)
    backends.check_out_allowed(out)
    if backends.runs_eagerly(q, k, v, bias, mode, key_lengths, seed, row_id):
        return backends.apply(_Eager, *args[:12], True, backend)[0]
    if backends.in_functorch():
        return _Function.apply(*args[:12], True, backend)[0]
    return _op(*args, backend)[0]
