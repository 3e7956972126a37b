"""A CDTP as imputer: what it never reads, what it never changes, stores and tables in and out."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch

from modafill import ModalityImputer
from modafill.bulk import impute_store, recognise_store
from modafill.data import FeatureStore, all_patterns, convert
from modafill.models.cdtp import CDTP, CDTPConfig, SequenceSpec

PATTERNS = all_patterns(3)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def imputer(tiny_cdtp) -> ModalityImputer:
    return ModalityImputer.from_pretrained(tiny_cdtp.run / "fold0-seed0" / "model")


def inputs(rows=7):
    g = torch.Generator().manual_seed(3)
    features = {
        "text": torch.randn(rows, 6, generator=g),
        "audio": torch.randn(rows, 5, 4, generator=g),
        "vision": torch.randn(rows, 3, generator=g),
    }
    return features, {"audio": torch.randint(1, 6, (rows,), generator=g)}


def tensors(done):
    return [*done.embeddings.values(), *done.samples.values(), done.generated]


def test_shapes_and_what_is_observed(imputer):
    features, lengths = inputs()
    done = imputer(features, PATTERNS, lengths, n_samples=4)
    assert {name: list(x.shape) for name, x in done.embeddings.items()} == {
        "text": [7, 1, 8], "audio": [7, 5, 8], "vision": [7, 1, 8]
    }  # fmt: skip
    assert torch.equal(done.generated, ~PATTERNS)
    model = imputer.model
    for m, (name, projection) in enumerate(zip(features, model.backbone.projections, strict=True)):
        x = features[name] if features[name].ndim == 3 else features[name][:, None]
        seen = PATTERNS[:, m]
        n = lengths.get(name, torch.ones(7, dtype=torch.int64))
        torch.testing.assert_close(done.embeddings[name][seen], projection(x, n).detach()[seen])
        assert not bool(done.std[name][seen].any())
        assert bool((done.std[name][~seen].flatten(1).sum(1) > 0).all())
    assert torch.equal(done.lengths["audio"][PATTERNS[:, 1]], lengths["audio"][PATTERNS[:, 1]])
    # What the others suggest: a vector is the whole of its modality, so audio is as long as it can be.
    assert bool((done.lengths["audio"][~PATTERNS[:, 1]] == 5).all())


@pytest.mark.parametrize("poison", [4.0, math.nan, math.inf])
def test_nothing_hidden_is_read(imputer, poison):
    features, lengths = inputs()
    hidden = {
        name: torch.where(PATTERNS[:, m].view(-1, *[1] * (x.ndim - 1)), x, poison)
        for m, (name, x) in enumerate(features.items())
    }
    one, other = (imputer(f, PATTERNS, lengths, n_samples=2) for f in (features, hidden))
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
    one, other = (imputer.recognise(f, PATTERNS, lengths, n_samples=2) for f in (features, hidden))
    assert torch.equal(one, other)
    torch.testing.assert_close(one.sum(1), torch.ones(7))


def test_a_row_does_not_depend_on_its_batch_and_few_samples_are_the_first_of_many(imputer):
    features, lengths = inputs()
    whole = imputer(features, PATTERNS, lengths, n_samples=3, seed=5)
    rows = torch.tensor([5, 1, 3])
    part = imputer(
        {name: x[rows] for name, x in features.items()}, PATTERNS[rows], {"audio": lengths["audio"][rows]},
        n_samples=2, seed=5, row_ids=rows,
    )  # fmt: skip
    for name, samples in part.samples.items():
        torch.testing.assert_close(samples, whole.samples[name][:2, rows], rtol=1e-4, atol=1e-5)
    other = imputer(features, PATTERNS, lengths, n_samples=3, seed=6)
    assert not torch.equal(other.samples["text"], whole.samples["text"])


def test_a_sample_comes_from_one_source_and_each_gets_its_share(imputer):
    features, lengths = inputs()
    batch = imputer._batch(features, PATTERNS, lengths, None)
    with torch.no_grad():
        given = imputer.model.project(batch)
        drawn = list(imputer.model.samples(given, 4, seed=1))
    done = imputer(features, PATTERNS, lengths, n_samples=4, seed=1)
    for row, pattern in enumerate(PATTERNS.tolist()):
        sources = [m for m, seen in enumerate(pattern) if seen]
        for target in (m for m, seen in enumerate(pattern) if not seen):
            for k, samples in enumerate(done.samples[list(features)[target]]):
                source = sources[(row + k) % len(sources)]
                assert torch.equal(samples[row], drawn[k][target, source][row])


def test_stores(imputer, tiny_cdtp, tmp_path):
    convert(tiny_cdtp.archive, tmp_path / "in.h5", tiny_cdtp.mapping)
    with FeatureStore(tmp_path / "in.h5") as store:
        *_, rows = impute_store(imputer, store, tmp_path / "out.h5", n_samples=2, batch_size=40)
        assert rows == 96
        whole = store.read(np.arange(96))
        done = imputer.complete(whole, n_samples=2)
        with FeatureStore(tmp_path / "out.h5") as out:
            assert out.kinds == dict.fromkeys(out.modalities, "sequence")
            assert np.array_equal(out.generated(), ~store.available())
            read = out.read(np.arange(96), generated=True)
            for name, x in done.embeddings.items():
                n = read.lengths[name]
                assert torch.equal(n, done.lengths[name])
                keep = (torch.arange(read.features[name].shape[1]) < n[:, None])[..., None]
                steps = read.features[name].shape[1]
                torch.testing.assert_close(
                    read.features[name], torch.where(keep, x[:, :steps], 0.0), rtol=1e-4, atol=1e-5
                )
        list(impute_store(imputer, store, tmp_path / "shards.h5", n_samples=2, batch_size=40, shard_rows=40))
        with FeatureStore(tmp_path / "out.h5") as out, FeatureStore(tmp_path / "shards.h5") as merged:
            one, other = (each.read(np.arange(96), generated=True) for each in (out, merged))
            assert one.available.equal(other.available)
            assert np.array_equal(out.generated(), merged.generated())
            for name, x in one.features.items():
                assert torch.equal(x, other.features[name])
                assert torch.equal(one.lengths[name], other.lengths[name])
        *_, rows = recognise_store(imputer, store, tmp_path / "out.csv", n_samples=2, batch_size=40)
        assert rows == 96
    with open(tmp_path / "out.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["id", "class", "p(calm)", "p(glad)", "p(sad)"]
    assert len(table) == 97


def make(**changes) -> CDTP:
    torch.manual_seed(0)
    specs = {"text": SequenceSpec(6, 3), "vision": SequenceSpec(3, 4)}
    numbers = {"width": 8, "heads": 2, "layers": 1, "self_layers": 1, "unet_channels": (8,), "unet_blocks": 1}
    config = CDTPConfig(**{**numbers, "prompt_length": 2, "sampling_steps": 2, **changes})
    return CDTP(specs, 1, config).eval()


def test_as_many_rows_at_a_time_as_their_completions_fit(imputer, tiny_cdtp, tmp_path, monkeypatch):
    row = 4 * sum(imputer.model.lengths) * imputer.model.config.width
    monkeypatch.setattr("modafill.bulk.rows._COMPLETIONS_BYTES", 100 * row)
    convert(tiny_cdtp.archive, tmp_path / "in.h5", tiny_cdtp.mapping)
    with FeatureStore(tmp_path / "in.h5") as store:
        assert list(recognise_store(imputer, store, tmp_path / "few.csv", n_samples=2)) == [50, 96]
        assert list(recognise_store(imputer, store, tmp_path / "one.csv", n_samples=1)) == [96]
        assert next(iter(recognise_store(imputer, store, tmp_path / "many.csv", n_samples=1000))) == 1


def test_scores_of_a_model_of_scores(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model")
    imputer = ModalityImputer.from_pretrained(tmp_path / "model")
    said = imputer.recognise({"text": torch.randn(5, 3, 6), "vision": torch.randn(5, 4, 3)})
    assert said.shape == (5,)
    assert imputer.classes == ()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"text": torch.zeros(2, 4, 6)}, r"features\['text'\]: got length 4, expected at most 3"),
        ({"text": torch.zeros(2, 6)}, r"features\['text'\]: got shape \[2, 6\], expected \[B, L, 6\]"),
        ({"text": torch.zeros(2, 3, 5)}, r"features\['text'\]: got width 5, expected 6"),
        ({"text": torch.full((2, 3, 6), math.nan)}, r"features\['text'\]: got NaN or infinity"),
        ({"text": torch.zeros(0, 3, 6)}, "batch: got no rows"),
        ({"audio": torch.zeros(2, 3, 6)}, r"features: got unknown modality 'audio', expected \['text', 'vision'\]"),
    ],
)
def test_what_it_cannot_read(features, message):
    with pytest.raises(ValueError, match=message):
        ModalityImputer(make())(features)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1, 1]), TypeError, "lengths: got Tensor, expected a mapping"),
        ({"audio": [1, 1]}, TypeError, r"lengths\['audio'\]: got list, expected an int64 tensor \[B\]"),
    ],
)
def test_lengths_that_it_cannot_use(imputer, lengths, error, message):
    sizes = {name: spec.width for name, spec in imputer.model.modalities.items()}
    features = {"audio": torch.randn(2, 3, sizes["audio"]), "vision": None}
    with pytest.raises(error, match=message):
        imputer(features, lengths=lengths)


def test_a_model_without_diffusion_recognises_but_does_not_impute():
    imputer = ModalityImputer(make(completion="linear"))
    features = {"text": torch.randn(5, 3, 6)}
    assert bool(imputer.recognise(features).isfinite().all())
    with pytest.raises(ValueError, match="completion: got 'linear', expected 'diffusion' to impute with"):
        imputer(features)


def test_a_folder_of_another_model_is_refused(tmp_path):
    make().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"cdtp"', '"mult"'))
    with pytest.raises(ValueError, match="holds the model 'mult', expected one of admc, cdtp"):
        ModalityImputer.from_pretrained(tmp_path / "model")
