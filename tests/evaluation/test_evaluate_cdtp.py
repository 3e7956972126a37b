"""A trained CDTP to its tables, some figures by hand."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score

from modafill.data import FeatureStore, Labels, convert, missing_patterns
from modafill.evaluation.cdtp import DIFFUSION, RECOGNITION, RIDGE_PENALTIES, _filled, _Space, evaluate_part
from modafill.evaluation.metrics import figures_of, nrmse, recognition, regression, sentiment
from modafill.evaluation.parts import CALIBRATION, ERROR, FROZEN
from modafill.evaluation.run import Protocol, evaluate_run, metric_names
from modafill.evaluation.tables import FULL
from modafill.models.baselines import RidgeFill
from modafill.models.cdtp import Sequences
from modafill.training import Run, train

COLUMNS = ("{a}", "{t}", "{v}", "{at}", "{av}", "{tv}", "average")
METRICS = ("WA", "UA", "F1", "F1 weighted", "NLL")
AUDIO = missing_patterns(3).tolist().index([False, True, False])


def ignore(*_):
    pass


def tables_of(folder, asked=None, **options):
    asked = asked or Protocol(n_samples=3, sampling_steps=(2,))
    return {(t.question, t.metric): t for t in evaluate_run(folder, asked, **options)}


@pytest.fixture(scope="module")
def tables(tiny_cdtp):
    torch.set_num_threads(1)
    return tables_of(tiny_cdtp.run)


@pytest.fixture(scope="module")
def trainer(tiny_cdtp):
    trainer = Run.load(tiny_cdtp.run).trainer(0, 0, Accelerator(cpu=True), ignore)
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def batch(trainer):
    """Complete rows of the test part."""
    test = trainer.split.test
    return trainer.store.read(test[trainer.available[test].all(1).numpy()])


def test_questions_rows_and_columns(tables):
    variants = ["CDTP", "CDTP with a linear map (MPLMM)", "MulT, missing ones empty"]
    extra = ["CDTP, probabilities averaged", "CDTP, 2 DDIM steps"]
    fills = ["zero fill", "mean fill", "ridge", DIFFUSION]
    sampled = [n for name in fills[2:] for n in (name, f"{name}, probabilities averaged")]
    expected = {
        **{(RECOGNITION, m): {*variants, *extra, "logistic regression"} for m in METRICS},
        **{(FROZEN, m): {*fills[:2], *sampled, "complete data"} for m in METRICS},
        (ERROR, "NRMSE"): set(fills),
        (CALIBRATION, "CRPS"): set(fills),
    }
    assert {key: set(table.cells) for key, table in tables.items()} == expected
    for (question, _), table in tables.items():
        assert table.columns == (COLUMNS if question in (ERROR, CALIBRATION) else (*COLUMNS, "full"))
        for method, cells in table.cells.items():
            full = question == RECOGNITION and (method in variants or method == "logistic regression")
            wanted = {"full"} if method == "complete data" else {*COLUMNS, *(["full"] if full else [])}
            assert set(cells) == wanted, method
            assert all(math.isfinite(mean) for mean, _ in cells.values())


def test_the_same_figures_twice(tables, tiny_cdtp):
    before = (tiny_cdtp.run / "results.json").read_bytes()
    assert tables_of(tiny_cdtp.run) == tables
    assert (tiny_cdtp.run / "results.json").read_bytes() == before


def test_recognition_by_hand(tables, trainer, batch):
    """The linear map of {a}, whole samples, from the model itself."""
    model = trainer.models["linear"]
    shown = torch.tensor([False, True, False]).expand(len(batch), 3)
    target = trainer.target[batch.row_id].numpy()
    with torch.no_grad():
        for column, given in (("{a}", batch.hide(shown)), ("full", batch)):
            said = model(given).argmax(1).numpy()
            found = tables[RECOGNITION, "WA"].cells["CDTP with a linear map (MPLMM)"][column][0]
            assert found == pytest.approx(accuracy_score(target, said))


@pytest.mark.parametrize("hidden", ["text", "audio", "vision"])
def test_hidden_values_do_not_reach_the_tables(trainer, monkeypatch, hidden):
    """Test rows with another modality in the store itself: the same answers in all columns that do not show it."""

    def answers():
        records = evaluate_part(trainer, 0, n_samples=2, sampling_steps=(2,))
        chosen = [r for r in records if r.question in (RECOGNITION, FROZEN)]
        shown = [r for r in chosen if hidden[0] in r.available or r.available == FULL]
        return [{tuple(asdict(r).values()) for r in some} for some in ([r for r in chosen if r not in shown], shown)]

    without, with_it = answers()
    assert {record[2] for record in without} >= {DIFFUSION, f"{DIFFUSION}, probabilities averaged", "ridge", "CDTP"}
    read, test = FeatureStore.read, torch.from_numpy(trainer.split.test)

    def read_another(store, *args, **options):
        batch = read(store, *args, **options)
        rows = torch.isin(batch.row_id, test)
        x = batch.features[hidden]
        x[rows] = 3 * torch.randn(x[rows].shape, generator=torch.Generator().manual_seed(0)) + 5
        return batch

    monkeypatch.setattr(FeatureStore, "read", read_another)
    after, changed = answers()
    assert after == without
    assert changed != with_it


def test_ridge_reads_what_it_was_fitted_on_and_errs_on_what_is_real(trainer, batch, tables):
    """NRMSE of ridge of {a} with scikit-learn's: behind an end stands the mean of its step, and no error."""

    def standard(rows):
        whole = trainer.plain.project(trainer.store.read(rows[trainer.available[rows].all(1).numpy()]))
        steps = torch.arange(longest)
        out, real = [], []
        for m, (x, n) in enumerate(zip(whole.x, whole.lengths, strict=True)):
            x = torch.nn.functional.pad((x - mean[m]) / std[m], (0, 0, 0, longest - x.shape[1]))
            keep = (steps < n[:, None])[..., None].expand_as(x)
            out.append(torch.where(keep, x, 0.0).flatten(1).double())
            real.append(keep.flatten(1))
        return torch.stack(out, 1), torch.stack(real, 1)

    (mean, std), longest = trainer.scales(trainer.plain), max(trainer.plain.lengths)
    with torch.no_grad():
        (train, there), (valid, in_valid), (test, in_test) = map(
            standard, (trainer.split.train, trainer.split.valid, trainer.split.test)
        )
    means = train.sum(0) / there.sum(0).clamp(min=1)
    train, valid, filled = (torch.where(k, x, means) for x, k in ((train, there), (valid, in_valid), (test, in_test)))
    errors = {}
    for penalty in RIDGE_PENALTIES:
        model = Ridge(alpha=penalty).fit(train[:, 1].numpy(), train[:, [0, 2]].flatten(1).numpy())
        said = [torch.from_numpy(model.predict(x[:, 1].numpy())).view(len(x), 2, -1) for x in (valid, filled)]
        validation = (said[0] - valid[:, [0, 2]])[in_valid[:, [0, 2]]].square().mean()
        errors[float(validation)] = float((said[1] - test[:, [0, 2]])[in_test[:, [0, 2]]].square().mean().sqrt())
    found = tables[ERROR, "NRMSE"].cells["ridge"]["{a}"][0]
    assert found == pytest.approx(errors[min(errors)], rel=1e-5)


