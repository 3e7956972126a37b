"""Pickles read as data: a machine of its own that knows arrays and plain containers, and can run nothing else."""

from __future__ import annotations

import codecs
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from modafill.data.npz import RATIO_FREE_BYTES
from modafill.data.texts import MAX_COPIES, check_texts

# A payload beyond this stays in the file until it is asked for.
INLINE_BYTES = 1 << 12
BLOCK_BYTES = 1 << 20
LONGEST_LINE = 1 << 16
LONGEST_INTEGER = 64
LONGEST_KEY = 64
# Containers, numbers, short texts, places of the memo; each takes some sixty bytes and may take one of the file.
MAX_OBJECTS = 1 << 24
# Rows of an array without values, as many as the objects they may be read as.
MAX_EMPTY_ROWS = 1 << 20


class PickledArray:
    """A numpy array in a pickle; its values are read from the file when asked for.

    Attributes:
        shape: as declared, and checked against the bytes that are there (those of Python 3's protocols 0 to 2, which
            are kept as text, when they are read).
        dtype: of the values; ``object`` for an array of texts or numbers.
    """

    shape: tuple[int, ...] = ()
    dtype: np.dtype = np.dtype(float)

    def __init__(self) -> None:
        self._fortran = False
        self._data: bytes | _Stored | list[Any] = b""

    def fill(self, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
        """Take what the pickle declares, if it is consistent."""
        if not isinstance(shape, tuple) or not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in shape):
            raise ValueError(f"an array has the shape {_short(shape)}")
        if not isinstance(dtype, _DType):
            raise ValueError(f"an array has the dtype {_short(dtype)}")
        self.shape, self.dtype, self._fortran = shape, dtype.numpy, bool(fortran) and len(shape) > 1
        count = math.prod(shape)
        if not count and math.prod(shape[: shape.index(0)]) > MAX_EMPTY_ROWS:
            raise ValueError(f"an array without values declares the shape {shape}")
        if self.dtype.hasobject:
            if not isinstance(data, list) or len(data) != count:
                raise ValueError(f"an array of {count} objects has {_short(data)}")
        else:
            data = data.encode("latin-1") if isinstance(data, str) else data
            if not isinstance(data, (bytes, _Stored)):
                raise ValueError(f"an array has {_short(data)} for its bytes")
            declared = self.nbytes
            if declared != len(data) and not (isinstance(data, _Stored) and data.text and len(data) >= declared):
                raise ValueError(f"an array declares {self.dtype} {shape}, {declared} bytes, but has {len(data)}")
        self._data = data

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def load(self) -> np.ndarray:
        """The whole array; one of objects as it is."""
        if isinstance(self._data, list):
            flat = np.empty(len(self._data), dtype=object)
            for i, value in enumerate(self._data):
                flat[i] = value
        else:
            stored = self._data.read_all(self.nbytes) if isinstance(self._data, _Stored) else self._data
            flat = np.frombuffer(stored, dtype=self.dtype)
        return flat.reshape(self.shape[::-1]).T if self._fortran else flat.reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """The declared size; that of the references for an array of objects."""
        return self.dtype.itemsize * math.prod(self.shape)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """The array in blocks of ``rows`` along its first axis, with only one of them in memory."""
        if self._fortran or not isinstance(self._data, _Stored):
            whole = self.load()
            yield from (whole[start : start + rows] for start in range(0, len(whole), rows))
            return
        tail = self.shape[1:]
        row_bytes = self.nbytes // max(1, len(self))
        sizes = [min(rows, len(self) - start) for start in range(0, len(self), rows)]
        pieces = self._data.pieces([n * row_bytes for n in sizes])
        for n, piece in zip(sizes, pieces, strict=True):
            yield np.frombuffer(piece, dtype=self.dtype).reshape(n, *tail)


