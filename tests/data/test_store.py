from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from modafill.data import Batch, FeatureStore, StoreWriter
from modafill.data import store as store_module
from modafill.data import writer as writer_module

MakeStore = Callable[..., FeatureStore]
NAMES = ("text", "audio", "vision")


def rows_of(batch: Batch, name: str) -> list[np.ndarray]:
    """Each sample's valid values."""
    x = batch.features[name].numpy()
    return [x[i, : batch.lengths[name][i]] if name in batch.lengths else x[i] for i in range(len(batch))]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 70), label="n")
    widths = dict(zip(NAMES, data.draw(st.tuples(*[st.integers(1, 9)] * 3)), strict=True))
    steps = data.draw(st.integers(1, 6), label="T")
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    lengths = random.integers(1, data.draw(st.sampled_from([1, 2, 40])) + 1, n)
    text = random.normal(size=(n, widths["text"])).astype(np.float32)
    audio = [random.normal(size=(t, widths["audio"])).astype(np.float32) for t in lengths]
    vision = random.normal(size=(n, steps, widths["vision"])).astype(np.float32)
    available = random.random((n, 3)) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    labels, groups = random.normal(size=n), random.choice(["ä", "b", ""], n)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=3))), n]
    read = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=30)), dtype=np.int64)
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.h5")
        kinds = {"text": "vector", "audio": "sequence", "vision": "sequence"}
        with StoreWriter(path, modalities=NAMES, widths=widths, kinds=kinds, steps={"vision": steps}) as writer:
            for a, b in pairwise(cuts):
                writer.append(
                    {"text": text[a:b], "audio": audio[a:b], "vision": vision[a:b]},
                    available=available[a:b],
                    labels={"y": labels[a:b]},
                    groups={"g": groups[a:b]},
                )
        with FeatureStore(path) as store:
            assert len(store) == n
            assert store.modalities == NAMES
            assert store.widths == widths
            assert store.kinds == kinds
            np.testing.assert_array_equal(store.available(), available)
            np.testing.assert_array_equal(store.labels("y"), labels)
            assert store.groups().tolist() == groups.tolist()
            batch = store.read(read)
    assert batch.row_id.tolist() == read.tolist()
    np.testing.assert_array_equal(batch.available, available[read])
    stored = {"text": text, "audio": audio, "vision": vision}
    for m, name in enumerate(NAMES):
        for got, row in zip(rows_of(batch, name), read, strict=True):
            if available[row, m]:
                np.testing.assert_array_equal(got, stored[name][row])
            else:
                assert not got.any()
                assert name == "text" or len(got) == 0
    longest = max((lengths[r] for r in read if available[r, 1]), default=1)
    assert batch.features["audio"].shape == (len(read), max(1, longest), widths["audio"])
    for i, t in enumerate(batch.lengths["audio"]):
        assert not batch.features["audio"][i, t:].any(), "padding is zero"


def test_padded_sequences_with_lengths(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 4, 3) + 1
    with StoreWriter(tmp_path / "a.h5", modalities=["a"], widths={"a": 3}, kinds={"a": "sequence"}) as writer:
        writer.append({"a": x}, lengths={"a": np.array([2, 4])})
    batch = FeatureStore(tmp_path / "a.h5").read(np.array([1, 0]))
    assert batch.lengths["a"].tolist() == [4, 2]
    np.testing.assert_array_equal(batch.features["a"][0], x[1])
    np.testing.assert_array_equal(batch.features["a"][1, :2], x[0, :2])
    assert not batch.features["a"][1, 2:].any()


def test_scattered_reads_over_many_chunks(make_store: MakeStore) -> None:
    values = np.arange(30_000, dtype=np.float32)[:, None] * np.array([1, -1], dtype=np.float32)
    store = make_store(features={"a": values, "b": values[:, :1]})
    rows = np.random.default_rng(0).integers(0, 30_000, 700)
    np.testing.assert_array_equal(store.read(rows).features["a"], values[rows])
    assert store.read(rows[:0]).features["a"].shape == (0, 2)
    for wrong in (np.array([30_000]), np.array([-1]), np.array([0.5]), np.array([[1]])):
        with pytest.raises(ValueError, match="rows: got"):
            store.read(wrong)


