"""What a file or folder of a layout holds, read by numpy, h5py and Python's own pickle alone."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

MODALITIES = ("text", "audio", "vision")
NPZ_SPLITS = ("train", "test")


@dataclass
class Sample:
    """``frames``: modality → ``[T, D]``, ``[D]`` or None where it is missing; ``columns``: such as ``labels/score``."""

    id: str
    frames: dict[str, np.ndarray | None]
    columns: dict[str, Any] = field(default_factory=dict)


class PlainUnpickler(pickle.Unpickler):
    """Python's own, for arrays and containers alone."""

    def find_class(self, module: str, name: str) -> Any:
        assert module.split(".")[0] in ("numpy", "_codecs", "collections", "builtins", "__builtin__"), module
        return super().find_class(module, name)


def unpickle(path: Path) -> Any:
    """The value, what Python 2 wrote as bytes."""
    with open(path, "rb") as file:
        return PlainUnpickler(file, encoding="bytes").load()


def as_text(value: Any) -> str:
    """UTF-8, or else Latin-1."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _texts(value: dict[Any, Any]) -> dict[str, Any]:
    return {as_text(key): item for key, item in value.items()}


def _npz(at: Path) -> Iterator[Sample]:
    with np.load(at) as arrays:
        for split in NPZ_SPLITS:
            for row in range(len(arrays[f"id_{split}"])):
                here = {name: arrays[f"{name}_{split}"][row] for name in ("id", "mood", "y", "clip", "turn", "steps")}
                frames = {name: arrays[f"{name}_{split}"][row] for name in MODALITIES}
                frames["audio"] = frames["audio"][: here["steps"]]
                columns = {"labels/mood": here["mood"], "labels/y": here["y"], "groups/clip": here["clip"]}
                yield Sample(str(here["id"]), frames, {**columns, "order": here["turn"], "splits/split": split})


def _split_pickle(at: Path) -> Iterator[Sample]:
    for name, part in _texts(unpickle(at)).items():
        part, split = _texts(part), {"dev": "valid", "val": "valid"}.get(name, name)
        for row in range(len(part["text"])):
            frames: dict[str, np.ndarray | None] = {}
            for modality in MODALITIES:
                x = part[modality][row]
                if part.get(f"{modality}_lengths") is not None:
                    frames[modality] = _declared(x, int(np.clip(part[f"{modality}_lengths"][row], 0, len(x))))
                elif modality == "text" and "text_bert" in part:
                    frames[modality] = x[: int(part["text_bert"][row, 1].astype(bool).sum())]
                else:
                    with np.errstate(over="ignore"):
                        filled = np.flatnonzero((x.astype(np.float32) != 0).any(1))
                    frames[modality] = x[filled[0] : filled[-1] + 1] if len(filled) else None
            columns: dict[str, Any] = {"splits/split": split}
            if "regression_labels" in part:
                columns["labels/regression_labels"] = part["regression_labels"][row]
            if "labels" in part:
                columns["labels/score"] = part["labels"][row].reshape(())
            given = part["id"][row] if "id" in part else f"{split}_{row}"
            several = isinstance(given, (list, tuple, np.ndarray))
            yield Sample("_".join(map(as_text, given)) if several else as_text(given), frames, columns)


def _declared(x: np.ndarray, length: int) -> np.ndarray:
    """A padded sequence, where a length may be where MMSA's own code takes it to end: at the first frame of sum 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        filled, sums = np.flatnonzero(np.any(x.astype(np.float32), axis=1)), x.astype(np.float32).sum(1)
    if 0 < length < len(x) and len(filled) and filled[-1] >= length:
        if filled[0] > 0 and len(range(filled[0], filled[-1] + 1)) <= length:
            return x[filled[0] :]
        if sums[length] == 0 or (length == 1 and sums[0] == 0):
            return x[: filled[-1] + 1]
    return x[:length]


