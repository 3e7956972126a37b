"""Training steps in the benchmark: everybody's gradients are checked, and every step is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modafill import ops
from modafill.benchmarks import cases, rivals, training
from modafill.benchmarks.runner import run_case

pytestmark = pytest.mark.usefixtures("one_thread")
PROVIDERS = {
    "adn": ["modafill", "modafill-bfloat16", "eager-paper", "eager-bfloat16"],
    "unet": ["modafill", "modafill-bfloat16", "eager", "eager-bfloat16"],
}


def quick(op: str) -> cases.Case:
    (case,) = (c for c in cases.select("train", cases.Plan(torch.device("cpu"), [1], True)) if c.op == op)
    return case


def rows_of(op: str) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in run_case(quick(op), seconds=0.01)}


@pytest.mark.parametrize("op", PROVIDERS)
def test_every_provider_has_the_gradients_of_the_reference(op: str) -> None:
    rows = rows_of(op)
    assert list(rows) == PROVIDERS[op]
    assert all(row["correct"] for row in rows.values())
    assert all(row["precision"] == ("bfloat16" if "bfloat16" in name else "float32") for name, row in rows.items())
    assert rows["modafill"]["largest_relative_error"] < 1e-4 < rows["modafill-bfloat16"]["largest_relative_error"]


@pytest.mark.parametrize("op", PROVIDERS)
def test_a_gradient_that_is_not_a_number_is_seen(op: str) -> None:
    """Of whichever parameter."""
    problem: Any = quick(op).problem(quick(op))
    names = list(problem.expected)
    for name in (names[0], names[len(names) // 2], names[-1]):
        contender = problem.builders["modafill"]()
        right = problem.expected[name].clone()
        problem.expected[name][...] = torch.nan
        assert not contender.check().correct
        problem.expected[name].copy_(right)
        assert contender.check().correct


def test_what_bfloat16_may_be_wrong_by() -> None:
    """Twice what eager is, for each parameter by itself; nothing that is missing, too much, or not a number."""
    expected = {"a": torch.ones(4), "b": torch.full((4,), 2.0)}
    eager = {"a": 0.1, "b": 0.001}

    def correct(found: dict[str, torch.Tensor], precision: str = "bfloat16") -> bool:
        return rivals.check_each(found, expected, precision, eager)[0].correct

    b = expected["b"]
    assert correct({"a": torch.full((4,), 1.19), "b": b * 1.019})
    assert not correct({"a": torch.full((4,), 1.21), "b": b})
    assert not correct({"a": torch.ones(4), "b": b * 1.021})
    assert not correct({"a": torch.full((4,), torch.nan), "b": b})
    assert not correct({"a": torch.ones(4)})
    eager = {"a": 0.8, "b": torch.inf}
    assert correct({"a": torch.full((4,), 1.49), "b": b})
    assert not correct({"a": torch.zeros(4), "b": b})
    assert not correct({"a": torch.ones(4)})
    assert not correct({**expected, "c": torch.ones(4)})
    assert correct({"a": torch.full((4,), 1.0009), "b": b}, "float32")
    assert not correct({"a": torch.full((4,), 1.0011), "b": b}, "float32")


@pytest.mark.parametrize("op, wrong", [("adn", "add_noise"), ("unet", "conv_gelu_conv")])
def test_a_wrong_op_is_seen(op: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, wrong)

    def off(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        out = right(x, *args, **options)
        if x.dtype == torch.float64:
            return out
        return (1.02 * out[0], out[1]) if isinstance(out, tuple) else 1.02 * out

    monkeypatch.setattr(ops, wrong, off)
    assert not rows_of(op)["modafill"]["correct"]


def test_a_wrong_rival_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = training.F.mse_loss
    monkeypatch.setattr(training.F, "mse_loss", lambda a, b: right(a, b) * (1.0 if a.dtype == torch.float64 else 1.02))
    rows = rows_of("adn")
    assert not rows["eager-paper"]["correct"]


@pytest.mark.parametrize("op", PROVIDERS)
def test_a_call_is_one_update(op: str) -> None:
    problem: Any = quick(op).problem(quick(op))
    for build in [problem.builders[name] for name in PROVIDERS[op]]:
        seen: list[nn.Parameter] = []
        adam = torch.optim.Adam.step

        def step(self: Any, *args: Any, seen: list[nn.Parameter] = seen, adam: Any = adam) -> Any:
            parameters = self.param_groups[0]["params"]
            before = [p.clone() for p in parameters]
            adam(self, *args)
            seen += [p for p, old in zip(parameters, before, strict=True) if not torch.equal(p, old)]

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(torch.optim.Adam, "step", step)
            build().run(0)
        assert len(seen) == len(list(problem.network.parameters()))


def test_what_is_counted_is_what_the_products_need() -> None:
    """PyTorch's counter, which leaves attention out, as the count does."""
    problem = training.AdnTraining(quick("adn"))
    adn: Any = problem.network
    with FlopCounterMode(display=False) as counter:
        h = problem.tokens.requires_grad_()
        for layer in adn.encoder.layers:
            h = layer(h)
        adn.project_out(h).sum().backward()
    assert problem.flops == counter.get_total_flops()