@pytest.mark.parametrize("shape, steps", [((2,), {}), ((3, 2), {"b": 3}), ((3, 2), {})])
def test_missing_and_generated_values(make_store: MakeStore, shape: tuple[int, ...], steps: dict[str, int]) -> None:
    x = {"a": np.ones((3, 2)), "b": np.full((3, *shape), np.nan)}
    x["b"][1] = 5
    available = np.array([[1, 0], [1, 0], [1, 0]], dtype=bool)
    generated = np.array([[0, 0], [0, 1], [0, 0]], dtype=bool)
    store = make_store(features=x, steps=steps, available=available, generated=generated)
    rows = np.arange(3)
    observed, filled = store.read(rows), store.read(rows, generated=True)
    assert not observed.features["b"].any()
    assert observed.available[:, 1].tolist() == [False, False, False]
    assert filled.features["b"].flatten(1).unique(dim=1).tolist() == [[0], [5], [0]]
    assert filled.available[:, 1].tolist() == [False, True, False]
    if steps:
        assert observed.lengths["b"].tolist() == [0, 0, 0]
        assert filled.lengths["b"].tolist() == [0, 3, 0]
    np.testing.assert_array_equal(store.generated(), generated)
    np.testing.assert_array_equal(store.available(), available)
    with h5py.File(store.path) as file:
        assert np.isfinite(file["modalities/b/values"][()]).all(), "values of missing entries are not kept"
    assert not make_store(3).generated().any()


def test_generated_must_be_missing(make_store: MakeStore) -> None:
    with pytest.raises(ValueError, match="generated: got entries that are also available"):
        make_store(2, generated=np.ones((2, 3), dtype=bool))


def test_columns(make_store: MakeStore) -> None:
    n = 6
    store = make_store(
        n,
        ids=[f"clip {i}" for i in range(n)],
        labels={"mood": np.array(list("abcabc")), "score": np.arange(n) / 2},
        groups={"who": np.array([3, 3, 1, 1, 2, 2])},
        splits={"official": np.array(["train"] * 4 + ["test"] * 2)},
        order=np.arange(n)[::-1],
        task={"label": {"name": "mood", "kind": "class"}},
    )
    assert store.label_names == ("mood", "score")
    assert store.group_names == ("who",)
    assert store.split_names == ("official",)
    assert store.ids(np.array([4, 0])) == ["clip 4", "clip 0"]
    assert store.labels("mood").tolist() == list("abcabc")
    assert store.groups().tolist() == [3, 3, 1, 1, 2, 2]
    assert store.split().tolist() == ["train"] * 4 + ["test"] * 2
    assert store.order().tolist() == [5, 4, 3, 2, 1, 0]
    assert store.task == {"label": {"name": "mood", "kind": "class"}}
    assert store.labels().tolist() == list("abcabc")
    store.task.clear()
    with pytest.raises(ValueError, match=r"expected one of the labels \['mood', 'score'\] to be named"):
        store.labels()
    with pytest.raises(ValueError, match="no groups named 'nobody'"):
        store.groups("nobody")


def ragged(make_store: MakeStore, n: int = 103) -> FeatureStore:
    random = np.random.default_rng(1)
    features = {"a": random.normal(size=(n, 3)), "b": [random.normal(size=(t, 2)) for t in random.integers(1, 9, n)]}
    available = random.random((n, 2)) < 0.7
    available[:, 0] |= ~available.any(1)
    return make_store(features=features, available=available)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("pool", [1, 16, 10_000])
def test_batches_cover_the_rows_once(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, seed: int | None, pool: int
) -> None:
    monkeypatch.setattr(store_module, "POOL_ROWS", pool)
    store = ragged(make_store)
    rows = np.random.default_rng(0).permutation(103)[:90]
    labels = np.arange(103) * 10
    batches = list(store.iter_batches(rows, 8, shuffle_seed=seed, labels=labels))
    assert [len(b) for b in batches] == [8] * 11 + [2]
    order = np.concatenate([b.row_id for b in batches])
    if seed is None:
        assert order.tolist() == rows.tolist()
    else:
        assert sorted(order) == sorted(rows)
        assert order.tolist() != sorted(rows)
        again = store.iter_batches(np.sort(rows), 8, shuffle_seed=seed)
        assert np.concatenate([b.row_id for b in again]).tolist() == order.tolist()
        other = store.iter_batches(rows, 8, shuffle_seed=4)
        assert np.concatenate([b.row_id for b in other]).tolist() != order.tolist()
    for batch in batches:
        alone = store.read(batch.row_id.numpy())
        for name in store.modalities:
            assert torch.equal(batch.features[name], alone.features[name])
        assert torch.equal(batch.lengths["b"], alone.lengths["b"])
        assert batch.label.tolist() == labels[batch.row_id].tolist()


