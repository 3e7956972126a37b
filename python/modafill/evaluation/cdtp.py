"""CDTP, its ablations and simple rivals on one part of a fold: four questions, one record per figure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from modafill.data import Batch, all_patterns, missing_patterns, pattern_name
from modafill.evaluation.linear import LinearModel
from modafill.evaluation.metrics import crps, nrmse, recognition, regression
from modafill.evaluation.parts import AVERAGED, CALIBRATION, ERROR, FROZEN, complete_rows, shown_patterns
from modafill.evaluation.tables import FULL, Record
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


@torch.no_grad()
def evaluate_part(
    trainer: CDTPTrainer, fold: int, *, n_samples: int = 16, sampling_steps: tuple[int, ...] = (), part: str = "test"
) -> list[Record]:
    """Every figure of a trained fold, on the samples that have every modality, hiding one set after the other.

    The rows of the first question read one completion, "probabilities averaged" all K. The frozen classifier is the
    backbone that was trained before anything was hidden: it reads projected sequences that are completed by the mean of
    what was generated from each source, or with "probabilities averaged" each of them, or by a rival. Errors are those
    of projected sequences, in units of their standard deviation; ``training="joint"`` has no such rows of CDTP's own,
    because every variant then has projections and denoisers of its own.

    Args:
        trainer: has run; its networks are loaded.
        fold: its number, for the records.
        n_samples, sampling_steps, part: as in :class:`modafill.evaluation.run.Asked`.
    """
    records: list[Record] = []
    metrics = regression if trainer.labels.regression else recognition

    def add(question: str, method: str, column: str, figures: dict[str, float]) -> None:
        for metric, value in figures.items():
            records.append(Record(question, metric, method, column, fold, trainer.seed, value))

    rows = complete_rows(trainer, fold, part)
    target = trainer.target[rows]
    names, patterns = trainer.names, missing_patterns(len(trainer.names))
    linear, space, seed = LinearModel(trainer), _Space(trainer), derive_seed(trainer.seed, "evaluate")
    fills = space.fills()
    for index in shown_patterns(names):
        pattern, column = patterns[index], pattern_name(patterns[index], names)
        answers: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        guesses: dict[str, list[Tensor]] = defaultdict(list)
        truths: list[Tensor] = []
        for batch in _batches(trainer, rows):
            shown = batch.hide(pattern.to(trainer.device).expand(len(batch), -1))
            for name, answer in _recognise(trainer, shown, n_samples, seed, sampling_steps).items():
                answers[RECOGNITION, name].append(answer)
            whole, given = trainer.plain.project(batch), trainer.plain.project(shown)
            truths.append(space.hidden(space.tokens(whole), whole, pattern))
            for name, samples in _filled(trainer, space, fills, given, n_samples, seed).items():
                answers[FROZEN, name].append(_answer(trainer, trainer.plain.predict(space.put(given, samples.mean(0)))))
                if len(samples) > 1:
                    each = [_answer(trainer, trainer.plain.predict(space.put(given, sample))) for sample in samples]
                    answers[FROZEN, f"{name}, {AVERAGED}"].append(torch.stack(each).mean(0))
                guesses[name].append(torch.stack([space.hidden(sample, whole, pattern) for sample in samples]))
        for (question, name), parts in answers.items():
            add(question, name, column, metrics(torch.cat(parts), target))
        truth = torch.cat(truths)
        for name, parts in guesses.items():
            samples = torch.cat(parts, dim=1)
            add(ERROR, name, column, {"NRMSE": nrmse(samples.mean(0), truth, 1.0)})
            add(CALIBRATION, name, column, {"CRPS": crps(samples, truth, 1.0)})
        add(RECOGNITION, linear.name, column, linear.figures(pattern, rows))
    for question, name, model in (
        *((RECOGNITION, VARIANT_NAMES[variant], model) for variant, model in trainer.models.items()),
        (FROZEN, "complete data", trainer.plain),
    ):
        whole_answers = [_answer(trainer, model(batch)) for batch in _batches(trainer, rows)]
        add(question, name, FULL, metrics(torch.cat(whole_answers), target))
    add(RECOGNITION, linear.name, FULL, linear.figures(all_patterns(len(names))[-1], rows))
    return records


def _batches(trainer: CDTPTrainer, rows: Tensor) -> Iterator[Batch]:
    for batch in trainer.store.iter_batches(rows.cpu().numpy(), EVALUATION_BATCH):
        yield batch.to(trainer.device)


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

        diffusing = model.diffusion is not None
        if shared is None or trainer.joint or not diffusing:
            generated = model.generate(given, seed=seed)
            # In two stages every variant has the same projections and denoisers.
            shared = generated if diffusing else shared
        else:
            generated = shared
        out[name] = say(generated)
        if variant == trainer.variants[0] and diffusing:
            if n_samples > 1:
                drawn = model.samples(given, n_samples, seed=seed)
                out[f"{name}, {AVERAGED}"] = torch.stack([say(sample) for sample in drawn]).mean(0)
            for steps in sampling_steps:
                out[f"{name}, {steps} DDIM steps"] = say(model.generate(given, seed=seed, sampling_steps=steps))
    return out


class _Space:
    """Projected sequences as tokens ``[B, M, L·d]``: standardised, zero behind the end, padded to the longest L."""

    def __init__(self, trainer: CDTPTrainer) -> None:
        self.trainer, self.lengths = trainer, trainer.plain.lengths
        self.mean, self.std = (x.to(torch.float32) for x in trainer.scales(trainer.plain))

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

    def fills(self) -> dict[str, ZeroFill | MeanFill | RidgeFill]:
        """The rivals, fitted on the complete training rows."""
        train, valid = (
            torch.cat([self.tokens(self.trainer.plain.project(batch)) for batch in _batches(self.trainer, rows)])
            for rows in self.trainer.rows_with(None)
        )
        shape = len(self.lengths), max(self.lengths)
        mean, std = (x[:, None].expand(*shape, -1).flatten(1) for x in (self.mean, self.std))
        return {
            "zero fill": ZeroFill(mean, std),
            "mean fill": MeanFill(train),
            "ridge": RidgeFill(train.cpu(), valid.cpu()),
        }


def _filled(
    trainer: CDTPTrainer,
    space: _Space,
    fills: dict[str, ZeroFill | MeanFill | RidgeFill],
    given: Sequences,
    n_samples: int,
    seed: int,
) -> dict[str, Tensor]:
    """Tokens ``[K, B, M, L·d]`` by each method: K samples for each source, or a rival's one or K."""
    tokens, available = space.tokens(given), given.available
    out: dict[str, Tensor] = {}
    for name, fill in fills.items():
        if isinstance(fill, RidgeFill) and n_samples > 1:
            # Centred, so that their mean is the regression itself.
            samples = fill.sample(tokens, available, n_samples, seed, given.row_id)
            out[name] = samples - samples.mean(0) + fill.point(tokens, available)
        else:
            out[name] = fill.point(tokens, available)[None]
    diffusing = next((model for model in trainer.models.values() if model.diffusion is not None), None)
    if diffusing is None or trainer.joint:
        return out
    sources = [m for m in range(len(trainer.names)) if bool(available[0, m])]
    lengths = trainer.plain.suggested_lengths(given)
    made = []
    for generated in diffusing.samples(given, n_samples, seed=seed):
        for source in sources:
            x = [given.x[m] if bool(available[0, m]) else generated[m, source] for m in range(len(trainer.names))]
            made.append(space.tokens(Sequences(x, lengths, available, given.row_id)))
    out[DIFFUSION] = torch.stack(made)
    return out
