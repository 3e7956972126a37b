"""ADMC against simple rivals on the test part of a fold: four questions, one record per figure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from threadpoolctl import threadpool_limits
from torch import Tensor

from modafill import __version__
from modafill.data import FeatureStore, Standardizer, all_patterns, missing_patterns, pattern_name, valid_steps
from modafill.evaluation.figures import embedding_figure
from modafill.evaluation.metrics import crps, nrmse, recognition
from modafill.evaluation.tables import FULL, Record, Table, make_tables, save_tables
from modafill.files import derive_seed
from modafill.models.baselines import RidgeFill
from modafill.training.admc import RIVALS, ADMCTrainer
from modafill.training.loop import EpochDone
from modafill.training.run import Run, worker_pool

RECOGNITION = "Recognition, a fusion network per pattern"
PARTS = ("test", "valid")
FROZEN = "Recognition, a frozen classifier of complete data"
ERROR = "Error of the imputed embedding"
CALIBRATION = "Calibration of the imputed embedding"

AVERAGED = "probabilities averaged"
METHOD_NAMES = {
    "zero": "zero fill",
    "mean": "mean fill",
    "ridge": "ridge",
    "replace": "ADMC replace",
    "clean": "ADMC clean",
}


@torch.no_grad()
def evaluate_fold(
    trainer: ADMCTrainer, fold: int, *, n_samples: int = 16, start_steps: tuple[int, ...] = (), part: str = "test"
) -> list[Record]:
    """Every figure of a trained fold, on the samples that have every modality, hiding one set after the other.

    The ADMC rows of the recognition tables read one completion (the paper); "probabilities averaged" reads all K. In
    the frozen-classifier table the plain rows read a point estimate: the mean of K samples, or a rival's own.

    Args:
        trainer: has run; its networks are loaded.
        fold: its number, for the records.
        n_samples: K samples per row of the diffusion networks; class probabilities are averaged over them.
        start_steps: further starts n of ``"replace"``, shown beside the configured one.
        part: ``"test"``, or ``"valid"`` to choose settings by; early stopping and the penalties of ridge and logistic
            regression have seen the latter.
    """
    records: list[Record] = []

    def add(question: str, method: str, available: str, figures: dict[str, float]) -> None:
        for metric, value in figures.items():
            records.append(Record(question, metric, method, available, fold, trainer.seed, value))

    if start_steps and "replace" not in trainer.variants:
        raise ValueError(f"start-steps: got {list(start_steps)}, but the run trained no 'replace' network")
    names = list(trainer.specs)
    patterns = missing_patterns(len(names))
    shown = sorted(range(len(patterns)), key=lambda i: (int(patterns[i].sum()), pattern_name(patterns[i], names)))
    chosen = torch.from_numpy(getattr(trainer.split, part))
    complete = chosen[trainer.available[chosen].all(1)].to(trainer.device)
    if len(complete) == 0:
        raise ValueError(
            f"fold {fold}: no sample of the {part} part has all of {', '.join(names)}, expected at least one"
        )
    methods: list[tuple[str, str, dict[str, int]]] = [(m, METHOD_NAMES[m], {}) for m in RIVALS]
    for conditioning in trainer.variants:
        methods.append((conditioning, METHOD_NAMES[conditioning], {}))
        if conditioning == "replace":
            methods += [("replace", f"ADMC replace n={n}", {"start_step": n}) for n in start_steps]
    logistic = _LogisticRegression(trainer)
    scale = trainer.config.latent_scale
    for method, label, options in methods:
        for index in shown:
            pattern, column = patterns[index], pattern_name(patterns[index], names)
            rows = complete
            truth, target = trainer.tokens[rows], trainer.target[rows]
            seed = derive_seed(trainer.seed, "evaluate")
            completed = trainer.complete(method, rows, pattern, n_samples, seed, **options)
            if not options:
                fusion = trainer.fusion_for(method, index)
                add(RECOGNITION, label, column, recognition(_probabilities(fusion, completed[:1]), target))
            hidden = ~pattern
            estimate = completed.mean(0)
            frozen = trainer.complete_fusion
            add(FROZEN, label, column, recognition(_probabilities(frozen, estimate[None]), target))
            add(ERROR, label, column, {"NRMSE": nrmse(estimate[:, hidden], truth[:, hidden], scale)})
            fill = trainer.fill(method)
            if isinstance(fill, RidgeFill):
                available = pattern.to(trainer.device).expand(len(rows), -1)
                completed = fill.sample(truth, available, n_samples, seed, rows)
            elif not options and len(completed) > 1:
                figures = recognition(_probabilities(fusion, completed), target)
                add(RECOGNITION, f"{label}, {AVERAGED}", column, figures)
            if len(completed) > 1:
                figures = recognition(_probabilities(frozen, completed), target)
                add(FROZEN, f"{label}, {AVERAGED}", column, figures)
            add(CALIBRATION, label, column, {"CRPS": crps(completed[:, :, hidden], truth[:, hidden], scale)})
        if not options:
            tokens, full_fusion = trainer.tokens[complete], trainer.complete_fusion
            if method in trainer.variants:
                trainer.model.adn = trainer.adns[method]
                tokens = trainer.model.enhance(tokens, seed=trainer.seed, row_id=complete)
                full_fusion = trainer.enhanced_for(method)
            figures = recognition(full_fusion(tokens).softmax(-1), trainer.target[complete])
            add(RECOGNITION, label, FULL, figures)
    for pattern in [patterns[i] for i in shown] + [all_patterns(len(names))[-1]]:
        column = FULL if pattern.all() else pattern_name(pattern, names)
        figures = recognition(logistic.probabilities(pattern, complete), trainer.target[complete])
        add(RECOGNITION, "logistic regression", column, figures)
    figures = recognition(trainer.complete_fusion(trainer.tokens[complete]).softmax(-1), trainer.target[complete])
    add(FROZEN, "complete data", FULL, figures)
    return records


def _probabilities(fusion: torch.nn.Module, completed: Tensor) -> Tensor:
    """Class probabilities ``[B, classes]`` averaged over K completions ``[K, B, M, D]``."""
    logits = fusion(completed.flatten(0, 1))
    return logits.softmax(-1).reshape(*completed.shape[:2], -1).mean(0)


class _LogisticRegression:
    """Logistic regression on the standardised features of the observed modalities, one per pattern.

    Sequences enter as their mean over time, windows of turns as the turn itself. The penalty has the
    lowest log-loss on validation.
    """

    def __init__(self, trainer: ADMCTrainer, penalties: tuple[float, ...] = (1e-4, 1e-3, 0.01, 0.1, 1, 10)) -> None:
        self.trainer, self.penalties = trainer, penalties
        store = trainer.store.unwindowed()
        statistics = Standardizer.fit(store, trainer.split.train, clip=10.0)
        self.features = _summaries(store, statistics)

    def probabilities(self, pattern: Tensor, rows: Tensor) -> Tensor:
        t = self.trainer
        x = torch.cat([self.features[name] for name, seen in zip(t.specs, pattern, strict=True) if seen], 1).numpy()
        y = t.target.cpu().numpy()
        train, valid = (part[t.available[part][:, pattern].all(1).numpy()] for part in (t.split.train, t.split.valid))

        def probabilities(model: LogisticRegression, part: np.ndarray) -> np.ndarray:
            out = np.zeros((len(part), t.labels.n_classes), dtype=np.float32)
            out[:, model.classes_] = model.predict_proba(x[part])
            return out

        models: list[tuple[float, LogisticRegression]] = []
        for penalty in self.penalties:
            # BLAS threads would wait for each other, for minutes where another program has a core.
            with threadpool_limits(1):
                model = LogisticRegression(C=penalty, max_iter=1000).fit(x[train], y[train])
            loss = log_loss(y[valid], probabilities(model, valid), labels=list(range(t.labels.n_classes)))
            models.append((loss, model))
            # From strong to weak: once the loss is clearly worse, weaker ones only over-fit more, and converge slowly.
            if loss > 1.01 * min(models, key=itemgetter(0))[0]:
                break
        best = min(models, key=itemgetter(0))[1]
        return torch.from_numpy(probabilities(best, rows.cpu().numpy())).to(t.device)


def _summaries(store: FeatureStore, statistics: Standardizer) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {name: [] for name in store.modalities}
    for batch in store.iter_batches(np.arange(len(store)), 1024):
        batch = statistics.transform(batch)
        for m, (name, x) in enumerate(batch.features.items()):
            if x.ndim == 3:
                x = x.sum(1) / valid_steps(batch, m).sum(1, keepdim=True).clamp(min=1)
            parts[name].append(x)
    return {name: torch.cat(p).to(torch.float32) for name, p in parts.items()}


def evaluate_run(
    folder: Path,
    *,
    n_samples: int = 16,
    start_steps: tuple[int, ...] = (),
    part: str = "test",
    jobs: int = 1,
    progress: Callable[[int, int], None],
) -> list[Table]:
    """Evaluate every fold and seed of a finished run and write ``results.{json,csv,md}`` into its folder.

    Those of the validation part are called ``results-valid.*``.

    Args:
        folder: of the run.
        n_samples, start_steps, part: as in :func:`evaluate_fold`.
        jobs: folds and seeds evaluated at a time; torch's threads are divided among them.
        progress: called with the parts done and their number.

    Raises:
        ValueError: the folder is no run, or a part of it is not trained yet.
    """
    if part not in PARTS:
        raise ValueError(f"part: got {part!r}, expected {' or '.join(PARTS)}")
    run = Run.load(folder)
    finished = run.finished
    unfinished = [run.part_folder(*key).name for key in run.parts if key not in finished]
    if unfinished:
        raise ValueError(f"{folder}: {', '.join(unfinished)} not trained yet; run the same `modafill train` again")
    evaluate_part = partial(_evaluate_part, run, n_samples, start_steps, part)
    records: list[Record] = []
    progress(0, len(run.parts))
    with worker_pool(jobs) as pool:
        results = (map if pool is None else pool.map)(evaluate_part, run.parts)
        for done, found in enumerate(results, 1):
            records += found
            progress(done, len(run.parts))
    tables = make_tables(records)
    about = (
        f"{Path(run.data).name}: {run.folds} fold(s) × {len(run.seeds)} seed(s), {part} part, K = {n_samples} samples, "
        f"modafill {__version__}, torch {torch.__version__}."
    )
    save_tables(folder / ("results" if part == "test" else f"results-{part}"), records, tables, about)
    return tables


def draw_embeddings(run: Run, path: Path) -> None:
    """Real and generated embeddings of the first fold's test part as a picture (ADMC Fig. 3)."""
    trainer = _trained(run, *run.parts[0])
    test = torch.from_numpy(trainer.split.test)
    rows = test[trainer.available[test].all(1)].to(trainer.device)
    tokens = trainer.tokens[rows]
    generated = {}
    for conditioning, adn in trainer.adns.items():
        trainer.model.adn = adn
        enhanced = trainer.model.enhance(tokens, seed=trainer.seed, row_id=rows)
        generated[f"generated ({conditioning})"] = enhanced[..., tokens.shape[-1] :].cpu().numpy()
    embedding_figure(path, tokens.cpu().numpy(), generated, list(trainer.specs), seed=trainer.seed)


def _evaluate_part(
    run: Run, n_samples: int, start_steps: tuple[int, ...], part: str, fold_and_seed: tuple[int, int]
) -> list[Record]:
    trainer = _trained(run, *fold_and_seed)
    return evaluate_fold(trainer, fold_and_seed[0], n_samples=n_samples, start_steps=start_steps, part=part)


def _trained(run: Run, fold: int, seed: int) -> ADMCTrainer:
    """The trainer of a finished part, its networks loaded."""
    folder = run.part_folder(fold, seed)

    def refuse(done: EpochDone) -> None:
        gone = f"stages/{done.stage}.safetensors"
        raise ValueError(f"{folder}: {gone} is gone; remove {folder.name}/model and train again")

    trainer = run.trainer(fold, seed, Accelerator(), refuse)
    if not isinstance(trainer, ADMCTrainer):
        raise ValueError(f"{run.folder}: holds a run of {run.model}, expected admc")
    trainer.run()
    return trainer
