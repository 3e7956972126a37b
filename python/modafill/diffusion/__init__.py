"""Noise schedules and samplers."""

from modafill.diffusion.embedding import step_embedding
from modafill.diffusion.samplers import angular_steps, check_samples, sample_clean, sample_replace, sample_row_ids
from modafill.diffusion.schedule import Schedule

__all__ = [
    "Schedule",
    "angular_steps",
    "check_samples",
    "sample_clean",
    "sample_replace",
    "sample_row_ids",
    "step_embedding",
]
