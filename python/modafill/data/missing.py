"""Missing rates: which modalities of which samples are hidden, at random and the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modafill.data.patterns import random_available, uniform
from modafill.files import derive_seed

KINDS = ("samples", "entries", "modalities")


@dataclass(frozen=True)
class MissingRate:
    """A rate and what it is the rate of, for papers mean different things by it.

    Attributes:
        kind: ``"samples"``: this share of the samples lacks something, each incomplete set being as likely as any other
            (ADMC's Table 3, after TransM and TATE: "randomly drop one or two modalities"); ``"entries"``: this share of
            all (sample, modality) pairs is missing (CPM-Net, GCNet and what follows them); ``"modalities"``: each
            modality has a rate of its own. Every sample keeps at least one; in the last two,
            its modalities are hidden independently otherwise.
        rates: modality → rate for ``"modalities"``, else one rate under ``""``.
    """

    kind: str
    rates: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> MissingRate:
        """``"0.3"`` or ``"samples:0.3"``, ``"entries:0.3"``, or ``"text=0.3,vision=0.5"``.

        Raises:
            ValueError: none of these, or a rate outside [0, 1].
        """
        kind, _, rest = text.rpartition(":")
        pairs = [(name.strip(), value) for name, _, value in (part.rpartition("=") for part in rest.split(","))]
        named = [name for name, _ in pairs if name]
        try:
            rates = tuple((name, float(value)) for name, value in pairs)
        except ValueError:
            rates = ()
        fits = kind in ("", *KINDS[:2]) and (len(named) == len(pairs) > 0 if named else len(pairs) == 1)
        if not rates or not fits or (named and kind) or len(set(named)) != len(named):
            raise ValueError(
                f"missing: got {text!r}, expected a rate such as 0.3 (of samples), entries:0.3, or text=0.3,vision=0.5"
            )
        if not all(0 <= rate <= 1 for _, rate in rates):
            raise ValueError(f"missing: got {text!r}, expected rates in 0…1")
        return cls("modalities" if named else kind or "samples", rates)

    def __str__(self) -> str:
        if self.kind == "modalities":
            return ",".join(f"{name}={rate:g}" for name, rate in self.rates)
        rate = f"{self.rates[0][1]:g}"
        return rate if self.kind == "samples" else f"{self.kind}:{rate}"

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError unless the rate can be had with these modalities."""
        unknown = [name for name, _ in self.rates if name and name not in names]
        if unknown:
            raise ValueError(f"missing: got the modalities {unknown}, expected some of {list(names)}")
        most = 1 - 1 / len(names)
        if self.kind == "entries" and self.rates[0][1] > most:
            raise ValueError(
                f"missing: got {self}, but each sample keeps one of {len(names)} modalities: at most {most:.3f}"
                + (" (papers call that 0.7)" if len(names) == 3 else "")
            )
        if self.kind == "modalities" and sum(rate for _, rate in self.rates) > len(names) - 1 + 1e-9:
            raise ValueError(
                f"missing: got {self}, but each sample keeps one of {len(names)} modalities: rates that come to at "
                f"most {len(names) - 1}"
            )

    def draw(self, row_id: Tensor, names: Sequence[str], seed: int) -> Tensor:
        """What stays observed, bool ``[B, M]``; a row's draw depends on the seed, the rate and the row alone.

        Args:
            row_id: int64 ``[B]``.
            names: the M modalities.
            seed: any integer.

        Raises:
            ValueError: as :meth:`check`.
        """
        self.check(names)
        seed = derive_seed(seed, "missing", str(self))
        if self.kind == "samples":
            return random_available(row_id, len(names), seed=seed, draw=0, drop_rate=self.rates[0][1])
        rates = np.array([dict(self.rates).get(name if self.kind == "modalities" else "", 0.0) for name in names])
        keep = _chances(rates)
        kept = (np.arange(1, 1 << len(names))[:, None] >> np.arange(len(names))) & 1 == 1
        weight = np.where(kept, keep, 1 - keep).prod(1)
        if not weight.any():
            # The most that can be hidden is the limit of rates below it: each modality alone.
            weight = np.where(kept.sum(1) == 1, kept @ (1 - rates), 0.0)
        chosen = np.searchsorted(np.cumsum(weight / weight.sum()), uniform(row_id.cpu().numpy(), seed, 0), side="right")
        return torch.from_numpy(kept[np.minimum(chosen, len(kept) - 1)]).to(row_id.device)


def _chances(rates: np.ndarray) -> np.ndarray:
    """``[M]`` chances of independent entries to be kept, with which so many are hidden of rows that keep one."""
    # Of the rows a share u keeps one, and of these a share 1 - rate keeps the entry.
    low, high = 0.0, 1.0
    for _ in range(60):
        u = (low + high) / 2
        low, high = (low, u) if np.prod(1 - (1 - rates) * u) > 1 - u else (u, high)
    return (1 - rates) * low
