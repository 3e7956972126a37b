"""Readers of the community's layouts, each recognised by content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from modafill.data.mapped import MappedNpz
from modafill.data.mapping import MappingLike, NpzMapping, choose_mapping, load_mapping
from modafill.data.npz import NpzFile
from modafill.data.readers.csd import CsdFolder, is_csd
from modafill.data.readers.gcnet import GCNetFolder, is_gcnet
from modafill.data.readers.mintrec import TABLES, MIntRecFolder
from modafill.data.readers.mmin import MminFolder, mmin_folders
from modafill.data.readers.pickles import PickleFile, looks_like_pickle
from modafill.data.readers.split_pickle import SplitPickle, missing_keys, split_pickle_layout
from modafill.data.source import Source, naming

LAYOUTS = {
    "npz": ".npz archive",
    "mmsa": "MMSA's pickle",
    "mult": "MulT's pickle",
    "mmin": "MMIN's folder",
    "mintrec": "MIntRec's folder",
    "csd": "folder of computational sequences (.csd)",
    "gcnet": "GCNet's folder",
}


def open_source(path: Path, mapping: MappingLike | None = None) -> Source:
    """The samples of a foreign file or folder, whose layout is recognised by what is in it.

    Args:
        path: an ``.npz`` archive, MMSA's, MulT's or GCNet's pickle, or the folder of MMIN, MIntRec, GCNet or of
            ``.csd`` files.
        mapping: a mapping, its name or its path; for ``.npz`` what array is what, for folders ``modalities`` (modality
            → file or folder in it) and ``label``. Other layouts say themselves what is what and take none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no known layout, a damaged or suspicious file, or a mapping that does not fit.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with naming(path):
        return _open(path, mapping)


def _open(path: Path, mapping: MappingLike | None) -> Source:
    if path.is_dir():
        return _open_folder(path, None if mapping is None else load_mapping(mapping))
    if is_npz(path):
        npz = NpzFile(path)
        try:
            return MappedNpz(npz, choose_mapping(npz, mapping))
        except BaseException:
            npz.close()
            raise
    if is_csd(path):
        raise ValueError(
            f"{path}: one computational sequence; expected the folder with those of all modalities and labels"
        )
    if looks_like_pickle(path):
        return _open_pickle(PickleFile(path), None if mapping is None else load_mapping(mapping))
    raise ValueError(f"{path}: not a file that is known; expected a feature store (.h5), {', '.join(LAYOUTS.values())}")


def is_npz(path: Path) -> bool:
    """Whether a file is a zip archive."""
    if path.is_dir():
        return False
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _open_pickle(file: PickleFile, mapping: NpzMapping | None) -> Source:
    try:
        with naming(file.path):
            if is_gcnet(file.value):
                return GCNetFolder(file, _names(mapping))
            layout = split_pickle_layout(file.value)
            lacking = missing_keys(file.value)
            if layout is None and lacking:
                raise ValueError(f"{file.path}: {lacking}, which a pickle of MMSA or MulT has in every part")
            if layout is None:
                inside = file.value
                what = (
                    f"a dict of {[str(key)[:40] for key in list(inside)[:8]]}"
                    if isinstance(inside, dict)
                    else type(inside).__name__
                )
                raise ValueError(f"{file.path}: it holds {what}, which is the layout of neither MMSA, MulT nor GCNet")
            if mapping is not None:
                raise ValueError(
                    f"{file.path}: got the mapping {mapping.name}, but {LAYOUTS[layout]} says itself what is what"
                )
            return SplitPickle(file, layout)
    except BaseException:
        file.close()
        raise


def _open_folder(path: Path, mapping: NpzMapping | None) -> Source:
    if mmin_folders(path) is not None:
        return MminFolder(path, _names(mapping))
    if all((path / name).is_file() for name in TABLES.values()):
        return MIntRecFolder(path)
    if any(path.glob("*.csd")):
        label = None if mapping is None or mapping.label is None else mapping.label["name"]
        return CsdFolder(path, _names(mapping), label)
    pickles = sorted(path.glob("*_features_raw_*.pkl"))
    if mapping is not None and mapping.label is not None:
        pickles = [path / mapping.label["name"]]
    if len(pickles) == 1:
        return _open_pickle(PickleFile(pickles[0]), mapping)
    if pickles:
        raise ValueError(
            f"{path}: expected one of {[p.name for p in pickles]} to be named: give that file instead of the folder"
        )
    known = ", ".join(what for name, what in LAYOUTS.items() if name in ("mmin", "mintrec", "csd", "gcnet"))
    raise ValueError(f"{path}: not a folder that is known; expected {known}")


def _names(mapping: NpzMapping | None) -> Mapping[str, str] | None:
    return None if mapping is None else mapping.modalities
