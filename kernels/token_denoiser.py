"""A transformer over the few tokens of each sample: all layers, and all steps of a reverse loop, in one program.

A program has the tokens of some samples. What goes from layer to layer stays in registers; normalised rows and a
loop's state pass through memory of its own, in the caches, as weights do. Tokens of one sample attend to each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modafill.kernels.philox import normals
from modafill.kernels.rows import value_at
from modafill.kernels.tuned import capability_of, launch, tuned


@triton.jit
def _matrix(weights, rows, columns, n_rows, n_columns, stride):
    """Rows of a matrix; zeros outside."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    return tl.load(weights + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _vector(values, at, count):
    return tl.load(values + at, mask=at < count, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _product(a, rows, weights, at, count, inputs, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of ``a [·, inputs]`` times rows ``at`` of ``weights [count, inputs]``."""
    result = tl.zeros([rows.shape[0], at.shape[0]], tl.float32)
    for k0 in range(0, inputs, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        left = tl.load(a + rows[:, None] * inputs + k[None, :], mask=k[None, :] < inputs, other=0.0)
        right = tl.trans(_matrix(weights, at, k, count, inputs, inputs))
        result = tl.dot(left.to(weights.dtype.element_ty), right, result, input_precision=PRECISION)
    return result


@triton.jit
def _linear(a, rows, weights, at, outputs, inputs, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """Outputs ``at`` of a layer whose biases lie behind its ``[outputs, inputs]``."""
    products = _product(a, rows, weights, at, outputs, inputs, PRECISION, BLOCK_K)
    return products + _vector(weights + outputs * inputs, at, outputs)


@triton.jit
def _normalise(h, normalised, r, c, channels, epsilon):
    """Layer norm of rows that are zero outside; its weights and biases are part of what reads it."""
    centred = tl.where(c[None, :] < channels, h - (tl.sum(h, 1) / channels)[:, None], 0.0)
    centred *= tl.rsqrt(tl.sum(centred * centred, 1) / channels + epsilon)[:, None]
    # Other threads read what these write, and may still read what was there.
    tl.debug_barrier()
    at = normalised + r[:, None] * channels + c[None, :]
    tl.store(at, centred.to(normalised.dtype.element_ty), mask=c[None, :] < channels)
    tl.debug_barrier()


@triton.jit
def _attend(
    h, n, weights, r, c, same, channels, heads, size, scale,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``h`` and what the attention of ``n`` adds; weights: ``[3 C, C]``, ``[3 C]``, ``[C, C]``, ``[C]``."""
    d = tl.arange(0, BLOCK_D)
    square = channels * channels
    out_of = weights + 3 * (square + channels)
    for head in range(heads):
        # Of this head: its rows of the three matrices, their biases, its columns of what they are mixed by.
        own, bias = weights + head * size * channels, weights + 3 * square + head * size
        q = _product(n, r, own, d, size, channels, PRECISION, BLOCK_K) + _vector(bias, d, size)
        k = _product(n, r, own + square, d, size, channels, PRECISION, BLOCK_K)
        k = (k + _vector(bias + channels, d, size)).to(n.dtype.element_ty)
        v = _product(n, r, own + 2 * square, d, size, channels, PRECISION, BLOCK_K)
        v = (v + _vector(bias + 2 * channels, d, size)).to(n.dtype.element_ty)
        logits = tl.dot(q.to(k.dtype), tl.trans(k), input_precision=PRECISION) * scale
        logits = tl.where(same, logits, float("-inf"))
        p = tl.exp(logits - tl.max(logits, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        # Zero times what is not finite is NaN, in every sample of the tile: it goes to its own alone.
        finite = tl.abs(v.to(tl.float32)) < float("inf")
        spoilt = tl.max(tl.where(finite, 0, 1), 1)[None, :] != 0
        p = tl.where(same & spoilt, float("nan"), p).to(k.dtype)
        mixed = tl.dot(p, tl.where(finite, v, 0.0).to(k.dtype), input_precision=PRECISION).to(k.dtype)
        columns = tl.trans(_matrix(out_of + head * size, c, d, channels, size, channels))
        h = tl.dot(mixed, columns, h, input_precision=PRECISION)
    return h + _vector(out_of + square, c, channels)


@triton.jit
def _feed_forward(
    h, n, weights, r, c, channels, hidden, PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """``h`` and what the two layers add; weights: ``[F, C]``, ``[F]``, ``[C, F]``, ``[C]``."""
    second = weights + hidden * (channels + 1)
    for f0 in range(0, hidden, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        a = _linear(n, r, weights, f, hidden, channels, PRECISION, BLOCK_K)
        a = (0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))).to(n.dtype.element_ty)
        h = tl.dot(a, tl.trans(_matrix(second, c, f, channels, hidden, hidden)), h, input_precision=PRECISION)
    return h + _vector(second + channels * hidden, c, channels)


@triton.jit(do_not_specialize=["seed", "samples", "steps", "first_step"])
def token_denoiser_kernel(
    result, state, before, shown, available, added, matrices, normalised, coefficients, seeds, seed: tl.int64, row_ids,
    samples, tokens, channels, heads, size, hidden, layers, steps, first_step, scale, epsilon,
    LOOP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Whole samples; rows behind the last one are complete and belong to nobody.
    count = BLOCK_T // tokens
    first = tl.program_id(0).to(tl.int64) * count
    r, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    sample, token = first + r // tokens, r % tokens
    real = (r < count * tokens) & (sample < samples)
    start = (first * tokens + r)[:, None] * channels
    seen = tl.load(available + first * tokens + r, mask=real, other=1) != 0
    same = (r // tokens)[:, None] == (r // tokens)[None, :]
    # Of complete samples nobody asks anything.
    depth = tl.where(tl.min(seen.to(tl.int32), 0) == 0, layers, 0)
    # The tile's own rows of a buffer for what is between two layers.
    n = normalised + tl.program_id(0).to(tl.int64) * BLOCK_T * channels
    for step in range(steps):
        place = added + ((step * tokens + token) * 2 + seen.to(tl.int32))[:, None] * channels
        h = tl.load(place + c[None, :], mask=real[:, None] & (c[None, :] < channels), other=0.0)
        h += tl.load(state + start + c[None, :], mask=real[:, None] & (c[None, :] < channels), other=0.0)
        matrix = matrices
        for _ in range(depth):
            _normalise(h, n, r, c, channels, epsilon)
            h = _attend(h, n, matrix, r, c, same, channels, heads, size, scale, PRECISION, BLOCK_D, BLOCK_K)
            _normalise(h, n, r, c, channels, epsilon)
            matrix += 4 * channels * (channels + 1)
            h = _feed_forward(h, n, matrix, r, c, channels, hidden, PRECISION, BLOCK_F, BLOCK_K)
            matrix += 2 * channels * hidden + hidden + channels
        _normalise(h, n, r, c, channels, epsilon)
        for w0 in range(0, channels, BLOCK_W):
            w = w0 + tl.arange(0, BLOCK_W)
            inside = real[:, None] & (w[None, :] < channels)
            missing, at = inside & (seen[:, None] == 0), start + w[None, :]
            said = _linear(n, r, matrix, w, channels, channels, PRECISION, BLOCK_K)
            if LOOP == "none":
                tl.store(result + at, tl.where(missing, said, 0.0), mask=inside)
            elif LOOP == "clean":
                # [√ᾱ, σ, factors of x, of x̂₀ and of the x̂₀ before]
                of = coefficients + step * 5
                x_tile = tl.load(state + at, mask=missing, other=0.0)
                clean = tl.load(of) * x_tile - tl.load(of + 1) * said
                earlier = tl.load(before + at, mask=missing, other=0.0)
                x_tile = tl.load(of + 2) * x_tile + tl.load(of + 3) * clean + tl.load(of + 4) * earlier
                # Those that write an element need not be those that read it.
                tl.debug_barrier()
                tl.store(before + at, clean, mask=missing)
                tl.store(state + at, x_tile, mask=missing)
            else:
                # [factors of x and ε̂, posterior's σ; √ᾱ and σ of the step before]
                of = coefficients + step * 5
                quad = (token * (channels // 4))[:, None] + (w0 // 4 + tl.arange(0, BLOCK_W // 4))[None, :]
                row_id = tl.load(row_ids + sample, mask=real, other=0)[:, None]
                z = normals(value_at(seeds, 0, seed, 0), row_id, (first_step - step).to(tl.int64), 0, quad)
                source = tl.where(seen[:, None], shown + at, state + at)
                mean = tl.where(seen, tl.load(of + 3), tl.load(of))[:, None] * tl.load(source, mask=inside, other=0.0)
                mean = tl.where(seen[:, None], mean, mean + tl.load(of + 1) * said)
                std = tl.where(seen, tl.load(of + 4), tl.load(of + 2))[:, None]
                # Also the sign of a zero that is observed comes out as it was.
                tl.store(state + at, tl.where(std > 0, mean + std * z, mean), mask=inside)
        # Other threads read what these have written.
        tl.debug_barrier()


def config(capability: int, bytes_each: int, rows: int, processors: int) -> dict[str, int]:
    """Launch configuration: the largest listed tile that leaves none of the device's processors idle, or the smallest.

    Args:
        capability: 10·major + minor.
        bytes_each: of a weight, 2 or 4.
        rows: tokens in all.
    """
    listed = sorted(tuned("token_denoiser", capability)[str(bytes_each)], key=lambda found: -found["BLOCK_T"])
    return next((found for found in listed if rows >= found["BLOCK_T"] * processors), listed[-1])


def token_denoiser(
    out: Tensor | None,
    x: Tensor,
    available: Tensor,
    added: Tensor,
    matrices: Tensor,
    *,
    heads: int,
    hidden: int,
    layers: int,
    epsilon: float,
    loop: str = "none",
    observed: Tensor | None = None,
    coefficients: Tensor | None = None,
    first_step: int = 0,
    seed: int = 0,
    seed_tensor: Tensor | None = None,
    row_id: Tensor | None = None,
) -> None:
    """Write what the network says of contiguous ``x [B, M, C]`` into ``out``, or take ``x`` through a reverse loop.

    Args:
        added: ``[M, 2, C]``, for a loop ``[S, M, 2, C]``.
        matrices: of all layers with their biases, one behind the other; those of normalisations are in them.
        loop: ``"none"``; ``"replace"`` or ``"clean"``, in place, without ``out``.
        observed, coefficients, first_step, seed, seed_tensor, row_id: as :func:`modafill.ops.reverse_loop`; ``"clean"``
            needs the coefficients alone.
    """
    samples, tokens, channels = x.shape
    if x.numel() == 0:
        return
    processors = 1 if x.is_cpu else torch.cuda.get_device_properties(x.device).multi_processor_count
    settings = dict(config(capability_of(x), matrices.element_size(), samples * tokens, processors))
    settings["BLOCK_T"] = max(settings["BLOCK_T"], triton.next_power_of_2(tokens))
    programs = triton.cdiv(samples, settings["BLOCK_T"] // tokens)
    normalised = matrices.new_empty(programs * settings["BLOCK_T"], channels)
    before = torch.zeros_like(x) if loop == "clean" else None
    tf32 = matrices.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    launch(
        token_denoiser_kernel,
        programs,
        x,
        *(out, x, before, observed, available, added, matrices, normalised),
        *(coefficients, seed_tensor, seed, row_id),
        *(samples, tokens, channels, heads, channels // heads, hidden, layers),
        *(1 if coefficients is None else len(coefficients), first_step, (channels // heads) ** -0.5, epsilon),
        LOOP=loop,
        PRECISION="tf32" if tf32 else "tf32x3",
        BLOCK_W=min(64, max(16, triton.next_power_of_2(channels))),
        BLOCK_C=max(16, triton.next_power_of_2(channels)),
        BLOCK_D=max(16, triton.next_power_of_2(channels // heads)),
        # No contraction: the noise has the bits of the CPU's.
        enable_fp_fusion=False,
        **settings,
    )
