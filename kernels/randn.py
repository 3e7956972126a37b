"""Triton twin of csrc/cuda/randn.cu."""

import math

import triton
import triton.language as tl
from torch import Tensor

from modafill.kernels.philox import normals
from modafill.kernels.rows import launch_rows, part_of_row, row_id_at, value_at


@triton.jit(do_not_specialize=["step", "seed", "draw"])
def randn_kernel(
    out,
    step_values,
    step_stride,
    step: tl.int64,
    seeds,
    seed: tl.int64,
    row_ids,
    draw,
    width,
    BLOCK: tl.constexpr,
):
    row, quad, element = part_of_row(width, BLOCK)
    step = value_at(step_values, step_stride, step, row)
    z = normals(value_at(seeds, 0, seed, row), row_id_at(row_ids, row), step, draw, quad)
    z = tl.where((step >= 0) & (step < 1 << 24), z, float("nan"))
    tl.store(out + row * width + element, z.to(out.dtype.element_ty), mask=element < width)


def randn(
    out: Tensor,
    step: int,
    step_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
    draw: int,
) -> None:
    """Fill contiguous ``out [B, ...]`` with noise."""
    batch, width = out.shape[0], math.prod(out.shape[1:])
    launch_rows(
        "randn",
        randn_kernel,
        out,
        batch,
        width,
        out,
        step_tensor,
        0 if step_tensor is None else step_tensor.ndim,
        step,
        seed_tensor,
        seed,
        row_id,
        draw,
        width,
    )
