"""ADN's whole loop in the benchmark: everybody's is checked, and what it multiplies is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modafill import ops
from modafill.benchmarks import cases, samplers
from modafill.benchmarks.runner import run_case
from modafill.models.admc import ADN

pytestmark = pytest.mark.usefixtures("one_thread")


def quick() -> cases.Case:
    (case,) = cases.select("sampler", cases.Plan(torch.device("cpu"), [1], True))
    return case


def rows_of() -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in run_case(quick(), seconds=0.01)}


def test_every_provider_gives_what_its_loop_in_float64_gives() -> None:
    rows = rows_of()
    ours = ["modafill", "modafill-bfloat16", "modafill-fast"]
    assert list(rows) == [*ours, "eager-paper", "eager-folded", "eager-bfloat16"]
    assert {name for name, row in rows.items() if row["precision"] == "bfloat16"} == {ours[1], "eager-bfloat16"}
    assert all(row["correct"] for row in rows.values())
    for name, row in rows.items():
        assert (row["max_error"] > 1e-5) == (row["precision"] == "bfloat16"), "rounded, or not"
        assert row["network_evaluations"] == (6 if name == "modafill-fast" else 5)


@pytest.mark.parametrize("op", ["token_denoiser", "masked_reverse_step"])
def test_a_wrong_op_is_seen(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, op)

    def wrong(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        return out if out.dtype == torch.float64 else 1.01 * out

    monkeypatch.setattr(ops, op, wrong)
    rows = rows_of()
    assert not rows["modafill"]["correct"]
    assert rows["eager-paper"]["correct"]


def test_a_wrong_rival_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ADN.forward
    monkeypatch.setattr(ADN, "forward", lambda self, x, step, available=None: 1.01 * right(self, x, step, available))
    rows = rows_of()
    assert not rows["eager-paper"]["correct"]
    assert rows["modafill"]["correct"]


def test_what_is_counted_is_what_the_missing_tokens_need() -> None:
    """PyTorch's counter on the same network for all tokens, and the last layer for as many as are missing."""
    problem = samplers.AdnSampler(quick())
    adn, width = problem.networks["replace"], problem.case.shape[2]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for layer in adn.encoder.layers:
            layer.train()(problem.tokens)  # the fused layer is not counted, nor is attention
        adn.project_out(problem.tokens)
    observed = int(problem.available.sum())
    hidden = adn.config.adn_feedforward
    skipped = 2 * observed * (2 * width**2 + 2 * width * hidden + width**2)
    assert problem._flops() == counter.get_total_flops() - skipped