def test_residuals_of_padding_are_none():
    torch.manual_seed(0)
    x, y = torch.randn(60, 1, 3), torch.randn(60, 1, 3)
    real = torch.arange(3) < torch.arange(1, 61)[:, None, None] % 4
    real = torch.cat([torch.ones_like(real), real], 1)
    tokens = torch.cat([x, torch.where(real[:, 1:], y, 0.0)], 1)
    fill = RidgeFill(tokens[:30], tokens[30:], (1.0, 1e6), real[30:])
    index = [p.tolist() for p in fill.patterns].index([True, False])
    residual = tokens[30:, 1].numpy() - fill.models[index].predict(x[30:, 0].numpy())
    expected = [residual[real[30:, 1, d].numpy(), d].std() for d in range(3)]
    assert fill.spreads[index].tolist() == pytest.approx(expected, rel=1e-5)


def test_error_of_the_mean_by_hand(tables, trainer, batch):
    """NRMSE of the mean fill of {a}: projected training rows averaged step by step, where they have it."""
    with torch.no_grad():
        train = trainer.split.train
        rows = trainer.store.read(train[trainer.available[train].all(1).numpy()])
        known, truth = trainer.plain.project(rows), trainer.plain.project(batch)
    mean, std = trainer.scales(trainer.plain)
    errors = []
    for m in (0, 2):
        standard = (known.x[m] - mean[m]) / std[m]
        steps = torch.arange(known.x[m].shape[1])
        real = (steps < known.lengths[m][:, None])[..., None]
        mean_of_steps = torch.where(real, standard, 0.0).sum(0) / real.sum(0).clamp(min=1)
        there = (steps < truth.lengths[m][:, None])[..., None].expand_as(truth.x[m])
        expected = (truth.x[m] - mean[m]) / std[m]
        errors.append((mean_of_steps.expand_as(expected) - expected)[there])
    found = tables[ERROR, "NRMSE"].cells["mean fill"]["{a}"][0]
    assert found == pytest.approx(float(torch.cat(errors).square().mean().sqrt()), rel=1e-4)
    assert nrmse(torch.cat(errors), torch.zeros_like(torch.cat(errors)), 1.0) == pytest.approx(found, rel=1e-4)


