"""What the evaluations of all models share: parts, columns, questions, and the trainer of a finished part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from modafill.data import MissingRate, missing_patterns, pattern_name
from modafill.evaluation.metrics import figures_of
from modafill.evaluation.tables import FULL, Record
from modafill.training import Run
from modafill.training.part import PartTrainer
from modafill.training.run import Trainer

PARTS = ("test", "valid")
FROZEN = "Recognition, a frozen classifier of complete data"
ERROR = "Error of the imputed embedding"
CALIBRATION = "Calibration of the imputed embedding"
AVERAGED = "probabilities averaged"
BY_RATE = "by missing rate"
COMPLETE = "complete data"


class Answers:
    """What methods say of the same samples, by what is observed: figures for each set, and for missing rates.

    Args:
        trainer: of the fold; its labels are the targets.
        fold: its number, for the records.
        rows: the samples, in the order of all answers.
    """

    def __init__(self, trainer: PartTrainer, fold: int, rows: Tensor) -> None:
        self.trainer, self.fold, self.rows = trainer, fold, rows
        self._found: dict[tuple[str, str], dict[tuple[bool, ...], Tensor]] = {}
        self._stand_in: dict[tuple[str, str], tuple[str, str]] = {}

    def add(self, question: str, method: str, pattern: Tensor, answer: Tensor, *, whole: str | None = None) -> None:
        """Class probabilities ``[B, classes]`` or scores ``[B]`` where ``pattern [M]`` is observed.

        ``whole`` names the method whose answer to complete samples is this one's too.
        """
        self._found.setdefault((question, method), {})[tuple(pattern.tolist())] = answer
        if whole is not None:
            self._stand_in[question, method] = (question, whole)

    def records(self, rates: Sequence[MissingRate], seed: int) -> list[Record]:
        """A record for each figure: of each set, and of each rate, where each sample has what is drawn for it."""
        measure, target = figures_of(self.trainer.labels), self.trainer.target[self.rows]
        names, trained_seed = self.trainer.names, self.trainer.seed
        records = []
        for (question, method), answers in self._found.items():
            for pattern, answer in answers.items():
                column = FULL if all(pattern) else pattern_name(pattern, names)
                figures = measure(answer, target)
                records += [Record(question, m, method, column, self.fold, trained_seed, v) for m, v in figures.items()]
        for rate in rates:
            drawn = rate.draw(self.rows, names, seed)
            for (question, method), answers in self._found.items():
                stand_in = self._found.get(self._stand_in.get((question, method), (question, method)), {})
                everything = {**{p: a for p, a in stand_in.items() if all(p)}, **answers}
                shown = {tuple(row) for row in drawn.tolist()}
                if all(all(pattern) for pattern in answers) or not shown <= everything.keys():
                    continue
                mixed = torch.empty_like(next(iter(answers.values())))
                for pattern in shown:
                    chosen = (drawn == torch.tensor(pattern, device=drawn.device)).all(1)
                    mixed[chosen] = everything[pattern][chosen]
                figures = measure(mixed, target)
                title = f"{question}, {BY_RATE}"
                records += [Record(title, m, method, str(rate), self.fold, trained_seed, v) for m, v in figures.items()]
        return records


def trained(run: Run, fold: int, seed: int) -> Trainer:
    """The trainer of a finished part, its networks loaded."""
    trainer = run.trainer(fold, seed, Accelerator(), lambda done: None)
    trainer.load_only = True
    trainer.run()
    return trainer


def complete_rows(trainer: PartTrainer, fold: int, part: str) -> Tensor:
    """The rows of a part that have every modality, int64 on the device."""
    chosen = torch.from_numpy(getattr(trainer.split, part))
    complete = chosen[trainer.available[chosen].all(1)].to(trainer.device)
    if len(complete) == 0:
        raise ValueError(
            f"fold {fold}: no sample of the {part} part has all of {', '.join(trainer.names)}, expected at least one"
        )
    return complete


def shown_patterns(names: list[str]) -> list[int]:
    """Numbers of the incomplete patterns in the order of the tables' columns: by how much is observed, then by name."""
    patterns = missing_patterns(len(names))
    return sorted(range(len(patterns)), key=lambda i: (int(patterns[i].sum()), pattern_name(patterns[i], names)))
