"""A trained run to its tables."""

from __future__ import annotations

import csv
import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

import modafill
from modafill.data import MissingRate, missing_patterns
from modafill.evaluation.admc import RECOGNITION, draw_embeddings, evaluate_part
from modafill.evaluation.curve import draw_curve
from modafill.evaluation.metrics import nrmse
from modafill.evaluation.parts import CALIBRATION, ERROR, FROZEN
from modafill.evaluation.run import Protocol, evaluate_run
from modafill.evaluation.tables import Table
from modafill.files import read_tensors, write_tensors
from modafill.models.admc import Fusion
from modafill.training import Run
from modafill.training.admc import RIVALS as RIVAL_KEYS

COLUMNS = ("{a}", "{t}", "{v}", "{at}", "{av}", "{tv}", "average")
METRICS = ("WA", "UA", "F1", "F1 weighted", "NLL")
RIVALS = ["zero fill", "mean fill", "ridge"]


def evaluate(folder: Path) -> dict[tuple[str, str], Table]:
    tables = evaluate_run(folder, Protocol(n_samples=3, start_steps=(2,)))
    return {(table.question, table.metric): table for table in tables}


@pytest.fixture(scope="module")
def tables(tiny) -> dict[tuple[str, str], Table]:
    torch.set_num_threads(1)
    return evaluate(tiny.run)


def test_questions_rows_and_columns(tables):
    diffusion, started = ["ADMC replace", "ADMC clean"], "ADMC replace n=2"
    everyone = [*RIVALS, "ADMC replace", started, "ADMC clean"]
    averaged = [name for method in everyone[2:] for name in (method, f"{method}, probabilities averaged")]
    sampled = [name for method in diffusion for name in (method, f"{method}, probabilities averaged")]
    expected = {
        **{(RECOGNITION, m): ([*RIVALS, *sampled, "logistic regression"], (*COLUMNS, "full")) for m in METRICS},
        **{(FROZEN, m): ([*RIVALS[:2], *averaged, "complete data"], (*COLUMNS, "full")) for m in METRICS},
        (ERROR, "NRMSE"): (everyone, COLUMNS),
        (CALIBRATION, "CRPS"): (everyone, COLUMNS),
    }
    assert {key: (list(table.cells), table.columns) for key, table in tables.items()} == expected
    for (question, _), table in tables.items():
        assert table.trials == 1
        for method, cells in table.cells.items():
            wanted = set(table.columns)
            if question == RECOGNITION and method.endswith("averaged"):
                wanted = set(COLUMNS)
            if question == FROZEN:
                wanted = {"full"} if method == "complete data" else set(COLUMNS)
            assert set(cells) == wanted
            assert all(math.isfinite(mean) and mean >= 0 and std == 0 for mean, std in cells.values())


def test_missing_rates(tables, tiny, tmp_path):
    """Where a rate leaves one set for every sample, its column is that set's; where nothing is hidden, the whole."""
    folder = shutil.copytree(tiny.run, tmp_path / "run")
    texts = ("0", "text=1,audio=1", "vision=1", "0.5")
    protocol = Protocol(n_samples=3, missing=tuple(map(MissingRate.parse, texts)), missing_seed=4)
    found = {(table.question, table.metric): table for table in evaluate_run(folder, protocol)}
    for question in (RECOGNITION, FROZEN):
        for metric in METRICS:
            sets, rates = tables[question, metric], found[f"{question}, by missing rate", metric]
            assert rates.columns == (*texts, "average")
            assert set(rates.cells) == set(sets.cells) - {
                "complete data",
                "ADMC replace n=2",
                "ADMC replace n=2, probabilities averaged",
            }
            for method, cells in rates.cells.items():
                assert cells["text=1,audio=1"] == sets.cells[method]["{v}"]
                assert cells["vision=1"] == sets.cells[method]["{at}"]
                whole = "complete data" if question == FROZEN else method.removesuffix(", probabilities averaged")
                assert cells["0"] == sets.cells[whole]["full"]
                assert all(math.isfinite(mean) for mean, _ in cells.values())
    content = json.loads((folder / "results.json").read_text())
    assert content["protocol"]["missing"] == list(texts)
    assert "missing 0; text=1,audio=1; vision=1; 0.5 drawn with seed 4" in (folder / "results.md").read_text()
    with pytest.raises(ValueError, match=r"missing: got the modalities \['smell'\]"):
        evaluate_run(folder, Protocol(missing=(MissingRate.parse("smell=0.5"),)))