def _mmin(at: Path) -> Iterator[Sample]:
    names = {"text": "L/bert_large.h5", "audio": "A/comparE.h5", "vision": "V/denseface.h5"}
    files = {modality: h5py.File(at / "features" / name) for modality, name in names.items()}
    for part, split in (("trn", "train"), ("val", "valid"), ("tst", "test")):
        keys = np.load(at / "target" / "1" / f"{part}_int2name.npy")
        labels = np.load(at / "target" / "1" / f"{part}_label.npy")
        for key, label in zip(keys[:, 0], labels.argmax(1), strict=True):
            frames = {modality: file[key][()] if key in file else None for modality, file in files.items()}
            yield Sample(as_text(key), frames, {"labels/emotion": label, "splits/cv1": split})
    for file in files.values():
        file.close()


def _mintrec(at: Path) -> Iterator[Sample]:
    names = {"audio": "audio_data/audio_feats.pkl", "vision": "video_data/video_feats.pkl"}
    values = {modality: _texts(unpickle(at / name)) for modality, name in names.items()}
    for split, name in (("train", "train"), ("valid", "dev"), ("test", "test")):
        with open(at / f"{name}.tsv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                key = "_".join((row["season"], row["episode"], row["clip"]))
                found = {modality: value.get(key) for modality, value in values.items()}
                frames = {m: np.concatenate(x) if isinstance(x, (list, tuple)) and x else x for m, x in found.items()}
                yield Sample(key, frames, {"labels/intent": row["label"], "splits/split": split})


def _gcnet(at: Path) -> Iterator[Sample]:
    ids, labels, _, _, *parts = unpickle(next(at.glob("*.pkl")))
    split_of = {
        video: split for split, videos in zip(("train", "valid", "test"), parts, strict=True) for video in videos
    }
    for video, names in ids.items():
        for turn, (name, label) in enumerate(zip(names, labels[video], strict=True)):
            frames: dict[str, np.ndarray | None] = {}
            for modality, folder in (
                ("text", "deberta-large-4-UTT"),
                ("audio", "wav2vec-large-c-UTT"),
                ("vision", "manet_UTT"),
            ):
                path = at / "features" / folder / f"{as_text(name)}.npy"
                several = sorted((at / "features" / folder / as_text(name)).glob("*.npy"))
                x = (
                    np.load(path)
                    if path.is_file()
                    else np.stack([np.load(one) for one in several])
                    if several
                    else None
                )
                frames[modality] = x if x is None or x.ndim == 1 else x.reshape(-1, x.shape[-1]).mean(0)
            columns = {"groups/dialogue": as_text(video), "order": turn, "splits/split": split_of.get(video)}
            if split_of.get(video) is not None:
                yield Sample(as_text(name), frames, {**columns, "labels/score": label})


def _csd(at: Path) -> Iterator[Sample]:
    files = {
        "text": ("glove_vectors", "CMU_MOSI_TimestampedWordVectors.csd"),
        "audio": ("COVAREP", "CMU_MOSI_COVAREP.csd"),
        "vision": ("FACET_4.2", "CMU_MOSI_Visual_Facet_42.csd"),
    }
    with h5py.File(at / "CMU_MOSI_Opinion_Labels.csd") as labels:
        for video, entry in labels["Opinion Segment Labels/data"].items():
            scores, segments = entry["features"][()], entry["intervals"][()]
            for k, (start, end) in enumerate(segments):
                frames: dict[str, np.ndarray | None] = {}
                for modality, (root, name) in files.items():
                    with h5py.File(at / name) as file:
                        x, middle = (
                            file[f"{root}/data/{video}/features"][()],
                            file[f"{root}/data/{video}/intervals"][()].mean(1),
                        )
                    frames[modality] = x[(middle >= start) & (middle < end)]
                yield Sample(f"{video}[{k}]", frames, {"labels/sentiment": scores[k, 0], "groups/video": video})


ORACLES: dict[str, Callable[[Path], Iterator[Sample]]] = {
    "npz": _npz,
    "mmsa": _split_pickle,
    "mult": _split_pickle,
    "mmin": _mmin,
    "mintrec": _mintrec,
    "csd": _csd,
    "gcnet": _gcnet,
}
