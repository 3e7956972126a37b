"""Quality against network evaluations and time: what ADMC's samplers cost, and what they are worth."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich import box
from rich.table import Table
from torch import Tensor

from modafill.data import missing_patterns
from modafill.diffusion import SOLVERS, Sampling, solver_steps
from modafill.evaluation.figures import COLOURS
from modafill.evaluation.metrics import crps, nrmse, recognition
from modafill.evaluation.parts import PARTS, complete_rows, shown_patterns, trained
from modafill.files import derive_seed, replacing, write_json
from modafill.models.admc import ADMCConfig
from modafill.processes import check_alone
from modafill.training import Run
from modafill.training.admc import ADMCTrainer

FIGURES = {"UA": "macro recall, %", "NLL": "NLL, nats", "NRMSE": "NRMSE", "CRPS": "CRPS"}


@dataclass(frozen=True)
class Point:
    """One sampler on one fold and seed; figures are means over the incomplete patterns.

    Attributes:
        sampler: conditioning, and solver where there is one.
        evaluations: of the network, for a completion: what was asked for, or fewer where steps coincide or a solver of
            two evaluations a step leaves one over.
        ms: milliseconds for each completion, in batches of the whole part.
        UA, NLL: of a classifier that saw complete data alone, its probabilities averaged over K completions.
        NRMSE: of the mean of K completions.
        CRPS: of the K completions.
    """

    sampler: str
    evaluations: int
    fold: int
    seed: int
    ms: float
    UA: float
    NLL: float
    NRMSE: float
    CRPS: float


def draw_curve(
    folder: Path,
    *,
    steps: Sequence[int],
    solvers: Sequence[str] = SOLVERS,
    n_samples: int = 16,
    part: str = "test",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """Measure every sampler on every fold and seed of a run, and write ``curve.{json,csv,png}`` into its folder.

    Args:
        folder: of a finished ADMC run.
        steps: network evaluations; of ``"replace"`` the steps that it starts at.
        solvers: of ``"clean"``.
        n_samples: K.
        part: ``"test"``, or ``"valid"`` to choose by.
        dtype: of the weights in products (:class:`modafill.diffusion.Sampling`).
        progress: called with the measurements done and their number.

    Raises:
        ValueError: no finished ADMC run, nothing to measure, or torchrun began several processes.
    """
    check_alone()
    if part not in PARTS:
        raise ValueError(f"part: got {part!r}, expected {' or '.join(PARTS)}")
    if not steps or not solvers:
        raise ValueError(f"steps, solvers: got {list(steps)} and {list(solvers)}, expected at least one of each")
    if n_samples < 2:
        raise ValueError(f"samples: got {n_samples}, expected at least 2: one has no spread")
    run = Run.load(folder)
    if run.model != "admc":
        raise ValueError(f"{folder}: holds {run.model}, expected admc")
    if set(run.finished) != set(run.parts):
        raise ValueError(f"{folder}: not trained to its end; run the same `modafill train` again")
    schedule, config = run.config.schedule(), cast(ADMCConfig, run.config)
    settings: list[tuple[str, str, Sampling]] = []
    last = schedule.last_step(config.min_alpha_bar)
    for conditioning in run.variants:
        kinds = [None] if conditioning == "replace" else solvers
        for solver in kinds:
            seen: list[list[int]] = []
            for n in steps:
                sampling = Sampling(n, solver, dtype=dtype)
                replace(config, conditioning=conditioning).check_sampling(sampling)
                visited = [n] if solver is None else solver_steps(schedule, last, n, solver)
                # One evaluation of Heun's is two of them with one left over.
                if visited not in seen:
                    name = f"{conditioning} {solver}" if solver else conditioning
                    settings.append((conditioning, name, sampling))
                seen.append(visited)
    points: list[Point] = []
    total = len(settings) * len(run.parts)
    for fold, seed in run.parts:
        trainer = trained(run, fold, seed)
        assert isinstance(trainer, ADMCTrainer)
        for conditioning, sampler, sampling in settings:
            points.append(_measure(trainer, fold, conditioning, sampler, sampling, n_samples, part))
            progress(len(points), total)
    about = {"data": Path(run.data).name, "part": part, "samples": n_samples, "threads": torch.get_num_threads()}
    write_json(folder / "curve.json", {**about, "dtype": str(dtype), "points": [asdict(point) for point in points]})
    with replacing(folder / "curve.csv") as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(Point.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)
    _draw(folder / "curve.png", points)
    return points


@torch.no_grad()
def _measure(
    trainer: ADMCTrainer, fold: int, conditioning: str, sampler: str, sampling: Sampling, n_samples: int, part: str
) -> Point:
    adn, names = trainer.adns[conditioning], list(trainer.specs)
    rows, scale, patterns = (
        complete_rows(trainer, fold, part),
        trainer.config.latent_scale,
        missing_patterns(len(names)),
    )
    tokens, target = trainer.tokens[rows], trainer.target[rows]
    seconds, figures = 0.0, []

    def complete(index: int) -> tuple[Tensor, float]:
        begun = time.perf_counter()
        completed = adn.sample(
            tokens,
            patterns[index].to(trainer.device).expand(len(rows), -1),
            n_samples=n_samples,
            seed=derive_seed(trainer.seed, "evaluate"),
            row_id=rows.to(torch.int64),
            sampling=sampling,
        )
        if completed.is_cuda:
            torch.cuda.synchronize()
        return completed, time.perf_counter() - begun

    shown = shown_patterns(names)
    complete(shown[0])  # Kernels are compiled for the sizes that they meet.
    for index in shown:
        hidden = ~patterns[index]
        completed, took = complete(index)
        seconds += took
        logits = trainer.complete_fusion(completed.flatten(0, 1))
        averaged = logits.softmax(-1).reshape(n_samples, len(rows), -1).mean(0)
        said = recognition(averaged, target)
        figures.append(
            {
                "UA": said["UA"],
                "NLL": said["NLL"],
                "NRMSE": nrmse(completed.mean(0)[:, hidden], tokens[:, hidden], scale),
                "CRPS": crps(completed[:, :, hidden], tokens[:, hidden], scale),
            }
        )
    ms = 1000 * seconds / (len(figures) * n_samples * len(rows))
    means = {name: mean(figure[name] for figure in figures) for name in FIGURES}
    evaluations = sampling.steps or 0
    if sampling.solver is not None:
        visited = solver_steps(adn.schedule, adn.last_step, evaluations, sampling.solver)
        evaluations = 2 * len(visited) - 3 if sampling.solver == "heun" else len(visited) - 1
    return Point(sampler, evaluations, fold, trainer.seed, ms, **means)


def summarise(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Mean and standard deviation over folds and seeds of each sampler at each number of evaluations."""
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.sampler, point.evaluations), []).append(point)
    return [
        {
            "sampler": sampler,
            "evaluations": evaluations,
            **{
                name: (mean(values), stdev(values) if len(values) > 1 else 0.0)
                for name in ("ms", *FIGURES)
                for values in [[getattr(point, name) for point in found]]
            },
        }
        for (sampler, evaluations), found in groups.items()
    ]


