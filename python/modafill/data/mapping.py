"""Mappings: which arrays of an ``.npz`` file are modalities, labels and groups."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Union

from modafill.data.labels import check_label_spec
from modafill.data.npz import ArrayHeader, NpzFile

SPLIT = "{split}"
NONFINITE = ("error", "missing", "zero")

MappingLike = Union["NpzMapping", Mapping[str, Any], str, os.PathLike[str]]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_optional_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_text_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


# What each key of a mapping must be, as a check and in words.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "modalities": (_is_text_by_name, "an object: modality → name of an array"),
    "splits": (lambda value: isinstance(value, (list, tuple)) and all(map(_is_text, value)), "a list of names"),
    "label": (lambda value: value is None or isinstance(value, dict), "an object with the name of an array and a kind"),
    "labels": (
        lambda value: isinstance(value, dict) and all(isinstance(spec, dict) for spec in value.values()),
        "an object: name → an object with the name of an array and a kind",
    ),
    **dict.fromkeys(("group", "order", "id", "available"), (_is_optional_text, "the name of an array")),
    **dict.fromkeys(("lengths", "columns"), (_is_text_by_name, "an object: modality → name of an array")),
    "clip": (
        lambda value: isinstance(value, dict) and all(isinstance(v, (int, float)) and v > 0 for v in value.values()),
        "an object: modality → number above 0",
    ),
    "window": (lambda value: value is None or (type(value) is int and value >= 0), "a whole number of turns"),
    **dict.fromkeys(("nonfinite", "description"), (_is_text, "a text")),
}


@dataclass(frozen=True)
class NpzMapping:
    """Names of arrays by what they mean. Where ``splits`` are given, a name may contain ``{split}``.

    Attributes:
        name: of the mapping itself.
        modalities: modality → array ``[N, D]`` (vectors) or ``[N, T, D]`` (sequences), numbers. An array that one split
            lacks means that the modality is missing there.
        splits: parts that come as arrays of their own; they become the store's split column.
        label: label specification (:meth:`Labels.fit`), whose ``name`` is an array.
        labels: further ones, by the name that a training asks for them by.
        group: array ``[N]`` of what must not be divided between training and test, such as the dialogue.
        order: array ``[N]`` of numbers, the place in the group.
        id: array ``[N]`` of sample names (default: group and order, or split and place).
        available: array bool ``[N, M]``, True = observed.
        lengths: sequence modality → array of ints ``[N]``, valid steps; 0 means missing.
        columns: modality → array ``[D]`` of column names.
        clip: modality → bound; values are clipped to ±bound.
        nonfinite: what NaN or infinity in an observed feature means: ``"error"``; ``"missing"``, this sample lacks the
            modality; ``"zero"``, the value is 0.
        window: how many turns of a group make a sample.
        description: one line for people.
    """

    name: str
    modalities: dict[str, str]
    splits: tuple[str, ...] = ()
    label: dict[str, Any] | None = None
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    group: str | None = None
    order: str | None = None
    id: str | None = None
    available: str | None = None
    lengths: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    clip: dict[str, float] = field(default_factory=dict)
    nonfinite: str = "error"
    window: int | None = None
    description: str = ""

    @classmethod
    def from_dict(cls, name: str, given: Mapping[str, Any]) -> NpzMapping:
        """The mapping that a JSON object describes; ValueError names what is wrong with it."""
        allowed = {f.name for f in fields(cls)} - {"name"}
        if set(given) - allowed:
            raise ValueError(f"mapping {name}: got the keys {sorted(set(given) - allowed)}, expected {sorted(allowed)}")
        for key, value in given.items():
            fits, expected = _RULES[key]
            if not fits(value):
                raise ValueError(f"mapping {name}: {key}: got {value!r}, expected {expected}")
        mapping = cls(name, **{**given, "splits": tuple(given.get("splits", ()))}) if "modalities" in given else None
        if mapping is None or not isinstance(mapping.modalities, dict) or len(mapping.modalities) < 2:
            raise ValueError(f"mapping {name}: expected 'modalities' to name two arrays or more")
        for modality in mapping.modalities:
            if modality in ("", ".") or set(modality) & {"/", "\0"}:
                raise ValueError(f"mapping {name}: modalities: got {modality!r}, expected a name without '/'")
        if mapping.nonfinite not in NONFINITE:
            raise ValueError(f"mapping {name}: nonfinite: got {mapping.nonfinite!r}, expected {' or '.join(NONFINITE)}")
        for what in ("lengths", "columns", "clip"):
            unknown = set(getattr(mapping, what)) - set(mapping.modalities)
            if unknown:
                raise ValueError(f"mapping {name}: {what} names the unknown modalities {sorted(unknown)}")
        for spec in mapping.label_specs:
            if not isinstance(spec.get("name"), str):
                raise ValueError(f"mapping {name}: expected the label to have the name of an array")
            try:
                check_label_spec(spec)
            except ValueError as error:
                raise ValueError(f"mapping {name}: {error}") from None
        columns: dict[str, str] = {}
        for array in [spec["name"] for spec in mapping.label_specs]:
            if columns.setdefault(column_name(array), array) != array:
                raise ValueError(
                    f"mapping {name}: the labels {columns[column_name(array)]!r} and {array!r} would both be "
                    f"{column_name(array)!r} in a store"
                )
        for array in [*columns.values(), *([] if mapping.group is None else [mapping.group])]:
            if column_name(array) in ("", "."):
                raise ValueError(f"mapping {name}: got the array {array!r}, expected one whose name a column can have")
        return mapping

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the name; :meth:`from_dict` reads it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name" and getattr(self, f.name)}

    @property
    def label_specs(self) -> list[dict[str, Any]]:
        """The label's specification and those of further labels."""
        return [*([] if self.label is None else [self.label]), *self.labels.values()]

    @property
    def parts(self) -> tuple[str, ...]:
        """The splits, or one nameless part."""
        return self.splits or ("",)

    def per_sample(self) -> list[str]:
        """Array names, still with ``{split}``, that hold something for every sample beside features."""
        given = [*(spec["name"] for spec in self.label_specs), self.group, self.order, self.id, self.available]
        return list(dict.fromkeys(name for name in given if name is not None))

    def arrays(self) -> set[str]:
        """Every array name that the mapping mentions."""
        names = [*self.modalities.values(), *self.lengths.values(), *self.columns.values(), *self.per_sample()]
        return {name.replace(SPLIT, part) for name in names for part in self.parts}

    def absent(self, headers: Mapping[str, ArrayHeader]) -> list[str]:
        """Array names that are needed and not there. A modality needs to be in one part only."""
        absent = [
            name.replace(SPLIT, part)
            for name in self.per_sample()
            for part in self.parts
            if name.replace(SPLIT, part) not in headers
        ]
        absent += [name for name in self.columns.values() if name not in headers]
        for modality, name in self.modalities.items():
            here = [part for part in self.parts if name.replace(SPLIT, part) in headers]
            if not here:
                absent.append(name)
            if modality in self.lengths:
                lengths = [self.lengths[modality].replace(SPLIT, part) for part in here]
                absent += [length for length in lengths if length not in headers]
        return absent


