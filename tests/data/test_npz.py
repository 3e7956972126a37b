from __future__ import annotations

import io
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modafill.data import (
    FeatureStore,
    NpzMapping,
    builtin_mappings,
    convert,
    inspect_path,
    load_mapping,
    open_data,
)
from modafill.data.npz import NpzFile

MAPPING: dict[str, Any] = {"modalities": {"text": "t", "audio": "a"}, "label": {"name": "y", "kind": "class"}}


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def simple(path: Path, n: int = 10, **arrays: Any) -> Path:
    random = np.random.default_rng(0)
    given = {"t": random.normal(size=(n, 3)), "a": random.normal(size=(n, 4, 2)), "y": np.arange(n) % 2}
    return save(path, **{**given, **arrays})


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def write_zip(path: Path, compression: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


# The safe reader.


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 10, 99])
def test_blocks_against_numpy(tmp_path: Path, compress: bool, rows: int) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "floats": random.normal(size=(10, 3, 2)),
        "fortran": np.asfortranarray(random.normal(size=(10, 4))),
        "big_endian": np.arange(10, dtype=">i4"),
        "text": np.array([f"é{i}" for i in range(10)]),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 5)),
        "no_columns": np.zeros((10, 0)),
    }
    (np.savez_compressed if compress else np.savez)(tmp_path / "x.npz", **arrays)
    with NpzFile(tmp_path / "x.npz") as npz:
        assert set(npz.headers) == set(arrays)
        for name, array in arrays.items():
            whole, blocks = npz.load(name), list(npz.blocks(name, rows))
            assert whole.dtype == array.dtype
            np.testing.assert_array_equal(whole, array)
            if array.ndim:
                np.testing.assert_array_equal(np.concatenate(blocks), array)
                assert all(len(block) <= rows for block in blocks)


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    header = npy(np.zeros((0, 1000), dtype=np.float32))
    n = 25_000
    header = header.replace(b"(0, 1000), }" + b" " * 4, f"({n}, 1000), }}".encode())
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("t.npy", "w") as stream:
        stream.write(header)
        for _ in range(n // 1000):
            stream.write(bytes(4_000_000))
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"bomb\.npz: array 't.npy' grows from \d+ to 100000\d+ bytes"):
        NpzFile(path)


