"""Conv1D → GELU → Conv1D, forward and backward.

Rows of all samples stand one below the other; a tap that reaches out of its sample reads zeros. The forward makes its
hidden rows block by block and shifts them in registers. The backward makes hidden rows and their gradient again for as
many samples at a time as fit in the second-level cache; from them come the gradients of the input and, by rows in a
fixed order, of the weights.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modafill.kernels.tuned import capability_of, launch, tuned

# Hidden rows and their gradients that exist at a time.
_SLAB_BYTES = 1 << 24
# Weight gradients are summed in groups of rows: enough of them for this many programs, within these bytes.
_PROGRAMS, _GROUP_ROWS, _GROUP_BYTES = 512, 512, 1 << 24


@triton.jit
def _convolve(
    result, x, w, w_strides, row, rows, length, inputs, out, outputs,
    TAPS: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the convolution of ``x [rows, inputs]`` at ``row``; SIGN −1 transposes it. w_strides: input, output, tap."""
    position = row % length
    for tap in tl.static_range(TAPS):
        shift = SIGN * (tap - TAPS // 2)
        real = (row >= 0) & (row < rows) & (position + shift >= 0) & (position + shift < length)
        for first in range(0, inputs, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            left = tl.load(
                x + (row + shift)[:, None] * inputs + k[None, :], mask=real[:, None] & (k[None, :] < inputs), other=0.0
            )
            right = tl.load(
                w + (k[:, None] * w_strides[0] + out[None, :] * w_strides[1] + tap * w_strides[2]),
                mask=(k[:, None] < inputs) & (out[None, :] < outputs),
                other=0.0,
            )
            result = tl.dot(left, right, result, input_precision=PRECISION)
    return result


@triton.jit
def _offset(bias, at, count):
    """A row of biases for columns ``at``; zeros without a bias."""
    if bias is not None:
        return tl.load(bias + at, mask=at < count, other=0.0).to(tl.float32)[None, :]
    return tl.zeros_like(at).to(tl.float32)[None, :]


@triton.jit
def _gelu(a, TANH: tl.constexpr):
    """GELU and its derivative."""
    if TANH:
        # ½ (1 + tanh u) is the sigmoid of 2u.
        gate = tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * a * a) * gate * (1.0 - gate)
        return a * gate, gate + a * slope
    gate = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
    return a * gate, gate + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)


