"""ADMC assembled: encoders, diffusion network, a fusion network per pattern, enhancement (ADMC Fig. 2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from modafill.data import Batch, all_patterns, pattern_index
from modafill.diffusion import Sampling
from modafill.models.admc.adn import ADN
from modafill.models.admc.config import ADMCConfig
from modafill.models.admc.encoders import ModalityEncoder, UnimodalClassifier
from modafill.models.admc.fusion import Fusion
from modafill.models.completed import Completed, ModalitySpec
from modafill.models.folder import find_folder, load_weights, read_config, save_folder


class TokenScaler(nn.Module):
    """Per-modality standardisation of embeddings ``[B, M, D]``, fitted on the training part.

    The paper is silent, but the diffusion step at which a token drowns in noise depends on its scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, n_modalities: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_modalities, width))
        self.register_buffer("std", torch.ones(n_modalities, width))

    def fit(self, embeddings: Tensor, available: Tensor, scale: float) -> None:
        """Take mean and standard deviation over observed rows; the result has standard deviation ``scale``."""
        for m in range(embeddings.shape[1]):
            rows = embeddings[available[:, m], m].to(torch.float64)
            if len(rows) == 0:
                raise ValueError(f"embeddings: modality {m} is never observed, expected at least one training row")
            std = rows.std(0, correction=0)
            # A unit that never fires carries nothing: leave it at zero instead of dividing by nothing.
            std = torch.where(std > 1e-6 * std.max().clamp(min=1e-12), std, torch.ones_like(std))
            self.mean[m] = rows.mean(0).to(torch.float32)
            self.std[m] = (std / scale).to(torch.float32)

    def forward(self, embeddings: Tensor) -> Tensor:
        return (embeddings - self.mean) / self.std

    def inverse(self, tokens: Tensor) -> Tensor:
        """Embeddings of standardised tokens."""
        return tokens * self.std + self.mean