class PickleFile:
    """What a pickle of arrays and plain containers holds. Nothing in the file is ever executed.

    Python 2's and 3's protocols 0 to 5. Names are those of numpy's arrays and Python's containers; any other is
    refused. Large arrays stay in the file until they are read (:class:`PickledArray`). Keys of dicts that Python 2
    wrote become ``str``.

    Attributes:
        path: the file.
        value: dicts, lists, tuples, sets, texts (``bytes`` from Python 2), numbers, None and :class:`PickledArray`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a pickle, truncated, one that refers to code, declared sizes that contradict each other or the
            file, more than :data:`MAX_OBJECTS` objects, or copies of more than
            :data:`~modafill.data.texts.MAX_COPIES` times the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file")
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from None
        machine = _Machine(self.path, self._file)
        try:
            self.value = machine.run()
        except (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error, OSError) as error:
            reason = str(error) if type(error) is ValueError else f"damaged ({type(error).__name__})"
            place = machine.at
            self.close()
            raise ValueError(f"{self.path}: not a readable pickle: {reason}, at byte {place}") from None
        except BaseException:
            self.close()
            raise

    def check_named(self, values: Iterable[Any]) -> None:
        """Raise ValueError where arrays come to far more than the file has, as each is stored once and named often."""
        most, found = max(RATIO_FREE_BYTES, MAX_COPIES * self.path.stat().st_size), 0
        for value in values:
            found += 1 + (value.nbytes if isinstance(value, PickledArray) else 0)
            if found > most:
                raise ValueError(f"{self.path}: its arrays are named so often that they come to more than {most} bytes")

    def close(self) -> None:
        """Close the file; arrays that were not read can no longer be."""
        self._file.close()

    def __enter__(self) -> PickleFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def looks_like_pickle(path: Path) -> bool:
    """Whether a file may be a pickle, truncated or not: by its protocol byte, or what older ones begin with."""
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 2:
            return False
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
    if start[0] == 0x80:
        return start[1] <= 5
    # A list, a dict or a tuple of them; what begins otherwise may be any text.
    return re.match(rb"\(*(\([dl]|[]}]q)", start) is not None or (start[:1] in b"(]}lc" and last == b".")


def as_text(value: Any) -> str:
    """A text of either Python's, or a number, as ``str``."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1")
    if isinstance(value, (str, _Stored)):
        check_texts(1, len(value))
    if isinstance(value, str) and "\0" in value:
        raise ValueError("expected a text, got one with zero bytes")
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"expected a text, got {_short(value)}")


class _Stored:
    """Bytes left in a file; ``text``: UTF-8 of characters that each stand for a byte."""

    def __init__(self, path: Path, file: Any, start: int, length: int, *, text: bool = False) -> None:
        self.path, self.file, self.start, self.length, self.text = path, file, start, length, text

    def __len__(self) -> int:
        return self.length

    def read_all(self, size: int) -> bytes:
        return b"".join(self.pieces([size]))

    def pieces(self, sizes: list[int]) -> Iterator[bytes]:
        """The payload, whole, in pieces of these sizes."""
        ready, at = bytearray(), 0
        decoder = codecs.getincrementaldecoder("utf-8")()
        for size in sizes:
            while len(ready) < size and at < self.length:
                n = min(self.length - at, max(BLOCK_BYTES, 0 if self.text else size - len(ready)))
                raw = self._pread(at, n)
                at += n
                ready += decoder.decode(raw, at == self.length).encode("latin-1") if self.text else raw
            if len(ready) < size:
                raise ValueError(f"{self.path}: an array has {len(ready)} bytes where {size} were declared")
            yield bytes(ready[:size])
            del ready[:size]
        if ready or at < self.length:
            raise ValueError(f"{self.path}: an array has more bytes than declared")

    def _pread(self, at: int, size: int) -> bytes:
        data = os.pread(self.file.fileno(), size, self.start + at)
        while len(data) < size:
            more = os.pread(self.file.fileno(), size - len(data), self.start + at + len(data))
            if not more:
                raise ValueError(f"{self.path}: truncated while it was read")
            data += more
        return data


