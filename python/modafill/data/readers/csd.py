"""A folder of computational sequences (``.csd``), as the CMU-MultimodalSDK writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from modafill.data.hdf5 import HDF5_MAGIC, get_inside, open_hdf5, text_attribute
from modafill.data.readers.keyed import KeyedSource
from modafill.data.texts import check_texts
from modafill.data.writer import FORMAT

MAKERS = {
    "text": ("glove", "bert", "wordvectors", "word_vectors", "embedding", "text"),
    "audio": ("covarep", "opensmile", "os_ai", "acoustic", "audio", "wav2vec"),
    "vision": ("facet", "openface", "opencv", "visual", "vision", "video"),
}
EMOTIONS = ("sentiment", "happy", "sad", "anger", "surprise", "disgust", "fear")
# Shorter segments hold no frame; the SDK drops them too.
SHORTEST_SECONDS = 1e-5


class CsdFolder(KeyedSource):
    """A ``.csd`` file for each modality and one of labels.

    Where every entry is a segment, ``video[k]``, the files are aligned already: a sample is an entry. Otherwise a
    sample is a segment of the labels, and its frames are those of the video whose middle lies in it (the SDK takes each
    frame that overlaps it, so that a frame on a border belongs to two samples).

    Args:
        root: the folder.
        names: modality → file, by default by what the names of the files say.
        label: the file of labels, by default the one whose name or root says so.
    """

    layout = "csd"

    def __init__(self, root: Path, names: Mapping[str, str] | None = None, label: str | None = None) -> None:
        self._files: dict[str, _Sequence] = {}
        self._opened: list[_Sequence] = []
        self._cache: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
        try:
            self._open(root, names, label)
        except BaseException:
            self.close()
            raise

    def _open(self, root: Path, names: Mapping[str, str] | None, label: str | None) -> None:
        paths = sorted(root.glob("*.csd")) if names is None else [root / name for name in names.values()]
        self._opened = [_Sequence(path) for path in paths]
        if label is not None and not any(s.path.name == label for s in self._opened):
            self._opened.append(_Sequence(root / label))
        marked = [s for s in self._opened if (s.path.name == label if label is not None else s.says(("label",)))]
        if len(marked) != 1:
            raise ValueError(
                f"{root}: expected one file of labels, got {[s.path.name for s in marked]} of "
                f"{[s.path.name for s in self._opened]}; name it in a mapping, "
                '{"label": {"name": FILE, "kind": "score"}}'
            )
        labels = marked[0]
        features = [s for s in self._opened if s is not labels]
        if names is not None:
            self._files = {m: next(s for s in features if s.path.name == name) for m, name in names.items()}
        else:
            for modality, makers in MAKERS.items():
                fits = [s for s in features if s.says(makers) and s.is_numbers()]
                if len(fits) > 1:
                    raise ValueError(
                        f"{root}: {[s.path.name for s in fits]} could all be {modality}; name one in a mapping, "
                        f'{{"modalities": {{"{modality}": FILE, …}}}}'
                    )
                if fits:
                    self._files[modality] = fits[0]
        if len(self._files) < 2:
            raise ValueError(
                f"{root}: which of {[s.path.name for s in features]} is what? Name them in a mapping, "
                '{"modalities": {"text": FILE, "audio": FILE, "vision": FILE}}'
            )
        self._segments: dict[str, tuple[str, float, float]] | None = None
        rows: dict[str, np.ndarray] = {}
        short = unlabelled = several = 0
        if all(_split_key(key)[1] is not None for s in (labels, *self._files.values()) for key in s.keys):
            for key in labels.keys:
                values, _ = labels.read(key)
                several += len(values) > 1
                if len(values):
                    rows[key] = values[0]
                else:
                    unlabelled += 1
        else:
            self._segments = {}
            longest = max(map(len, labels.keys))
            for video in labels.keys:
                values, intervals = labels.read(video)
                unlabelled += not len(values)
                check_texts(len(rows) + len(values), longest)
                for k, (value, (start, end)) in enumerate(zip(values, intervals, strict=True)):
                    if end - start >= SHORTEST_SECONDS:
                        self._segments[f"{video}[{k}]"] = (video, float(start), float(end))
                        rows[f"{video}[{k}]"] = value
                    else:
                        short += 1
        if len({value.shape for value in rows.values()}) > 1:
            raise ValueError(f"{labels.path}: entries have different numbers of labels")
        order = sorted(rows, key=_split_key)
        super().__init__(root, order)
        if short:
            self.note(f"{short} segments of the labels end before they begin, or at once; they are left out")
        if several:
            self.note(f"{several} entries of the labels have several rows; the first one is taken")
        if unlabelled:
            self.note(f"{unlabelled} entries of the labels are empty; they are left out")
        table = np.array([rows[key] for key in order], dtype=np.float32)
        columns = labels.dimension_names(table.shape[1])
        self.labels = {name: table[:, i] for i, name in enumerate(columns)}
        specs = {
            name: {"name": name, "kind": "score", **({"sentiment": True} if name == "sentiment" else {})}
            for name in columns
        }
        self.task = {"label": specs[columns[0]], "labels": {n: s for n, s in specs.items() if n != columns[0]}}
        videos, places = zip(*(_split_key(key) for key in order), strict=True)
        self.groups, self.task["group"] = {"video": np.array(videos)}, "video"
        self.order = np.array(places)
        self.unused = [
            {"name": s.path.name, "dtype": "computational sequence", "shape": [len(s.keys)]}
            for s in features
            if s not in self._files.values()
        ]
        self._probe(list(self._files))

    def look_up(self, modality: str, key: str) -> np.ndarray | None:
        sequence = self._files[modality]
        if self._segments is None:
            return sequence.read(key)[0] if key in sequence.keys else None
        video, start, end = self._segments[key]
        if video not in sequence.keys:
            return None
        if self._cache.get(modality, ("",))[0] != video:
            values, intervals = sequence.read(video)
            order = np.argsort(intervals.mean(1), kind="stable")
            self._cache[modality] = (video, values[order], intervals.mean(1)[order])
        _, values, middle = self._cache[modality]
        first, last = np.searchsorted(middle, [start, end])
        return values[first:last]

    def close(self) -> None:
        for sequence in self._opened:
            sequence.close()


class _Sequence:
    """One ``.csd`` file: entries with features and intervals."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_hdf5(path)
        try:
            if text_attribute(self._file, "format") == FORMAT:
                raise ValueError("it is a feature store")
            roots = [name for name in self._file if isinstance(self._inside(name), h5py.Group)]
            if not roots:
                raise ValueError("it is empty")
            self.root = roots[0]
            data = self._inside(f"{self.root}/data")
            # A dict keeps the order and answers at once.
            self.keys = dict.fromkeys(data if isinstance(data, h5py.Group) else ())
            first = next(iter(self.keys), None)
            entry = None if first is None else self._inside(f"{self.root}/data/{first}")
            if not isinstance(entry, h5py.Group) or not {"features", "intervals"} <= set(entry):
                raise ValueError(f"{self.root}/data has no entries with features and intervals")
        except (TypeError, ValueError, KeyError, OSError, RuntimeError) as error:
            self.close()
            raise ValueError(f"{path}: not a computational sequence: {error}") from None

    def _inside(self, name: str) -> Any:
        try:
            return get_inside(self._file, name)
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise ValueError(f"{self.path}: cannot read {name!r}: {error}") from None

    def says(self, words: tuple[str, ...]) -> bool:
        """Whether the name of the file or of its root has one of these words."""
        return any(word in f"{self.path.stem} {self.root}".lower() for word in words)

    def is_numbers(self) -> bool:
        first = next(iter(self.keys), None)
        features = None if first is None else self._inside(f"{self.root}/data/{first}/features")
        return isinstance(features, h5py.Dataset) and features.dtype.kind in "fiu"

    def read(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(features ``[T, D]``, intervals ``[T, 2]`` in seconds) of an entry."""
        features, seconds = (self._inside(f"{self.root}/data/{key}/{name}") for name in ("features", "intervals"))
        if not isinstance(features, h5py.Dataset) or not isinstance(seconds, h5py.Dataset):
            raise ValueError(f"{self.path}: {key!r} has no features or no intervals")
        if not features.size:
            return np.zeros((0, 1), dtype=np.float32), np.zeros((0, 2))
        # Before it is read: entries of varying length may each be as long as the file.
        if features.dtype.kind not in "fiu" or features.ndim < 2:
            raise ValueError(
                f"{self.path}: {key!r} has features {features.dtype} {features.shape}, expected numbers [T, D]"
            )
        if seconds.dtype.kind not in "fiu" or seconds.shape != (len(features), 2):
            raise ValueError(
                f"{self.path}: {key!r} has intervals {seconds.dtype} {seconds.shape}, expected seconds "
                f"({len(features)}, 2)"
            )
        try:
            values, intervals = features[()], seconds[()]
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"{self.path}: cannot read {key!r}: {error}") from None
        if np.isnan(intervals).any():
            raise ValueError(f"{self.path}: {key!r} has NaN among its intervals, expected seconds")
        # Unsigned seconds would wrap around where a segment ends before it begins.
        return values.reshape(len(values), -1), intervals.astype(np.float64)

    def dimension_names(self, count: int) -> list[str]:
        """Names of the columns: the file's, MOSEI's, or numbers."""
        try:
            names = json.loads(self._inside(f"{self.root}/metadata/dimension names").asstr()[0])
        except (ValueError, TypeError, IndexError, AttributeError, OSError, RuntimeError):
            names = None
        if isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names):
            names = [re.sub(r"\W+", "_", name).strip("_") for name in names]
            if all(names) and len(set(names)) == count:
                return names
        return list(EMOTIONS[:count]) if count in (1, len(EMOTIONS)) else [f"label{i}" for i in range(count)]

    def close(self) -> None:
        self._file.close()


def _split_key(key: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.*)\[(\d{1,9})\]", key, re.DOTALL)
    return (key, None) if match is None else (match[1], int(match[2]))


def is_csd(path: Path) -> bool:
    """Whether a file is a computational sequence."""
    with open(path, "rb") as file:
        if file.read(8) != HDF5_MAGIC:
            return False
    try:
        _Sequence(path).close()
    except ValueError:
        return False
    return True
