"""Pickles read as data, against Python's own."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from support.foreign import python2_pickle

from modafill.data.readers import pickles
from modafill.data.readers.pickles import PickledArray, PickleFile, looks_like_pickle


def read(path: Path, content: bytes) -> Any:
    """What a pickle holds, its arrays loaded."""
    path.write_bytes(content)
    assert looks_like_pickle(path)
    with PickleFile(path) as file:
        return loaded(file.value)


def loaded(value: Any) -> Any:
    if isinstance(value, PickledArray):
        array = value.load()
        pieces = list(value.blocks(3)) if array.ndim and len(array) else [array]
        np.testing.assert_array_equal(np.concatenate(pieces) if array.ndim and len(array) else array, array)
        return array
    if isinstance(value, dict):
        return {key: loaded(item) for key, item in value.items()}
    return type(value)(map(loaded, value)) if isinstance(value, (list, tuple)) else value


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, np.ndarray):
        # Python's own turns some, not all, to the machine's byte order.
        assert got.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(got) is type(expected)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    else:
        assert type(got) is type(expected)
        assert got == expected or got != got


DTYPES = st.sampled_from(["<f4", ">f4", "<f8", "<f2", "<i8", "|u1", "|b1", "<U3", "|S4"])
ARRAYS = DTYPES.flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary()
)
VALUES = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(VALUES, st.integers(0, 5))
def test_everything_comes_back_as_from_pythons_own(tmp_path_factory: Any, value: Any, protocol: int) -> None:
    path = tmp_path_factory.mktemp("p") / "x.pkl"
    content = pickle.dumps([value], protocol)
    assert_same(read(path, content), pickle.loads(content))


@pytest.mark.parametrize("protocol", range(6))
def test_large_arrays_stay_in_the_file(tmp_path: Path, protocol: int) -> None:
    random = np.random.default_rng(0)
    value = {
        "c": random.normal(size=(700, 900)),
        "fortran": np.asfortranarray(random.normal(size=(300, 500)).astype(np.float32)),
        "long text": "äß" * 5000,
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    tracemalloc.start()
    with PickleFile(path) as file:
        _after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20 or protocol == 0, "whose arrays are lines of text"
        array = file.value["c"]
        assert array.shape == (700, 900)
        np.testing.assert_array_equal(np.concatenate(list(array.blocks(128))), value["c"])
        np.testing.assert_array_equal(file.value["fortran"].load(), value["fortran"])
        tracemalloc.start()
        for _ in array.blocks(10):
            pass
        assert tracemalloc.get_traced_memory()[1] < 6 << 20, "a block at a time"
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", [0, 2])
def test_python_2(tmp_path: Path, protocol: int) -> None:
    value = {
        "train": {
            "x": np.arange(6000, dtype=np.float32).reshape(60, 100) - 50,
            "id": [("v", "1.5", 2, 0.25, True, None)],
        },
        "names": np.array([b"ab", "ä".encode()], dtype=object),
        "raw": bytes(range(256)),
    }
    content = python2_pickle(value, protocol)
    with_python = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(with_python[b"train"][b"x"], value["train"]["x"])
    got = read(tmp_path / "x.pkl", content)
    assert list(got) == ["train", "names", "raw"], "keys are str"
    assert_same(got["train"]["x"], value["train"]["x"])
    assert got["train"]["id"] == with_python[b"train"][b"id"]
    assert got["names"].tolist() == [b"ab", "ä".encode()]
    assert got["raw"] == bytes(range(256))


def test_containers_of_the_standard_library(tmp_path: Path) -> None:
    counts = collections.defaultdict(list, {"a": [1]})
    value = (
        collections.OrderedDict([("b", 1), ("a", 2)]),
        counts,
        {1, 2},
        frozenset([3]),
        np.float32(1.5),
        np.int64(7),
    )
    for protocol in range(6):
        got = read(tmp_path / "x.pkl", pickle.dumps(value, protocol))
        assert got == ({"b": 1, "a": 2}, {"a": [1]}, {1, 2}, {3}, 1.5, 7)
    shared = [1]
    assert read(tmp_path / "x.pkl", pickle.dumps([shared, shared])) == [[1], [1]]
    cycle: list[Any] = []
    cycle.append(cycle)
    with PickleFile(write(tmp_path / "c.pkl", pickle.dumps(cycle))) as file:
        assert file.value[0] is file.value


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_named_and_never_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path / "x.pkl", pickle.dumps({"train": Touches(mark)}, protocol))
    with pytest.raises(ValueError, match=r"posix\.system, which is not data; refused, nothing was run"):
        PickleFile(path)
    assert not mark.exists()
    assert pickle.load(open(path, "rb"))["train"] == 0  # noqa: SIM115
    assert mark.exists(), "Python's own reader does run it"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", r"builtins\.eval, which is not data"),
        (b"cbuiltins\ngetattr\n(tR.", r"builtins\.getattr, which is not data"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.", r"builtins\.exec"),
        (b"(S'ls'\nios\nsystem\n.", "opcode b'i' is none of data"),
        (b"P1\n.", "opcode b'P'"),
        (b"\x80\x02\x82\x01.", r"opcode b'\\x82'"),
        (b"]q\x00}b.", "sets the state of list"),
        (b"(lp0\n", "truncated"),
        (b"\x80\x04X\xff\xff\xff\xffabc.", "4294967295 bytes are declared, 4 are left"),
        (b"\x80\x05\x8e" + struct.pack("<Q", 1 << 62) + b"abc.", "are declared, 4 are left"),
        (b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".", "an integer of 1073741824 bytes"),
        (b"(lp" + b"9" * 100 + b"\n.", "an integer of 100 digits"),
        (b"\x80\x02]t.", "damaged|a mark is absent"),
        (b"(.", "a mark stands where a value should"),
        (b"\x80\x02]].", "ends with 2 values"),
        (b"\x80\x02]]K\x01s.", "expected a dict, got list"),
        (b"\x80\x02}]K\x01s.", "a key is list, expected a text, a number of 64 bits or a flat tuple of up to 64 such"),
        (b"\x80\x02h\x05.", "KeyError"),
        (b"\x80\x02" + b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8K\x00K\x01tR.", "expected numbers or texts"),
    ],
)
def test_malformed(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PickleFile(write(tmp_path / "x.pkl", content))


# To hash the first overflows the stack; the second is 300 bytes and has 2^100 leaves.
UNHASHABLE = {
    "deep": b"N" + b"\x85" * 200_000,
    "wide": b"N" + b"q\x00h\x00\x86" * 100,
    "long": b"(" + b"N" * 1000 + b"t",
    "array": b"cnumpy\nndarray\n)R",
    "large": b"\x8a\x0a" + b"\x01" * 10,
}
HASHING = {
    "setitem": b"}%sNs",
    "setitems": b"}(%sNu",
    "dict": b"(%sNd",
    "additems": b"\x8f(%s\x90",
    "frozenset opcode": b"(%s\x91",
    "ordered dict": b"ccollections\nOrderedDict\n(]%sN\x86atR",
    "dict of pairs": b"cbuiltins\ndict\n(]%sN\x86atR",
    "set": b"c__builtin__\nset\n(](%setR",
    "frozenset": b"c__builtin__\nfrozenset\n(](%setR",
}


@pytest.mark.parametrize("place", HASHING)
@pytest.mark.parametrize("key", UNHASHABLE)
def test_what_cannot_be_hashed_safely_is_no_key(tmp_path: Path, key: str, place: str) -> None:
    content = b"\x80\x04" + HASHING[place].replace(b"%s", UNHASHABLE[key]) + b"."
    with pytest.raises(ValueError, match=r"x\.pkl: not a readable pickle: a key is (tuple|PickledArray|int), expected"):
        PickleFile(write(tmp_path / "x.pkl", content))


def array_pickle(shape: str, dtype: str, data: bytes) -> bytes:
    """An array that declares what it likes, protocol 2."""
    head = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR(K\x01" + shape.encode(
        "latin-1"
    )
    dtype_code = (
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00"
        + dtype.encode()
        + b"K\x00K\x01tR(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return head + dtype_code + b"\x89B" + struct.pack("<I", len(data)) + data + b"tb."


def test_sizes_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    path = write(tmp_path / "ok.pkl", array_pickle("(K\x02t", "f4", b"\0" * 8))
    with PickleFile(path) as file:
        assert file.value.load().tolist() == [0, 0]
    tracemalloc.start()
    for shape in (
        "(J\xff\xff\xff\x7ft",
        "(J\xff\xff\xff\x7fJ\xff\xff\xff\x7fJ\xff\xff\xff\x7ft",
        "(J\xff\xff\xff\xfft",
    ):
        with pytest.raises(ValueError, match=r"but has 8|has the shape"):
            PickleFile(write(tmp_path / "x.pkl", array_pickle(shape, "f4", b"\0" * 8)))
    # numpy's constructor called with a size, which Python's own reader would allocate.
    huge = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(\x8a\x06"
        + (1 << 40).to_bytes(6, "little")
        + b"tC\x01btR."
    )
    with PickleFile(write(tmp_path / "h.pkl", huge)) as file:
        assert len(file.value) == 0
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_too_many_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OBJECTS", 1000)
    with pytest.raises(ValueError, match="more than 1000 objects"):
        PickleFile(write(tmp_path / "x.pkl", b"\x80\x02(" + b"]" * 2000 + b"t."))
    with pytest.raises(ValueError, match="more than 1000 objects"):
        PickleFile(write(tmp_path / "m.pkl", b"\x80\x04N" + b"\x94" * 2000 + b"."))


def test_truncated_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pkl", pickle.dumps(np.arange(100000.0)))
    with PickleFile(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(ValueError, match=r"x\.pkl: truncated while it was read"):
            file.value.load()


def test_text_for_bytes_must_be_as_long_as_declared(tmp_path: Path) -> None:
    """Protocols 0 to 2 keep bytes as text, whose length is known when it is read."""
    content = pickle.dumps(np.arange(10000, dtype=np.float32), 2)
    assert b"_codecs" in content
    short = content.replace(b"(M\x10'\x85", b"(M\x11'\x85").replace(b"M\x10'\x85", b"M\x0f'\x85")
    assert short != content
    with (
        PickleFile(write(tmp_path / "x.pkl", short)) as file,
        pytest.raises(ValueError, match="more bytes than declared"),
    ):
        file.value.load()


def test_tuples_of_texts_and_numbers_are_keys(tmp_path: Path) -> None:
    value = {("v", 1, 2.5, None, True, b"x"): 1, -(2**63): 2, None: 3, 1.5: 4, True: {("a",), ()}}
    assert read(tmp_path / "x.pkl", pickle.dumps(value)) == value


@pytest.mark.parametrize("value", [{"train": {"a": 1.5}}, [1, "a"], ({"a": 1}, {}), ([1], {})])
@pytest.mark.parametrize("protocol", [*range(6), "python 2, 0", "python 2, 2"])
def test_a_truncated_pickle_is_still_known_for_one(tmp_path: Path, value: Any, protocol: int | str) -> None:
    content = pickle.dumps(value, protocol) if isinstance(protocol, int) else python2_pickle(value, int(protocol[-1]))
    for size in range(3, len(content)):
        path = write(tmp_path / "x.pkl", content[:size])
        assert looks_like_pickle(path)
        with pytest.raises(ValueError, match=r"x\.pkl: not a readable pickle: .*, at byte"):
            PickleFile(path)


def test_not_a_pickle(tmp_path: Path) -> None:
    for content in (b"", b".", b"hello world.", b"clip\tlabel", b"(a text)", b"label", b"PK\x03\x04"):
        assert not looks_like_pickle(write(tmp_path / "x", content))
    with pytest.raises(FileNotFoundError, match="no such file"):
        PickleFile(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be read"):
        PickleFile(tmp_path)
