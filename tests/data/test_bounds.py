"""Small files that have a thing once and name it many times are refused before it fills the memory."""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support import foreign
from support.limits import error_within

from modafill.data import FeatureStore, StoreWriter, convert
from modafill.data.labels import check_label_spec
from modafill.data.mapping import load_mapping
from modafill.data.npz import NpzFile, load_npy
from modafill.data.readers import open_source, pickles, split_pickle
from modafill.data.readers.pickles import PickleFile

ROOM = 1 << 30
N = 3000
AB: dict[str, Any] = {
    "modalities": ["a", "b"],
    "widths": {"a": 1, "b": 1},
    "kinds": {"a": "vector", "b": "vector"},
}


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


def test_texts_of_a_store(tmp_path: Path) -> None:
    """Each of a million ids is the same megabyte, which the file has once."""
    path = tmp_path / "x.h5"
    x = np.zeros((N, 1), dtype=np.float32)
    with StoreWriter(path, **AB) as writer:
        writer.append({"a": x, "b": x}, ids=[str(i) for i in range(N)])
    with h5py.File(path, "r+") as file:
        del file["ids"]
        ids = file.create_dataset("ids", (N,), h5py.string_dtype(), chunks=(1,))
        ids[0] = "x" * (1 << 20)
        first = ids.id.get_chunk_info(0)
        with open(path, "rb") as raw:
            raw.seek(first.byte_offset)
            reference = raw.read(first.size)
        for i in range(1, N):
            ids.id.write_direct_chunk((i,), reference)
    with FeatureStore(path) as store:
        message = error_within(ROOM, store.ids)
    assert message.startswith(f"{path}: cannot read ids: it names its texts so often that they come to more than ")


@pytest.mark.parametrize("change", ["group", "texts", "intervals"])
def test_features_of_an_entry(tmp_path: Path, change: str) -> None:
    """What is no array of numbers is not read."""
    root = tmp_path / "x"
    foreign.write_csd(root)
    path = next(root.glob("*[Ll]abel*.csd"))
    with h5py.File(path, "r+") as file:
        data = file[f"{next(iter(file))}/data"]
        for entry in data.values():
            if change == "intervals":
                del entry["intervals"]
                entry["intervals"] = ["x"] * len(entry["features"])
                continue
            rows = len(entry["features"])
            del entry["features"]
            if change == "group":
                entry.create_group("features")
            else:
                entry.create_dataset("features", (rows, 4), h5py.string_dtype())[:] = "x"
    with pytest.raises(ValueError, match=f"{path}: "):
        convert(root, tmp_path / "x.h5")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archive_with_a_compression_that_is_unpacked_without_bounds(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.arange(4000.0))
        archive.writestr("a.npy", buffer.getvalue())
    with pytest.raises(ValueError, match=f"{path}: array 'a.npy' has compression {compression}, expected none or"):
        NpzFile(path)


def test_archive_whose_directory_lies_about_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(20 << 20))
    content = bytearray(path.read_bytes())
    size = zipfile.ZipFile(path).infolist()[0].compress_size
    at = content.rindex(struct.pack("<I", size))
    content[at : at + 4] = struct.pack("<I", 20 << 20)
    with pytest.raises(ValueError, match=f"{path}: declares {20 << 20} compressed bytes, but has {len(content)}"):
        NpzFile(write(path, bytes(content)))


@pytest.mark.parametrize("header", ["(" * 300, "-" * 60_000 + "1", "[" * 60_000])
def test_header_that_python_cannot_parse(tmp_path: Path, header: str) -> None:
    text = header.encode() + b"\n"
    path = write(tmp_path / "x.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text)
    with pytest.raises(ValueError, match=f"{path}: cannot be read"):
        load_npy(path)


def test_mapping_of_many_levels(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=f"{path}: not a JSON file"):
        load_mapping(path)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"classes": 10**9}, "expected 2 to 1000 quantiles"),
        ({"classes": 3, "round": 10**30}, "expected a whole number of decimals"),
        ({"classes": 3, "round": 0.5}, "expected a whole number of decimals"),
    ],
)
def test_numbers_of_a_label(spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_label_spec({"name": "y", "kind": "quantiles", **spec})


def test_windows_longer_than_memory(tmp_path: Path) -> None:
    x = np.zeros((N, 1), dtype=np.float32)
    with StoreWriter(tmp_path / "x.h5", **AB) as writer:
        writer.append({"a": x, "b": x}, groups={"g": np.zeros(N, np.int64)}, order=np.arange(N))
    with FeatureStore(tmp_path / "x.h5") as store, pytest.raises(ValueError, match="expected 1 to 16384 turns"):
        store.windowed(10**9)
