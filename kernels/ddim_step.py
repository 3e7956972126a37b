"""Triton twin of csrc/cuda/ddim_step.cu."""

import math

import triton
import triton.language as tl
from torch import Tensor

from modafill.kernels.philox import normals
from modafill.kernels.rows import SIGMA, SIGNAL, coefficient, launch_rows, part_of_row, row_id_at, value_at


@triton.jit(do_not_specialize=["step", "prev_step", "seed"])
def ddim_step_kernel(
    out,
    x,
    eps,
    table,
    last_step,
    step_values,
    step_stride,
    step: tl.int64,
    prev_step_values,
    prev_step_stride,
    prev_step: tl.int64,
    eta,
    clip,
    seeds,
    seed: tl.int64,
    row_ids,
    width,
    NOISY: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, quad, element = part_of_row(width, BLOCK)
    mask = element < width
    at = row * width + element
    step = value_at(step_values, step_stride, step, row)
    prev_step = value_at(prev_step_values, prev_step_stride, prev_step, row)
    inside = (step >= 1) & (step <= last_step) & (prev_step >= 0) & (prev_step < step)

    # The coefficients and their order of operations are those of DdimRow in csrc/common/step.h.
    signal, sigma = coefficient(table, step, inside, SIGNAL), coefficient(table, step, inside, SIGMA)
    prev_signal, prev_sigma = (
        coefficient(table, prev_step, inside, SIGNAL),
        coefficient(table, prev_step, inside, SIGMA),
    )
    ratio = tl.div_rn(signal, prev_signal)
    spread = tl.where(
        prev_sigma < prev_signal,
        tl.div_rn((sigma - prev_sigma) * (sigma + prev_sigma), prev_signal * prev_signal),
        1.0 - ratio * ratio,
    )
    std = tl.div_rn(eta * prev_sigma, sigma) * tl.sqrt_rn(spread)
    carried = tl.div_rn(eta * prev_sigma * prev_sigma * ratio, sigma)
    direction = tl.sqrt_rn((1.0 - eta * eta) * (prev_sigma * prev_sigma) + carried * carried)

    x_t = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    eps_t = tl.load(eps + at, mask=mask, other=0.0).to(tl.float32)
    if CLIPPED:
        x_0 = tl.div_rn(x_t - sigma * eps_t, signal + tl.zeros_like(x_t))
        x_0 = tl.where(x_0 < -clip, -clip, tl.where(x_0 > clip, clip, x_0))
        result = prev_signal * x_0 + direction * tl.div_rn(x_t - signal * x_0, sigma + tl.zeros_like(x_t))
    else:
        x_scale = tl.div_rn(prev_signal, signal)
        result = x_scale * x_t + (direction - x_scale * sigma) * eps_t
    if NOISY:
        result += std * normals(value_at(seeds, 0, seed, row), row_id_at(row_ids, row), step, 0, quad)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


def ddim_step(
    out: Tensor,
    x: Tensor,
    eps: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    prev_step: int,
    prev_step_tensor: Tensor | None,
    eta: float,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    clip: float | None,
) -> None:
    """Write the step of contiguous ``x, eps [B, ...]`` into ``out``."""
    batch, width = x.shape[0], math.prod(x.shape[1:])
    launch_rows(
        "ddim_step",
        ddim_step_kernel,
        out,
        batch,
        width,
        out,
        x,
        eps,
        table,
        table.shape[0] - 1,
        step_tensor,
        0 if step_tensor is None else step_tensor.ndim,
        step,
        prev_step_tensor,
        0 if prev_step_tensor is None else prev_step_tensor.ndim,
        prev_step,
        eta,
        0.0 if clip is None else clip,
        seed_tensor,
        seed,
        row_id,
        width,
        NOISY=eta > 0.0,
        CLIPPED=clip is not None,
    )
