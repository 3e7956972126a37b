"""The community's layouts: written as they are published, recognised, and every value found again."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support import foreign

from modafill.data import FeatureStore, Labels, StoreWriter, convert, inspect_path, make_splits, open_data
from modafill.data.readers import keyed, open_source, split_pickle


def dump(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def values(store: FeatureStore, row: int) -> dict[str, np.ndarray]:
    """Modality → valid steps of a sample; absent ones are left out."""
    batch = store.read(np.array([row]))
    return {
        name: x[0].numpy() if x.ndim == 2 else x[0, : batch.lengths[name][0]].numpy()
        for m, (name, x) in enumerate(batch.features.items())
        if batch.available[0, m]
    }


def assert_samples(store: FeatureStore, truth: dict[str, dict[str, Any]]) -> None:
    assert sorted(store.ids()) == sorted(truth)
    for row, key in enumerate(store.ids()):
        got = values(store, row)
        expected = {name: x for name, x in truth[key].items() if name in store.modalities}
        assert got.keys() == expected.keys()
        for name in got:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-6, atol=1e-6)


def by_split(store: FeatureStore) -> dict[str, int]:
    names, counts = np.unique(store.split("split"), return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_mmsa(tmp_path: Path, aligned: bool, protocol: int) -> None:
    value = foreign.mmsa(aligned=aligned)
    path = dump(tmp_path / "unaligned_50.pkl", value, protocol)
    notes = convert(path, tmp_path / "x.h5")
    assert notes == []
    store = FeatureStore(tmp_path / "x.h5")
    assert store.widths == foreign.WIDTHS
    assert by_split(store) == foreign.SIZES
    assert store.task["label"] == {"name": "regression_labels", "kind": "score", "sentiment": True}
    truth = {}
    for part in value.values():
        for i, key in enumerate(part["id"]):
            n = int(part["text_bert"][i, 1].sum())
            steps = (
                {"text": n, "audio": n, "vision": n}
                if aligned
                else {"text": n, "audio": part["audio_lengths"][i], "vision": part["vision_lengths"][i]}
            )
            truth[key] = {name: part[name][i, :length] for name, length in steps.items()}
    assert_samples(store, truth)
    scores = np.concatenate([part["regression_labels"] for part in value.values()])
    np.testing.assert_array_equal(store.labels("regression_labels"), scores)
    classes = Labels.fit(store.task["labels"]["class"], store.labels("classification_labels"), np.arange(20))
    assert classes.class_names == ("0", "2")
    assert len(np.unique(store.groups("video"))) == sum(-(-n // 3) for n in foreign.SIZES.values())
    (split,) = make_splits(store, folds=1, seed=0)
    assert [len(part) for part in split] == list(foreign.SIZES.values())
    report = inspect_path(path)
    assert (report["format"], report["samples"], report["splits"]["split"]) == ("mmsa", 42, foreign.SIZES)
    assert report["unmapped"] == [
        {"name": f"{split}/raw_text", "dtype": "object", "shape": [n]} for split, n in foreign.SIZES.items()
    ]


def test_mmsa_with_its_flaws(tmp_path: Path) -> None:
    value = foreign.mmsa()
    train, valid = value["train"], value["valid"]
    train["audio"][3, 0, 2] = -np.inf
    train["vision"][4, 0, 1] = np.nan
    train["vision"][:, :, 3] = valid["vision"][:, :, 3] = value["test"]["vision"][:, :, 3] = 7
    train["audio_lengths"][5] = 99
    train["vision_lengths"][6] = 0
    train["id"][8] = train["id"][7]
    valid["id"][0] = train["id"][0]
    train["audio"] = train["audio"].astype(np.float64)
    train["audio"][9, 0, 0] = 1e300
    path = dump(tmp_path / "x.pkl", value)
    notes = convert(path, tmp_path / "x.h5")
    assert notes == [
        "its own parts divide videos: samples of one video are trained on and tested on, as is usual here",
        "2 ids stand for more than one sample, such as 'train0$_$0'; they are numbered",
        "audio: 1 lengths in train are not in 0…12, the array's, and were cut to it",
        "vision: 39 samples have frames behind their declared length, which are left out",
        "vision: 1 samples without it",
        "vision: 1 of 6 columns have the same value throughout",
        "audio: 2 values that are NaN or infinite are taken for 0",
        "vision: 1 values that are NaN or infinite are taken for 0",
    ]
    store = FeatureStore(tmp_path / "x.h5")
    assert store.group_names == ()
    assert values(store, 3)["audio"][0, 2] == 0
    assert len(values(store, 5)["audio"]) == 12
    assert values(store, 6).keys() == {"text", "audio"}
    assert store.ids()[8] == f"{train['id'][7]}#2"
    report = inspect_path(path)
    vision = report["modalities"][2]
    assert (vision["constant"], vision["nan"], vision["missing"]) == ({"count": 1, "first": [3]}, 1, 1)
    assert set(report["notes"]) == set(notes[:6])


def test_frames_of_zeros_alone_are_missing_whatever_length_is_declared(tmp_path: Path) -> None:
    for aligned in (False, True):
        value = foreign.mmsa(aligned=aligned)
        train = value["train"]
        train["audio"][[3, 5]] = 0
        train["vision"][4] = 0
        train["text_bert"][4, 1] = np.arange(7) < 6
        if not aligned:
            train["audio_lengths"][6] = 0
            train["vision_lengths"][4] = 9
        missing = {3: {"text", "vision"}, 5: {"text", "vision"}, 4: {"text", "audio"}}
        notes = convert(dump(tmp_path / "x.pkl", value), tmp_path / "x.h5")
        assert notes == [
            "audio: 2 samples have a length, but frames of zeros alone; they lack it",
            "vision: 1 samples have a length, but frames of zeros alone; they lack it",
            f"audio: {2 if aligned else 3} samples without it",
            "vision: 1 samples without it",
        ]
        store = FeatureStore(tmp_path / "x.h5")
        assert {row: set(values(store, row)) for row in missing} == missing
        assert store.available().sum() == 3 * len(store) - (3 if aligned else 4)


def first_zero_frame(x: np.ndarray) -> np.ndarray:
    """Lengths as MMSA computes them: where the first frame is whose sum is 0, at least 1."""
    ends = x.sum(2) == 0
    return np.maximum(1, np.where(ends.any(1), ends.argmax(1), x.shape[1]))


def test_lengths_that_end_at_the_first_frame_of_zeros(tmp_path: Path) -> None:
    value = foreign.mmsa()
    train = value["train"]
    x = np.zeros((24, 10, foreign.WIDTHS["vision"]), dtype=np.float32)
    x[:, :9] = foreign.frames(np.random.default_rng(1), 24 * 9, x.shape[2], 0).reshape(24, 9, -1)
    x[0, 0] = 0  # no face yet
    x[1, 3:5] = 0
    x[2] = np.roll(x[2], 1, axis=0)  # padded in front
    x[3, 5:] = 0
    train["vision"], train["vision_lengths"] = x, first_zero_frame(x)
    train["vision_lengths"][2] = 9
    train["vision_lengths"][4] = 2
    assert train["vision_lengths"][:6].tolist() == [1, 3, 9, 5, 2, 9]
    notes = convert(dump(tmp_path / "x.pkl", value), tmp_path / "x.h5")
    said = "go on behind the frame of zeros that their length ends at; they are as long as their frames"
    assert notes == [
        "vision: 1 samples are padded in front; they were moved",
        f"vision: 2 samples {said}",
        "vision: 1 samples have frames behind their declared length, which are left out",
    ]
    store = FeatureStore(tmp_path / "x.h5")
    for row, expected in enumerate((x[0, :9], x[1, :9], x[2, 1:], x[3, :5], x[4, :2], x[5, :9])):
        np.testing.assert_array_equal(values(store, row)["vision"], expected)


def test_aligned_frames_in_front_of_which_there_is_padding(tmp_path: Path) -> None:
    value = foreign.mmsa(aligned=True)
    expected = []
    for split, part in value.items():
        lengths = part["text_bert"][:, 1].sum(1).astype(int)
        for row, length in enumerate(lengths):
            expected.append({name: part[name][row, :length].copy() for name in foreign.WIDTHS})
            for name in foreign.WIDTHS:
                part[name][row] = np.roll(part[name][row], 7 - length, axis=0)
            if split == "test" and length > 2:
                # The first word has no face; the words stay together.
                part["vision"][row, 7 - length] = 0
                expected[-1]["vision"][0] = 0
    notes = convert(dump(tmp_path / "x.pkl", value), tmp_path / "x.h5")
    assert len(notes) == 3
    assert all(note.endswith("are padded in front; they were moved") for note in notes)
    store = FeatureStore(tmp_path / "x.h5")
    for row, sample in enumerate(expected):
        found = values(store, row)
        for name, x in sample.items():
            np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda v: v.update(dev=foreign.mmsa()["valid"]), "got the parts ['train', 'valid', 'test', 'dev'], expected"),
        (lambda v: v["test"].pop("regression_labels"), "test has no regression_labels, which other parts have"),
        (lambda v: v["train"].update(text_bert=v["test"]["text_bert"]), "text_bert is float32 (9, 3, 7), expected"),
        (lambda v: v["train"].update(text_bert=[[1]] * 24), "text_bert is list, expected numbers [24, 3, T]"),
        (lambda v: v["train"]["text_bert"].__setitem__((4, 1, 6), 2), "not ones and then zeros in row 4"),
        (lambda v: v["train"]["text_bert"].__setitem__((4, 1), np.arange(7) > 3), "not ones and then zeros in row 4"),
        (lambda v: v["train"]["text_bert"].__setitem__((4, 1, 0), np.nan), "not ones and then zeros in row 4"),
    ],
)  # fmt: skip
def test_what_would_vanish_or_be_guessed_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object], reason: str
) -> None:
    value = foreign.mmsa()
    spoil(value)
    with pytest.raises(ValueError, match=re.escape(reason)):
        convert(dump(tmp_path / "x.pkl", value), tmp_path / "x.h5")


def test_ids_and_lengths_of_any_shape(tmp_path: Path) -> None:
    value = foreign.mmsa()
    value["train"]["id"] = np.arange(24)
    value["valid"]["id"] = [("a", "b")] * 8 + ["a_b#2"]
    value["test"]["audio_lengths"] = np.array(value["test"]["audio_lengths"])[:, None]
    expected = np.concatenate([value[split]["audio_lengths"] for split in ("train", "valid")])
    convert(dump(tmp_path / "x.pkl", value), tmp_path / "x.h5")
    store = FeatureStore(tmp_path / "x.h5")
    assert store.ids()[:24] == [str(i) for i in range(24)]
    assert store.ids()[24:33] == ["a_b", *(f"a_b#{i}" for i in range(3, 10)), "a_b#2"]
    assert store.read(np.arange(33)).lengths["audio"].tolist() == expected.tolist()


def test_samples_of_zeros_lack_the_modality_in_folders_too(tmp_path: Path) -> None:
    truth = foreign.write_gcnet(tmp_path / "x")
    key = next(iter(truth))
    np.save(tmp_path / "x" / "features" / "wav2vec-large-c-UTT" / f"{key}.npy", np.zeros(5, dtype=np.float32))
    notes = convert(tmp_path / "x", tmp_path / "x.h5")
    assert notes == ["audio: 1 samples have zeros alone; they lack it", "audio: 1 samples without it"]
    store = FeatureStore(tmp_path / "x.h5")
    assert values(store, store.ids().index(key)).keys() == {"text", "vision"}


def test_gcnet_says_what_it_leaves_out(tmp_path: Path) -> None:
    foreign.write_gcnet(tmp_path / "x")
    path = next((tmp_path / "x").glob("*.pkl"))
    content = list(pickle.loads(path.read_bytes()))
    content[4].remove("vid0")
    content[5].add("vid99")
    content[1]["vid1"][2] = float("nan")
    notes = convert(dump(path, tuple(content)), tmp_path / "x.h5")
    assert set(notes) == {
        "1 dialogues are in no part and were left out",
        "1 dialogues of the parts have no utterances",
        "score: 1 labels are NaN, which training refuses",
        "positive: 1 labels are NaN, which training refuses",
    }
    store = FeatureStore(tmp_path / "x.h5")
    assert np.isnan(store.labels("positive")).tolist() == np.isnan(store.labels("score")).tolist()


def test_repeated_rows_are_said(tmp_path: Path) -> None:
    foreign.write_mmin(tmp_path / "mmin", folds=1)
    for name in ("label", "int2name"):
        at = tmp_path / "mmin" / next((tmp_path / "mmin").rglob(f"trn_{name}.npy")).relative_to(tmp_path / "mmin")
        np.save(at, np.concatenate([np.load(at), np.load(at)[:2]]))
    (note,) = convert(tmp_path / "mmin", tmp_path / "mmin.h5")
    assert re.match("2 ids come twice in one part, such as 'Ses0.*'; each is one sample", note)
    foreign.write_mintrec(tmp_path / "mintrec")
    train = (tmp_path / "mintrec" / "train.tsv").read_text().splitlines()[1]
    with open(tmp_path / "mintrec" / "test.tsv", "a", encoding="utf-8") as file:
        file.write(train)
    with pytest.raises(ValueError, match=r"test\.tsv: 'S04_Etrain_0' is in the parts train and test, expected one"):
        convert(tmp_path / "mintrec", tmp_path / "mintrec.h5")


def test_a_conversion_replaces_neither_its_source_nor_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "x"
    foreign.write_gcnet(source)
    before = sorted(tmp_path.rglob("*"))
    path = next(source.glob("*.pkl"))
    for given, out in ((path, path), (source, source / "out.h5"), (path, source / "features")):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(out))}: is .*; expected another file"):
            convert(given, out)
    assert sorted(tmp_path.rglob("*")) == before
    convert(source, tmp_path / "x.h5")
    with pytest.raises(ValueError, match=r"x\.h5: HDF5 and no .* a feature store needs no conversion"):
        convert(tmp_path / "x.h5", tmp_path / "y.h5")


def test_unknown_scores_are_said_and_leave_the_scale_alone(tmp_path: Path) -> None:
    value = foreign.mmsa()
    value["train"]["regression_labels"][[2, 7]] = np.nan
    notes = convert(dump(tmp_path / "x.pkl", value), tmp_path / "x.h5")
    assert notes == ["regression_labels: 2 labels are NaN, which training refuses"]
    store = FeatureStore(tmp_path / "x.h5")
    assert store.task["label"] == {"name": "regression_labels", "kind": "score", "sentiment": True}
    with pytest.raises(ValueError, match="got NaN in 2 samples, the first in row 2"):
        Labels.fit(store.task["label"], store.labels(), np.arange(20))


def test_published_files_are_known_by_their_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dump(tmp_path / "x.pkl", foreign.mmsa())
    sizes, digest = tuple(foreign.SIZES.values()), hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(split_pickle, "PUBLISHED", {"Toy": (sizes, False, digest)})
    assert convert(path, tmp_path / "x.h5") == ["it is the file published as Toy"]
    dump(path, foreign.mmsa(seed=1))
    (note,) = convert(path, tmp_path / "y.h5")
    assert note == "it has the sizes of Toy, but not the published file's checksum: made anew, or damaged"


@pytest.mark.parametrize("protocol", [0, 2])
def test_mult_from_python_2(tmp_path: Path, protocol: int) -> None:
    value = foreign.mult()
    path = tmp_path / "mosi_data.pkl"
    path.write_bytes(foreign.python2_pickle(value, protocol))
    notes = convert(path, tmp_path / "x.h5")
    assert len(notes) == 3
    assert all("samples are padded in front; they were moved" in note for note in notes)
    store = FeatureStore(tmp_path / "x.h5")
    truth = {}
    for part in value.values():
        for i, key in enumerate(part["id"]):
            x = {name: part[name][i] for name in foreign.WIDTHS}
            truth["_".join(text.decode() for text in key)] = {n: v[(v != 0).any(1)] for n, v in x.items()}
    assert_samples(store, truth)
    assert store.task["label"] == {"name": "score", "kind": "score", "sentiment": True}
    assert inspect_path(path)["format"] == "mult"


def test_mults_emotions(tmp_path: Path) -> None:
    value = foreign.mult(emotions=True)
    store = open_data(dump(tmp_path / "iemocap_data.pkl", value), tmp_path)
    assert store.task["label"] == {"name": "emotion", "kind": "class"}
    assert store.labels("emotion")[:5].tolist() == ["neutral", "happy", "sad", "angry", "neutral"]
    assert store.labels("sad")[:4].tolist() == [0, 0, 1, 0]
    value["train"]["labels"][0] = np.eye(2)[[1, 1, 0, 0]]
    assert convert(dump(tmp_path / "y.pkl", value), tmp_path / "y.h5")[0].startswith("some samples have no emotion")
    assert "label" not in FeatureStore(tmp_path / "y.h5").task


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.zeros((9, 4, 2)), r"test/labels has pairs that are not \(0, 1\) or \(1, 0\)"),
        (np.full((9, 4, 2), np.nan), "test/labels has pairs that are not"),
        (np.full((9, 4, 2), "a"), "test/labels has pairs that are not"),
        (np.zeros((9, 3, 2)), r"\(9, 3, 2\)\], expected as many emotions in each part"),
    ],
)
def test_mults_pairs_are_one_hot(tmp_path: Path, labels: np.ndarray, reason: str) -> None:
    value = foreign.mult(emotions=True)
    value["test"]["labels"] = labels
    with pytest.raises(ValueError, match=rf"x\.pkl: .*{reason}"):
        open_source(dump(tmp_path / "x.pkl", value))


def test_labels_of_all_parts_are_kept_whole(tmp_path: Path) -> None:
    value = foreign.mmsa()
    names = ["regression_labels", "classification_labels", "annotation_labels", "in/side_labels", 5]
    for split, part in value.items():
        n = len(part["id"])
        columns = [[1] * n, np.arange(n, dtype="i1"), np.array([b"a"] * n), [1] * n, [1] * n]
        if split == "test":
            columns = [[0.5] * n, np.arange(n) + 1000, ["long"] * n, [1] * n, [1] * n]
        part.update(zip(names, columns, strict=True))
    convert(dump(tmp_path / "x.pkl", value), tmp_path / "x.h5")
    store = FeatureStore(tmp_path / "x.h5")
    assert set(store.label_names) == set(names[:3])
    assert store.labels("regression_labels").tolist() == [1] * 33 + [0.5] * 9
    assert store.labels("classification_labels").tolist() == [*range(24), *range(9), *range(1000, 1009)]
    assert store.labels("annotation_labels").tolist() == ["a"] * 33 + ["long"] * 9


def test_padding_of_aligned_files_is_stripped_from_all_alike(tmp_path: Path) -> None:
    """Word by word: a modality that is zero for a word keeps its place; one that is zero for all words is missing."""
    value = foreign.mult(sizes={"train": 4, "valid": 2, "test": 2})
    for part in value.values():
        for name, width in foreign.WIDTHS.items():
            part[name] = np.zeros((len(part["labels"]), 6, width), dtype=np.float32)
            part[name][:, 2:] = 1
    value["train"]["audio"][0, 2] = 0
    value["train"]["vision"][1] = 0
    convert(dump(tmp_path / "x.pkl", value), tmp_path / "x.h5")
    store = FeatureStore(tmp_path / "x.h5")
    assert values(store, 0)["audio"].tolist() == [[0] * 5, *[[1] * 5] * 3]
    assert values(store, 1).keys() == {"text", "audio"}
    assert len(values(store, 1)["text"]) == 4


def test_mmin(tmp_path: Path) -> None:
    for name, one_hot in (("iemocap", True), ("msp", False)):
        truth = foreign.write_mmin(tmp_path / name, one_hot=one_hot)
        store = open_data(tmp_path / name, tmp_path / "cache")
        assert_samples(store, truth)
        assert store.split_names == ("cv1", "cv2", "cv3")
        splits = make_splits(store, folds=3, seed=0)
        for fold, split in enumerate(splits, 1):
            part = (np.arange(36) // 4 + fold) % 3
            for number, rows in enumerate(split):
                keys = {key for key, p in zip(truth, part, strict=True) if p == number}
                assert {store.ids()[row] for row in rows} == keys
        (first,) = make_splits(store, folds=1, seed=0)
        np.testing.assert_array_equal(first.test, splits[0].test)
        with pytest.raises(ValueError, match=r"folds: got 4, expected at most the 3 that .* comes with"):
            make_splits(store, folds=4, seed=0)
        assert inspect_path(tmp_path / name)["format"] == "mmin"
        by_key = dict(zip(store.ids(), store.labels().tolist(), strict=True))
        assert [by_key[key] for key in truth] == [i % 4 for i in range(36)]


def test_mmin_with_its_flaws(tmp_path: Path) -> None:
    truth = foreign.write_mmin(tmp_path / "x")
    at = tmp_path / "x" / "features" / "A"
    first = next(iter(truth))
    with h5py.File(at / "comparE.h5", "a") as h5:
        del h5[first]
    with h5py.File(at / "other.h5", "w"):
        pass
    with pytest.raises(ValueError, match=r"expected one \.h5 file of features, got \['comparE.h5', 'other.h5'\]"):
        open_source(tmp_path / "x")
    mapping = {"modalities": {"audio": "features/A/comparE.h5", "text": "features/L/bert_large.h5"}}
    assert convert(tmp_path / "x", tmp_path / "x.h5", mapping) == ["audio: 1 samples without it"]
    with h5py.File(at / "comparE.h5", "a") as h5:
        h5[first] = h5py.ExternalLink("/etc/passwd", "x")
    with pytest.raises(ValueError, match="is a link to elsewhere, which is not followed"):
        convert(tmp_path / "x", tmp_path / "y.h5", mapping)
    with h5py.File(at / "comparE.h5", "a") as h5:
        del h5[first]
        h5[first] = np.zeros((3, 4), dtype=np.float32)
    with pytest.raises(ValueError, match=f"audio of '{first}' is 4 wide, the first one 5|audio of .* is 5 wide"):
        convert(tmp_path / "x", tmp_path / "y.h5", mapping)
    fold = tmp_path / "x" / "target" / "1"
    np.save(fold / "trn_label.npy", np.eye(4)[:2])
    with pytest.raises(ValueError, match=r"trn has \d+ names and labels \(2, 4\)"):
        open_source(tmp_path / "x", mapping)
    np.save(fold / "trn_label.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds Python objects, which would run code to be loaded"):
        open_source(tmp_path / "x", mapping)
    assert not (tmp_path / "y.h5").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "val_int2name",
            lambda names, trn: np.concatenate([trn[:1], names[1:]]),
            "'{}' is in the parts train and valid",
        ),
        (
            "trn_label",
            lambda labels, _: np.concatenate([np.zeros((1, 4)), labels[1:]]),
            r"'{}' has the label \[0.0, 0.0, 0.0, 0.0\]",
        ),
        (
            "trn_label",
            lambda labels, _: np.concatenate([np.ones((1, 4)), labels[1:]]),
            r"'{}' has the label \[1.0, 1.0",
        ),
        (
            "trn_label",
            lambda labels, _: np.concatenate([[[0, np.nan, 0, 1]], labels[1:]]),
            r"'{}' has the label \[0.0, nan",
        ),
        (
            "trn_label",
            lambda labels, _: np.full(len(labels), 1e300),
            r"'{}' has the label 1e\+300, expected a whole number",
        ),
        (
            "trn_label",
            lambda labels, _: np.full(len(labels), np.inf),
            r"'{}' has the label inf, expected a whole number",
        ),
        ("trn_label", lambda labels, _: labels.argmax(1) + 0.5, r"'{}' has the label .*\.5, expected a whole number"),
    ],
)
def test_mmin_is_not_guessed_at(tmp_path: Path, name: str, content: Any, reason: str) -> None:
    foreign.write_mmin(tmp_path / "x")
    fold = tmp_path / "x" / "target" / "2"
    train = np.load(fold / "trn_int2name.npy")
    if "parts" in reason:
        other = np.load(fold / "val_label.npy")
        other[0] = np.load(fold / "trn_label.npy")[0]
        np.save(fold / "val_label.npy", other)
    np.save(fold / f"{name}.npy", content(np.load(fold / f"{name}.npy"), train))
    with pytest.raises(ValueError, match=rf"2/{name}\.npy: " + reason.replace("{}", train[0, 0].decode())):
        open_source(tmp_path / "x")


@pytest.mark.parametrize("text", [False, True])
def test_mintrec(tmp_path: Path, text: bool) -> None:
    truth = foreign.write_mintrec(tmp_path / "x", text=text)
    source = tmp_path / "x"
    notes = convert(source, tmp_path / "x.h5")
    assert len(notes) == (0 if text else 1)
    store = FeatureStore(tmp_path / "x.h5")
    assert store.modalities == (("text",) if text else ()) + ("audio", "vision")
    assert_samples(store, truth)
    assert by_split(store) == {"train": 24, "valid": 12, "test": 12}
    assert store.labels().tolist() == [truth[key]["intent"] for key in store.ids()]
    assert store.labels("coarse")[:4].tolist() == ["Emotion", "Goal", "Emotion", "Goal"]
    assert inspect_path(source)["format"] == "mintrec"
    table = (source / "test.tsv").read_text()
    # Quotes that no table would have written are part of a sentence, if the columns come out.
    for before, after in (("he said 3", '"he said 3'), ("he said 9", '"he" said 9')):
        assert before in table
        (source / "test.tsv").write_text(table.replace(before, after))
        convert(source, tmp_path / "again.h5")
        assert FeatureStore(tmp_path / "again.h5").labels().tolist() == store.labels().tolist()
    for wrong, message in (
        ('S04\tE9\t1\t"open\tGreet\tSad', "line 14 has quotes that do not end with a column"),
        ('S04\tE9\t"1\topen\tGreet', "line 14 has quotes that do not end with a column"),
        ('S04\tE9\t1\topen\t"Greet', "line 14 has quotes that do not end with a column"),
        ("S04\tE9\t1\tGreet", "line 14 has 4 columns, expected 5"),
        ("S04\tE9\t1\topen\tGreet\0", "line 14 has zero bytes, expected 5 columns of text"),
        ("S04\tE9\t1\topen\tok\tGreet", "line 14 has 6 columns, expected 5 columns of text"),
    ):
        (source / "test.tsv").write_text(table + wrong)
        with pytest.raises(ValueError, match=rf"test\.tsv: {message}"):
            open_source(source)
    (source / "test.tsv").write_text(table)
    (source / "dev.tsv").write_text("season\tepisode\n")
    with pytest.raises(ValueError, match=r"dev\.tsv: expected the columns"):
        open_source(source)


@pytest.mark.parametrize("aligned", [False, True])
def test_csd(tmp_path: Path, aligned: bool) -> None:
    truth = foreign.write_csd(tmp_path / "x", aligned=aligned)
    store = open_data(tmp_path / "x", tmp_path / "cache")
    assert_samples(store, truth)
    expected = [truth[key]["sentiment"] for key in store.ids()]
    np.testing.assert_array_equal(store.labels(), np.array(expected, dtype=np.float32))
    assert store.groups("video")[:5].tolist() == ["vid0"] * 4 + ["vid1"]
    report = inspect_path(tmp_path / "x")
    assert report["format"] == "csd"
    assert [array["name"] for array in report["unmapped"]] == ["CMU_MOSI_TimestampedWords.csd"]


def test_csd_asks_where_names_do_not_tell(tmp_path: Path) -> None:
    truth = foreign.write_csd(tmp_path / "x")
    (tmp_path / "x" / "openSMILE.csd").write_bytes((tmp_path / "x" / "CMU_MOSI_COVAREP.csd").read_bytes())
    with pytest.raises(ValueError, match="could all be audio; name one in a mapping"):
        open_source(tmp_path / "x")
    with pytest.raises(ValueError, match="one computational sequence; expected the folder"):
        open_source(tmp_path / "x" / "openSMILE.csd")
    mapping = {
        "modalities": {"sound": "openSMILE.csd", "face": "CMU_MOSI_Visual_Facet_42.csd"},
        "label": {"name": "CMU_MOSI_Opinion_Labels.csd", "kind": "score"},
    }
    convert(tmp_path / "x", tmp_path / "x.h5", mapping)
    store = FeatureStore(tmp_path / "x.h5")
    renamed = {key: {"sound": row["audio"], "face": row["vision"]} for key, row in truth.items()}
    assert_samples(store, renamed)


def test_segments_that_are_left_out_are_counted(tmp_path: Path) -> None:
    truth = foreign.write_csd(tmp_path / "x")
    with h5py.File(tmp_path / "x" / "CMU_MOSI_Opinion_Labels.csd", "a") as h5:
        data = h5["Opinion Segment Labels/data"]
        data["vid0/intervals"][1] = [1.0, 0.5]
        data["vid2/intervals"][3] = [1.5, 1.5]
        del data["vid4"]
        data["vid4/features"], data["vid4/intervals"] = np.zeros((0, 1)), np.zeros((0, 2))
        h5["Opinion Segment Labels/metadata/dimension names"] = np.array([], dtype="S3")
    assert convert(tmp_path / "x", tmp_path / "x.h5") == [
        "2 segments of the labels end before they begin, or at once; they are left out",
        "1 entries of the labels are empty; they are left out",
    ]
    for key in ("vid0[1]", "vid2[3]", *(f"vid4[{k}]" for k in range(4))):
        del truth[key]
    assert_samples(FeatureStore(tmp_path / "x.h5"), truth)


def test_unsigned_seconds_do_not_wrap_around(tmp_path: Path) -> None:
    foreign.write_csd(tmp_path / "x")
    with h5py.File(tmp_path / "x" / "CMU_MOSI_Opinion_Labels.csd", "a") as h5:
        entry = h5["Opinion Segment Labels/data/vid6"]
        del entry["intervals"]
        entry["intervals"] = np.array([[0, 1], [5, 1], [7, 1], [1, 2]], dtype=np.uint64)
    (note,) = convert(tmp_path / "x", tmp_path / "x.h5")
    assert note.startswith("2 segments of the labels end before they begin")
    assert {"vid6[0]", "vid6[3]"} == {key for key in FeatureStore(tmp_path / "x.h5").ids() if key.startswith("vid6")}


@pytest.mark.parametrize("kind", ["labels", "groups", "modalities"])
def test_a_store_with_a_column_named_data_is_a_store(tmp_path: Path, kind: str) -> None:
    modalities = ["data", "text"] if kind == "modalities" else ["audio", "text"]
    columns = {} if kind == "modalities" else {kind: {"data": np.arange(4)}}
    path = tmp_path / "x.h5"
    with StoreWriter(
        path, modalities=modalities, widths=dict.fromkeys(modalities, 2), kinds=dict.fromkeys(modalities, "vector")
    ) as writer:
        writer.append(dict.fromkeys(modalities, np.ones((4, 2))), **columns)
    assert open_data(path, tmp_path / "cache").modalities == tuple(modalities)
    assert inspect_path(path)["samples"] == 4
    with h5py.File(path, "a") as h5:
        h5["a/data/video/features"], h5["a/data/video/intervals"] = np.ones((3, 2)), np.ones((3, 2))
    assert len(open_data(path, tmp_path / "cache")) == 4


@pytest.mark.parametrize(
    "content",
    [{"a/data": np.ones((3, 2))}, {"a/data/b": np.ones(3)}, {"a/data/b/features": np.ones(3)}, {"a": np.ones(3)}],
)
def test_other_hdf5_is_not_known(tmp_path: Path, content: dict[str, np.ndarray]) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as h5:
        for name, array in content.items():
            h5[name] = array
    with pytest.raises(ValueError, match=r"x\.h5: HDF5 and no computational sequence; a feature store needs no"):
        convert(tmp_path / "x.h5", tmp_path / "y.h5")
    with pytest.raises(ValueError, match=r"x\.h5: an HDF5 file, but not a feature store"):
        inspect_path(tmp_path / "x.h5")


def test_csd_frames_without_order_and_videos_that_one_file_lacks(tmp_path: Path) -> None:
    truth = foreign.write_csd(tmp_path / "x")
    with h5py.File(tmp_path / "x" / "CMU_MOSI_COVAREP.csd", "a") as h5:
        entry = h5["COVAREP/data/vid0"]
        turned = {name: entry[name][()][::-1] for name in ("features", "intervals")}
        for name, value in turned.items():
            entry[name][...] = value
        del h5["COVAREP/data/vid1"]
    notes = convert(tmp_path / "x", tmp_path / "x.h5")
    assert notes == ["audio: 4 samples without it"]
    for k in range(4):
        del truth[f"vid1[{k}]"]["audio"]
    assert_samples(FeatureStore(tmp_path / "x.h5"), truth)


def test_one_long_sample_does_not_pad_a_thousand_short_ones(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    long = random.normal(size=(40_000, 8)).astype(np.float32)
    short = random.normal(size=(1023, 3, 8)).astype(np.float32)
    # The long one's video has short segments too, which must not keep all of it in memory.
    videos = {"a": np.concatenate([short[:500].reshape(-1, 8), long]), "b": short[500:].reshape(-1, 8)}
    steps = {"a": np.array([*[3] * 500, 40_000]), "b": np.full(523, 3)}
    (tmp_path / "x").mkdir()
    for root, file in (("glove", "glove"), ("COVAREP", "COVAREP"), ("labels", "labels")):
        with h5py.File(tmp_path / "x" / f"{file}.csd", "w") as h5:
            for video, frames in videos.items():
                at = np.arange(len(frames) + 1.0)
                ends = np.cumsum(steps[video])
                if root == "labels":
                    frames, intervals = np.ones((len(ends), 1)), np.stack([ends - steps[video], ends], 1)
                else:
                    frames, intervals = frames if root == "glove" else -frames, np.stack([at[:-1], at[1:]], 1)
                h5[f"{root}/data/{video}/features"], h5[f"{root}/data/{video}/intervals"] = frames, intervals
    tracemalloc.start()
    convert(tmp_path / "x", tmp_path / "x.h5")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20
    store = FeatureStore(tmp_path / "x.h5")
    assert len(store) == 1024
    for row in (0, 499, 500, 501, 1023):
        expected = long if row == 500 else short[row - (row > 500)]
        got = values(store, row)
        np.testing.assert_array_equal(got["text"], expected)
        np.testing.assert_array_equal(got["audio"], -expected)


@pytest.mark.parametrize("rows", [1, 5, 1024])
def test_blocks_are_bounded_in_rows_and_in_bytes(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = foreign.write_mmin(tmp_path / "x")
    monkeypatch.setattr(keyed, "BLOCK_BYTES", 2000)
    with open_source(tmp_path / "x") as source:
        blocks = list(source.blocks(rows))
    assert all(len(block.ids) == 1 or sum(x.nbytes for x in block.features.values()) <= 2000 for block in blocks)
    assert max(len(block.ids) for block in blocks) <= rows
    assert np.concatenate([block.ids for block in blocks]).tolist() == sorted(truth)
    for block in blocks:
        for i, key in enumerate(block.ids):
            for name, x in block.features.items():
                np.testing.assert_array_equal(x[i, : block.lengths[name][i]], truth[key][name])
                assert not x[i, block.lengths[name][i] :].any()


@pytest.mark.parametrize("sessions", [False, True])
def test_gcnet(tmp_path: Path, sessions: bool) -> None:
    truth = foreign.write_gcnet(tmp_path / "x", sessions=sessions)
    store = open_data(tmp_path / "x", tmp_path / "cache")
    assert_samples(store, truth)
    assert by_split(store) == ({"train": 48, "test": 12} if sessions else {"train": 36, "valid": 12, "test": 12})
    expected = np.array([truth[key]["label"] for key in store.ids()])
    np.testing.assert_allclose(store.labels(), expected, rtol=1e-6)
    if sessions:
        splits = make_splits(store, folds=5, seed=0)
        for k, split in enumerate(splits, 1):
            assert {store.ids()[row][:5] for row in split.test} == {f"Ses0{k}"}
    else:
        assert store.labels("positive").tolist() == (expected > 0).astype(int).tolist()
    assert store.windowed(3).read(np.array([0, 1, 2, 3])).lengths["text"].tolist() == [1, 2, 3, 3]
    pickled = next((tmp_path / "x").glob("*.pkl"))
    assert inspect_path(pickled)["samples"] == inspect_path(tmp_path / "x")["samples"] == 60


def test_gcnet_with_its_flaws(tmp_path: Path) -> None:
    foreign.write_gcnet(tmp_path / "x")
    features = tmp_path / "x" / "features"
    (features / "manet_UTT" / "vid0_000.npy").unlink()
    (features / "hubert_UTT").mkdir()
    with pytest.raises(ValueError, match=r"which of .* is what\? Name them in a mapping"):
        open_source(tmp_path / "x")
    mapping = {"modalities": {"audio": "wav2vec-large-c-UTT", "vision": "manet_UTT"}}
    assert convert(tmp_path / "x", tmp_path / "x.h5", mapping) == ["vision: 1 samples without it"]
    with pytest.raises(ValueError, match=r"modalities: .*none: no such folder"):
        open_source(tmp_path / "x", {"modalities": {"audio": "none", "vision": "manet_UTT"}})


@pytest.mark.parametrize("name", ["trn_label", "trn_int2name"])
def test_mmin_arrays_without_columns(tmp_path: Path, name: str) -> None:
    foreign.write_mmin(tmp_path / "x")
    path = tmp_path / "x" / "target" / "1" / f"{name}.npy"
    np.save(path, np.load(path)[:, :0])
    with pytest.raises(ValueError, match=r"target/1: trn.* \(12, 0\)"):
        open_source(tmp_path / "x")


def test_mmin_features_are_numbers(tmp_path: Path) -> None:
    truth = foreign.write_mmin(tmp_path / "x")
    key = next(iter(truth))
    with h5py.File(tmp_path / "x" / "features" / "V" / "denseface.h5", "a") as h5:
        del h5[key]
        h5[key] = "words"
    with pytest.raises(ValueError, match=rf"denseface\.h5: cannot read '{key}': object \(\), expected numbers"):
        convert(tmp_path / "x", tmp_path / "x.h5")


def test_a_gcnet_dialogue_is_in_one_part(tmp_path: Path) -> None:
    foreign.write_gcnet(tmp_path / "x")
    path = next((tmp_path / "x").glob("*.pkl"))
    value = pickle.loads(path.read_bytes())
    value[-1].add("vid0")
    with pytest.raises(
        ValueError, match=r"2way\.pkl: the dialogue 'vid0' is in the parts train and test, expected one"
    ):
        open_source(dump(path, value))


@pytest.mark.parametrize("label", [2**70, None, "glad"])
def test_gcnet_labels_are_numbers(tmp_path: Path, label: Any) -> None:
    foreign.write_gcnet(tmp_path / "x")
    path = next((tmp_path / "x").glob("*.pkl"))
    value = pickle.loads(path.read_bytes())
    value[1]["vid0"][2] = label
    with pytest.raises(ValueError, match=rf"2way\.pkl: 'vid0_002' has the label {label}, expected a number of 64 bits"):
        open_source(dump(path, value))


def test_a_gcnet_dialogue_of_many_labels(tmp_path: Path) -> None:
    foreign.write_gcnet(tmp_path / "x", sessions=True)
    path = next((tmp_path / "x").glob("*.pkl"))
    value = pickle.loads(path.read_bytes())
    first = next(iter(value[0]))
    value[0][first] = [f"{first}_{i:03d}" for i in range(1000)]
    value[1][first] = np.arange(1000) % 4
    with open_source(dump(path, value)) as source:
        block = next(source.blocks())
    assert block.labels["emotion"][:1000].tolist() == [i % 4 for i in range(1000)]


@pytest.mark.parametrize("shape", [(0,), (0, 6), (3, 0)])
def test_gcnet_files_without_values_are_missing(tmp_path: Path, shape: tuple[int, ...]) -> None:
    truth = foreign.write_gcnet(tmp_path / "x")
    np.save(tmp_path / "x" / "features" / "manet_UTT" / "vid0_000.npy", np.zeros(shape))
    assert convert(tmp_path / "x", tmp_path / "x.h5") == ["vision: 1 samples without it"]
    del truth["vid0_000"]["vision"]
    assert_samples(FeatureStore(tmp_path / "x.h5"), truth)


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    foreign.write_gcnet(tmp_path / "x")
    path = next((tmp_path / "x").glob("*.pkl"))
    value = pickle.loads(path.read_bytes())
    # An empty name is the whole folder.
    for name in ("../../secret", "..", "", "a" * 252):
        value[0]["vid0"][0] = name
        with pytest.raises(ValueError, match="is not the name of a file"):
            open_source(dump(path, value))
    for name, got in ((None, "NoneType"), ("a\0", "one with zero bytes")):
        value[0]["vid0"][0] = name
        with pytest.raises(ValueError, match=rf"2way\.pkl: expected a text, got {got}"):
            open_source(dump(path, value))


def test_folders_are_converted_again_when_a_file_changes(tmp_path: Path) -> None:
    foreign.write_gcnet(tmp_path / "x")
    cache = tmp_path / "cache"
    made = open_data(tmp_path / "x", cache).path.stat().st_mtime_ns
    assert open_data(tmp_path / "x", cache).path.stat().st_mtime_ns == made
    np.save(tmp_path / "x" / "features" / "deberta-large-4-UTT" / "vid0_000.npy", np.full(8, 5, dtype=np.float32))
    store = open_data(tmp_path / "x", cache)
    assert store.path.stat().st_mtime_ns != made
    assert values(store, 0)["text"].tolist() == [5] * 8


WRONG: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (
        lambda v: v["train"].update(audio=np.zeros((24, 5))),
        "train/audio is float64 (24, 5), expected numbers [N, T, D]",
    ),
    (lambda v: v["train"].update(audio=[1, 2]), "train/audio is list, expected numbers [N, T, D]"),
    (lambda v: v["valid"].update(vision=np.zeros((9, 10, 5))), "valid/vision is 5 wide, that of another part 6"),
    (lambda v: v["test"].update(text=np.zeros((8, 7, 8))), "arrays of test disagree in the number of samples"),
    (lambda v: v["test"].update(id=v["test"]["id"][:-1]), "arrays of test disagree in the number of samples"),
    (lambda v: v["test"].update(regression_labels=np.zeros((9, 2))), "expected one value per sample"),
    (lambda v: v["test"].update(audio_lengths=[np.nan] * 9), "lengths are float64, expected whole numbers"),
    (
        lambda v: v["test"]["audio_lengths"].__setitem__(2, -5),
        "test/audio_lengths are int64, expected whole numbers [9] from 0; row 2 has -5",
    ),
    (
        lambda v: v["test"]["vision_lengths"].__setitem__(3, 2.9),
        "test/vision_lengths are float64, expected whole numbers [9] from 0; row 3 has 2.9",
    ),
    (lambda v: v["test"]["vision_lengths"].__setitem__(3, np.inf), "row 3 has inf"),
    (
        lambda v: v["test"]["vision_lengths"].__setitem__(3, 2**70),
        "test/vision_lengths is list, expected an array or a list of numbers of 64 bits",
    ),
    (
        lambda v: v["test"].update(audio_lengths=np.ones((9, 2), dtype=int)),
        "test/audio_lengths are int64 (9, 2), expected whole numbers [9]",
    ),
    (lambda v: v["test"].update(audio_lengths=5), "test/audio_lengths is int, expected an array or a list"),
    (
        lambda v: v["test"].update(regression_labels=[*range(8), 2**70]),
        "test/regression_labels is list, expected an array or a list of numbers of 64 bits",
    ),
    (
        lambda v: v["test"].update(regression_labels=np.array([None] * 9)),
        "test/regression_labels is list, expected an array",
    ),
    (
        lambda v: v["test"].update(regression_labels=["glad"] * 9),
        "regression_labels are float32, float32, <U4 in the parts",
    ),
    (
        lambda v: v["test"].update(text_bert=np.full((9, 3, 7), "a")),
        "test/text_bert is <U1 (9, 3, 7), expected numbers",
    ),
    (lambda v: v["test"]["id"].__setitem__(4, None), "test/id: expected a text, got NoneType"),
    (lambda v: v.update(extra={}), "which is the layout of neither MMSA, MulT nor GCNet"),
    (lambda v: v["train"].pop("text"), "train has no text, which a pickle of MMSA or MulT has in every part"),
    (lambda v: [v["valid"].pop(f"{n}_labels") for n in ("regression", "classification")], "valid has no labels, which"),
]


@pytest.mark.parametrize(("spoil", "reason"), WRONG, ids=[reason[:30] for _, reason in WRONG])
def test_wrong_contents_are_named(tmp_path: Path, spoil: Callable[[dict[str, Any]], object], reason: str) -> None:
    value = foreign.mmsa()
    spoil(value)
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        convert(dump(tmp_path / "x.pkl", value), tmp_path / "x.h5")
    assert str(tmp_path / "x.pkl") in str(raised.value)
    assert not (tmp_path / "x.h5").exists()


def test_errors_begin_with_the_file_however_short_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = foreign.mmsa()
    value["test"]["vision_lengths"][3] = -1
    dump(Path("e"), value)
    with pytest.raises(ValueError, match=r"^e: test/vision_lengths are int64"):
        convert("e", "x.h5")
    value["test"]["id"][3] = None
    with pytest.raises(ValueError, match=r"^e: test/id: expected a text"):
        open_source(dump(Path("e"), value))


def test_what_is_no_layout(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        ValueError, match=r"notes\.txt: not a file that is known; expected a feature store \(\.h5\), \.npz"
    ):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="not a folder that is known"):
        open_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_source(tmp_path / "none")
    with pytest.raises(ValueError, match="got the mapping given, but MMSA's pickle says itself what is what"):
        convert(dump(tmp_path / "x.pkl", foreign.mmsa()), tmp_path / "x.h5", {"modalities": {"a": "a", "b": "b"}})
    foreign.write_csd(tmp_path / "csd")
    report = json.dumps(inspect_path(tmp_path / "csd"))
    assert "csd" in report