def test_shuffling_mixes_across_blocks(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "POOL_ROWS", 64)
    store = make_store(640)
    first = next(store.iter_batches(np.arange(640), 32, shuffle_seed=0)).row_id.numpy()
    assert np.ptp(first) > 64, "a batch draws on blocks that lie apart"
    assert len(np.unique(first // 16)) <= 5, "but only on a few of them"


class Rows(Dataset[torch.Tensor]):
    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> torch.Tensor:
        values = self.store.read(np.array([row])).features["text"][0]
        assert self.store._process == os.getpid(), "the handle is not the parent's"
        return values


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system has no fork")
def test_forked_workers_open_their_own_file(make_store: MakeStore) -> None:
    store = make_store(40)
    expected = store.read(np.arange(40)).features["text"]
    loader = DataLoader(Rows(store), batch_size=5, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), expected)
        assert torch.equal(store.read(np.arange(40)).features["text"], expected), "the parent's file is still good"


def test_pickle_and_close(make_store: MakeStore) -> None:
    store = make_store(10, groups={"g": np.zeros(10)}, order=np.arange(10))
    for view in (store, store.windowed(3)):
        copy = pickle.loads(pickle.dumps(view))
        assert torch.equal(copy.read(np.arange(10)).features["text"], view.read(np.arange(10)).features["text"])
    with store:
        pass
    assert len(store.read(np.array([1]))) == 1, "a closed store opens again"


# What opening refuses.


def test_truncated_files(make_store: MakeStore, tmp_path: Path) -> None:
    whole = ragged(make_store).path.read_bytes()
    path = tmp_path / "cut.h5"
    for size in [0, 1, 7, 8, 100, 512, 2048, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.h5: not a readable feature store: .") as error:
            FeatureStore(path)
        assert "\n" not in str(error.value)


def test_a_file_that_shrinks_while_it_is_open(make_store: MakeStore) -> None:
    store = make_store(features={"a": np.ones((50_000, 4)), "b": np.ones((50_000, 4))})
    os.truncate(store.path, store.path.stat().st_size // 4)
    with pytest.raises(ValueError, match=r"store0\.h5: cannot read .*: ."):
        store.read(np.array([49_999]))
    with pytest.raises(ValueError, match=r"store0\.h5: cannot read ids: ."):
        store.ids()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        FeatureStore(tmp_path / "none.h5")


def delete(path: str) -> Callable[[h5py.File], object]:
    return lambda file: file.__delitem__(path)


def replace_with(path: str, values: Any) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        if path in file:
            del file[path]
        file[path] = values

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda file: file.attrs.__delitem__("format"), "not a feature store"),
        (
            lambda file: file.attrs.__setitem__("version", 2),
            "store version 2, but this modafill reads versions up to 1",
        ),
        (lambda file: file.attrs.__setitem__("modalities", "{"), "Expecting property name"),
        (lambda file: file.attrs.__setitem__("modalities", "[]"), "names no modalities"),
        (lambda file: file.attrs.__delitem__("modalities"), "modalities"),
        (delete("available"), "no array 'available'"),
        (delete("modalities/b"), "no array 'modalities/b/values'"),
        (delete("modalities/b/offsets"), r"'b' has \d+ samples, expected 103"),
        (replace_with("available", np.ones((103, 3), dtype=bool)), r"available is bool \(103, 3\)"),
        (replace_with("available", np.ones((103, 2))), "available is float64"),
        (replace_with("available", np.ones((102, 2), dtype=bool)), "'a' has 103 samples, expected 102"),
        (replace_with("modalities/a/values", np.zeros((103, 3), dtype=int)), "'a' has values int64"),
        (replace_with("modalities/a/values", np.zeros((103, 2, 2, 2))), "'a' has values float64"),
        (replace_with("modalities/b/offsets", np.arange(104)), "'b' has offsets that do not fit"),
        (replace_with("modalities/b/offsets", np.ones(104, dtype=int)), "'b' has malformed offsets"),
        (replace_with("generated", np.ones((5, 2), dtype=bool)), r"generated is bool \(5, 2\)"),
        (replace_with("generated", np.ones((103, 2))), r"generated is float64 \(103, 2\), expected bool"),
        (replace_with("modalities/a/columns", ["x"]), r"modalities/a/columns has shape \(1,\), expected \(3,\)"),
        (lambda file: file.attrs.__setitem__("modalities", '"ab"'), "modalities: got 'ab', expected a list of texts"),
        (lambda file: file.attrs.__setitem__("modalities", 5), "attribute modalities: got .*5.*, expected a text"),
        (lambda file: file.attrs.__setitem__("notes", "{}"), r"notes: got {}, expected a list of texts"),
        (replace_with("labels/y", np.zeros(4)), "labels/y has 4 entries, expected 103"),
        (replace_with("ids", np.zeros(4)), "ids has 4 entries"),
        (replace_with("splits", np.zeros(103)), "splits is an array, expected a group of them"),
        (replace_with("modalities/b/offsets", np.r_[0, np.zeros(103, dtype=int)]), "do not fit|without frames"),
    ],
)
def test_inconsistent_files(
    make_store: MakeStore, tmp_path: Path, change: Callable[[h5py.File], object], message: str
) -> None:
    path = tmp_path / "changed.h5"
    shutil.copy(ragged(make_store).path, path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=rf"changed\.h5: .*{message}"):
        FeatureStore(path)


