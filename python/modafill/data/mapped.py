"""An ``.npz`` archive seen through a mapping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from modafill.data.mapping import SPLIT, NpzMapping, column_name
from modafill.data.npz import ArrayHeader, NpzFile
from modafill.data.source import Block, Source, check_lengths, common_dtype


class MappedNpz(Source):
    """An archive seen through a mapping.

    Raises:
        ValueError: arrays that disagree in samples, widths or steps, or that are not numbers.
    """

    layout = "npz"

    def __init__(self, npz: NpzFile, mapping: NpzMapping) -> None:
        super().__init__(npz.path)
        self.npz = npz
        self.mapping = mapping
        self.nonfinite, self.clip = mapping.nonfinite, mapping.clip
        self.task = {"mapping": mapping.name}
        if mapping.label is not None:
            self.task["label"] = _in_store(mapping.label)
        if mapping.labels:
            self.task["labels"] = {name: _in_store(spec) for name, spec in mapping.labels.items()}
        if mapping.group is not None:
            self.task["group"] = column_name(mapping.group)
        if mapping.window is not None:
            self.task["window"] = mapping.window
        self.unused = describe_arrays(npz, mapping.arrays())
        for modality in mapping.modalities:
            self._check_modality(modality)
        self._sizes = {part: self._count(part) for part in mapping.parts}
        self._check_columns()

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

    def _check_columns(self) -> None:
        for modality, name in self.mapping.columns.items():
            shape = self.npz.headers[name].shape
            if shape != (self.widths[modality],):
                raise ValueError(f"array {name!r} has the shape {shape}, expected {self.widths[modality]} column names")
        self._column_dtypes: dict[str, np.dtype] = {}
        one_each = (self.mapping.group, self.mapping.order, self.mapping.id)
        for template in self.mapping.per_sample():
            names = [template.replace(SPLIT, part) for part in self.mapping.parts]
            for name in names:
                header, kinds = self.npz.headers[name], "iuf" if template == self.mapping.order else "biufSU"
                if header.dtype.kind not in kinds or (template in one_each and len(header.shape) != 1):
                    what = "numbers" if kinds == "iuf" else "numbers or texts"
                    raise ValueError(f"array {name!r} is {header.dtype} {header.shape}, expected {what} [N]")
            self._column_dtypes[template] = common_dtype(
                f"arrays {names}", [self.npz.headers[name].dtype for name in names], len(self)
            )

    def columns(self) -> dict[str, list[str]]:
        return {modality: _texts(self.npz.load(name)).tolist() for modality, name in self.mapping.columns.items()}

    def _blocks(self, rows: int) -> Iterator[Block]:
        for part in self.mapping.parts:
            yield from self._part_blocks(part, rows)

    def array_name(self, modality: str) -> str:
        return self.mapping.modalities[modality]

    def close(self) -> None:
        self.npz.close()

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
                    name, values = mapping.lengths[modality].replace(SPLIT, part), template.replace(SPLIT, part)
                    given = self.npz.load(name)
                    check_lengths(f"lengths {name!r}", given, n, self.npz.headers[values].shape[1])
                    lengths[modality] += given.astype(np.int64)
                available[:, m] &= lengths[modality] > 0
            available[:, m] &= present
            streams[modality] = (
                self.npz.blocks(template.replace(SPLIT, part), rows) if present else self._zeros(modality, n, rows)
            )
        labels = {column_name(spec["name"]): spec["name"] for spec in mapping.label_specs}
        groups = {} if mapping.group is None else {column_name(mapping.group): mapping.group}
        label_values = {name: self._column(template, part) for name, template in labels.items()}
        group_values = {name: self._column(template, part) for name, template in groups.items()}
        order = None
        if mapping.order is not None:
            order, name = self._column(mapping.order, part), mapping.order.replace(SPLIT, part)
            if not np.isfinite(order).all():
                raise ValueError(f"array {name!r} has NaN or infinity, expected places in the group")
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

    def _column(self, template: str, part: str) -> np.ndarray:
        values = self._load(template, part)
        return _texts(values) if values.dtype.kind == "S" else values.astype(self._column_dtypes[template])

    def _load(self, template: str, part: str) -> np.ndarray:
        return self.npz.load(template.replace(SPLIT, part))

    def _zeros(self, modality: str, n: int, rows: int) -> Iterator[np.ndarray]:
        tail: tuple[int, ...] = (self.widths[modality],)
        if self.kinds[modality] == "sequence":
            tail = (self.steps.get(modality, 1), *tail)
        return (np.zeros((min(rows, n - start), *tail), dtype=np.float32) for start in range(0, n, rows))

    def _ids(self, part: str, n: int, group: np.ndarray | None, order: np.ndarray | None) -> np.ndarray:
        if self.mapping.id is not None:
            return self._column(self.mapping.id, part).astype(str)
        if group is not None and order is not None:
            return np.array([f"{g}_{o}" for g, o in zip(group.tolist(), order.tolist(), strict=True)])
        prefix = f"{part}_" if part else ""
        return np.array([f"{prefix}{i}" for i in range(n)])


def describe_arrays(npz: NpzFile, used: set[str]) -> list[dict[str, Any]]:
    """Name, dtype and shape of the arrays that are not among ``used``."""
    return [
        {"name": name, "dtype": str(header.dtype), "shape": list(header.shape)}
        for name, header in npz.headers.items()
        if name not in used
    ]


def _texts(values: np.ndarray) -> np.ndarray:
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values.astype(str)


def _in_store(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "name": column_name(spec["name"])}
