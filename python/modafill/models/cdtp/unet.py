"""The denoisers: n conditional U-Nets over time side by side (CDTP §3.4, Fig. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from modafill import ops
from modafill.diffusion import step_embedding
from modafill.models.cdtp.stacked import ALL, StackedConv, StackedLinear, StackedNorm, Which, valid_mask


@dataclass(frozen=True)
class Condition:
    """What g denoisers read of their sources: made once for a sample, read at every step.

    Attributes:
        beside: ``[g, B, L, C]``, the condition at the target's steps, concatenated to the noisy target.
        key, value: ``[g·B, H, Ls, d]``, of the cross-attention.
        key_lengths: int64 ``[g·B]``, the sources' true lengths.
        summary: ``[g, B, E]``, the sources' means, beside the step embedding.
    """

    beside: Tensor
    key: Tensor
    value: Tensor
    key_lengths: Tensor
    summary: Tensor


class _ResBlock(nn.Module):
    """x + F(x) of two convolutions, with normalisation per step and FiLM (scale and shift) by the embedding."""

    def __init__(self, count: int, in_channels: int, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = StackedNorm(count, in_channels), StackedNorm(count, channels)
        self.conv_in = StackedConv(count, in_channels, channels)
        self.film = StackedLinear(count, embedding, 2 * channels)
        self.conv_out = StackedConv(count, channels, channels, zero=True)
        self.skip = StackedLinear(count, in_channels, channels) if in_channels != channels else None

    def forward(self, x: Tensor, embedding: Tensor, keep: Tensor, which: Which) -> Tensor:
        scale, shift = self.film(embedding, which)[:, :, None].chunk(2, dim=-1)
        h = self.conv_in(silu(self.norm_in(x, which)) * keep, which)
        h = self.conv_out(silu(self.norm_out(h, which) * (1 + scale) + shift) * keep, which)
        return (x if self.skip is None else self.skip(x, which)) + h


class _CrossAttention(nn.Module):
    """x + attention of every step to the condition."""

    def __init__(self, count: int, channels: int, condition: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = StackedNorm(count, channels)
        self.query = StackedLinear(count, channels, channels)
        self.key_value = StackedLinear(count, condition, 2 * channels)
        self.out = StackedLinear(count, channels, channels, zero=True)

    def keys(self, condition: Tensor, which: Which) -> tuple[Tensor, Tensor]:
        k, v = self.key_value(condition, which).chunk(2, dim=-1)
        return self._split(k), self._split(v)

    def forward(self, x: Tensor, condition: Condition, which: Which) -> Tensor:
        q = self._split(self.query(self.norm(x, which), which))
        out = ops.prompt_attention(q, condition.key, condition.value, None, key_lengths=condition.key_lengths)
        return x + self.out(out.transpose(1, 2).flatten(2).view_as(x), which)

    def _split(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous()


class StackedUNet(nn.Module):
    """n U-Nets ``ε_θ(x_t, c, t)`` of one shape, each with weights of its own, in batched products.

    Residual blocks at each level, halved in time by strided convolutions and doubled back by repetition, with
    concatenated skips; the step enters by FiLM, the condition beside the input, by FiLM (its mean) and by
    cross-attention at the coarsest level. Any length: a level of L steps has ⌈L / 2⌉ below it. Departures from what the
    paper leaves open: normalisation is over the channels of each step, so that padding changes nothing, and what lies
    behind a sequence's end stays zero.

    Args:
        count: n.
        width: channels of x.
        condition: channels of the condition.
        channels: of each level.
        blocks: residual blocks per level, down and up.
        heads: of the cross-attention.
    """

    def __init__(
        self, count: int, width: int, condition: int, channels: tuple[int, ...], blocks: int, heads: int
    ) -> None:
        super().__init__()
        embedding = 4 * channels[0]
        self.step_width = channels[0]
        self.step_in, self.step_out = (
            StackedLinear(count, channels[0], embedding),
            StackedLinear(count, embedding, embedding),
        )
        self.summary = StackedLinear(count, condition, embedding)
        self.conv_in = StackedConv(count, width + condition, channels[0])
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, c in enumerate(channels):
            self.down.append(nn.ModuleList(_ResBlock(count, c, c, embedding) for _ in range(blocks)))
            self.up.append(nn.ModuleList(_ResBlock(count, 2 * c if b == 0 else c, c, embedding) for b in range(blocks)))
            if level + 1 < len(channels):
                self.shrink.append(StackedConv(count, c, channels[level + 1], stride=2))
                self.grow.append(StackedConv(count, channels[level + 1], c))
        self.before = _ResBlock(count, channels[-1], channels[-1], embedding)
        self.attention = _CrossAttention(count, channels[-1], condition, heads)
        self.after = _ResBlock(count, channels[-1], channels[-1], embedding)
        self.norm = StackedNorm(count, channels[0])
        self.conv_out = StackedConv(count, channels[0], width, zero=True)

    def condition(self, beside: Tensor, sources: Tensor, lengths: Tensor, which: Which = ALL) -> Condition:
        """What networks ``which`` need of the sources.

        Args:
            beside: ``[g, B, L, C]``, encoded sources resampled to the target's steps.
            sources: ``[g, B, Ls, C]``, encoded sources.
            lengths: int64 ``[g, B]``, their true lengths.
        """
        keep = valid_mask(lengths, sources.shape[2])[..., None]
        mean = torch.where(keep, sources, 0.0).sum(2) / lengths.clamp(min=1)[..., None]
        return Condition(beside, *self.attention.keys(sources, which), lengths.flatten(), self.summary(mean, which))

    def forward(self, x: Tensor, step: Tensor, condition: Condition, lengths: Tensor, which: Which = ALL) -> Tensor:
        """Networks ``which``, g of them, on noisy targets.

        Args:
            x: ``[g, B, L, width]``.
            step: int64 ``[g, B]``, diffusion steps.
            condition: from :meth:`condition`.
            lengths: int64 ``[g, B]``, true lengths of the targets.

        Returns:
            ``[g, B, L, width]``, zero behind the end.
        """
        sinusoids = step_embedding(step.flatten(), self.step_width).view(*step.shape, -1).to(x.dtype)
        embedding = self.step_out(silu(self.step_in(sinusoids, which)), which) + condition.summary
        embedding = silu(embedding)
        keep = valid_mask(lengths, x.shape[2])[..., None].to(x.dtype)
        h = self.conv_in(torch.cat([x, condition.beside], dim=-1) * keep, which) * keep
        keeps, skips = [keep], []
        for level, blocks in enumerate(self.down):
            for block in cast(nn.ModuleList, blocks):
                h = block(h, embedding, keeps[level], which)
            skips.append(h)
            if level < len(self.shrink):
                lengths = (lengths + 1) // 2
                h = self.shrink[level](h * keeps[level], which)
                keeps.append(valid_mask(lengths, h.shape[2])[..., None].to(x.dtype))
        h = self.before(h, embedding, keeps[-1], which)
        h = self.after(self.attention(h, condition, which), embedding, keeps[-1], which)
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                h = h.repeat_interleave(2, dim=2)[:, :, : skips[level].shape[2]]
                h = self.grow[level](h * keeps[level], which)
            h = torch.cat([h, skips[level]], dim=-1)
            for block in cast(nn.ModuleList, self.up[level]):
                h = block(h, embedding, keeps[level], which)
        return self.conv_out(silu(self.norm(h, which)) * keep, which) * keep
