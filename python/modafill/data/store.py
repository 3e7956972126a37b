"""The feature store: an HDF5 file of multimodal samples, read by rows and never loaded whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from modafill.data.batch import Batch
from modafill.data.hdf5 import find_inside, read_texts, text_attribute
from modafill.data.patterns import name_rows
from modafill.data.writer import FORMAT, VERSION, check_task, pack_texts

# Bytes of features that iter_batches shuffles among at a time.
POOL_BYTES = 1 << 26
POOL_ROWS = 8192
# Reading over a gap of this many rows is cheaper than another call into HDF5.
GAP_ROWS = 32
# Each window is as long in memory, however short its group.
MAX_WINDOW = 1 << 14


class FeatureStore:
    """A read-only view of a store on disk.

    Opening checks the layout. The file is opened once per process: a store may be pickled to a worker or be inherited
    through a fork. Use it as a context manager, or :meth:`close` it.

    Layout (root attributes ``format``, ``version``, and as JSON ``modalities``, ``task`` and ``notes``):
    ``/modalities/<name>/values`` float ``[N, D]`` (vectors), ``[N, T, D]`` (sequences of T steps) or, with ``offsets``
    int64 ``[N + 1]`` beside it, ``[ΣT, D]`` (ragged sequences), and its ``columns`` if they have names; ``/available``
    bool ``[N, M]``; optionally ``/generated`` bool ``[N, M]``, ``/ids``, ``/order``, ``/labels/<name>``,
    ``/groups/<name>``, ``/splits/<name>``, all of N rows. Numbers have zlib's checksums; a column of texts has the
    attribute ``sha256``, of its texts in UTF-8 with a zero byte behind each.

    Attributes:
        path: the file.
        name: what messages call it: the path, or that of the file it was converted from.
        modalities: names, in the order of the columns of availability.
        widths: name → D.
        kinds: name → ``"vector"`` or ``"sequence"``, as :meth:`read` returns them.
        dtypes: name → dtype on disk.
        max_lengths: name → the longest sequence, for sequences.
        label_names, group_names, split_names: what there is.
        task: the description that came with the data: label specification, window, group.
        notes: flaws of what was converted and what was made of them.
        window: turns per sample if this is a windowed view, else None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a store, truncated, of a newer version, or inconsistent; the message has path and reason.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = str(path) if name is None else name
        if not self.path.exists():
            raise FileNotFoundError(f"{self.name}: no such file")
        self.window: int | None = None
        self._handle: h5py.File | None = None
        self._process = 0
        self._cache: dict[str, np.ndarray] = {}
        try:
            self._read_layout()
        except (KeyError, OSError, RuntimeError, TypeError, UnicodeDecodeError) as error:
            self.close()
            raise ValueError(f"{self.name}: not a readable feature store: {_reason(error)}") from None
        except ValueError as error:
            self.close()
            raise ValueError(f"{self.name}: {error}") from None

    def _read_layout(self) -> None:
        file = self._file
        if text_attribute(file, "format") != FORMAT:
            raise ValueError(f"an HDF5 file, but not a feature store (no attribute format={FORMAT!r})")
        version = int(file.attrs.get("version", 0))
        if not 1 <= version <= VERSION:
            raise ValueError(f"store version {version}, but this modafill reads versions up to {VERSION}")
        described = {
            name: text for name in ("modalities", "task", "notes") if (text := text_attribute(file, name)) is not None
        }
        names, notes = json.loads(described["modalities"]), json.loads(described.get("notes", "[]"))
        for what, texts in (("modalities", names), ("notes", notes)):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{what}: got {texts!r}, expected a list of texts")
        self.modalities: tuple[str, ...] = tuple(names)
        self.notes: tuple[str, ...] = tuple(notes)
        self.task: dict[str, Any] = json.loads(described.get("task", "{}"))
        check_task(self.task)
        if not self.modalities:
            raise ValueError("it names no modalities")
        available = self._dataset("available")
        if available.ndim != 2 or available.dtype != bool or available.shape[1] != len(self.modalities):
            raise ValueError(
                f"available is {available.dtype} {available.shape}, expected bool [N, {len(self.modalities)}]"
            )
        self._rows = len(available)
        if not self._rows:
            raise ValueError("it has no samples")
        self.widths: dict[str, int] = {}
        self.dtypes: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ragged: set[str] = set()
        for name in self.modalities:
            self._read_modality(name)
        if self._has("generated"):
            generated = self._dataset("generated")
            if generated.shape != available.shape or generated.dtype != bool:
                raise ValueError(f"generated is {generated.dtype} {generated.shape}, expected bool {available.shape}")
            if (both := self._load("generated") & self._load("available")).any():
                raise ValueError(f"{both.sum()} entries are available and generated, expected one of them")
        columns = [name for name in ("ids", "order") if self._has(name)]
        for kind in ("labels", "groups", "splits"):
            named = find_inside(file, kind)
            if named is not None and not isinstance(named, h5py.Group):
                raise ValueError(f"{kind} is an array, expected a group of them")
            columns += [f"{kind}/{name}" for name in named or ()]
        for column in columns:
            entries = len(self._dataset(column))
            if entries != self._rows:
                raise ValueError(f"{column} has {entries} entries, expected {self._rows}")
        self._columns = frozenset(columns)

    def _read_modality(self, name: str) -> None:
        values = self._dataset(f"modalities/{name}/values")
        ragged = self._has(f"modalities/{name}/offsets")
        if values.dtype.kind != "f" or values.ndim not in ((2,) if ragged else (2, 3)) or 0 in values.shape[1:]:
            raise ValueError(f"modality {name!r} has values {values.dtype} {values.shape}, expected floats [N, (T,) D]")
        rows = len(values)
        if ragged:
            offsets = self._load(f"modalities/{name}/offsets")
            if offsets.dtype.kind != "i" or offsets.ndim != 1 or not len(offsets) or offsets[0] != 0:
                raise ValueError(f"modality {name!r} has malformed offsets")
            if (np.diff(offsets) < 0).any() or offsets[-1] != len(values):
                raise ValueError(f"modality {name!r} has offsets that do not fit its {len(values)} frames")
            if (np.diff(offsets) < self._load("available")[:, self.modalities.index(name)]).any():
                raise ValueError(f"modality {name!r} has available samples without frames")
            rows = len(offsets) - 1
            self._ragged.add(name)
        if rows != self._rows:
            raise ValueError(f"modality {name!r} has {rows} samples, expected {self._rows}")
        columns = f"modalities/{name}/columns"
        if self._has(columns) and self._dataset(columns).shape != values.shape[-1:]:
            raise ValueError(f"{columns} has shape {self._dataset(columns).shape}, expected {values.shape[-1:]}")
        self.widths[name] = values.shape[-1]
        self.dtypes[name] = str(values.dtype)
        self._shapes[name] = values.shape[1:]

    @property
    def _file(self) -> h5py.File:
        if self._handle is None or self._process != os.getpid():
            # A handle inherited through a fork is this process's copy: closing it leaves the parent's alone.
            self.close()
            self._handle = h5py.File(self.path, "r")
            self._process = os.getpid()
            self._bytes = self._bytes_of(self._handle)
        return self._handle

    def _has(self, path: str) -> bool:
        return find_inside(self._file, path) is not None

    def _dataset(self, path: str) -> h5py.Dataset:
        data = find_inside(self._file, path)
        if not isinstance(data, h5py.Dataset):
            raise ValueError(f"it has no array {path!r}")
        return data

    def _load(self, path: str) -> np.ndarray:
        """A whole column, kept in memory."""
        if path not in self._cache:
            data = self._dataset(path)
            if h5py.check_string_dtype(data.dtype):
                values = read_texts(data)
                _check_digest(values.reshape(-1), data)
            else:
                values = data[()]
            self._cache[path] = values
        return self._cache[path]

    def _array(self, path: str) -> np.ndarray:
        with self._reading(path):
            return self._load(path)

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self._where}: cannot read {what}: {_reason(error)}") from None
        # HDF5 reads zeros behind the end of a file.
        if self._handle is not None and self._bytes_of(self._handle) < self._bytes:
            raise ValueError(f"{self._where}: cannot read {what}: the file was truncated while it was open")

    @property
    def _where(self) -> str:
        return self.name if self.name == str(self.path) else f"{self.name} (converted into {self.path})"

    @staticmethod
    def _bytes_of(file: h5py.File) -> int:
        return os.fstat(file.id.get_vfd_handle()).st_size

    def _column(self, kind: str, name: str | None) -> np.ndarray:
        names = self._names(kind)
        if name is None:
            if len(names) != 1:
                raise ValueError(f"{self.name}: expected one of the {kind} {list(names)} to be named")
            name = names[0]
        if name not in names:
            raise ValueError(f"{self.name}: no {kind} named {name!r}, only {list(names)}")
        return self._array(f"{kind}/{name}")

    def _names(self, kind: str) -> tuple[str, ...]:
        return tuple(sorted(column.split("/", 1)[1] for column in self._columns if column.startswith(f"{kind}/")))

    def close(self) -> None:
        """Close the file; a later access opens it again."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_cache": {}}

    def __len__(self) -> int:
        return self._rows

    def __repr__(self) -> str:
        window = f", window={self.window}" if self.window else ""
        return f"FeatureStore({str(self.path)!r}, {len(self)} samples, {', '.join(self.modalities)}{window})"

    @property
    def kinds(self) -> dict[str, str]:
        return {name: "vector" if self._is_vector(name) and not self.window else "sequence" for name in self.modalities}

    @property
    def max_lengths(self) -> dict[str, int]:
        longest = {}
        for name, kind in self.kinds.items():
            if self._is_vector(name):
                if kind == "sequence" and self.window:
                    longest[name] = self.window
            elif name in self._ragged:
                longest[name] = max(1, int(np.diff(self._array(f"modalities/{name}/offsets")).max()))
            else:
                longest[name] = self._shapes[name][0]
        return longest

    def _is_vector(self, name: str) -> bool:
        return len(self._shapes[name]) == 1 and name not in self._ragged

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._names("labels")

    @property
    def group_names(self) -> tuple[str, ...]:
        return self._names("groups")

    @property
    def split_names(self) -> tuple[str, ...]:
        return self._names("splits")

    def available(self, rows: np.ndarray | None = None) -> np.ndarray:
        """bool ``[N, M]`` (or of ``rows``), True = observed."""
        whole = self._array("available")
        return whole.copy() if rows is None else whole[self._check_rows(rows)]

    def generated(self, rows: np.ndarray | None = None) -> np.ndarray:
        """bool ``[N, M]`` (or of ``rows``), True = filled in; never True where available."""
        if not self._has("generated"):
            return np.zeros_like(self.available(rows))
        whole = self._array("generated")
        return whole.copy() if rows is None else whole[self._check_rows(rows)]

    def ids(self, rows: np.ndarray | None = None) -> list[str]:
        """The names of the samples; their row numbers where the file has none."""
        index = np.arange(len(self)) if rows is None else self._check_rows(rows)
        return [str(i) for i in (self._array("ids")[index] if "ids" in self._columns else index)]

    def labels(self, name: str | None = None) -> np.ndarray:
        """A label column, ``[N, …]`` as stored (strings as objects); by default the task's, or the only one."""
        return self._column("labels", self.task.get("label", {}).get("name") if name is None else name)

    def groups(self, name: str | None = None) -> np.ndarray:
        """A group column ``[N]``; ``name`` may be left out where there is one."""
        return self._column("groups", name)

    def split(self, name: str | None = None) -> np.ndarray:
        """A split column, ``[N]`` strings; ``name`` may be left out where there is one."""
        return self._column("splits", name)

    def order(self) -> np.ndarray | None:
        """``[N]`` numbers, the place of each sample in its group, or None."""
        return self._array("order") if "order" in self._columns else None

    def columns(self, modality: str) -> list[str] | None:
        """The names of a modality's D columns, where the file has them."""
        path = f"modalities/{modality}/columns"
        return [str(name) for name in self._array(path)] if self._has(path) else None

    def _check_rows(self, rows: np.ndarray) -> np.ndarray:
        index = np.asarray(rows)
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise ValueError(f"rows: got {index.dtype} {index.shape}, expected a vector of integers")
        outside = (index < 0) | (index >= len(self))
        if outside.any():
            raise ValueError(f"rows: got {name_rows(index[outside].tolist())}, expected 0…{len(self) - 1}")
        return index.astype(np.int64)

    def unwindowed(self) -> FeatureStore:
        """The store without windows: one vector per sample."""
        return self.windowed(None)

    def windowed(self, length: int | None, group: str | None = None) -> FeatureStore:
        """A view in which each vector becomes the last ``length`` turns of its group, up to and including itself.

        Vectors are then read as sequences ``[B, length, D]``, left to right, with their true lengths (short at the
        start of a group). A sample's availability stays that of its own turn; an earlier turn that lacks the modality
        is left out. Sequence modalities are unchanged. Nothing is copied.

        Args:
            length: turns, 1 to :data:`MAX_WINDOW`; None for no windows.
            group: the group column (default: the task's, or the only one).

        Raises:
            ValueError: another length, no group or order column, or no vector modality.
        """
        view = FeatureStore.__new__(FeatureStore)
        view.__dict__.update(self.__getstate__(), window=length)
        if length is None:
            return view
        if not 1 <= length <= MAX_WINDOW:
            raise ValueError(f"length: got {length}, expected 1 to {MAX_WINDOW} turns")
        if not any(self._is_vector(name) for name in self.modalities):
            raise ValueError(f"{self.name}: windows are made of vectors, and every modality here is a sequence")
        order = self.order()
        if order is None or not self.group_names:
            raise ValueError(f"{self.name}: windows need a group column and an order column")
        codes = np.unique(self.groups(group or self.task.get("group")), return_inverse=True)[1]
        by_turn = np.lexsort((order, codes))
        starts = np.flatnonzero(np.diff(codes[by_turn], prepend=-1))
        place = np.empty(len(self), dtype=np.int64)
        place[by_turn] = np.arange(len(self))
        view._turns = by_turn
        view._place = place
        view._start = starts[codes]
        return view

    _turns: np.ndarray
    _place: np.ndarray
    _start: np.ndarray

    def read(self, rows: np.ndarray, *, generated: bool = False) -> Batch:
        """The samples in ``rows``, in that order.

        Args:
            rows: ints ``[B]``, in any order, repeated if wanted.
            generated: whether filled-in values count as available; otherwise they are left out.

        Returns:
            A batch of float32 features whose ``row_id`` is the row number and whose label is None. Entries that are not
            available are zeros of length 0. A ragged modality is padded to its longest sequence in the batch.

        Raises:
            ValueError: a row is out of range, or the file cannot be read.
        """
        index = self._check_rows(np.asarray(rows))
        seen = self.available(index)
        if generated:
            seen |= self.generated(index)
        features: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        for m, name in enumerate(self.modalities):
            if self._is_vector(name):
                values, length = self._read_vectors(name, m, index, seen[:, m], generated)
            elif name in self._ragged:
                values, length = self._read_ragged(name, index, seen[:, m])
            else:
                values = self._fetch(name, index)
                values[~seen[:, m]] = 0
                length = np.where(seen[:, m], values.shape[1], 0)
            features[name] = torch.from_numpy(values)
            if values.ndim == 3:
                lengths[name] = torch.from_numpy(length)
        return Batch(features, torch.from_numpy(seen), torch.from_numpy(index), lengths)

    def _read_vectors(
        self, name: str, m: int, index: np.ndarray, seen: np.ndarray, generated: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.window is None:
            values = self._fetch(name, index)
            values[~seen] = 0
            return values, np.empty(0, dtype=np.int64)
        last = self._place[index]
        first = np.maximum(self._start[index], last - self.window + 1)
        turn = first[:, None] + np.arange(self.window)
        present = (turn <= last[:, None]) & seen[:, None]
        rows = self._turns[turn[present]]
        there = self._array("available")[rows, m]
        if generated:
            there = there | self.generated(rows)[:, m]
        present[present] = there
        sample, _ = np.nonzero(present)
        values = np.zeros((len(index), self.window, self.widths[name]), dtype=np.float32)
        values[sample, (present.cumsum(1) - 1)[present]] = self._fetch(name, rows[there])
        return values, present.sum(1)

    def _read_ragged(self, name: str, index: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offsets = self._array(f"modalities/{name}/offsets")
        length = np.where(seen, np.diff(offsets)[index], 0)
        step = np.arange(max(1, int(length.max(initial=0))))
        valid = step < length[:, None]
        values = np.zeros((*valid.shape, self.widths[name]), dtype=np.float32)
        values[valid] = self._fetch(name, (offsets[index][:, None] + step)[valid])
        return values, length

    def _fetch(self, name: str, index: np.ndarray) -> np.ndarray:
        """Rows of a modality's ``values`` in any order, read front to back in runs: float32, a fresh array."""
        wanted, inverse = np.unique(index, return_inverse=True)
        out = np.empty((len(wanted), *self._shapes[name]), dtype=np.float32)
        breaks = np.flatnonzero(np.diff(wanted) > GAP_ROWS) + 1
        with self._reading(f"modality {name!r}"):
            data = self._dataset(f"modalities/{name}/values")
            for run in np.split(np.arange(len(wanted)), breaks) if len(wanted) else ():
                start = wanted[run[0]]
                if len(run) == wanted[run[-1]] - start + 1:
                    data.read_direct(out, np.s_[start : start + len(run)], np.s_[run[0] : run[-1] + 1])
                else:
                    out[run] = data[start : wanted[run[-1]] + 1][wanted[run] - start]
        return out if np.array_equal(inverse, np.arange(len(out))) else out[inverse]

    def iter_batches(
        self,
        rows: np.ndarray,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        labels: np.ndarray | None = None,
        generated: bool = False,
    ) -> Iterator[Batch]:
        """Batches over ``rows``; all but the last have ``batch_size`` samples.

        Without a seed, in the given order. With one, blocks of neighbouring rows are taken in random order, and samples
        are shuffled within pools of a few blocks, so that reading stays sequential; the order depends on ``rows`` as a
        set, ``batch_size`` and the seed alone.

        Args:
            rows: ints ``[n]``.
            batch_size: samples per batch.
            shuffle_seed: a non-negative integer, or None for no shuffling.
            labels: ``[N]`` numbers by row number; fills each batch's ``label``.
            generated: as in :meth:`read`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        index = self._check_rows(np.asarray(rows))
        longest = self.max_lengths
        row_bytes = 4 * sum(width * longest.get(name, 1) for name, width in self.widths.items())
        pool = max(1, min(POOL_ROWS, POOL_BYTES // row_bytes) // batch_size) * batch_size
        random = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
        if random is not None and len(index):
            blocks = np.array_split(np.sort(index), -(-len(index) // -(-pool // 4)))
            index = np.concatenate([blocks[i] for i in random.permutation(len(blocks))])
        for start in range(0, len(index), pool):
            part = index[start : start + pool]
            if random is not None:
                part = random.permutation(part)
            batch = self.read(part, generated=generated)
            if labels is not None:
                batch.label = torch.from_numpy(np.asarray(labels)[part])
            for first in range(0, len(part), batch_size):
                yield self._trim(batch.select(slice(first, first + batch_size)))

    def _trim(self, batch: Batch) -> Batch:
        """Cut a ragged modality's padding down to what this batch needs, as if it had been read alone."""
        for name, lengths in batch.lengths.items():
            if name in self._ragged:
                batch.features[name] = batch.features[name][:, : max(1, int(lengths.max()))]
        return batch


def _check_digest(texts: Iterable[str], column: h5py.Dataset) -> None:
    """HDF5 has no checksums for texts; what was written without a digest is taken as it is."""
    expected = text_attribute(column, "sha256")
    if expected is not None and hashlib.sha256(pack_texts(map(str.encode, texts))).hexdigest() != expected:
        raise ValueError("damaged texts: their SHA-256 is not that of what was written")


def _reason(error: BaseException) -> str:
    """The first line of a library's message, without its outer quotes."""
    return (str(error).splitlines() or [type(error).__name__])[0].strip("'\"")
