"""Every form of the networks' ops against the float64 reference, on odd sizes."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

from modafill.benchmarks import networks, runner
from modafill.benchmarks.networks import Differentiable
from modafill.benchmarks.runner import Case, Unavailable

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")

ATTENTION = (networks.prompt_attention, [(3, 2, 7, 8), (9, 1, 13, 4), (2, 3, 1, 12)])
CONVOLUTION = (networks.conv_gelu_conv, [(3, 7, 5, 9, 3), (2, 1, 3, 4, 3), (3, 7, 5, 9, 1), (1, 1, 3, 2, 1)])


def _problem(make: Callable[[Case], Differentiable], mode: str, shape: tuple[int, ...]) -> Differentiable:
    return make(Case(make.__name__, mode, shape, torch.float32, torch.device("cpu"), torch.get_num_threads(), make))


@pytest.mark.parametrize("mode", networks.MODES)
@pytest.mark.parametrize(
    "make, shape", [(make, shape) for make, shapes in (ATTENTION, CONVOLUTION) for shape in shapes]
)
def test_every_form_that_needs_no_compiler_is_right(
    make: Callable[[Case], Differentiable], shape: tuple[int, ...], mode: str
) -> None:
    problem = _problem(make, mode, shape)
    forms = [name for name, form in problem.rivals.items() if not form.compiled]
    expected = {
        "prompt_attention": ["eager", "eager-baddbmm", "sdpa-materialised", "sdpa-folded"],
        "conv_gelu_conv": ["eager", "eager-channels-last", *(["eager-linear"] if shape[-1] == 1 else [])],
    }
    assert forms == expected[make.__name__]
    assert {name: problem.builders[name]().check().correct for name in forms} == dict.fromkeys(forms, True)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    "make, mode, shape, names",
    [
        (networks.prompt_attention, "forward", (3, 2, 7, 8), ["torch.compile", "flex-attention"]),
        (networks.prompt_attention, "both", (3, 2, 7, 8), ["torch.compile"]),
        (networks.conv_gelu_conv, "forward", (3, 7, 5, 9, 3), ["torch.compile"]),
        (networks.conv_gelu_conv, "both", (3, 7, 5, 9, 3), ["torch.compile"]),
    ],
)
def test_every_compiled_form_is_right_and_is_compiled_once(
    make: Callable[[Case], Differentiable], mode: str, shape: tuple[int, ...], names: list[str]
) -> None:
    problem = _problem(make, mode, shape)
    torch.compiler.reset()
    with torch.no_grad():
        made = {name: problem.builders[name]() for name in names}
        with torch.compiler.set_stance("fail_on_recompile"):
            assert {name: made[name].check().correct for name in names} == dict.fromkeys(names, True)


def test_a_folded_bias_gives_each_table_its_gradient() -> None:
    problem = _problem(networks.prompt_attention, "both", (9, 1, 13, 4))
    gradient = problem.builders["sdpa-folded"]().run(0)[3]
    (picked,) = problem.buffers[0].others
    hit = torch.zeros(networks.N_MODES, dtype=torch.bool).index_fill(0, picked, True)
    assert 1 < hit.sum() < networks.N_MODES
    assert torch.equal(gradient.flatten(1).any(1), hit)


@pytest.mark.parametrize(
    "name, mode, length, reason",
    [
        ("sdpa-folded", "forward", 250, r"8 \+ 252 columns, more than the 256 of flash attention"),
        ("flex-attention", "backward", 3, "FlexAttention has no backward on the CPU"),
        ("flex-attention", "both", 3, "FlexAttention has no backward on the CPU"),
    ],
)
def test_a_form_that_cannot_run_says_why(name: str, mode: str, length: int, reason: str) -> None:
    problem = _problem(networks.prompt_attention, mode, (1, 1, length, 8))
    with pytest.raises(Unavailable, match=reason):
        problem.builders[name]()


def test_the_widest_folded_bias_runs() -> None:
    problem = _problem(networks.prompt_attention, "forward", (1, 1, 248, 8))
    assert problem.builders["sdpa-folded"]().check().correct


def test_inputs_want_gradients_where_they_are_timed_alone() -> None:
    for mode in networks.MODES:
        leaves = _problem(networks.prompt_attention, mode, (1, 1, 3, 4)).buffers[0].leaves
        assert {x.requires_grad for x in leaves} == {mode != "forward"}


def test_each_case_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    make = networks.conv_gelu_conv
    for _ in range(2):
        case = Case("conv_gelu_conv", "forward", (1, 2, 4, 4, 1), torch.float32, torch.device("cpu"), 1, make, True)
        runner.run_case(case, seconds=0.0)
    assert len(resets) == 2
