"""Inputs for prompt attention, and its comparison with the float64 reference, on any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modafill import ops
from modafill.ops import reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make(
    batch: int = 3,
    heads: int = 2,
    queries: int = 5,
    keys: int = 7,
    width: int = 8,
    modes: int = 3,
    bias_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, bias and mode."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n, width) for n in (queries, keys, keys)] + [(modes, bias_heads, queries, keys)]
    mode = torch.randint(0, modes, (batch,), generator=g)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes], mode


def results(
    attention: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, mode: Tensor | None, **options: Any
) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves, mode, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def compare(
    inputs: list[Tensor], mode: Tensor | None, backend: str = "auto", floor: float = 1e-3, **options: Any
) -> list[Tensor]:
    """Ours against the reference, by the norm of each result and of ``floor`` in each of its elements."""
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).to(inputs[0])
    ours = results(ops.prompt_attention, inputs, grad, mode, backend=backend, **options)
    exact = results(reference.prompt_attention, [x.double() for x in inputs], grad.double(), mode, **options)
    for name, found, expected in zip(("out", "q", "k", "v", "bias"), ours, exact, strict=True):
        assert found.dtype == inputs[0].dtype
        assert found.shape == expected.shape
        scale = expected.norm() + floor * max(1, expected.numel()) ** 0.5
        error = (found - expected).norm() / scale
        assert error <= TOLERANCE[inputs[0].dtype], f"{name}: {error:.2e}"
    return ours


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "lengths": {"key_lengths": "some"},
    "both": {"causal": True, "key_lengths": "some"},
    "scale": {"scale": -0.3},
    "dropout": {"dropout": 0.25, "seed": 5},
    "everything": {"causal": True, "key_lengths": "some", "dropout": 0.1, "seed": torch.tensor(-8), "row_id": "some"},
}


def options_for(name: str, batch: int, keys: int) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if "key_lengths" in options:
        # One sample has no key at all, one has every key.
        options["key_lengths"] = torch.tensor([0, keys, (keys + 1) // 2, keys, 1] * batch)[:batch].clamp(max=keys)
    if "row_id" in options:
        options["row_id"] = torch.arange(batch) * 7 + 2**40
    return options
