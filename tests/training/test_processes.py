"""Two processes that train together, against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modafill.data import FeatureStore
from modafill.files import read_tensors

pytestmark = pytest.mark.slow

# Dropout is each process's own; without it two processes do what one does, but for the order of sums.
NO_DROPOUT = {
    "tiny": ("encoder_dropout", "fusion_dropout"),
    "tiny_cdtp": ("dropout",),
}


def train(arguments: list[str], out: Path, processes: int) -> subprocess.CompletedProcess[str]:
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    return subprocess.run(
        [sys.executable, *launch, "-m", "modafill", *arguments, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def losses(run: Path) -> dict[str, list[float]]:
    (folder,) = run.glob("fold*")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("model", ["tiny", "tiny_cdtp"])
def test_two_processes_do_what_one_does(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    arguments = list(request.getfixturevalue(model).train_arguments)
    if model == "tiny":
        # One diffusion network will do.
        arguments = arguments[: arguments.index("--conditioning")]
    # 96 samples in batches of 16 but for a last one of a single sample, of which one process has nothing.
    for name in NO_DROPOUT[model]:
        arguments += ["--set", f"{name}=0.0"]
    for processes in (1, 2):
        done = train(arguments, tmp_path / str(processes), processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("trained into") == 1
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert one.keys() == two.keys()
    for tag, values in one.items():
        torch.testing.assert_close(torch.tensor(two[tag]), torch.tensor(values), rtol=2e-3, atol=2e-4, msg=tag)
    (first,), (second,) = ((tmp_path / name).glob("fold*/model") for name in ("1", "2"))
    weights, others = read_tensors(first / "model.safetensors")[0], read_tensors(second / "model.safetensors")[0]
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=2e-2, atol=2e-3, msg=name)
    # What two processes trained one takes up.
    made = (second / "model.safetensors").stat().st_mtime_ns
    assert train(arguments, tmp_path / "2", 1).returncode == 0
    assert (second / "model.safetensors").stat().st_mtime_ns == made


def test_who_trained_together_can_impute_together(tiny, tmp_path: Path) -> None:
    """One Python process does both, one after the other."""
    script = tmp_path / "both.py"
    script.write_text(
        f"""
from pathlib import Path

from modafill import ModalityImputer
from modafill.bulk import impute_store
from modafill.data import FeatureStore
from modafill.training import Run, train

run = Run.load(Path({str(tiny.run)!r}))
train(run, print)
imputer = ModalityImputer.from_pretrained(run.part_folder(*run.parts[0]) / "model", steps=2)
with run.open_store() as store:
    for _ in impute_store(imputer, store, Path({str(tmp_path / "out.h5")!r}), engine="torchrun"):
        pass
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert len(FeatureStore(tmp_path / "out.h5")) == 96


def test_jobs_and_processes_exclude_each_other(tiny, tmp_path: Path) -> None:
    done = train([*tiny.train_arguments, "--jobs", "2"], tmp_path / "run", 2)
    assert done.returncode != 0
    assert "expected 1 where several processes train together" in done.stderr
