"""What every reader of a foreign layout gives: samples in blocks, and how a feature store is made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modafill.data.patterns import name_rows
from modafill.data.texts import check_texts
from modafill.data.writer import StoreWriter

BLOCK_ROWS = 1024


@dataclass
class Block:
    """Some neighbouring samples of an archive, as :meth:`StoreWriter.append` takes them.

    Attributes:
        features: modality → float32 ``[n, D]`` or ``[n, T, D]``, as in the file; zeros where an array is absent.
        available: bool ``[n, M]``.
        lengths: modality → int64 ``[n]`` for modalities that have them.
        ids: ``[n]`` strings.
        labels, groups, splits: column name → ``[n]``.
        order: ``[n]`` or None.
    """

    features: dict[str, np.ndarray]
    available: np.ndarray
    lengths: dict[str, np.ndarray]
    ids: np.ndarray
    labels: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]
    splits: dict[str, np.ndarray]
    order: np.ndarray | None

    def observed(self, name: str, m: int) -> np.ndarray:
        """bool ``[n]`` or ``[n, T]``: where a modality has valid values."""
        seen = self.available[:, m]
        x = self.features[name]
        if x.ndim == 2:
            return seen
        lengths = self.lengths.get(name, np.full(len(x), x.shape[1]))
        return seen[:, None] & (np.arange(x.shape[1]) < lengths[:, None])

    def nonfinite(self, name: str, m: int) -> np.ndarray:
        """bool like the features: where a valid value is NaN or infinity."""
        return ~np.isfinite(self.features[name]) & self.observed(name, m)[..., None]

    def hide(self, name: str, m: int, rows: np.ndarray) -> None:
        """Make a modality missing in ``rows``, bool ``[n]``."""
        self.available[rows, m] = False
        self.features[name][rows] = 0
        if name in self.lengths:
            self.lengths[name][rows] = 0


class Source(ABC):
    """Samples of a foreign file or folder, read in blocks.

    Attributes:
        path: the file or folder.
        layout: the name of its layout, such as ``"npz"`` or ``"mmsa"``.
        widths: modality → D, in the order of the columns of availability.
        kinds: modality → ``"vector"`` or ``"sequence"``.
        steps: modality → T of sequences without lengths.
        dtypes: modality → dtype in the file.
        task: label, further labels, group and window, as a store keeps them.
        nonfinite: what NaN or infinity in an observed feature means: ``"error"``, ``"missing"`` or ``"zero"``.
        clip: modality → bound of its values.
        unused: what the file has beside: name, dtype and shape.
        notes: flaws of the file and what was made of them; complete after a pass over :meth:`blocks`.
    """

    layout: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.widths: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self.steps: dict[str, int] = {}
        self.dtypes: dict[str, str] = {}
        self.task: dict[str, Any] = {}
        self.nonfinite = "zero"
        self.clip: Mapping[str, float] = {}
        self.unused: list[dict[str, Any]] = []
        self.notes: list[str] = []

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in the order of the columns of availability."""
        return tuple(self.widths)

    @abstractmethod
    def __len__(self) -> int:
        """Samples."""

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[Block]:
        """All samples, at most ``rows`` at a time; ValueError names the file."""
        unknown: Counter[str] = Counter()
        low = {name: np.full(width, np.inf, dtype=np.float32) for name, width in self.widths.items()}
        high = {name: -bound for name, bound in low.items()}
        with naming(self.path):
            for block in self._blocks(rows):
                for m, (name, x) in enumerate(block.features.items()):
                    seen = x[block.observed(name, m)]
                    known = np.isfinite(seen)
                    low[name] = np.minimum(low[name], seen.min(0, initial=np.inf, where=known))
                    high[name] = np.maximum(high[name], seen.max(0, initial=-np.inf, where=known))
                for name, values in block.labels.items():
                    unknown[name] += int(np.isnan(values).sum()) if values.dtype.kind == "f" else 0
                yield block
        for name, width in self.widths.items():
            if dead := int((low[name] == high[name]).sum()):
                self.note(f"{name}: {dead} of {width} columns have the same value throughout")
        for name, n in unknown.items():
            if n:
                self.note(f"{name}: {n} labels are NaN, which training refuses")

    @abstractmethod
    def _blocks(self, rows: int) -> Iterator[Block]:
        """What :meth:`blocks` gives."""

    def columns(self) -> dict[str, list[str]]:
        """Modality → D column names, where there are some."""
        return {}

    def array_name(self, modality: str) -> str:
        """What the file calls a modality."""
        return modality

    def note(self, text: str) -> None:
        """Add to the notes what is not among them."""
        if text not in self.notes:
            self.notes.append(text)

    @abstractmethod
    def close(self) -> None:
        """Close what is open."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Put ``where`` before the message of a ValueError that does not begin with it, or with a file in it."""
    try:
        yield
    except ValueError as error:
        raise error if str(error).startswith(str(where)) else ValueError(f"{where}: {error}") from None


