"""Training loops."""

from modafill.training.loop import Progress, Stage, TrainingError, train_stage
from modafill.training.run import Run, train

__all__ = ["Progress", "Run", "Stage", "TrainingError", "train", "train_stage"]