class _DType:
    """A numpy dtype under construction."""

    def __init__(self, code: Any) -> None:
        code = as_text(code)
        if not re.fullmatch(r"[|<>=]?(f[248]|[iu][1248]|b1|\?|[SU]\d{1,6}|O[48]?)", code):
            raise ValueError(f"an array has the dtype {_short(code)}, expected numbers or texts")
        self.code = re.sub("O[48]", "O", code.lstrip("|<>="))

    order = "<"

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise ValueError("an array has a dtype with fields, expected numbers or texts")
        order = as_text(state[1])
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"an array has the byte order {_short(order)}")
        self.order = order

    @property
    def numpy(self) -> np.dtype:
        return np.dtype(self.code if self.code in ("O", "?", "b1") else self.order + self.code)


class _Name:
    """A name that a pickle refers to."""

    def __init__(self, module: str, name: str) -> None:
        self.text = f"{module}.{name}"
        module = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        self.build = _NAMES.get(f"{module}.{name}")
        if self.build is None:
            raise ValueError(f"it refers to {_short(self.text)}, which is not data; refused, nothing was run")


def _ndarray(kind: Any, shape: Any, code: Any) -> PickledArray:
    return PickledArray()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    array = PickledArray()
    array.fill(shape, dtype, order == "F", data)
    return array


def _scalar(dtype: Any, data: Any = b"") -> Any:
    array = PickledArray()
    array.fill((), dtype, False, data)
    return array.load().item()


def _encode(text: Any, encoding: Any = "latin1") -> Any:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes are encoded as {_short(encoding)}, expected latin1")
    if isinstance(text, str):
        return text.encode("latin-1")
    if isinstance(text, _Stored) and text.text:
        return text
    raise ValueError(f"bytes are made of {_short(text)}")


def _mapping(*pairs: Any) -> dict[Any, Any]:
    return {_key(k): v for k, v in (pairs[0] if pairs and isinstance(pairs[0], (list, tuple)) else ())}


_NAMES: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": _ndarray,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy.ndarray": lambda *_: PickledArray(),
    "numpy.dtype": lambda code, *_: _DType(code),
    "_codecs.encode": _encode,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": _mapping,
    "builtins.list": lambda items=(): list(_items(items)),
    "builtins.tuple": lambda items=(): tuple(_items(items)),
    "builtins.set": lambda items=(): {_key(item) for item in _items(items)},
    "builtins.frozenset": lambda items=(): {_key(item) for item in _items(items)},
    "builtins.bytes": lambda data=b"": data.encode("latin-1") if isinstance(data, str) else data,
    "builtins.bytearray": lambda data=b"", *_: _encode(data) if isinstance(data, str) else data,
}


def _items(value: Any) -> Any:
    if not isinstance(value, (list, tuple, set)):
        raise ValueError(f"a container is made of {_short(value)}")
    return value


def _key(value: Any) -> Any:
    """A key of a dict or an item of a set."""
    # To hash a tuple of tuples may overflow the stack or never end; long ones and large integers collide at will.
    parts = value if isinstance(value, tuple) else (value,)
    plain = all(isinstance(part, (str, bytes, int, float, type(None))) for part in parts)
    if not plain or len(parts) > LONGEST_KEY or any(isinstance(n, int) and abs(n) >= 1 << 64 for n in parts):
        raise ValueError(
            f"a key is {type(value).__name__}, expected a text, a number of 64 bits or a flat tuple of up to "
            f"{LONGEST_KEY} such"
        )
    return as_text(value) if isinstance(value, bytes) else value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 80 else text[:80] + "…"


_MARK = object()


