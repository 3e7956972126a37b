"""MF: self-attention fusion and classification (ADMC §3.3, eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modafill.models.admc.config import ADMCConfig
from modafill.models.admc.encoders import Classifier


class Fusion(nn.Module):
    """FC(mean over tokens of Attention(tokens)), ``[B, M, D] → [B, classes]``.

    The paper leaves the layers open: here they are pre-norm, which trains stably at any width, and a learned modality
    embedding is added, because attention with a mean over tokens could not tell modalities apart.

    Args:
        n_modalities: M.
        n_classes: classes.
        config: numbers of the model.
        in_width: token width D; MMER's concatenated tokens have twice the encoders' width (eq. 5).
    """

    def __init__(self, n_modalities: int, n_classes: int, config: ADMCConfig, in_width: int | None = None) -> None:
        super().__init__()
        d = in_width or config.width
        self.modality = nn.Parameter(torch.randn(n_modalities, d) * 0.02)
        layer = nn.TransformerEncoderLayer(
            d, config.fusion_heads, config.fusion_feedforward, config.fusion_dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.fusion_layers, enable_nested_tensor=False)
        self.classifier = Classifier(d, config.classifier_hidden, n_classes, config.fusion_dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of ``tokens [B, M, D]``."""
        return self.classifier(self.encoder(tokens + self.modality).mean(1))
