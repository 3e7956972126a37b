"""Fill in missing modalities by conditional diffusion, on fused kernels."""

__version__ = "0.1.0"
