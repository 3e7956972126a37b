"""Layers of n networks of one shape side by side: one batched product where a loop would make n."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Which = slice | Tensor
ALL = slice(None)


def choose(indices: list[int], count: int) -> Which:
    """Networks ``indices`` of a stack of ``count``; a run of them is a slice, which copies no weights."""
    if indices == list(range(indices[0], indices[-1] + 1)):
        return ALL if len(indices) == count else slice(indices[0], indices[-1] + 1)
    return torch.tensor(indices)


class StackedLinear(nn.Module):
    """n linear layers, ``[g, …, in] → [g, …, out]`` for g of them; each is initialised as :class:`torch.nn.Linear` is.

    Args:
        count: n.
        in_features, out_features: widths.
        bias: whether there is one.
        zero: start at 0, for the last layer of a residual branch.
    """

    def __init__(
        self, count: int, in_features: int, out_features: int, *, bias: bool = True, zero: bool = False
    ) -> None:
        super().__init__()
        bound = 0.0 if zero else 1.0 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(count, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, out_features).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, which: Which = ALL) -> Tensor:
        """Networks ``which`` on ``x [g, …, in]``."""
        weight, rows = self.weight[which], x.flatten(1, -2)
        out = rows @ weight if self.bias is None else torch.baddbmm(self.bias[which], rows, weight)
        return out.unflatten(1, x.shape[1:-1])


class StackedNorm(nn.Module):
    """n layer normalisations over the last dimension, ``[g, …, C]``."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, width))
        self.bias = nn.Parameter(torch.zeros(count, width))

    def forward(self, x: Tensor, which: Which = ALL) -> Tensor:
        """Networks ``which`` on ``x [g, …, C]``."""
        shape = -1, *[1] * (x.ndim - 2), x.shape[-1]
        normal = nn.functional.layer_norm(x, x.shape[-1:])
        return torch.addcmul(self.bias[which].view(shape), normal, self.weight[which].view(shape))


class _Windows(torch.autograd.Function):
    """``[g, B, L, C] → [g, B, ⌈L / stride⌉, taps · C]``: each step with its neighbours, zeros around the sequence.

    As ``unfold``, whose own gradient takes several times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: int, stride: int) -> Tensor:
        ctx.steps, ctx.taps, ctx.stride = x.shape[2], taps, stride
        halo = taps // 2
        return nn.functional.pad(x, (0, 0, halo, halo)).unfold(2, taps, stride).transpose(3, 4).flatten(3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        halo, count = ctx.taps // 2, grad.shape[2]
        by_tap = grad.chunk(ctx.taps, dim=-1)
        out = grad.new_zeros(*grad.shape[:2], ctx.steps + 2 * halo, by_tap[0].shape[3])
        for tap, part in enumerate(by_tap):
            out[:, :, tap : tap + (count - 1) * ctx.stride + 1 : ctx.stride] += part
        return out[:, :, halo : halo + ctx.steps], None, None


class StackedConv(nn.Module):
    """n convolutions over time with same padding, ``[g, B, L, in] → [g, B, ⌈L / stride⌉, out]``.

    Args:
        count: n.
        in_channels, out_channels: widths.
        taps: odd.
        stride: every how many steps there is a result.
        zero: start at 0.
    """

    def __init__(
        self, count: int, in_channels: int, out_channels: int, *, taps: int = 3, stride: int = 1, zero: bool = False
    ) -> None:
        super().__init__()
        self.taps, self.stride = taps, stride
        self.linear = StackedLinear(count, taps * in_channels, out_channels, zero=zero)

    def forward(self, x: Tensor, which: Which = ALL) -> Tensor:
        """Networks ``which`` on ``x [g, B, L, in]``."""
        if self.taps > 1:
            x = cast(Tensor, _Windows.apply(x, self.taps, self.stride))
        return self.linear(x, which)


def valid_mask(lengths: Tensor, steps: int) -> Tensor:
    """Which of ``steps`` lie before ``lengths […]``: bool ``[…, steps]``."""
    return torch.arange(steps, device=lengths.device) < lengths[..., None]
