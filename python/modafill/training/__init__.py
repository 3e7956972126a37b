"""Training loops."""

from modafill.training.loop import EpochDone, Stage, TrainingError, train_stage
from modafill.training.run import Run, train

__all__ = ["EpochDone", "Run", "Stage", "TrainingError", "train", "train_stage"]