LINKED = ["ids", "generated", "labels", "labels/y", "splits", "available", "modalities", "modalities/b",
          "modalities/b/values", "modalities/b/offsets", "modalities/b/columns"]  # fmt: skip


def linked(store: FeatureStore, path: Path, name: str, link: h5py.SoftLink | h5py.ExternalLink) -> Path:
    shutil.copy(store.path, path)
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
        file[name] = link
    return path


@pytest.mark.parametrize("name", LINKED)
def test_links_are_not_followed(make_store: MakeStore, tmp_path: Path, name: str) -> None:
    store = ragged(make_store)
    for link in (h5py.SoftLink("/order"), h5py.ExternalLink(str(store.path), name), h5py.ExternalLink("none.h5", "x")):
        path = linked(store, tmp_path / "linked.h5", name, link)
        with pytest.raises(ValueError, match=rf"linked\.h5: '{name}.*' is a link to elsewhere, which is not followed"):
            FeatureStore(path)


def test_what_links_name_is_not_opened(make_store: MakeStore, tmp_path: Path) -> None:
    """A pipe keeps who opens it waiting."""
    os.mkfifo(tmp_path / "pipe")
    link = h5py.ExternalLink(str(tmp_path / "pipe"), "x")
    paths = [linked(ragged(make_store), tmp_path / f"linked{i}.h5", name, link) for i, name in enumerate(LINKED)]
    process = multiprocessing.get_context("fork").Process(target=_open_all, args=(paths,))
    process.start()
    process.join(20)
    process.kill()
    process.join()
    assert process.exitcode == 0


def _open_all(paths: list[Path]) -> None:
    for path in paths:
        with pytest.raises(ValueError, match="is a link to elsewhere"):
            FeatureStore(path)


WRONG_TASKS = [
    ([], "task: got \\[\\], expected an object"),
    ({"label": "mood"}, "task: label: got 'mood', expected a label specification"),
    ({"label": {"kind": "class"}}, "task: got the label {'kind': 'class'}, expected a specification with the name"),
    ({"label": {"name": "y", "kind": "colour"}}, "task: label: got kind 'colour'"),
    ({"labels": {"other": []}}, "task: got the label \\[\\], expected a specification"),
    ({"group": 3}, "task: group: got 3, expected the name of a group column"),
    ({"window": "4"}, "task: window: got '4', expected a whole number of turns"),
    ({"folds": "a"}, "task: folds: got 'a', expected a list of names"),
]