@triton.jit
def forward_kernel(
    y, x, w1, b1, w2, b2, w1_strides, w2_strides, rows, length, channels, hidden, outputs,
    TAPS1: tl.constexpr, TAPS2: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A block of hidden rows gives this many rows of the result.
    GIVES: tl.constexpr = BLOCK_M - TAPS2 + 1
    blocks = tl.cdiv(outputs, BLOCK_N)
    r = tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) // blocks).to(tl.int64) * GIVES
    hidden_row, row = first - TAPS2 // 2 + r, first + r
    out = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for h0 in range(0, hidden, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        a = tl.zeros([BLOCK_M, BLOCK_H], tl.float32) + _offset(b1, h, hidden)
        a = _convolve(a, x, w1, w1_strides, hidden_row, rows, length, channels, h, hidden, TAPS1, 1, PRECISION, BLOCK_K)
        value, _ = _gelu(a, TANH)
        # An infinite input times the zeros beside the weights is NaN.
        value = tl.where(h[None, :] < hidden, value, 0.0).to(y.dtype.element_ty)
        for tap in tl.static_range(TAPS2):
            if TAPS2 == 1:
                shifted = value
            else:
                position = row % length + (tap - TAPS2 // 2)
                source = tl.minimum(r + tap, BLOCK_M - 1)
                shifted = tl.gather(value, tl.broadcast_to(source[:, None], (BLOCK_M, BLOCK_H)), 0)
                shifted = tl.where(((position >= 0) & (position < length))[:, None], shifted, 0.0).to(value.dtype)
            w = tl.load(
                w2 + (h[:, None] * w2_strides[0] + out[None, :] * w2_strides[1] + tap * w2_strides[2]),
                mask=(h[:, None] < hidden) & (out[None, :] < outputs),
                other=0.0,
            )
            result = tl.dot(shifted, w, result, input_precision=PRECISION)
    result += _offset(b2, out, outputs)
    inside = ((r < GIVES) & (row < rows))[:, None] & (out[None, :] < outputs)
    tl.store(y + row[:, None] * outputs + out[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def hidden_kernel(
    value, value_grad, grad, x, w1, b1, w2, w1_strides, w2_strides, rows, length, channels, hidden, outputs,
    TAPS1: tl.constexpr, TAPS2: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Hidden rows after GELU, and the gradient of what went into it; each where it is wanted."""
    blocks = tl.cdiv(hidden, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    at, inside = row[:, None] * hidden + h[None, :], (row < rows)[:, None] & (h[None, :] < hidden)
    a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + _offset(b1, h, hidden)
    a = _convolve(a, x, w1, w1_strides, row, rows, length, channels, h, hidden, TAPS1, 1, PRECISION, BLOCK_K)
    made, slope = _gelu(a, TANH)
    if value is not None:
        tl.store(value + at, made.to(value.dtype.element_ty), mask=inside)
    if value_grad is not None:
        found = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        found = _convolve(
            found, grad, w2, w2_strides, row, rows, length, outputs, h, hidden, TAPS2, -1, PRECISION, BLOCK_K
        )
        tl.store(value_grad + at, (found * slope).to(value_grad.dtype.element_ty), mask=inside)


@triton.jit
def inputs_kernel(
    x_grad, value_grad, w1, w1_strides, rows, length, channels, hidden,
    TAPS1: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    result = _convolve(
        result, value_grad, w1, w1_strides, row, rows, length, hidden, c, channels, TAPS1, -1, PRECISION, BLOCK_K
    )
    at, inside = row[:, None] * channels + c[None, :], (row < rows)[:, None] & (c[None, :] < channels)
    tl.store(x_grad + at, result.to(x_grad.dtype.element_ty), mask=inside)


@triton.jit
def weights_kernel(
    sums, left, right, rows, length, lefts, rights, groups,
    TAPS: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ over a group of rows of left[row]ᵀ · right[row + tap − TAPS // 2], to sums [groups, lefts, rights, TAPS]."""
    m_blocks, n_blocks = tl.cdiv(lefts, BLOCK_M), tl.cdiv(rights, BLOCK_N)
    tap, rest = tl.program_id(0) % TAPS, tl.program_id(0) // TAPS
    tile, group = rest % (m_blocks * n_blocks), (rest // (m_blocks * n_blocks)).to(tl.int64)
    m, n = tile // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M), tile % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    at = sums + ((group * lefts + m[:, None]) * rights + n[None, :]) * TAPS + tap
    inside = (m[:, None] < lefts) & (n[None, :] < rights)
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin, end = group * rows // groups, (group + 1) * rows // groups
    shift = tap - TAPS // 2
    for step in range(tl.cdiv(end - begin, BLOCK_K).to(tl.int32)):
        row = begin + step * BLOCK_K + tl.arange(0, BLOCK_K)
        position = row % length + shift
        real = (row < end) & (position >= 0) & (position < length)
        a = tl.load(left + row[None, :] * lefts + m[:, None], mask=real[None, :] & (m[:, None] < lefts), other=0.0)
        b = tl.load(
            right + (row + shift)[:, None] * rights + n[None, :],
            mask=real[:, None] & (n[None, :] < rights),
            other=0.0,
        )
        result = tl.dot(a, b, result, input_precision=PRECISION)
    if ADD:
        result += tl.load(at, mask=inside, other=0.0)
    tl.store(at, result, mask=inside)


def config(kernel: str, capability: int, bytes_each: int, **sizes: int) -> dict[str, int]:
    """Launch configuration of one of the four kernels, its blocks cut to ``sizes``.

    Args:
        kernel: ``"forward"``, ``"hidden"``, ``"inputs"`` or ``"weights"``.
        capability: 10·major + minor.
        bytes_each: of an element, 2 or 4.
        sizes: by block (``BLOCK_M`` and so on) what it runs over.
    """
    found = dict(tuned("conv_gelu_conv", capability)[kernel][str(bytes_each)])
    for block, size in sizes.items():
        found[block] = min(found[block], max(16, triton.next_power_of_2(size)))
    return found


def _packed(w: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """A weight ``[out, in, taps]`` as the kernels read it fast, and its strides by input, output and tap."""
    if w.shape[2] > 1:
        w = w.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    return w, (w.stride(1), w.stride(0), w.stride(2))


class _Launcher:
    """Runs kernels on the device of ``x [B, L, C]``, with configurations for its dtype."""

    def __init__(self, x: Tensor) -> None:
        self.like, self.capability = x, capability_of(x)
        allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
        tf32 = allowed and x.dtype == torch.float32
        self.precision = "tf32" if tf32 else "tf32x3"

    def config(self, kernel: str, **sizes: int) -> dict[str, int]:
        return config(kernel, self.capability, self.like.element_size(), **sizes)

    def __call__(self, kernel: Any, programs: int, *args: Any, **settings: Any) -> None:
        launch(kernel, programs, self.like, *args, PRECISION=self.precision, **settings)


def conv_gelu_conv(
    out: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str
) -> None:
    """Write the result for contiguous ``x [B, L, C]`` into ``out``."""
    run = _Launcher(x)
    (batch, length, channels), hidden, outputs = x.shape, w1.shape[0], w2.shape[0]
    rows = batch * length
    settings = run.config("forward", BLOCK_M=rows + w2.shape[2] - 1, BLOCK_H=hidden, BLOCK_N=outputs, BLOCK_K=channels)
    (w1, w1_strides), (w2, w2_strides) = _packed(w1), _packed(w2)
    programs = triton.cdiv(rows, settings["BLOCK_M"] - w2.shape[2] + 1) * triton.cdiv(outputs, settings["BLOCK_N"])
    run(
        forward_kernel,
        programs,
        *(out, x, w1, b1, w2, b2, w1_strides, w2_strides, rows, length, channels, hidden, outputs),
        TAPS1=w1.shape[2],
        TAPS2=w2.shape[2],
        TANH=approximate == "tanh",
        **settings,
    )


def _sum_weights(run: _Launcher, sums: Tensor, left: Tensor, right: Tensor, length: int, add: bool) -> None:
    """Sums of ``left[row]ᵀ · right[row + tap]`` into ``sums [groups, lefts, rights, taps]``."""
    groups, lefts, rights, taps = sums.shape
    rows = left.shape[0] * length
    settings = run.config("weights", BLOCK_M=lefts, BLOCK_N=rights, BLOCK_K=rows)
    run(
        weights_kernel,
        taps * triton.cdiv(lefts, settings["BLOCK_M"]) * triton.cdiv(rights, settings["BLOCK_N"]) * groups,
        *(sums, left, right, rows, length, lefts, rights, groups),
        TAPS=taps,
        ADD=add,
        **settings,
    )


def conv_gelu_conv_backward(
    grads: list[Tensor | None],
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    approximate: str,
) -> None:
    """Write the gradients of x, w1, b1, w2 and b2 that ``grads`` has tensors for; those of parameters in float32."""
    x_grad, w1_grad, b1_grad, w2_grad, b2_grad = grads
    run = _Launcher(x)
    (batch, length, channels), hidden, outputs = x.shape, w1.shape[0], w2.shape[0]
    if b2_grad is not None:
        torch.sum(grad, (0, 1), dtype=torch.float32, out=b2_grad)
    if all(g is None for g in grads[:4]):
        return
    samples = max(1, min(batch, _SLAB_BYTES // (2 * length * hidden * x.element_size())))
    value = x.new_empty(samples, length, hidden) if w2_grad is not None else None
    below = x_grad is not None or w1_grad is not None or b1_grad is not None
    value_grad = x.new_empty(samples, length, hidden) if below else None
    shapes = w1.shape, w2.shape
    (w1, w1_strides), (w2, w2_strides) = _packed(w1), _packed(w2)
    sums = [None if g is None else _group_sums(run, g, samples * length) for g in (w1_grad, w2_grad)]
    for first in range(0, batch, samples):
        part = slice(first, min(first + samples, batch))
        count = part.stop - first
        rows = count * length
        x_part, grad_part = x[part], grad[part]
        value_part = None if value is None else value[:count]
        value_grad_part = None if value_grad is None else value_grad[:count]
        settings = run.config("hidden", BLOCK_M=rows, BLOCK_N=hidden, BLOCK_K=max(channels, outputs))
        run(
            hidden_kernel,
            triton.cdiv(rows, settings["BLOCK_M"]) * triton.cdiv(hidden, settings["BLOCK_N"]),
            *(value_part, value_grad_part, grad_part, x_part, w1, b1, w2, w1_strides),
            *((w2_strides[1], w2_strides[0], w2_strides[2]), rows, length, channels, hidden, outputs),
            TAPS1=shapes[0][2],
            TAPS2=shapes[1][2],
            TANH=approximate == "tanh",
            **settings,
        )
        if value_grad_part is not None:
            if x_grad is not None:
                settings = run.config("inputs", BLOCK_M=rows, BLOCK_N=channels, BLOCK_K=hidden)
                run(
                    inputs_kernel,
                    triton.cdiv(rows, settings["BLOCK_M"]) * triton.cdiv(channels, settings["BLOCK_N"]),
                    *(x_grad[part], value_grad_part, w1, (w1_strides[1], w1_strides[0], w1_strides[2])),
                    *(rows, length, channels, hidden),
                    TAPS1=shapes[0][2],
                    **settings,
                )
            if sums[0] is not None:
                _sum_weights(run, sums[0], value_grad_part, x_part, length, first > 0)
            if b1_grad is not None:
                found = value_grad_part.sum((0, 1), dtype=torch.float32)
                b1_grad.copy_(found) if first == 0 else b1_grad.add_(found)
        if sums[1] is not None and value_part is not None:
            _sum_weights(run, sums[1], grad_part, value_part, length, first > 0)
    for g, parts in zip((w1_grad, w2_grad), sums, strict=True):
        if g is not None and parts is not None and len(parts) > 1:
            torch.sum(parts, 0, out=g)


def _group_sums(run: _Launcher, weight_grad: Tensor, rows: int) -> Tensor:
    """Where groups of rows sum a weight's gradient; how many is a function of the shapes alone."""
    settings = run.config("weights", BLOCK_M=weight_grad.shape[0], BLOCK_N=weight_grad.shape[1], BLOCK_K=rows)
    tiles = weight_grad.shape[2]
    for size, block in zip(weight_grad.shape[:2], ("BLOCK_M", "BLOCK_N"), strict=True):
        tiles *= triton.cdiv(size, settings[block])
    groups = min(_PROGRAMS // tiles, rows // _GROUP_ROWS, _GROUP_BYTES // weight_grad.nbytes)
    return weight_grad[None] if groups <= 1 else weight_grad.new_empty((groups, *weight_grad.shape))
