"""Prompt attention's Triton kernels in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from support.attention import OPTIONS, compare, make, options_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("bias_heads", [1, 2])
@pytest.mark.parametrize("queries, keys, width", [(1, 1, 4), (5, 7, 8), (7, 5, 12), (33, 65, 32), (70, 31, 20)])
def test_against_the_reference(
    queries: int, keys: int, width: int, bias_heads: int, name: str, dtype: torch.dtype
) -> None:
    inputs, mode = make(3, 2, queries, keys, width, 2, bias_heads, dtype)
    # With one key Σ dO·O and dO·V are the same number, made in two ways.
    compare(inputs, mode, backend="triton", floor=1.0 if keys == 1 else 0.1, **options_for(name, 3, keys))