def check_lengths(name: str, values: np.ndarray, count: int, longest: int | None = None) -> None:
    """Raise ValueError with their ``name`` unless ``values`` are whole numbers ``[count]`` from 0 to ``longest``."""
    expected = f"expected whole numbers [{count}] from 0{'' if longest is None else f' to {longest}'}"
    if values.dtype.kind not in "iuf" or values.shape != (count,):
        raise ValueError(f"{name} are {values.dtype} {values.shape}, {expected}")
    with np.errstate(invalid="ignore"):
        wrong = ~(values >= 0) | (values % 1 != 0) | (longest is not None and values > longest)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{name} are {values.dtype}, {expected}; row {row} has {values[row]}")


def common_dtype(name: str, dtypes: Sequence[np.dtype], count: int) -> np.dtype:
    """What holds a column of all parts, ``count`` values, where the first would cut what the others have."""
    if len({dtype.kind in "SU" for dtype in dtypes}) > 1:
        raise ValueError(
            f"{name} are {', '.join(map(str, dtypes))} in the parts, expected texts or numbers in all of them"
        )
    found = np.result_type(*dtypes)
    if found.kind == "f" and all(dtype.kind in "iu" for dtype in dtypes):
        raise ValueError(
            f"{name} are {', '.join(map(str, dtypes))} in the parts, expected integers that fit into 64 bits together"
        )
    if found.kind in "SU":
        with naming(name):
            check_texts(count, found.itemsize // np.dtype(f"{found.kind}1").itemsize)
    return found


def write_store(source: Source, out: Path, task: Mapping[str, Any]) -> list[str]:
    """Write all samples as a feature store, whole or not at all.

    Args:
        source: the samples.
        out: the store to create or replace.
        task: goes into the store's task beside that of the source.

    Returns:
        Flaws of the file and what was made of them, which the store keeps too.

    Raises:
        ValueError: NaN or infinity in observed features where ``source.nonfinite`` is ``"error"``, or a damaged file.
    """
    bad_rows: dict[str, list[int]] = {}
    bad_values: dict[str, int] = {}
    start = 0
    with (
        naming(source.path),
        StoreWriter(
            out,
            modalities=list(source.modalities),
            widths=source.widths,
            kinds=source.kinds,
            steps=source.steps,
            task={**source.task, **task},
            columns=source.columns(),
        ) as writer,
    ):
        for block in source.blocks():
            for m, (name, x) in enumerate(block.features.items()):
                bad = block.nonfinite(name, m)
                if bad.any():
                    bad_values[name] = bad_values.get(name, 0) + int(bad.sum())
                    rows = np.flatnonzero(bad.reshape(len(bad), -1).any(1)) + start
                    bad_rows.setdefault(name, []).extend(rows.tolist())
                    x[bad] = 0
                if name in source.clip:
                    np.clip(x, -source.clip[name], source.clip[name], out=x)
            start += len(block.available)
            writer.append(**vars(block))
        if bad_rows and source.nonfinite == "error":
            what = "; ".join(
                f"{source.array_name(name)!r} has {bad_values[name]} in {name_rows(rows)}"
                for name, rows in bad_rows.items()
            )
            raise ValueError(
                f"NaN or infinity in observed features: array {what}. Where that means a missing "
                'modality, name a bool array [N, M] as "available" in the mapping, or say "nonfinite": "missing"; '
                '"zero" takes the values for 0'
            )
        zeroed = [f"{name}: {n} values that are NaN or infinite are taken for 0" for name, n in bad_values.items()]
        writer.notes = [*source.notes, *zeroed]
    return writer.notes
