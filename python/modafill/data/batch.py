"""A batch of samples with some modalities missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from modafill.data.patterns import check_available, name_rows


@dataclass
class Batch:
    """Samples of M modalities, B rows each.

    Attributes:
        features: name → float ``[B, D]`` (vectors) or ``[B, L, D]`` (sequences, zero-padded on the right). The order of
            the names is the order of the columns of ``available``.
        available: bool ``[B, M]``, True = observed.
        row_id: int64 ``[B]``, the stable number of each sample: what random draws are keyed by.
        lengths: name → int64 ``[B]``, valid steps of each sequence; vectors have no entry.
        label: ``[B]`` or None.

    A row of a modality that is not available carries nothing: zeros, and length 0.
    """

    features: dict[str, Tensor]
    available: Tensor
    row_id: Tensor
    lengths: dict[str, Tensor] = field(default_factory=dict)
    label: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row_id)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in the order of the columns of ``available``."""
        return tuple(self.features)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return Batch(
            features={name: move(x) for name, x in self.features.items()},
            available=move(self.available),
            row_id=move(self.row_id),
            lengths={name: move(x) for name, x in self.lengths.items()},
            label=None if self.label is None else move(self.label),
        )

    def select(self, rows: Tensor | Sequence[int] | slice) -> Batch:
        """The rows named by a bool mask ``[B]``, an index tensor or a slice; padded lengths stay as they are."""
        index = rows if isinstance(rows, Tensor | slice) else torch.as_tensor(rows, dtype=torch.int64)
        return Batch(
            features={name: x[index] for name, x in self.features.items()},
            available=self.available[index],
            row_id=self.row_id[index],
            lengths={name: x[index] for name, x in self.lengths.items()},
            label=None if self.label is None else self.label[index],
        )

    def hide(self, available: Tensor) -> Batch:
        """The batch in which whatever is not in ``available`` is gone: zero-filled, of length 0, marked missing.

        A barrier against leaks: no value, NaN or length of a hidden entry is left in the result. Nothing that was
        missing becomes available.

        Args:
            available: bool ``[B, M]``, what may be seen.
        """
        check_available("available", available, (len(self), len(self.features)))
        seen = self.available & available.to(self.available.device)
        features, lengths = {}, {}
        for m, (name, x) in enumerate(self.features.items()):
            # where, not multiplication: NaN * 0 is NaN.
            features[name] = torch.where(seen[:, m].view(-1, *[1] * (x.ndim - 1)), x, x.new_zeros(()))
            if name in self.lengths:
                lengths[name] = torch.where(seen[:, m], self.lengths[name], 0)
        return replace(self, features=features, lengths=lengths, available=seen)

    def validate(self, widths: Mapping[str, int] | None = None) -> Batch:
        """Check the batch against itself and, if given, against the modalities and widths that a model expects.

        Values of missing modalities may be anything.

        Args:
            widths: name → D of every modality, in the expected order.

        Returns:
            The batch itself.

        Raises:
            ValueError: empty batch, unknown or absent modality, wrong width or shape, lengths out of range, nothing
                observed in a row, NaN or infinity in an observed feature. The message names the argument, what came and
                what was expected.
        """
        if not len(self):
            raise ValueError("batch: got no rows, expected at least one")
        if widths is not None and tuple(widths) != self.modalities:
            for name in self.modalities:
                if name not in widths:
                    raise ValueError(f"features: got unknown modality {name!r}, expected {list(widths)}")
            raise ValueError(f"features: got modalities {list(self.modalities)}, expected {list(widths)} in this order")
        check_available("available", self.available, (len(self), len(self.features)))
        if self.label is not None and len(self.label) != len(self):
            raise ValueError(f"label: got {len(self.label)} rows, expected {len(self)}")
        for m, (name, x) in enumerate(self.features.items()):
            self._check_feature(name, x, None if widths is None else widths[name])
            finite = torch.isfinite(x)
            if x.ndim == 3:
                steps = torch.arange(x.shape[1], device=x.device)
                finite |= (steps >= self.lengths[name][:, None])[:, :, None]
            bad = self.available[:, m] & ~finite.flatten(1).all(1)
            if bool(bad.any()):
                rows = name_rows(self.row_id[bad].tolist(), "row id")
                raise ValueError(
                    f"features[{name!r}]: got NaN or infinity in {rows}, expected finite values where available is True"
                )
        empty = ~self.available.any(1)
        if bool(empty.any()):
            rows = name_rows(self.row_id[empty].tolist(), "row id")
            raise ValueError(f"available: nothing is observed in {rows}, expected at least one modality")
        return self

    def _check_feature(self, name: str, x: Tensor, width: int | None) -> None:
        if not x.is_floating_point() or x.ndim not in (2, 3) or len(x) != len(self) or 0 in x.shape:
            expected = f"a float tensor [{len(self)}, D] or [{len(self)}, L, D]"
            raise ValueError(f"features[{name!r}]: got {x.dtype} {list(x.shape)}, expected {expected}")
        if width is not None and x.shape[-1] != width:
            raise ValueError(f"features[{name!r}]: got width {x.shape[-1]}, expected {width}")
        if (x.ndim == 3) != (name in self.lengths):
            came, rule = ("no lengths", "an int64 [B]") if x.ndim == 3 else ("lengths", "none")
            raise ValueError(f"lengths[{name!r}]: got {came} for features {list(x.shape)}, expected {rule}")
        if x.ndim == 3:
            lengths = self.lengths[name]
            if lengths.dtype != torch.int64 or lengths.shape != (len(self),):
                raise ValueError(
                    f"lengths[{name!r}]: got {lengths.dtype} {list(lengths.shape)}, expected torch.int64 [{len(self)}]"
                )
            observed = self.available[:, self.modalities.index(name)]
            bad = (lengths < observed.long()) | (lengths > x.shape[1])
            if bool(bad.any()):
                i = int(bad.nonzero()[0, 0])
                lowest = int(observed[i])
                raise ValueError(f"lengths[{name!r}]: got {int(lengths[i])} in row {i}, expected {lowest}…{x.shape[1]}")


def valid_steps(batch: Batch, m: int) -> Tensor:
    """Where modality number ``m`` has values (not missing, not padding): bool ``[B]``, for a sequence ``[B, L]``."""
    name = batch.modalities[m]
    seen = batch.available[:, m]
    if name not in batch.lengths:
        return seen
    steps = torch.arange(batch.features[name].shape[1], device=seen.device)
    return seen[:, None] & (steps < batch.lengths[name][:, None])