def test_total_size_is_limited(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes uncompressed, more than the limit of 500"):
        NpzFile(simple(tmp_path / "x.npz"), max_bytes=500)


@pytest.mark.parametrize("shape", ["(9999999999, 9999999999)", "(3, 3)", "(2,)", "(-2, -2)"])
def test_a_lying_header_is_refused(tmp_path: Path, shape: str) -> None:
    array = npy(np.zeros((2, 2)))
    lying = array.replace(b"(2, 2)", shape.encode())[: 128 + len(shape) - 6] + bytes(32)
    lying = lying[:8] + (len(lying) - 32 - 10).to_bytes(2, "little") + lying[10:]
    with pytest.raises(ValueError, match="array 't' declares"):
        NpzFile(write_zip(tmp_path / "x.npz", t=lying))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = write_zip(tmp_path / "x.npz", t=npy(np.array([Trap()], dtype=object)))
    with pytest.raises(ValueError, match="array 't' holds Python objects"):
        NpzFile(path)
    assert not (tmp_path / "trapped").exists()


def test_damaged_archives(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "whole.npz", t=np.random.default_rng(0).normal(size=(500, 3)))
    whole = (tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for size in (0, 3, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.npz: "):
            NpzFile(path)
    for place in range(200, len(whole) // 2, 997):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        for rows in (7, 500):
            with pytest.raises(ValueError, match=r"cut\.npz: cannot read array 't': "):
                read_in_blocks(path, rows)


def read_in_blocks(path: Path, rows: int) -> list[np.ndarray]:
    with NpzFile(path) as npz:
        return list(npz.blocks("t", rows))


def test_every_byte_of_the_directory(tmp_path: Path) -> None:
    whole = simple(tmp_path / "whole.npz").read_bytes()
    path, reasons = tmp_path / "x.npz", []
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):
        for value in {0, 1, 63, 127, 255, whole[place] ^ 1} - {whole[place]}:
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                with NpzFile(path) as npz:
                    for name in npz.headers:
                        npz.load(name)
            except ValueError as error:
                reasons.append(str(error))
    assert len(reasons) > 100
    assert all("x.npz: " in reason for reason in reasons)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x09\x00" + bytes(200), b"hello" * 50])
def test_damaged_arrays(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"x\.npz: cannot read array 't': "):
        NpzFile(write_zip(tmp_path / "x.npz", t=content))


def test_archives_without_arrays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no arrays"):
        NpzFile(write_zip(tmp_path / "x.npz"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        NpzFile(tmp_path / "none.npz")


# Mappings.


def test_a_mapping_by_object_name_and_path(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(MAPPING))
    by_path = load_mapping(tmp_path / "mine.json")
    assert by_path.name == "mine"
    assert by_path.modalities == {"text": "t", "audio": "a"}
    assert by_path.to_dict() == load_mapping(MAPPING).to_dict()
    assert load_mapping("hazumi") == builtin_mappings()["hazumi"]
    assert load_mapping(by_path) is by_path
    for mapping in builtin_mappings().values():
        assert NpzMapping.from_dict(mapping.name, json.loads(json.dumps(mapping.to_dict()))) == mapping


@pytest.mark.parametrize(
    "given, message",
    [
        ("nothing", r"got 'nothing', expected a JSON file or one of \['digits', 'hazumi'"),
        ({}, "'modalities' to name two"),
        ({"modalities": {"a": "a"}}, "'modalities' to name two"),
        ({"modalities": {"a": ["x"], "b": "y"}}, r"modalities: got .* expected an object: modality → name of an array"),
        ({"modalities": ["a", "b"]}, "modalities: got .* expected an object"),
        ({**MAPPING, "label": "y"}, "label: got 'y', expected an object with the name of an array and a kind"),
        ({**MAPPING, "available": 5}, "available: got 5, expected the name of an array"),
        ({**MAPPING, "splits": "train"}, "splits: got 'train', expected a list of names"),
        ({**MAPPING, "lengths": "n"}, "lengths: got 'n', expected an object"),
        ({**MAPPING, "clip": {"a": "much"}}, "clip: got .* modality → number"),
        ({**MAPPING, "clip": {"audio": -3}}, "clip: got .* modality → number above 0"),
        ({**MAPPING, "clip": {"audio": float("nan")}}, "clip: got .* modality → number above 0"),
        ({"modalities": {"": "t", "b": "a"}}, "modalities: got '', expected a name"),
        ({"modalities": {"a\0": "t", "b": "a"}}, r"modalities: got 'a\\x00', expected a name"),
        (
            {**MAPPING, "labels": {"b": {"name": "_y", "kind": "class"}}},
            "labels 'y' and '_y' would both be 'y' in a store",
        ),
        ({**MAPPING, "group": "__"}, "got the array '__', expected one whose name a column can have"),
        ({**MAPPING, "window": 2.5}, "window: got 2.5, expected a whole number of turns"),
        ({**MAPPING, "groups": "g"}, r"got the keys \['groups'\]"),
        ({**MAPPING, "nonfinite": "ignore"}, "nonfinite: got 'ignore', expected error or missing or zero"),
        ({**MAPPING, "clip": {"vision": 3}}, r"clip names the unknown modalities \['vision'\]"),
        ({**MAPPING, "label": {"kind": "class"}}, "the label to have the name"),
        ({**MAPPING, "label": {"name": "y", "kind": "rank"}}, "mapping given: label: got kind 'rank'"),
    ],
)
def test_malformed_mappings(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_mapping(given)


def test_malformed_mapping_files(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for content, message in (("{", "not a JSON file"), ("[]", "expected a JSON object")):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"m\.json: {message}"):
            load_mapping(path)


def test_the_mapping_is_found_by_content(tmp_path: Path) -> None:
    n = 4
    arrays = {"fourier": np.ones((n, 2)), "karhunen": np.ones((n, 2)), "zernike": np.ones((n, 2))}
    convert(save(tmp_path / "a.npz", **arrays, digit=np.arange(n)), tmp_path / "a.h5")
    assert FeatureStore(tmp_path / "a.h5").task["mapping"] == "digits"
    with pytest.raises(ValueError, match=r"no built-in mapping fits .*digits lacks digit; hazumi .*docs/data\.md"):
        convert(save(tmp_path / "b.npz", **arrays), tmp_path / "b.h5")
    hazumi = {"text": np.ones((n, 2)), "audio": np.ones((n, 2)), "vision": np.ones((n, 2)), "UI_mean": np.arange(n)}
    names = {f"{name}_cols": np.array(["x", "y"]) for name in ("text", "audio", "vision")}
    both = {**arrays, "digit": np.arange(n), **hazumi, **names, "pid": np.arange(n), "turn": np.arange(n)}
    with pytest.raises(ValueError, match=r"mappings \['digits', 'hazumi'\] all fit"):
        convert(save(tmp_path / "c.npz", **both), tmp_path / "c.h5")
    convert(tmp_path / "c.npz", tmp_path / "c.h5", "hazumi")
    assert FeatureStore(tmp_path / "c.h5").task["mapping"] == "hazumi"
    with pytest.raises(ValueError, match=r"mapping hazumi needs the arrays \['UI_mean', 'pid', 'turn', 'text_cols'"):
        convert(tmp_path / "a.npz", tmp_path / "a.h5", "hazumi")


# Conversion.


def test_every_part_of_a_mapping(tmp_path: Path) -> None:
    n, random = 2500, np.random.default_rng(0)
    arrays = {
        "t": random.normal(size=(n, 3)),
        "a": random.normal(size=(n, 5, 2)) * 10,
        "a_len": random.integers(0, 6, n),
        "seen": random.random((n, 2)) < 0.8,
        "y": random.choice(["no", "yes"], n),
        "who": random.integers(0, 9, n),
        "when": random.permutation(n),
        "names": np.array(["l", "m", "r"]),
    }
    given = {
        "modalities": {"text": "t", "audio": "a"},
        "lengths": {"audio": "a_len"},
        "columns": {"text": "names"},
        "available": "seen",
        "label": {"name": "y", "kind": "class"},
        "group": "who",
        "order": "when",
        "clip": {"audio": 12},
        "window": 4,
    }
    convert(save(tmp_path / "x.npz", **arrays), tmp_path / "x.h5", given)
    store = FeatureStore(tmp_path / "x.h5")
    available = arrays["seen"] & np.stack([np.ones(n, bool), arrays["a_len"] > 0], 1)
    np.testing.assert_array_equal(store.available(), available)
    assert store.kinds == {"text": "vector", "audio": "sequence"}
    assert store.columns("text") == ["l", "m", "r"]
    assert store.labels().tolist() == arrays["y"].tolist()
    assert store.groups().tolist() == arrays["who"].tolist()
    assert store.order().tolist() == arrays["when"].tolist()
    assert store.ids(np.array([7])) == [f"{arrays['who'][7]}_{arrays['when'][7]}"]
    task = {"label": {"name": "y", "kind": "class"}, "group": "who", "window": 4, "mapping": "given"}
    assert store.task == task
    batch = store.read(np.arange(n))
    np.testing.assert_array_equal(batch.features["text"], np.where(available[:, :1], arrays["t"], 0).astype(np.float32))
    valid = (np.arange(5) < arrays["a_len"][:, None]) & available[:, 1:]
    audio = np.where(valid[..., None], arrays["a"].clip(-12, 12), 0).astype(np.float32)
    assert np.abs(arrays["a"]).max() > 12
    np.testing.assert_array_equal(batch.features["audio"], audio)
    assert batch.lengths["audio"].tolist() == valid.sum(1).tolist()


def split_arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 5), ("test", 3)):
        arrays |= {f"t_{part}": random.normal(size=(n, 2)), f"a_{part}": random.normal(size=(n, 3, 2))}
        arrays |= {f"y_{part}": np.arange(n), f"vid_{part}": np.array([f"{part}{i // 2}" for i in range(n)])}
    return arrays


SPLIT_MAPPING: dict[str, Any] = {
    "splits": ["train", "test"],
    "modalities": {"text": "t_{split}", "audio": "a_{split}"},
    "label": {"name": "y_{split}", "kind": "class"},
    "group": "vid_{split}",
}


@pytest.mark.parametrize("modality", ["t", "a"])
def test_an_array_that_one_split_lacks_is_missing_there(tmp_path: Path, modality: str) -> None:
    arrays = split_arrays()
    del arrays[f"{modality}_train"]
    convert(save(tmp_path / "x.npz", **arrays), tmp_path / "x.h5", SPLIT_MAPPING)
    store = FeatureStore(tmp_path / "x.h5")
    m = "ta".index(modality)
    assert store.available()[:, m].tolist() == [False] * 5 + [True] * 3
    assert store.available()[:, 1 - m].all()
    assert store.split().tolist() == ["train"] * 5 + ["test"] * 3
    assert store.groups("vid").tolist() == [*arrays["vid_train"], *arrays["vid_test"]]
    assert store.labels("y").tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert store.ids() == [*(f"train_{i}" for i in range(5)), *(f"test_{i}" for i in range(3))]
    batch, name = store.read(np.arange(8)), store.modalities[m]
    assert not batch.features[name][:5].any()
    np.testing.assert_array_equal(batch.features[name][5:], arrays[f"{modality}_test"].astype(np.float32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"t_train": None, "t_test": None}, r"needs the arrays \['t_{split}'\]"),
        ({"y_test": None}, r"needs the arrays \['y_test'\]"),
        ({"t_test": np.ones((3, 9))}, r"modality 'text' has parts of different shapes \[\(2,\), \(9,\)\]"),
        ({"a_test": np.ones((3, 4, 2))}, "modality 'audio' has parts of different shapes"),
        (
            {"y_test": np.array(["a", "b", "c"])},
            r"arrays \['y_train', 'y_test'\] are int64, <U1 in the parts, expected",
        ),
        ({"y_test": np.ones(4)}, r"disagree in the number of samples: {'t_test': 3, 'a_test': 3, 'y_test': 4"),
        ({"t_test": np.array(["a", "b", "c"])}, r"array 't_test' is <U1 \(3,\), expected numbers \[N, D\]"),
        ({"t_train": np.ones((5, 0))}, r"array 't_train' is float64 \(5, 0\)"),
    ],
)
def test_arrays_that_disagree(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arrays = {name: array for name, array in {**split_arrays(), **changes}.items() if array is not None}
    with pytest.raises(ValueError, match=rf"x\.npz: .*{message}"):
        convert(save(tmp_path / "x.npz", **arrays), tmp_path / "x.h5", SPLIT_MAPPING)
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ([4] * 9 + [-5], "float64, expected whole numbers [10] from 0 to 4; row 9 has -5.0"),
        ([4, 2.9] + [4] * 8, "float64, expected whole numbers [10] from 0 to 4; row 1 has 2.9"),
        ([np.nan] * 10, "float64, expected whole numbers [10] from 0 to 4; row 0 has nan"),
        ([5] * 10, "float64, expected whole numbers [10] from 0 to 4; row 0 has 5.0"),
        ([[4]] * 10, "float64 (10, 1), expected whole numbers [10] from 0 to 4"),
    ],
)
def test_lengths_are_whole_numbers(tmp_path: Path, lengths: Any, reason: str) -> None:
    path = simple(tmp_path / "x.npz", steps=np.array(lengths, dtype=float))
    with pytest.raises(ValueError, match=re.escape(f"x.npz: lengths 'steps' are {reason}")):
        convert(path, tmp_path / "x.h5", {**MAPPING, "lengths": {"audio": "steps"}})
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize(
    ("array", "key", "reason"),
    [
        (np.arange(10).astype("datetime64[D]"), "label", "is datetime64[D] (10,), expected numbers or texts [N]"),
        (np.ones(10, dtype=complex), "label", "is complex128 (10,), expected numbers or texts [N]"),
        (np.zeros(10, dtype=[("a", "f4")]), "group", "is [('a', '<f4')] (10,), expected numbers or texts [N]"),
        (np.zeros((10, 2)), "group", "is float64 (10, 2), expected numbers or texts [N]"),
        (np.zeros((10, 1)), "id", "is float64 (10, 1), expected numbers or texts [N]"),
        (np.array(["a"] * 10), "order", "is <U1 (10,), expected numbers [N]"),
        (np.array(["a", "b"]), "columns", "has the shape (2,), expected 3 column names"),
    ],
)
def test_arrays_that_are_not_what_the_mapping_says(tmp_path: Path, array: np.ndarray, key: str, reason: str) -> None:
    given: dict[str, Any] = {"label": {"name": "z", "kind": "class"}, "columns": {"text": "z"}}
    path = simple(tmp_path / "x.npz", z=array)
    with pytest.raises(ValueError, match=re.escape(f"x.npz: array 'z' {reason}")):
        convert(path, tmp_path / "x.h5", {**MAPPING, key: given.get(key, "z")})


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (np.arange(5), np.array([0.5, 1.5, 2.5])),
        (np.arange(5, dtype="i1"), np.array([1000, 2000, 3000])),
        (np.array([b"a"] * 5), np.array([b"long", "ä".encode(), b"b"])),
        (np.array(["a"] * 5), np.array([b"long", b"b", b"c"])),
    ],
)
def test_a_column_holds_what_every_part_has(tmp_path: Path, train: np.ndarray, test: np.ndarray) -> None:
    arrays = {**split_arrays(), "y_train": train, "y_test": test, "vid_train": train, "vid_test": test}
    convert(save(tmp_path / "x.npz", **arrays), tmp_path / "x.h5", SPLIT_MAPPING)
    expected = [v.decode() if isinstance(v, bytes) else v for v in [*train.tolist(), *test.tolist()]]
    store = FeatureStore(tmp_path / "x.h5")
    assert store.labels("y").tolist() == store.groups("vid").tolist() == expected


