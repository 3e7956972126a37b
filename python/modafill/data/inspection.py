"""What is in a data file: shapes, what is missing, labels, groups, and values that will make trouble."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from modafill.data.batch import valid_steps
from modafill.data.convert import is_store
from modafill.data.labels import Labels
from modafill.data.mapped import describe_arrays
from modafill.data.mapping import MappingLike, choose_mapping, column_name
from modafill.data.npz import NpzFile
from modafill.data.patterns import pattern_name
from modafill.data.readers import LAYOUTS, is_npz, open_source
from modafill.data.source import Source
from modafill.data.store import FeatureStore

BATCH_ROWS = 1024
MAX_BARS = 20
BINS = 10
SHOWN_COLUMNS = 5


def inspect_path(path: str | os.PathLike[str], mapping: MappingLike | None = None) -> dict[str, Any]:
    """Describe a feature store, or a foreign file or folder, reading it once in blocks.

    Args:
        path: the file or folder, recognised by content.
        mapping: as in :func:`~modafill.data.readers.open_source`.

    Returns:
        A JSON-able dict. Always ``path``, ``format``, ``bytes``; for a store or a mapped archive ``samples``,
        ``modalities`` (kind, width, dtype, lengths, counts of missing samples and of NaN and infinity in observed
        values, constant columns), ``patterns``, ``label``, ``labels`` (names and kinds of further ones), ``groups``,
        ``splits``, ``notes`` (flaws and what is made of them); for what is no store ``unmapped`` arrays; for an
        archive ``mapping``, and ``problem`` where no mapping fits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or the mapping that was asked for does not fit.
    """
    source = Path(path)
    if is_store(source):
        with FeatureStore(path) as store:
            return {"path": str(path), "format": "h5", "bytes": source.stat().st_size, **_inspect_store(store)}
    files = [file for file in source.rglob("*") if file.is_file()] if source.is_dir() else [source]
    size = sum(file.stat().st_size for file in files)
    if mapping is None and is_npz(source):
        with NpzFile(source) as npz:
            try:
                choose_mapping(npz)
            except ValueError as error:
                return {
                    "path": str(path),
                    "format": "npz",
                    "bytes": size,
                    "mapping": None,
                    "problem": str(error).removeprefix(f"{npz.path}: "),
                    "unmapped": describe_arrays(npz, set()),
                }
    with open_source(source, mapping) as samples:
        return {"path": str(path), "format": samples.layout, "bytes": size, **_inspect_source(samples)}


def _inspect_store(store: FeatureStore) -> dict[str, Any]:
    columns = {name: _Columns(width) for name, width in store.widths.items()}
    for batch in store.iter_batches(np.arange(len(store)), BATCH_ROWS):
        for m, (name, x) in enumerate(batch.features.items()):
            columns[name].add(x[valid_steps(batch, m)].numpy(), batch.lengths[name].numpy() if x.ndim == 3 else None)
    generated = store.generated().sum(0).tolist()
    modalities = [
        {
            "name": name,
            "kind": store.kinds[name],
            "width": store.widths[name],
            "dtype": store.dtypes[name],
            "generated": generated[m],
            **columns[name].summary(store.columns(name)),
        }
        for m, name in enumerate(store.modalities)
    ]
    spec = store.task.get("label")
    return {
        "samples": len(store),
        "window": store.task.get("window"),
        **_availability(store.modalities, modalities, store.available()),
        "label": None if spec is None else _label(spec, store.labels(spec["name"])),
        "labels": _further(store.task.get("labels", {})),
        "groups": {name: len(np.unique(store.groups(name))) for name in store.group_names},
        "splits": {name: dict(Counter(map(str, store.split(name)))) for name in store.split_names},
        "notes": list(store.notes),
    }


def _inspect_source(source: Source) -> dict[str, Any]:
    columns = {name: _Columns(width) for name, width in source.widths.items()}
    spec = source.task.get("label")
    available: list[np.ndarray] = []
    values: list[np.ndarray] = []
    groups: dict[str, list[np.ndarray]] = {}
    parts: dict[str, list[np.ndarray]] = {}
    for block in source.blocks(BATCH_ROWS):
        available.append(block.available)
        if spec is not None:
            values.append(block.labels[spec["name"]])
        for name, group in block.groups.items():
            groups.setdefault(name, []).append(group)
        for name, part in block.splits.items():
            parts.setdefault(name, []).append(part)
        for m, (name, x) in enumerate(block.features.items()):
            seen = block.observed(name, m)
            columns[name].add(x[seen], seen.sum(1) if x.ndim == 3 else None)
    names = source.columns()
    modalities = [
        {
            "name": name,
            "kind": source.kinds[name],
            "width": source.widths[name],
            "dtype": source.dtypes[name],
            "generated": 0,
            **columns[name].summary(names.get(name)),
        }
        for name in source.modalities
    ]
    return {
        "mapping": source.task.get("mapping"),
        "samples": len(source),
        "window": source.task.get("window"),
        **_availability(source.modalities, modalities, np.concatenate(available)),
        "label": None if spec is None else _label(spec, np.concatenate(values)),
        "labels": _further(source.task.get("labels", {})),
        "groups": {name: len(np.unique(np.concatenate(pieces))) for name, pieces in groups.items()},
        "splits": {name: dict(Counter(np.concatenate(pieces).tolist())) for name, pieces in parts.items()},
        "unmapped": source.unused,
        "notes": source.notes,
    }


def _availability(
    names: Sequence[str], modalities: list[dict[str, Any]], available: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    missing = (~available).sum(0).tolist()
    rows, counts = np.unique(available, axis=0, return_counts=True)
    patterns = [
        {"observed": pattern_name(row.tolist(), names), "samples": int(n)} for row, n in zip(rows, counts, strict=True)
    ]
    return {
        "modalities": [{**modality, "missing": n} for modality, n in zip(modalities, missing, strict=True)],
        "patterns": sorted(patterns, key=lambda pattern: -pattern["samples"]),
    }


def _label(spec: Mapping[str, Any], values: np.ndarray) -> dict[str, Any]:
    report: dict[str, Any] = {"name": spec["name"], "kind": spec["kind"]}
    try:
        labels = Labels.fit(spec, values, np.arange(len(values)))
    except ValueError as error:
        return {**report, "problem": str(error)}
    report["classes"] = {}
    if not labels.regression:
        counts = np.bincount(labels.encode(values), minlength=labels.n_classes)
        report["classes"] = dict(zip(labels.class_names, counts.tolist(), strict=True))
    if spec["kind"] != "class":
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) > MAX_BARS:
            counts, edges = np.histogram(values, BINS)
            report["histogram"] = {
                f"{low:.4g}–{high:.4g}": n for low, high, n in zip(edges, edges[1:], counts.tolist(), strict=False)
            }
        else:
            report["histogram"] = {f"{value:.4g}": n for value, n in zip(distinct, counts.tolist(), strict=True)}
    return report


def _further(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    return {name: {"name": column_name(spec["name"]), "kind": spec["kind"]} for name, spec in specs.items()}


class _Columns:
    """What a pass over the observed frames of one modality finds out."""

    def __init__(self, width: int) -> None:
        self.low = np.full(width, np.inf, dtype=np.float32)
        self.high = np.full(width, -np.inf, dtype=np.float32)
        self.frames = self.nan = self.inf = 0
        self.shortest: int | None = None
        self.longest: int | None = None

    def add(self, frames: np.ndarray, lengths: np.ndarray | None) -> None:
        """``frames [n, D]`` that are observed; lengths of a sequence's samples, 0 where missing."""
        if lengths is not None and lengths.any():
            lengths = lengths[lengths > 0]
            self.shortest = int(min(lengths.min(), self.shortest or lengths.min()))
            self.longest = int(max(lengths.max(), self.longest or 0))
        nan, inf = np.isnan(frames), np.isinf(frames)
        self.frames += len(frames)
        self.nan += int(nan.sum())
        self.inf += int(inf.sum())
        bad = nan | inf
        self.low = np.minimum(self.low, np.where(bad, np.inf, frames).min(0, initial=np.inf))
        self.high = np.maximum(self.high, np.where(bad, -np.inf, frames).max(0, initial=-np.inf))

    def summary(self, names: Sequence[str] | None) -> dict[str, Any]:
        constant = np.flatnonzero(self.low == self.high) if self.frames > 1 else np.empty(0, dtype=int)
        first = constant[:SHOWN_COLUMNS].tolist()
        return {
            "lengths": None if self.longest is None else [self.shortest, self.longest],
            "frames": self.frames,
            "nan": self.nan,
            "inf": self.inf,
            "constant": {"count": len(constant), "first": first if names is None else [names[i] for i in first]},
        }


