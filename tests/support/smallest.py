"""Models of nearly nothing, which train in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping

SMALLEST = {
    "width": 8,
    "mlp_hidden": 8,
    "classifier_hidden": 8,
    "adn_layers": 1,
    "adn_heads": 2,
    "adn_feedforward": 16,
    "fusion_layers": 1,
    "fusion_heads": 2,
    "fusion_feedforward": 16,
    "diffusion_steps": 60,
    "start_step": 4,
    "sampling_steps": 3,
    "learning_rate": 0.003,
    "batch_size": 16,
    "encoder_epochs": 3,
    "adn_epochs": 3,
    "fusion_epochs": 2,
}


SMALLEST_CDTP = {
    "width": 8,
    "heads": 2,
    "layers": 1,
    "self_layers": 1,
    "prompt_length": 2,
    "unet_channels": [8, 8],
    "unet_blocks": 1,
    "diffusion_steps": 60,
    "beta_end": 0.2,
    "sampling_steps": 3,
    "learning_rate": 0.003,
    "batch_size": 16,
    "epochs": 3,
    "diffusion_epochs": 3,
}


def settings(numbers: Mapping[str, object]) -> list[str]:
    """Command-line arguments that give a model these numbers."""
    return [part for name, value in numbers.items() for part in ("--set", f"{name}={json.dumps(value)}")]
