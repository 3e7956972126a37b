"""Triton twin of csrc/cuda/add_noise.cu."""

import math

import triton
import triton.language as tl
from torch import Tensor

from modafill.kernels.philox import normals
from modafill.kernels.rows import SIGMA, SIGNAL, coefficient, launch_rows, part_of_row, row_id_at, value_at


@triton.jit(do_not_specialize=["step", "seed"])
def add_noise_kernel(
    noisy,
    noise,
    x,
    table,
    last_step,
    step_values,
    step_stride,
    step: tl.int64,
    seeds,
    seed: tl.int64,
    row_ids,
    width,
    BLOCK: tl.constexpr,
):
    row, quad, element = part_of_row(width, BLOCK)
    mask = element < width
    at = row * width + element
    step = value_at(step_values, step_stride, step, row)
    inside = (step >= 1) & (step <= last_step)
    z = normals(value_at(seeds, 0, seed, row), row_id_at(row_ids, row), step, 1, quad)
    signal, sigma = coefficient(table, step, inside, SIGNAL), coefficient(table, step, inside, SIGMA)
    result = signal * tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + sigma * z
    tl.store(noisy + at, result.to(noisy.dtype.element_ty), mask=mask)
    tl.store(noise + at, z.to(noise.dtype.element_ty), mask=mask)


def add_noise(
    noisy: Tensor,
    noise: Tensor,
    x: Tensor,
    table: Tensor,
    step: int,
    step_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    row_id: Tensor | None,
) -> None:
    """Write contiguous ``x [B, ...]`` at a step into ``noisy`` and its noise into ``noise``."""
    batch, width = x.shape[0], math.prod(x.shape[1:])
    launch_rows(
        "add_noise",
        add_noise_kernel,
        noisy,
        batch,
        width,
        noisy,
        noise,
        x,
        table,
        table.shape[0] - 1,
        step_tensor,
        0 if step_tensor is None else step_tensor.ndim,
        step,
        seed_tensor,
        seed,
        row_id,
        width,
    )
