"""CDTP (Yu & Zhang): conditional diffusion, three kinds of prompts, and MulT, for missing modalities."""

from modafill.models.cdtp.backbone import MulT, positions
from modafill.models.cdtp.config import VARIANTS, CDTPConfig, SequenceSpec
from modafill.models.cdtp.diffusion import ConditionalDiffusion
from modafill.models.cdtp.prompts import Prompts
from modafill.models.cdtp.system import CDTP, Sequences
from modafill.models.cdtp.unet import StackedUNet

__all__ = [
    "CDTP",
    "VARIANTS",
    "CDTPConfig",
    "ConditionalDiffusion",
    "MulT",
    "Prompts",
    "SequenceSpec",
    "Sequences",
    "StackedUNet",
    "positions",
]
