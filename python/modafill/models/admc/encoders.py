"""ITFN: one encoder per modality with its own classifier (ADMC §3.1, §4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modafill.models.admc.config import ADMCConfig


class Classifier(nn.Sequential):
    """Two fully connected layers ``[B, in] → [B, classes]`` with ReLU and dropout (ADMC §4.2)."""

    def __init__(self, in_width: int, hidden: int, n_classes: int, dropout: float) -> None:
        super().__init__(
            nn.Dropout(dropout),
            nn.Linear(in_width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, n_classes),
        )


class _LSTM(nn.Module):
    def __init__(self, in_width: int, config: ADMCConfig) -> None:
        super().__init__()
        self.lstm = nn.LSTM(in_width, config.width, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return hidden.masked_fill(~valid[..., None], -torch.inf).amax(1)


class _TextCNN(nn.Module):
    def __init__(self, in_width: int, config: ADMCConfig) -> None:
        super().__init__()
        self.kernels = config.textcnn_kernels
        self.convs = nn.ModuleList(nn.Conv1d(in_width, config.textcnn_filters, k) for k in self.kernels)
        self.dropout = nn.Dropout(config.textcnn_dropout)
        self.project = nn.Linear(config.textcnn_filters * len(self.kernels), config.width)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 0, 0, max(0, max(self.kernels) - x.shape[1]))).transpose(1, 2)
        pooled = []
        for kernel, conv in zip(self.kernels, self.convs, strict=True):
            maps = conv(x).relu()
            windows = (lengths - kernel + 1).clamp(min=1)
            valid = torch.arange(maps.shape[2], device=x.device) < windows[:, None]
            pooled.append(maps.masked_fill(~valid[:, None], 0.0).amax(2))
        return self.project(self.dropout(torch.cat(pooled, dim=1))).relu()


class _MLP(nn.Module):
    def __init__(self, in_width: int, config: ADMCConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(config.encoder_dropout),
            nn.Linear(in_width, config.mlp_hidden),
            nn.ReLU(),
            nn.Dropout(config.encoder_dropout),
            nn.Linear(config.mlp_hidden, config.width),
        )

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.layers(x)


_KINDS: dict[str, type[_LSTM] | type[_TextCNN] | type[_MLP]] = {"lstm": _LSTM, "textcnn": _TextCNN, "mlp": _MLP}


def encoder_kind(name: str, sequence: bool, config: ADMCConfig) -> str:
    """Which network reads a modality; ValueError if the one that was asked for cannot."""
    kind = config.encoders.get(name, "auto")
    if kind == "auto":
        kind = "mlp" if not sequence else "textcnn" if name == "text" else "lstm"
    if sequence == (kind == "mlp"):
        shape = "[B, L, D]" if sequence else "[B, D]"
        raise ValueError(f"encoders[{name!r}]: got {kind!r}, which cannot read {shape} features")
    return kind


class ModalityEncoder(nn.Module):
    """Encoder of one modality, with the statistics that standardise its input.

    ``"lstm"``: one unidirectional layer, max over time. ``"textcnn"``: convolutions of 3, 4, 5 words, ReLU, max over
    time, linear, ReLU (both as in MMIN, whose features the paper uses). ``"mlp"``: one vector per sample. Departure:
    MMIN takes the maximum over padded steps too, so that a sample's embedding depends on its batch; here only valid
    steps count.

    Args:
        name: the modality.
        in_width: feature width D.
        sequence: True for ``[B, L, D]`` input, False for ``[B, D]``.
        config: numbers of the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, in_width: int, sequence: bool, config: ADMCConfig) -> None:
        super().__init__()
        kind = encoder_kind(name, sequence, config)
        self.name, self.in_width, self.sequence, self.kind = name, in_width, sequence, kind
        self.register_buffer("mean", torch.zeros(in_width))
        self.register_buffer("std", torch.ones(in_width))
        self.encoder = _KINDS[kind](in_width, config)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings ``[B, width]`` of ``x [B, D]`` or ``[B, L, D]`` with true ``lengths [B]`` (default: all of L)."""
        if x.shape[-1] != self.in_width or x.ndim != 2 + self.sequence:
            expected = f"[B, L, {self.in_width}]" if self.sequence else f"[B, {self.in_width}]"
            raise ValueError(f"features[{self.name!r}]: got shape {list(x.shape)}, expected {expected}")
        # Widely scaled inputs (openSMILE, COVAREP) have outliers of hundreds of standard deviations.
        x = ((x - self.mean) / self.std).clamp(-10.0, 10.0)
        if self.sequence:
            if lengths is None:
                lengths = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
            # Padding is zero after standardising, not before: a text shorter than a kernel sees it.
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            x = x.masked_fill(~valid[..., None], 0.0)
        return self.encoder(x, lengths)


class UnimodalClassifier(nn.Module):
    """What ITFN trains for one modality: an encoder and a 2-layer classifier, ``[B, …] → [B, classes]`` logits."""

    def __init__(self, encoder: ModalityEncoder, n_classes: int, config: ADMCConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = Classifier(config.width, config.classifier_hidden, n_classes, config.encoder_dropout)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.classifier(self.encoder(x, lengths))
