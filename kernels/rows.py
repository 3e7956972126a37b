"""What the step kernels share: a program's part of a row, the row's step and noise key, the launch configuration."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from modafill.kernels.tuned import capability_of, launch, tuned

SIGNAL, SIGMA, POSTERIOR_X, POSTERIOR_EPS, POSTERIOR_STD, COLUMNS = (tl.constexpr(column) for column in range(6))


@triton.jit
def part_of_row(width, BLOCK: tl.constexpr):
    """This program's row, its quads in the row and their elements."""
    parts = tl.cdiv(width, 4 * BLOCK)
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    return row.to(tl.int64), part * BLOCK + tl.arange(0, BLOCK), part * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)


@triton.jit
def value_at(values, stride, value, row):
    """A step or seed: in memory, for all rows (stride 0) or one for each, or given as an integer."""
    if values is not None:
        return tl.load(values + row * stride)
    return value.to(tl.int64)


@triton.jit
def row_id_at(row_ids, row):
    if row_ids is not None:
        return tl.load(row_ids + row)
    return row


@triton.jit
def coefficient(table, step, inside, COLUMN: tl.constexpr):
    """A column of the table at ``step``; NaN outside the schedule."""
    return tl.load(table + step * COLUMNS + COLUMN, mask=inside, other=float("nan"))


def config(op: str, capability: int, width: int) -> dict[str, Any]:
    """BLOCK (quads) and num_warps for ``op`` on a device, fitted to rows of ``width`` elements."""
    listed = tuned(op, capability)
    block = min(listed["BLOCK"], max(32, triton.next_power_of_2(triton.cdiv(width, 4))))
    return {"BLOCK": block, "num_warps": max(1, min(listed["num_warps"], block // 32))}


def launch_rows(op: str, kernel: Any, like: Tensor, batch: int, width: int, *args: Any, **constants: Any) -> None:
    """Run ``kernel`` over ``batch`` rows of ``width`` elements on the device of ``like``."""
    if batch == 0 or width == 0:
        return
    settings = config(op, capability_of(like), width)
    programs = batch * triton.cdiv(width, 4 * settings["BLOCK"])
    # No contraction: the noise has the bits of the CPU's.
    launch(kernel, programs, like, *args, **constants, **settings, enable_fp_fusion=False)