def test_names_of_arrays_that_a_store_cannot_have(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", **{"t": np.ones((4, 2)), "a": np.ones((4, 2)), "in/y": np.arange(4)})
    convert(path, tmp_path / "x.h5", {**MAPPING, "label": {"name": "in/y", "kind": "class"}, "group": "in/y"})
    store = FeatureStore(tmp_path / "x.h5")
    assert store.labels().tolist() == store.groups("in_y").tolist() == [0, 1, 2, 3]


def test_places_in_a_group_are_known(tmp_path: Path) -> None:
    path = simple(tmp_path / "x.npz", when=np.array([*range(9), np.nan]), who=np.zeros(10))
    with pytest.raises(ValueError, match=r"x\.npz: array 'when' has NaN or infinity, expected places in the group"):
        convert(path, tmp_path / "x.h5", {**MAPPING, "group": "who", "order": "when"})


def test_a_malformed_mask(tmp_path: Path) -> None:
    path = simple(tmp_path / "x.npz", seen=np.ones((10, 3), dtype=bool))
    with pytest.raises(ValueError, match=r"array 'seen' is bool \(10, 3\), expected bool \(10, 2\)"):
        convert(path, tmp_path / "x.h5", {**MAPPING, "available": "seen"})


def test_nan_is_an_error_unless_the_mapping_says_what_it_means(tmp_path: Path) -> None:
    n = 2200
    t, a = np.ones((n, 3)), np.ones((n, 4, 2))
    t[[5, 2100], 1] = np.nan
    a[2150, 3, :] = -np.inf
    path = simple(tmp_path / "x.npz", n, t=t, a=a)
    with pytest.raises(ValueError, match=r"'t' has 2 in rows 5, 2100; 'a' has 2 in row 2150\. .*\"available\""):
        convert(path, tmp_path / "x.h5", MAPPING)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]
    convert(path, tmp_path / "x.h5", {**MAPPING, "nonfinite": "zero"})
    batch = FeatureStore(tmp_path / "x.h5").read(np.array([5, 6, 2150]))
    assert batch.features["text"].tolist() == [[1, 0, 1], [1, 1, 1], [1, 1, 1]]
    assert batch.features["audio"][2].tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    convert(path, tmp_path / "m.h5", {**MAPPING, "nonfinite": "missing"})
    store = FeatureStore(tmp_path / "m.h5")
    assert np.argwhere(~store.available()).tolist() == [[5, 0], [2100, 0], [2150, 1]]
    batch = store.read(np.array([5, 2150]))
    assert not batch.features["text"][0].any()
    assert batch.features["audio"][:, 3].tolist() == [[1, 1], [0, 0]]
    modalities = inspect_path(path, {**MAPPING, "nonfinite": "missing"})["modalities"]
    assert [(m["missing"], m["nan"], m["inf"]) for m in modalities] == [(2, 0, 0), (1, 0, 0)]


