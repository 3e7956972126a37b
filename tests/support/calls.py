"""Every op in a call that uses all its arguments, for what all ops have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modafill import ops
from modafill.diffusion import Schedule
from modafill.ops import backends

NETWORK_OPS = ("prompt_attention", "conv_gelu_conv")
STEP_OPS = tuple(name for name in backends.REGISTERED if name not in NETWORK_OPS)


@dataclass(frozen=True)
class Call:
    """A call of an op.

    Attributes:
        name: of the op.
        tensors: its tensors by argument.
        options: its other arguments.
        leaves: those of the tensors that get a gradient.
    """

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    leaves: tuple[str, ...]

    def __call__(self, **changes: Any) -> tuple[Tensor, ...]:
        """What the op returns, with other arguments."""
        found = getattr(ops, self.name)(**{**self.tensors, **self.options, **changes})
        return found if isinstance(found, tuple) else (found,)

    def on(self, backend: str) -> Call:
        return replace(self, options={**self.options, "backend": backend})

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The call with other tensors."""
        return replace(self, tensors={name: function(t) for name, t in self.tensors.items()})

    def results(self, run: Callable[..., tuple[Tensor, ...]] | None = None, **changes: Any) -> list[Tensor]:
        """What ``run``, the op if None, returns, and the gradients of the leaves for :func:`gradient_of` the first."""
        arguments = {**self.tensors, **changes}
        leaves = {name: arguments[name].detach().requires_grad_() for name in self.leaves}
        out = (run or self)(**{**arguments, **leaves})
        grads = torch.autograd.grad(out[0], list(leaves.values()), gradient_of(out[0])) if leaves else ()
        return [*(t.detach() for t in out), *grads]


def gradient_of(out: Tensor) -> Tensor:
    """A gradient for ``out`` whose elements differ."""
    return torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether dtypes and bits are."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def make_call(name: str) -> Call:
    """A small call of the op, with every argument that it has."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "prompt_attention":
        tensors = {
            "q": normal(4, 2, 5, 8),
            "k": normal(4, 2, 7, 8),
            "v": normal(4, 2, 7, 8),
            "bias": normal(3, 2, 5, 7),
        }
        picks = {"mode": torch.tensor([2, 0, 1, 2]), "key_lengths": torch.tensor([7, 2, 0, 5])}
        noise = {"row_id": torch.arange(4) + 2**40, "seed": torch.tensor(-3)}
        return Call(name, {**tensors, **picks, **noise}, {"causal": True, "dropout": 0.2}, tuple(tensors))
    if name == "conv_gelu_conv":
        tensors = {"x": normal(3, 6, 5), "w1": normal(7, 5, 3), "b1": normal(7), "w2": normal(4, 7, 3), "b2": normal(4)}
        return Call(name, tensors, {"approximate": "tanh"}, tuple(tensors))
    picks = {"step": torch.tensor([1, 50, 20, 7]), "row_id": torch.arange(4) - 2**40, "seed": torch.tensor(-3)}
    if name == "randn":
        return Call(name, picks, {"shape": (4, 3, 5)}, ())
    leaves = {"masked_reverse_step": ("x", "eps", "observed"), "ddim_step": ("x", "eps"), "add_noise": ("x",)}[name]
    tensors = {**{leaf: normal(4, 3, 5) for leaf in leaves}, "table": Schedule.linear(50, 1e-3, 0.1).table, **picks}
    if name == "masked_reverse_step":
        tensors["available"] = torch.rand(4, 3, generator=generator) < 0.5
    if name == "ddim_step":
        tensors["prev_step"] = torch.tensor([0, 30, 19, 3])
        return Call(name, tensors, {"eta": 0.5, "clip": 1.0}, leaves)
    return Call(name, tensors, {}, leaves)
