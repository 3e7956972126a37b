"""Training loops."""

from modafill.training.loop import Stage, TrainingError, train_stage
from modafill.training.run import Run, train

__all__ = ["Run", "Stage", "TrainingError", "train", "train_stage"]
