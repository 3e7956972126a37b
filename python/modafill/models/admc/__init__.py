"""ADMC (Zhang et al. 2025): attention-based diffusion for missing-modality feature completion."""

from modafill.models.admc.adn import ADN
from modafill.models.admc.config import ADMCConfig
from modafill.models.admc.encoders import ModalityEncoder, UnimodalClassifier, encoder_kind
from modafill.models.admc.fusion import Fusion
from modafill.models.admc.system import ADMC, ModalitySpec, TokenScaler

__all__ = [
    "ADMC",
    "ADN",
    "ADMCConfig",
    "Fusion",
    "ModalityEncoder",
    "ModalitySpec",
    "TokenScaler",
    "UnimodalClassifier",
    "encoder_kind",
]