@pytest.mark.parametrize("task, message", WRONG_TASKS)
def test_malformed_tasks(make_store: MakeStore, tmp_path: Path, task: Any, message: str) -> None:
    path = tmp_path / "changed.h5"
    shutil.copy(make_store(3).path, path)
    with h5py.File(path, "r+") as file:
        file.attrs["task"] = json.dumps(task)
    with pytest.raises(ValueError, match=rf"changed\.h5: {message}"):
        FeatureStore(path)
    if task:
        with pytest.raises(ValueError, match=message):
            make_store(3, task=task)


def with_texts(make_store: MakeStore) -> FeatureStore:
    """A store whose columns of texts have words that occur nowhere else."""
    n = 6
    features = {name: np.ones((n, 2)) for name in ("a", "b")}
    return make_store(
        features=features,
        ids=[f"clip{i}" for i in range(n)],
        labels={"mood": np.array(["glad", "glum"] * 3)},
        groups={"who": np.array(["anne", "bert"] * 3)},
        splits={"official": np.array(["trainer", "tester"] * 3)},
        task={"label": {"name": "mood", "kind": "class"}, "group": "who"},
    )


@pytest.mark.parametrize(
    "column, written, damaged",
    [
        ("ids", b"clip3", b"clip4"),
        ("labels/mood", b"glad", b"glum"),
        ("groups/who", b"anne", b"bert"),
        ("splits/official", b"trainer", b"grainer"),
    ],
)
def test_damaged_texts(make_store: MakeStore, column: str, written: bytes, damaged: bytes) -> None:
    path = with_texts(make_store).path
    content = path.read_bytes()
    assert written in content
    path.write_bytes(content.replace(written, damaged, 1))
    store = FeatureStore(path)
    read = {"ids": store.ids, "labels": store.labels, "groups": store.groups, "splits": store.split}
    with pytest.raises(ValueError, match=rf"{path.name}: cannot read {column}: damaged texts: their SHA-256"):
        read.pop(column.split("/")[0])()
    for other in read.values():
        assert len(other()) == 6


@pytest.mark.parametrize("written, damaged", [(b'"class"', b'"score"'), (b'["a", "b"]', b'["b", "a"]')])
def test_damaged_description(make_store: MakeStore, written: bytes, damaged: bytes) -> None:
    path = with_texts(make_store).path
    content = path.read_bytes()
    assert content.count(written) == 1
    path.write_bytes(content.replace(written, damaged))
    with pytest.raises(ValueError, match=rf"{path.name}: not a readable feature store: .*checksum"):
        FeatureStore(path)


def test_digests_by_hand(tmp_path: Path) -> None:
    """Of blocks, the SHA-256 of all texts; a store without any is read as it is."""
    path, words = tmp_path / "a.h5", ["ä", "", "b", "c", "ä"]
    with writer_at(path, columns={"a": ["left", "right"]}) as writer:
        for block in (words[:2], words[2:]):
            n = len(block)
            writer.append({"a": np.ones((n, 2)), "b": np.ones((n, 1, 3))}, labels={"y": np.array(block)})
        writer.notes = ["a: a flaw"]
    expected = {
        "labels/y": words,
        "ids": list("01234"),
        "modalities/a/columns": ["left", "right"],
    }
    with h5py.File(path, "r+") as file:
        for place, texts in expected.items():
            told = file[place].attrs["sha256"]
            assert told == hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest().encode()
            del file[place].attrs["sha256"]
        del file.attrs["notes"]
    with FeatureStore(path) as store:
        assert store.labels("y").tolist() == words
        assert store.notes == ()


@pytest.mark.parametrize("text", [b"\xff", 3, "\udc80", b"a\0"])
def test_what_is_no_text_is_refused(tmp_path: Path, text: Any) -> None:
    labels = {"y": np.array(["a", text], dtype=object)}
    wrong = pytest.raises(ValueError, match=r"labels/y: got .*(expected a text|not UTF-8|zero byte)")
    with wrong, writer_at(tmp_path / "a.h5") as writer:
        writer.append({"a": A, "b": B}, labels=labels)


