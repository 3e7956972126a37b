"""Noise schedules and samplers."""

from modafill.diffusion.samplers import sample_clean, sample_replace, sample_row_ids, strided_steps
from modafill.diffusion.schedule import Schedule

__all__ = ["Schedule", "sample_clean", "sample_replace", "sample_row_ids", "strided_steps"]
