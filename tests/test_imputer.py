from __future__ import annotations

import copy
import csv
import dataclasses
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modafill import ModalityImputer
from modafill.bulk import impute_store, recognise_store
from modafill.data import Batch, FeatureStore, StoreWriter, all_patterns, pattern_index
from modafill.imputer import Imputation
from modafill.models.admc import ADMC, ADMCConfig
from modafill.training import Run

MakeADMC = Callable[..., ADMC]
Features = dict[str, Tensor]

NAMES = ("text", "audio", "vision")


@pytest.fixture
def imputer(make_admc: MakeADMC) -> ModalityImputer:
    return ModalityImputer(make_admc())


def make_features(rows: int = 7) -> tuple[Features, Features]:
    generator = torch.Generator().manual_seed(2)
    features = {
        "text": torch.randn(rows, 6, 5, generator=generator),
        "audio": torch.randn(rows, 8, 4, generator=generator),
        "vision": torch.randn(rows, 3, generator=generator),
    }
    return features, {name: torch.randint(1, 7, (rows,), generator=generator) for name in ("text", "audio")}


def bits(result: Imputation) -> list[Tensor]:
    return [*result.embeddings.values(), *result.samples.values(), result.generated]


def equal(one: Imputation, other: Imputation) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


PATTERNS = all_patterns(3)


@pytest.mark.parametrize("conditioning", ["replace", "clean"])
@pytest.mark.parametrize("poison", [4.0, math.nan, math.inf])
def test_nothing_hidden_is_read(make_admc: MakeADMC, conditioning: str, poison: float) -> None:
    imputer = ModalityImputer(make_admc(conditioning))
    features, lengths = make_features()
    result = imputer(features, PATTERNS, lengths, n_samples=2)
    hidden = {
        name: torch.where(PATTERNS[:, m].view(-1, *[1] * (x.ndim - 1)), x, poison)
        for m, (name, x) in enumerate(features.items())
    }
    assert equal(imputer(hidden, PATTERNS, lengths, n_samples=2), result)
    assert all(torch.isfinite(x).all() for x in bits(result))
    assert torch.equal(result.generated, ~PATTERNS)


def test_observed_embeddings_are_the_encoders(imputer: ModalityImputer) -> None:
    features, lengths = make_features()
    result = imputer(features, PATTERNS, lengths, n_samples=3)
    for m, name in enumerate(NAMES):
        rows = PATTERNS[:, m]
        with torch.no_grad():
            encoder = imputer.model.unimodal[name].encoder
            expected = encoder(features[name][rows], lengths[name][rows] if name in lengths else None)
        assert torch.equal(result.embeddings[name][rows], expected)
        assert torch.equal(result.samples[name][:, rows], expected.expand(3, -1, -1))
        assert (result.std[name][rows] == 0).all()
        assert (result.std[name][~rows] > 0).all()


