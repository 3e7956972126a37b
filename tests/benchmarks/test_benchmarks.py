"""The benchmark's own rules: gate before speed, turns in rotation, honest files. Nothing here asserts a time."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from modafill import benchmarks, ops
from modafill.benchmarks import cases, networks, report, rivals, runner
from modafill.benchmarks.runner import Case, Check, Contender, Unavailable

ROW = {
    "op": str,
    "mode": str,
    "shape": list,
    "batch": int,
    "dtype": str,
    "device": str,
    "threads": int,
    "provider": str,
    "p20_ms": float,
    "p50_ms": float,
    "p80_ms": float,
    "samples": int,
    "gb_per_s": float,
    "gflop_per_s": type(None),
    "roofline_fraction": float,
    "peak_memory_bytes": type(None),
    "correct": bool,
    "max_error": float,
}
MACHINE = {
    *(
        "cpu",
        "cores",
        "instruction_set",
        "instruction_set_of_torch",
        "last_level_cache_bytes",
        "gpu",
        "driver",
        "system",
    ),
    *("python", "torch", "triton", "diffusers", "modafill", "dispatch", "commit", "date", "left_out"),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    path = tmp_path_factory.mktemp("bench") / "new" / "step.json"
    return benchmarks.run("step", json_path=path, threads=[1], quick=True, progress=False), path


def test_every_provider_of_the_ops_suite_passes_its_gate() -> None:
    pytest.importorskip("diffusers")
    rows = benchmarks.run("ops", threads=[1], quick=True, progress=False)["rows"]
    assert [row for row in rows if not row["correct"]] == []
    expected = {("ddim_step", mode, "modafill eager-folded triad copy") for mode in ("fresh", "out")}
    expected |= {("ddim_step", "fresh", "eager-paper diffusers-ddim")}
    for mode in ("forward", "backward", "both"):
        expected |= {("prompt_attention", mode, "modafill eager eager-baddbmm sdpa-materialised sdpa-folded")}
        expected |= {("conv_gelu_conv", mode, "modafill eager eager-channels-last eager-linear")}
    assert {(row["op"], row["mode"], row["provider"]) for row in rows} == {
        (op, mode, provider) for op, mode, providers in expected for provider in providers.split()
    }


@pytest.mark.parametrize("mode", networks.MODES)
@pytest.mark.parametrize("wrong", ["out", "gradient"])
def test_a_network_that_is_wrong_fails_its_gate(mode: str, wrong: str) -> None:
    def network(q: Any, k: Any, v: Any, bias: Any, mode: Any) -> Any:
        out = ops.prompt_attention(q, k, v, bias, mode)
        return out * 1.001 if wrong == "out" else out + 0.01 * (q - q.detach())

    case = Case(
        "prompt_attention", mode, (3, 2, 5, 8), torch.float32, torch.device("cpu"), 1, networks.prompt_attention
    )
    problem = networks.prompt_attention(case)
    assert problem._contender("right", problem.eager).check().correct
    assert problem._contender("wrong", network).check().correct == (mode == "forward" and wrong == "gradient")


def _case(mode: str = "fresh", shape: tuple[int, ...] = (40, 3, 64), problem: Any = rivals.MaskedReverseStep) -> Case:
    return Case("masked_reverse_step", mode, shape, torch.float32, torch.device("cpu"), 1, problem, quick=True)


def test_every_row_has_the_fields_of_a_bench_file(quick: tuple[dict[str, Any], Path]) -> None:
    result, _ = quick
    assert set(result) == {"machine", "rows"}
    assert set(result["machine"]) == MACHINE
    for row in result["rows"]:
        assert {key: type(value) for key, value in row.items()} == ROW
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["batch"] == row["shape"][0]


def test_every_provider_of_the_step_suite_passes_its_gate(quick: tuple[dict[str, Any], Path]) -> None:
    pytest.importorskip("diffusers")
    rows = quick[0]["rows"]
    assert [row for row in rows if not row["correct"]] == []
    assert {(row["op"], row["mode"], row["provider"]) for row in rows} == {
        (op, mode, provider)
        for op, mode, providers in (
            ("masked_reverse_step", "fresh", "modafill eager-paper eager-folded diffusers-repaint triad copy"),
            ("masked_reverse_step", "out", "modafill eager-folded triad copy"),
            ("add_noise", "fresh", "modafill eager-paper eager-folded diffusers-ddpm triad copy"),
            ("randn", "fresh", "modafill torch.randn triad copy"),
            ("randn", "out", "modafill torch.randn torch.normal_ triad copy"),
        )
        for provider in providers.split()
    }


def test_a_folder_in_the_place_of_the_file_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match="a folder, expected a file"):
        benchmarks.run("step", json_path=tmp_path, threads=[0])


def test_the_file_holds_the_result_and_nothing_else_is_left(quick: tuple[dict[str, Any], Path]) -> None:
    result, path = quick
    assert json.loads(path.read_text()) == result
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_json({"rows": []}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_suite_is_refused_with_the_names_of_the_known() -> None:
    with pytest.raises(ValueError, match=r"suite: got 'stpe', expected one of step,.* all"):
        benchmarks.run("stpe", threads=[1], progress=False)


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99"])
def test_a_device_that_cannot_be_timed_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="device: got"):
        benchmarks.run("step", device=device, progress=False)


def test_thread_counts_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="threads: got"):
        benchmarks.run("step", threads=[0], progress=False)


def test_all_cores_are_those_that_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[cases.Plan] = []
    monkeypatch.setattr(cases, "select", lambda suite, plan: plans.append(plan) or [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    benchmarks.run("step", progress=False)
    assert [plan.threads for plan in plans] == [[1, 3]]


def test_the_thread_count_is_set_for_the_case_and_restored() -> None:
    before, seen = torch.get_num_threads(), []

    class Problem:
        sets = 1

        @property
        def builders(self) -> dict[str, Callable[[], Contender]]:
            return {"only": lambda: Contender(lambda _: seen.append(torch.get_num_threads()), _right, 1)}

    case = dataclasses.replace(_case(problem=lambda _: Problem()), threads=before + 1)
    runner.run_case(case, seconds=0.0)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def _right() -> Check:
    return Check(True, 0.0)


# Each is a slip that a kernel of this op could make; the gate has to see all of them.
SLIPS: dict[str, Callable[[rivals.MaskedReverseStep, rivals.StepSet, torch.Tensor], torch.Tensor]] = {
    "mean off by a thousandth": lambda p, b, z: _step(p, b, z, x_weight=p.folded[0] * 1.001),
    "variance of the forward step": lambda p, b, z: _step(p, b, z, std=p.schedule.betas[p.step].sqrt().item()),
    "observation kept clean": lambda p, b, z: torch.where(b.available[..., None], b.observed, _step(p, b, z)),
    "mask inverted": lambda p, b, z: _step(p, b, z, inverted=True),
    "last element unwritten": lambda p, b, z: _step(p, b, z).index_fill(2, torch.tensor([63]), math.nan),
}


def _step(
    p: rivals.MaskedReverseStep,
    b: rivals.StepSet,
    z: torch.Tensor,
    *,
    x_weight: float | None = None,
    std: float | None = None,
    inverted: bool = False,
) -> torch.Tensor:
    own_x_weight, eps_weight, own_std, signal, sigma = p.folded
    generated = (x_weight or own_x_weight) * b.x + eps_weight * b.eps + (std or own_std) * z
    return torch.where(b.available[..., None] ^ inverted, signal * b.observed + sigma * z, generated)


def _with_slip(problem: rivals.MaskedReverseStep, slip: Callable[..., torch.Tensor]) -> Contender:
    def run(i: int) -> torch.Tensor:
        b = problem.buffers[i]
        return slip(problem, b, torch.randn_like(b.x))

    return problem._contender(run, lambda: problem._seeded(run, draws=1))


def test_the_formula_that_the_slips_start_from_is_right() -> None:
    assert _with_slip(rivals.MaskedReverseStep(_case()), _step).check().correct


@pytest.mark.parametrize("name", SLIPS)
def test_the_gate_rejects(name: str) -> None:
    assert not _with_slip(rivals.MaskedReverseStep(_case()), SLIPS[name]).check().correct


def test_the_gate_rejects_who_writes_into_an_input() -> None:
    problem = rivals.MaskedReverseStep(_case())

    def run(i: int) -> torch.Tensor:
        b = problem.buffers[i]
        result = _step(problem, b, torch.randn_like(b.x))
        b.x.masked_fill_(b.available[..., None], 0.0)
        return result

    assert not problem._contender(run, lambda: problem._seeded(run, draws=1)).check().correct


@pytest.mark.parametrize("name", ["observation kept clean", "mask inverted", "last element unwritten"])
def test_implied_noise_gives_a_slip_away(name: str) -> None:
    problem = rivals.MaskedReverseStep(_case(shape=(256, 3, 64)))
    b = problem.buffers[0]
    torch.manual_seed(0)
    assert problem._implied_noise(lambda _: _step(problem, b, torch.randn_like(b.x))).correct
    assert not problem._implied_noise(lambda _: SLIPS[name](problem, b, torch.randn_like(b.x))).correct


def test_implied_noise_gives_away_the_same_noise_drawn_twice() -> None:
    problem = rivals.MaskedReverseStep(_case())
    b = problem.buffers[0]
    noise = torch.randn_like(b.x)
    assert not problem._implied_noise(lambda _: _step(problem, b, noise)).correct


def test_a_wrong_provider_gets_a_row_but_no_speed_up() -> None:
    class Problem(rivals.MaskedReverseStep):
        @property
        def builders(self) -> rivals.Builders:
            known = super().builders
            wrong = lambda: _with_slip(self, SLIPS["mask inverted"])  # noqa: E731
            return {"modafill": known["modafill"], "modafill-wrong": wrong, "eager-paper": known["eager-paper"]}

    rows = {row["provider"]: row for row in runner.run_case(_case(problem=Problem), seconds=0.0)}
    assert {name: row["correct"] for name, row in rows.items()} == {
        "modafill": True,
        "modafill-wrong": False,
        "eager-paper": True,
    }
    assert report.speed_up(rows["modafill"], rows["eager-paper"]) is not None
    assert report.speed_up(rows["modafill-wrong"], rows["eager-paper"]) is None
    assert report.speed_up(rows["modafill"], rows["modafill-wrong"]) is None
    printed = io.StringIO()
    machine = {"cpu": "cpu", "gpu": None, "instruction_set": "", "torch": torch.__version__}
    report.print_report({"machine": machine, "rows": list(rows.values())}, Console(file=printed, width=120))
    lines = {line.split()[0]: line.split() for line in printed.getvalue().splitlines() if line.strip()}
    # The provider, WRONG, three times and the bandwidth; of the others also both ratios.
    assert lines["modafill-wrong"][1] == "WRONG"
    assert len(lines["modafill-wrong"]) == 5
    assert len(lines["modafill"]) == 6


def test_the_widest_table_fits_into_80_columns(quick: tuple[dict[str, Any], Path]) -> None:
    result = copy.deepcopy(quick[0])
    for row in result["rows"]:
        row |= {"p20_ms": 0.012, "p50_ms": 0.034, "p80_ms": 0.056, "gb_per_s": 234.5}
        row["correct"] = row["provider"] != "diffusers-repaint"
    printed = io.StringIO()
    report.print_report(result, Console(file=printed, width=80))
    assert "…" not in printed.getvalue()


def test_a_table_without_the_papers_formula_has_no_column_for_it(quick: tuple[dict[str, Any], Path]) -> None:
    printed = io.StringIO()
    report.print_report(quick[0], Console(file=printed, width=120))
    tables = re.split(r"^(\w+ \(\w+\)), ", printed.getvalue(), flags=re.MULTILINE)[1:]
    shown = {title: "× paper" in table for title, table in zip(tables[::2], tables[1::2], strict=True)}
    assert {title for title, paper in shown.items() if paper} == {"masked_reverse_step (fresh)", "add_noise (fresh)"}
    assert len(shown) == 5


def test_a_provider_that_cannot_run_is_left_out_with_its_reason() -> None:
    def missing() -> Contender:
        raise Unavailable("it is not installed")

    class Problem:
        sets = 1
        builders = {"present": lambda: Contender(lambda _: None, _right, 1), "absent": missing}  # noqa: RUF012

    told: list[str] = []
    rows = runner.run_case(_case(problem=lambda _: Problem()), seconds=0.0, notice=told.append)
    assert [row["provider"] for row in rows] == ["present"]
    assert told == ["absent left out of masked_reverse_step: it is not installed"]


def test_contenders_take_turns_and_each_round_starts_with_the_next() -> None:
    turns: list[str] = []

    def timer(run: Callable[[int], Any], calls: int, warm_up: bool = True) -> list[int]:
        assert warm_up
        run(0)
        return [10**9] * calls

    samples = runner.measure({name: lambda _, n=name: turns.append(n) for name in "abc"}, timer, seconds=0.0)
    # The first three turns find out how long a call takes.
    assert turns[3:] == list("abcbcacababcbca")
    assert {name: len(times) for name, times in samples.items()} == {"a": 5, "b": 5, "c": 5}


def test_calls_of_many_seconds_are_timed_twice_and_warmed_up_once() -> None:
    turns: list[tuple[str, bool]] = []
    took = {"a": 10**10, "b": 10**9, "c": 10**10}

    def timer(run: Callable[[int], Any], calls: int, warm_up: bool = True) -> list[int]:
        turns.append((run(0), warm_up))
        return [took[turns[-1][0]] + len(turns)] * calls

    samples = runner.measure({name: lambda _, n=name: n for name in "abc"}, timer, seconds=1e-9)
    assert samples["a"] == [10**10 + 1, 10**10 + 4]
    assert samples["c"] == [10**10 + 3, 10**10 + 6]
    assert len(samples["b"]) == 5
    assert [turn for turn in turns if turn[0] == "a"] == [("a", True), ("a", False)]
    assert [turn for turn in turns if turn[0] == "b"] == [("b", True)] * 6


def test_first_calls_that_were_made_are_not_made_again() -> None:
    turns: list[tuple[str, bool]] = []

    def timer(run: Callable[[int], Any], calls: int, warm_up: bool = True) -> list[int]:
        turns.append((run(0), warm_up))
        return [len(turns)] * calls

    trials = {"minute": 7 * 10**10, "seconds": 6 * 10**9, "short": 10**9}
    samples = runner.measure({name: lambda _, n=name: n for name in trials}, timer, seconds=1e-9, trials=trials)
    assert samples["minute"] == [7 * 10**10]
    assert [turn for turn in turns if turn[0] != "short"] == [("seconds", False)] * 2
    assert len(samples["seconds"]) == 2
    assert [turn for turn in turns if turn[0] == "short"] == [("short", True)] * 5


def test_calls_of_all_contenders_share_the_rotation_of_buffer_sets() -> None:
    seen: list[int] = []
    timer = runner._CpuTimer(4)
    timer(seen.append, 3)
    timer(seen.append, 1)
    timer(seen.append, 1, warm_up=False)
    assert seen == [1, 2, 3, 0, 1, 2, 3]


def test_minimal_traffic_reads_each_element_where_it_is_needed_alone() -> None:
    problem = rivals.MaskedReverseStep(_case(shape=(16, 3, 8)))
    present = int(problem.buffers[0].available.sum())
    assert 0 < present < 48
    assert problem.traffic == 4 * 8 * (present * 2 + (48 - present) * 3) + 48


def test_buffer_sets_together_exceed_the_last_level_cache() -> None:
    problem = rivals.MaskedReverseStep(_case(shape=(64, 3, 256)))
    per_set = 3 * problem.buffers[0].x.nbytes
    assert problem.sets == rivals._MAX_SETS or problem.sets * per_set >= 2 * rivals.last_level_cache()


def test_a_suite_has_every_number_of_threads() -> None:
    plan = cases.Plan(torch.device("cpu"), [1, 2], quick=True)
    assert {case.threads for case in cases.select("step", plan)} == {1, 2}
