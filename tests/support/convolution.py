"""Inputs for Conv1D → GELU → Conv1D, and its comparison with the float64 reference, on any backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modafill import ops
from modafill.ops import reference

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NAMES = ("x", "w1", "b1", "w2", "b2")


def make(
    batch: int = 3,
    length: int = 6,
    channels: int = 5,
    hidden: int = 7,
    outputs: int = 4,
    first_taps: int = 3,
    second_taps: int = 1,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, length, channels),
        (hidden, channels, first_taps),
        (hidden,),
        (outputs, hidden, second_taps),
        (outputs,),
    ]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    for w in (1, 3):
        tensors[w] /= (tensors[w].shape[1] * tensors[w].shape[2]) ** 0.5
    return [t.to(dtype) for t in tensors]


def results(op: Any, inputs: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = op(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def compare(inputs: list[Tensor], backend: str = "auto", **options: Any) -> None:
    """Ours against the reference, by the norm of each result."""
    shape = (*inputs[0].shape[:2], len(inputs[4]))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(inputs[0])
    rows, (hidden, channels), outputs = shape[0] * shape[1], inputs[1].shape[:2], shape[2]
    usual = {"out": 1.0, "x": (outputs / channels) ** 0.5, "w2": rows**0.5, "b2": rows**0.5}
    usual |= dict.fromkeys(("w1", "b1"), (rows * outputs / hidden) ** 0.5)
    ours = results(ops.conv_gelu_conv, inputs, grad, backend=backend, **options)
    exact = results(reference.conv_gelu_conv, [t.double() for t in inputs], grad.double(), **options)
    for name, found, expected in zip(("out", *NAMES), ours, exact, strict=True):
        assert (found.dtype, found.shape) == (inputs[0].dtype, expected.shape)
        # Sums may cancel: rounding errors are measured by how large they are where they do not.
        error = (found - expected).norm() / (expected.norm() + usual[name] * max(1, expected.numel()) ** 0.5)
        assert error <= TOLERANCE[inputs[0].dtype], f"{name}: {error:.2e}"
