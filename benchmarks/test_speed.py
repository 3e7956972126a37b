"""``pytest benchmarks``: the CPU cases of the suites step and ops under pytest-benchmark, at one size or two each.

It takes the extra ``bench``. Nothing here asserts a time; ``modafill bench`` is what figures come from, because there
providers take turns.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch

from modafill.benchmarks import cases
from modafill.benchmarks.report import shape_text
from modafill.benchmarks.runner import Case, Unavailable
from modafill.processes import using_threads

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed"
)
SHAPES = {(1024, 3, 256), (32, 8, 50, 32), (32, 50, 256, 256, 1), (32, 50, 256, 256, 3)}


def _pairs() -> list[Any]:
    """Each case with the name of each of its providers, which tiny cases of the same op and mode tell."""
    device = torch.device("cpu")
    found = []
    for make in (cases.step, cases.ops):
        names: dict[tuple[str, str], dict[str, None]] = {}
        for tiny in make(cases.Plan(device, [1], quick=True)):
            names.setdefault((tiny.op, tiny.mode), {}).update(dict.fromkeys(tiny.problem(tiny).builders))
        for case in make(cases.Plan(device, [1], quick=False)):
            shape = "x".join(map(str, case.shape))
            for name in names[case.op, case.mode] if case.shape in SHAPES else ():
                found.append(pytest.param(case, name, id=f"{case.op}-{case.mode}-{shape}-{name}"))
    return found


@pytest.mark.parametrize("case, name", _pairs())
def test_speed(case: Case, name: str, benchmark: Any) -> None:
    benchmark.group = f"{case.op} ({case.mode}), {shape_text(case.shape)}"
    torch.compiler.reset()
    with using_threads(case.threads), torch.no_grad():
        problem = case.problem(case)
        if name not in problem.builders:
            pytest.skip(f"{name} has no form for this shape")
        try:
            contender = problem.builders[name]()
        except Unavailable as reason:
            pytest.skip(str(reason))
        checked = contender.check()
        assert checked.correct, f"off by {checked.max_error}"
        sets = itertools.cycle(range(problem.sets))
        benchmark(lambda: contender.run(next(sets)))
