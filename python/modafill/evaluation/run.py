"""A finished run to its tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modafill import __version__
from modafill.data import MissingRate, missing_patterns, pattern_name
from modafill.data.splits import describe_splits
from modafill.evaluation import admc, cdtp
from modafill.evaluation.metrics import figures_of
from modafill.evaluation.parts import AVERAGED, BY_RATE, PARTS, shown_patterns, trained
from modafill.evaluation.tables import FULL, Record, Table, make_tables, save_tables
from modafill.processes import check_alone, worker_pool
from modafill.training import Run
from modafill.training.admc import ADMCTrainer


@dataclass(frozen=True)
class Protocol:
    """What a table measures: of which samples, with what hidden; saved with it and printed on it.

    Which data, label, split, folds and seeds is the run's; the sets that are observed are all of its modalities.

    Attributes:
        n_samples: K samples per row of the diffusion networks; class probabilities are averaged over them.
        start_steps: further starts n of ADMC's ``"replace"``, shown beside the configured one.
        sampling_steps: further numbers of DDIM steps of CDTP, shown beside the configured one.
        part: ``"test"``, or ``"valid"`` to choose settings by; early stopping and the penalties of the linear models
            have seen the latter.
        missing: rates beside the missing patterns, each sample then lacking what is drawn for it.
        missing_seed: of those draws.
    """

    n_samples: int = 16
    start_steps: tuple[int, ...] = ()
    sampling_steps: tuple[int, ...] = ()
    part: str = "test"
    missing: tuple[MissingRate, ...] = ()
    missing_seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part: got {self.part!r}, expected {' or '.join(PARTS)}")
        if self.n_samples < 1:
            raise ValueError(f"samples: got {self.n_samples}, expected at least 1")

    def to_dict(self, run: Run) -> dict[str, Any]:
        """JSON-able, with what the run has decided."""
        with run.open_store() as store:
            splits = run.splits(store)
            labels = run.fit_labels(store, splits[0])
            complete = np.logical_and.reduce(store.available(), 1)
            rows = [getattr(part_of_fold, self.part) for part_of_fold in splits]
            split = describe_splits(store, folds=run.folds, seed=run.split_seed, own_split=run.own_split)
            names, window = list(store.modalities), store.window
        patterns = missing_patterns(len(names))
        return {
            "data": Path(run.data).name,
            "label": labels.name,
            "window": window,
            "split": split,
            "part": self.part,
            "part_samples": sum(map(len, rows)),
            "complete_samples": sum(int(complete[chosen].sum()) for chosen in rows),
            "folds": run.folds,
            "seeds": list(run.seeds),
            "patterns": [*(pattern_name(patterns[i], names) for i in shown_patterns(names)), FULL],
            "missing": [str(rate) for rate in self.missing],
            "missing_seed": self.missing_seed,
            "n_samples": self.n_samples,
            "start_steps": list(self.start_steps),
            "sampling_steps": list(self.sampling_steps),
            "metrics": [*metric_names(run), "NRMSE", "CRPS"],
        }

    def describe(self, run: Run) -> str:
        """:meth:`to_dict` in words, for the tables of ``run``."""
        said = self.to_dict(run)
        windows = f" in windows of {said['window']}" if said["window"] else ""
        rates = f"; missing {'; '.join(said['missing'])} drawn with seed {self.missing_seed}" if self.missing else ""
        return (
            f"{said['data']}, {said['label']!r}{windows}: {self.part} part of {said['split']}, of which "
            f"{said['complete_samples']:,} of {said['part_samples']:,} samples have every modality and are measured; "
            f"{run.folds} fold(s), seed(s) {', '.join(map(str, run.seeds))}; K = {self.n_samples} samples. "
            f"Observed: {', '.join(said['patterns'])}{rates}. Metrics: {', '.join(said['metrics'])}. "
            f"modafill {__version__}, torch {torch.__version__}."
        )


def evaluate_run(
    folder: Path,
    protocol: Protocol | None = None,
    *,
    beside: tuple[Path, ...] = (),
    jobs: int = 1,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Table]:
    """Evaluate every fold and seed of a finished run and write ``results.{json,csv,md}`` into its folder.

    Those of the validation part are called ``results-valid.*``.

    Args:
        folder: of the run.
        beside: folders of evaluated ADMC runs on the same data and parts, whose figures go into CDTP's tables.
        jobs: folds and seeds evaluated at a time; torch's threads are divided among them.
        progress: called with the share of all work that is done, 0…1; of several jobs after each part.

    Raises:
        ValueError: the folder is no run, a part of it is not trained yet, an option is of another model, or a run
            beside it is not evaluated or has other data, folds or seeds; or torchrun began several processes.
    """
    check_alone()
    protocol = protocol or Protocol()
    run = Run.load(folder)
    if protocol.start_steps and run.model != "admc":
        raise ValueError(
            f"start-steps: got {list(protocol.start_steps)}, but {folder} holds {run.model}, expected admc"
        )
    if (protocol.sampling_steps or beside) and run.model != "cdtp":
        raise ValueError(f"sampling-steps, beside: got one, but {folder} holds {run.model}, expected cdtp")
    finished = run.finished
    unfinished = [run.part_folder(*key).name for key in run.parts if key not in finished]
    if unfinished:
        raise ValueError(f"{folder}: {', '.join(unfinished)} not trained yet; run the same `modafill train` again")
    for rate in protocol.missing:
        with run.open_store() as store:
            rate.check(store.modalities)
    stem = "results" if protocol.part == "test" else f"results-{protocol.part}"
    records: list[Record] = []
    others = [record for other in beside for record in _records_beside(run, other, stem, protocol)]
    progress(0.0)
    with worker_pool(jobs) as pool:
        if pool is None:
            for done, part in enumerate(run.parts):

                def in_part(share: float, done: int = done) -> None:
                    progress((done + share) / len(run.parts))

                records += _evaluate_part(run, protocol, part, in_part)
        else:
            for done, found in enumerate(pool.map(partial(_evaluate_part, run, protocol), run.parts), 1):
                records += found
                progress(done / len(run.parts))
    progress(1.0)
    records += others
    tables = make_tables(records)
    save_tables(folder / stem, records, tables, protocol.describe(run), protocol.to_dict(run))
    return tables


def metric_names(run: Run) -> tuple[str, ...]:
    """Names of what is measured of the answers of ``run``."""
    with run.open_store() as store:
        labels = run.fit_labels(store, run.splits(store)[0])
    answers, targets = torch.eye(labels.n_classes), torch.arange(labels.n_classes)
    if labels.regression:
        answers = targets = torch.tensor([-1.0, 1.0])
    return tuple(figures_of(labels)(answers, targets))


def _evaluate_part(
    run: Run,
    protocol: Protocol,
    fold_and_seed: tuple[int, int],
    progress: Callable[[float], None] = lambda share: None,
) -> list[Record]:
    trainer, fold = trained(run, *fold_and_seed), fold_and_seed[0]
    shared: dict[str, Any] = {
        "n_samples": protocol.n_samples,
        "part": protocol.part,
        "missing": protocol.missing,
        "missing_seed": protocol.missing_seed,
        "progress": progress,
    }
    if isinstance(trainer, ADMCTrainer):
        return admc.evaluate_part(trainer, fold, start_steps=protocol.start_steps, **shared)
    return cdtp.evaluate_part(trainer, fold, sampling_steps=protocol.sampling_steps, **shared)


def _records_beside(run: Run, folder: Path, stem: str, protocol: Protocol) -> list[Record]:
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
    theirs = content.get("protocol")
    if theirs is None:
        raise ValueError(f"beside: {file} does not say its protocol; run `modafill evaluate {folder}` again")
    ours = protocol.to_dict(run)
    for name in ("missing", "missing_seed") if protocol.missing else ():
        if theirs[name] != ours[name]:
            raise ValueError(f"beside: {folder} has {name} {theirs[name]!r}, expected {ours[name]!r}")
    by_rate = f", {BY_RATE}"
    wanted = {admc.RECOGNITION: cdtp.RECOGNITION}
    if protocol.missing:
        wanted[admc.RECOGNITION + by_rate] = cdtp.RECOGNITION + by_rate
    found = [Record(**record) for record in content["records"]]
    chosen = [r for r in found if r.question in wanted and "regression" not in r.method]
    read = "" if run.window == other.window else f", {_window_name(other)}"
    drawn = "" if theirs["n_samples"] == protocol.n_samples else f", K = {theirs['n_samples']}"

    def title(method: str) -> str:
        whose = "" if method.startswith("ADMC") else ", a fusion network per pattern"
        return f"{method}{drawn if method.endswith(AVERAGED) else ''}{whose}{read}"

    return [replace(r, question=wanted[r.question], method=title(r.method)) for r in chosen]


def _window_name(run: Run) -> str:
    with run.open_store() as store:
        return f"windows of {store.window}" if store.window else "without windows"