def test_mean_and_deviation_are_those_of_the_samples(imputer: ModalityImputer) -> None:
    features, lengths = make_features()
    result = imputer(features, PATTERNS, lengths, n_samples=5)
    for m, name in enumerate(NAMES):
        hidden = ~PATTERNS[:, m]
        samples = result.samples[name].numpy()[:, hidden]
        assert samples.shape == (5, 3, 8)
        np.testing.assert_allclose(result.embeddings[name][hidden], samples.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.std[name][hidden], samples.std(0, ddof=1), rtol=1e-4, atol=1e-6)
    one = imputer(features, PATTERNS, lengths)
    with pytest.raises(ValueError, match=r"std: a single sample has no spread, expected .* n_samples of 2 or more"):
        _ = one.std
    for name in NAMES:
        torch.testing.assert_close(one.samples[name][0], result.samples[name][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(one.embeddings[name], one.samples[name][0])


def test_generated_embeddings_have_the_scale_of_embeddings(imputer: ModalityImputer) -> None:
    """Tokens are standardised, embeddings are not: the scaler's mean must be back in the result."""
    features, lengths = make_features()
    before = imputer(features, PATTERNS, lengths).embeddings["text"]
    imputer.model.scaler.mean[0] += 100.0
    after = imputer(features, PATTERNS, lengths).embeddings["text"]
    hidden = ~PATTERNS[:, 0]
    # The text is an input nowhere where it is hidden, so all that moves is the result.
    torch.testing.assert_close(after[hidden] - before[hidden], torch.full((3, 8), 100.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("absent", ["none", "left out", "marked"])
def test_three_ways_to_say_that_a_modality_is_missing(imputer: ModalityImputer, absent: str) -> None:
    features, lengths = make_features()
    marked = torch.tensor([True, False, True]).expand(7, -1)
    expected = imputer(features, marked, lengths)
    given = {
        "none": {**features, "audio": None},
        "left out": {name: x for name, x in features.items() if name != "audio"},
        "marked": features,
    }[absent]
    # Lengths of what is absent are of no consequence.
    assert equal(imputer(given, marked if absent == "marked" else None, lengths), expected)
    assert expected.generated[:, 1].all()
    assert not expected.generated[:, [0, 2]].any()


def test_order_of_the_names_and_dtype_do_not_matter(imputer: ModalityImputer) -> None:
    features, lengths = make_features()
    expected = imputer(features, PATTERNS, lengths)
    assert equal(imputer(dict(reversed(features.items())), PATTERNS, lengths), expected)
    assert equal(imputer({name: x.double() for name, x in features.items()}, PATTERNS, lengths), expected)


def test_lengths_default_to_all_steps(imputer: ModalityImputer) -> None:
    features, _ = make_features()
    whole = {"text": torch.full((7,), 6), "audio": torch.full((7,), 8)}
    assert equal(imputer(features, PATTERNS), imputer(features, PATTERNS, whole))
    shorter = imputer(features, PATTERNS, {**whole, "audio": torch.full((7,), 2)})
    assert not equal(imputer(features, PATTERNS), shorter)


def test_noise_belongs_to_seed_and_row(imputer: ModalityImputer) -> None:
    features, lengths = make_features()
    state = torch.random.get_rng_state()
    first = imputer(features, PATTERNS, lengths, seed=1, row_ids=torch.arange(7) + 50)
    assert equal(first, imputer(features, PATTERNS, lengths, seed=1, row_ids=torch.arange(7) + 50))
    assert torch.equal(torch.random.get_rng_state(), state)
    hidden = ~PATTERNS[:, 0]
    for other in ({"seed": 2, "row_ids": torch.arange(7) + 50}, {"seed": 1}):
        moved = imputer(features, PATTERNS, lengths, **other).embeddings["text"]
        assert (moved != first.embeddings["text"])[hidden].any(1).all()
    for rows in ([6, 5, 4, 3, 2, 1, 0], [3], [0, 4]):
        part = imputer(
            {name: x[rows] for name, x in features.items()},
            PATTERNS[rows],
            {name: x[rows] for name, x in lengths.items()},
            seed=1,
            row_ids=torch.tensor(rows) + 50,
        )
        for name in NAMES:
            torch.testing.assert_close(part.embeddings[name], first.embeddings[name][rows], rtol=0, atol=1e-5)


def test_printing_it_takes_a_line(imputer: ModalityImputer) -> None:
    assert repr(imputer).startswith("ModalityImputer(ADMC of ")
    assert "\n" not in repr(imputer)


def test_dropout_stays_off_inside_a_network_in_training(imputer: ModalityImputer) -> None:
    features, lengths = make_features()
    expected = imputer(features, PATTERNS, lengths)
    network = nn.ModuleDict({"imputer": imputer, "head": nn.Linear(8, 2)}).train()
    assert network["head"].training
    assert not any(module.training for module in imputer.model.modules())
    assert equal(imputer(features, PATTERNS, lengths), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_give_the_same_bits(imputer: ModalityImputer, copied: Callable[..., ModalityImputer]) -> None:
    features, lengths = make_features()
    expected = imputer(features, PATTERNS, lengths, n_samples=2)
    again = copied(imputer)
    assert equal(again(features, PATTERNS, lengths, n_samples=2), expected)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert equal(imputer(features, PATTERNS, lengths, n_samples=2), expected)


def test_round_trip_through_a_folder(imputer: ModalityImputer, tmp_path: Path) -> None:
    imputer.save_pretrained(tmp_path / "model")
    again = ModalityImputer.from_pretrained(tmp_path / "model")
    assert again.modalities == NAMES
    features, lengths = make_features()
    assert equal(again(features, PATTERNS, lengths), imputer(features, PATTERNS, lengths))


def with_value(name: str, at: tuple[int, ...], value: float) -> Features:
    features, _ = make_features()
    features[name][at] = value
    return features


FEATURES, LENGTHS = make_features()
ALL = torch.ones(7, 3, dtype=torch.bool)

MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "unknown modality": (
        {"features": {**FEATURES, "smell": torch.ones(7, 2)}},
        r"features: got unknown modality 'smell', expected \['text', 'audio', 'vision'\]",
    ),
    "unknown and None": ({"features": {**FEATURES, "smell": None}}, "unknown modality 'smell'"),
    "nothing given": ({"features": {}}, "features: got no modality at all"),
    "only None": ({"features": dict.fromkeys(NAMES)}, "features: got no modality at all"),
    "nan": ({"features": with_value("vision", (2, 1), math.nan)}, r"features\['vision'\]: got NaN or infinity in row"),
    "inf": ({"features": with_value("text", (4, 0, 3), math.inf)}, r"features\['text'\]: got NaN or infinity in row"),
    "empty row": (
        {"features": FEATURES, "available": ALL & (torch.arange(7) != 5)[:, None]},
        "nothing is observed in row id 5",
    ),
    "empty batch": ({"features": {name: x[:0] for name, x in FEATURES.items()}}, "batch: got no rows"),
    "width": ({"features": {**FEATURES, "vision": torch.ones(7, 4)}}, r"features\['vision'\]: got width 4, expected 3"),
    "vector for sequence": (
        {"features": {**FEATURES, "audio": torch.ones(7, 4)}},
        r"features\['audio'\]: got shape \[7, 4\], expected \[B, L, 4\]",
    ),
    "sequence for vector": (
        {"features": {**FEATURES, "vision": torch.ones(7, 2, 3)}},
        r"features\['vision'\]: got shape \[7, 2, 3\], expected \[B, 3\]",
    ),
    "scalar": ({"features": {"vision": torch.tensor(1.0)}}, r"features\['vision'\]: got shape \[\]"),
    "fewer rows": ({"features": {**FEATURES, "vision": torch.ones(6, 3)}}, r"features\['vision'\]"),
    "no steps": ({"features": {**FEATURES, "audio": torch.ones(7, 0, 4)}}, r"features\['audio'\]"),
    "available but absent": (
        {"features": {**FEATURES, "audio": None}, "available": ALL},
        "available: marks 'audio' as observed, but features has no such tensor",
    ),
    "shape of available": ({"features": FEATURES, "available": ALL[:, :2]}, "available: got"),
    "dtype of available": ({"features": FEATURES, "available": ALL.float()}, "available: got torch.float32"),
    "length": (
        {"features": FEATURES, "lengths": {"audio": torch.full((7,), 9)}},
        r"lengths\['audio'\]: got 9 in row 0, expected 1…8",
    ),
    "no samples": ({"features": {**FEATURES, "audio": None}, "n_samples": 0}, "n_samples: got 0"),
    "fewer samples": ({"features": {**FEATURES, "audio": None}, "n_samples": -1}, "n_samples: got -1"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_are_named(imputer: ModalityImputer, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        imputer(**arguments)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (list(FEATURES.values()), "features: got list, expected a mapping from name to tensor"),
        (FEATURES["vision"].numpy(), "features: got ndarray, expected a mapping"),
        ({"vision": FEATURES["vision"].numpy()}, r"features\['vision'\]: got ndarray, expected a tensor"),
    ],
)
def test_what_is_no_tensor(imputer: ModalityImputer, features: object, message: str) -> None:
    for call in (imputer, imputer.recognise):
        with pytest.raises(TypeError, match=message):
            call(features)


def test_recognition_is_the_models(imputer: ModalityImputer) -> None:
    features, lengths = make_features()
    batch = Batch(features, PATTERNS, torch.arange(7) + 3, lengths)
    expected = imputer.model.recognise(batch, n_samples=4, seed=2)
    found = imputer.recognise(features, PATTERNS, lengths, n_samples=4, seed=2, row_ids=torch.arange(7) + 3)
    assert torch.equal(found, expected)
    assert found.shape == (7, len(imputer.classes))
    torch.testing.assert_close(found.sum(1), torch.ones(7))
    # One row that lacks something, by the definition: completions through the pattern's own network, averaged.
    samples = imputer.model.scaler(
        torch.stack(list(imputer(features, PATTERNS, lengths, n_samples=4).samples.values()), 2)
    )
    fusion = imputer.model.fusions[pattern_index(PATTERNS)[0]]
    with torch.no_grad():
        by_hand = fusion(samples[:, 0]).softmax(-1).mean(0)
    again = imputer.recognise(features, PATTERNS, lengths, n_samples=4)
    torch.testing.assert_close(again[0], by_hand, rtol=0, atol=1e-5)


def test_hidden_nan_is_no_mistake(imputer: ModalityImputer) -> None:
    available = ALL.clone()
    available[2, 2] = False
    imputer(with_value("vision", (2, 1), math.nan), available)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    features, lengths = make_features(20)
    path = tmp_path / "in.h5"
    with StoreWriter(
        path,
        modalities=["vision", "text", "audio"],
        widths={"text": 5, "audio": 4, "vision": 3},
        kinds={"text": "sequence", "audio": "sequence", "vision": "vector"},
    ) as writer:
        ragged = {
            name: [x[:n].numpy() for x, n in zip(features[name], lengths[name], strict=True)]
            for name in ("text", "audio")
        }
        writer.append(
            {**ragged, "vision": features["vision"].numpy()},
            available=PATTERNS.repeat(3, 1)[:20].numpy(),
            ids=[f"clip {i}" for i in range(20)],
            labels={"mood": np.arange(20) % 3},
            groups={"speaker": np.arange(20) // 5},
        )
    return FeatureStore(path)


@pytest.mark.parametrize("batch_size", [3, 20])
def test_a_store_is_imputed_row_by_row(
    imputer: ModalityImputer, store: FeatureStore, tmp_path: Path, batch_size: int
) -> None:
    out = tmp_path / "out.h5"
    done = list(impute_store(imputer, store, out, n_samples=2, seed=4, batch_size=batch_size))
    assert done == [*range(batch_size, 20, batch_size), 20]
    completed = FeatureStore(out)
    assert completed.modalities == NAMES, "the order is the model's"
    given, hidden = store.read(np.arange(20)), completed.generated()
    batch = completed.read(np.arange(20), generated=True)
    columns = [store.modalities.index(name) for name in NAMES]
    expected = imputer(given.features, given.available[:, columns], given.lengths, n_samples=2, seed=4)
    assert torch.equal(torch.from_numpy(hidden), expected.generated)
    assert np.array_equal(completed.available(), ~hidden)
    for name in NAMES:
        torch.testing.assert_close(batch.features[name], expected.embeddings[name], rtol=0, atol=1e-5)
    assert list(completed.ids(np.arange(20))) == [f"clip {i}" for i in range(20)]
    assert completed.labels("mood").tolist() == (np.arange(20) % 3).tolist()
    assert completed.groups("speaker").tolist() == store.groups("speaker").tolist()


@pytest.mark.parametrize("batch_size", [3, 20])
def test_a_store_is_recognised_row_by_row(
    imputer: ModalityImputer, store: FeatureStore, tmp_path: Path, batch_size: int
) -> None:
    out = tmp_path / "out.csv"
    progress = recognise_store(imputer, store, out, n_samples=2, seed=4, batch_size=batch_size)
    assert next(progress) == batch_size
    assert not out.exists()
    assert [*progress][-1:] == ([20] if batch_size < 20 else [])
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    batch = store.read(np.arange(20))
    columns = [store.modalities.index(name) for name in NAMES]
    expected = imputer.recognise(batch.features, batch.available[:, columns], batch.lengths, n_samples=2, seed=4)
    assert list(rows[0]) == ["id", "class", *(f"p({name})" for name in imputer.classes)]
    assert [row["id"] for row in rows] == [f"clip {i}" for i in range(20)]
    found = torch.tensor([[float(row[f"p({name})"]) for name in imputer.classes] for row in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert [row["class"] for row in rows] == [imputer.classes[i] for i in found.argmax(1)]


def test_a_store_that_is_not_finished_does_not_appear(
    imputer: ModalityImputer, store: FeatureStore, tmp_path: Path
) -> None:
    progress = impute_store(imputer, store, tmp_path / "out.h5", batch_size=5)
    assert next(progress) == 5
    progress.close()
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5"]


def test_a_store_may_have_more_than_the_model(imputer: ModalityImputer, store: FeatureStore, tmp_path: Path) -> None:
    batch = store.read(np.arange(20))
    with StoreWriter(
        tmp_path / "more.h5",
        modalities=["gaze", *store.modalities],
        widths={**store.widths, "gaze": 2},
        kinds={**store.kinds, "gaze": "sequence"},
    ) as writer:
        ragged = {
            name: [x[:n].numpy() for x, n in zip(batch.features[name], batch.lengths[name], strict=True)]
            for name in ("text", "audio")
        }
        features = {**ragged, "vision": batch.features["vision"].numpy(), "gaze": [np.ones((3, 2))] * 20}
        available = np.concatenate([np.ones((20, 1), dtype=bool), batch.available.numpy()], axis=1)
        writer.append(features, available=available)
    for source, out in ((store, "a.h5"), (FeatureStore(tmp_path / "more.h5"), "b.h5")):
        list(impute_store(imputer, source, tmp_path / out, seed=4))
    a, b = (FeatureStore(tmp_path / name).read(np.arange(20), generated=True) for name in ("a.h5", "b.h5"))
    assert list(b.features) == list(NAMES)
    assert all(torch.equal(a.features[name], b.features[name]) for name in NAMES)


def _vision_store(path: Path, name: str = "vision", width: int = 3) -> FeatureStore:
    with StoreWriter(path, modalities=[name], widths={name: width}, kinds={name: "vector"}) as writer:
        writer.append({name: np.linspace(0, 1, 2 * width).reshape(2, width)})
    return FeatureStore(path)


def test_a_modality_that_a_store_lacks_is_generated(imputer: ModalityImputer, tmp_path: Path) -> None:
    source = _vision_store(tmp_path / "in.h5")
    expected = imputer({"vision": source.read(np.arange(2)).features["vision"]}, seed=4)
    list(impute_store(imputer, source, tmp_path / "out.h5", seed=4))
    with FeatureStore(tmp_path / "out.h5") as done:
        assert done.generated().tolist() == [[name != "vision" for name in done.modalities]] * 2
        found = done.read(np.arange(2), generated=True)
    assert all(torch.equal(found.features[name], x) for name, x in expected.embeddings.items())
    assert expected.generated.sum() == 4


def test_a_run_is_no_model(tiny) -> None:
    with pytest.raises(ValueError, match=r"this is a run, its models are folders such as .*run/fold0-seed0/model"):
        ModalityImputer.from_pretrained(tiny.run)


def test_a_store_that_the_model_cannot_read(imputer: ModalityImputer, tmp_path: Path) -> None:
    foreign, wide = _vision_store(tmp_path / "foreign.h5", "touch"), _vision_store(tmp_path / "wide.h5", width=7)
    list(impute_store(imputer, _vision_store(tmp_path / "in.h5"), tmp_path / "done.h5"))
    for store, message in (
        (foreign, "has the modalities touch, the model was trained on text, audio, vision"),
        (wide, "vision has 7 features, expected 3, as in training"),
        (FeatureStore(tmp_path / "done.h5"), "these are completed embeddings, text has"),
    ):
        for function in (impute_store, recognise_store):
            with pytest.raises(ValueError, match=message):
                next(function(imputer, store, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_store_of_vectors_for_a_model_of_sequences(imputer: ModalityImputer, tmp_path: Path) -> None:
    widths = {"text": 5, "audio": 4, "vision": 3}
    with StoreWriter(
        tmp_path / "in.h5", modalities=list(widths), widths=widths, kinds=dict.fromkeys(widths, "vector")
    ) as writer:
        writer.append({name: np.zeros((2, width)) for name, width in widths.items()})
    for function in (impute_store, recognise_store):
        with pytest.raises(ValueError, match=r"features\['text'\]: got shape \[2, 5\], expected \[B, L, 5\]"):
            next(function(imputer, FeatureStore(tmp_path / "in.h5"), tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5"]


def test_a_store_with_an_empty_row(imputer: ModalityImputer, tmp_path: Path) -> None:
    available = np.ones((6, 3), dtype=bool)
    available[4] = False
    shapes = {"audio": (6, 2, 4), "text": (6, 2, 5), "vision": (6, 3)}
    with StoreWriter(
        tmp_path / "in.h5",
        modalities=list(shapes),
        widths={name: shape[-1] for name, shape in shapes.items()},
        kinds={name: "sequence" if len(shape) == 3 else "vector" for name, shape in shapes.items()},
    ) as writer:
        writer.append({name: np.zeros(shape) for name, shape in shapes.items()}, available=available)
    with pytest.raises(ValueError, match=r"in\.h5: nothing is observed in row 4, expected at least one modality"):
        next(impute_store(imputer, FeatureStore(tmp_path / "in.h5"), tmp_path / "out.h5", batch_size=3))
    assert not (tmp_path / "out.h5").exists()


def test_fit_trains_and_what_it_is_asked_for_is_checked_before(tiny, tmp_path: Path) -> None:
    config = Run.load(tiny.run).config
    assert isinstance(config, ADMCConfig)
    for wrong, message in (
        ({"solver": "euler"}, "solver: got 'euler'"),
        ({"steps": 0}, "steps: got 0"),
        ({"steps": 5000}, "evaluations: got 5000"),
        ({"conditioning": "replace", "solver": "ddim"}, "solver: got 'ddim', expected None with conditioning"),
        ({"dtype": torch.float64}, "dtype: got torch.float64, expected bfloat16, float16 or None"),
        ({"model": "gan"}, "model: got 'gan', expected one of admc, cdtp"),
        ({"model": "cdtp", "config": config}, "config: got ADMCConfig, expected CDTPConfig"),
        ({"model": "cdtp", "conditioning": "clean"}, "conditioning: got 'clean', expected None with model 'cdtp'"),
    ):
        with pytest.raises(ValueError, match=message):
            ModalityImputer.fit(tiny.archive, mapping=str(tiny.mapping), out=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()
    for name in ("stepps", "eta"):
        with pytest.raises(TypeError, match=f"fit: got an unexpected option '{name}'"):
            ModalityImputer.fit(tiny.archive, mapping=str(tiny.mapping), out=tmp_path / "run", **{name: 3})
    assert not (tmp_path / "run").exists()
    small = dataclasses.replace(config, conditioning="replace", encoder_epochs=1, adn_epochs=1, fusion_epochs=1)
    fitted = ModalityImputer.fit(tiny.archive, mapping=str(tiny.mapping), config=small, steps=3)
    assert isinstance(fitted.model, ADMC)
    assert fitted.model.config.conditioning == "replace"
    assert fitted.sampling.steps == 3
    given = {name: torch.randn(2, spec.width) for name, spec in fitted.model.modalities.items() if not spec.sequence}
    assert all(torch.isfinite(x).all() for x in fitted(given).embeddings.values())
