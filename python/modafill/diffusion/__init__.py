"""Noise schedules and samplers."""

from modafill.diffusion.embedding import step_embedding
from modafill.diffusion.samplers import (
    SOLVERS,
    angular_steps,
    check_samples,
    sample_clean,
    sample_replace,
    sample_row_ids,
    solver_steps,
)
from modafill.diffusion.schedule import Schedule

__all__ = [
    "SOLVERS",
    "Schedule",
    "angular_steps",
    "check_samples",
    "sample_clean",
    "sample_replace",
    "sample_row_ids",
    "solver_steps",
    "step_embedding",
]
