"""Whole models in the benchmark: the same answer from every provider, and a wrong one is seen."""

from __future__ import annotations

import pytest
import torch

from modafill import ops
from modafill.benchmarks import cases, systems
from modafill.benchmarks.runner import run_case


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quick(mode: str) -> cases.Case:
    plan = cases.Plan(torch.device("cpu"), [1], True)
    (case,) = (case for case in cases.select("cdtp", plan) if case.mode == mode)
    return case


@pytest.mark.parametrize("mode", ["train", "impute"])
def test_every_provider_gives_the_same(mode: str) -> None:
    before = ops.prompt_attention, ops.conv_gelu_conv, ops.ddim_step
    rows = {row["provider"]: row for row in run_case(quick(mode), seconds=0.01)}
    assert list(rows) == ["modafill", "modafill-bfloat16", "eager", "eager-per-sample"]
    assert all(row["correct"] for row in rows.values())
    assert rows["eager"]["max_error"] > 0  # it is not the same code
    assert rows["modafill-bfloat16"]["max_error"] > 10 * rows["eager"]["max_error"]  # nor the same precision
    assert [row["samples_at_a_time"] for row in rows.values()] == [2, 2, 2, 1]
    # Two samples of different patterns; in a batch, targets of one length share their evaluations.
    assert rows["modafill"]["network_evaluations"] == rows["eager"]["network_evaluations"]
    assert rows["eager-per-sample"]["network_evaluations"] >= rows["eager"]["network_evaluations"]
    assert all(row["peak_memory_bytes"] >= 0 for row in rows.values())
    assert before == (ops.prompt_attention, ops.conv_gelu_conv, ops.ddim_step)


def test_the_gradients_of_micro_batches_add_up_to_those_of_the_batch() -> None:
    case = quick("train")
    found = []
    for micro_batch in (None, 1):
        problem = systems.Cdtp("small", micro_batch, case)
        problem.builders["modafill"]().check()
        found.append(problem._expected)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5 * float(found[0].abs().max()))


def test_the_papers_size_goes_through_a_cpu_in_micro_batches() -> None:
    def big(device: str) -> list[cases.Case]:
        plan = cases.Plan(torch.device(device), [1, 2], False)
        return [case for case in cases.select("cdtp", plan) if case.op == "cdtp-paper"]

    assert {case.threads for case in big("cpu")} == {2}
    assert {case.problem.args for case in big("cpu")} == {("paper", 8)}  # type: ignore[attr-defined]
    assert {case.problem.args for case in big("cuda")} == {("paper", None)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("op", ["_attention", "_conv_gelu_conv", "_ddim_step"])
def test_a_wrong_op_is_seen(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(systems, op)
    monkeypatch.setattr(systems, op, lambda *args, **options: 1.1 * right(*args, **options))
    rows = {row["provider"]: row for row in run_case(quick("train"), seconds=0.01)}
    assert rows["modafill"]["correct"]
    assert not rows["eager"]["correct"]
