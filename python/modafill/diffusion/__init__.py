"""Noise schedules and samplers."""

from modafill.diffusion.embedding import step_embedding
from modafill.diffusion.samplers import (
    SOLVERS,
    Sampling,
    angular_steps,
    check_samples,
    clean_coefficients,
    clean_start,
    denoise,
    eps_of_v,
    replace_coefficients,
    replace_start,
    sample_clean,
    sample_replace,
    sample_row_ids,
    solver_steps,
)
from modafill.diffusion.schedule import Schedule

__all__ = [
    "SOLVERS",
    "Sampling",
    "Schedule",
    "angular_steps",
    "check_samples",
    "clean_coefficients",
    "clean_start",
    "denoise",
    "eps_of_v",
    "replace_coefficients",
    "replace_start",
    "sample_clean",
    "sample_replace",
    "sample_row_ids",
    "solver_steps",
    "step_embedding",
]
