"""Inputs that the tests of all ops share."""

from __future__ import annotations

import pytest
import torch

from modafill.diffusion.schedule import Schedule


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    return Schedule.linear(50, 1e-3, 0.1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
