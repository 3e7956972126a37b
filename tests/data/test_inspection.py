from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from modafill.data import FeatureStore, StoreWriter, convert, inspect_path, render_inspection

MAPPING: dict[str, Any] = {
    "modalities": {"text": "t", "audio": "a"},
    "lengths": {"audio": "n"},
    "columns": {"text": "names"},
    "available": "seen",
    "label": {"name": "y", "kind": "class"},
    "labels": {"as score": {"name": "y", "kind": "score"}},
    "group": "who",
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    n, random = 1500, np.random.default_rng(0)
    t, a = random.normal(size=(n, 4)), random.normal(size=(n, 6, 2))
    seen = np.ones((n, 2), dtype=bool)
    seen[:100, 0] = seen[50:300, 1] = seen[1400, 1] = False
    t[:, 2] = 7
    t[5] = np.nan  # not observed
    lengths = random.integers(2, 6, n)
    lengths[400] = 6
    path = tmp_path / "x.npz"
    y, names = np.arange(n) % 3, np.array(["p", "q", "r", "s"])
    np.savez(path, t=t, a=a, n=lengths, seen=seen, y=y, who=np.arange(n) // 7, names=names, notes=np.zeros((2, 5)))
    return path


def rendered(report: dict[str, Any]) -> str:
    text = io.StringIO()
    Console(file=text, width=160).print(render_inspection(report))
    return text.getvalue()


def test_archive_and_store_tell_the_same(archive: Path, tmp_path: Path) -> None:
    report = json.loads(json.dumps(inspect_path(archive, MAPPING)))
    assert report["format"] == "npz"
    assert report["bytes"] == archive.stat().st_size
    assert report["samples"] == 1500
    text, audio = report["modalities"]
    assert (text["name"], text["kind"], text["width"], text["missing"]) == ("text", "vector", 4, 100)
    assert (text["frames"], text["nan"], text["inf"], text["lengths"]) == (1400, 0, 0, None)
    assert text["constant"] == {"count": 1, "first": ["r"]}
    assert text["dtype"] == "float64"
    assert (audio["kind"], audio["missing"], audio["lengths"]) == ("sequence", 251, [2, 6])
    assert audio["constant"] == {"count": 0, "first": []}
    patterns = {p["observed"]: p["samples"] for p in report["patterns"]}
    assert patterns == {"{at}": 1199, "{t}": 201, "{a}": 50, "{}": 50}
    assert report["label"] == {"name": "y", "kind": "class", "classes": {"0": 500, "1": 500, "2": 500}}
    assert report["labels"] == {"as score": {"name": "y", "kind": "score"}}
    assert report["groups"] == {"who": 215}
    assert report["unmapped"] == [{"name": "notes", "dtype": "float64", "shape": [2, 5]}]

    convert(archive, tmp_path / "x.h5", MAPPING)
    stored = json.loads(json.dumps(inspect_path(tmp_path / "x.h5")))
    for modality in stored["modalities"]:
        assert modality.pop("dtype") == "float32"
    for modality in report["modalities"]:
        del modality["dtype"]
    for key in ("samples", "modalities", "patterns", "label", "labels", "groups", "splits", "window"):
        assert stored[key] == report[key]


def test_nan_and_infinity_are_counted_not_refused(archive: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(archive))
    arrays["t"][1000:1003, 1] = np.nan
    arrays["a"][1401, 0] = np.inf
    arrays["a"][500, 5] = np.inf  # beyond its length
    arrays["n"][500] = 3
    np.savez(archive, **arrays)
    text, audio = inspect_path(archive, MAPPING)["modalities"]
    assert (text["nan"], text["inf"]) == (3, 0)
    assert (audio["nan"], audio["inf"]) == (0, 2)
    with StoreWriter(tmp_path / "n.h5", modalities=["a"], widths={"a": 2}, kinds={"a": "vector"}) as writer:
        writer.append({"a": np.array([[np.nan, 1], [np.inf, 1], [2, 1]])})
    (a,) = inspect_path(tmp_path / "n.h5")["modalities"]
    assert (a["nan"], a["inf"], a["constant"]) == (1, 1, {"count": 2, "first": [0, 1]})


def test_an_archive_that_no_mapping_fits(archive: Path) -> None:
    report = json.loads(json.dumps(inspect_path(archive)))
    assert report["mapping"] is None
    assert report["problem"].startswith("no built-in mapping fits the arrays")
    assert {array["name"] for array in report["unmapped"]} == set(np.load(archive).files)
    assert "notes" in rendered(report)
    with pytest.raises(ValueError, match="mapping hazumi needs"):
        inspect_path(archive, "hazumi")


def test_scores_are_shown_as_classes_and_histogram(make_store: Callable[..., FeatureStore]) -> None:
    scores = np.repeat([1.0, 2.0, 3.0, 4.0], 25)
    spec = {"name": "score", "kind": "quantiles", "classes": 2}
    few = inspect_path(make_store(100, labels={"score": scores}, task={"label": spec}).path)["label"]
    assert few["classes"] == {"≤2.5": 50, ">2.5": 50}
    assert few["histogram"] == {"1": 25, "2": 25, "3": 25, "4": 25}
    many = inspect_path(make_store(100, labels={"score": np.arange(100.0)}, task={"label": spec}).path)["label"]
    assert list(many["histogram"].values()) == [10] * 10
    bad = inspect_path(make_store(3, labels={"score": np.array([1, np.nan, 2])}, task={"label": spec}).path)
    assert "NaN in 1 samples" in bad["label"]["problem"]
    assert "NaN in 1 samples" in rendered(bad)


def test_rendering_shows_what_was_found(archive: Path, tmp_path: Path) -> None:
    text = rendered(inspect_path(archive, MAPPING))
    for part in (
        "x.npz",
        "1,500 samples",
        "text",
        "constant columns of text: r",
        "{at}",
        "1,199",
        "label y (class)",
        "further label as score: y (score)",
        "215 groups",
        "2×5",
    ):
        assert part in text
    generated = np.array([[0, 1], [0, 0]], dtype=bool)
    columns = {"generated": generated, "splits": {"part": np.array(["train", "test"])}}
    kinds = {"[a]": "vector", "b": "vector"}
    with StoreWriter(tmp_path / "g.h5", modalities=list(kinds), widths={"[a]": 1, "b": 1}, kinds=kinds) as writer:
        writer.append(
            {"[a]": np.ones((2, 1)), "b": np.ones((2, 1))}, available=np.array([[1, 0], [1, 1]]) > 0, **columns
        )
    report = inspect_path(tmp_path / "g.h5")
    assert [m["generated"] for m in report["modalities"]] == [0, 1]
    assert "[a]" in rendered(report), "names are no markup"
    assert "parts of part" in rendered(report)


def test_unreadable_files(tmp_path: Path) -> None:
    for name, content in (("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(50)), ("a.npz", b"PK\x03\x04"), ("a.txt", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            inspect_path(tmp_path / name)
        assert "\n" not in str(error.value)
