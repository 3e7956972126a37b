"""Samples that are looked up one by one, each modality under the sample's key."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from modafill.data.source import Block, Source, naming
from modafill.data.texts import text_column

# One long sample pads all others of its block to its length.
BLOCK_BYTES = 1 << 26


class KeyedSource(Source):
    """A source whose modalities are found under the keys of its samples.

    A subclass calls :meth:`_probe` when :meth:`look_up` can answer, and fills :attr:`labels`, :attr:`groups`,
    :attr:`splits` and :attr:`order` with one value per sample.

    Attributes:
        keys: of the samples, in order; a key that comes twice gets ``#2`` in the store's ids.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        super().__init__(path)
        with naming(path):
            self.keys = text_column(keys)
        if not self.keys:
            raise ValueError(f"{path}: no samples are named")
        self.labels: dict[str, np.ndarray] = {}
        self.groups: dict[str, np.ndarray] = {}
        self.splits: dict[str, np.ndarray] = {}
        self.order: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def look_up(self, modality: str, key: str) -> np.ndarray | None:
        """``[D]`` or ``[T, D]`` numbers of a sample, None or no steps where it lacks the modality."""

    def _probe(self, modalities: Sequence[str]) -> None:
        """Find each modality's kind and width in the first sample that has it."""
        for modality in modalities:
            found = next(
                (x for x in (self.look_up(modality, key) for key in self.keys) if x is not None and x.size), None
            )
            if found is None:
                raise ValueError(f"{self.path}: no sample has the modality {modality!r}")
            if found.dtype.kind not in "fiu" or found.ndim not in (1, 2):
                raise ValueError(
                    f"{self.path}: modality {modality!r} is {found.dtype} {found.shape}, expected numbers [T, D] or [D]"
                )
            self.widths[modality] = found.shape[-1]
            self.kinds[modality] = "vector" if found.ndim == 1 else "sequence"
            self.dtypes[modality] = str(found.dtype)

    def _blocks(self, rows: int) -> Iterator[Block]:
        ids = np.array(number_repeats(self, self.keys))
        lacking = dict.fromkeys(self.modalities, 0)
        self._zeros: Counter[str] = Counter()
        samples: list[dict[str, np.ndarray | None]] = []
        steps: dict[str, int] = {}
        start = 0
        for key in self.keys:
            sample = {name: self._checked(name, key) for name in self.modalities}
            own = {name: 1 if x is None or x.ndim == 1 else len(x) for name, x in sample.items()}
            longest = {name: max(n, steps.get(name, 1)) for name, n in own.items()}
            size = 4 * (len(samples) + 1) * sum(n * self.widths[name] for name, n in longest.items())
            if samples and (len(samples) == rows or size > BLOCK_BYTES):
                yield self._block(samples, steps, ids, start)
                start += len(samples)
                samples, longest = [], own
            samples.append(sample)
            steps = longest
            for name, x in sample.items():
                lacking[name] += x is None
        yield self._block(samples, steps, ids, start)
        for name, n in lacking.items():
            if self._zeros[name]:
                self.note(f"{name}: {self._zeros[name]} samples have zeros alone; they lack it")
            if n:
                self.note(f"{name}: {n} samples without it")

    def _block(
        self, samples: list[dict[str, np.ndarray | None]], steps: dict[str, int], ids: np.ndarray, start: int
    ) -> Block:
        n, piece = len(samples), slice(start, start + len(samples))
        features, lengths = {}, {}
        for name, width in self.widths.items():
            tail: tuple[int, ...] = (width,) if self.kinds[name] == "vector" else (steps[name], width)
            features[name] = np.zeros((n, *tail), dtype=np.float32)
            if self.kinds[name] == "sequence":
                lengths[name] = np.zeros(n, dtype=np.int64)
            for i, x in enumerate(sample[name] for sample in samples):
                if x is not None and x.ndim == 2:
                    features[name][i, : len(x)] = x
                    lengths[name][i] = len(x)
                elif x is not None:
                    features[name][i] = x
        return Block(
            features,
            np.array([[x is not None for x in sample.values()] for sample in samples]),
            lengths,
            ids[piece],
            labels={name: values[piece] for name, values in self.labels.items()},
            groups={name: values[piece] for name, values in self.groups.items()},
            splits={name: values[piece] for name, values in self.splits.items()},
            order=None if self.order is None else self.order[piece],
        )

    def _checked(self, name: str, key: str) -> np.ndarray | None:
        x = self.look_up(name, key)
        if x is None or not x.size:
            return None
        if x.dtype.kind in "fiu" and not x.any():
            self._zeros[name] += 1
            return None
        if x.dtype.kind not in "fiu" or x.ndim != (2 if self.kinds[name] == "sequence" else 1):
            raise ValueError(f"{self.path}: {name} of {key!r} is {x.dtype} {x.shape}, expected numbers like the others")
        if x.shape[-1] != self.widths[name]:
            raise ValueError(f"{self.path}: {name} of {key!r} is {x.shape[-1]} wide, the first one {self.widths[name]}")
        with np.errstate(over="ignore"):
            return x.astype(np.float32)


def number_repeats(source: Source, keys: Sequence[str]) -> list[str]:
    """Keys, with ``#2`` behind one's second occurrence, which the source then notes."""
    seen: Counter[str] = Counter()
    taken, out = set(keys), []
    for key in keys:
        seen[key] += 1
        name = key
        while seen[key] > 1 and (name := f"{key}#{seen[key]}") in taken:
            seen[key] += 1
        taken.add(name)
        out.append(name)
    repeated = [key for key, n in Counter(keys).items() if n > 1]
    if repeated:
        source.note(f"{len(repeated)} ids stand for more than one sample, such as {repeated[0]!r}; they are numbered")
    return out


def whole_groups(groups: np.ndarray, splits: np.ndarray) -> bool:
    """Whether no group has samples in two parts of a split."""
    parts: dict[str, set[str]] = {}
    for group, part in zip(groups.tolist(), splits.tolist(), strict=True):
        parts.setdefault(group, set()).add(part)
    return all(len(names) == 1 for names in parts.values())
