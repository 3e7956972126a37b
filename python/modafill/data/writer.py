"""Writing a feature store, block by block, so that a reader sees either a whole file or none."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from modafill.data.labels import check_label_spec
from modafill.files import replacing, uninterrupted

FORMAT = "modafill-store"
VERSION = 1
# A shuffled read fetches whole chunks, a sequential one wants few of them.
CHUNK_BYTES = 1 << 18
CHUNK_ROWS = 4096


# What a key of the task must be, as a type and in words.
_TASK: dict[str, tuple[type, str]] = {
    "label": (dict, "a label specification"),
    "labels": (dict, "an object: name → label specification"),
    "group": (str, "the name of a group column"),
    "window": (int, "a whole number of turns"),
    "folds": (list, "a list of names of split columns"),
}


def check_task(task: Any) -> None:
    """Raise ValueError unless ``task`` is what :class:`StoreWriter` keeps with the data."""
    if not isinstance(task, dict):
        raise ValueError(f"task: got {task!r}, expected an object")
    for key, (kind, expected) in _TASK.items():
        if key in task and not isinstance(task[key], kind):
            raise ValueError(f"task: {key}: got {task[key]!r}, expected {expected}")
    for spec in [*([task["label"]] if "label" in task else []), *task.get("labels", {}).values()]:
        if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
            raise ValueError(f"task: got the label {spec!r}, expected a specification with the name of a column")
        try:
            check_label_spec(spec)
        except ValueError as error:
            raise ValueError(f"task: {error}") from None


def pack_texts(texts: Iterable[bytes]) -> bytes:
    """What the SHA-256 of a column of texts is taken of, block by block: no text has a zero byte."""
    return b"".join(text + b"\0" for text in texts)


class _Sink(io.RawIOBase):
    """Where HDF5 writes to. It crashes where a disk is full, so what fails is kept for :meth:`check` and forgotten.

    h5py drops some of what is raised in here, so whoever calls HDF5 does it :func:`~modafill.files.uninterrupted`.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed with the store)
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def truncate(self, size: int | None = None) -> int:
        try:
            return self.file.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def write(self, data: Any) -> int:
        left = memoryview(data)
        try:
            while len(left) and self.error is None:
                left = left[self.file.write(left) :]
        except OSError as error:
            self.error = error
        return len(data)

    def readinto(self, buffer: Any) -> int:
        found = self.file.readinto(buffer)
        # What could not be written is zeros.
        buffer[found:] = bytes(len(buffer) - found)
        return len(buffer)

    def check(self, path: Path) -> None:
        """Raise the first OSError there was."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, str(path)) from self.error


class StoreWriter:
    """Appends blocks of samples to a new feature store.

    The data go to a temporary file beside ``path``, which takes its place on :meth:`close`. Use it as a context
    manager: an exception removes the temporary file and leaves whatever stood at ``path``.

    Args:
        path: the store to create or replace (``.h5``).
        modalities: names, in the order of the columns of ``available``.
        widths: name → D.
        kinds: name → ``"vector"`` or ``"sequence"``.
        steps: name → T for sequences that all have T steps; other sequences are ragged.
        task: JSON-able description kept with the data: ``label`` (see :class:`~modafill.data.Labels`), ``window``,
            ``group``.
        columns: name → D names of feature columns.
        dtype: of the stored values, float32 or float16.

    Attributes:
        notes: flaws of what the samples come from and what was made of them, kept with the data; may be set until
            :meth:`close`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        modalities: Sequence[str],
        widths: Mapping[str, int],
        kinds: Mapping[str, str],
        steps: Mapping[str, int] | None = None,
        task: Mapping[str, Any] | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
        dtype: str = "float32",
    ) -> None:
        self.path = Path(path)
        self.modalities = tuple(modalities)
        self.widths = {name: int(widths[name]) for name in self.modalities}
        self.kinds = {name: kinds[name] for name in self.modalities}
        self.steps = dict(steps or {})
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities: got {list(modalities)}, expected distinct names")
        for name in self.modalities:
            _check_name("modalities", name)
            if self.kinds[name] not in ("vector", "sequence"):
                raise ValueError(f"kinds[{name!r}]: got {self.kinds[name]!r}, expected 'vector' or 'sequence'")
            if self.widths[name] < 1 or self.steps.get(name, 1) < 1:
                raise ValueError(f"widths[{name!r}]: got {self.widths[name]}, expected at least 1 column and 1 step")
        task = dict(task or {})
        check_task(task)
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype: got {dtype!r}, expected 'float32' or 'float16'")
        self.notes: list[str] = []
        self._rows = 0
        self._columns_given: set[str] | None = None
        self._digests: defaultdict[str, Any] = defaultdict(hashlib.sha256)
        self._replacing = ExitStack()
        temporary = self._replacing.enter_context(replacing(self.path))
        try:
            with uninterrupted():
                # The newer format has checksums for its own structures.
                self._sink = _Sink(temporary)
                self._file = h5py.File(self._sink, "w", libver=("v110", "v110"))
                self._file.attrs.update(format=np.bytes_(FORMAT), version=VERSION)
                self._describe("modalities", self.modalities)
                self._describe("task", task)
                for name in self.modalities:
                    self._create_modality(name, dtype, (columns or {}).get(name))
                self._grow("available", np.zeros((0, len(self.modalities)), dtype=bool))
        except BaseException:
            self.abort()
            raise

    def _describe(self, name: str, value: Any) -> None:
        # Of fixed length: it lies in the header, which has a checksum.
        self._file.attrs[name] = np.bytes_(json.dumps(value).encode())

    def _create_modality(self, name: str, dtype: str, columns: Sequence[str] | None) -> None:
        tail: tuple[int, ...] = (self.widths[name],)
        if name in self.steps:
            tail = (self.steps[name], *tail)
        self._grow(f"modalities/{name}/values", np.zeros((0, *tail), dtype=dtype))
        if self.kinds[name] == "sequence" and name not in self.steps:
            self._grow(f"modalities/{name}/offsets", np.zeros(1, dtype=np.int64))
        if columns is not None:
            if len(columns) != self.widths[name]:
                raise ValueError(f"columns[{name!r}]: got {len(columns)} names, expected {self.widths[name]}")
            self._grow(f"modalities/{name}/columns", np.asarray(columns, dtype=object))

    def append(
        self,
        features: Mapping[str, np.ndarray | Sequence[np.ndarray]],
        *,
        available: np.ndarray | None = None,
        lengths: Mapping[str, np.ndarray] | None = None,
        generated: np.ndarray | None = None,
        ids: Sequence[str] | np.ndarray | None = None,
        labels: Mapping[str, np.ndarray] | None = None,
        groups: Mapping[str, np.ndarray] | None = None,
        splits: Mapping[str, np.ndarray] | None = None,
        order: np.ndarray | None = None,
    ) -> None:
        """Append ``n`` samples.

        Every block must bring the same optional columns as the first one.

        Args:
            features: name → ``[n, D]`` for a vector, ``[n, T, D]`` for a sequence (of ``lengths[name]`` valid steps
                each), or a list of ``n`` arrays ``[t, D]`` for a ragged one. Values of entries that are neither
                available nor generated are not kept.
            available: bool ``[n, M]``, True = observed (default: all).
            lengths: name → int ``[n]`` for padded ragged sequences (default: all T steps).
            generated: bool ``[n, M]``: the value was filled in, not observed; disjoint from ``available``.
            ids: ``n`` strings, unique by convention (default: the row number).
            labels: name → ``[n, …]`` numbers or ``[n]`` strings.
            groups: name → ``[n]``, such as the dialogue or the speaker.
            splits: name → ``[n]`` strings, such as ``train``.
            order: ``[n]`` numbers, the place of a sample in its group.

        Raises:
            ValueError: a shape or name does not fit; nothing of the block is promised to be in the file, so the writer
                must then be aborted (leaving the ``with`` block does so).
        """
        if set(features) != set(self.modalities):
            raise ValueError(f"features: got {list(features)}, expected {list(self.modalities)}")
        n = len(features[self.modalities[0]])
        if available is None:
            available = np.ones((n, len(self.modalities)), dtype=bool)
        for what, mask in (("available", available), ("generated", generated)):
            if mask is not None and (mask.dtype != bool or mask.shape != (n, len(self.modalities))):
                raise ValueError(f"{what}: got {mask.dtype} {mask.shape}, expected bool {(n, len(self.modalities))}")
        if generated is not None and (available & generated).any():
            raise ValueError("generated: got entries that are also available, expected only missing ones")
        extra = {"ids": np.asarray(ids if ids is not None else np.arange(self._rows, self._rows + n).astype(str))}
        if generated is not None:
            extra["generated"] = generated
        if order is not None:
            extra["order"] = np.asarray(order)
        for kind, named in (("labels", labels), ("groups", groups), ("splits", splits)):
            for name, values in (named or {}).items():
                _check_name(kind, name)
                extra[f"{kind}/{name}"] = np.asarray(values)
        if self._columns_given is None:
            self._columns_given = set(extra)
        if set(extra) != self._columns_given:
            raise ValueError(
                f"append: got the columns {sorted(extra)}, expected {sorted(self._columns_given)} as before"
            )
        for column, values in extra.items():
            if len(values) != n:
                raise ValueError(f"{column}: got {len(values)} entries, expected {n}")

        kept = available if generated is None else available | generated
        with uninterrupted():
            for m, name in enumerate(self.modalities):
                self._append_values(name, features[name], kept[:, m], (lengths or {}).get(name), n)
            self._grow("available", available)
            for column, values in extra.items():
                self._grow(column, values)
            self._rows += n
            self._sink.check(self.path)

    def _append_values(
        self, name: str, values: np.ndarray | Sequence[np.ndarray], kept: np.ndarray, lengths: np.ndarray | None, n: int
    ) -> None:
        width, path = self.widths[name], f"modalities/{name}"
        ragged = self.kinds[name] == "sequence" and name not in self.steps
        if not ragged:
            array = np.asarray(values)
            tail = (self.steps[name], width) if name in self.steps else (width,)
            if array.shape != (n, *tail):
                raise ValueError(f"features[{name!r}]: got shape {array.shape}, expected {(n, *tail)}")
            self._grow(f"{path}/values", np.where(kept.reshape(n, *[1] * len(tail)), array, 0))
            return
        if lengths is None:
            lengths = np.array([len(row) for row in values], dtype=np.int64)
        if len(values) != n or len(lengths) != n:
            raise ValueError(f"features[{name!r}]: got {len(values)} rows and {len(lengths)} lengths, expected {n}")
        frames = []
        for i in np.flatnonzero(kept).tolist():
            row = np.asarray(values[i])
            if row.ndim != 2 or row.shape[1] != width or not 1 <= lengths[i] <= len(row):
                raise ValueError(
                    f"features[{name!r}]: got shape {row.shape} and length {lengths[i]} in row {self._rows + i}, "
                    f"expected [T, {width}] and a length in 1…T"
                )
            frames.append(row[: lengths[i]])
        offsets = self._file[f"{path}/offsets"]
        if frames:
            self._grow(f"{path}/values", np.concatenate(frames))
        self._grow(f"{path}/offsets", offsets[-1] + np.cumsum(np.where(kept, lengths, 0), dtype=np.int64))

    def _grow(self, path: str, values: np.ndarray) -> None:
        """Append to a data set, making it of the dtype of its first block; every later value has to fit in."""
        text = values.dtype.kind in "SUO"
        if not text and values.dtype.kind not in "biuf":
            raise ValueError(f"{path}: got {values.dtype}, expected numbers or texts")
        if text:
            values = _encode(path, values)
            self._digests[path].update(pack_texts(values.reshape(-1)))
        if path in self._file:
            data = self._file[path]
            if data.shape[1:] != values.shape[1:]:
                raise ValueError(
                    f"{path}: got shape {values.shape}, expected [n, {', '.join(map(str, data.shape[1:]))}]"
                )
            if text != (data.dtype.kind == "O"):
                got, expected = ("texts", "numbers") if text else (values.dtype, "texts")
                raise ValueError(f"{path}: got {got}, expected {expected} as before")
            if not text:
                values = _fit(path, values, data.dtype)
            start = len(data)
            data.resize(start + len(values), axis=0)
            if len(values):
                data[start:] = values
            return
        row_bytes = 16 if text else values.dtype.itemsize * int(np.prod(values.shape[1:]))
        self._file.create_dataset(
            path,
            data=values,
            dtype=h5py.string_dtype() if text else values.dtype,
            maxshape=(None, *values.shape[1:]),
            chunks=(max(1, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes)), *values.shape[1:]),
            # A damaged chunk is an error for who reads it, not other values; level 0 does not compress, but has zlib's
            # checksum, which a chunk of zeros does not fit. Texts lie elsewhere, and have a digest.
            **({} if text else {"compression": "gzip", "compression_opts": 0}),
        )

    def close(self) -> None:
        """Finish the file and put it in its place.

        Raises:
            ValueError: no sample was appended.
        """
        if not self._rows:
            self.abort()
            raise ValueError(f"{self.path}: no samples were written, expected at least one")
        try:
            with uninterrupted():
                self._describe("notes", self.notes)
                for path, digest in self._digests.items():
                    self._file[path].attrs["sha256"] = np.bytes_(digest.hexdigest())
                self._file.close()
                self._sink.check(self.path)
                self._sink.file.close()
        except BaseException:
            self.abort()
            raise
        self._replacing.close()

    def abort(self) -> None:
        """Throw away what was written."""
        try:
            with uninterrupted():
                if hasattr(self, "_file"):
                    self._file.close()
                if hasattr(self, "_sink"):
                    self._sink.file.close()
        finally:
            # Told of an error, it removes the temporary file instead of moving it.
            self._replacing.__exit__(GeneratorExit, GeneratorExit(), None)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not name or name == "." or set("/\0") & set(name):
        raise ValueError(f"{what}: got {name!r}, expected a name without '/'")


def _fit(path: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers as ``dtype``; features and scores may be rounded, nothing else changes."""
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = values.astype(dtype, copy=False)
        same = dtype == values.dtype or (
            np.isfinite(fitted) == np.isfinite(values) if dtype.kind == "f" else fitted == values
        )
    if not np.all(same):
        wrong = values[~same].flat[0]
        raise ValueError(f"{path}: got {wrong!r}, expected what {dtype} can hold")
    return fitted


def _encode(path: str, values: np.ndarray) -> np.ndarray:
    """Texts as UTF-8, an object array of the same shape."""
    encoded = np.empty(values.shape, dtype=object)
    for i, text in np.ndenumerate(values):
        if not isinstance(text, (str, bytes)):
            raise ValueError(f"{path}: got {text!r}, expected a text")
        try:
            encoded[i] = (text.decode() if isinstance(text, bytes) else text).encode()
        except UnicodeError:
            raise ValueError(f"{path}: got {text!r}, which is not UTF-8") from None
        if b"\0" in encoded[i]:
            raise ValueError(f"{path}: got a text with a zero byte, which HDF5 cannot hold")
    return encoded