def column_name(array: str) -> str:
    """What a per-split array is called in the store: ``vid_{split}`` becomes ``vid``, ``a/b`` ``a_b``."""
    return array.replace(SPLIT, "").replace("/", "_").strip("_")


def builtin_mappings() -> dict[str, NpzMapping]:
    """The mappings that come with the package, by name."""
    folder = resources.files("modafill.data") / "mappings"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return {f.name[:-5]: NpzMapping.from_dict(f.name[:-5], json.loads(f.read_text(encoding="utf-8"))) for f in files}


def load_mapping(given: MappingLike) -> NpzMapping:
    """A mapping by the name of one that comes with the package, by the path of a JSON file, or as an object.

    Raises:
        ValueError: no such name or file, malformed JSON, or a malformed mapping.
    """
    if isinstance(given, NpzMapping):
        return given
    if isinstance(given, Mapping):
        return NpzMapping.from_dict("given", given)
    builtin = builtin_mappings()
    if str(given) in builtin:
        return builtin[str(given)]
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"mapping: got {str(given)!r}, expected a JSON file or one of {list(builtin)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return NpzMapping.from_dict(path.stem, content)


def choose_mapping(npz: NpzFile, given: MappingLike | None = None) -> NpzMapping:
    """The mapping for a file: the given one, or the only built-in one whose arrays are all there.

    Raises:
        ValueError: the given mapping's arrays are not all there, or not exactly one built-in mapping fits; the message
            says what fits or what is missing.
    """
    if given is not None:
        mapping = load_mapping(given)
        absent = mapping.absent(npz.headers)
        if absent:
            raise ValueError(
                f"{npz.path}: mapping {mapping.name} needs the arrays {absent}, there are {list(npz.headers)}"
            )
        return mapping
    missing = {name: mapping.absent(npz.headers) for name, mapping in builtin_mappings().items()}
    fits = [name for name, absent in missing.items() if not absent]
    if len(fits) == 1:
        return builtin_mappings()[fits[0]]
    if fits:
        raise ValueError(f"{npz.path}: the mappings {fits} all fit, expected one to be named")
    reasons = "; ".join(f"{name} lacks {', '.join(absent[:4])}" for name, absent in missing.items())
    raise ValueError(
        f"{npz.path}: no built-in mapping fits the arrays {list(npz.headers)} ({reasons}); "
        "say which array is what in a JSON file, --mapping FILE.json, such as "
        '{"modalities": {"text": ARRAY, "audio": ARRAY}, "label": {"name": ARRAY, "kind": "class"}} (docs/data.md)'
    )
