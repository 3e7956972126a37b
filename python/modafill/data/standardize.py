"""Standardisation with statistics of the training part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from modafill.data.batch import Batch, valid_steps
from modafill.data.patterns import name_rows
from modafill.data.store import FeatureStore

FIT_ROWS = 1024


class Standardizer:
    """Subtracts each column's mean and divides by its standard deviation.

    A column that is constant in the training part becomes 0. A modality that the training part never observes is left
    as it is (mean 0, deviation 1) and named in :attr:`unseen`.

    Attributes:
        mean: name → float64 ``[D]``.
        std: name → float64 ``[D]``, population standard deviation; 0 for constant columns.
        count: name → number of frames the statistics rest on.
        clip: bound on standardised values in standard deviations, or None.
    """

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        std: Mapping[str, Tensor],
        count: Mapping[str, int],
        clip: float | None = None,
    ) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: got {clip}, expected a positive number of standard deviations")
        self.mean = dict(mean)
        self.std = dict(std)
        self.count = dict(count)
        self.clip = clip

    @classmethod
    def fit(cls, store: FeatureStore, rows: np.ndarray, clip: float | None = None) -> Standardizer:
        """Mean and deviation per column over the valid frames of available samples, in one pass over ``rows``.

        Of a windowed store, each turn counts once.

        Args:
            store: where the features are.
            rows: ints, the training part.
            clip: bound on standardised values in standard deviations, or None.

        Raises:
            ValueError: no rows, or NaN or infinity in an observed feature.
        """
        if not len(rows):
            raise ValueError("rows: got none, expected the training part")
        sums = {name: _Moments(width) for name, width in store.widths.items()}
        with store.unwindowed() as frames:
            for batch in frames.iter_batches(np.sort(rows), FIT_ROWS):
                for m, (name, x) in enumerate(batch.features.items()):
                    seen = batch.available[:, m]
                    bad = seen & ~torch.isfinite(x).flatten(1).all(1)
                    if bool(bad.any()):
                        raise ValueError(
                            f"modality {name!r}: got NaN or infinity in {name_rows(batch.row_id[bad].tolist())}, "
                            "expected finite values where observed"
                        )
                    sums[name].add(x[valid_steps(batch, m)].numpy())
        return cls(
            {name: torch.from_numpy(s.mean) for name, s in sums.items()},
            {name: torch.from_numpy(s.std()) for name, s in sums.items()},
            {name: s.count for name, s in sums.items()},
            clip,
        )

    @property
    def unseen(self) -> tuple[str, ...]:
        """Modalities that the training part never observes."""
        return tuple(name for name, count in self.count.items() if not count)

    def transform(self, batch: Batch) -> Batch:
        """The standardised batch; padding and hidden entries are zeros.

        Raises:
            ValueError: a modality or width that the statistics are not for.
        """
        features = {}
        for m, (name, x) in enumerate(batch.features.items()):
            mean, std = self._for(name, x)
            scale = torch.where(std > 0, 1 / std, 0)
            y = (x - mean) * scale
            if self.clip is not None:
                y = y.clamp(-self.clip, self.clip)
            valid = valid_steps(batch, m)
            features[name] = torch.where(valid[..., None], y, y.new_zeros(()))
        return replace(batch, features=features)

    def inverse(self, name: str, values: Tensor) -> Tensor:
        """Standardised values ``[…, D]`` of one modality in their own units; a constant column gets its mean."""
        mean, std = self._for(name, values)
        return values * std + mean

    def _for(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self.mean:
            raise ValueError(f"features: got unknown modality {name!r}, expected {list(self.mean)}")
        mean, std = self.mean[name], self.std[name]
        if x.shape[-1] != len(mean):
            raise ValueError(f"features[{name!r}]: got width {x.shape[-1]}, expected {len(mean)}")
        return mean.to(x), std.to(x)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name, ready for safetensors: ``<name>.mean``, ``<name>.std``, ``<name>.count`` and ``clip``."""
        state = {"clip": torch.tensor(torch.inf if self.clip is None else self.clip, dtype=torch.float64)}
        for name in self.mean:
            state[f"{name}.mean"] = self.mean[name]
            state[f"{name}.std"] = self.std[name]
            state[f"{name}.count"] = torch.tensor(self.count[name])
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Standardizer:
        """The standardiser that :meth:`state_dict` described; the order of modalities does not matter."""
        names = [key.removesuffix(".mean") for key in state if key.endswith(".mean")]
        clip = float(state["clip"])
        return cls(
            {name: state[f"{name}.mean"] for name in names},
            {name: state[f"{name}.std"] for name in names},
            {name: int(state[f"{name}.count"]) for name in names},
            None if clip == torch.inf else clip,
        )


class _Moments:
    """Count, mean and centred second moment per column, merged block by block (Chan, Golub & LeVeque 1979)."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self.centred = np.zeros(width)

    def add(self, frames: np.ndarray) -> None:
        n = len(frames)
        if not n:
            return
        block = frames.astype(np.float64)
        mean = block.mean(0)
        delta = mean - self.mean
        total = self.count + n
        self.mean += delta * (n / total)
        self.centred += ((block - mean) ** 2).sum(0) + delta**2 * (self.count * n / total)
        self.count = total

    def std(self) -> np.ndarray:
        if not self.count:
            return np.ones_like(self.mean)
        # Of a constant column this is exactly 0: float64 sums of equal float32 numbers have no rounding error.
        return np.sqrt(self.centred / self.count)
