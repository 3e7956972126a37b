"""Two processes that train together, against one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modafill.data import FeatureStore, convert
from modafill.files import read_tensors

pytestmark = pytest.mark.slow

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_cpu_threads_per_process", "1")
# Dropout is each process's own; without it two processes do what one does, but for the order of sums.
NO_DROPOUT = {
    "tiny": ("encoder_dropout=0.0", "fusion_dropout=0.0"),
    "tiny_cdtp": ("dropout=0.0",),
}


def train(
    arguments: list[str], out: Path, launcher: tuple[str, ...] = (), script: tuple[str, ...] = ("-m", "modafill")
) -> subprocess.CompletedProcess[str]:
    launch = ["-m", *launcher] if launcher else []
    return subprocess.run(
        [sys.executable, *launch, *script, *arguments, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, tuple[str, ...]], tuple[list[str], Path]]:
    """The smallest training of a model with further settings by one process: its arguments, and its run."""

    @cache
    def trained(model: str, changes: tuple[str, ...]) -> tuple[list[str], Path]:
        arguments = list(request.getfixturevalue(model).train_arguments)
        if model == "tiny" or changes:
            # One diffusion network will do.
            arguments = arguments[: arguments.index("--conditioning" if model == "tiny" else "--variant")]
        # 96 samples in batches of 16 but for a last one of a single sample, of which one process has nothing.
        for change in (*NO_DROPOUT[model], *changes):
            arguments += ["--set", change]
        out = tmp_path_factory.mktemp("alone") / "run"
        done = train(arguments, out)
        assert done.returncode == 0, done.stderr
        return arguments, out

    return trained


def losses(run: Path) -> dict[str, list[float]]:
    (folder,) = run.glob("fold*")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    # What went on from a checkpoint has said some twice.
    return {tag: list({e.step: e.value for e in events.Scalars(tag)}.values()) for tag in events.Tags()["scalars"]}


def assert_same_training(one: Path, two: Path) -> None:
    """The same losses, to the documented tolerance, and about the same weights."""
    expected, found = losses(one), losses(two)
    assert expected.keys() == found.keys()
    for tag, values in expected.items():
        torch.testing.assert_close(
            torch.tensor(found[tag]),
            torch.tensor(values),
            rtol=2e-3,
            atol=2e-4,
            msg=lambda said, tag=tag: f"{tag}: {said}",
        )
    (first,), (second,) = (run.glob("fold*/model/model.safetensors") for run in (one, two))
    weights, others = read_tensors(first)[0], read_tensors(second)[0]
    for name, tensor in weights.items():
        if name.endswith("in_proj_bias"):
            # A bias of all keys changes no attention: its gradient is rounding, of which Adam makes whole steps.
            for bias in (tensor, others[name]):
                bias.view(3, -1)[1] = 0
        torch.testing.assert_close(
            others[name], tensor, rtol=2e-2, atol=2e-3, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize(
    ("model", "changes", "launcher"),
    [("tiny", (), TORCHRUN), ("tiny_cdtp", (), ACCELERATE), ("tiny_cdtp", ("training=joint",), TORCHRUN)],
    ids=["admc", "cdtp", "joint"],
)
def test_two_processes_do_what_one_does(
    model: str, changes: tuple[str, ...], launcher: tuple[str, ...], tmp_path: Path, alone: Any
) -> None:
    arguments, one = alone(model, changes)
    done = train(arguments, tmp_path / "two", launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained into") == 1
    assert_same_training(one, tmp_path / "two")


@pytest.mark.parametrize(("first", "then"), [(TORCHRUN, ()), ((), TORCHRUN)], ids=["two, then one", "one, then two"])
def test_another_number_of_processes_goes_on(
    first: tuple[str, ...], then: tuple[str, ...], tmp_path: Path, alone: Any
) -> None:
    """From a checkpoint in the middle of a stage, with what stages before it left."""
    arguments, one = alone("tiny", ())
    stop = str(Path(__file__).with_name("stop.py"))
    done = train(arguments, tmp_path / "run", first, (stop, "adn-clean", "2"))
    assert done.returncode != 0
    (checkpoint,) = tmp_path.rglob("*.resume.safetensors")
    assert read_tensors(checkpoint)[1]["state"]["epoch"] == 1
    done = train(arguments, tmp_path / "run", then)
    assert done.returncode == 0, done.stderr
    assert_same_training(one, tmp_path / "run")


def test_the_first_process_of_a_machine_compiles(tmp_path: Path) -> None:
    """What kernels need on first use is made by one, and found by the others."""
    script = tmp_path / "compile.py"
    script.write_text(
        """
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from modafill.training import Stage, train_stage

folder, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)

def loss(model, batch, epoch):
    if not (folder / "compiled").exists():
        time.sleep(1.0)
        with open(folder / "compiled", "x"):
            pass
    return model(batch).square().mean()

stage = Stage("s", torch.nn.Linear(3, 1), lambda *_: [torch.ones(2, 3)] * 3, loss, 2, 0.1)
train_stage(stage, folder, accelerator, seed=0, report=lambda done: None)
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def test_who_trained_together_can_impute_together(tiny, tmp_path: Path) -> None:
    """One Python process does both, one after the other."""
    script = tmp_path / "both.py"
    script.write_text(
        f"""
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed.distributed_c10d as c10d

from modafill import ModalityImputer
from modafill.bulk import impute_store
from modafill.data import FeatureStore
from modafill.training import Run, train

run = Run.load(Path({str(tiny.run)!r}))
train(run, print)
# The others wait while the first one converts and reads all data.
assert c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout >= timedelta(days=1)
imputer = ModalityImputer.from_pretrained(run.part_folder(*run.parts[0]) / "model", steps=2)
with run.open_store() as store:
    for _ in impute_store(imputer, store, Path({str(tmp_path / "out.h5")!r}), engine="torchrun"):
        pass
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert len(FeatureStore(tmp_path / "out.h5")) == 96


@pytest.mark.parametrize("command", ["train", "impute"])
def test_processes_of_slurm_alone_are_refused(command: str, tiny, tmp_path: Path) -> None:
    """Each would take itself for the only one."""
    store = tmp_path / "in.h5"
    convert(tiny.archive, store, tiny.mapping)
    arguments = {"train": [*tiny.train_arguments, "--out"], "impute": ["impute", tiny.run, store]}[command]
    done = subprocess.run(
        [sys.executable, "-m", "modafill", *map(str, arguments), str(tmp_path / "out.h5")],
        env={**os.environ, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert "SLURM_STEP_NUM_TASKS: got 4 processes that do not know each other, expected torchrun" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5"]


def test_jobs_and_processes_exclude_each_other(tiny, tmp_path: Path) -> None:
    done = train([*tiny.train_arguments, "--jobs", "2"], tmp_path / "run", TORCHRUN)
    assert done.returncode != 0
    assert "expected 1 where several processes train together" in done.stderr