def test_frozen_classifier_reads_what_the_fill_made(tables, trainer, batch):
    """Zero fill of {a}: zeros of the projected space, as long as the audio suggests."""
    with torch.no_grad():
        given = trainer.plain.project(batch.hide(torch.tensor([False, True, False]).expand(len(batch), 3)))
        completed = Sequences(given.x, trainer.plain.suggested_lengths(given), given.available, given.row_id)
        said = trainer.plain.predict(completed).argmax(1).numpy()
    found = tables[FROZEN, "WA"].cells["zero fill"]["{a}"][0]
    assert found == pytest.approx(accuracy_score(trainer.target[batch.row_id].numpy(), said))


def test_admc_beside_it(tiny, tiny_cdtp, tmp_path):
    shutil.copytree(tiny_cdtp.run, tmp_path / "cdtp")
    shutil.copytree(tiny.run, tmp_path / "admc")
    with pytest.raises(ValueError, match=r"beside: .*admc has data .*, expected"):
        tables_of(tmp_path / "cdtp", beside=(tmp_path / "admc",))
    description = json.loads((tmp_path / "admc" / "run.json").read_text())
    ours = json.loads((tmp_path / "cdtp" / "run.json").read_text())
    (tmp_path / "admc" / "run.json").write_text(
        json.dumps({**description, "data": ours["data"], "mapping": ours["mapping"]})
    )
    (tmp_path / "admc" / "results.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"results\.json is not there; run `modafill evaluate"):
        tables_of(tmp_path / "cdtp", beside=(tmp_path / "admc",))
    theirs = tables_of(tmp_path / "admc", Protocol(n_samples=2))
    results = tmp_path / "admc" / "results.json"
    without = {k: v for k, v in json.loads(results.read_text()).items() if k != "protocol"}
    whole = results.read_text()
    results.write_text(json.dumps(without))
    with pytest.raises(ValueError, match=r"results\.json does not say its protocol; run `modafill evaluate"):
        tables_of(tmp_path / "cdtp", beside=(tmp_path / "admc",))
    results.write_text(whole)
    found = tables_of(tmp_path / "cdtp", Protocol(n_samples=1), beside=(tmp_path / "admc",))[RECOGNITION, "UA"]
    (question,) = {question for question, _ in theirs if "fusion network" in question}
    expected = theirs[question, "UA"].cells
    assert found.cells["ADMC clean"] == expected["ADMC clean"]
    assert found.cells["ADMC clean, probabilities averaged, K = 2"] == expected["ADMC clean, probabilities averaged"]
    assert found.cells["zero fill, a fusion network per pattern"] == expected["zero fill"]
    assert list(found.cells).count("logistic regression") == 1


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        ("tiny", Protocol(sampling_steps=(3,)), "expected cdtp"),
        ("tiny_cdtp", Protocol(start_steps=(3,)), r"start-steps: got \[3\], but .* holds cdtp, expected admc"),
    ],
)
def test_options_of_the_other_model(model, asked, message, request):
    with pytest.raises(ValueError, match=message):
        evaluate_run(request.getfixturevalue(model).run, asked)
    with pytest.raises(ValueError, match="samples: got 0, expected at least 1"):
        replace(asked, n_samples=0)


