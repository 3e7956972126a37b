"""Pickles of padded arrays by split: MMSA's (MOSI, MOSEI, SIMS) and MulT's (MOSI, MOSEI, IEMOCAP)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modafill.data.readers.keyed import number_repeats, whole_groups
from modafill.data.readers.pickles import LONGEST_KEY, PickledArray, PickleFile, as_text
from modafill.data.source import BLOCK_ROWS, Block, Source, check_lengths, common_dtype, naming
from modafill.data.texts import check_texts, text_column

MODALITIES = ("text", "audio", "vision")
SPLITS = ("train", "valid", "test")
EMOTIONS = ("neutral", "happy", "sad", "angry")
MAX_LABEL_BYTES = 1 << 30
# What the authors of MMSA published: samples of the three parts, whether aligned, and the SHA-256 of the file.
PUBLISHED = {
    "MOSI aligned_50": ((1284, 229, 686), True, "d3994fd25681f9c7ad6e9c6596a6fe9b4beb85ff7d478ba978b124139002e5f9"),
    "MOSI unaligned_50": ((1284, 229, 686), False, "78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524"),
    "MOSEI aligned_50": ((16326, 1871, 4659), True, "45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791"),
    "MOSEI unaligned_50": (
        (16326, 1871, 4659), False, "ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f",
    ),
    "SIMS unaligned_39": ((1368, 456, 457), False, "c9e20c13ec0454d98bb9c1e520e490c75146bfa2dfeeea78d84de047dbdd442f"),
}  # fmt: skip


def split_pickle_layout(value: Any) -> str | None:
    """``"mmsa"`` or ``"mult"`` by what a pickle holds, or None."""
    if not isinstance(value, dict) or not value or not set(value) <= {*SPLITS, "dev", "val"}:
        return None
    parts = list(value.values())
    if not all(isinstance(part, dict) and set(MODALITIES) <= set(part) for part in parts):
        return None
    if all("regression_labels" in part or "classification_labels" in part for part in parts):
        return "mmsa"
    return "mult" if all("labels" in part for part in parts) else None


def missing_keys(value: Any) -> str:
    """What the parts of a pickle lack to be MMSA's or MulT's, in words; "" where it has no such parts."""
    if not isinstance(value, dict) or not value or not set(value) <= {*SPLITS, "dev", "val"}:
        return ""
    lacking = []
    for split, part in value.items():
        absent = [name for name in MODALITIES if isinstance(part, dict) and name not in part]
        if isinstance(part, dict) and not any(name == "labels" or name.endswith("_labels") for name in part):
            absent.append("labels")
        if absent:
            lacking.append(f"{split} has no {', '.join(absent)}")
    return "; ".join(lacking)


class SplitPickle(Source):
    """MMSA's or MulT's pickle: split → text, audio and vision ``[N, T, D]``, labels and ids.

    True lengths are ``audio_lengths`` and ``vision_lengths`` where the file has them, and the attention mask of
    ``text_bert`` for text (and for all three where the file is aligned word by word). MMSA took for a length where the
    first frame is whose sum is 0: where frames follow such a one, the sequence is as long as they are, or, if they fit
    into the length, was padded in front and is moved. Where the file declares nothing, frames of zeros before and after
    a sequence are padding: MulT's files pad in front.

    Args:
        file: the pickle, which this source closes.
        layout: ``"mmsa"`` or ``"mult"``.

    Raises:
        ValueError: arrays that are absent, of other shapes than these, or that disagree in samples.
    """

    def __init__(self, file: PickleFile, layout: str) -> None:
        super().__init__(file.path)
        self.file, self.layout = file, layout
        named: dict[str, dict[str, Any]] = {}
        for name, part in file.value.items():
            if named.setdefault({"dev": "valid", "val": "valid"}.get(name, name), part) is not part:
                raise ValueError(f"{self.path}: got the parts {list(file.value)}, expected one for validation")
        self.parts = {name: named[name] for name in SPLITS if name in named}
        self._sizes = {name: self._check_part(name, part) for name, part in self.parts.items()}
        if not sum(self._sizes.values()):
            raise ValueError(f"{self.path}: it has no samples")
        lengths = {x.shape[1] for part in self.parts.values() for x in self._features(part).values()}
        self.aligned = len(lengths) == 1 and not any("audio_lengths" in part for part in self.parts.values())
        self._ids = {name: self._read_ids(name, part) for name, part in self.parts.items()}
        self._labels = self._read_labels()
        self._choose_group()
        used = {*MODALITIES, "id", "text_bert", "audio_lengths", "vision_lengths", "labels", *self._labels}
        self.unused = [
            {"name": f"{split}/{name}", "dtype": str(x.dtype), "shape": list(x.shape)}
            for split, part in self.parts.items()
            for name, x in part.items()
            if isinstance(x, PickledArray) and name not in used
        ]
        self._check_published()

    def __len__(self) -> int:
        return sum(self._sizes.values())

    def close(self) -> None:
        self.file.close()

    @staticmethod
    def _features(part: Mapping[str, Any]) -> dict[str, PickledArray]:
        return {name: part[name] for name in MODALITIES}

    def _check_part(self, split: str, part: Mapping[str, Any]) -> int:
        counts = {}
        for name in MODALITIES:
            x = part[name]
            if not isinstance(x, PickledArray) or x.dtype.kind not in "fiu" or len(x.shape) != 3 or 0 in x.shape[1:]:
                what = f"{x.dtype} {x.shape}" if isinstance(x, PickledArray) else type(x).__name__
                raise ValueError(f"{self.path}: {split}/{name} is {what}, expected numbers [N, T, D]")
            if self.widths.setdefault(name, x.shape[2]) != x.shape[2]:
                raise ValueError(
                    f"{self.path}: {split}/{name} is {x.shape[2]} wide, that of another part {self.widths[name]}"
                )
            self.kinds[name], self.dtypes[name] = "sequence", str(x.dtype)
            counts[name] = x.shape[0]
        for name in ("id", "labels", "regression_labels", "classification_labels", "audio_lengths", "vision_lengths"):
            if part.get(name) is not None:
                if not isinstance(part[name], (PickledArray, list, tuple)):
                    raise ValueError(f"{split}/{name} is {type(part[name]).__name__}, expected an array or a list")
                counts[name] = len(part[name])
        if len(set(counts.values())) > 1:
            raise ValueError(f"{self.path}: arrays of {split} disagree in the number of samples: {counts}")
        return counts["text"]

    def _read_ids(self, split: str, part: Mapping[str, Any]) -> list[str]:
        ids = part.get("id")
        if ids is None:
            return [f"{split}_{i}" for i in range(self._sizes[split])]
        rows = ids.load().tolist() if isinstance(ids, PickledArray) else ids
        with naming(f"{self.path}: {split}/id"):
            return text_column(map(_id, rows))

    def _choose_group(self) -> None:
        """The video, where ids name it and the file's own parts keep videos together."""
        self._groups: dict[str, np.ndarray] = {}
        marker = "$_$" if self.layout == "mmsa" else None
        ids = text_column(i for part in self._ids.values() for i in part)
        if marker is None or not all(marker in i for i in ids):
            return
        groups = {name: np.array([i.split(marker)[0] for i in part]) for name, part in self._ids.items()}
        splits = np.concatenate([np.full(len(part), name) for name, part in self._ids.items()])
        if whole_groups(np.concatenate(list(groups.values())), splits):
            self._groups = groups
            self.task["group"] = "video"
        else:
            self.note(
                "its own parts divide videos: samples of one video are trained on and tested on, as is usual here"
            )

    def _read_labels(self) -> dict[str, dict[str, np.ndarray]]:
        """Label column → split → values; sets the task's label."""
        if self.layout == "mult":
            return self._read_mult_labels()
        out: dict[str, dict[str, np.ndarray]] = {}
        held = 0
        names = dict.fromkeys(name for part in self.parts.values() for name in part)
        for name in names:
            if isinstance(name, str) and "_labels" in name and "/" not in name:
                absent = [split for split, part in self.parts.items() if name not in part]
                if absent:
                    raise ValueError(f"{self.path}: {', '.join(absent)} has no {name}, which other parts have")
                out[name] = self._column(name)
                held += sum(x.nbytes for x in out[name].values())
                if held > MAX_LABEL_BYTES:
                    raise ValueError(f"{self.path}: its labels come to more than {MAX_LABEL_BYTES} bytes")
        further: dict[str, dict[str, Any]] = {}
        if "classification_labels" in out:
            further["class"] = {"name": "classification_labels", "kind": "class"}
        if "regression_labels" in out:
            self.task["label"] = _score("regression_labels", out["regression_labels"])
        elif further:
            self.task["label"] = further["class"]
        for name, x in out.items():
            if name not in ("classification_labels", "regression_labels"):
                texts = any(part.dtype.kind == "U" for part in x.values())
                further[name] = {"name": name, "kind": "class"} if texts else _score(name, x)
        if further:
            self.task["labels"] = further
        return out

    def _column(self, name: str) -> dict[str, np.ndarray]:
        """Split → one number or text per sample."""
        found = {split: _array(self.path, f"{split}/{name}", part[name]) for split, part in self.parts.items()}
        for split, x in found.items():
            if x.size != len(x):
                raise ValueError(f"{self.path}: {split}/{name} has the shape {x.shape}, expected one value per sample")
        dtype = common_dtype(name, [x.dtype for x in found.values()], sum(map(len, found.values())))
        return {split: x.reshape(-1).astype(dtype) for split, x in found.items()}

    def _read_mult_labels(self) -> dict[str, dict[str, np.ndarray]]:
        raw = {split: _array(self.path, f"{split}/labels", part["labels"]) for split, part in self.parts.items()}
        if all(x.ndim == 3 and x.shape[2] == 2 for x in raw.values()):
            if len({x.shape[1] for x in raw.values()}) != 1:
                raise ValueError(
                    f"labels are {[x.shape for x in raw.values()]}, expected as many emotions in each part"
                )
            for split, x in raw.items():
                if x.dtype.kind not in "biuf" or not (np.sort(x, 2) == [0, 1]).all():
                    raise ValueError(f"{split}/labels has pairs that are not (0, 1) or (1, 0)")
            # Pairs (not, is) for each emotion: MulT trains one classifier for each.
            marked = {split: x.argmax(2) for split, x in raw.items()}
            names = [
                EMOTIONS[i] if i < len(EMOTIONS) else f"emotion{i}" for i in range(next(iter(raw.values())).shape[1])
            ]
            out = {name: {split: x[:, i] for split, x in marked.items()} for i, name in enumerate(names)}
            self.task["labels"] = {name: {"name": name, "kind": "class"} for name in names}
            if all((x.sum(1) == 1).all() for x in marked.values()):
                out["emotion"] = {split: np.array(names)[x.argmax(1)] for split, x in marked.items()}
                self.task["label"] = {"name": "emotion", "kind": "class"}
            else:
                self.note("some samples have no emotion or several: choose one of the labels " + ", ".join(names))
            return out
        out = {"score": self._column("labels")}
        self.task["label"] = _score("score", out["score"])
        return out

    def _check_published(self) -> None:
        sizes = tuple(self._sizes.get(split, 0) for split in SPLITS)
        for name, (published, aligned, digest) in PUBLISHED.items():
            if self.layout == "mmsa" and sizes == published and self.aligned == aligned:
                found = hashlib.sha256()
                with open(self.path, "rb") as file:
                    while piece := file.read(1 << 20):
                        found.update(piece)
                if found.hexdigest() == digest:
                    self.note(f"it is the file published as {name}")
                else:
                    self.note(
                        f"it has the sizes of {name}, but not the published file's checksum: made anew, or damaged"
                    )

    def _blocks(self, rows: int) -> Iterator[Block]:
        ids = number_repeats(self, [i for part in self._ids.values() for i in part])
        found: Counter[str] = Counter()
        done = 0
        for split, part in self.parts.items():
            streams = {name: x.blocks(rows) for name, x in self._features(part).items()}
            declared = self._declared_lengths(split, part)
            for start in range(0, self._sizes[split], rows):
                piece = slice(start, start + rows)
                with np.errstate(over="ignore"):
                    features = {name: next(stream).astype(np.float32) for name, stream in streams.items()}
                lengths = {name: values[piece] for name, values in declared.items()}
                self._check_declared({name: features[name] for name in lengths}, lengths, found)
                self._strip_padding({name: x for name, x in features.items() if name not in lengths}, lengths, found)
                n = len(features["text"])
                available = np.stack([lengths[name] > 0 for name in MODALITIES], axis=1)
                for name, values in lengths.items():
                    found[f"{name}: # samples without it"] += int((values == 0).sum())
                yield Block(
                    features,
                    available,
                    {name: lengths[name] for name in MODALITIES},
                    np.array(ids[done : done + n]),
                    labels={name: values[split][piece] for name, values in self._labels.items()},
                    groups={"video": self._groups[split][piece]} if self._groups else {},
                    splits={"split": np.full(n, split)},
                    order=None,
                )
                done += n
        for text, n in found.items():
            if n:
                self.note(text.replace("#", str(n)))

    def _declared_lengths(self, split: str, part: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Modality → lengths ``[N]`` that the file declares, made to fit."""
        declared = {}
        for name in ("audio", "vision"):
            if part.get(f"{name}_lengths") is not None:
                where, longest = f"{split}/{name}_lengths", part[name].shape[1]
                values = _array(self.path, where, part[f"{name}_lengths"])
                values = values.reshape(-1) if values.size == len(values) else values
                check_lengths(where, values, self._sizes[split])
                wrong = int((values > longest).sum())
                if wrong:
                    self.note(
                        f"{name}: {wrong} lengths in {split} are not in 0…{longest}, the array's, and were cut to it"
                    )
                declared[name] = np.minimum(values, longest).astype(np.int64)
        bert, samples, steps = part.get("text_bert"), self._sizes[split], part["text"].shape[1]
        if bert is None:
            return declared
        if not isinstance(bert, PickledArray) or bert.dtype.kind not in "fiub" or bert.shape[:2] != (samples, 3):
            got = f"{bert.dtype} {bert.shape}" if isinstance(bert, PickledArray) else type(bert).__name__
            raise ValueError(f"{split}/text_bert is {got}, expected numbers [{samples}, 3, T]")
        if bert.shape[2:] != (steps,):
            self.note(f"text_bert is {bert.shape[2:]} long, text {steps}: its mask is not that of text")
            return declared
        mask = np.concatenate([np.asarray(block[:, 1]) for block in bert.blocks(BLOCK_ROWS)] or [np.empty((0, steps))])
        words = (mask == 1).sum(1)
        wrong = (mask != (np.arange(steps) < words[:, None])).any(1)
        if wrong.any():
            raise ValueError(f"{split}/text_bert has a mask that is not ones and then zeros in row {wrong.argmax()}")
        declared.update(dict.fromkeys(MODALITIES if self.aligned else ("text",), words))
        return declared

    def _check_declared(
        self, features: dict[str, np.ndarray], lengths: dict[str, np.ndarray], found: Counter[str]
    ) -> None:
        """Correct declared lengths in place by the frames that are not zeros, and move what was padded in front."""
        filled = {name: (x != 0).any(2) for name, x in features.items()}
        for name, mask in filled.items():
            declared, steps = lengths[name], mask.shape[1]
            extent = np.where(mask.any(1), steps - mask[:, ::-1].argmax(1), 0)
            # Where words are aligned all modalities are moved by as much.
            first = (np.logical_or.reduce(list(filled.values())) if self.aligned else mask).argmax(1)
            beyond = (declared > 0) & (extent > declared)
            moved = beyond & (first > 0) & (extent - first <= declared)
            for row in np.flatnonzero(moved):
                features[name][row] = np.roll(features[name][row], -first[row], axis=0)
            # What follows the words of a text may be an encoder's answer to padding.
            beyond &= ~moved & (name != "text")
            # MMSA's shortest length is 1, also of a sequence that begins with zeros.
            with np.errstate(invalid="ignore"):
                begins, ends = (
                    features[name][np.arange(len(declared)), place].sum(1) == 0
                    for place in (0, np.minimum(declared, steps - 1))
                )
            longer = beyond & (ends | (declared == 1) & begins)
            length = np.where(longer, extent, declared)
            within = np.arange(steps) < length[:, None]
            lacking = (declared > 0) & ~(within & (features[name] != 0).any(2)).any(1)
            lengths[name] = np.where(lacking, 0, length)
            for rows, said in (
                (moved, "are padded in front; they were moved"),
                (longer, "go on behind the frame of zeros that their length ends at; they are as long as their frames"),
                (beyond & ~longer, "have frames behind their declared length, which are left out"),
                (lacking, "have a length, but frames of zeros alone; they lack it"),
            ):
                found[f"{name}: # samples {said}"] += int(rows.sum())

    def _strip_padding(
        self, features: dict[str, np.ndarray], lengths: dict[str, np.ndarray], found: Counter[str]
    ) -> None:
        """Find the frames that are not padding, move them to the front in place and fill ``lengths``."""
        if not features:
            return
        filled = {name: (x != 0).any(2) for name, x in features.items()}
        if self.aligned:
            together = np.logical_or.reduce(list(filled.values()))
            seen = {name: mask.any(1) for name, mask in filled.items()}
            filled = dict.fromkeys(filled, together)
        for name, mask in filled.items():
            some = mask.any(1)
            first = np.where(some, mask.argmax(1), 0)
            length = np.where(some, mask.shape[1] - mask[:, ::-1].argmax(1) - first, 0)
            for row in np.flatnonzero(first):
                features[name][row] = np.roll(features[name][row], -first[row], axis=0)
            found[f"{name}: # samples are padded in front; they were moved"] += int((first > 0).sum())
            lengths[name] = np.where(seen[name], length, 0) if self.aligned else length


def _id(value: Any) -> str:
    """MulT keeps (video, start, end) for each sample."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        return as_text(value)
    if len(value) > LONGEST_KEY:
        raise ValueError(f"expected up to {LONGEST_KEY} texts for an id, got {len(value)}")
    return as_text("_".join(map(as_text, value)))


def _array(path: Path, name: str, values: Any) -> np.ndarray:
    if isinstance(values, PickledArray):
        array = values.load()
        if array.dtype.kind not in "OS":
            return array
        values = array.tolist()
    if isinstance(values, (list, tuple)) and all(isinstance(v, (int, float, str, bytes)) for v in values):
        with naming(f"{path}: {name}"):
            values = [as_text(v) if isinstance(v, (str, bytes)) else v for v in values]
            check_texts(len(values), max((len(v) for v in values if isinstance(v, str)), default=0))
        array = np.array(values)
        if array.dtype.kind in "biufU":
            return array
    raise ValueError(f"{path}: {name} is {type(values).__name__}, expected an array or a list of numbers of 64 bits")


def _score(name: str, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Intensities beyond ±1 are CMU's −3…3; SIMS has −1…1."""
    known = [x[np.isfinite(x)] for x in values.values() if x.dtype.kind in "fiu"]
    largest = max((np.abs(x).max(initial=0) for x in known), default=0)
    return {"name": name, "kind": "score", **({"sentiment": True} if 1 < largest <= 3 else {})}
