"""Tests that need a GPU; without one each is skipped with the reason."""

from __future__ import annotations

import pytest
import torch

from modafill.diffusion.schedule import Schedule


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


@pytest.fixture(scope="session")
def table() -> torch.Tensor:
    return Schedule.linear(50, 1e-3, 0.1).table.cuda()