def render_curve(points: Sequence[Point]) -> Table:
    """The summary for people: print it with a rich console."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("sampler", "evals", "ms", *FIGURES):
        table.add_column(heading, justify="left" if heading == "sampler" else "right", no_wrap=True)
    for row in summarise(points):
        figures = [
            f"{100 * row[name][0]:.1f} ± {100 * row[name][1]:.1f}"
            if name == "UA"
            else f"{row[name][0]:.3f} ± {row[name][1]:.3f}"
            for name in FIGURES
        ]
        table.add_row(row["sampler"], str(row["evaluations"]), f"{row['ms'][0]:.3g}", *figures)
    return table


def _draw(path: Path, points: Sequence[Point]) -> None:
    """A row of panels for each figure: against evaluations, and against time."""
    summary = summarise(points)
    figure = Figure(figsize=(9, 3 * len(FIGURES)), layout="constrained")
    panels = figure.subplots(len(FIGURES), 2, sharey="row", squeeze=False)
    for i, sampler in enumerate(dict.fromkeys(row["sampler"] for row in summary)):
        rows = sorted((row for row in summary if row["sampler"] == sampler), key=lambda row: row["evaluations"])
        for (name, label), pair in zip(FIGURES.items(), panels, strict=True):
            unit = 100 if name == "UA" else 1
            values = [unit * row[name][0] for row in rows]
            for axis, x in zip(pair, ([r["evaluations"] for r in rows], [r["ms"][0] for r in rows]), strict=True):
                axis.plot(x, values, marker="o", markersize=4, color=COLOURS[i % len(COLOURS)], label=sampler)
            pair[0].set_ylabel(label)
    for pair in panels:
        for axis, label in zip(pair, ("network evaluations", "milliseconds per completion"), strict=True):
            axis.set(xscale="log", xlabel=label)
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
        pair[0].set_xticks(sorted({row["evaluations"] for row in summary}))
        pair[1].xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panels[0, 0].legend(frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=140, format="png")