def render_inspection(report: Mapping[str, Any]) -> RenderableType:
    """The dict of :func:`inspect_path` for people: print it with a rich console."""
    kind = "feature store" if report["format"] == "h5" else LAYOUTS[report["format"]]
    title = f"{report['path']}: {kind}, {report['bytes'] / 1e6:.1f} MB"
    if "samples" in report:
        title += f", {report['samples']:,} samples"
    if report.get("mapping"):
        title += f", mapping {report['mapping']}"
    parts: list[RenderableType] = [Text(title)]
    if report.get("problem"):
        parts.append(Text(report["problem"], style="yellow"))
    if "modalities" in report:
        parts += [
            _modality_table(report),
            *(_constant_columns(modality) for modality in report["modalities"] if modality["constant"]["count"]),
            _counts("observed", {p["observed"]: p["samples"] for p in report["patterns"]}),
        ]
    label = report.get("label")
    if label:
        if "problem" in label:
            parts.append(Text(label["problem"], style="yellow"))
        else:
            if label["classes"]:
                parts.append(_counts(f"label {label['name']} ({label['kind']})", label["classes"]))
            if "histogram" in label:
                parts.append(_counts(label["name"], label["histogram"]))
    parts += [
        Text(f"further label {name}: {spec['name']} ({spec['kind']})")
        for name, spec in report.get("labels", {}).items()
    ]
    parts += [Text(f"group {name}: {n} groups") for name, n in report.get("groups", {}).items()]
    parts += [_counts(f"parts of {name}", counts) for name, counts in report.get("splits", {}).items()]
    parts += [Text(note, style="yellow") for note in report.get("notes", ())]
    if report.get("unmapped"):
        table = Table("array", "dtype", "shape", title="not mapped", title_justify="left")
        for array in report["unmapped"]:
            table.add_row(Text(array["name"]), array["dtype"], "×".join(map(str, array["shape"])) or "scalar")
        parts.append(table)
    return Group(*parts)


def _modality_table(report: Mapping[str, Any]) -> Table:
    """A row per modality, the shape in one cell, so that 80 columns hold it."""
    heads = ("modality", "features", "dtype", "missing", "generated", "NaN", "inf", "constant")
    table = Table(*heads)
    for modality in report["modalities"]:
        lengths = modality["lengths"]
        table.add_row(
            Text(modality["name"]),
            "×".join([*(["–".join(map(str, dict.fromkeys(lengths)))] if lengths else []), str(modality["width"])]),
            modality["dtype"],
            *(str(modality[key]) for key in ("missing", "generated", "nan", "inf")),
            str(modality["constant"]["count"]),
        )
    return table


def _constant_columns(modality: Mapping[str, Any]) -> Text:
    constant = modality["constant"]
    shown = ", ".join(map(str, constant["first"])) + (", …" if constant["count"] > len(constant["first"]) else "")
    return Text(f"constant columns of {modality['name']}: {shown}")


def _counts(title: str, counts: Mapping[str, int]) -> Table:
    table = Table(title, "samples")
    for value, n in counts.items():
        table.add_row(Text(str(value)), f"{n:,}")
    return table
