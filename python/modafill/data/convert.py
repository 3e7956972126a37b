"""From ``.npz`` archives to feature stores."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modafill.data.mapping import SPLIT, MappingLike, NpzMapping, choose_mapping, column_name
from modafill.data.npz import ArrayHeader, NpzFile
from modafill.data.patterns import name_rows
from modafill.data.store import FeatureStore
from modafill.data.writer import StoreWriter

BLOCK_ROWS = 1024
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


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


class MappedNpz:
    """An archive seen through a mapping.

    Attributes:
        widths: modality → D.
        steps: modality → T of sequences without lengths.
        kinds: modality → ``"vector"`` or ``"sequence"``.
        dtypes: modality → dtype in the archive.

    Raises:
        ValueError: arrays that disagree in samples, widths or steps, or that are not numbers.
    """

    def __init__(self, npz: NpzFile, mapping: NpzMapping) -> None:
        self.npz = npz
        self.mapping = mapping
        self.widths: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        for modality in mapping.modalities:
            self._check_modality(modality)
        self._sizes = {part: self._count(part) for part in mapping.parts}

    def __len__(self) -> int:
        return sum(self._sizes.values())

    def _header(self, template: str, part: str) -> ArrayHeader | None:
        return self.npz.headers.get(template.replace(SPLIT, part))

    def _check_modality(self, modality: str) -> None:
        template, ragged = self.mapping.modalities[modality], modality in self.mapping.lengths
        tails = set()
        for part in self.mapping.parts:
            header = self._header(template, part)
            if header is None:
                continue
            shape = header.shape
            if header.dtype.kind not in "fiub" or len(shape) not in ((3,) if ragged else (2, 3)) or 0 in shape[1:]:
                expected = "[N, T, D], as the mapping has lengths for it" if ragged else "[N, D] or [N, T, D]"
                raise ValueError(
                    f"{self.npz.path}: array {template.replace(SPLIT, part)!r} is {header.dtype} {shape}, "
                    f"expected numbers {expected}"
                )
            self.dtypes[modality] = str(header.dtype)
            tails.add(shape[2:] if ragged else shape[1:])
        if len(tails) != 1:
            raise ValueError(f"{self.npz.path}: modality {modality!r} has parts of different shapes {sorted(tails)}")
        tail = tails.pop()
        self.widths[modality] = tail[-1]
        self.kinds[modality] = "sequence" if ragged or len(tail) == 2 else "vector"
        if len(tail) == 2:
            self.steps[modality] = tail[0]

    def _count(self, part: str) -> int:
        templates = [*self.mapping.modalities.values(), *self.mapping.lengths.values(), *self.mapping.per_sample()]
        counts = {}
        for template in templates:
            header = self._header(template, part)
            if header is not None:
                counts[template.replace(SPLIT, part)] = header.shape[0] if header.shape else 0
        if len(set(counts.values())) > 1:
            raise ValueError(f"{self.npz.path}: arrays disagree in the number of samples: {counts}")
        return max(counts.values(), default=0)

    def columns(self) -> dict[str, list[str]]:
        """Modality → D column names, where the mapping has them."""
        return {modality: self.npz.load(name).astype(str).tolist() for modality, name in self.mapping.columns.items()}

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[Block]:
        """All samples, part by part, at most ``rows`` at a time."""
        for part in self.mapping.parts:
            yield from self._part_blocks(part, rows)

    def _part_blocks(self, part: str, rows: int) -> Iterator[Block]:
        mapping, n = self.mapping, self._sizes[part]
        available = np.ones((n, len(mapping.modalities)), dtype=bool)
        if mapping.available is not None:
            name = mapping.available.replace(SPLIT, part)
            given = self.npz.load(name)
            if given.dtype != bool or given.shape != available.shape:
                raise ValueError(
                    f"{self.npz.path}: array {name!r} is {given.dtype} {given.shape}, expected bool {available.shape}"
                )
            available &= given
        lengths, streams = {}, {}
        for m, (modality, template) in enumerate(mapping.modalities.items()):
            present = self._header(template, part) is not None
            if modality in mapping.lengths:
                lengths[modality] = np.zeros(n, dtype=np.int64)
                if present:
                    lengths[modality] += self._load(mapping.lengths[modality], part).astype(np.int64)
                available[:, m] &= lengths[modality] > 0
            available[:, m] &= present
            streams[modality] = (
                self.npz.blocks(template.replace(SPLIT, part), rows) if present else self._zeros(modality, n, rows)
            )
        labels = {column_name(spec["name"]): spec["name"] for spec in mapping.label_specs}
        groups = {} if mapping.group is None else {column_name(mapping.group): mapping.group}
        label_values = {name: self._load(template, part) for name, template in labels.items()}
        group_values = {name: self._load(template, part) for name, template in groups.items()}
        order = None if mapping.order is None else self._load(mapping.order, part)
        ids = self._ids(part, n, next(iter(group_values.values()), None), order)
        for start in range(0, n, rows):
            piece = slice(start, start + rows)
            with np.errstate(over="ignore"):
                features = {name: next(stream).astype(np.float32) for name, stream in streams.items()}
            block = Block(
                features=features,
                available=available[piece],
                lengths={name: values[piece] for name, values in lengths.items()},
                ids=ids[piece],
                labels={name: values[piece] for name, values in label_values.items()},
                groups={name: values[piece] for name, values in group_values.items()},
                splits={"split": np.full(len(available[piece]), part)} if mapping.splits else {},
                order=None if order is None else order[piece],
            )
            if mapping.nonfinite == "missing":
                for m, name in enumerate(features):
                    bad = block.nonfinite(name, m).reshape(len(block.ids), -1)
                    block.hide(name, m, np.any(bad, axis=1))
            yield block

    def _load(self, template: str, part: str) -> np.ndarray:
        return self.npz.load(template.replace(SPLIT, part))

    def _zeros(self, modality: str, n: int, rows: int) -> Iterator[np.ndarray]:
        tail: tuple[int, ...] = (self.widths[modality],)
        if self.kinds[modality] == "sequence":
            tail = (self.steps.get(modality, 1), *tail)
        return (np.zeros((min(rows, n - start), *tail), dtype=np.float32) for start in range(0, n, rows))

    def _ids(self, part: str, n: int, group: np.ndarray | None, order: np.ndarray | None) -> np.ndarray:
        if self.mapping.id is not None:
            return self._load(self.mapping.id, part).astype(str)
        if group is not None and order is not None:
            return np.array([f"{g}_{o}" for g, o in zip(group.tolist(), order.tolist(), strict=True)])
        prefix = f"{part}_" if part else ""
        return np.array([f"{prefix}{i}" for i in range(n)])


def convert_npz(
    source: str | os.PathLike[str], out: str | os.PathLike[str], mapping: MappingLike | None = None
) -> NpzMapping:
    """Write the samples of an ``.npz`` file as a feature store.

    Args:
        source: the archive; pickled objects are refused.
        out: the store to create or replace.
        mapping: a mapping, its name, or the path of its JSON file (default: the one built-in mapping that fits).

    Returns:
        The mapping that was used.

    Raises:
        ValueError: an unreadable or suspicious archive, no fitting mapping, arrays that disagree, or NaN or infinity in
            observed features (unless the mapping's ``nonfinite`` says what they mean).
    """
    with NpzFile(source) as npz:
        used = choose_mapping(npz, mapping)
        _convert(MappedNpz(npz, used), Path(out), {})
        return used


def open_data(
    path: str | os.PathLike[str], cache_dir: str | os.PathLike[str], mapping: MappingLike | None = None
) -> FeatureStore:
    """Open a feature store in place, or an ``.npz`` file by way of ``cache_dir/<stem>.h5``.

    The converted file is used again as long as the archive's path, size and time and the mapping are the same. A
    file of that name that is no conversion is never replaced.

    Args:
        path: an ``.h5`` store or an ``.npz`` archive, told apart by content.
        cache_dir: where conversions are kept; created if need be, not touched for a store.
        mapping: as in :func:`convert_npz`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as :class:`FeatureStore` and :func:`convert_npz`, a file that is neither, or one in the way.
    """
    if file_format(path) == "h5":
        return FeatureStore(path)
    source = Path(path)
    with NpzFile(source) as npz:
        used = choose_mapping(npz, mapping)
        stat = source.stat()
        key = json.dumps([str(source.resolve()), stat.st_size, stat.st_mtime_ns, used.name, used.to_dict()])
        digest = hashlib.sha256(key.encode()).hexdigest()
        out = Path(cache_dir) / f"{source.stem}.h5"
        if out.exists():
            try:
                store = FeatureStore(out, name=str(path))
            except ValueError:
                store = None
            foreign = not _is_hdf5(out) if store is None else "source" not in store.task
            if foreign:
                raise ValueError(f"{out}: in the way of the conversion of {path}; move it, or choose another folder")
            if store is not None and store.task["source"] == digest:
                return store
        out.parent.mkdir(parents=True, exist_ok=True)
        _convert(MappedNpz(npz, used), out, {"source": digest})
    return FeatureStore(out, name=str(path))


def file_format(path: str | os.PathLike[str]) -> str:
    """``"h5"`` or ``"npz"`` by a file's first bytes; ValueError for anything else."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if start == HDF5_MAGIC:
        return "h5"
    if start[:2] == b"PK":
        return "npz"
    raise ValueError(f"{path}: neither a feature store (.h5) nor an .npz file")


def _in_store(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "name": column_name(spec["name"])}


def _is_hdf5(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(HDF5_MAGIC)) == HDF5_MAGIC


def _convert(data: MappedNpz, out: Path, task: dict[str, Any]) -> None:
    mapping = data.mapping
    task = {"mapping": mapping.name, **task}
    if mapping.label is not None:
        task["label"] = _in_store(mapping.label)
    if mapping.labels:
        task["labels"] = {name: _in_store(spec) for name, spec in mapping.labels.items()}
    if mapping.group is not None:
        task["group"] = column_name(mapping.group)
    if mapping.window is not None:
        task["window"] = mapping.window
    bad_rows: dict[str, list[int]] = {}
    bad_values: dict[str, int] = {}
    start = 0
    with StoreWriter(
        out,
        modalities=list(mapping.modalities),
        widths=data.widths,
        kinds=data.kinds,
        steps=data.steps,
        task=task,
        columns=data.columns(),
    ) as writer:
        for block in data.blocks():
            for m, (name, x) in enumerate(block.features.items()):
                bad = block.nonfinite(name, m)
                if bad.any():
                    bad_values[name] = bad_values.get(name, 0) + int(bad.sum())
                    rows = np.flatnonzero(bad.reshape(len(bad), -1).any(1)) + start
                    bad_rows.setdefault(name, []).extend(rows.tolist())
                    x[bad] = 0
                if name in mapping.clip:
                    np.clip(x, -mapping.clip[name], mapping.clip[name], out=x)
            start += len(block.available)
            writer.append(**vars(block))
        if bad_rows and mapping.nonfinite == "error":
            what = "; ".join(
                f"{mapping.modalities[name]!r} has {bad_values[name]} in {name_rows(rows)}"
                for name, rows in bad_rows.items()
            )
            raise ValueError(
                f"{data.npz.path}: NaN or infinity in observed features: array {what}. Where that means a missing "
                'modality, name a bool array [N, M] as "available" in the mapping, or say "nonfinite": "missing"; '
                '"zero" takes the values for 0'
            )
