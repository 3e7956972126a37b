"""CDTP assembled: conditional diffusion, prompts and MulT (CDTP Fig. 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from modafill.data import Batch, pattern_index
from modafill.diffusion.samplers import SAMPLE_SHIFT, Sampling, check_samples, sample_row_ids
from modafill.models.cdtp.backbone import MulT
from modafill.models.cdtp.completion import TimeMaps
from modafill.models.cdtp.config import CDTPConfig, SequenceSpec
from modafill.models.cdtp.diffusion import ConditionalDiffusion
from modafill.models.cdtp.prompts import Prompts
from modafill.models.cdtp.stacked import StackedLinear, valid_mask
from modafill.models.completed import Completed
from modafill.models.folder import find_folder, load_weights, read_config, save_folder
from modafill.ops.prompt_attention import MAX_LENGTH, MAX_WIDTH

Pairs = dict[tuple[int, int], Tensor]
# Draws of fewer rows go through the networks together.
_ROWS_AT_A_TIME = 256
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sequences:
    """A batch as the model reads it: per modality projected ``x [B, L, d]`` at its full length L, and true lengths."""

    x: list[Tensor]
    lengths: list[Tensor]
    available: Tensor
    row_id: Tensor

    def hide(self, available: Tensor) -> Sequences:
        """Without what is not in ``available [B, M]``; the same bits as if it had been hidden before the projection."""
        seen = self.available & available
        x = [torch.where(seen[:, m, None, None], v, 0.0) for m, v in enumerate(self.x)]
        lengths = [torch.where(seen[:, m], n, 0) for m, n in enumerate(self.lengths)]
        return Sequences(x, lengths, seen, self.row_id)

    def repeat(self, row_ids: Tensor) -> Sequences:
        """The batch once for each of ``row_ids [K, B]``, one behind the other."""
        count = len(row_ids)
        x, lengths = ([t.expand(count, *t.shape).flatten(0, 1) for t in tensors] for tensors in (self.x, self.lengths))
        available = self.available.expand(count, *self.available.shape).flatten(0, 1)
        return Sequences(x, lengths, available, row_ids.flatten())

    def to(self, device: torch.device | str) -> Sequences:
        """The same on another device."""
        x, lengths = ([t.to(device) for t in tensors] for tensors in (self.x, self.lengths))
        return Sequences(x, lengths, self.available.to(device), self.row_id.to(device))


class CDTP(nn.Module):
    """The whole system of the paper as one module.

    Departures: what is noised and denoised is the projected target (eq. 4); §3.4 also speaks of noising the encoded
    condition, which stays clean here, because it is what is known. Every sequence is padded to the longest of its
    modality in the data, because the maps over time need one length.

    Args:
        modalities: name → :class:`SequenceSpec`, in the order of the columns of ``available``.
        outputs: classes, or 1 for regression.
        config: numbers of the model.
        classes: names of the classes, for people; none in regression.
        window: turns per sample, where the sequences it was trained on are windows of turns; None where they are not.

    Raises:
        ValueError: names of other than ``outputs`` classes, or sizes that cannot be (:func:`check_sizes`).
    """

    def __init__(
        self,
        modalities: dict[str, SequenceSpec],
        outputs: int,
        config: CDTPConfig,
        classes: list[str] | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if classes and len(classes) != outputs:
            raise ValueError(f"classes: got {len(classes)} names, expected {outputs} or none")
        check_sizes(modalities, config)
        count = len(modalities)
        self.modalities, self.outputs, self.config = dict(modalities), outputs, config
        self.classes, self.window = list(classes or []), window
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
            spec.check(name, x)
            x = x if x.ndim == 3 else x[:, None]
            x = torch.where(seen[:, None, None], x, 0.0)
            features.append(nn.functional.pad(x, (0, 0, 0, spec.length - x.shape[1])))
            if spec.sequence and name not in batch.lengths:
                raise ValueError(f"lengths[{name!r}]: got no lengths, expected an int64 [{len(batch)}]")
            steps = batch.lengths[name] if spec.sequence else torch.ones_like(batch.row_id)
            lengths.append(torch.where(seen, steps, 0))
        return Sequences(self.backbone.project(features, lengths), lengths, batch.available, batch.row_id)

    @torch.no_grad()
    def generate(self, given: Sequences, *, seed: int = 0, sampling: Sampling = Sampling()) -> Pairs:
        """x̂_{target←source} of each missing target of a sample from each available source, by diffusion (eq. 8–9).

        They are constants for the task's gradient, which trains what maps them to the target, not the denoisers.

        Args:
            given: from :meth:`project`.
            seed, sampling: as in :meth:`ConditionalDiffusion.generate`.

        Returns:
            (target, source) → ``[B, L, d]``; empty where nothing is missing or the completion is no diffusion.
        """
        if self.diffusion is None or not bool((~given.available).any()):
            return {}
        self.config.check_sampling(sampling)
        device = given.available.device.type
        with torch.autocast(device, sampling.dtype) if sampling.dtype in _HALVES else nullcontext():
            return self.diffusion.generate(
                given.x,
                self.suggested_lengths(given),
                given.available,
                seed=seed,
                row_id=given.row_id,
                sampling=sampling,
            )

    def complete(self, given: Sequences, generated: Pairs) -> Sequences:
        """What is missing from the ``generated`` pairs and prompts, and missing-signal prompts added to all (§3.4).

        Missing sequences get the length that the available ones suggest: the longest of their lengths, each scaled by
        the ratio of the longest sequences of both modalities.
        """
        available, x, lengths = given.available, list(given.x), list(given.lengths)
        if self.maps is not None and bool((~available).any()):
            lengths = self.suggested_lengths(given)
            made = self._mapped(given) if self.channel_maps is not None else generated
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

    def suggested_lengths(self, given: Sequences) -> list[Tensor]:
        """True lengths ``[B]`` of what is available, and those that :meth:`complete` gives to what is missing.

        Modalities of one step say nothing of length: they count where nothing else is there, and then suggest all.
        """
        timed = torch.tensor([length > 1 for length in self.lengths], device=given.available.device)
        any_timed = (given.available & timed).any(1)
        out = []
        for m, longest in enumerate(self.lengths):
            ends = zip(given.lengths, self.lengths, strict=True)
            suggested = torch.stack([(n * longest + other - 1) // other for n, other in ends], dim=1)
            suggested = torch.where(any_timed[:, None] & ~timed, 0, suggested).amax(1)
            out.append(torch.where(given.available[:, m], given.lengths[m], suggested))
        return out

    def _mapped(self, given: Sequences) -> Pairs:
        """MPLMM's first stage: a linear map over channels, 0 behind the source's end."""
        assert self.channel_maps is not None
        made = {}
        for i, (target, source) in enumerate(self.backbone.pairs):
            x = given.x[source]
            mapped = nn.functional.gelu(self.channel_maps(x[None], slice(i, i + 1))[0])
            made[target, source] = torch.where(valid_mask(given.lengths[source], x.shape[1])[..., None], mapped, 0.0)
        return made

    def predict(self, completed: Sequences) -> Tensor:
        """``[B, outputs]`` of completed sequences."""
        kind, mode = self.config.type_prompt, pattern_index(completed.available)
        return self.backbone.fuse(
            completed.x,
            completed.lengths,
            biases=self.prompts.biases(self.lengths) if kind == "bias" else None,
            appended=list(self.prompts.types().unbind(1)) if kind == "append" else None,
            mode=mode if kind != "none" else None,
        )

    def forward(self, batch: Batch, *, seed: int = 0, sampling: Sampling = Sampling()) -> Tensor:
        """Logits or values ``[B, outputs]``; what ``batch`` lacks is generated first. Complete samples bypass that."""
        given = self.project(batch)
        generated = self.generate(given, seed=seed, sampling=sampling)
        return self.predict(self.complete(given, generated))

    def check(self, batch: Batch) -> None:
        """Raise ValueError unless the model can read ``batch`` (:meth:`modafill.data.Batch.validate`)."""
        batch.validate({name: spec.width for name, spec in self.modalities.items()})
        for name, spec in self.modalities.items():
            spec.check(name, batch.features[name])

    def samples(
        self, given: Sequences, n_samples: int, *, seed: int = 0, sampling: Sampling = Sampling()
    ) -> Iterator[Pairs]:
        """K draws of :meth:`generate`; the first ones stay the same when K grows."""
        size = len(given.row_id)
        for count, _, generated in self._draws(given, n_samples, seed, sampling):
            for at in range(0, count * size, size):
                yield {pair: made[at : at + size] for pair, made in generated.items()}

    def _draws(
        self, given: Sequences, n_samples: int, seed: int, sampling: Sampling
    ) -> Iterator[tuple[int, Sequences, Pairs]]:
        """K draws of :meth:`generate`, several at a time: how many, the batch as often, and what was drawn."""
        pairs = len(self.backbone.pairs)
        if n_samples * pairs >= 1 << (63 - SAMPLE_SHIFT):
            raise ValueError(f"n_samples: got {n_samples}, expected at most {(1 << (63 - SAMPLE_SHIFT)) // pairs - 1}")
        ids = sample_row_ids(given.row_id, n_samples).view(n_samples, len(given.row_id))
        for some in ids.split(max(1, (sampling.chunk_size or _ROWS_AT_A_TIME) // len(given.row_id))):
            drawn = given.repeat(some)
            yield len(some), drawn, self.generate(drawn, seed=seed, sampling=sampling)

    def fill(self, given: Sequences, generated: Pairs, draw: int) -> Sequences:
        """What is missing as it was generated from one source, without prompts or maps.

        Sample ``draw`` of a row takes the (row id + draw)-th of its sources, so that K samples take each about equally
        often: together they are draws from the mixture of what the sources tell.
        """
        count = given.available.sum(1)
        turn = (given.row_id + draw) % count
        # The number of each available modality among those of its row.
        rank = given.available.cumsum(1) - 1
        x = list(given.x)
        for target in range(len(x)):
            for source in range(len(x)):
                if (target, source) in generated:
                    chosen = ~given.available[:, target] & given.available[:, source] & (rank[:, source] == turn)
                    x[target] = torch.where(chosen[:, None, None], generated[target, source], x[target])
        return Sequences(x, self.suggested_lengths(given), given.available, given.row_id)

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
        """Projected sequences ``[B, L, d]`` of each modality, K times; each sample is generated from one source.

        Raises:
            ValueError: a bad batch, or a model without diffusion.
        """
        if self.diffusion is None:
            raise ValueError(f"completion: got {self.config.completion!r}, expected 'diffusion' to impute with")
        self.check(batch)
        given, names = self.project(batch), list(self.modalities)
        drawn = []
        for draw, generated in enumerate(self.samples(given, n_samples, seed=seed, sampling=sampling)):
            drawn.append(self.fill(given, generated, draw).x)
            progress((draw + 1) * len(batch), n_samples * len(batch))
        return Completed(
            dict(zip(names, given.x, strict=True)),
            {name: torch.stack([sample[m] for sample in drawn]) for m, name in enumerate(names)},
            dict(zip(names, self.suggested_lengths(given), strict=True)),
        )

    @torch.no_grad()
    def recognise(self, batch: Batch, *, n_samples: int = 1, seed: int = 0, sampling: Sampling = Sampling()) -> Tensor:
        """Class probabilities ``[B, classes]``, or scores ``[B]``, averaged over ``n_samples`` completions.

        Call it in evaluation mode: in training mode dropout is drawn from torch's generator.
        """
        self.check(batch)
        check_samples(n_samples)
        given, answers = self.project(batch), []
        if self.diffusion is None or bool(given.available.all()):
            n_samples = 1  # every sample is the same
        for count, drawn, generated in self._draws(given, n_samples, seed, sampling):
            said = self.predict(self.complete(drawn, generated))
            answer = said[:, 0] if self.outputs == 1 else said.softmax(-1)
            answers.append(answer.unflatten(0, (count, len(batch))))
        return torch.cat(answers).mean(0)

    def save_pretrained(self, path: str | Path, **about: Any) -> None:
        """Write ``config.json`` and ``model.safetensors`` to the folder ``path``; ``about`` goes into the former."""
        config = {
            "model": "cdtp",
            "modalities": {name: asdict(spec) for name, spec in self.modalities.items()},
            "outputs": self.outputs,
            "classes": self.classes,
            "window": self.window,
            "config": self.config.to_dict(),
            **about,
        }
        save_folder(Path(path), self, config)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> CDTP:
        """Load a folder written by :meth:`save_pretrained`, or a Hugging Face Hub id, in evaluation mode."""
        folder = find_folder(path)
        config = read_config(folder)
        if config.get("model") != "cdtp":
            raise ValueError(f"{folder}: holds the model {config.get('model')!r}, expected 'cdtp'")
        try:
            modalities = {name: SequenceSpec(**spec) for name, spec in config["modalities"].items()}
            numbers = CDTPConfig.from_dict(config["config"])
            with init_empty_weights():
                model = cls(modalities, config["outputs"], numbers, config["classes"], config["window"])
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{folder / 'config.json'}: not the description of a CDTP ({error!r})") from error
        load_weights(folder / "model.safetensors", model)
        return model.eval()


def check_sizes(modalities: dict[str, SequenceSpec], config: CDTPConfig) -> None:
    """Raise ValueError where a CDTP of these sizes cannot be."""
    count, longest = len(modalities), max((spec.length for spec in modalities.values()), default=0)
    if count < 2:
        raise ValueError(f"modalities: got {list(modalities)}, expected at least two")
    if (count - 1) * config.width // config.heads > MAX_WIDTH:
        raise ValueError(
            f"width: got {config.width} with {config.heads} heads and {count} modalities, expected at most"
            f" {MAX_WIDTH * config.heads // (count - 1)}: self-attention heads are at most {MAX_WIDTH} wide"
        )
    if config.type_prompt == "bias" and longest == 1:
        raise ValueError(
            "type_prompt: got 'bias' for modalities of one step each, expected sequences (windows of a dialogue's"
            " turns, `--window`), or 'append' or 'none': over one key the softmax is 1, whatever is added to its logit"
        )
    most = MAX_LENGTH - config.prompt_length * (config.type_prompt == "append")
    if longest > most:
        raise ValueError(f"modalities: got sequences of {longest} steps, expected at most {most}")
