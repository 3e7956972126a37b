"""Whole models in the benchmark: the same answer from every provider, and a wrong one is seen."""

from __future__ import annotations

import pytest
import torch

from modafill import ops
from modafill.benchmarks import cases, systems
from modafill.benchmarks.runner import run_case

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert rows["modafill"]["max_error"] > 0  # it is not the same code
    assert rows["modafill-bfloat16"]["max_error"] > 10 * rows["modafill"]["max_error"]  # nor the same precision
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
        found.append({name: p.grad for name, p in problem.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert float((found[1][name] - expected).norm()) <= 1e-4 * float(expected.norm()), name


def test_the_papers_size_goes_through_a_cpu_in_micro_batches() -> None:
    def big(device: str) -> list[cases.Case]:
        plan = cases.Plan(torch.device(device), [1, 2], False)
        return [case for case in cases.select("cdtp", plan) if case.op == "cdtp-paper"]

    assert {case.threads for case in big("cpu")} == {2}
    assert {case.problem.args for case in big("cpu")} == {("paper", 8)}  # type: ignore[attr-defined]
    assert {case.problem.args for case in big("cuda")} == {("paper", None)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("op", ["prompt_attention", "conv_gelu_conv", "ddim_step"])
def test_a_wrong_op_is_seen(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **options: 1.1 * right(*args, **options))
    rows = {row["provider"]: row for row in run_case(quick("train"), seconds=0.01)}
    assert not rows["modafill"]["correct"]
    assert rows["eager"]["correct"]
    assert rows["eager-per-sample"]["correct"]
