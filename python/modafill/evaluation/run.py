"""A finished run to its tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from modafill import __version__
from modafill.evaluation import admc, cdtp
from modafill.evaluation.metrics import figures_of
from modafill.evaluation.parts import AVERAGED, PARTS, trained
from modafill.evaluation.tables import Record, Table, make_tables, save_tables
from modafill.training import Run
from modafill.training.admc import ADMCTrainer
from modafill.training.run import worker_pool


@dataclass(frozen=True)
class Asked:
    """What to evaluate.

    Attributes:
        n_samples: K samples per row of the diffusion networks; class probabilities are averaged over them.
        start_steps: further starts n of ADMC's ``"replace"``, shown beside the configured one.
        sampling_steps: further numbers of DDIM steps of CDTP, shown beside the configured one.
        part: ``"test"``, or ``"valid"`` to choose settings by; early stopping and the penalties of the linear models
            have seen the latter.
    """

    n_samples: int = 16
    start_steps: tuple[int, ...] = ()
    sampling_steps: tuple[int, ...] = ()
    part: str = "test"

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part: got {self.part!r}, expected {' or '.join(PARTS)}")
        if self.n_samples < 1:
            raise ValueError(f"samples: got {self.n_samples}, expected at least 1")


def evaluate_run(
    folder: Path,
    asked: Asked | None = None,
    *,
    beside: tuple[Path, ...] = (),
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, parts: None,
) -> list[Table]:
    """Evaluate every fold and seed of a finished run and write ``results.{json,csv,md}`` into its folder.

    Those of the validation part are called ``results-valid.*``.

    Args:
        folder: of the run.
        beside: folders of evaluated ADMC runs on the same data and parts, whose figures go into CDTP's tables.
        jobs: folds and seeds evaluated at a time; torch's threads are divided among them.
        progress: called with the parts done and their number.

    Raises:
        ValueError: the folder is no run, a part of it is not trained yet, an option is of another model, or a run
            beside it is not evaluated or has other data, folds or seeds.
    """
    asked = asked or Asked()
    run = Run.load(folder)
    if asked.start_steps and run.model != "admc":
        raise ValueError(f"start-steps: got {list(asked.start_steps)}, but {folder} holds {run.model}, expected admc")
    if (asked.sampling_steps or beside) and run.model != "cdtp":
        raise ValueError(f"sampling-steps, beside: got one, but {folder} holds {run.model}, expected cdtp")
    finished = run.finished
    unfinished = [run.part_folder(*key).name for key in run.parts if key not in finished]
    if unfinished:
        raise ValueError(f"{folder}: {', '.join(unfinished)} not trained yet; run the same `modafill train` again")
    stem = "results" if asked.part == "test" else f"results-{asked.part}"
    records: list[Record] = []
    others = [record for other in beside for record in _records_beside(run, other, stem, asked.n_samples)]
    progress(0, len(run.parts))
    with worker_pool(jobs) as pool:
        results = (map if pool is None else pool.map)(partial(_evaluate_part, run, asked), run.parts)
        for done, found in enumerate(results, 1):
            records += found
            progress(done, len(run.parts))
    records += others
    tables = make_tables(records)
    about = (
        f"{Path(run.data).name}: {run.folds} fold(s) × {len(run.seeds)} seed(s), {asked.part} part, "
        f"K = {asked.n_samples} samples, modafill {__version__}, torch {torch.__version__}."
    )
    save_tables(folder / stem, records, tables, about, asked.n_samples)
    return tables


def metric_names(run: Run) -> tuple[str, ...]:
    """Names of what is measured of the answers of ``run``."""
    with run.open_store() as store:
        labels = run.fit_labels(store, run.splits(store)[0])
    answers, targets = torch.eye(labels.n_classes), torch.arange(labels.n_classes)
    if labels.regression:
        answers = targets = torch.tensor([-1.0, 1.0])
    return tuple(figures_of(labels)(answers, targets))


def _evaluate_part(run: Run, asked: Asked, fold_and_seed: tuple[int, int]) -> list[Record]:
    trainer, fold = trained(run, *fold_and_seed), fold_and_seed[0]
    if isinstance(trainer, ADMCTrainer):
        return admc.evaluate_part(
            trainer, fold, n_samples=asked.n_samples, start_steps=asked.start_steps, part=asked.part
        )
    return cdtp.evaluate_part(
        trainer, fold, n_samples=asked.n_samples, sampling_steps=asked.sampling_steps, part=asked.part
    )


def _records_beside(run: Run, folder: Path, stem: str, n_samples: int) -> list[Record]:
    """ADMC's recognition, and that of its fusion networks on simple fills, in the words of CDTP's tables.

    Where it was made with other windows or another K, the row says so.
    """
    other = Run.load(folder)
    if other.model != "admc":
        raise ValueError(f"beside: {folder} holds a run of {other.model}, expected admc")
    for name in ("data", "mapping", "folds", "seeds", "split_seed", "label", "own_split"):
        if getattr(run, name) != getattr(other, name):
            raise ValueError(f"beside: {folder} has {name} {getattr(other, name)!r}, expected {getattr(run, name)!r}")
    file = folder / f"{stem}.json"
    if not file.is_file():
        raise ValueError(f"beside: {file} is not there; run `modafill evaluate {folder}` first")
    content = json.loads(file.read_text(encoding="utf-8"))
    if "samples" not in content:
        raise ValueError(f"beside: {file} does not say its K; run `modafill evaluate {folder}` again")
    found = [Record(**record) for record in content["records"]]
    chosen = [r for r in found if r.question == admc.RECOGNITION and "regression" not in r.method]
    read = "" if run.window == other.window else f", {_window_name(other)}"
    drawn = "" if content["samples"] == n_samples else f", K = {content['samples']}"

    def title(method: str) -> str:
        whose = "" if method.startswith("ADMC") else ", a fusion network per pattern"
        return f"{method}{drawn if method.endswith(AVERAGED) else ''}{whose}{read}"

    return [replace(r, question=cdtp.RECOGNITION, method=title(r.method)) for r in chosen]


def _window_name(run: Run) -> str:
    with run.open_store() as store:
        return f"windows of {store.window}" if store.window else "without windows"