def test_observed_sequences_need_frames(make_store: MakeStore, tmp_path: Path) -> None:
    path = tmp_path / "changed.h5"
    shutil.copy(ragged(make_store).path, path)
    with h5py.File(path, "r+") as file:
        file["available"][()] = True
    with pytest.raises(ValueError, match="'b' has available samples without frames"):
        FeatureStore(path)


# The writer.


def writer_at(path: Path, **changes: Any) -> StoreWriter:
    given: dict[str, Any] = {"modalities": ["a", "b"], "widths": {"a": 2, "b": 3}}
    given["kinds"] = {"a": "vector", "b": "sequence"}
    return StoreWriter(path, **{**given, **changes})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with writer_at(path) as writer:
        writer.append({"a": np.ones((1, 2)), "b": [np.ones((2, 3))]})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="features: got"), writer_at(path) as writer:  # noqa: PT012
        writer.append({"a": np.ones((1, 2)), "b": [np.ones((2, 3))]})
        assert path.read_bytes() == before
        writer.append({})
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="no samples were written"), writer_at(path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"modalities": ["a", "a"]}, "expected distinct names"),
        ({"modalities": []}, "expected distinct names"),
        ({"kinds": {"a": "vector", "b": "image"}}, r"kinds\['b'\]: got 'image'"),
        ({"widths": {"a": 0, "b": 3}}, r"widths\['a'\]: got 0"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"columns": {"a": ["x"]}}, r"columns\['a'\]: got 1 names, expected 2"),
        ({"modalities": ["a/b"], "widths": {"a/b": 1}, "kinds": {"a/b": "vector"}}, "without '/'"),
        ({"modalities": ["a\0"], "widths": {"a\0": 1}, "kinds": {"a\0": "vector"}}, r"modalities: got 'a.x00'"),
    ],
)
def test_writer_arguments(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        writer_at(tmp_path / "a.h5", **changes)
    assert not list(tmp_path.iterdir())


A, B = np.ones((2, 2)), [np.ones((2, 3)), np.ones((1, 3))]


@pytest.mark.parametrize(
    "features, columns, message",
    [
        ({"a": A}, {}, r"features: got \['a'\]"),
        ({"a": A[:, :1], "b": B}, {}, r"features\['a'\]: got shape \(2, 1\), expected \(2, 2\)"),
        ({"a": A, "b": B[:1]}, {}, r"features\['b'\]: got 1 rows"),
        ({"a": A, "b": [B[0], np.ones((1, 2))]}, {}, r"features\['b'\]: got shape \(1, 2\) .* in row 3"),
        ({"a": A, "b": [B[0], np.ones((0, 3))]}, {}, r"length 0 in row 3"),
        ({"a": A, "b": B}, {"available": np.ones((2, 2))}, "available: got float64"),
        ({"a": A, "b": B}, {"labels": {"y": np.zeros(3)}}, "labels/y: got 3 entries, expected 2"),
        ({"a": A, "b": B}, {"labels": {"z": np.zeros(2)}}, r"got the columns .*labels/z"),
        ({"a": A, "b": B}, {"labels": {"y": np.zeros((2, 4))}}, r"labels/y: got shape \(2, 4\)"),
        ({"a": A, "b": B}, {"labels": {"y/z": np.zeros(2)}}, "labels: got 'y/z', expected a name without '/'"),
        ({"a": A, "b": B}, {"groups": {"": np.zeros(2)}}, "groups: got '', expected a name"),
        ({"a": A, "b": B}, {"labels": {"y": np.array(["glad", "sad"])}}, "labels/y: got texts, expected numbers"),
        ({"a": A, "b": B}, {"labels": {"y": np.zeros(2, dtype=complex)}}, "labels/y: got complex128, expected numbers"),
        ({"a": A * 1e39, "b": B}, {}, r"modalities/a/values: got .*1e\+39.*, expected what float32 can hold"),
    ],
)
def test_append_names_what_is_wrong(
    tmp_path: Path, features: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message), writer_at(tmp_path / "a.h5") as writer:  # noqa: PT012
        writer.append({"a": A, "b": B}, labels={"y": np.zeros(2)})
        writer.append(features, **{"labels": {"y": np.zeros(2)}, **columns})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "first, later, wrong",
    [
        ([1, 2], [3, 2.5], "2.5"),
        ([True, False], [1, 2], "2"),
        (np.array([1, 2], dtype=np.int8), [3, 300], "300"),
        ([1, 2], [3, np.nan], "nan"),
        (["glad", "sad"], [3, 4], "int64, expected texts as before"),
    ],
)
def test_later_blocks_fit_into_the_dtype_of_the_first(tmp_path: Path, first: Any, later: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"labels/y: got .*{wrong}"), writer_at(tmp_path / "a.h5") as writer:  # noqa: PT012
        writer.append({"a": A, "b": B}, labels={"y": np.asarray(first)})
        writer.append({"a": A, "b": B}, labels={"y": np.asarray(later)})
    assert not list(tmp_path.iterdir())