def test_files(tables, tiny):
    run = Run.load(tiny.run)
    with run.open_store() as store:
        (split,) = run.splits(store)
        complete = int(store.available(split.test).all(1).sum())
    assert 0 < complete < len(split.test) == 20
    content = json.loads((tiny.run / "results.json").read_text())
    assert content["protocol"] == {
        "data": "tiny.npz",
        "label": "mood",
        "window": None,
        "split": "a hold-out by whole groups of 'clip', at random with seed 0",
        "part": "test",
        "part_samples": 20,
        "complete_samples": complete,
        "folds": 1,
        "seeds": [0],
        "patterns": [*COLUMNS[:-1], "full"],
        "missing": [],
        "missing_seed": 0,
        "n_samples": 3,
        "start_steps": [2],
        "sampling_steps": [],
        "metrics": [*METRICS, "NRMSE", "CRPS"],
    }
    about = (
        "tiny.npz, 'mood': test part of a hold-out by whole groups of 'clip', at random with seed 0, of which "
        f"{complete} of 20 samples have every modality and are measured; 1 fold(s), "
        "seed(s) 0; K = 3 samples. Observed: {a}, {t}, {v}, {at}, {av}, {tv}, full. Metrics: WA, UA, F1, F1 weighted, "
        f"NLL, NRMSE, CRPS. modafill {modafill.__version__}, torch {torch.__version__}."
    )
    assert content["about"] == about
    with open(tiny.run / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(content["records"])
    text = (tiny.run / "results.md").read_text()
    for table in tables.values():
        assert f"**{table.title}**\n\n{about}\n\n| method |" in text
        assert table.markdown(about) in text
    for record in content["records"]:
        table = tables[record["question"], record["metric"]]
        assert table.cells[record["method"]][record["available"]] == (record["value"], 0.0)


def test_same_figures_twice(tables, tiny):
    before = (tiny.run / "results.json").read_bytes()
    assert evaluate(tiny.run) == tables
    assert (tiny.run / "results.json").read_bytes() == before


def test_evaluation_trains_nothing(tiny):
    stages = tiny.run / "fold0-seed0" / "stages"
    before = {file.name: file.stat().st_mtime_ns for file in stages.iterdir()}
    evaluate(tiny.run)
    assert {file.name: file.stat().st_mtime_ns for file in stages.iterdir()} == before


def test_error_of_the_mean(tables, tiny):
    """The mean fill's NRMSE of {a}, from the tokens by hand: test rows with everything, over text and vision."""
    run = Run.load(tiny.run)
    trainer = run.trainer(0, 0, Accelerator(cpu=True), lambda *_: None)
    trainer.embed()
    (a,) = [p for p in missing_patterns(3) if p.tolist() == [False, True, False]]
    rows, train = (
        torch.from_numpy(part[trainer.available[part].all(1).numpy()])
        for part in (trainer.split.test, trainer.split.train)
    )
    truth = trainer.tokens[rows][:, ~a]
    expected = nrmse(trainer.tokens[train].mean(0)[~a].expand_as(truth), truth, 1.0)
    assert tables[ERROR, "NRMSE"].cells["mean fill"]["{a}"][0] == pytest.approx(expected, rel=1e-6)
    assert tables[CALIBRATION, "CRPS"].cells["mean fill"]["{a}"][0] == pytest.approx(
        float((trainer.tokens[train].mean(0)[~a] - truth).abs().mean()), rel=1e-6
    )


@pytest.mark.parametrize("part", ["test", "valid"])
def test_recognition_by_hand(tiny, tmp_path, part):
    """Zero fill before the frozen classifier, from the written tensors, and logistic regression, by scikit-learn."""
    folder = tmp_path / "run"
    shutil.copytree(tiny.run, folder)
    found = {(t.question, t.metric): t for t in evaluate_run(folder, Protocol(n_samples=2, part=part))}
    assert (folder / ("results.md" if part == "test" else "results-valid.md")).is_file()
    run = Run.load(tiny.run)
    store = run.open_store()
    (split,) = run.splits(store)
    rows, train, valid = (
        part_rows[store.available()[part_rows].all(1)] for part_rows in (getattr(split, part), split.train, split.valid)
    )
    target = np.unique(store.labels("mood"), return_inverse=True)[1]
    stages = tiny.run / "fold0-seed0" / "stages"
    tokens, _ = read_tensors(stages / "tokens.safetensors")
    fusion = Fusion(3, 3, run.config).eval()
    fusion.load_state_dict(read_tensors(stages / "fusion-complete.safetensors")[0])
    embeddings = tokens["tokens"] * tokens["std"] + tokens["mean"]
    embeddings[:, 0] = 0
    filled = (embeddings - tokens["mean"]) / tokens["std"]
    with torch.no_grad():
        predicted = fusion(filled[torch.from_numpy(rows)]).argmax(1).numpy()
    zero = {metric: found[FROZEN, metric].cells["zero fill"]["{av}"][0] for metric in ("WA", "UA", "F1")}
    assert zero == pytest.approx(_scores(target[rows], predicted))

    vision = store.read(np.arange(len(store))).features["vision"].numpy()
    x = (vision - vision[split.train].mean(0)) / vision[split.train].std(0)
    models = [LogisticRegression(C=c, max_iter=1000).fit(x[train], target[train]) for c in (1e-4, 1e-3, 0.01, 0.1)]
    best = min(models, key=lambda model: log_loss(target[valid], model.predict_proba(x[valid])))
    logistic = {metric: found[RECOGNITION, metric].cells["logistic regression"]["{v}"][0] for metric in zero}
    assert logistic == pytest.approx(_scores(target[rows], best.predict(x[rows])))


def _scores(target: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    return {
        "WA": accuracy_score(target, predicted),
        "UA": recall_score(target, predicted, average="macro"),
        "F1": f1_score(target, predicted, average="macro"),
    }


@pytest.mark.parametrize("method", [*RIVAL_KEYS, "replace", "clean"])
def test_hidden_tokens_change_nothing(tiny, method):
    trainer = Run.load(tiny.run).trainer(0, 0, Accelerator(cpu=True), lambda *_: None)
    trainer.run()
    rows = torch.from_numpy(trainer.split.test)
    rows = rows[trainer.available[rows].all(1)]
    trainer.fill(method)
    for pattern in missing_patterns(3):
        before = trainer.complete(method, rows, pattern, 2, 5)
        clean = trainer.tokens.clone()
        trainer.tokens[:, ~pattern] = torch.nan
        after = trainer.complete(method, rows, pattern, 2, 5)
        trainer.tokens = clean
        assert torch.isfinite(before).all()
        assert torch.equal(before, after)


def test_unknown_part(tiny):
    with pytest.raises(ValueError, match="part: got 'train', expected test or valid"):
        evaluate_run(tiny.run, Protocol(part="train"))


def test_unfinished_run_is_refused(tiny, tmp_path):
    shutil.copytree(tiny.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "fold0-seed0" / "model")
    (tmp_path / "run" / "results.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="fold0-seed0 not trained yet; run the same `modafill train` again"):
        evaluate(tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_stages_that_are_gone_are_not_trained_again(tiny, tmp_path):
    shutil.copytree(tiny.run, tmp_path / "run")
    stages = tmp_path / "run" / "fold0-seed0" / "stages"
    (stages / "fusion-ridge-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"stages/fusion-ridge-2\.safetensors is gone; remove fold0-seed0/model"):
        evaluate(tmp_path / "run")
    assert not (stages / "fusion-ridge-2.safetensors").exists()


@pytest.mark.parametrize("lost", ["mean", "key"])
def test_damaged_tokens_are_named(tiny, tmp_path, lost):
    shutil.copytree(tiny.run, tmp_path / "run")
    file = tmp_path / "run" / "fold0-seed0" / "stages" / "tokens.safetensors"
    tensors, about = read_tensors(file)
    write_tensors(file, {k: v for k, v in tensors.items() if k != lost}, {k: v for k, v in about.items() if k != lost})
    with pytest.raises(ValueError, match=rf"tokens\.safetensors: {'made with' if lost == 'key' else 'damaged'}|format"):
        evaluate(tmp_path / "run")


def test_several_processes_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (evaluate_run, partial(draw_curve, steps=[2])):
        with pytest.raises(ValueError, match="WORLD_SIZE: got 2 processes, expected one"):
            call(tiny.run)


def test_complete_test_samples_are_needed(tiny):
    trainer = Run.load(tiny.run).trainer(0, 0, Accelerator(cpu=True), lambda *_: None)
    trainer.available[torch.from_numpy(trainer.split.test), 1] = False
    with pytest.raises(ValueError, match="fold 0: no sample of the test part has all of text, audio, vision"):
        evaluate_part(trainer, 0)


def test_picture(tiny, tmp_path):
    draw_embeddings(Run.load(tiny.run), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
