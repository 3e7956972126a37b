"""Triton twin of csrc/cuda/masked_reverse_step.cu."""

import triton
import triton.language as tl
from torch import Tensor

from modafill.kernels.philox import normals
from modafill.kernels.rows import (
    POSTERIOR_EPS,
    POSTERIOR_STD,
    POSTERIOR_X,
    SIGMA,
    SIGNAL,
    coefficient,
    launch_rows,
    part_of_row,
    row_id_at,
    value_at,
)


@triton.jit(do_not_specialize=["step", "seed"])
def masked_reverse_step_kernel(
    out,
    x,
    eps,
    observed,
    available,
    table,
    last_step,
    step_values,
    step_stride,
    step: tl.int64,
    seeds,
    seed: tl.int64,
    row_ids,
    modalities,
    width,
    BLOCK: tl.constexpr,
):
    row, quad, element = part_of_row(modalities * width, BLOCK)
    mask = element < modalities * width
    at = row * (modalities * width) + element
    step = value_at(step_values, step_stride, step, row)
    inside = (step >= 1) & (step <= last_step)
    z = normals(value_at(seeds, 0, seed, row), row_id_at(row_ids, row), step, 0, quad)

    # What an element does not need is not read.
    is_observed = tl.load(available + row * modalities + element // width, mask=mask, other=0) != 0
    from_observed, from_x = mask & is_observed, mask & (is_observed == 0)
    renoised = coefficient(table, step - 1, inside, SIGNAL) * tl.load(observed + at, mask=from_observed, other=0.0).to(
        tl.float32
    )
    generated = coefficient(table, step, inside, POSTERIOR_X) * tl.load(x + at, mask=from_x, other=0.0).to(tl.float32)
    generated += coefficient(table, step, inside, POSTERIOR_EPS) * tl.load(eps + at, mask=from_x, other=0.0).to(
        tl.float32
    )
    mean = tl.where(is_observed, renoised, generated)
    std = tl.where(
        is_observed, coefficient(table, step - 1, inside, SIGMA), coefficient(table, step, inside, POSTERIOR_STD)
    )
    result = tl.where(step > 1, mean + std * z, mean)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


def masked_reverse_step(
    out: Tensor,
    x: Tensor,
    eps: Tensor,
    observed: Tensor,
    available: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
) -> None:
    """Write the step of contiguous ``x, eps, observed [B, M, D]`` into ``out``."""
    batch, modalities, width = x.shape
    launch_rows(
        "masked_reverse_step",
        masked_reverse_step_kernel,
        out,
        batch,
        modalities * width,
        out,
        x,
        eps,
        observed,
        available,
        table,
        table.shape[0] - 1,
        step_tensor,
        0 if step_tensor is None else step_tensor.ndim,
        step,
        seed_tensor,
        seed,
        row_id,
        modalities,
        width,
    )
