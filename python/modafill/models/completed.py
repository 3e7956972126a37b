"""What the models of this package share with those who complete batches with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModalitySpec:
    """What a model must know of a modality: its feature width D and whether samples are sequences ``[L, D]``."""

    width: int
    sequence: bool

    def check(self, name: str, x: Tensor) -> None:
        """Raise ValueError unless ``x`` has as many dimensions as features of the modality ``name``."""
        if x.ndim != 2 + self.sequence:
            expected = f"[B, L, {self.width}]" if self.sequence else f"[B, {self.width}]"
            raise ValueError(f"features[{name!r}]: got shape {list(x.shape)}, expected {expected}")


@dataclass(frozen=True)
class Completed:
    """K completions of a batch.

    Attributes:
        observed: name → ``[B, …]``, what the encoder made of the features; rows that lack the modality are anything.
        samples: name → ``[K, B, …]``, equal to ``observed`` where that was available.
        lengths: name → int64 ``[B]``, true lengths of sequences; none where a model completes vectors.
    """

    observed: dict[str, Tensor]
    samples: dict[str, Tensor]
    lengths: dict[str, Tensor] = field(default_factory=dict)

    def mean(self, available: Tensor) -> dict[str, Tensor]:
        """Name → ``[B, …]``: exactly what was observed where ``available [B, M]``, else the mean of the samples."""
        out = {}
        for m, (name, samples) in enumerate(self.samples.items()):
            seen = available[:, m].view(-1, *[1] * (samples.ndim - 2))
            out[name] = torch.where(seen, self.observed[name], samples.mean(0))
        return out
