"""From foreign files and folders to feature stores."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modafill.data.hdf5 import HDF5_MAGIC
from modafill.data.mapping import MappingLike, builtin_mappings, load_mapping
from modafill.data.readers import open_source
from modafill.data.readers.csd import is_csd
from modafill.data.readers.pickles import looks_like_pickle
from modafill.data.source import write_store
from modafill.data.store import FeatureStore


def convert(
    source: str | os.PathLike[str], out: str | os.PathLike[str], mapping: MappingLike | None = None
) -> list[str]:
    """Write the samples of a foreign file or folder as a feature store.

    Args:
        source: in one of the layouts of :func:`~modafill.data.readers.open_source`; code in pickles is never run.
        out: the store to create or replace.
        mapping: a mapping, its name, or the path of its JSON file (for ``.npz`` by default the one built-in mapping
            that fits).

    Returns:
        Flaws of the file and what was made of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unreadable or suspicious file, no layout or mapping that fits, arrays that disagree, NaN or
            infinity in observed features of an archive (unless the mapping's ``nonfinite`` says what they mean), or an
            ``out`` that is a folder, the source or in it.
    """
    path, target = Path(source), Path(out)
    if is_store(path):
        raise ValueError(f"{path}: HDF5 and no computational sequence; a feature store needs no conversion")
    if target.is_dir() or path.resolve() in (target.resolve(), *target.resolve().parents):
        what = "a folder" if target.is_dir() else f"{path}, which is to be read, or in it"
        raise ValueError(f"{out}: is {what}; expected another file")
    with open_source(path, mapping) as samples:
        return write_store(samples, target, {})


def open_data(
    path: str | os.PathLike[str], cache_dir: str | os.PathLike[str], mapping: MappingLike | None = None
) -> FeatureStore:
    """Open a feature store in place, or a foreign file or folder by way of ``cache_dir/<stem>.h5``.

    Flaws of the file and what was made of them are ``notes`` of the store, whether it is converted now or was before.
    The converted file is used again as long as the path, the sizes and times of the files (those behind
    links too) and the mapping are the same.
    A file of that name that is no conversion is never replaced.

    Args:
        path: a store, or what :func:`convert` takes; told apart by content.
        cache_dir: where conversions are kept; created if need be, not touched for a store.
        mapping: as in :func:`convert`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as :class:`FeatureStore` and :func:`convert`, a file that is neither, or one in the way.
    """
    source = Path(path)
    if is_store(source):
        return FeatureStore(source)
    used = None if mapping is None else load_mapping(mapping)
    # Without a mapping any of those that come with the package may be what fits.
    mappings = [m.to_dict() for m in builtin_mappings().values()] if used is None else used.to_dict()
    named = [] if used is None else [*used.modalities.values(), *([] if used.label is None else [used.label["name"]])]
    stamp = [str(source.resolve()), _stamp(source, named), mappings]
    digest = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    out = Path(cache_dir) / f"{source.stem}.h5"
    if out.exists():
        try:
            store = FeatureStore(out, name=str(path))
        except ValueError:
            store = None
        foreign = not _is_hdf5(out) if store is None else "source" not in store.task
        if foreign:
            raise ValueError(f"{out}: in the way of the conversion of {path}; move it, or choose another folder")
        if store is not None and store.task["source"] == digest:
            return store
    with open_source(source, used) as samples:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_store(samples, out, {"source": digest})
    return FeatureStore(out, name=str(path))


def is_store(path: Path) -> bool:
    """Whether a file is HDF5 and no computational sequence; whether it is a sound store :class:`FeatureStore` says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        return False
    try:
        return _is_hdf5(path) and not is_csd(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _is_hdf5(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(HDF5_MAGIC)) == HDF5_MAGIC


def _stamp(path: Path, named: Iterable[str]) -> list[list[Any]]:
    """Names, sizes and times of the files that a source is made of; ``named``: files and folders a mapping names."""
    roots = [path]
    if path.is_dir() or looks_like_pickle(path):
        base = path if path.is_dir() else path.parent
        roots += [folder / name for name in named for folder in (base, base / "features")]
    # GCNet's pickle, whatever it is called, has its features in a folder beside it.
    roots += [root.parent / "features" for root in roots if root.is_file() and looks_like_pickle(root)]
    seen: set[str] = set()
    return [entry for root in dict.fromkeys(roots) for entry in _walk(root, seen)]


def _walk(root: Path, seen: set[str]) -> Iterator[list[Any]]:
    """Every file once, behind links too; ``seen`` has the folders that were walked, so that a cycle ends."""
    if root.is_file():
        yield _describe(str(root))
    if not root.is_dir():
        return
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        # Where a link leads is part of the stamp: what is behind it may have been listed already.
        yield [folder, real]
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        paths = (os.path.join(folder, name) for name in sorted(files))
        yield from (_describe(path) for path in paths if os.path.isfile(path))


def _describe(file: str) -> list[Any]:
    """The name, where it leads if it is a link, the size and the time."""
    found = os.stat(file)
    return [file, os.path.realpath(file) if os.path.islink(file) else file, found.st_size, found.st_mtime_ns]
