"""Simple rivals: what a diffusion model has to beat."""

from modafill.models.baselines.fills import MeanFill, RidgeFill, ZeroFill

__all__ = ["MeanFill", "RidgeFill", "ZeroFill"]
