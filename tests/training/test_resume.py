"""A run that was killed ends with the bits of one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modafill.files import read_tensors


def assert_same_bits(part: Path, expected: Path, files: int) -> None:
    names = sorted(p.relative_to(expected) for p in expected.rglob("[!.]*.safetensors"))
    assert len(names) == files
    assert sorted(p.relative_to(part) for p in part.rglob("[!.]*.safetensors")) == names
    for name in names:
        (got, about), (want, about_want) = read_tensors(part / name), read_tensors(expected / name)
        assert about == about_want
        assert got.keys() == want.keys()
        for tensor in want:
            assert torch.equal(got[tensor], want[tensor]), (name, tensor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "files", "kills"),
    [
        ("tiny", 40, 10),  # 3 encoders, tokens, 2 ADNs, 1 + 5 × 6 + 2 fusion networks, the model
        ("tiny_cdtp", 6, 2),  # backbone, denoisers, 3 variants, the model
    ],
)
def test_killed_run(model, files, kills, tmp_path, request):
    tiny = request.getfixturevalue(model)
    # Stages write three or four files, so that the kills fall before, between and after checkpoints and results.
    command = [sys.executable, str(Path(__file__).with_name("kill.py")), "5", *tiny.train_arguments]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > kills
    assert_same_bits(tmp_path / "run" / "fold0-seed0", tiny.run / "fold0-seed0", files)


def test_scalars_are_logged(tiny):
    events = EventAccumulator(str(tiny.run / "fold0-seed0" / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    for stage in ("encoder-text", "adn-replace", "adn-clean", "fusion-clean-0", "enhanced-clean"):
        assert {f"{stage}/loss", f"{stage}/learning_rate"} <= set(tags)
    assert "encoder-text/validation_loss" in tags
    losses = events.Scalars("adn-clean/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert all(0 < event.value < 100 for event in losses)
