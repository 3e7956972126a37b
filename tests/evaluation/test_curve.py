from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modafill.evaluation.curve import draw_curve, render_curve, summarise
from modafill.evaluation.run import Protocol, evaluate_run
from modafill.models.admc import ADMCConfig
from modafill.training import Run


@pytest.fixture(scope="module")
def run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curve") / "run"
    shutil.copytree(tiny.run, folder)
    return folder


def test_the_figures_are_those_of_the_evaluation(run: Path) -> None:
    """Where a sampler is the configured one, the tables have the same figures."""
    config = Run.load(run).config
    assert isinstance(config, ADMCConfig)
    steps = sorted({config.sampling_steps, config.start_step})
    seen: list[tuple[int, int]] = []
    points = draw_curve(
        run, steps=steps, solvers=[config.solver], n_samples=3, progress=lambda *done: seen.append(done)
    )
    evaluate_run(run, Protocol(n_samples=3))
    records = json.loads((run / "results.json").read_text())["records"]
    for conditioning, sampler, evaluations in (
        ("clean", f"clean {config.solver}", config.sampling_steps),
        ("replace", "replace", config.start_step),
    ):
        (point,) = (p for p in points if (p.sampler, p.evaluations) == (sampler, evaluations))
        for name, method in (
            ("UA", f"ADMC {conditioning}, probabilities averaged"),
            ("NLL", f"ADMC {conditioning}, probabilities averaged"),
            ("NRMSE", f"ADMC {conditioning}"),
            ("CRPS", f"ADMC {conditioning}"),
        ):
            values = [
                r["value"]
                for r in records
                if (r["metric"], r["method"]) == (name, method) and not r["question"].endswith("per pattern")
            ]
            assert values
            assert getattr(point, name) == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert point.ms > 0
    assert seen[-1] == (len(points), len(points))
    written = json.loads((run / "curve.json").read_text())
    assert [p["sampler"] for p in written["points"]] == [p.sampler for p in points]
    with open(run / "curve.csv", newline="") as file:
        assert [float(row["CRPS"]) for row in csv.DictReader(file)] == [p.CRPS for p in points]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_each_solver_and_number_of_steps_is_a_row(run: Path) -> None:
    # Heun's one evaluation is its two with one left over, and is measured once.
    points = [p for p in draw_curve(run, steps=[1, 2, 3], n_samples=2) if p.evaluations != 2]
    samplers = ["replace", "clean ddim", "clean dpm++", "clean heun"]
    assert [(row["sampler"], row["evaluations"]) for row in summarise(points)] == [
        (sampler, n) for sampler in samplers for n in (1, 3)
    ]
    assert render_curve(points).row_count == 8
    at_one = {p.sampler: p.CRPS for p in points if p.evaluations == 1}
    assert at_one["clean ddim"] == at_one["clean dpm++"] == at_one["clean heun"] != at_one["replace"]
    at_three = {p.sampler: p.CRPS for p in points if p.evaluations == 3}
    assert len(set(at_three.values())) == 4
    spread = [replace(points[0], seed=seed, UA=0.25 * seed) for seed in (1, 2, 3)]
    assert summarise(spread)[0]["UA"] == (0.5, 0.25)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": []}, "steps, solvers: got"),
        ({"steps": [2], "solvers": []}, "steps, solvers: got"),
        ({"steps": [2], "solvers": ["euler"]}, "solver: got 'euler', expected one of ddim"),
        ({"steps": [0]}, "steps: got 0, expected a"),
        ({"steps": [61]}, "got 61, expected"),
        ({"steps": [2], "n_samples": 1}, "samples: got 1, expected at least 2"),
        ({"steps": [2], "part": "train"}, "part: got 'train', expected test or valid"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, run: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    with pytest.raises(ValueError, match=message):
        draw_curve(run, **options)
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_only_of_a_finished_admc(tiny_cdtp: Any, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds cdtp, expected admc"):
        draw_curve(tiny_cdtp.run, steps=[2])
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "fold0-seed0" / "model")
    with pytest.raises(ValueError, match="not trained to its end"):
        draw_curve(tmp_path / "run", steps=[2])