class ADMC(nn.Module):
    """The whole system of the paper as one module.

    Args:
        modalities: name → :class:`ModalitySpec`, in the order of the tokens.
        n_classes: classes to recognise.
        config: numbers of the model.
        classes: names of the classes, for people.
        window: turns per sample, where the sequences it was trained on are windows of turns; None where they are not.
    """

    def __init__(
        self,
        modalities: dict[str, ModalitySpec],
        n_classes: int,
        config: ADMCConfig,
        classes: list[str] | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"modalities: got {list(modalities)}, expected at least two")
        self.modalities = dict(modalities)
        self.n_classes, self.config, self.window = n_classes, config, window
        self.classes = classes or [str(c) for c in range(n_classes)]
        self.unimodal = nn.ModuleDict(
            {
                name: UnimodalClassifier(ModalityEncoder(name, m.width, m.sequence, config), n_classes, config)
                for name, m in modalities.items()
            }
        )
        count = len(modalities)
        self.scaler = TokenScaler(count, config.width)
        self.adn = ADN(count, config)
        self.fusions = nn.ModuleList(Fusion(count, n_classes, config) for _ in range(len(all_patterns(count)) - 1))
        self.enhanced = Fusion(count, n_classes, config, in_width=2 * config.width)

    def encoder(self, modality: str) -> ModalityEncoder:
        """The encoder of a modality."""
        return cast(UnimodalClassifier, self.unimodal[modality]).encoder

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings ``[B, M, D]``; features of missing modalities are never read, their embeddings are zero."""
        embeddings = self.scaler.mean.new_zeros(len(batch), len(self.modalities), self.config.width)
        for m, name in enumerate(self.modalities):
            rows = batch.available[:, m].nonzero().flatten()
            if len(rows):
                lengths = batch.lengths.get(name)
                embeddings[rows, m] = self.encoder(name)(
                    batch.features[name][rows], None if lengths is None else lengths[rows]
                )
        return embeddings

    def check(self, batch: Batch) -> None:
        """Raise ValueError unless the model can read ``batch`` (:meth:`modafill.data.Batch.validate`)."""
        batch.validate({name: spec.width for name, spec in self.modalities.items()})
        for name, spec in self.modalities.items():
            spec.check(name, batch.features[name])

    def encode(self, batch: Batch) -> Tensor:
        """Standardised tokens ``[B, M, D]``, zero where missing; a bad batch raises ValueError."""
        self.check(batch)
        return torch.where(batch.available[..., None], self.scaler(self.embed(batch)), 0.0)

    @torch.no_grad()
    def enhance(
        self, tokens: Tensor, *, seed: int = 0, row_id: Tensor | None = None, sampling: Sampling = Sampling()
    ) -> Tensor:
        """MMER's tokens ``[B, M, 2D]``: each modality beside its generation from all the others (eq. 5)."""
        count = tokens.shape[1]
        generated = torch.empty_like(tokens)
        for m in range(count):
            others = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            others[:, m] = False
            generated[:, m] = self.adn.sample(tokens, others, seed=seed, row_id=row_id, sampling=sampling)[0, :, m]
        return torch.cat([tokens, generated], dim=-1)

    @torch.no_grad()
    def impute(
        self,
        batch: Batch,
        *,
        n_samples: int = 1,
        seed: int = 0,
        sampling: Sampling = Sampling(),
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Completed:
        """Embeddings ``[B, D]`` of each modality, K times; what is missing is generated."""
        self.check(batch)
        embeddings = self.embed(batch)
        samples = self.adn.sample(
            self.scaler(embeddings),
            batch.available,
            n_samples=n_samples,
            seed=seed,
            row_id=batch.row_id,
            sampling=sampling,
            progress=progress,
        )
        samples = torch.where(batch.available[..., None], embeddings, self.scaler.inverse(samples))
        return Completed(
            {name: embeddings[:, m] for m, name in enumerate(self.modalities)},
            {name: samples[:, :, m] for m, name in enumerate(self.modalities)},
        )

    @torch.no_grad()
    def recognise(self, batch: Batch, *, n_samples: int = 1, seed: int = 0, sampling: Sampling = Sampling()) -> Tensor:
        """Class probabilities ``[B, classes]``: MMCR with each row's own fusion network, MMER where nothing is missing.

        Where something is missing, probabilities are averaged over ``n_samples`` completions; MMER reads one. Call it
        in evaluation mode: in training mode dropout is drawn from torch's generator.
        """
        tokens = self.encode(batch)
        pattern = pattern_index(batch.available)
        out = tokens.new_zeros(len(tokens), self.n_classes)
        completed = self.adn.sample(
            tokens, batch.available, n_samples=n_samples, seed=seed, row_id=batch.row_id, sampling=sampling
        )
        for index in pattern.unique().tolist():
            rows = (pattern == index).nonzero().flatten()
            if index == len(self.fusions):
                enhanced = self.enhance(tokens[rows], seed=seed, row_id=batch.row_id[rows], sampling=sampling)
                out[rows] = self.enhanced(enhanced).softmax(-1)
            else:
                logits = self.fusions[index](completed[:, rows].flatten(0, 1))
                out[rows] = logits.softmax(-1).reshape(n_samples, len(rows), -1).mean(0)
        return out

    def save_pretrained(self, path: str | Path, **about: Any) -> None:
        """Write ``config.json`` and ``model.safetensors`` to the folder ``path``; ``about`` goes into the former."""
        config = {
            "model": "admc",
            "modalities": {name: {"width": m.width, "sequence": m.sequence} for name, m in self.modalities.items()},
            "n_classes": self.n_classes,
            "classes": self.classes,
            "window": self.window,
            "config": self.config.to_dict(),
            **about,
        }
        save_folder(Path(path), self, config)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ADMC:
        """Load a folder written by :meth:`save_pretrained`, or a Hugging Face Hub id, in evaluation mode."""
        folder = find_folder(path)
        config = read_config(folder)
        if config.get("model") != "admc":
            raise ValueError(f"{folder}: holds the model {config.get('model')!r}, expected 'admc'")
        try:
            modalities = {name: ModalitySpec(**spec) for name, spec in config["modalities"].items()}
            numbers = ADMCConfig.from_dict(config["config"])
            with init_empty_weights():
                model = cls(modalities, config["n_classes"], numbers, config["classes"], config["window"])
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{folder / 'config.json'}: not the description of an ADMC ({error!r})") from error
        load_weights(folder / "model.safetensors", model)
        return model.eval()
