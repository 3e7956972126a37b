"""What the evaluations of all models share: parts, columns, questions, and the trainer of a finished part."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from modafill.data import missing_patterns, pattern_name
from modafill.training import Run
from modafill.training.loop import EpochDone
from modafill.training.part import PartTrainer
from modafill.training.run import Trainer

PARTS = ("test", "valid")
FROZEN = "Recognition, a frozen classifier of complete data"
ERROR = "Error of the imputed embedding"
CALIBRATION = "Calibration of the imputed embedding"
AVERAGED = "probabilities averaged"


def trained(run: Run, fold: int, seed: int) -> Trainer:
    """The trainer of a finished part, its networks loaded."""
    folder = run.part_folder(fold, seed)

    def refuse(done: EpochDone) -> None:
        gone = f"stages/{done.stage}.safetensors"
        raise ValueError(f"{folder}: {gone} is gone; remove {folder.name}/model and train again")

    trainer = run.trainer(fold, seed, Accelerator(), refuse)
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
