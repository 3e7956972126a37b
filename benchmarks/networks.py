"""The ops that networks are trained with, forward and backward, and their rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modafill import ops
from modafill.benchmarks.rivals import (
    SEED,
    Builders,
    _compile,
    _compile_now,
    _normal,
    _own_providers,
    _require,
    _set_count,
    _within,
)
from modafill.benchmarks.runner import Case, Check, Contender
from modafill.ops import reference

Network = Callable[..., Tensor]
MODES = ("forward", "backward", "both")
N_MODES = 7


@dataclass
class Set:
    """One buffer set: tensors that want gradients, others, the gradient of the result, and graphs by provider."""

    leaves: list[Tensor]
    others: tuple[Any, ...]
    grad: Tensor
    graphs: dict[str, Tensor] = field(default_factory=dict)


class Differentiable:
    """An op with gradients in every input, timed forward, backward on a graph that is kept, or both.

    Args:
        case: its ``mode`` is one of :data:`MODES`.
        make: from a generator, the tensors that want gradients, other arguments, and the shape of the result.
        ours: called as ``ours(*leaves, *others, backend=…)``.
        exact: the float64 reference; eager: the plain PyTorch form.
        rivals: by provider name, further forms.
    """

    def __init__(
        self,
        case: Case,
        make: Callable[[torch.Generator], tuple[list[Tensor], tuple[Any, ...], Sequence[int]]],
        ours: Network,
        exact: Network,
        eager: Network,
        rivals: Mapping[str, Network],
    ) -> None:
        self.case, self.ours, self.exact, self.eager, self.rivals = case, ours, exact, eager, rivals
        generator = torch.Generator(case.device).manual_seed(SEED)

        def one_set() -> Set:
            leaves, others, shape = make(generator)
            return Set([x.requires_grad_() for x in leaves], others, _normal(case, shape, generator))

        first = one_set()
        inputs = sum(x.nbytes for x in first.leaves)
        # Forward reads the inputs and writes the result; backward reads them and a gradient and writes as many.
        forward, backward = inputs + first.grad.nbytes, 2 * inputs + first.grad.nbytes
        self.traffic = {"forward": forward, "backward": backward, "both": forward + backward}[case.mode]
        self.buffers = [first, *(one_set() for _ in range(_set_count(case, inputs + first.grad.nbytes) - 1))]

    @property
    def sets(self) -> int:
        return len(self.buffers)

    @property
    def builders(self) -> Builders:
        made: dict[str, Callable[[], Contender]] = {
            name: partial(self._ours, name, backend) for name, backend in _own_providers(self.case)
        }
        made["eager"] = partial(self._contender, "eager", self.eager)
        made["torch.compile"] = self._compiled
        return made | {name: partial(self._contender, name, network) for name, network in self.rivals.items()}

    def _ours(self, name: str, backend: str) -> Contender:
        _require(self.case, backend)
        return self._contender(name, partial(self.ours, backend=backend))

    def _compiled(self) -> Contender:
        contender = self._contender("torch.compile", _compile(self.eager, self.case))
        _compile_now(lambda: contender.run(0))
        return contender

    def _contender(self, name: str, network: Network) -> Contender:
        def run(i: int) -> Any:
            b = self.buffers[i]
            if self.case.mode == "forward":
                return network(*b.leaves, *b.others)
            with torch.enable_grad():
                if self.case.mode == "both":
                    return torch.autograd.grad(network(*b.leaves, *b.others), b.leaves, b.grad)
                if name not in b.graphs:
                    b.graphs[name] = network(*b.leaves, *b.others)
                return torch.autograd.grad(b.graphs[name], b.leaves, b.grad, retain_graph=True)

        return Contender(run, lambda: self._check(run(0)), self.traffic)

    def _check(self, result: Any) -> Check:
        b = self.buffers[0]

        def all_of(network: Network, dtype: torch.dtype) -> list[Tensor]:
            leaves = [x.detach().to(dtype).requires_grad_() for x in b.leaves]
            with torch.enable_grad():
                out = network(*leaves, *b.others)
                if self.case.mode == "forward":
                    return [out.detach()]
                return list(torch.autograd.grad(out, leaves, b.grad.to(dtype)))

        found = [result] if self.case.mode == "forward" else list(result)
        exact, eager = all_of(self.exact, torch.float64), all_of(self.eager, self.case.dtype)
        checks = [_within(*one) for one in zip(found, exact, eager, strict=True)]
        return Check(all(c.correct for c in checks), max(c.max_error for c in checks))


def prompt_attention(case: Case) -> Differentiable:
    """``[B, H, L, d]`` queries and keys, a bias table for each of seven modes."""
    batch, heads, length, width = case.shape

    def make(generator: torch.Generator) -> tuple[list[Tensor], tuple[Any, ...], Sequence[int]]:
        leaves = [_normal(case, case.shape, generator) for _ in range(3)]
        bias = _normal(case, (N_MODES, heads, length, length), generator)
        mode = torch.randint(N_MODES, (batch,), device=case.device, generator=generator)
        return [*leaves, bias], (mode,), case.shape

    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * width**-0.5 + bias[mode]).softmax(-1) @ v

    def materialised(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[mode])

    rivals = {"sdpa-materialised": materialised}
    return Differentiable(case, make, ops.prompt_attention, reference.prompt_attention, eager, rivals)


def conv_gelu_conv(case: Case) -> Differentiable:
    """``(B, L, C, hidden, taps)``: both convolutions with the same number of taps, back to C channels."""
    batch, length, channels, hidden, taps = case.shape

    def make(generator: torch.Generator) -> tuple[list[Tensor], tuple[Any, ...], Sequence[int]]:
        shapes = [(batch, length, channels), (hidden, channels, taps), (hidden,), (channels, hidden, taps), (channels,)]
        leaves = [_normal(case, shape, generator) for shape in shapes]
        for weight in (leaves[1], leaves[3]):
            weight /= (weight.shape[1] * taps) ** 0.5
        return leaves, (), shapes[0]

    def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        hidden = F.gelu(F.conv1d(x.transpose(1, 2), w1, b1, padding=taps // 2))
        return F.conv1d(hidden, w2, b2, padding=taps // 2).transpose(1, 2)

    return Differentiable(case, make, ops.conv_gelu_conv, reference.conv_gelu_conv, eager, {})
