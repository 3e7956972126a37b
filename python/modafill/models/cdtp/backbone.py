"""MulT (Tsai et al. 2019): crossmodal transformers between every two modalities, then one over each (CDTP §3.5)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from modafill import ops
from modafill.models.cdtp.config import CDTPConfig, SequenceSpec
from modafill.models.cdtp.stacked import ALL, StackedLinear, StackedNorm, Which, choose, valid_mask


@lru_cache(maxsize=64)
def positions(
    length: int, width: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sinusoids ``[L, d]`` of CDTP eq. 1–2: sin in even columns, cos in odd ones, of pos / 10000^(2i/d).

    Departure: §3.2.1 also says "sin for odd dimensions", against its own equations. They hold for any length.
    """
    place = torch.arange(length, dtype=torch.float64)[:, None]
    column = torch.arange(width, dtype=torch.float64)
    angle = place * torch.exp(-math.log(10_000.0) * (column - column % 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).to(device, dtype)


def groups_of(shapes: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal ``shapes``, in the order in which these first come."""
    found: dict[Hashable, list[int]] = {}
    for index, shape in enumerate(shapes):
        found.setdefault(shape, []).append(index)
    return list(found.values())


class _Layer(nn.Module):
    """A pre-norm layer of n encoders; as in MulT, one normalisation serves queries, keys and values."""

    def __init__(self, count: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.feedforward_norm = StackedNorm(count, width), StackedNorm(count, width)
        self.query, self.key_value = StackedLinear(count, width, width), StackedLinear(count, width, 2 * width)
        self.out = StackedLinear(count, width, width)
        self.widen, self.narrow = StackedLinear(count, width, 4 * width), StackedLinear(count, 4 * width, width)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None,
        which: Which,
        key_lengths: Tensor,
        causal: bool,
        bias: Tensor | None,
        mode: Tensor | None,
    ) -> Tensor:
        normal = self.attention_norm(x, which)
        read = normal if source is None else self.attention_norm(source, which)
        key, value = self.key_value(read, which).chunk(2, dim=-1)
        q, k, v = (
            t.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.query(normal, which), key, value)
        )
        dropout = self.dropout if self.training else 0.0
        attended = ops.prompt_attention(
            q,
            k,
            v,
            bias,
            mode,
            causal=causal,
            key_lengths=key_lengths,
            dropout=dropout,
            seed=torch.randint(2**63 - 1, (), device=x.device) if dropout else None,
        )
        attended = attended.transpose(1, 2).flatten(2).view_as(x)
        x = x + self._drop(self.out(attended, which))
        hidden = self._drop(self.widen(self.feedforward_norm(x, which), which).relu())
        return x + self._drop(self.narrow(hidden, which))

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


class StackedEncoder(nn.Module):
    """n of MulT's transformer encoders side by side.

    Sequences are scaled by √d and get sinusoids; keys and values are, at every layer, the embedded source. Departures
    from MulT's code: true lengths count (there padding takes part in attention), and positions are those of CDTP. The
    causal mask's offset is that of the padded lengths, as there; but what is pooled is the last true step, not the last
    padded one, which sees the whole source: where a target of n steps is short for its source, steps of that beyond
    n + |Lq − Lk| are not seen by its last one.

    Args:
        count: n.
        width: of the sequences; ``width / heads`` is a multiple of 4, up to 128.
        heads, layers: of each encoder.
        dropout: of attention, feed-forward layers and residuals.
        causal: MulT's mask (:func:`modafill.ops.prompt_attention`).
    """

    def __init__(self, count: int, width: int, heads: int, layers: int, *, dropout: float, causal: bool) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout
        self.layers = nn.ModuleList(_Layer(count, width, heads, dropout) for _ in range(layers))
        self.norm = StackedNorm(count, width)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None,
        key_lengths: Tensor,
        *,
        which: Which = ALL,
        bias: Tensor | None = None,
        mode: Tensor | None = None,
    ) -> Tensor:
        """Encode with networks ``which``, g of them.

        Args:
            x: ``[g, B, Lq, d]``.
            source: keys and values ``[g, B, Lk, d]``; None = the sequence itself.
            key_lengths: int64 ``[g, B]``, true lengths of what is attended to.
            bias: ``[g, P, 1, Lq, Lk]``, added to the logits: for each sample that of its mode.
            mode: int64 ``[B]`` in 0…P−1.

        Returns:
            ``[g, B, Lq, d]``.
        """
        h = self._embed(x)
        embedded = None if source is None else self._embed(source)
        if bias is not None and mode is not None:
            first = torch.arange(len(bias), device=mode.device) * bias.shape[1]
            bias, mode = bias.flatten(0, 1), (first[:, None] + mode).flatten()
        for layer in self.layers:
            h = layer(h, embedded, which, key_lengths.flatten(), self.causal, bias, mode)
        return self.norm(h, which)

    def _embed(self, x: Tensor) -> Tensor:
        x = x * math.sqrt(x.shape[-1]) + positions(x.shape[2], x.shape[3], x.device, x.dtype)
        return nn.functional.dropout(x, self.dropout, self.training)


class Projection(nn.Module):
    """Standardised features ``[B, L, D] → [B, L, d]`` by a convolution without bias (CDTP §3.2.2), 0 behind the end.

    Args:
        name: the modality.
        spec: its width and longest length.
        config: numbers of the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, spec: SequenceSpec, config: CDTPConfig) -> None:
        super().__init__()
        self.name, self.spec = name, spec
        self.register_buffer("mean", torch.zeros(spec.width))
        self.register_buffer("std", torch.ones(spec.width))
        taps = config.projection_kernel
        self.conv = nn.Conv1d(spec.width, config.width, taps, padding=taps // 2, bias=False)
        self.dropout = config.input_dropout

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Project ``x [B, L, D]`` with true ``lengths [B]``."""
        keep = valid_mask(lengths, x.shape[1])[..., None]
        # Widely scaled inputs (openSMILE, COVAREP) have outliers of hundreds of standard deviations.
        x = torch.where(keep, ((x - self.mean) / self.std).clamp(-10.0, 10.0), 0.0)
        x = nn.functional.dropout(x, self.dropout, self.training)
        return torch.where(keep, self.conv(x.mT).mT, 0.0)


class MulT(nn.Module):
    """The backbone: projections, a crossmodal encoder per ordered pair, a self-attention encoder per modality, a head.

    What agrees in shape runs as one batch. It can be used alone: missing modalities are then sequences of length 0.

    Args:
        modalities: name → :class:`SequenceSpec`, in the order of the columns of ``available``.
        outputs: classes, or 1 for regression.
        config: numbers of the model.
    """

    def __init__(self, modalities: dict[str, SequenceSpec], outputs: int, config: CDTPConfig) -> None:
        super().__init__()
        self.modalities, count = dict(modalities), len(modalities)
        self.pairs = [(target, source) for target in range(count) for source in range(count) if source != target]
        self.projections = nn.ModuleList(Projection(name, spec, config) for name, spec in modalities.items())
        width, depth = (count - 1) * config.width, config.self_layers or max(config.layers, 3)
        self.crossmodal = StackedEncoder(
            len(self.pairs), config.width, config.heads, config.layers, dropout=config.dropout, causal=config.causal
        )
        self.memory = StackedEncoder(count, width, config.heads, depth, dropout=config.dropout, causal=config.causal)
        self.head = nn.Sequential(
            nn.Linear(count * width, count * width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(count * width, count * width),
        )
        self.classify = nn.Linear(count * width, outputs)

    def project(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> list[Tensor]:
        """``[B, L, d]`` of each modality."""
        projections = cast("list[Projection]", list(self.projections))
        return [project(x, n) for project, x, n in zip(projections, features, lengths, strict=True)]

    def forward(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        """``[B, outputs]`` of features ``[B, L, D]`` per modality, each with true lengths int64 ``[B]``."""
        return self.fuse(self.project(features, lengths), lengths)

    def fuse(
        self,
        x: Sequence[Tensor],
        lengths: Sequence[Tensor],
        *,
        biases: Sequence[Tensor] | None = None,
        appended: Sequence[Tensor] | None = None,
        mode: Tensor | None = None,
    ) -> Tensor:
        """``[B, outputs]`` of projected sequences ``[B, L, d]``.

        Args:
            x, lengths: per modality.
            biases: per modality ``[P, 1, L, L]``, added to the logits of its self-attention.
            appended: per modality ``[P, n, (M−1)·d]``, tokens behind the end of its sequence.
            mode: int64 ``[B]``, which of the P each sample gets.
        """
        crossed: dict[int, Tensor] = {}
        for group in groups_of([(x[t].shape[1], x[s].shape[1]) for t, s in self.pairs]):
            targets = torch.stack([x[self.pairs[i][0]] for i in group])
            sources = torch.stack([x[self.pairs[i][1]] for i in group])
            keys = torch.stack([lengths[self.pairs[i][1]] for i in group])
            encoded = self.crossmodal(targets, sources, keys, which=choose(group, len(self.pairs)))
            crossed.update(zip(group, encoded.unbind(), strict=True))
        hidden = [
            torch.cat([crossed[i] for i, (target, _) in enumerate(self.pairs) if target == m], dim=-1)
            for m in range(len(x))
        ]
        lengths = list(lengths)
        if appended is not None:
            both = [_append(h, n, table[mode]) for h, n, table in zip(hidden, lengths, appended, strict=True)]
            hidden, lengths = [h for h, _ in both], [n for _, n in both]
        last: dict[int, Tensor] = {}
        for group in groups_of([h.shape[1] for h in hidden]):
            ends = torch.stack([lengths[m] for m in group])
            encoded = self.memory(
                torch.stack([hidden[m] for m in group]),
                None,
                ends,
                which=choose(group, len(x)),
                bias=None if biases is None else torch.stack([biases[m] for m in group]),
                mode=None if biases is None else mode,
            )
            # Of an empty sequence the last place: with the causal mask it sees all that the others have.
            place = torch.where(ends > 0, ends - 1, encoded.shape[2] - 1)
            index = place[..., None, None].expand(-1, -1, 1, encoded.shape[-1])
            last.update(zip(group, encoded.gather(2, index).squeeze(2).unbind(), strict=True))
        y = torch.cat([last[m] for m in range(len(x))], dim=-1)
        return self.classify(y + self.head(y))


def _append(x: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``x [B, L, C]`` with ``tokens [B, n, C]`` right behind each sample's end, and the lengths of that."""
    count = tokens.shape[1]
    x = torch.where(valid_mask(lengths, x.shape[1])[..., None], x, 0.0)
    place = (lengths[:, None] + torch.arange(count, device=x.device))[..., None].expand_as(tokens)
    return nn.functional.pad(x, (0, 0, 0, count)).scatter(1, place, tokens.to(x.dtype)), lengths + count
