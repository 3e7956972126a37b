"""Reading HDF5 files without trusting them: nothing outside the file, and no size that its bytes do not bear out."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from modafill.data.npz import MAX_RATIO, RATIO_FREE_BYTES
from modafill.data.texts import MAX_COPIES

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def open_hdf5(path: Path) -> h5py.File:
    """A file, open for reading.

    Raises:
        ValueError: it is not HDF5, or cannot be read.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: not a readable HDF5 file: {str(error).splitlines()[0]}") from None


def text_attribute(holder: h5py.Group | h5py.Dataset, name: str) -> str | None:
    """A text, of fixed length or not; None where there is none.

    Raises:
        ValueError: it is something else.
    """
    found = holder.attrs.get(name)
    if isinstance(found, bytes):
        return found.decode("utf-8")
    if found is not None and not isinstance(found, str):
        raise ValueError(f"attribute {name}: got {found!r}, expected a text")
    return found


def get_inside(group: h5py.Group, path: str) -> h5py.Group | h5py.Dataset:
    """What is at ``path`` in a file, reached through hard links alone.

    Raises:
        KeyError: there is nothing.
        ValueError: a soft or external link on the way, a data set whose values are in other files, or one that declares
            more than :data:`~modafill.data.npz.MAX_RATIO` times the bytes that are stored for it.
    """
    here = group
    for part in path.split("/"):
        name = part.encode("utf-8", "surrogateescape")
        # Only this asks for the link itself: `in` and `get` open what it points to.
        if not isinstance(here, h5py.Group) or part in ("", ".") or not here.id.links.exists(name):
            raise KeyError(f"{path!r} is not there")
        if here.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
            raise ValueError(f"{path!r} is a link to elsewhere, which is not followed")
        here = here[part]
    if isinstance(here, h5py.Dataset):
        if here.external or here.is_virtual:
            raise ValueError(f"{path!r} has its values in other files, which are not opened")
        stored = here.id.get_storage_size()
        if here.nbytes > max(RATIO_FREE_BYTES, MAX_RATIO * stored):
            raise ValueError(f"{path!r} declares {here.nbytes} bytes, but {stored} are stored: refused")
    return here


def read_texts(data: h5py.Dataset) -> np.ndarray:
    """All texts of a column.

    Raises:
        ValueError: they come to far more than the file has, as one that is stored once may be named for each row.
    """
    size = data.file.id.get_filesize()
    most, found = max(RATIO_FREE_BYTES, MAX_COPIES * size), 0
    # A text may be as long as the file.
    rows = max(64, RATIO_FREE_BYTES // size)
    texts = np.empty(data.shape, dtype=object)
    for start in range(0, len(data), rows):
        texts[start : start + rows] = block = data.asstr()[start : start + rows]
        found += sum(map(len, block.reshape(-1)))
        if found > most:
            raise ValueError(f"it names its texts so often that they come to more than {most} characters")
    return texts


def find_inside(group: h5py.Group, path: str) -> h5py.Group | h5py.Dataset | None:
    """As :func:`get_inside`; None where there is nothing."""
    try:
        return get_inside(group, path)
    except KeyError:
        return None
