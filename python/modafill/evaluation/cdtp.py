"""CDTP, its ablations and simple rivals on one part of a fold: four questions, one record per figure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modafill.data import Batch, MissingRate, all_patterns, missing_patterns, pattern_name
from modafill.diffusion import Sampling
from modafill.evaluation.linear import LinearModel
from modafill.evaluation.metrics import crps
from modafill.evaluation.parts import (
    AVERAGED,
    CALIBRATION,
    COMPLETE,
    ERROR,
    FROZEN,
    Answers,
    complete_rows,
    shown_patterns,
)
from modafill.evaluation.tables import Record
from modafill.files import derive_seed
from modafill.models.baselines import MeanFill, RidgeFill, ZeroFill
from modafill.models.cdtp import CDTP, Sequences
from modafill.models.cdtp.stacked import valid_mask
from modafill.models.cdtp.system import Pairs
from modafill.training.cdtp import EVALUATION_BATCH, CDTPTrainer

RECOGNITION = "Recognition, trained with missing modalities"
VARIANT_NAMES = {
    "full": "CDTP",
    "no-generative": "CDTP without generative prompts",
    "no-signal": "CDTP without missing-signal prompts",
    "no-type": "CDTP without missing-type prompts",
    "append": "CDTP, missing-type prompts appended",
    "linear": "CDTP with a linear map (MPLMM)",
    "plain": "MulT, missing ones empty",
}
DIFFUSION = "CDTP's diffusion"
# Sequences are many correlated features: they want stronger penalties than tokens.
RIDGE_PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7)


@torch.no_grad()
def evaluate_part(
    trainer: CDTPTrainer,
    fold: int,
    *,
    n_samples: int = 16,
    sampling_steps: tuple[int, ...] = (),
    part: str = "test",
    missing: tuple[MissingRate, ...] = (),
    missing_seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Record]:
    """Every figure of a trained fold, on the samples that have every modality, hiding one set after the other.

    The rows of the first question read one completion, "probabilities averaged" (of scores "scores averaged") all K.
    The frozen classifier is the backbone that was trained before anything was hidden (on rows that really lack
    something, too): it reads projected sequences that are completed by the mean of K draws as the imputer makes them,
    or with "probabilities averaged" by each of them, or by a rival. Errors are those of projected sequences, in units
    of their standard deviation; ``training="joint"`` has no such rows of CDTP's own, because every variant then has
    projections and denoisers of its own.

    Args:
        trainer: has run; its networks are loaded.
        fold: its number, for the records.
        n_samples, sampling_steps, part, missing, missing_seed: as in :class:`modafill.evaluation.run.Protocol`.
        progress: called with the share of the work that is done, 0…1.
    """
    if sampling_steps and not trainer.diffusing:
        raise ValueError(f"sampling-steps: got {list(sampling_steps)}, but the run trained no variant that diffuses")
    for model in trainer.diffusing[:1]:
        assert model.diffusion is not None
        last = model.diffusion.last_step
        if any(not 1 <= steps <= last for steps in sampling_steps):
            raise ValueError(f"sampling-steps: got {list(sampling_steps)}, expected 1…{last}, the steps in use")
    records: list[Record] = []
    rows = complete_rows(trainer, fold, part)
    found, everything = Answers(trainer, fold, rows), all_patterns(len(trainer.names))[-1]
    names, patterns = trainer.names, missing_patterns(len(trainer.names))
    linear, space, seed = LinearModel(trainer), _Space(trainer), derive_seed(trainer.seed, "evaluate")
    fills, shown_sets = space.fills(), shown_patterns(names)
    batches, done = len(shown_sets) * -(-len(rows) // space.rows_of(n_samples)), 0
    for index in shown_sets:
        pattern, column = patterns[index], pattern_name(patterns[index], names)
        answers: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        errors: dict[str, _Errors] = defaultdict(_Errors)
        for batch in _batches(trainer, rows, space.rows_of(n_samples)):
            shown = batch.hide(pattern.to(trainer.device).expand(len(batch), -1))
            for name, answer in _recognise(trainer, shown, n_samples, seed, sampling_steps).items():
                answers[RECOGNITION, name].append(answer)
            whole, given = trainer.plain.project(batch), trainer.plain.project(shown)
            truth = space.hidden(space.tokens(whole), whole, pattern)
            for name, (point, samples) in _filled(trainer, space, fills, given, n_samples, seed).items():
                answers[FROZEN, name].append(_answer(trainer, trainer.plain.predict(space.put(given, point))))
                if len(samples) > 1:
                    each = [_answer(trainer, trainer.plain.predict(space.put(given, sample))) for sample in samples]
                    answers[FROZEN, f"{name}, {_averaged(trainer)}"].append(torch.stack(each).mean(0))
                guess = space.hidden(point, whole, pattern)
                drawn = torch.stack([space.hidden(sample, whole, pattern) for sample in samples])
                # CDTP's draws take the sources in turn.
                errors[name].add(guess, drawn, truth, int(pattern.sum()) if name == DIFFUSION else 1)
            done += 1
            progress(done / batches)
        for (question, name), parts in answers.items():
            # An average over samples, or another number of steps, is the variant itself where nothing is missing.
            variants = [v for v in VARIANT_NAMES.values() if name == v or name.startswith(f"{v}, ")]
            stand_in = COMPLETE if question == FROZEN else max(variants, key=len)
            found.add(question, name, pattern, torch.cat(parts), whole=stand_in)
        for name, error in errors.items():
            for question, metric, value in ((ERROR, "NRMSE", error.nrmse), (CALIBRATION, "CRPS", error.crps)):
                records.append(Record(question, metric, name, column, fold, trainer.seed, value))
        found.add(RECOGNITION, linear.name, pattern, linear.answer(pattern, rows))
    for question, name, model in (
        *((RECOGNITION, VARIANT_NAMES[variant], model) for variant, model in trainer.models.items()),
        (FROZEN, COMPLETE, trainer.plain),
    ):
        whole_answers = [_answer(trainer, model(batch)) for batch in _batches(trainer, rows)]
        found.add(question, name, everything, torch.cat(whole_answers))
    found.add(RECOGNITION, linear.name, everything, linear.answer(everything, rows))
    return found.records(missing, missing_seed) + records


@dataclass
class _Errors:
    """Sums over batches of what the error and the calibration are means of."""

    squares: float = 0.0
    scores: float = 0.0
    count: int = 0

    def add(self, guess: Tensor, samples: Tensor, truth: Tensor, strata: int) -> None:
        self.squares += float((guess - truth).square().sum())
        self.scores += crps(samples, truth, 1.0, strata) * len(truth)
        self.count += len(truth)

    @property
    def nrmse(self) -> float:
        return math.sqrt(self.squares / self.count)

    @property
    def crps(self) -> float:
        return self.scores / self.count


def _batches(trainer: CDTPTrainer, rows: Tensor, size: int = EVALUATION_BATCH) -> Iterator[Batch]:
    for batch in trainer.store.iter_batches(rows.cpu().numpy(), size):
        yield batch.to(trainer.device)


def _averaged(trainer: CDTPTrainer) -> str:
    return "scores averaged" if trainer.labels.regression else AVERAGED


def _answer(trainer: CDTPTrainer, prediction: Tensor) -> Tensor:
    """Class probabilities ``[B, classes]`` or scores ``[B]``."""
    return prediction[:, 0] if trainer.labels.regression else prediction.softmax(-1)


def _recognise(
    trainer: CDTPTrainer, shown: Batch, n_samples: int, seed: int, sampling_steps: tuple[int, ...]
) -> dict[str, Tensor]:
    """What each variant says of a batch, and the first one on average over samples and at other numbers of steps."""
    out: dict[str, Tensor] = {}
    shared: Pairs | None = None
    for variant, model in trainer.models.items():
        given, name = model.project(shown), VARIANT_NAMES[variant]

        def say(generated: Pairs, model: CDTP = model, given: Sequences = given) -> Tensor:
            return _answer(trainer, model.predict(model.complete(given, generated)))

        if model.diffusion is None:
            out[name] = say({})
            continue
        # In two stages every variant has the same projections and denoisers.
        first, generated = shared is None, shared
        if generated is None or trainer.joint:
            shared = generated = model.generate(given, seed=seed)
        out[name] = say(generated)
        if first:
            if n_samples > 1:
                drawn = model.samples(given, n_samples, seed=seed)
                out[f"{name}, {_averaged(trainer)}"] = torch.stack([say(sample) for sample in drawn]).mean(0)
            for steps in sampling_steps:
                out[f"{name}, {steps} DDIM steps"] = say(
                    model.generate(given, seed=seed, sampling=Sampling(steps=steps, solver="ddim"))
                )
    return out


class _Space:
    """Projected sequences as tokens ``[B, M, L·d]``: standardised, padded to the longest L with zeros."""

    def __init__(self, trainer: CDTPTrainer) -> None:
        self.trainer, self.lengths = trainer, trainer.plain.lengths
        self.mean, self.std = (x.to(torch.float32) for x in trainer.scales(trainer.plain))

    def rows_of(self, n_samples: int) -> int:
        """How many rows at a time: K samples of their tokens within a gigabyte."""
        row = 4 * n_samples * len(self.lengths) * max(self.lengths) * self.mean.shape[1]
        return max(1, min(EVALUATION_BATCH, 2**30 // row))

    def tokens(self, x: Sequences) -> Tensor:
        out = []
        for m, (v, n) in enumerate(zip(x.x, x.lengths, strict=True)):
            token = torch.where(valid_mask(n, v.shape[1])[..., None], (v - self.mean[m]) / self.std[m], 0.0)
            out.append(torch.nn.functional.pad(token, (0, 0, 0, max(self.lengths) - v.shape[1])).flatten(1))
        return torch.stack(out, dim=1)

    def put(self, given: Sequences, tokens: Tensor) -> Sequences:
        """``given`` with its missing sequences from ``tokens [B, M, L·d]``, of the lengths that the others suggest."""
        x, lengths = [], self.trainer.plain.suggested_lengths(given)
        for m, v in enumerate(given.x):
            made = tokens[:, m].unflatten(1, (-1, v.shape[2]))[:, : v.shape[1]] * self.std[m] + self.mean[m]
            made = torch.where(valid_mask(lengths[m], v.shape[1])[..., None], made, 0.0)
            x.append(torch.where(given.available[:, m, None, None], v, made))
        return Sequences(x, lengths, given.available, given.row_id)

    def hidden(self, tokens: Tensor, whole: Sequences, pattern: Tensor) -> Tensor:
        """The elements of ``tokens`` that ``pattern`` hides and that ``whole`` really has, flat for each sample."""
        out = []
        for m in (~pattern).nonzero().flatten().tolist():
            width, steps = whole.x[m].shape[2], whole.x[m].shape[1]
            token = tokens[:, m].unflatten(1, (-1, width))[:, :steps]
            out.append(token[valid_mask(whole.lengths[m], steps)].flatten())
        return torch.cat(out)

    def for_ridge(self, tokens: Tensor, given: Sequences) -> Tensor:
        """``tokens`` of ``given`` with the mean of its step behind a sequence's end, as ridge was fitted."""
        return torch.where(self._valid(given), tokens, self.step_means)

    def fills(self) -> dict[str, ZeroFill | MeanFill | RidgeFill]:
        """The rivals, fitted on the complete training rows.

        Denoisers also learn from rows that have both ends of their pair alone; rows that lack a modality for good are
        lost to ridge. What lies behind the end of a sequence counts for no mean and for no error.
        """
        sets, seen = [], []
        for rows in self.trainer.rows_with(None):
            whole = [self.trainer.plain.project(batch) for batch in _batches(self.trainer, rows)]
            sets.append(torch.cat([self.tokens(x) for x in whole]))
            seen.append(torch.cat([self._valid(x) for x in whole]))
        count = seen[0].sum(0)
        self.step_means = mean = torch.where(seen[0], sets[0], 0.0).sum(0) / count.clamp(min=1)
        train, valid = (torch.where(there, tokens, mean) for there, tokens in zip(seen, sets, strict=True))
        shape = len(self.lengths), max(self.lengths)
        zero, scale = (x[:, None].expand(*shape, -1).flatten(1) for x in (self.mean, self.std))
        return {
            "zero fill": ZeroFill(zero, scale),
            "mean fill": MeanFill(mean[None]),
            "ridge": RidgeFill(train.cpu(), valid.cpu(), RIDGE_PENALTIES, seen[1].cpu()),
        }

    def _valid(self, x: Sequences) -> Tensor:
        """Which elements of :meth:`tokens` are real."""
        longest, width = max(self.lengths), x.x[0].shape[2]
        masks = [valid_mask(n, longest)[..., None].expand(-1, -1, width).flatten(1) for n in x.lengths]
        return torch.stack(masks, dim=1)


def _filled(
    trainer: CDTPTrainer,
    space: _Space,
    fills: dict[str, ZeroFill | MeanFill | RidgeFill],
    given: Sequences,
    n_samples: int,
    seed: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens by each method: a point estimate ``[B, M, L·d]``, and samples ``[K, B, M, L·d]``, of some rivals one."""
    tokens, available = space.tokens(given), given.available
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for name, fill in fills.items():
        if not isinstance(fill, RidgeFill):
            out[name] = fill.point(tokens, available), fill.sample(tokens, available, 1, seed, given.row_id)
            continue
        read = space.for_ridge(tokens, given)
        samples = fill.sample(read, available, n_samples, seed, given.row_id) if n_samples > 1 else None
        point = fill.point(read, available)
        out[name] = point, point[None] if samples is None else samples
    if trainer.diffusing and not trainer.joint:
        model = trainer.diffusing[0]
        samples = torch.stack(
            [
                space.tokens(model.fill(given, generated, draw))
                for draw, generated in enumerate(model.samples(given, n_samples, seed=seed))
            ]
        )
        out[DIFFUSION] = samples.mean(0), samples
    return out