def test_scores(tiny_cdtp, tmp_path):
    """A run that predicts numbers has MAE and correlation, with ridge regression beside it."""
    mapping = json.loads(tiny_cdtp.mapping.read_text())
    mapping["labels"] = {"clip": {"name": "clip", "kind": "score"}}
    convert(tiny_cdtp.archive, tmp_path / "scores.h5", mapping)
    run = Run.load(tiny_cdtp.run)
    run = replace(
        run, folder=tmp_path / "run", data=str(tmp_path / "scores.h5"), mapping=None, label="clip",
        variants=("full", "plain"), config=replace(run.config, epochs=1, diffusion_epochs=1),
    )  # fmt: skip
    train(run, ignore)
    tables = tables_of(run.folder, Protocol(n_samples=2))
    assert {metric for question, metric in tables if question == RECOGNITION} == {"MAE", "Corr"}
    rows = {"CDTP", "CDTP, scores averaged", "MulT, missing ones empty", "ridge regression"}
    assert set(tables[RECOGNITION, "MAE"].cells) == rows
    assert "lower is better" in tables[RECOGNITION, "MAE"].title
    assert metric_names(run) == ("MAE", "Corr")


def test_joint_training_has_no_frozen_rows_of_its_own(tiny_cdtp, tmp_path):
    run = replace(Run.load(tiny_cdtp.run), folder=tmp_path / "run", variants=("full", "plain"))
    train(replace(run, config=replace(run.config, training="joint", epochs=1)), ignore)
    tables = tables_of(run.folder)
    assert set(tables[ERROR, "NRMSE"].cells) == {"zero fill", "mean fill", "ridge"}
    rows = {"CDTP", "CDTP, probabilities averaged", "CDTP, 2 DDIM steps", "MulT, missing ones empty"}
    assert set(tables[RECOGNITION, "UA"].cells) == rows | {"logistic regression"}


def test_which_figures_labels_get():
    scores = Labels("y", "score")
    assert figures_of(scores) is regression
    assert figures_of(replace(scores, sentiment=True)) is sentiment
    assert figures_of(Labels("y", "class", values=(1, 2))) is recognition
    target = torch.tensor([1.0, 3.0, 4.0])
    assert regression(target, target + 1)["MAE"] == pytest.approx(1.0)
    assert np.isclose(regression(2 * target + 3, target)["Corr"], 1.0)


def test_draws_are_those_of_the_imputer(trainer, batch):
    """What the calibration is measured of is what ModalityImputer gives."""
    shown = batch.hide(torch.tensor([True, True, False]).expand(len(batch), 3))
    space, model = _Space(trainer), trainer.models["full"]
    with torch.no_grad():
        given = trainer.plain.project(shown)
        point, samples = _filled(trainer, space, {}, given, 3, 5)[DIFFUSION]
        done = model.impute(shown, n_samples=3, seed=5)
    mean, std = trainer.scales(trainer.plain)
    for k in range(3):
        expected = (done.samples["vision"][k] - mean[2]) / std[2]
        torch.testing.assert_close(samples[k][:, 2, :8], expected[:, 0].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(point, samples.mean(0))


def test_further_sampling_steps_want_a_variant_that_diffuses(tiny_cdtp, tmp_path):
    run = replace(Run.load(tiny_cdtp.run), folder=tmp_path / "run", variants=("plain",))
    run = replace(run, config=replace(run.config, epochs=1))
    train(run, ignore)
    with pytest.raises(ValueError, match=r"sampling-steps: got \[2\], but the run trained no variant that diffuses"):
        evaluate_run(run.folder, Protocol(sampling_steps=(2,)))


@pytest.mark.parametrize("steps", [0, 2000])
def test_further_sampling_steps_that_there_are_not(tiny_cdtp, steps):
    with pytest.raises(ValueError, match=rf"sampling-steps: got \[{steps}\], expected 1…\d+, the steps in use"):
        evaluate_run(tiny_cdtp.run, Protocol(sampling_steps=(steps,)))


def test_the_window_of_what_stands_beside_is_named(tiny, tiny_cdtp, tmp_path):
    shutil.copytree(tiny_cdtp.run, tmp_path / "cdtp")
    shutil.copytree(tiny.run, tmp_path / "admc")
    ours = json.loads((tmp_path / "cdtp" / "run.json").read_text())
    theirs = json.loads((tmp_path / "admc" / "run.json").read_text())
    tables_of(tmp_path / "admc", Protocol(n_samples=1))
    changed = {**theirs, "data": ours["data"], "mapping": ours["mapping"], "window": 0}
    (tmp_path / "admc" / "run.json").write_text(json.dumps(changed))
    found = tables_of(tmp_path / "cdtp", Protocol(n_samples=1), beside=(tmp_path / "admc",))[RECOGNITION, "UA"]
    assert "ADMC clean, without windows" in found.cells