def test_nan_beyond_the_length_does_not_make_a_sequence_missing(tmp_path: Path) -> None:
    a, lengths = np.ones((10, 4, 2)), np.full(10, 4)
    a[3, 2:], lengths[3], a[7, 1] = np.nan, 2, np.nan
    path = simple(tmp_path / "x.npz", a=a, steps=lengths)
    convert(path, tmp_path / "x.h5", {**MAPPING, "lengths": {"audio": "steps"}, "nonfinite": "missing"})
    store = FeatureStore(tmp_path / "x.h5")
    assert np.argwhere(~store.available()).tolist() == [[7, 1]]
    assert store.read(np.arange(10)).lengths["audio"].tolist() == [4, 4, 4, 2, 4, 4, 4, 0, 4, 4]


def test_values_beyond_float32_count_as_infinite(tmp_path: Path) -> None:
    t = np.ones((10, 3))
    t[4, 0] = 1e60
    with pytest.raises(ValueError, match="'t' has 1 in row 4"):
        convert(simple(tmp_path / "x.npz", t=t), tmp_path / "x.h5", MAPPING)


def test_nan_where_nothing_is_observed_is_no_error(tmp_path: Path) -> None:
    t, seen = np.ones((10, 3)), np.ones((10, 2), dtype=bool)
    t[2], seen[2, 0] = np.nan, False
    a, lengths = np.ones((10, 4, 2)), np.full(10, 4)
    a[3, 2:], lengths[3] = np.inf, 2
    path = simple(tmp_path / "x.npz", t=t, seen=seen, a=a, steps=lengths)
    convert(path, tmp_path / "x.h5", {**MAPPING, "available": "seen", "lengths": {"audio": "steps"}})
    batch = FeatureStore(tmp_path / "x.h5").read(np.arange(10))
    assert all(torch.isfinite(x).all() for x in batch.features.values())


