"""The ops that networks are trained with, forward and backward, and their rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from modafill import ops
from modafill.benchmarks.rivals import (
    MAX_AUTOTUNE,
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
from modafill.benchmarks.runner import Case, Check, Contender, Unavailable
from modafill.ops import reference

Network = Callable[..., Tensor]
MODES = ("forward", "backward", "both")
N_MODES = 7
# The widest head of flash attention's kernels; the folded form gives up beyond it.
WIDEST_HEAD = 256


@dataclass(frozen=True)
class Form:
    """A way to write an op in PyTorch; ``compiled``: by torch.compile, in ``mode``; ``absent``: why it is left out."""

    network: Network
    compiled: bool = False
    mode: str | None = None
    absent: str | None = None


@dataclass
class Set:
    """One buffer set: tensors to differentiate by, others, the gradient of the result, and graphs by provider."""

    leaves: list[Tensor]
    others: tuple[Any, ...]
    grad: Tensor
    graphs: dict[str, Tensor] = field(default_factory=dict)


class Differentiable:
    """An op with gradients in every input, timed forward, backward on a graph that is kept, or both.

    Args:
        case: its ``mode`` is one of :data:`MODES`.
        make: from a generator, the tensors to differentiate by, other arguments, and the shape of the result.
        ours: called as ``ours(*leaves, *others, backend=…)``.
        exact: the float64 reference; eager: the plain PyTorch form, whose error sets the tolerance.
        rivals: by provider name, further forms.
        terms: of the longest sum within one sample, which rounding errors grow with.
    """

    def __init__(
        self,
        case: Case,
        make: Callable[[torch.Generator], tuple[list[Tensor], tuple[Any, ...], Sequence[int]]],
        ours: Network,
        exact: Network,
        eager: Network,
        rivals: Mapping[str, Form],
        terms: int,
    ) -> None:
        self.case, self.ours, self.exact, self.eager, self.terms = case, ours, exact, eager, terms
        self.rivals = {"eager": Form(eager), **rivals}
        generator = torch.Generator(case.device).manual_seed(SEED)

        def one_set() -> Set:
            leaves, others, shape = make(generator)
            # Without gradients in forward: FlexAttention refuses tensors on the CPU that ask for them, even in no_grad.
            leaves = [x.requires_grad_(case.mode != "forward") for x in leaves]
            return Set(leaves, others, _normal(case, shape, generator))

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
        return made | {name: partial(self._rival, name, form) for name, form in self.rivals.items()}

    def _ours(self, name: str, backend: str) -> Contender:
        _require(self.case, backend)
        return self._contender(name, partial(self.ours, backend=backend))

    def _rival(self, name: str, form: Form) -> Contender:
        if form.absent is not None:
            raise Unavailable(form.absent)
        if not form.compiled:
            return self._contender(name, form.network)
        contender = self._contender(name, _compile(form.network, self.case, form.mode))
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
        found = [result] if self.case.mode == "forward" else list(result)
        checks = [_within(*one, terms=self.terms) for one in zip(found, *self._expected, strict=True)]
        return Check(all(c.correct for c in checks), max(c.max_error for c in checks))

    @cached_property
    def _expected(self) -> tuple[list[Tensor], list[Tensor]]:
        """What set 0 gives in the float64 reference and in eager."""
        b = self.buffers[0]

        def all_of(network: Network, dtype: torch.dtype) -> list[Tensor]:
            leaves = [x.detach().to(dtype).requires_grad_() for x in b.leaves]
            with torch.enable_grad():
                out = network(*leaves, *b.others)
                if self.case.mode == "forward":
                    return [out.detach()]
                return list(torch.autograd.grad(out, leaves, b.grad.to(dtype)))

        return all_of(self.exact, torch.float64), all_of(self.eager, self.case.dtype)


def _compiled(case: Case, network: Network) -> dict[str, Form]:
    """``network`` under torch.compile; on a GPU also with its products tuned, which takes minutes on a CPU."""
    forms = {"torch.compile": Form(network, compiled=True)}
    if case.device.type == "cuda":
        forms["torch.compile-max-autotune"] = Form(network, compiled=True, mode=MAX_AUTOTUNE)
    return forms


def prompt_attention(case: Case) -> Differentiable:
    """``[B, H, L, d]`` queries and keys, a bias table for each of seven modes."""
    batch, heads, length, width = case.shape

    def make(generator: torch.Generator) -> tuple[list[Tensor], tuple[Any, ...], Sequence[int]]:
        leaves = [_normal(case, case.shape, generator) for _ in range(3)]
        bias = _normal(case, (N_MODES, heads, length, length), generator)
        mode = torch.randint(N_MODES, (batch,), device=case.device, generator=generator)
        return [*leaves, bias], (mode,), case.shape

    # index_select, here and below: the faster of the two ways to pick a table, both forward and backward.
    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * width**-0.5 + bias.index_select(0, mode)).softmax(-1) @ v

    def baddbmm(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode: Tensor) -> Tensor:
        """Product, scale and bias in one call."""
        bias = bias.index_select(0, mode).flatten(0, 1)
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=width**-0.5)
        return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view_as(q)

    def materialised(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.index_select(0, mode))

    rank = length + -length % 4  # Kernels of GPUs want multiples of 16 bytes.
    identity = torch.eye(length, rank, dtype=case.dtype, device=case.device)

    def folded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode: Tensor) -> Tensor:
        """Bias as further columns of queries and keys (FlashBias, arXiv 2505.12044), so that SDPA needs no mask.

        A table of rank r is r columns. Nothing is known of a learned table but that its rank is at most its length:
        the factors are the table and the identity, exact in values and gradients, and the [B, H, L, L] table of each
        sample is made after all, as columns.
        """
        columns = F.pad(bias, (0, rank - length)).index_select(0, mode)
        q = torch.cat([q * width**-0.5, columns], -1)
        k = torch.cat([k, identity.expand(*k.shape[:2], -1, -1)], -1)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode: Tensor) -> Tensor:
        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[mode[b], h, i, j]

        return flex_attention(q, k, v, score_mod=add_bias)

    too_wide = f"{width} + {rank} columns, more than the {WIDEST_HEAD} of flash attention"
    forward_only = "FlexAttention has no backward on the CPU"
    rivals = {
        "eager-baddbmm": Form(baddbmm),
        **_compiled(case, eager),
        "sdpa-materialised": Form(materialised),
        "sdpa-folded": Form(folded, absent=too_wide if width + rank > WIDEST_HEAD else None),
        "flex-attention": Form(
            flex,
            compiled=True,
            absent=forward_only if case.device.type == "cpu" and case.mode != "forward" else None,
        ),
    }
    return Differentiable(case, make, ops.prompt_attention, reference.prompt_attention, eager, rivals, length)


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

    def channels_last(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        """As images of one row: what is [B, L, C] in memory is channels-last to conv2d, which transposes nothing."""
        image = x.transpose(1, 2).unsqueeze(2)
        hidden = F.gelu(F.conv2d(image, w1.unsqueeze(2), b1, padding=(0, taps // 2)))
        return F.conv2d(hidden, w2.unsqueeze(2), b2, padding=(0, taps // 2)).squeeze(2).transpose(1, 2)

    def linear(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1[..., 0], b1)), w2[..., 0], b2)

    rivals = {
        "eager-channels-last": Form(channels_last),
        # Of the two convolutions the one that compiles to the faster code.
        **_compiled(case, channels_last),
    }
    if taps == 1:
        rivals["eager-linear"] = Form(linear)
    terms = taps * max(channels, hidden)
    return Differentiable(case, make, ops.conv_gelu_conv, reference.conv_gelu_conv, eager, rivals, terms)
