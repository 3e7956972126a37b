"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# A shared machine stalls now and then, and a failure has to be found again by whoever reads of it.
hypothesis.settings.register_profile("modafill", deadline=None, print_blob=True)
hypothesis.settings.load_profile("modafill")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """At least two threads, so that code that is parallel runs in parallel, and no more, so that tests can share."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: ``MODAFILL_DATA``, else ``shared/data`` beside the checkout."""
    path = Path(os.environ.get("MODAFILL_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no data in {path}; set MODAFILL_DATA to the folder that has it")
    return path
