"""ADMC against simple rivals on the test part of a fold: four questions, one record per figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from modafill.data import MissingRate, all_patterns, missing_patterns, pattern_name
from modafill.diffusion import Sampling
from modafill.evaluation.figures import embedding_figure
from modafill.evaluation.linear import LinearModel
from modafill.evaluation.metrics import crps, nrmse
from modafill.evaluation.parts import (
    AVERAGED,
    CALIBRATION,
    COMPLETE,
    ERROR,
    FROZEN,
    Answers,
    complete_rows,
    shown_patterns,
    trained,
)
from modafill.evaluation.tables import Record
from modafill.files import derive_seed
from modafill.models.baselines import RidgeFill
from modafill.training import Run
from modafill.training.admc import RIVALS, ADMCTrainer

RECOGNITION = "Recognition, a fusion network per pattern"

METHOD_NAMES = {
    "zero": "zero fill",
    "mean": "mean fill",
    "ridge": "ridge",
    "replace": "ADMC replace",
    "clean": "ADMC clean",
}


@torch.no_grad()
def evaluate_part(
    trainer: ADMCTrainer,
    fold: int,
    *,
    n_samples: int = 16,
    start_steps: tuple[int, ...] = (),
    part: str = "test",
    missing: tuple[MissingRate, ...] = (),
    missing_seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
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
        missing, missing_seed: as in :class:`modafill.evaluation.run.Protocol`.
        progress: called with the share of the work that is done, 0…1.
    """
    errors: list[Record] = []

    if start_steps and "replace" not in trainer.variants:
        raise ValueError(f"start-steps: got {list(start_steps)}, but the run trained no 'replace' network")
    names = list(trainer.specs)
    patterns = missing_patterns(len(names))
    shown = shown_patterns(names)
    complete = complete_rows(trainer, fold, part)
    methods: list[tuple[str, str, Sampling | None]] = [(m, METHOD_NAMES[m], None) for m in RIVALS]
    for conditioning in trainer.variants:
        methods.append((conditioning, METHOD_NAMES[conditioning], None))
        if conditioning == "replace":
            methods += [("replace", f"ADMC replace n={n}", Sampling(steps=n)) for n in start_steps]
    answers, everything = Answers(trainer, fold, complete), all_patterns(len(names))[-1]
    linear = LinearModel(trainer)
    scale = trainer.config.latent_scale
    for number, (method, label, sampling) in enumerate(methods):
        for place, index in enumerate(shown):
            progress((number + place / len(shown)) / len(methods))
            pattern, column = patterns[index], pattern_name(patterns[index], names)
            rows = complete
            truth = trainer.tokens[rows]
            seed = derive_seed(trainer.seed, "evaluate")
            completed = trainer.complete(method, rows, pattern, n_samples, seed, sampling or Sampling())
            if sampling is None:
                fusion = trainer.fusion_for(method, index)
                answers.add(RECOGNITION, label, pattern, _probabilities(fusion, completed[:1]))
            hidden = ~pattern
            estimate = completed.mean(0)
            frozen = trainer.complete_fusion
            answers.add(FROZEN, label, pattern, _probabilities(frozen, estimate[None]), whole=COMPLETE)
            error = nrmse(estimate[:, hidden], truth[:, hidden], scale)
            errors.append(Record(ERROR, "NRMSE", label, column, fold, trainer.seed, error))
            fill = trainer.fill(method)
            if isinstance(fill, RidgeFill):
                available = pattern.to(trainer.device).expand(len(rows), -1)
                completed = fill.sample(truth, available, n_samples, seed, rows)
            elif sampling is None and len(completed) > 1:
                averaged = _probabilities(fusion, completed)
                answers.add(RECOGNITION, f"{label}, {AVERAGED}", pattern, averaged, whole=label)
            if len(completed) > 1:
                averaged = _probabilities(frozen, completed)
                answers.add(FROZEN, f"{label}, {AVERAGED}", pattern, averaged, whole=COMPLETE)
            spread = crps(completed[:, :, hidden], truth[:, hidden], scale)
            errors.append(Record(CALIBRATION, "CRPS", label, column, fold, trainer.seed, spread))
        if sampling is None:
            tokens, full_fusion = trainer.tokens[complete], trainer.complete_fusion
            if method in trainer.variants:
                trainer.model.adn = trainer.adns[method]
                tokens = trainer.model.enhance(tokens, seed=trainer.seed, row_id=complete)
                full_fusion = trainer.enhanced_for(method)
            answers.add(RECOGNITION, label, everything, full_fusion(tokens).softmax(-1))
    for pattern in [*(patterns[i] for i in shown), everything]:
        answers.add(RECOGNITION, linear.name, pattern, linear.answer(pattern, complete))
    answers.add(FROZEN, COMPLETE, everything, trainer.complete_fusion(trainer.tokens[complete]).softmax(-1))
    return answers.records(missing, missing_seed) + errors


def _probabilities(fusion: torch.nn.Module, completed: Tensor) -> Tensor:
    """Class probabilities ``[B, classes]`` averaged over K completions ``[K, B, M, D]``."""
    logits = fusion(completed.flatten(0, 1))
    return logits.softmax(-1).reshape(*completed.shape[:2], -1).mean(0)


def draw_embeddings(run: Run, path: Path) -> None:
    """Real and generated embeddings of the first fold's test part as a picture (ADMC Fig. 3)."""
    trainer = cast(ADMCTrainer, trained(run, *run.parts[0]))
    test = torch.from_numpy(trainer.split.test)
    rows = test[trainer.available[test].all(1)].to(trainer.device)
    tokens = trainer.tokens[rows]
    generated = {}
    for conditioning, adn in trainer.adns.items():
        trainer.model.adn = adn
        enhanced = trainer.model.enhance(tokens, seed=trainer.seed, row_id=rows)
        generated[f"generated ({conditioning})"] = enhanced[..., tokens.shape[-1] :].cpu().numpy()
    embedding_figure(path, tokens.cpu().numpy(), generated, list(trainer.specs), seed=trainer.seed)
