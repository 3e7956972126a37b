"""Small files that have a thing once and name it many times are refused before it fills the memory."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import foreign
from support.limits import error_within

from modafill.data import FeatureStore, convert
from modafill.data.readers import open_source, pickles, split_pickle
from modafill.data.readers.pickles import PickleFile

ROOM = 1 << 30
N = 3000


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def repeated(shared: bytes, use: bytes, times: int) -> bytes:
    """A pickle of a tuple: a value in place 0 of the memo, and what is made of it."""
    return b"\x80\x04(" + shared + b"q\x00" + use * times + b"t."


LIST = b"](" + b"N" * 100_000 + b"e"
PAIRS = b"](" + b"".join(b"K\x01N\x86" for _ in range(1000)) + b"e"
LINE = b"V" + b"x" * (1 << 20) + b"\n"
TEXTS = b"cnumpy\ndtype\n(X\x07\x00\x00\x00S999999K\x00K\x01tR"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
BYTES = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *((repeated(LIST, b"cbuiltins\n%s\nh\x00\x85R" % name, 20_000), "more than 1048576 objects")
          for name in (b"list", b"tuple")),
        (repeated(PAIRS, b"cbuiltins\ndict\nh\x00\x85R", 200_000), "more than 1048576 objects"),
        (repeated(LINE, b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R", 4000), "it copies more than 4 times"),
        (repeated(LINE, b"cbuiltins\nbytes\nh\x00\x85R", 4000), "it copies more than 4 times"),
        (repeated(LINE, b"cbuiltins\nbytearray\nh\x00\x85R", 4000), "it copies more than 4 times"),
        (repeated(b"B" + struct.pack("<I", 999_999) + b"x" * 999_999, b"cnumpy.core.multiarray\nscalar\n" + TEXTS +
                  b"h\x00\x86R", 4000), "it copies more than 4 times"),
        (repeated(LINE, ARRAY + b"(K\x01J\x00\x00\x10\x00\x85" + BYTES + b"\x89h\x00tb", 4000), "it copies more than"),
    ],
    ids=["list", "tuple", "dict", "encode", "bytes", "bytearray", "scalar", "array"],
)  # fmt: skip
def test_calls_of_a_pickle(tmp_path: Path, content: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OBJECTS", 1 << 20)
    path = write(tmp_path / "x.pkl", content)
    message = error_within(ROOM, lambda: PickleFile(path))
    assert re.match(rf"{path}: not a readable pickle: {reason}", message)


def one_part(protocol: int, **columns: Any) -> bytes:
    x = np.zeros((N, 1, 1), dtype=np.int8)
    labels = np.zeros(N)
    return pickle.dumps(
        {"train": {"text": x, "audio": x, "vision": x, "regression_labels": labels, **columns}}, protocol
    )


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"id": [["clip"] * 1000] * N}, "train/id: expected up to 64 texts for an id, got 1000"),
        ({"id": [["x" * 4000] * 64] * N}, "train/id: expected a text of up to 4096 characters, got one of 256063"),
        ({"id": ["x" * 1_000_000 + "$_$1"] * N}, "train/id: expected a text of up to 4096 characters, got one of 10"),
        ({"a_labels": ["x" * 1_000_000] * N}, "train/a_labels"),
        ({f"a{i}_labels": ["x" * 4096] * N for i in range(100)}, "its labels come to more than 268435456 bytes"),
        ({"labels": np.empty((1 << 34, 0), dtype="S1")}, r"without values declares the shape \(17179869184, 0\)"),
    ],
    ids=["row", "row of long texts", "id", "label", "labels", "array"],
)
def test_texts_of_a_pickle(
    tmp_path: Path, columns: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_pickle, "MAX_LABEL_BYTES", 1 << 28)
    for protocol in (0, 4):
        path = write(tmp_path / "x.pkl", one_part(protocol, **columns))
        assert re.match(rf"{path}: .*{reason}", error_within(ROOM, lambda path=path: open_source(path)))


def test_a_column_of_all_parts(tmp_path: Path) -> None:
    """Short texts become as wide as the longest."""
    x = np.zeros((100_000, 1, 1), dtype=np.int8)
    y = np.zeros(len(x))
    value = {
        "train": {"text": x, "audio": x, "vision": x, "regression_labels": y, "id": ["a"] * len(x)},
        "test": {"text": x[:1], "audio": x[:1], "vision": x[:1], "regression_labels": y[:1], "id": ["x" * 4000]},
    }
    path = write(tmp_path / "x.pkl", pickle.dumps(value))
    message = error_within(ROOM, lambda: open_source(path))
    assert message.startswith(f"{path}: expected a column of up to 134217728 characters, got ")


@pytest.mark.parametrize("wide, reason", [(5000, "one of 5000"), (4000, "got 100001 texts of up to 4000 each")])
def test_texts_of_an_archive(tmp_path: Path, wide: int, reason: str) -> None:
    def part(n: int, texts: Any) -> dict[str, Any]:
        return {"a": np.zeros((n, 1), np.float32), "b": np.zeros((n, 1), np.float32), "y": np.array(texts)}

    parts = {"train": part(100_000, ["a"] * 100_000), "test": part(1, ["x" * wide])}
    path = tmp_path / "x.npz"
    np.savez(path, **{f"{name}_{split}": x for split, part in parts.items() for name, x in part.items()})
    mapping = {
        "modalities": {"a": "a_{split}", "b": "b_{split}"},
        "splits": ["train", "test"],
        "label": {"name": "y_{split}", "kind": "class"},
    }
    message = error_within(ROOM, lambda: convert(path, tmp_path / "x.h5", mapping))
    assert message.startswith(f"{path}: arrays ['y_train', 'y_test']: expected a ")
    assert reason in message


def gcnet(root: Path, change: Callable[[tuple[Any, ...]], object]) -> Path:
    foreign.write_gcnet(root)
    path = next(root.glob("*.pkl"))
    value = pickle.loads(path.read_bytes())
    change(value)
    return write(path, pickle.dumps(value))


@pytest.mark.parametrize("shape", [(1 << 34, 0), (4, 1 << 34, 0)])
def test_labels_of_a_dialogue(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = gcnet(tmp_path / "x", lambda value: value[1].update(vid0=np.empty(shape)))
    assert error_within(ROOM, lambda: open_source(path)).startswith(f"{path}: ")


def test_utterances_of_many_dialogues(tmp_path: Path) -> None:
    def change(value: tuple[Any, ...]) -> None:
        shared, zeros = ["clip"] * 10_000, [0] * 10_000
        for video in range(20_000):
            value[0][video], value[1][video] = shared, zeros
            value[4].add(video)

    path = gcnet(tmp_path / "x", change)
    message = error_within(ROOM, lambda: open_source(path))
    assert message == f"{path}: 0 and 1 share one list of utterances, expected one for each"


@pytest.mark.parametrize("by", ["frame", "clip"])
def test_frames_of_a_clip(tmp_path: Path, by: str) -> None:
    root = tmp_path / "x"
    foreign.write_mintrec(root)
    frame = np.zeros((1, 100_000), dtype=np.float32)
    path = root / "video_data/video_feats.pkl"
    keys = list(pickle.loads(path.read_bytes()))
    value = {key: [frame] * (20_000 if by == "frame" else 100) for key in keys}
    write(path, pickle.dumps(value))
    message = error_within(ROOM, lambda: open_source(root))
    assert message == f"{path}: its arrays are named so often that they come to more than {1 << 26} bytes"


@pytest.mark.parametrize("column", [0, 4])
def test_texts_of_a_table(tmp_path: Path, column: int) -> None:
    root = tmp_path / "x"
    foreign.write_mintrec(root)
    row = ["S", "1", "1", "he said", "Care"]
    row[column] = "x" * 140_000
    lines = (root / "train.tsv").read_text().splitlines()
    lines += ["\t".join(row), *(f"S\t1\t{i}\t\tCare" for i in range(20_000))]
    (root / "train.tsv").write_text("\n".join(lines))
    message = error_within(ROOM, lambda: open_source(root))
    assert message.startswith(f"{root / 'train.tsv'}: line 26: expected a text of up to 4096 characters, got")


def test_what_is_long_but_no_column_is_read(tmp_path: Path) -> None:
    texts = ["x" * 200_000] * N
    x = np.ones((N, 1, 1), dtype=np.float32)
    ids = [f"clip{i}$_$" + "x" * 3000 for i in range(N)]
    value = {"train": {"text": x, "audio": x, "vision": x, "regression_labels": x[:, 0, 0], "id": ids}}
    value["train"]["raw_text"] = np.array(texts, dtype=object)
    for protocol in (0, 4):
        convert(write(tmp_path / "x.pkl", pickle.dumps(value, protocol)), tmp_path / "x.h5")
        with FeatureStore(tmp_path / "x.h5") as store:
            assert store.ids() == ids
