"""Tests that need a GPU; without one each is skipped. A summary for people ends the run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from modafill.diffusion.schedule import Schedule


# Not a fixture: pytest puts a skip that comes from one down to each test, and prints the reason as often.
def pytest_runtest_setup() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


@pytest.fixture(scope="session")
def table() -> torch.Tensor:
    return Schedule.linear(50, 1e-3, 0.1).table.cuda()


@pytest.fixture
def ratio(record_property: Callable[[str, object], None]) -> Callable[[float], None]:
    """Takes the share of its bound that an error or a peak of memory came to, for the summary."""
    return lambda share: record_property("ratio", share)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per test: how many of its cases passed, and how near the worst came to its bound."""
    if not torch.cuda.is_available():
        return
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    worst: dict[str, float] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if outcome == "passed" and report.when != "call":
                continue
            name = report.nodeid.split("[")[0].split("/")[-1].replace(".py::test_", ": ").replace("_", " ")
            counts[name][outcome] += 1
            for key, share in report.user_properties:
                if key == "ratio":
                    worst[name] = max(worst.get(name, 0.0), share)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    terminalreporter.section(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton}")
    for name, found in sorted(counts.items()):
        share = f", worst at {worst[name]:.0%} of its bound" if name in worst else ""
        terminalreporter.write_line(f"{name}: " + ", ".join(f"{n} {outcome}" for outcome, n in found.items()) + share)