class _Machine:
    """Pickle's stack machine, without any opcode that would call or build something that is not data."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.objects = self.copied = 0

    @property
    def at(self) -> int:
        return self.file.tell()

    def run(self) -> Any:
        read, operations, push = self.file.read, _OPERATIONS, self.stack.append
        while (code := read(1)) != b".":
            operation = operations.get(code)
            if operation is None:
                raise ValueError("truncated" if not code else f"the opcode {code!r} is none of data")
            value = operation(self)
            if value is not _NOTHING:
                self.count()
                push(value)
        if len(self.stack) != 1:
            raise ValueError(f"it ends with {len(self.stack)} values on the stack")
        return self.pop()

    def count(self, n: int = 1) -> None:
        self.objects += n
        if self.objects > MAX_OBJECTS:
            raise ValueError(f"more than {MAX_OBJECTS} objects")

    def charge(self, arguments: Iterable[Any]) -> None:
        """Count what may be copied: items as objects, and bytes."""
        for value in arguments:
            if isinstance(value, (list, tuple, set, dict)):
                self.count(len(value))
            elif isinstance(value, (str, bytes, _Stored)):
                self.copied += len(value)
        if self.copied > MAX_COPIES * self.size:
            raise ValueError(f"it copies more than {MAX_COPIES} times the {self.size} bytes of the file")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark stands where a value should")
        return value

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"expected a {kind.__name__}, got {_short(self.stack[-1])}")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a mark is absent")
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def take(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) != size:
            raise ValueError("truncated")
        return data

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> bytes:
        text = self.file.readline(LONGEST_LINE)
        if not text.endswith(b"\n"):
            raise ValueError("truncated, or a line is too long")
        return text[:-1].removesuffix(b"\r")

    def long_line(self) -> bytes:
        """A line of protocol 0, which may be the bytes of an array."""
        text = self.file.readline()
        if not text.endswith(b"\n"):
            raise ValueError("truncated")
        return text.rstrip(b"\r\n")

    def payload(self, layout: str, *, text: bool) -> Any:
        """Bytes or text of a length that comes first; left in the file where long."""
        length = self.number(layout)
        left = self.size - self.at
        if not 0 <= length <= left:
            raise ValueError(f"truncated: {length} bytes are declared, {left} are left")
        if length <= INLINE_BYTES:
            data = self.take(length)
            return data.decode("utf-8", "surrogatepass") if text else data
        stored = _Stored(self.path, self.file, self.at, length, text=text)
        self.file.seek(length, os.SEEK_CUR)
        return stored

    def quoted(self) -> Any:
        """A text of protocol 0, as Python 2 wrote it."""
        line = self.long_line()
        if len(line) < 2 or line[:1] not in b"'\"" or line[-1:] != line[:1]:
            raise ValueError("a text is not in quotes")
        return line[1:-1].decode("unicode_escape").encode("latin-1")

    def integer(self, line: bytes) -> int:
        if len(line) > LONGEST_INTEGER:
            raise ValueError(f"an integer of {len(line)} digits")
        return int(line.removesuffix(b"L"))

    def long(self, size: int) -> int:
        if not 0 <= size <= LONGEST_INTEGER:
            raise ValueError(f"an integer of {size} bytes")
        return int.from_bytes(self.take(size), "little", signed=True)

    def call(self) -> Any:
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ValueError(f"it calls {_short(name)}, which is not data; refused, nothing was run")
        assert name.build is not None
        self.charge(arguments)
        return name.build(*arguments)

    def build(self) -> Any:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, PickledArray) and isinstance(state, tuple) and len(state) in (4, 5):
            self.charge(state[-1:])
            target.fill(*state[-4:])
        elif isinstance(target, _DType):
            target.set_state(state)
        else:
            raise ValueError(f"it sets the state of {_short(target)}, which is not data; refused, nothing was run")
        return _NOTHING

    def set_items(self, items: list[Any]) -> Any:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError("a key is without its value")
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
        return _NOTHING

    def remember(self, place: int) -> Any:
        if place not in self.memo:
            self.count()
        self.memo[place] = self.stack[-1]
        return _NOTHING

    def name(self) -> _Name:
        name, module = self.pop(), self.pop()
        return _Name(as_text(module), as_text(name))


_NOTHING = object()


def _do(action: Callable[[_Machine], Any]) -> Callable[[_Machine], Any]:
    """An operation that leaves nothing new on the stack."""

    def operation(machine: _Machine) -> Any:
        action(machine)
        return _NOTHING

    return operation


def _line_value(machine: _Machine) -> Any:
    line = machine.line()
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else machine.integer(line)


def _text_name(machine: _Machine) -> _Name:
    module = machine.line().decode()
    return _Name(module, machine.line().decode())


def _pop_pair(machine: _Machine) -> list[Any]:
    value = machine.pop()
    return [machine.pop(), value]


def _pop_tuple(count: int) -> Callable[[_Machine], Any]:
    def operation(machine: _Machine) -> Any:
        return tuple([machine.pop() for _ in range(count)][::-1])

    return operation


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _extend(machine: _Machine) -> None:
    items = machine.pop_to_mark()
    machine.top(list).extend(items)


def _add(machine: _Machine) -> None:
    items = machine.pop_to_mark()
    machine.top(set).update(map(_key, items))


def _pairs(machine: _Machine) -> dict[Any, Any]:
    items = machine.pop_to_mark()
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


_OPERATIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _do(lambda m: m.take(1)),
    b"\x95": _do(lambda m: m.take(8)),
    b"(": lambda m: _MARK,
    b"0": _do(lambda m: m.stack.pop()),
    b"1": _do(lambda m: m.pop_to_mark()),
    b"2": lambda m: m.top(object),
    b"N": lambda m: None,
    b"\x88": lambda m: True,
    b"\x89": lambda m: False,
    b"I": _line_value,
    b"L": lambda m: m.integer(m.line()),
    b"J": lambda m: m.number("<i"),
    b"K": lambda m: m.number("<B"),
    b"M": lambda m: m.number("<H"),
    b"\x8a": lambda m: m.long(m.number("<B")),
    b"\x8b": lambda m: m.long(m.number("<i")),
    b"F": lambda m: float(m.line()),
    b"G": lambda m: m.number(">d"),
    b"S": lambda m: m.quoted(),
    b"T": lambda m: m.payload("<i", text=False),
    b"U": lambda m: m.payload("<B", text=False),
    b"V": lambda m: m.long_line().decode("raw-unicode-escape"),
    b"X": lambda m: m.payload("<I", text=True),
    b"\x8c": lambda m: m.payload("<B", text=True),
    b"\x8d": lambda m: m.payload("<Q", text=True),
    b"B": lambda m: m.payload("<I", text=False),
    b"C": lambda m: m.payload("<B", text=False),
    b"\x8e": lambda m: m.payload("<Q", text=False),
    b"\x96": lambda m: m.payload("<Q", text=False),
    b"]": lambda m: [],
    b")": lambda m: (),
    b"}": lambda m: {},
    b"\x8f": lambda m: set(),
    b"l": lambda m: m.pop_to_mark(),
    b"t": lambda m: tuple(m.pop_to_mark()),
    b"d": _pairs,
    b"\x91": lambda m: set(map(_key, m.pop_to_mark())),
    b"\x85": _pop_tuple(1),
    b"\x86": _pop_tuple(2),
    b"\x87": _pop_tuple(3),
    b"a": _do(_append),
    b"e": _do(_extend),
    b"\x90": _do(_add),
    b"s": lambda m: m.set_items(_pop_pair(m)),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"g": lambda m: m.memo[m.integer(m.line())],
    b"h": lambda m: m.memo[m.number("<B")],
    b"j": lambda m: m.memo[m.number("<I")],
    b"p": lambda m: m.remember(m.integer(m.line())),
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"c": _text_name,
    b"\x93": lambda m: m.name(),
    b"R": lambda m: m.call(),
    b"\x81": lambda m: m.call(),
    b"b": lambda m: m.build(),
}
