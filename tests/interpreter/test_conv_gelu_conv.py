"""Conv1D → GELU → Conv1D's Triton kernels in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from support.convolution import compare, make


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("taps", [(1, 1), (3, 1), (1, 3), (3, 3), (5, 7), (7, 5)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 6, 5, 7, 4), (9, 8, 20, 33, 17), (2, 70, 40, 50, 49)])
def test_against_the_reference(
    shape: tuple[int, ...], taps: tuple[int, int], approximate: str, dtype: torch.dtype
) -> None:
    compare(make(*shape, *taps, dtype), backend="triton", approximate=approximate)
