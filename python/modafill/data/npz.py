"""Reading ``.npz`` archives without trusting them: sizes are checked first, then arrays come in blocks."""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

# Deflate reaches 1032:1 on zeros; small arrays may, large ones of real features stay far below this.
MAX_RATIO = 200
RATIO_FREE_BYTES = 1 << 26
MAX_BYTES = 1 << 36


@dataclass(frozen=True)
class ArrayHeader:
    """Shape, dtype and order of an array in an archive."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool


def load_npy(path: Path) -> np.ndarray:
    """The array in an ``.npy`` file.

    Raises:
        ValueError: unreadable, Python objects, or a declared size that is not the file's.
    """
    try:
        with open(path, "rb") as file:
            header = _parse_header(file)
            _check_header(header, os.fstat(file.fileno()).st_size - file.tell())
            flat = np.frombuffer(file.read(), dtype=header.dtype)
            return flat.reshape(header.shape[::-1]).T if header.fortran else flat.reshape(header.shape)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _parse_header(stream: IO[bytes]) -> ArrayHeader:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"header version {version}, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream)
    except (SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(f"a malformed header ({type(error).__name__})") from None
    return ArrayHeader(shape, dtype, fortran and len(shape) > 1)


def _check_header(header: ArrayHeader, stored: int) -> None:
    if header.dtype.hasobject:
        raise ValueError("holds Python objects, which would run code to be loaded")
    # Python integers: a product of declared sizes may exceed 64 bits.
    declared = header.dtype.itemsize
    for size in header.shape:
        declared *= size
    if declared != stored or min(header.shape, default=0) < 0:
        raise ValueError(f"declares {header.dtype} {header.shape}, {declared} bytes, but has {stored}")


class NpzFile:
    """The arrays of an ``.npz`` file.

    Pickled objects are never loaded. Every declared size is compared with the archive's directory before anything is
    allocated.

    Attributes:
        path: the file.
        headers: array name → :class:`ArrayHeader`.

    Raises:
        ValueError: not an archive, damaged, object arrays, sizes that contradict each other, more than ``max_bytes`` in
            all, or a large array that shrinks more than :data:`MAX_RATIO` times (a decompression bomb).
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file")
        try:
            self._zip = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.path}: not a readable .npz file: {error}") from None
        try:
            self._check_sizes(max_bytes)
            self.headers = {name: self._read_header(name) for name in self._members()}
        except BaseException:
            self.close()
            raise
        if not self.headers:
            self.close()
            raise ValueError(f"{self.path}: the archive holds no arrays")

    def _members(self) -> list[str]:
        return [info.filename.removesuffix(".npy") for info in self._zip.infolist() if info.filename.endswith(".npy")]

    def _check_sizes(self, max_bytes: int) -> None:
        infos = self._zip.infolist()
        total = sum(info.file_size for info in infos)
        if total > max_bytes:
            raise ValueError(f"{self.path}: {total} bytes uncompressed, more than the limit of {max_bytes}")
        packed, size = sum(info.compress_size for info in infos), self.path.stat().st_size
        if packed > size:
            raise ValueError(f"{self.path}: declares {packed} compressed bytes, but has {size}")
        for info in infos:
            # Of the others, Python unpacks a whole chunk at a time, however large it becomes.
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{self.path}: array {info.filename!r} has compression {info.compress_type}, expected none or "
                    "deflate, as numpy writes"
                )
            if info.file_size > max(RATIO_FREE_BYTES, MAX_RATIO * info.compress_size):
                raise ValueError(
                    f"{self.path}: array {info.filename!r} grows from {info.compress_size} to {info.file_size} bytes, "
                    f"more than {MAX_RATIO} times: refused as a decompression bomb"
                )
        if len({info.filename for info in infos}) != len(infos):
            raise ValueError(f"{self.path}: two arrays have the same name")

    def _open(self, name: str) -> tuple[IO[bytes], ArrayHeader]:
        """A stream of an array's data, just behind its header."""
        stream = self._zip.open(f"{name}.npy")
        return stream, _parse_header(stream)

    def _read_header(self, name: str) -> ArrayHeader:
        with self._errors(name):
            stream, header = self._open(name)
            with stream:
                start = stream.tell()
        try:
            _check_header(header, self._zip.getinfo(f"{name}.npy").file_size - start)
        except ValueError as error:
            raise ValueError(f"{self.path}: array {name!r} {error}") from None
        return header

    def load(self, name: str) -> np.ndarray:
        """A whole array."""
        return next(self.blocks(name, max(1, self.headers[name].shape[0] if self.headers[name].shape else 1)))

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """An array in blocks of ``rows`` along its first axis; an empty or scalar array is one block.

        Only the block is in memory, unless the array is stored column by column (Fortran order).
        """
        header = self.headers[name]
        if not header.shape or header.fortran or 0 in header.shape:
            array = self._load_whole(name)
            for start in range(0, max(1, len(array)) if array.ndim else 1, rows):
                yield array[start : start + rows] if array.ndim else array
            return
        tail = header.shape[1:]
        row_bytes = header.dtype.itemsize * int(np.prod(tail, dtype=np.int64))
        with self._errors(name):
            stream, _ = self._open(name)
            with stream:
                for start in range(0, header.shape[0], rows):
                    n = min(rows, header.shape[0] - start)
                    data = stream.read(n * row_bytes)
                    if len(data) != n * row_bytes:
                        raise ValueError("it ends early")
                    yield np.frombuffer(data, dtype=header.dtype).reshape(n, *tail)
                # The checksum is compared only when the end of the member is met.
                stream.read(1)

    def _load_whole(self, name: str) -> np.ndarray:
        header = self.headers[name]
        with self._errors(name):
            stream, _ = self._open(name)
            with stream:
                flat = np.frombuffer(stream.read(), dtype=header.dtype)
        return flat.reshape(header.shape[::-1]).T if header.fortran else flat.reshape(header.shape)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path}: cannot read array {name!r}: {error}") from None

    def close(self) -> None:
        self._zip.close()

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