def test_later_blocks_of_another_dtype_keep_their_values(tmp_path: Path) -> None:
    with writer_at(tmp_path / "a.h5") as writer:
        for y in ([1.5, np.nan], np.array([3, 4]), np.array([True, False])):
            writer.append({"a": A, "b": B}, labels={"y": np.asarray(y)}, splits={"s": np.array([b"s\xc3\xb6t", b"x"])})
    store = FeatureStore(tmp_path / "a.h5")
    np.testing.assert_array_equal(store.labels("y"), [1.5, np.nan, 3, 4, 1, 0])
    assert store.split().tolist() == ["söt", "x"] * 3


def test_half_precision_and_column_names(tmp_path: Path) -> None:
    with writer_at(tmp_path / "a.h5", dtype="float16", columns={"a": ["left", "right"]}) as writer:
        writer.append({"a": A / 3, "b": B})
    store = FeatureStore(tmp_path / "a.h5")
    assert store.columns("a") == ["left", "right"]
    assert store.columns("b") is None
    assert store.dtypes["a"] == "float16"
    x = store.read(np.array([0])).features["a"]
    assert x.dtype == torch.float32
    assert x[0, 0] == np.float16(1 / 3)
    with (
        pytest.raises(ValueError, match=r"got .*70000.*, expected what float16 can hold"),
        writer_at(tmp_path / "b.h5", dtype="float16") as writer,
    ):
        writer.append({"a": A * 7e4, "b": B})


def read_all(path: Path) -> None:
    with FeatureStore(path) as store:
        store.read(np.arange(len(store)), generated=True)
        store.order()
        for read, columns in ((store.labels, store.label_names), (store.groups, store.group_names)):
            for column in columns:
                read(column)


def test_chunks_of_zeros_are_damage(make_store: MakeStore) -> None:
    """What a lost block of a disk looks like: neither values nor checksum."""
    path = with_texts(make_store).path
    content, places = path.read_bytes(), {}

    def find(name: str, data: h5py.Dataset | h5py.Group) -> None:
        if isinstance(data, h5py.Dataset) and not h5py.check_string_dtype(data.dtype):
            places[name] = [data.id.get_chunk_info(i) for i in range(data.id.get_num_chunks())]

    with h5py.File(path) as file:
        file.visititems(find)
    assert {"available", "modalities/a/values", "modalities/b/values"} <= places.keys()
    for chunks in places.values():
        for chunk in chunks:
            spoilt = bytearray(content)
            spoilt[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
            path.write_bytes(spoilt)
            with pytest.raises(ValueError, match=path.name):
                read_all(path)


def test_ctrl_c_within_a_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """h5py drops what is raised while it writes: the interrupt comes behind it, and no file does."""
    write, path = writer_module._Sink.write, tmp_path / "a.h5"
    count = SimpleNamespace(calls=0, last=0)

    def interrupted(sink: Any, data: Any) -> int:
        count.calls += 1
        if count.calls == count.last:
            os.kill(os.getpid(), signal.SIGINT)
        return write(sink, data)

    monkeypatch.setattr(writer_module._Sink, "write", interrupted)

    def append() -> None:
        with writer_at(path) as writer:
            for _ in range(3):
                writer.append({"a": np.ones((2, 2)), "b": np.ones((2, 1, 3))}, labels={"y": np.arange(2)})

    append()
    needed = count.calls
    assert needed > 10
    path.unlink()
    for count.last in range(1, needed + 1):
        count.calls = 0
        with pytest.raises(KeyboardInterrupt):
            append()
        assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
