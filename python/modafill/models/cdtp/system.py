"""CDTP assembled: conditional diffusion, prompts and MulT (CDTP Fig. 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modafill.data import Batch, pattern_index
from modafill.models.cdtp.backbone import MulT
from modafill.models.cdtp.completion import TimeMaps
from modafill.models.cdtp.config import CDTPConfig, SequenceSpec
from modafill.models.cdtp.diffusion import ConditionalDiffusion
from modafill.models.cdtp.prompts import Prompts
from modafill.models.cdtp.stacked import StackedLinear, valid_mask


@dataclass(frozen=True)
class Sequences:
    """A batch as the model reads it: per modality projected ``x [B, L, d]`` at its full length L, and true lengths."""

    x: list[Tensor]
    lengths: list[Tensor]
    available: Tensor
    row_id: Tensor


class CDTP(nn.Module):
    """The whole system of the paper as one module.

    Args:
        modalities: name → :class:`SequenceSpec`, in the order of the columns of ``available``.
        outputs: classes, or 1 for regression.
        config: numbers of the model.

    Raises:
        ValueError: less than two modalities, or heads of the self-attention encoders that would be too wide.
    """

    def __init__(self, modalities: dict[str, SequenceSpec], outputs: int, config: CDTPConfig) -> None:
        super().__init__()
        count = len(modalities)
        if count < 2:
            raise ValueError(f"modalities: got {list(modalities)}, expected at least two")
        if (count - 1) * config.width // config.heads > 128:
            raise ValueError(
                f"width: got {config.width} with {config.heads} heads and {count} modalities, expected at most"
                f" {128 * config.heads // (count - 1)}: self-attention heads are at most 128 wide"
            )
        self.modalities, self.outputs, self.config = dict(modalities), outputs, config
        self.lengths = tuple(spec.length for spec in modalities.values())
        self.backbone = MulT(modalities, outputs, config)
        appended = config.type_prompt == "append"
        self.prompts = Prompts(
            self.lengths,
            config.width,
            config.prompt_length,
            (count - 1) * config.width if appended else config.prompt_length,
        )
        self.diffusion = ConditionalDiffusion(self.lengths, config) if config.completion == "diffusion" else None
        pairs = self.backbone.pairs
        self.channel_maps = (
            StackedLinear(len(pairs), config.width, config.width) if config.completion == "linear" else None
        )
        self.maps: TimeMaps | None = None
        if config.completion != "none":
            made = {(t, s): self.lengths[t if config.completion == "diffusion" else s] for t, s in pairs}
            self.maps = TimeMaps(self.lengths, made, config.prompt_length if config.generative_prompt else 0)

    def project(self, batch: Batch) -> Sequences:
        """The batch at full lengths; what is not available is never read and comes out as zeros of length 0."""
        features, lengths = [], []
        for m, (name, spec) in enumerate(self.modalities.items()):
            x, seen = batch.features[name], batch.available[:, m]
            x = x if x.ndim == 3 else x[:, None]
            if x.shape[1] > spec.length:
                raise ValueError(f"features[{name!r}]: got length {x.shape[1]}, expected at most {spec.length}")
            x = torch.where(seen[:, None, None], x, 0.0)
            features.append(nn.functional.pad(x, (0, 0, 0, spec.length - x.shape[1])))
            lengths.append(torch.where(seen, batch.lengths.get(name, torch.ones_like(batch.row_id)), 0))
        return Sequences(self.backbone.project(features, lengths), lengths, batch.available, batch.row_id)

    def complete(
        self, given: Sequences, *, seed: int = 0, sampling_steps: int | None = None, eta: float | None = None
    ) -> Sequences:
        """What is missing generated from what is available, and missing-signal prompts added to all (§3.4).

        Generated sequences are constants for the task's gradient, which trains what maps them to the target, not the
        denoisers. They get the length that the available ones suggest: the longest of their lengths, each scaled by the
        ratio of the longest sequences of both modalities.

        Args:
            given: from :meth:`project`.
            seed, sampling_steps, eta: as in :meth:`ConditionalDiffusion.generate`.
        """
        available, x = given.available, list(given.x)
        missing = bool((~available).any())
        lengths = self._lengths(given) if missing and self.maps is not None else list(given.lengths)
        if missing and self.maps is not None:
            made = self._generate(given, lengths, seed, sampling_steps, eta)
            pattern = pattern_index(available)
            for index in pattern.unique().tolist():
                seen = self.prompts.patterns[index].tolist()
                rows = (pattern == index).nonzero().flatten()
                sources = [m for m, there in enumerate(seen) if there]
                for target in (m for m, there in enumerate(seen) if not there):
                    prompt = self.prompts.generative[target] if self.config.generative_prompt else None
                    filled = self.maps(target, sources, prompt, [made[target, s][rows] for s in sources])
                    x[target] = x[target].index_copy(0, rows, filled)
        if self.config.signal_prompt:
            x = [
                v + signal[available[:, m].long()]
                for m, (v, signal) in enumerate(zip(x, self.prompts.signal, strict=True))
            ]
        x = [torch.where(valid_mask(n, v.shape[1])[..., None], v, 0.0) for v, n in zip(x, lengths, strict=True)]
        return Sequences(x, lengths, available, given.row_id)

    def _lengths(self, given: Sequences) -> list[Tensor]:
        out = []
        for m, longest in enumerate(self.lengths):
            suggested = [
                (n * longest + other - 1) // other for n, other in zip(given.lengths, self.lengths, strict=True)
            ]
            out.append(torch.where(given.available[:, m], given.lengths[m], torch.stack(suggested).amax(0)))
        return out

    def _generate(
        self, given: Sequences, lengths: list[Tensor], seed: int, sampling_steps: int | None, eta: float | None
    ) -> dict[tuple[int, int], Tensor]:
        if self.diffusion is not None:
            return self.diffusion.generate(
                given.x,
                lengths,
                given.available,
                seed=seed,
                row_id=given.row_id,
                sampling_steps=sampling_steps,
                eta=eta,
            )
        assert self.channel_maps is not None
        pairs, out = self.backbone.pairs, {}
        for i, (target, source) in enumerate(pairs):
            out[target, source] = nn.functional.gelu(self.channel_maps(given.x[source][None], slice(i, i + 1))[0])
        return out

    def recognise(self, completed: Sequences) -> Tensor:
        """``[B, outputs]`` of completed sequences."""
        kind, mode = self.config.type_prompt, pattern_index(completed.available)
        return self.backbone.fuse(
            completed.x,
            completed.lengths,
            biases=self.prompts.biases(self.lengths) if kind == "bias" else None,
            appended=list(self.prompts.types().unbind(1)) if kind == "append" else None,
            mode=mode if kind != "none" else None,
        )

    def forward(
        self, batch: Batch, *, seed: int = 0, sampling_steps: int | None = None, eta: float | None = None
    ) -> Tensor:
        """Logits or values ``[B, outputs]``; what ``batch`` lacks is generated first. Complete samples bypass that."""
        completed = self.complete(self.project(batch), seed=seed, sampling_steps=sampling_steps, eta=eta)
        return self.recognise(completed)
