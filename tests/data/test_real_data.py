"""The protocols of the data sets that the package has mappings for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score

from modafill.data import Labels, Standardizer, demo_path, inspect_path, make_splits, open_data

Find = Callable[[str], Path]


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_hazumi(shared_data: Find, tmp_path: Path) -> None:
    path = shared_data("hazumi2012.npz")
    arrays = np.load(path, allow_pickle=False)
    store = open_data(path, tmp_path)
    assert store.task["mapping"] == "hazumi"
    assert store.widths == {"text": 785, "audio": 384, "vision": 66}
    rows = np.random.default_rng(0).integers(0, len(store), 50)
    batch = store.read(rows).validate(store.widths)
    for name in store.modalities:
        np.testing.assert_array_equal(batch.features[name], arrays[name][rows])

    splits = make_splits(store, folds=5, seed=0)
    predicted, truth = [], []
    for split in splits:
        assert not set(arrays["pid"][split.train]) & set(arrays["pid"][np.r_[split.valid, split.test]])
        labels = Labels.fit(store.task["label"], store.labels("UI_mean"), split.train)
        score = np.round(arrays["UI_mean"].astype(np.float64), 1)
        low, high = np.quantile(score[split.train], [1 / 3, 2 / 3])
        classes = labels.encode(store.labels("UI_mean"))
        np.testing.assert_array_equal(classes, (score > low).astype(int) + (score > high))
        standardizer = Standardizer.fit(store, split.train)
        x = standardizer.transform(store.read(np.arange(len(store)))).features["vision"].numpy()
        learned = np.r_[split.train, split.valid]
        model = LogisticRegression(max_iter=200).fit(x[learned], classes[learned])
        predicted.append(model.predict(x[split.test]))
        truth.append(classes[split.test])
    recall = recall_score(np.concatenate(truth), np.concatenate(predicted), average="macro")
    assert abs(recall - 0.504) < 0.02, "the reference point of vision alone"


def test_hazumi_windows(shared_data: Find, tmp_path: Path) -> None:
    path = shared_data("hazumi2010.npz")
    arrays = np.load(path, allow_pickle=False)
    store = open_data(path, tmp_path)
    view = store.windowed(store.task["window"])
    batch = view.read(np.arange(len(view)))
    for row in (0, 5, 7, 8, 500, 2797):
        turns = [r for r in range(row - 7, row + 1) if r >= 0 and arrays["pid"][r] == arrays["pid"][row]]
        assert batch.lengths["vision"][row] == len(turns)
        np.testing.assert_array_equal(batch.features["vision"][row, : len(turns)], arrays["vision"][turns])


def test_mosi(shared_data: Find, tmp_path: Path) -> None:
    path = shared_data("mosi_bclstm_utt.npz")
    arrays = np.load(path, allow_pickle=False)
    store = open_data(path, tmp_path)
    (split,) = make_splits(store, folds=1, seed=0)
    assert split.test.tolist() == list(range(1447, 2199))
    videos = store.groups("vid")
    assert not set(videos[split.train]) & set(videos[split.valid])
    np.testing.assert_array_equal(store.read(split.test).features["vision"], arrays["video_test"])
    labels = Labels.fit(store.task["label"], store.labels(), split.train)
    np.testing.assert_array_equal(labels.encode(store.labels())[split.test], arrays["y_test"])
    assert store.ids(split.test[:1]) == [arrays["id_test"][0]]


def test_mmmo(shared_data: Find, tmp_path: Path) -> None:
    path = shared_data("mfn_mmmo.npz")
    store = open_data(path, tmp_path)
    (split,) = make_splits(store, folds=1, seed=0)
    assert [len(part) for part in split] == [220, 40, 80]
    assert store.available(split.train).tolist() == [[False, True, True]] * 220
    assert store.available(split.test).all()
    assert not store.read(split.train).features["text"].any()
    assert torch.equal(store.read(split.train).lengths["audio"], torch.full((220,), 20))
    assert Standardizer.fit(store, split.train).unseen == ("text",)
    assert store.read(np.arange(340)).features["audio"].abs().max() <= 255
    assert [p["observed"] for p in inspect_path(path)["patterns"]] == ["{av}", "{atv}"]


def test_demonstration_digits(tmp_path: Path) -> None:
    path = demo_path()
    assert path.stat().st_size < 1_000_000
    store = open_data(path, tmp_path)
    assert store.task["mapping"] == "digits"
    assert store.widths == {"fourier": 76, "karhunen": 64, "zernike": 47}
    assert np.bincount(store.labels()).tolist() == [200] * 10
    assert store.available().all()
    split = make_splits(store, folds=5, seed=0)[0]
    x = Standardizer.fit(store, split.train).transform(store.read(np.arange(2000))).validate(store.widths).features
    model = LogisticRegression(max_iter=100).fit(x["karhunen"][split.train], store.labels()[split.train])
    assert model.score(x["karhunen"][split.test], store.labels()[split.test]) > 0.9
    assert (path.parent / "ATTRIBUTION.md").read_text(encoding="utf-8").count("CC BY 4.0")
