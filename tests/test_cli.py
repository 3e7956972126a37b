"""The command line as its users meet it: what it prints, what it writes, and how it says what was wrong."""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from modafill import cli, terminal
from modafill.data import FeatureStore, convert
from modafill.imputer import ModalityImputer
from modafill.models.admc import ADMC, ADMCConfig
from modafill.models.cdtp import CDTPConfig

COMMANDS = (
    "info",
    "inspect",
    "convert",
    "demo",
    "train",
    "train admc",
    "train cdtp",
    "evaluate",
    "impute",
    "recognise",
    "bench",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def modafill(monkeypatch, capfd):
    """Runs the command line in this process: (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["modafill", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capfd.readouterr()

    return run


@pytest.fixture
def mistake(modafill):
    """The one line that a mistake leaves on standard error."""

    def run(*arguments: object) -> str:
        status, out, err = modafill(*arguments)
        assert status == 2, (status, out, err)
        assert out == ""
        assert err.startswith("modafill: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err

    return run


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("store") / "tiny.h5"
    convert(tiny.archive, path, tiny.mapping)
    return path


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(modafill, command):
    status, out, err = modafill(*command.split(), "--help")
    assert status == 0
    assert err == ""
    assert "Usage: modafill" in out
    names = {"": COMMANDS[:4], "train": ["admc"], "train admc": ["--data", "--conditioning", "--folds", "--jobs"]}
    assert all(name in out for name in names.get(command, [command]))
    lines = [line.rstrip() for line in out.split("╭")[0].splitlines()]
    for line, following in itertools.pairwise(lines):
        if line and following:
            assert len(f"{line} {following.split()[0]}") > max(map(len, lines)), "a line that breaks too early"


@pytest.mark.parametrize("command", ["inspect", "convert", "train admc", "train cdtp", "impute", "recognise"])
def test_help_names_every_layout(modafill, command):
    out = " ".join(re.sub("[│ ]+", " ", modafill(*command.split(), "--help")[1]).split())
    assert cli.DATA_HELP in out


def test_python_m_modafill():
    command = [sys.executable, "-m", "modafill", "evaluate", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("modafill: nowhere: no run.json there")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_says_what_goes_on(tiny, tmp_path):
    command = [sys.executable, "-m", "modafill", *tiny.train_arguments, "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while not (tmp_path / "run" / "fold0-seed0").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("modafill: interrupted; the same command goes on with a training")
    assert "Traceback" not in err


def test_version(modafill):
    assert modafill("--version") == (0, importlib.metadata.version("modafill") + "\n", "")


def test_a_backend_that_cannot_run_is_one_line(modafill, monkeypatch):
    monkeypatch.setenv("MODAFILL_BACKEND", "torch")
    status, out, _ = modafill("info", "--json")
    ops = json.loads(out)["ops"]
    assert status == 0
    assert ops["conv_gelu_conv"]["backend"] == "torch"
    assert ops["randn"] == {
        "backend": "none", "reason": "randn: the torch backend cannot run: randn has no such backend", "rejected": {}
    }  # fmt: skip
    status, _, err = modafill("bench", "--quick")
    assert status == 2
    assert err.splitlines()[-1].startswith("modafill: masked_reverse_step: the torch backend cannot run")
    assert "Traceback" not in err


def test_info(modafill):
    status, out, err = modafill("info", "--json")
    facts = json.loads(out)
    assert (status, err) == (0, "")
    assert facts["torch"] == torch.__version__
    assert set(facts["ops"]) >= {"masked_reverse_step", "ddim_step", "add_noise", "randn"}
    status, out, _ = modafill("info")
    assert status == 0
    assert torch.__version__ in out


def test_inspect(modafill, tiny, store):
    reports = []
    for arguments in ([tiny.archive, "--mapping", tiny.mapping], [store]):
        status, out, err = modafill("inspect", *arguments, "--json")
        assert (status, err) == (0, "")
        reports.append(json.loads(out))
        status, out, _ = modafill("inspect", *arguments)
        assert status == 0
        assert "glad" in out
    archive, written = reports
    assert archive["samples"] == written["samples"] == 96
    for report in reports:
        assert [modality["name"] for modality in report["modalities"]] == ["text", "audio", "vision"]


def test_convert(modafill, tiny, store, tmp_path):
    out_file = tmp_path / "deep" / "out.h5"
    status, out, _ = modafill("convert", tiny.archive, out_file, "--mapping", tiny.mapping)
    assert status == 0
    assert "wrote" in out
    rows = np.arange(96)
    with FeatureStore(out_file) as converted, FeatureStore(store) as expected:
        a, b = converted.read(rows), expected.read(rows)
        assert converted.task == expected.task
    assert torch.equal(a.available, b.available)
    assert all(torch.equal(a.features[name], b.features[name]) for name in b.features)


def test_flaws_are_said_by_every_command(modafill, tiny, tmp_path, monkeypatch):
    """In the same words, once, whether the data are converted now, were before, or come converted."""
    data, mapping = tmp_path / "flawed.npz", tmp_path / "zero.json"
    with np.load(tiny.archive) as arrays:
        sound = arrays["sound"].copy()
        seen = np.flatnonzero(arrays["seen"][:, 1])[:2]
        sound[seen, 0, 0] = -np.inf
        np.savez(data, **{**arrays, "sound": sound})
    mapping.write_text(json.dumps({**json.loads(tiny.mapping.read_text()), "nonfinite": "zero"}))
    flaw = "audio: 2 values that are NaN or infinite are taken for 0"
    asked = ["--mapping", mapping]

    assert modafill("convert", data, tmp_path / "converted.h5", *asked)[2] == f"{data}: {flaw}\n"
    run = tmp_path / "run"
    train = [*tiny.train_arguments[:2], "--data", data, *asked, *tiny.train_arguments[6:], "--out", run]
    for _ in range(2):
        status, _, err = modafill(*train)
        assert status == 0
        assert err.splitlines()[0] == f"{data}: {flaw}"
        assert err.count(flaw) == 1
        assert modafill("evaluate", run, "--samples", 1)[2] == f"{data}: {flaw}\n"
    curve = ["curve", run, "--steps", 1, "--solvers", "ddim", "--samples", 2]
    assert modafill(*curve)[2] == f"{data}: {flaw}\n"
    for command, suffix in (("impute", "h5"), ("recognise", "csv")):
        assert modafill(command, run, data, tmp_path / f"a.{suffix}", *asked)[2] == f"{data}: {flaw}\n"
        converted = tmp_path / "converted.h5"
        assert modafill(command, run, converted, tmp_path / f"b.{suffix}")[2] == f"{converted}: {flaw}\n"
        monkeypatch.setenv("RANK", "1")
        assert modafill(command, run, data, tmp_path / f"c.{suffix}", *asked)[2] == ""
        monkeypatch.delenv("RANK")
    assert json.loads(modafill("inspect", tmp_path / "converted.h5", "--json")[1])["notes"] == [flaw]


@pytest.mark.parametrize("command", ["convert", "impute", "recognise"])
def test_nothing_is_overwritten(mistake, tiny, store, tmp_path, command):
    source = shutil.copy(tiny.archive if command == "convert" else store, tmp_path)
    arguments = [command, "--mapping", tiny.mapping] if command == "convert" else [command, tiny.run]
    there = tmp_path / ("there.csv" if command == "recognise" else "there.h5")
    there.write_text("mine")
    before = Path(source).read_bytes()
    assert "exists already" in mistake(*arguments, source, there)
    assert f"expected a name that ends in {there.suffix}" in mistake(*arguments, source, tmp_path / "out.npz")
    mistake(*arguments, source, source)
    assert Path(source).read_bytes() == before
    assert there.read_text() == "mine"


def test_a_log_gets_a_line_now_and_then(modafill, tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny.run, tmp_path / "run")
    assert modafill("evaluate", tmp_path / "run", "--samples", 1)[2] == ""
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 0.0)
    said = modafill("evaluate", tmp_path / "run", "--samples", 1)[2].splitlines()
    shares = [int(re.match(r"evaluating \(%\): (\d+) of 100", line)[1]) for line in said]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 100)
    assert len(set(shares)) > 20
    err = modafill(*tiny.train_arguments, "--set", "adn_epochs=4", "--out", tmp_path / "new")[2]
    assert err.startswith("96 samples in 24 groups: 64 for training, 12 for validation, 20 for testing (held out at")
    assert "fold0-seed0, stage 5 of 38 (adn-clean), epoch 4 of 4: loss " in err
    assert re.search(r"stage 1 of 38 \(encoder-text\), epoch 1 of 3: loss [\d.]+, validation [\d.]+\n", err)


def test_a_run_of_several_parts_says_how_far_it_is(modafill, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 0.0)
    err = modafill(*tiny.train_arguments, "--seeds", 2, "--folds", 2, "--out", tmp_path / "new")[2]
    assert "(on average over 2 folds)" in err
    lines = err.splitlines()
    ends = [line for line in lines if " trained: " in line]
    assert re.fullmatch(r"fold0-seed0 trained: 1 of 4, about \d+ min left", ends[0])
    assert lines[-1] == ends[3] == "fold1-seed1 trained: 4 of 4"


def test_train_again_is_quick_and_changes_nothing(modafill, tiny):
    files = {file: file.stat().st_mtime_ns for file in tiny.run.rglob("*.safetensors")}
    status, out, _ = modafill(*tiny.train_arguments, "--out", tiny.run)
    assert status == 0
    assert out == f"{tiny.run} holds this run, trained before; next: modafill evaluate {tiny.run}\n"
    assert {file: file.stat().st_mtime_ns for file in tiny.run.rglob("*.safetensors")} == files


def test_evaluate(modafill, tiny, tmp_path):
    shutil.copytree(tiny.run, tmp_path / "run")
    status, out, _ = modafill("evaluate", tmp_path / "run", "--samples", 2, "--start-steps", "2,3", "--metric", "F1")
    assert status == 0
    assert "F1 (higher is better" in out
    assert "UA (higher is better" not in out
    assert "ADMC replace n=3" in out
    about = json.loads((tmp_path / "run" / "results.json").read_text())["about"]
    assert out.startswith(f"{about}\n")
    assert out.count(about) == 1
    assert all((tmp_path / "run" / f"results.{kind}").is_file() for kind in ("json", "csv", "md"))


def test_impute_reads_the_windows_that_were_trained_on(modafill, tiny, store, tmp_path):
    modafill(*tiny.train_arguments, "--window", 3, "--out", tmp_path / "run")
    model = tmp_path / "run" / "fold0-seed0" / "model"
    assert modafill("impute", model, store, tmp_path / "a.h5")[0] == 0
    with FeatureStore(store) as given, FeatureStore(tmp_path / "a.h5") as done:
        rows = np.arange(96)
        batch = given.windowed(3).read(rows)
        assert batch.features["vision"].shape == (96, 3, 3)
        expected = ModalityImputer.from_pretrained(model).complete(batch)
        found = done.read(rows, generated=True)
    torch.testing.assert_close(found.features["vision"], expected.embeddings["vision"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["run", "model"])
@pytest.mark.parametrize("samples", [1, 3])
def test_impute(modafill, tiny, store, tmp_path, what, samples):
    source = tiny.run if what == "run" else tiny.run / "fold0-seed0" / "model"
    arguments = ("--samples", samples, "--seed", 5)
    status, out, _ = modafill("impute", source, store, tmp_path / "a.h5", *arguments)
    assert status == 0
    with FeatureStore(store) as given:
        text, audio, vision = (~given.available()).sum(0)
    assert out.rstrip().endswith(f"generated of 96: text {text}, audio {audio}, vision {vision}")
    modafill("impute", source, tiny.archive, tmp_path / "b.h5", "--mapping", tiny.mapping, *arguments)
    modafill("impute", source, store, tmp_path / "c.h5", "--samples", samples, "--seed", 6)
    rows = np.arange(96)
    with FeatureStore(store) as given, FeatureStore(tmp_path / "a.h5") as done:
        available = given.read(rows).available
        model = ADMC.from_pretrained(tiny.run / "fold0-seed0" / "model")
        with torch.no_grad():
            embeddings = model.embed(given.read(rows))
        assert 0 < int((~available).sum()) < available.numel()
        assert torch.equal(done.read(rows).available, available)
        assert np.array_equal(done.generated(rows), ~available.numpy())
        assert done.ids(rows) == given.ids(rows)
        assert done.labels().tolist() == given.labels().tolist()
        assert done.groups().tolist() == given.groups().tolist()
        filled = torch.stack(list(done.read(rows, generated=True).features.values()), dim=1)
    assert torch.equal(filled[available], embeddings[available])
    assert filled.isfinite().all()
    assert (filled[~available] != 0).any(1).all()

    def all_values(name: str) -> torch.Tensor:
        with FeatureStore(tmp_path / name) as file:
            return torch.stack(list(file.read(rows, generated=True).features.values()), dim=1)

    assert torch.equal(all_values("b.h5"), filled)
    assert torch.equal(all_values("c.h5")[available], filled[available])
    assert (all_values("c.h5") != filled)[~available].any(1).all()


def test_recognise(modafill, tiny, store, tmp_path):
    status, out, _ = modafill("recognise", tiny.run, store, tmp_path / "a.csv", "--samples", 3, "--seed", 5)
    assert (status, "96 samples" in out) == (0, True)
    modafill(
        "recognise", tiny.run, tiny.archive, tmp_path / "b.csv", "--mapping", tiny.mapping, "--samples", 3, "--seed", 5
    )
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    with FeatureStore(store) as given:
        batch, ids = given.read(np.arange(96)), given.ids()
    model = ADMC.from_pretrained(tiny.run / "fold0-seed0" / "model")
    expected = model.recognise(batch, n_samples=3, seed=5)
    assert [row["id"] for row in table] == ids
    found = torch.tensor([[float(row[f"p({name})"]) for name in model.classes] for row in table])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert [row["class"] for row in table] == [model.classes[i] for i in expected.argmax(1)]


@pytest.mark.slow
def test_demo_on_other_data(modafill, tiny, tmp_path):
    status, out, _ = modafill("demo", "--data", tiny.archive, "--mapping", tiny.mapping, "--out", tmp_path / "demo")
    assert status == 0
    assert "UA (higher is better" in out
    assert (tmp_path / "demo" / "embeddings.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "demo" / "results.md").is_file()


TRAIN = ["train", "admc", "--data", "{archive}", "--mapping", "{mapping}", "--out", "{new}"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect", "{folder}/nothing.npz"], "nothing.npz: no such file"),
        (["convert", "{folder}/nothing.npz", "{new}"], "nothing.npz: no such file"),
        (["impute", "{run}", "{folder}/nothing.h5", "{new}"], "nothing.h5: no such file"),
        (["demo", "--data", "{folder}/nothing.npz", "--out", "{new}"], "nothing.npz: no such file"),
        (["train", "admc", "--data", "{folder}/nothing.npz", "--out", "{new}"], "nothing.npz: no such file"),
        (["inspect", "{mapping}"], "not a file that is known; expected a feature store (.h5)"),
        (["inspect", "{folder}/truncated.h5"], "truncated.h5: not a readable feature store"),
        (["impute", "{run}", "{folder}/truncated.h5", "{new}"], "truncated.h5: not a readable feature store"),
        (["train", "admc", "--data", "{folder}/truncated.h5", "--out", "{new}"], "truncated.h5: not a readable"),
        (["inspect", "{folder}/truncated.npz", "--mapping", "{mapping}"], "truncated.npz"),
        (["convert", "{archive}", "{new}"], "mapping"),
        (["inspect", "{archive}", "--mapping", "hazuml"], "'hazuml'"),
        (["convert", "{archive}", "{new}", "--mapping", "mmmo"], "mapping mmmo needs the arrays ['y_train'"),
        ([*TRAIN, "--preset", "huge"], "preset: got 'huge', expected one of paper, small"),
        ([*TRAIN, "--conditioning", "warm"], "conditioning: got 'warm', expected one of replace, clean"),
        ([*TRAIN, "--conditioning", "clean", "--conditioning", "warm"], "conditioning: got 'warm'"),
        ([*TRAIN, "--seeds", "0"], "seeds: got 0, expected at least 1"),
        ([*TRAIN, "--folds", "0"], "folds: got 0, expected at least 1"),
        ([*TRAIN, "--folds", "99"], "99"),
        ([*TRAIN, "--folds", "two"], "--folds"),
        ([*TRAIN, "--jobs", "0"], "jobs: got 0, expected at least 1"),
        ([*TRAIN, "--window", "-3"], "-3"),
        ([*TRAIN, "--set", "epochs=3"], "set: got 'epochs', expected one of width"),
        ([*TRAIN, "--set", "width"], "set: got width=, expected a value like 256"),
        ([*TRAIN, "--set", "width=1.5"], "set: got width=1.5, expected a value like 256"),
        ([*TRAIN, "--set", "width=true"], "set: got width=true, expected a value like 256"),
        ([*TRAIN, "--set", "width=0"], "width"),
        ([*TRAIN, "--set", "adn_heads=0"], "adn_heads"),
        ([*TRAIN, "--set", "batch_size=0"], "batch_size"),
        ([*TRAIN, "--set", "batch_size=-2"], "batch_size"),
        ([*TRAIN, "--set", "adn_width=wide"], "adn_width: got 'wide', expected a whole number, at least 1"),
        ([*TRAIN, "--set", "adn_heads=7"], "heads: got 7, expected a divisor of the width 256"),
        ([*TRAIN, "--set", "start_step=2000"], "start_step: got 2000, expected a diffusion step in 1…1000"),
        ([*TRAIN, "--set", "beta_end=2"], "expected all in (0, 1)"),
        ([*TRAIN, "--set", "learning_rate=-1"], "learning_rate"),
        ([*TRAIN, "--set", "fusion_dropout=2"], "dropout"),
        ([*TRAIN, "--set", 'encoders={{"audio": "mlp"}}'], "encoders['audio']: got 'mlp', which cannot read"),
        ([*TRAIN, "--set", 'encoders={{"audio": "gru"}}'], "encoders['audio']: got 'gru', expected one of"),
        ([*TRAIN, "--set", "textcnn_kernels=[3,\"a\"]"], "textcnn_kernels"),
        ([*TRAIN, "--set", 'init="zero"', "--set", "adn_epochs=1"], "init: got 'zero', expected one of unit, scaled"),
        ([*TRAIN, "--bogus", "1"], "--bogus"),
        (["train", "admc", "--out", "{new}"], "--data"),
        (["train", "cdtpp"], "cdtpp"),
        (["inspekt"], "inspekt"),
        (["inspect"], "path"),
        (["evaluate", "{folder}"], "no run.json there"),
        (["evaluate", "{unfinished}"], "fold0-seed0 not trained yet; run the same `modafill train` again"),
        (["evaluate", "{run}", "--metric", "AUC"], "metric: got 'AUC', expected one of WA, UA, F1, F1 weighted"),
        (["evaluate", "{run}", "--samples", "0"], "--samples"),
        (["evaluate", "{run}", "--start-steps", "3,b"], "start-steps: got '3,b', expected numbers with commas"),
        (["evaluate", "{run}", "--start-steps", "61"], "start_step: got 61, expected a diffusion step in 1…60"),
        (["impute", "{run}", "{store}", "{new}", "--fold", "4"], "fold: got 4, expected 0…0"),
        ([*TRAIN[:-1], "{mapping}"], "tiny.json is a file, expected a folder"),
        (["demo", "--out", "{mapping}"], "tiny.json is a file, expected a folder"),
        (["impute", "{run}", "{store}", "{new}", "--samples", "0"], "--samples"),
        (["impute", "{run}", "{store}", "{new}", "--dtype", "int8"], "dtype: got 'int8', expected one of float32,"),
        (["impute", "{run}", "{store}", "{new}", "--steps", "0"], "steps: got 0, expected a whole number"),
        (["recognise", "{run}", "{store}", "{table}", "--solver", "rk4"], "solver: got 'rk4', expected one of ddim"),
        (["curve", "{run}", "--dtype", "int8"], "dtype: got 'int8', expected one of float32,"),
        (["curve", "{run}", "--steps", "a"], "steps: got 'a', expected numbers with commas"),
        (["recognise", "{run}", "{store}", "{table}", "--samples", "-1"], "--samples"),
        (["recognise", "{run}", "{folder}/nothing.h5", "{table}"], "nothing.h5: no such file"),
        (["recognise", "{run}", "{store}", "{new}"], "expected a name that ends in .csv"),
        (["recognise", "{run}/fold0-seed0/model", "{store}", "{table}", "--fold", "1"], "is one model, not a run"),
        (["recognise", "{unfinished}", "{store}", "{table}"], "fold0-seed0 not trained yet; run the same"),
        (["impute", "{folder}", "{store}", "{new}"], "no config.json there"),
        ([*TRAIN, "--window", "-3"], "window: got -3, expected a number of turns"),
        ([*TRAIN, "--set", "adn_epochs=0"], "adn_epochs: got 0, expected a whole number, at least 1"),
        (["evaluate", "{run}", "--metric", "MAE"], "metric: got 'MAE', expected one of WA, UA,"),
        (["impute", "{folder}/no/where", "{store}", "{new}"], "expected an existing folder or a hub id"),
        (["bench", "--suite", "laps"], "laps"),
        (["bench", "--threads", "x"], "threads: got 'x', expected numbers with commas"),
    ],
    ids=lambda value: " ".join(value)[:80] if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes(mistake, tiny, store, tmp_path, arguments, message):
    (tmp_path / "truncated.h5").write_bytes(store.read_bytes()[:4000])
    (tmp_path / "truncated.npz").write_bytes(tiny.archive.read_bytes()[:3000])
    if "{unfinished}" in arguments:
        shutil.copytree(tiny.run, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "fold0-seed0" / "model")
    names = {
        "archive": tiny.archive,
        "mapping": tiny.mapping,
        "run": tiny.run,
        "store": store,
        "folder": tmp_path,
        "new": tmp_path / "new.h5",
        "table": tmp_path / "new.csv",
        "unfinished": tmp_path / "run",
    }
    assert message in mistake(*(argument.format(**names) for argument in arguments))
    assert not any(path.name.startswith("new") for path in tmp_path.iterdir())


def test_data_that_cannot_be_trained_on_leave_nothing_behind(mistake, tiny, tmp_path):
    with np.load(tiny.archive) as archive:
        arrays = dict(archive)
    split = np.array(["train", "valid", "test"])[np.minimum(arrays["clip"] % 6, 2)]
    parts = {f"{key}_{name}": value[split == name] for name in np.unique(split) for key, value in arrays.items()}
    del parts["words_train"]
    np.savez(tmp_path / "parts.npz", **parts)
    mapping = {
        "splits": ["train", "valid", "test"],
        "modalities": {"text": "words_{split}", "vision": "faces_{split}"},
        "label": {"name": "mood_{split}", "kind": "class"},
    }
    (tmp_path / "parts.json").write_text(json.dumps(mapping))
    arguments = ["--data", tmp_path / "parts.npz", "--mapping", tmp_path / "parts.json", "--out", tmp_path / "run"]
    line = mistake("train", "admc", *arguments)
    assert "parts.npz: fold 0: none of the 16 training samples has text, expected at least one" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.json", "parts.npz"]


@pytest.mark.parametrize("model, config", [("admc", ADMCConfig), ("cdtp", CDTPConfig)])
def test_the_numbers_that_set_changes_are_listed(modafill, model, config):
    status, out, err = modafill("train", model, "--set", "help")
    assert (status, err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    for name, value in config.preset("small").to_dict().items():
        assert "".join(rows[name]).endswith("".join(json.dumps(value).split()))


def test_no_window_without_groups(mistake, make_tiny, tmp_path):
    archive, mapping = make_tiny(tmp_path, groups=False)
    line = mistake("train", "admc", "--data", archive, "--mapping", mapping, "--out", tmp_path / "run", "--window", 4)
    assert "windows need a group column and an order column" in line


def test_other_settings_for_the_same_folder(mistake, tiny):
    line = mistake(*tiny.train_arguments, "--set", "adn_epochs=4", "--seeds", "2", "--out", tiny.run)
    assert "holds a run with other config, seeds; choose another folder" in line


class Hostile:
    """An object whose unpickling runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_no_checkpoint_runs_code(modafill, mistake, tiny, store, tmp_path):
    """Neither a model's weights nor a stage of a training are ever unpickled."""
    marker = tmp_path / "ran"
    shutil.copytree(tiny.run, tmp_path / "run")
    weights = tmp_path / "run" / "fold0-seed0" / "model" / "model.safetensors"
    torch.save(Hostile(marker), weights)
    impute = ("impute", tmp_path / "run", store, tmp_path / "out.h5")
    assert "model.safetensors: not a readable safetensors file" in mistake(*impute)
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "model.safetensors" in mistake(*impute)
    shutil.rmtree(weights.parent)
    stage = tmp_path / "run" / "fold0-seed0" / "stages" / "adn-clean.safetensors"
    torch.save(Hostile(marker), stage)
    status, _, said = modafill(*tiny.train_arguments, "--out", tmp_path / "run")
    assert status == 2
    assert "adn-clean.safetensors: not a readable safetensors file" in said
    assert not marker.exists()
    torch.load(stage.rename(stage.with_suffix(".bin")), weights_only=False)
    assert marker.exists()


def test_damaged_weights(mistake, tiny, store, tmp_path):
    shutil.copytree(tiny.run / "fold0-seed0" / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors: not a readable safetensors file" in mistake(
        "impute", tmp_path / "model", store, tmp_path / "out.h5"
    )
    assert not (tmp_path / "out.h5").exists()
