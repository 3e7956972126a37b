"""GCNet's folder: a vector per utterance in an ``.npy`` file, and a pickle of dialogues with their labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modafill.data.npz import load_npy
from modafill.data.readers.keyed import KeyedSource
from modafill.data.readers.pickles import PickledArray, PickleFile, as_text
from modafill.data.texts import text_column

# File systems hold 255 bytes, of which .npy takes four.
LONGEST_NAME = 251
# What the folders of features that are in use are made by.
EXTRACTORS = {
    "text": ("bert", "roberta", "text"),
    "audio": ("wav2vec", "hubert", "opensmile", "vggish", "panns", "audio"),
    "vision": ("manet", "emonet", "ferplus", "openface", "video", "vision", "visual"),
}


def is_gcnet(value: Any) -> bool:
    """Whether a pickle's content is GCNet's: utterances, labels, speakers, sentences by dialogue, and the parts."""
    return (
        isinstance(value, (tuple, list))
        and len(value) in (6, 7)
        and all(isinstance(part, dict) for part in value[:4])
        and all(isinstance(part, (set, list, tuple)) for part in value[4:])
    )


class GCNetFolder(KeyedSource):
    """``<name>_features_raw_<n>way.pkl`` and beside it ``features/<extractor>/<utterance>.npy``, or a folder of them.

    A file ``[T, D]`` and a folder of frames become their mean, as in GCNet's own loader; one without frames means that
    the utterance lacks the modality (there: zeros). Dialogues are the groups, their turns the order. IEMOCAP's five
    sessions become split columns too.

    Args:
        file: the pickle, which this source closes.
        names: modality → folder in ``features``; by default the one whose name says what it was made by.
    """

    layout = "gcnet"

    def __init__(self, file: PickleFile, names: Mapping[str, str] | None = None) -> None:
        utterances, labels, *_ = file.value
        splits = dict(zip(("train", "valid", "test")[:: 1 if len(file.value) == 7 else 2], file.value[4:], strict=True))
        part_of: dict[str, str] = {}
        for split, parted in splits.items():
            for video in map(as_text, parted):
                if part_of.setdefault(video, split) != split:
                    both = f"{part_of[video]} and {split}"
                    raise ValueError(f"{file.path}: the dialogue {video!r} is in the parts {both}, expected one")
        keys: list[str] = []
        videos: list[str] = []
        values: list[Any] = []
        order: list[int] = []
        listed: dict[int, Any] = {}
        for video, names_of_turns in utterances.items():
            given = labels.get(video)
            flat = isinstance(given, PickledArray) and len(given.shape) == 1
            if not isinstance(names_of_turns, (list, tuple)) or not (flat or isinstance(given, (list, tuple))):
                raise ValueError(f"{file.path}: {video!r} has no list of utterances, or none of labels")
            if len(names_of_turns) != len(given):
                raise ValueError(f"{file.path}: {video!r} has {len(names_of_turns)} utterances and {len(given)} labels")
            if names_of_turns and listed.setdefault(id(names_of_turns), video) is not video:
                both = f"{listed[id(names_of_turns)]!r} and {video!r}"
                raise ValueError(f"{file.path}: {both} share one list of utterances, expected one for each")
            given = given.load().tolist() if isinstance(given, PickledArray) else given
            if as_text(video) in part_of:
                keys += [as_text(name) for name in names_of_turns]
                values += given
                videos += [as_text(video)] * len(given)
                order += range(len(given))
        file.close()
        for key, value in zip(keys, values, strict=True):
            if not isinstance(value, (int, float)) or (isinstance(value, int) and not -(1 << 63) <= value < 1 << 63):
                raise ValueError(f"{file.path}: {key!r} has the label {str(value)[:40]}, expected a number of 64 bits")
        super().__init__(file.path.parent, keys)
        known = set(map(as_text, utterances))
        for what, n in (
            ("dialogues are in no part and were left out", len(known - set(part_of))),
            ("dialogues of the parts have no utterances", len(set(part_of) - known)),
        ):
            if n:
                self.note(f"{n} {what}")
        self._folders = _find_folders(file.path.parent / "features", names)
        self.groups = {"dialogue": np.array(text_column(videos))}
        self.order = np.array(order)
        self.splits = {"split": np.array([part_of[video] for video in videos])}
        self.task = {"group": "dialogue"}
        whole = all(float(value).is_integer() and 0 <= value < 1 << 53 for value in values)
        if whole:
            self.labels = {"emotion": np.array(values, dtype=np.int64)}
            self.task["label"] = {"name": "emotion", "kind": "class"}
        else:
            scores = np.array(values, dtype=np.float32)
            self.labels = {"score": scores, "positive": np.where(np.isnan(scores), np.nan, scores > 0)}
            self.task["label"] = {"name": "score", "kind": "score", "sentiment": True}
            self.task["labels"] = {"positive": {"name": "positive", "kind": "class"}}
        sessions = sorted({video[:5] for video in videos if video.startswith("Ses") and video[3:5].isdigit()})
        if len(sessions) > 1 and all(video[:5] in sessions for video in videos):
            for session in sessions:
                self.splits[session] = np.where([video[:5] == session for video in videos], "test", "train")
            self.task["folds"] = sessions
        self._probe(list(self._folders))

    def close(self) -> None:
        """Its files are open while they are read only."""

    def look_up(self, modality: str, key: str) -> np.ndarray | None:
        if set(key) & {"/", "\0"} or key in ("", ".", "..") or len(os.fsencode(key)) > LONGEST_NAME:
            raise ValueError(f"{self.path}: the utterance {key!r} is not the name of a file")
        at = self._folders[modality] / f"{key}.npy"
        if at.is_file():
            x = load_npy(at)
        else:
            frames = [load_npy(path) for path in sorted((self._folders[modality] / key).glob("*.npy"))]
            if not frames:
                return None
            if len({frame.shape for frame in frames}) != 1:
                raise ValueError(f"{self._folders[modality] / key}: frames of different shapes")
            x = np.stack(frames)
        if x.dtype.kind not in "fiu":
            raise ValueError(f"{at}: {x.dtype}, expected numbers")
        if not x.size:
            return None
        return x.reshape(-1, x.shape[-1]).mean(0) if x.ndim > 1 else x


def _find_folders(features: Path, names: Mapping[str, str] | None) -> dict[str, Path]:
    if not features.is_dir():
        raise ValueError(f"{features}: no such folder, expected one with a folder of .npy files for each modality")
    if names:
        found = {modality: features / name for modality, name in names.items()}
        absent = [str(path) for path in found.values() if not path.is_dir()]
        if absent:
            raise ValueError(f"modalities: {', '.join(absent)}: no such folder")
        return found
    there = sorted(path for path in features.iterdir() if path.is_dir())
    found = {}
    for modality, extractors in EXTRACTORS.items():
        fits = [path for path in there if any(name in path.name.lower() for name in extractors)]
        if len(fits) > 1:
            found = {}
            break
        if fits:
            found[modality] = fits[0]
    if len(found) < 2:
        raise ValueError(
            f"{features}: which of {[path.name for path in there]} is what? Name them in a mapping, "
            '{"modalities": {"text": FOLDER, "audio": FOLDER, "vision": FOLDER}}'
        )
    return found
