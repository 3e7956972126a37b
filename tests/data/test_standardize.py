from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.preprocessing import StandardScaler

from modafill.data import Batch, FeatureStore, Standardizer
from modafill.data import standardize as module

MakeStore = Callable[..., FeatureStore]


@pytest.fixture
def store(make_store: MakeStore) -> FeatureStore:
    random = np.random.default_rng(2)
    n = 150
    a = (random.normal(size=(n, 4)) * [1, 100, 1e-3, 1] + [0, 1e4, 3, 0]).astype(np.float32)
    a[:, 3] = 0.1
    b = [random.normal(size=(t, 3)) * 5 + 2 for t in random.integers(1, 12, n)]
    available = random.random((n, 2)) < 0.7
    groups, order = {"g": np.arange(n) // 10}, np.arange(n)
    return make_store(features={"a": a, "b": b}, available=available, groups=groups, order=order)


def frames(store: FeatureStore, rows: np.ndarray, m: int) -> np.ndarray:
    """Observed values of modality m, collected one sample at a time."""
    name = store.modalities[m]
    found = []
    for row in rows:
        one = store.read(np.array([row]))
        if one.available[0, m]:
            x = one.features[name][0].numpy()
            found.append(x[: one.lengths[name][0]] if x.ndim == 2 else x[None])
    return np.concatenate(found).astype(np.float64)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_against_scikit_learn(store: FeatureStore, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "FIT_ROWS", block)
    rows = np.random.default_rng(0).permutation(150)[:90]
    fitted = Standardizer.fit(store, rows)
    batch = store.read(np.arange(150))
    out = fitted.transform(batch)
    for m, name in enumerate(store.modalities):
        oracle = StandardScaler().fit(frames(store, rows, m))
        varies = oracle.var_ > 1e-20
        assert (fitted.std[name] > 0).tolist() == varies.tolist()
        assert fitted.count[name] == oracle.n_samples_seen_
        np.testing.assert_allclose(fitted.mean[name], oracle.mean_, rtol=1e-10)
        np.testing.assert_allclose(fitted.std[name][varies], np.sqrt(oracle.var_)[varies], rtol=1e-9)
        for i in range(150):
            x = batch.features[name][i].double().numpy()
            expected = oracle.transform(x.reshape(-1, x.shape[-1])).reshape(x.shape) * varies
            valid = int(batch.lengths[name][i]) if x.ndim == 2 else None
            got = out.features[name][i].numpy()
            if not batch.available[i, m]:
                assert not got.any(), "hidden stays zero"
            elif valid is None:
                np.testing.assert_allclose(got, expected, atol=2e-3)
            else:
                np.testing.assert_allclose(got[:valid], expected[:valid], atol=1e-5)
                assert not got[valid:].any(), "padding stays zero"
    assert torch.equal(batch.features["a"], store.read(np.arange(150)).features["a"]), "the batch itself is untouched"


def test_constant_columns_become_zero(store: FeatureStore) -> None:
    fitted = Standardizer.fit(store, np.arange(100))
    assert fitted.std["a"].tolist()[3] == 0
    batch = store.read(np.arange(100, 150))
    batch.features["a"][:, 3] = 7.0
    assert not fitted.transform(batch).features["a"][:, 3].any()


def test_hidden_values_may_be_nan(store: FeatureStore) -> None:
    fitted = Standardizer.fit(store, np.arange(150))
    batch = store.read(np.arange(150))
    clean = fitted.transform(batch)
    for m, name in enumerate(store.modalities):
        batch.features[name][~batch.available[:, m]] = torch.nan
    batch.features["b"][torch.arange(batch.features["b"].shape[1]) >= batch.lengths["b"][:, None]] = torch.inf
    out = fitted.transform(batch)
    for name in store.modalities:
        assert torch.equal(out.features[name], clean.features[name])


def test_observed_nan_is_an_error(make_store: MakeStore) -> None:
    x = np.ones((5, 2))
    x[3, 1] = np.nan
    store = make_store(features={"a": x, "b": np.ones((5, 2))})
    with pytest.raises(ValueError, match="modality 'a': got NaN or infinity in row 3,"):
        Standardizer.fit(store, np.arange(5))
    with pytest.raises(ValueError, match="rows: got none"):
        Standardizer.fit(store, np.arange(0))


def test_clip(store: FeatureStore) -> None:
    plain, clipped = (Standardizer.fit(store, np.arange(150), clip=c) for c in (None, 1.5))
    batch = store.read(np.arange(150))
    expected = plain.transform(batch).features["b"]
    assert expected.abs().max() > 1.5
    assert torch.equal(clipped.transform(batch).features["b"], expected.clamp(-1.5, 1.5))
    with pytest.raises(ValueError, match="clip: got -1"):
        Standardizer.fit(store, np.arange(150), clip=-1)


def test_each_turn_of_a_windowed_store_counts_once(store: FeatureStore) -> None:
    plain, windowed = Standardizer.fit(store, np.arange(70)), Standardizer.fit(store.windowed(4), np.arange(70))
    assert torch.equal(plain.mean["a"], windowed.mean["a"])
    assert plain.count == windowed.count
    batch = windowed.transform(store.windowed(4).read(np.arange(70)))
    short = batch.lengths["a"] < 4
    assert short.any()
    for i in torch.where(short)[0]:
        assert not batch.features["a"][i, batch.lengths["a"][i] :].any()


def test_inverse(store: FeatureStore) -> None:
    fitted = Standardizer.fit(store, np.arange(150))
    batch = store.read(np.arange(150)).select(torch.from_numpy(store.available()[:, 0]))
    back = fitted.inverse("a", fitted.transform(batch).features["a"])
    torch.testing.assert_close(back, batch.features["a"], rtol=1e-5, atol=1e-6)


def test_a_modality_that_training_never_observes(make_store: MakeStore) -> None:
    available = np.array([[1, 0], [1, 0], [1, 1]], dtype=bool)
    store = make_store(features={"a": np.arange(6.0).reshape(3, 2), "b": np.full((3, 2), 9.0)}, available=available)
    fitted = Standardizer.fit(store, np.array([0, 1]))
    assert fitted.unseen == ("b",)
    assert fitted.transform(store.read(np.array([2]))).features["b"].tolist() == [[9, 9]]


@pytest.mark.parametrize("clip", [None, 4.0])
def test_state_round_trip(store: FeatureStore, tmp_path: Path, clip: float | None) -> None:
    fitted = Standardizer.fit(store, np.arange(150), clip=clip)
    save_file(fitted.state_dict(), tmp_path / "s.safetensors")
    again = Standardizer.from_state(load_file(tmp_path / "s.safetensors"))
    assert again.clip == clip
    assert again.count == fitted.count
    batch = store.read(np.arange(150))
    for name in store.modalities:
        assert torch.equal(again.transform(batch).features[name], fitted.transform(batch).features[name])


def test_foreign_batches(store: FeatureStore) -> None:
    fitted = Standardizer.fit(store, np.arange(150))
    ones = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"unknown modality 'c', expected \['a', 'b'\]"):
        fitted.transform(Batch({"c": torch.ones(1, 4)}, ones, torch.zeros(1).long()))
    with pytest.raises(ValueError, match=r"features\['a'\]: got width 5, expected 4"):
        fitted.transform(Batch({"a": torch.ones(1, 5)}, ones, torch.zeros(1).long()))
