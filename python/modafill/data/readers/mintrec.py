"""MIntRec's folder: tables of clips by part, and pickles of features by clip."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from modafill.data.readers.keyed import KeyedSource
from modafill.data.readers.pickles import PickledArray, PickleFile
from modafill.data.source import naming
from modafill.data.texts import check_texts, text_column

TABLES = {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}
COLUMNS = ["season", "episode", "clip", "text", "label"]
PICKLES = {
    "text": "text_data/text_feats.pkl",
    "audio": "audio_data/audio_feats.pkl",
    "vision": "video_data/video_feats.pkl",
}
# The coarse label of the paper (ACL MM 2022, §3.2): an intent expresses an emotion or pursues a goal.
EMOTIONAL = frozenset(
    ["Complain", "Praise", "Apologise", "Thank", "Criticize", "Agree", "Taunt", "Flaunt", "Joke", "Oppose", "Care"]
)


class MIntRecFolder(KeyedSource):
    """``train.tsv``, ``dev.tsv``, ``test.tsv`` and ``audio_data/audio_feats.pkl``, ``video_data/video_feats.pkl``.

    The published folder has no features of text: its code computes them from the sentences while it trains. Where
    ``text_data/text_feats.pkl`` (id → ``[T, D]``) has been put there, text is a modality too.
    """

    layout = "mintrec"

    def __init__(self, root: Path) -> None:
        keys: list[str] = []
        columns: dict[str, list[str]] = {"split": [], "intent": []}
        part_of: dict[str, str] = {}
        for split, name in TABLES.items():
            for key, intent in _read_table(root / name):
                if part_of.setdefault(key, split) != split:
                    raise ValueError(f"{root / name}: {key!r} is in the parts {part_of[key]} and {split}, expected one")
                keys.append(key)
                columns["split"].append(split)
                columns["intent"].append(intent)
        super().__init__(root, keys)
        intents = np.array(text_column(columns["intent"]))
        self.labels = {
            "intent": intents,
            "coarse": np.where(np.isin(intents, list(EMOTIONAL)), "Emotion", "Goal"),
        }
        self.splits = {"split": np.array(columns["split"])}
        self.task = {
            "label": {"name": "intent", "kind": "class"},
            "labels": {"coarse": {"name": "coarse", "kind": "class"}},
        }
        self._files: dict[str, PickleFile] = {}
        try:
            for modality, name in PICKLES.items():
                if (root / name).is_file():
                    self._files[modality] = file = PickleFile(root / name)
                    if not isinstance(file.value, dict):
                        raise ValueError(f"{file.path}: it holds {type(file.value).__name__}, expected id → features")
                    file.check_named(_all_frames(file.value))
            if len(self._files) < 2:
                raise ValueError(f"{root}: expected {' and '.join(list(PICKLES.values())[1:])}")
            if "text" not in self._files:
                self.note(f"it has sentences, but no features of text; where {PICKLES['text']} has them they are read")
            self._probe(list(self._files))
        except BaseException:
            self.close()
            raise

    def look_up(self, modality: str, key: str) -> np.ndarray | None:
        file = self._files[modality]
        value = file.value.get(key)
        if value is None:
            return None
        frames = [_frame(file.path, key, frame) for frame in value] if isinstance(value, (list, tuple)) else None
        if frames == []:
            return None
        x = _frame(file.path, key, value) if frames is None else _stack(file.path, key, frames)
        # A frame of the published vision features is [1, 256].
        return x.squeeze(1) if x.ndim == 3 and x.shape[1] == 1 else x

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _all_frames(value: dict[Any, Any]) -> Iterable[Any]:
    for frames in value.values():
        yield from frames if isinstance(frames, (list, tuple)) else (frames,)


def _frame(path: Path, key: str, value: Any) -> np.ndarray:
    if not isinstance(value, PickledArray) or value.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {key!r} has {type(value).__name__} for features, expected arrays of numbers")
    return value.load()


def _stack(path: Path, key: str, frames: list[np.ndarray]) -> np.ndarray:
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"{path}: {key!r} has frames of different shapes")
    return np.stack(frames)


def _read_table(path: Path) -> Iterable[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a table: {error}") from None
    header = lines[0].split("\t")
    if [name.strip().lower() for name in header[:5]] != COLUMNS:
        raise ValueError(f"{path}: expected the columns {COLUMNS}, got {header[:5]}")
    for number, line in enumerate(lines[1:], 2):
        try:
            row = next(csv.reader([line], delimiter="\t", strict=True), [])
        except csv.Error:
            # Quotes that are part of the sentence.
            row = line.split("\t")
            if len(row) != len(header) or any('"' in row[column] for column in (0, 1, 2, 4)):
                raise ValueError(f"{path}: line {number} has quotes that do not end with a column") from None
        if len(row) != len(header) or "\0" in line:
            got = "zero bytes" if "\0" in line else f"{len(row)} columns"
            raise ValueError(f"{path}: line {number} has {got}, expected {len(header)} columns of text")
        key = "_".join(row[:3])
        with naming(f"{path}: line {number}"):
            check_texts(1, max(len(key), len(row[4])))
        yield key, row[4]
