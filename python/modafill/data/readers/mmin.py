"""MMIN's folder (IEMOCAP, MSP-IMPROV): HDF5 files of features by utterance, and labels by fold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from modafill.data.hdf5 import get_inside, open_hdf5
from modafill.data.npz import load_npy
from modafill.data.readers.keyed import KeyedSource
from modafill.data.readers.pickles import as_text

FOLDERS = {"text": "L", "audio": "A", "vision": "V"}
PARTS = {"trn": "train", "val": "valid", "tst": "test"}


def mmin_folders(root: Path) -> tuple[Path, Path] | None:
    """(folder with A, V and L, folder with the folds), each ``root`` or one below it; None if this is not MMIN's."""
    below = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    features = next((path for path in below if all((path / name).is_dir() for name in FOLDERS.values())), None)
    targets = next((path for path in below if any(path.glob("*/trn_label.npy"))), None)
    return None if features is None or targets is None else (features, targets)


class MminFolder(KeyedSource):
    """``A``, ``V`` and ``L`` with an HDF5 file each of ``[T, D]`` by utterance, and ``<fold>/<part>_label.npy``.

    The folds become split columns ``cv1``, ``cv2``, … An utterance that a fold leaves out is in none of its parts.

    Args:
        root: the folder.
        names: modality → file in it, where a folder has several (``comparE_mean_std.h5`` is passed over).
    """

    layout = "mmin"

    def __init__(self, root: Path, names: Mapping[str, str] | None = None) -> None:
        found = mmin_folders(root)
        if found is None:
            raise ValueError(f"{root}: expected the folders A, V and L, and <fold>/trn_label.npy")
        features, targets = found
        folds = sorted((p for p in targets.iterdir() if (p / "trn_label.npy").is_file()), key=lambda p: _number(p.name))
        columns: dict[str, dict[str, str]] = {}
        labels: dict[str, int] = {}
        repeated: set[str] = set()
        for fold in folds:
            columns[f"cv{fold.name}"] = {}
            for part, name in PARTS.items():
                keys, values = _read_part(fold, part)
                repeated |= {key for key, n in Counter(keys).items() if n > 1}
                for key, value in zip(keys, values.tolist(), strict=True):
                    if labels.setdefault(key, value) != value:
                        raise ValueError(
                            f"{fold}: {key!r} has the label {value}, in another part or fold {labels[key]}"
                        )
                    if columns[f"cv{fold.name}"].setdefault(key, name) != name:
                        raise ValueError(
                            f"{fold / f'{part}_int2name.npy'}: {key!r} is in the parts "
                            f"{columns[f'cv{fold.name}'][key]} and {name}, expected one"
                        )
        super().__init__(root, sorted(labels))
        if repeated:
            self.note(f"{len(repeated)} ids come twice in one part, such as {min(repeated)!r}; each is one sample")
        self._files: dict[str, h5py.File] = {}
        try:
            for modality, folder in FOLDERS.items():
                path = root / names[modality] if names and modality in names else _only_file(features / folder)
                self._files[modality] = open_hdf5(path)
            self.labels["emotion"] = np.array([labels[key] for key in self.keys])
            self.splits = {
                column: np.array([parts.get(key, "") for key in self.keys]) for column, parts in columns.items()
            }
            self.task = {"label": {"name": "emotion", "kind": "class"}, "folds": list(columns)}
            self._probe(list(FOLDERS))
        except BaseException:
            self.close()
            raise

    def look_up(self, modality: str, key: str) -> np.ndarray | None:
        file = self._files[modality]
        try:
            data = get_inside(file, key)
            if isinstance(data, h5py.Dataset) and data.dtype.kind not in "fiu":
                raise ValueError(f"{data.dtype} {data.shape}, expected numbers [T, D]")
            return data[()] if isinstance(data, h5py.Dataset) else None
        except KeyError:
            return None
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"{file.filename}: cannot read {key!r}: {error}") from None

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _number(name: str) -> tuple[int, str]:
    return (int(name) if re.fullmatch(r"\d{1,9}", name) else 0, name)


def _read_part(fold: Path, part: str) -> tuple[list[str], np.ndarray]:
    names, labels = load_npy(fold / f"{part}_int2name.npy"), load_npy(fold / f"{part}_label.npy")
    if (
        names.dtype.kind not in "SU"
        or names.ndim not in (1, 2)
        or 0 in names.shape[1:]
        or labels.dtype.kind not in "fiu"
    ):
        raise ValueError(f"{fold}: {part}_int2name is {names.dtype} {names.shape}, expected texts [N] or [N, k]")
    if labels.ndim not in (1, 2) or 0 in labels.shape[1:] or len(names) != len(labels):
        raise ValueError(f"{fold}: {part} has {len(names)} names and labels {labels.shape}")
    keys = [as_text(name) for name in (names[:, 0] if names.ndim == 2 else names)]
    one_hot = labels.ndim == 2 and labels.shape[1] > 1
    flat = labels.reshape(len(labels), -1)
    if one_hot:
        wrong = np.sort(flat, 1) != [0] * (flat.shape[1] - 1) + [1]
    else:
        wrong = (flat != np.round(flat)) | ~(np.abs(flat) < 1 << 53)
    if wrong.any():
        row = int(wrong.any(1).argmax())
        raise ValueError(
            f"{fold / f'{part}_label.npy'}: {keys[row]!r} has the label {labels[row].tolist()}, expected "
            f"{'a 1 among zeros' if one_hot else 'a whole number'}"
        )
    return keys, flat.argmax(1) if one_hot else flat[:, 0].astype(np.int64)


def _only_file(folder: Path) -> Path:
    files = [path for path in sorted(folder.glob("*.h5")) if "mean_std" not in path.name]
    if len(files) != 1:
        raise ValueError(
            f"{folder}: expected one .h5 file of features, got {[path.name for path in files]}; name one for each "
            'modality in a mapping, {"modalities": {"audio": "A/comparE.h5", …}}'
        )
    return files[0]