# open_data.


def test_an_archive_is_converted_once(tmp_path: Path) -> None:
    source, cache = simple(tmp_path / "x.npz"), tmp_path / "cache" / "deep"
    first = open_data(source, cache, MAPPING)
    made = first.path.stat().st_mtime_ns
    assert first.path == cache / "x.h5"
    assert open_data(source, cache, MAPPING).path.stat().st_mtime_ns == made
    assert open_data(source, cache, {**MAPPING, "clip": {"text": 0.1}}).read(np.arange(10)).features["text"].max() < 0.2
    assert len(open_data(source, cache, MAPPING)) == 10
    simple(source, n=12)
    assert len(open_data(source, cache, MAPPING)) == 12
    (cache / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    assert len(open_data(source, cache, MAPPING)) == 12, "a broken cache is replaced"
    store = open_data(source, cache, MAPPING)
    content = bytearray(store.path.read_bytes())
    at = content.index(store.read(np.array([3])).features["text"].numpy().tobytes())
    content[at] ^= 1
    store.close()
    store.path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(f'{source} (converted into {store.path})')}: cannot read modal"
    ):
        open_data(source, cache, MAPPING).read(np.array([3]))


def test_integers_of_parts_that_only_a_float_would_hold(tmp_path: Path) -> None:
    n = 2
    signed, unsigned = np.array([2**53, 2**53 + 1]), np.array([0, 2**63], dtype=np.uint64)
    values = {f"{name}_{part}": np.ones((n, 2)) for name in ("a", "b") for part in ("train", "test")}
    np.savez(tmp_path / "x.npz", **values, who_train=signed, who_test=unsigned)
    mapping = {"modalities": {"a": "a_{split}", "b": "b_{split}"}, "splits": ["train", "test"], "group": "who_{split}"}
    with pytest.raises(ValueError, match="are int64, uint64 in the parts, expected integers that fit into 64 bits"):
        convert(tmp_path / "x.npz", tmp_path / "x.h5", mapping)


def test_a_store_is_opened_in_place(tmp_path: Path) -> None:
    convert(simple(tmp_path / "x.npz"), tmp_path / "x.h5", MAPPING)
    assert open_data(tmp_path / "x.h5", tmp_path / "cache").path == tmp_path / "x.h5"
    assert not (tmp_path / "cache").exists()


def test_files_that_are_neither(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("hello")
    with pytest.raises(ValueError, match="not a file that is known"):
        open_data(tmp_path / "x.npz", tmp_path)
    with pytest.raises(ValueError, match="not a folder that is known"):
        open_data(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_data(tmp_path / "none.npz", tmp_path)
