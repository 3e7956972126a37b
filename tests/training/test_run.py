"""Runs as folders: what they hold, what they refuse, which trainings they are made of."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from modafill.data import convert
from modafill.errors import OutOfMemory
from modafill.files import read_tensors
from modafill.models.admc import ADMC, ADMCConfig
from modafill.training import EpochDone, Run, train
from modafill.training import run as run_module

SETTINGS = {
    "width": 8, "mlp_hidden": 8, "classifier_hidden": 8, "adn_layers": 1, "adn_heads": 2, "adn_feedforward": 16,
    "fusion_layers": 1, "fusion_heads": 2, "fusion_feedforward": 16, "diffusion_steps": 60, "start_step": 4,
    "sampling_steps": 3, "batch_size": 32, "encoder_epochs": 1, "adn_epochs": 1, "fusion_epochs": 1,
}  # fmt: skip


def ignore(*_):
    pass


@pytest.fixture
def run(tiny, tmp_path) -> Run:
    config = ADMCConfig(conditioning="clean", **SETTINGS)
    return Run(
        tmp_path / "run", "admc", str(tiny.archive), str(tiny.mapping), config, ("clean",), folds=2, seeds=(4, 5)
    )


def weights(run: Run, fold: int, seed: int) -> dict[str, torch.Tensor]:
    return read_tensors(run.part_folder(fold, seed) / "model" / "model.safetensors")[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip(run):
    run = replace(run, window=0, split_seed=3, config=replace(run.config, encoders={"audio": "textcnn"}))
    run.write()
    assert Run.load(run.folder) == run
    run.write()  # the same run is resumed
    assert [file.name for file in run.folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seeds": (4,)}, "other seeds;"),
        ({"folds": 1, "window": 2}, "other folds, window;"),
        ({"data": "/elsewhere.npz"}, "other data;"),
        ({"variants": ("clean", "replace")}, "other variants;"),
        ({"config": ADMCConfig(conditioning="clean", **{**SETTINGS, "adn_epochs": 2})}, "other config;"),
    ],
)
def test_other_settings_are_refused(run, changes, named):
    run.write()
    before = (run.folder / "run.json").read_bytes()
    with pytest.raises(ValueError, match=named):
        train(replace(run, **changes), ignore)
    assert (run.folder / "run.json").read_bytes() == before
    assert Run.load(run.folder) == run


def test_an_encoder_of_no_modality_is_refused(run):
    run = replace(run, config=replace(run.config, encoders={"smell": "mlp"}))
    with pytest.raises(ValueError, match="encoders: got the modality 'smell', expected some of text"):
        train(run, ignore)
    assert not run.folder.exists()


def test_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"no run\.json there, expected a folder written by `modafill train`"):
        Run.load(tmp_path)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"format_version": 1}, "format version 1, this modafill reads version 2"),
        ({"format_version": 3, "new": 1}, "format version 3, this modafill reads version 2"),
        ({"model": "other"}, "model 'other', expected one of admc, cdtp"),
    ],
)
def test_other_version_is_refused(run, change, named):
    run.write()
    file = run.folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"run\.json: {named}"):
        Run.load(run.folder)
    if "format_version" in change:
        with pytest.raises(ValueError, match=rf"run\.json: {named}"):
            run.write()


@pytest.mark.parametrize("change", [{"config": 3}, {"seeds": 3}, {"config": {"width": "8"}}, {"window": "x"}])
def test_damaged_run_is_named(run, change):
    run.write()
    file = run.folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f"^{file}: "):
        Run.load(run.folder)
    for text in ("{", "[" * 100_000, "3"):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"^{file}: "):
            Run.load(run.folder)
        with pytest.raises(ValueError, match=f"^{file}: "):
            run.write()


def test_a_model_that_does_not_fit_the_memory_is_named(run):
    """Its first layer alone is larger than what a process can address."""
    run = replace(run, config=replace(run.config, mlp_hidden=1 << 42))
    with pytest.raises(OutOfMemory, match=r"fold0-seed4: out of memory \(.*\); what was saved is kept"):
        train(run, ignore)


def test_one_at_a_time(run, monkeypatch):
    """Whoever comes while another trains is refused, and nothing is left locked."""
    monkeypatch.setattr(run_module, "train_part", lambda *_: train(run, ignore))
    for _ in range(2):
        with pytest.raises(ValueError, match="another process is training into this folder"):
            train(run, ignore)


def test_parts(run, monkeypatch):
    assert run.parts == [(0, 4), (1, 4), (0, 5), (1, 5)]
    assert [run.part_folder(*part).name for part in run.parts] == [
        "fold0-seed4", "fold1-seed4", "fold0-seed5", "fold1-seed5",
    ]  # fmt: skip
    (run.part_folder(1, 4) / "model").mkdir(parents=True)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(run_module, "train_part", lambda run, fold, seed, report: asked.append((fold, seed)))
    train(run, ignore)
    assert asked == [(0, 4), (0, 5), (1, 5)]


def test_folds_are_the_same_for_all_seeds(run):
    with run.open_store() as store:
        splits = run.splits(store)
        groups = store.groups()
    assert len(splits) == 2
    assert not set(groups[splits[0].test]) & set(groups[splits[1].test])
    from accelerate import Accelerator

    for fold, seed in run.parts:
        trainer = run.trainer(fold, seed, Accelerator(cpu=True), ignore)
        assert trainer.split.test.tolist() == splits[fold].test.tolist()
        assert trainer.seed == seed


def test_jobs_must_be_positive(run):
    with pytest.raises(ValueError, match="jobs: got 0, expected at least 1"):
        train(run, ignore, jobs=0)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "got 'bf16' .*expected 'no': .* --set precision=bfloat16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: got '4'"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND: got 'INDUCTOR'"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP: got 'true'"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: got 'abc', expected a number of processes"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: got 2 processes, but RANK, .*MASTER_ADDR, .* is not set"),
    ],
)
def test_what_a_launcher_asks_for_and_is_not_done_is_refused(run, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train(run, ignore)
    assert not run.folder.exists()


@pytest.mark.parametrize("backend", ["no", "NO"])
def test_a_launcher_that_asks_for_nothing(run, monkeypatch, backend):
    for name, value in {**run_module.LAUNCHER_OPTIONS, "ACCELERATE_DYNAMO_BACKEND": backend}.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(run_module, "train_part", lambda run, fold, seed, report: asked.append((fold, seed)))
    train(run, ignore)
    assert asked == run.parts


@pytest.mark.slow
def test_two_jobs_equal_one(run):
    """Also where a worker was killed on the way."""
    run = replace(run, folds=1)
    reports: list[str] = []

    def kill_one(_: EpochDone) -> None:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    train(run, ignore)
    torch.set_num_threads(2)  # divided among the jobs
    apart = replace(run, folder=run.folder.with_name("apart"))
    with pytest.raises(ChildProcessError, match=r"a worker process died .*; the same command goes on"):
        train(apart, kill_one, jobs=2)
    assert len(apart.finished) < 2
    train(apart, lambda epoch: reports.append(epoch.part), jobs=2)
    for fold, seed in run.parts:
        assert same(weights(run, fold, seed), weights(apart, fold, seed))
    assert not same(weights(run, 0, 4), weights(run, 0, 5))
    assert set(reports) == {"fold0-seed4", "fold0-seed5"}


def check_numbers(reports: list[EpochDone]) -> None:
    """Stages are counted from 1 to the last, one by one."""
    assert [done.part_done for done in reports] == [False] * (len(reports) - 1) + [True]
    stages = list(dict.fromkeys((epoch.number, epoch.stages, epoch.stage) for epoch in reports[:-1]))
    assert [(number, of) for number, of, _ in stages] == [(n, len(stages)) for n in range(1, len(stages) + 1)]


@pytest.mark.parametrize("conditionings", [("clean",), ("replace", "clean")])
def test_every_stage_has_its_number(run, conditionings):
    run = replace(run, folds=1, seeds=(0,), variants=conditionings)
    reports: list[EpochDone] = []
    said: list[str] = []
    train(run, reports.append, announce=said.append)
    check_numbers(reports)
    assert {(epoch.part, epoch.parts_done, epoch.parts) for epoch in reports[:-1]} == {("fold0-seed0", 0, 1)}
    assert (reports[-1].part, reports[-1].parts_done) == ("fold0-seed0", 1)
    assert len(said) == 1


def test_joint_encoders(run):
    run = replace(run, folds=1, seeds=(0,), config=replace(run.config, joint_encoders=True))
    reports: list[EpochDone] = []
    train(run, reports.append)
    assert (reports[0].part, reports[0].stage) == ("fold0-seed0", "encoders-joint")
    assert not any("encoder-" in epoch.stage for epoch in reports)
    check_numbers(reports)
    folder = run.part_folder(0, 0)
    model = ADMC.from_pretrained(folder / "model")
    joint, _ = read_tensors(folder / "stages" / "encoders-joint.safetensors")
    for name, tensor in model.unimodal.state_dict().items():
        assert torch.equal(tensor, joint[f"unimodal.{name}"])
    assert {name.split(".")[0] for name in joint} == {"unimodal", "fusion"}


@pytest.mark.parametrize("changed", ["faces", "mood"])
def test_other_data_under_a_run_are_refused(tiny, tmp_path, changed):
    """A file of the same name and size may hold something else: no stage made from the old one is reused."""
    shutil.copytree(tiny.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "fold0-seed0" / "model")
    data = shutil.copy(tiny.archive, tmp_path)
    run = replace(Run.load(tmp_path / "run"), data=str(data))
    (run.folder / "run.json").unlink()
    train(run, ignore)
    shutil.rmtree(run.folder / "fold0-seed0" / "model")
    with np.load(data) as archive:
        arrays = dict(archive)
    if changed == "faces":
        arrays[changed][17, 1] += 1e-3  # a single value of a single sample
    else:
        arrays[changed] = arrays[changed][::-1]
    np.savez(data, **arrays)
    with pytest.raises(ValueError, match="made with other data"):
        train(run, ignore)


def test_a_run_has_one_data_set(tiny, tmp_path, monkeypatch):
    """What is finished is of the data that the rest is to be trained on; a file that was only touched is the same."""
    shutil.copytree(tiny.run, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    data = shutil.copy(tiny.archive, tmp_path)
    run = replace(Run.load(tiny.run), folder=tmp_path / "run", data=str(data), seeds=(0, 1))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(run_module, "train_part", lambda run, fold, seed, report: asked.append((fold, seed)))
    train(run, ignore)
    os.utime(data)
    train(run, ignore)
    assert asked == [(0, 1), (0, 1)]
    with np.load(data) as archive:
        arrays = dict(archive)
    np.savez(data, **arrays | {"faces": -arrays["faces"]})
    with pytest.raises(ValueError, match=r"run/fold0-seed0: made with other data; train into another folder"):
        train(run, ignore)
    assert len(asked) == 2


def test_lengths_and_the_order_of_turns_are_data_too(run, tmp_path):
    """Where a step is all zeros only the length tells it from padding, and windows are made of turns in their order."""
    with np.load(run.data) as archive:
        arrays = dict(archive)
    steps, order = arrays["sound_steps"], arrays["turn"]
    row = int(np.flatnonzero(arrays["seen"][:, 1] & (steps == 3))[0])
    arrays["sound"][row, 2] = 0
    shorter = np.where(np.arange(len(steps)) == row, 2, steps)

    def key(name: str, *, window: int, **changed: np.ndarray) -> dict[str, object]:
        np.savez(tmp_path / "changed.npz", **arrays | changed)
        convert(tmp_path / "changed.npz", tmp_path / f"{name}.h5", run.mapping)
        store = replace(run, data=str(tmp_path / f"{name}.h5"), mapping=None, window=window)
        return store.trainer(0, 4, Accelerator(cpu=True), ignore).key

    keys = {
        "whole": key("whole", window=0),
        "shorter": key("shorter", window=0, sound_steps=shorter),
        "windows": key("windows", window=2),
        "reversed": key("reversed", window=2, turn=order.max() - order),
    }
    assert key("again", window=2) == keys["windows"]
    assert len({str(found) for found in keys.values()}) == len(keys)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_values_that_are_no_numbers_are_refused_in_every_part(run, tmp_path, part, value):
    """A store that was not written by us may hold them; the error names the sample before anything is trained."""
    with run.open_store() as store:
        row = int(getattr(run.splits(store)[0], part)[0])
        vision = store.modalities.index("vision")
        while not store.available()[row, vision]:
            row += 1
        path = shutil.copy(store.path, tmp_path / "bad.h5")
    with h5py.File(path, "r+") as file:
        (dataset,) = [d for d in _datasets(file) if d.shape == (96, 3) and d.dtype == np.float32]
        dataset[row, 2] = value
    bad = replace(run, folder=tmp_path / "bad", data=str(path), mapping=None)
    with pytest.raises(ValueError, match=rf"bad\.h5: features\['vision'\]: got NaN or infinity in row id {row},"):
        train(bad, ignore)
    assert not bad.folder.exists()


def test_a_sample_with_nothing_observed_is_refused_before_a_run_begins(run, tmp_path):
    with np.load(run.data) as archive:
        arrays = dict(archive)
    arrays["seen"][5] = False
    np.savez(tmp_path / "empty.npz", **arrays)
    bad = replace(run, folder=tmp_path / "new" / "run", data=str(tmp_path / "empty.npz"))
    with pytest.raises(ValueError, match=r"empty\.npz: available: nothing is observed in row id 5"):
        train(bad, ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.npz"]


def test_nothing_of_the_users_is_touched_where_a_run_cannot_begin(run, tmp_path):
    """A folder that was there stays, and a file in the way of the conversion stops the run."""
    bad = replace(run, folder=tmp_path / "mine", mapping="mmmo")
    bad.folder.mkdir()
    with pytest.raises(ValueError, match="mapping mmmo needs the arrays"):
        train(bad, ignore)
    assert [path.name for path in bad.folder.iterdir()] == [".lock"]
    for content in (b"my own file", None):
        mine = bad.folder / "tiny.h5"
        if content is None:
            mine.unlink()
            convert(run.data, mine, run.mapping)
        else:
            mine.write_bytes(content)
        before = mine.read_bytes()
        with pytest.raises(ValueError, match=r"tiny\.h5: in the way of the conversion of .*tiny\.npz; move it"):
            train(replace(run, folder=bad.folder), ignore)
        assert mine.read_bytes() == before
        assert not (bad.folder / "run.json").exists()


def _datasets(group: h5py.Group) -> list[h5py.Dataset]:
    found: list[h5py.Dataset] = []
    group.visititems(lambda _, node: found.append(node) if isinstance(node, h5py.Dataset) else None)
    return found


@pytest.mark.slow
def test_a_part_that_fails_stops_the_others(run):
    """What waits does not begin, what runs ends with its epoch, and the same command goes on afterwards."""
    run = replace(run, seeds=(4, 5, 6), config=replace(run.config, adn_epochs=60))
    bad = run.part_folder(0, 4) / "stages" / "encoder-text.safetensors"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"encoder-text\.safetensors"):
        train(run, ignore, jobs=2)
    assert not list(run.folder.glob("*/model"))
    assert len(list(run.folder.glob("fold*"))) <= 4
    bad.unlink()
    train(replace(run, seeds=(4, 5, 6)), ignore, jobs=2)
    assert len(list(run.folder.glob("*/model"))) == 6


def test_model_folder_holds_what_the_stages_made(tiny):
    folder = Path(tiny.run) / "fold0-seed0"
    model = ADMC.from_pretrained(folder / "model")
    assert model.config.conditioning == "replace"  # the first one asked for
    assert model.classes == ["calm", "glad", "sad"]
    parts = {f"encoder-{name}": module for name, module in model.unimodal.items()}
    parts |= {f"fusion-replace-{index}": module for index, module in enumerate(model.fusions)}
    parts |= {"adn-replace": model.adn, "enhanced-replace": model.enhanced}
    for stage, module in parts.items():
        assert same(module.state_dict(), read_tensors(folder / "stages" / f"{stage}.safetensors")[0]), stage
    tokens, _ = read_tensors(folder / "stages" / "tokens.safetensors")
    assert torch.equal(model.scaler.mean, tokens["mean"])
    assert torch.equal(model.scaler.std, tokens["std"])
