"""Mutated inputs: an error that names the file, or a correct result; never a crash, a hang or other values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.fuzz import LAYOUTS

TESTS = Path(__file__).resolve().parents[1]
COUNT = 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mutated(layout: str) -> None:
    """``python -m support.fuzz --count 1000`` in this folder's parent tries more."""
    command = [sys.executable, "-m", "support.fuzz", "--layout", layout, "--count", str(COUNT)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"it crashed: {done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    assert report["wrong"] == [], "\n".join(f"input {number}: {what}" for number, what in report["wrong"][:3])
    assert report["tried"] == COUNT == report["refused"] + report["read"]
    assert report["refused"] > 0
