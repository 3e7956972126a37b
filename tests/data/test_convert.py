"""When a conversion is made again: what a source is made of may lie behind links, or where a mapping says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support import foreign

from modafill.data import open_data


def first_text(source: Path, cache: Path, mapping: dict[str, Any] | None = None) -> np.ndarray:
    """The text features of the first sample."""
    with open_data(source, cache, mapping) as store:
        return store.read(np.array([0])).features["text"].numpy()


def assert_converted_again(source: Path, cache: Path, changed: Path, mapping: dict[str, Any] | None = None) -> None:
    """When ``changed``, a file of vectors or a folder of them, has other values."""
    before = first_text(source, cache, mapping)
    made = open_data(source, cache, mapping).path.stat().st_mtime_ns
    assert open_data(source, cache, mapping).path.stat().st_mtime_ns == made
    for path in [changed] if changed.is_file() else changed.glob("*.npy"):
        np.save(path, 100 * np.load(path))
    np.testing.assert_array_equal(first_text(source, cache, mapping), 100 * before)


@pytest.mark.parametrize("linked", ["features/deberta-large-4-UTT", "features"])
def test_what_is_behind_links_is_converted_again(tmp_path: Path, linked: str) -> None:
    foreign.write_gcnet(tmp_path / "x")
    (tmp_path / "x" / linked).rename(tmp_path / "elsewhere")
    (tmp_path / "x" / linked).symlink_to(tmp_path / "elsewhere")
    # A folder that is in itself ends the walk, not the program.
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "x")
    features = tmp_path / "x" / "features" / "deberta-large-4-UTT"
    assert_converted_again(tmp_path / "x", tmp_path / "cache", features)
    assert_converted_again(next((tmp_path / "x").glob("*.pkl")), tmp_path / "cache", features)


def test_a_link_to_another_folder_of_the_same_sizes_and_times(tmp_path: Path) -> None:
    foreign.write_gcnet(tmp_path / "x")
    folder, cache = tmp_path / "x" / "features" / "deberta-large-4-UTT", tmp_path / "cache"
    shutil.copytree(folder, tmp_path / "new")
    for path in (tmp_path / "new").iterdir():
        np.save(path, 100 * np.load(path))
        shutil.copystat(folder / path.name, path)
    folder.rename(tmp_path / "old")
    folder.symlink_to(tmp_path / "old")
    before = first_text(tmp_path / "x", cache)
    folder.unlink()
    folder.symlink_to(tmp_path / "new")
    np.testing.assert_array_equal(first_text(tmp_path / "x", cache), 100 * before)
    (folder / "vid0_000.npy").unlink()
    (folder / "vid0_000.npy").symlink_to(tmp_path / "old" / "vid0_000.npy")
    np.testing.assert_array_equal(first_text(tmp_path / "x", cache), before)


def test_mmin_behind_links_is_converted_again(tmp_path: Path) -> None:
    foreign.write_mmin(tmp_path / "x", folds=1, n=12)
    (tmp_path / "x" / "features").rename(tmp_path / "elsewhere")
    (tmp_path / "x" / "features").symlink_to(tmp_path / "elsewhere")
    before = first_text(tmp_path / "x", tmp_path / "cache")
    with h5py.File(tmp_path / "elsewhere" / "L" / "bert_large.h5", "a") as file:
        for data in file.values():
            data[...] = 100 * data[()]
    after = first_text(tmp_path / "x", tmp_path / "cache")
    np.testing.assert_array_equal(after, 100 * before)


def test_a_gcnet_pickle_of_any_name_is_converted_again(tmp_path: Path) -> None:
    foreign.write_gcnet(tmp_path / "x")
    source = next((tmp_path / "x").glob("*.pkl")).rename(tmp_path / "x" / "dialogues.data")
    assert_converted_again(source, tmp_path / "cache", tmp_path / "x" / "features" / "deberta-large-4-UTT")


def test_what_a_mapping_names_elsewhere_is_converted_again(tmp_path: Path) -> None:
    foreign.write_gcnet(tmp_path / "x")
    folder = (tmp_path / "x" / "features" / "deberta-large-4-UTT").rename(tmp_path / "mine")
    mapping = {"modalities": {"text": "../../mine", "audio": "wav2vec-large-c-UTT", "vision": "manet_UTT"}}
    assert_converted_again(tmp_path / "x", tmp_path / "cache", folder, mapping)
