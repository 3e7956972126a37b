"""The drop-in: features with holes in, completed embeddings out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modafill.data import Batch, FeatureStore
from modafill.data.patterns import check_available
from modafill.diffusion import Sampling
from modafill.models.admc import ADMC
from modafill.models.cdtp import CDTP
from modafill.models.config import ModelConfig
from modafill.models.pretrained import load_pretrained

if TYPE_CHECKING:
    from modafill.training import EpochDone


@dataclass(frozen=True)
class Imputation:
    """A completed batch.

    Attributes:
        embeddings: name → ``[B, D]`` of an ADMC, ``[B, L, d]`` of a CDTP: the encoder's embedding or the projected
            sequence where observed, the mean of the samples where generated.
        generated: bool ``[B, M]``, True where an embedding was generated.
        samples: name → ``[K, B, D]`` or ``[K, B, L, d]``.
        lengths: name → int64 ``[B]``, true lengths of sequences; empty for an ADMC.
    """

    embeddings: dict[str, Tensor]
    generated: Tensor
    samples: dict[str, Tensor]
    lengths: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def std(self) -> dict[str, Tensor]:
        """As ``embeddings``: standard deviation of the samples, 0 where observed; ValueError for a single sample."""
        if len(next(iter(self.samples.values()))) < 2:
            raise ValueError("std: a single sample has no spread, expected a call with n_samples of 2 or more")
        return {
            name: samples.std(0, correction=1).masked_fill(
                ~self.generated[:, m].view(-1, *[1] * (samples.ndim - 2)), 0.0
            )
            for m, (name, samples) in enumerate(self.samples.items())
        }


class ModalityImputer(nn.Module):
    """Generates the embeddings of missing modalities with a trained ADMC or CDTP.

    The model is frozen: it stays in evaluation mode, also as a part of a module that is being trained, its parameters
    want no gradient, and none flows through it to the features.

    Args:
        model: the trained system.
        steps: network evaluations for a completion (ADMC's ``"replace"``: the step it starts at).
        solver: ``"ddim"``, ``"dpm++"`` (DPM-Solver++(2M)) or ``"heun"``; none with ``"replace"``.
        dtype: of the weights in the diffusion network's products: bfloat16 or float16; what is denoised stays float32.
        chunk_size: completions that go through all steps at a time.

    Where one of them is None the model's configuration decides.
    """

    def __init__(
        self,
        model: ADMC | CDTP,
        *,
        steps: int | None = None,
        solver: str | None = None,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.sampling = Sampling(steps=steps, solver=solver, dtype=dtype, chunk_size=chunk_size)
        model.config.check_sampling(self.sampling)

    def __repr__(self) -> str:
        """One line, where a module would print every layer of the model."""
        kind, parameters = type(self.model).__name__, sum(p.numel() for p in self.model.parameters())
        return f"ModalityImputer({kind} of {', '.join(self.modalities)}; {parameters:,} parameters; {self.sampling})"

    def train(self, mode: bool = True) -> ModalityImputer:
        """As :meth:`torch.nn.Module.train`, but the model's dropout stays off."""
        super().train(mode)
        self.model.eval()
        return self

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: torch.device | str | None = None, **options: Any
    ) -> ModalityImputer:
        """Load a model folder, a run folder's ``fold…-seed…/model``, or a Hugging Face Hub id, onto ``device``.

        ``options`` are those of the class, such as ``steps=8``.
        """
        return cls(load_pretrained(path), **options).to(device)

    @classmethod
    def fit(
        cls,
        data: str | Path | FeatureStore,
        *,
        model: str = "admc",
        preset: str = "small",
        conditioning: str | None = None,
        config: ModelConfig | None = None,
        out: str | Path | None = None,
        seed: int = 0,
        mapping: str | None = None,
        progress: Callable[[EpochDone], None] = lambda done: None,
        **options: Any,
    ) -> ModalityImputer:
        """Train a model on labelled data, as ``modafill train``, and make an imputer of it.

        Args:
            data: a feature store or an ``.npz`` archive, or the path of one. It names a label, with which the encoders
                are trained.
            model: ``"admc"`` or ``"cdtp"``.
            preset: ``"small"`` (minutes on two CPU cores) or ``"paper"``.
            conditioning: of an ADMC: ``"clean"`` or ``"replace"`` (the paper); None = that of ``config``, else
                ``"clean"``.
            config: numbers of the model in place of the preset's.
            out: folder of the run, which goes on where it stopped; None trains in a temporary one.
            seed: of weights, order and noise.
            mapping: which array of an archive is what, as ``--mapping``.
            progress: called after each epoch.
            options: of the class, such as ``steps=8``.

        Raises:
            ValueError: no such model, preset or conditioning, or data that cannot be trained on.
        """
        # The only import upwards, where it is asked for.
        from modafill.training.run import TRAINERS, Run, train

        if model not in TRAINERS:
            raise ValueError(f"model: got {model!r}, expected one of {', '.join(TRAINERS)}")
        if config is not None and not isinstance(config, TRAINERS[model].CONFIG):
            raise ValueError(f"config: got {type(config).__name__}, expected {TRAINERS[model].CONFIG.__name__}")
        if conditioning is not None and model != "admc":
            raise ValueError(f"conditioning: got {conditioning!r}, expected None with model {model!r}")
        unknown = sorted(set(options) - {"device", "steps", "solver", "dtype", "chunk_size"})
        if unknown:
            raise TypeError(f"fit: got an unexpected option {unknown[0]!r}")
        numbers: Any = config or TRAINERS[model].CONFIG.preset(preset)
        if model == "admc":
            numbers = replace(numbers, conditioning=conditioning or (config and numbers.conditioning) or "clean")
        # Before minutes of training.
        numbers.check_sampling(Sampling(**{name: value for name, value in options.items() if name != "device"}))
        window = data.window if isinstance(data, FeatureStore) else None
        path = Path(data.path if isinstance(data, FeatureStore) else data)
        with tempfile.TemporaryDirectory() as scratch:
            run = Run(
                folder=Path(out or scratch).resolve(),
                model=model,
                data=str(path.resolve()),
                mapping=mapping,
                config=numbers,
                variants=(numbers.conditioning if model == "admc" else "full",),
                folds=1,
                seeds=(seed,),
                window=window,
            )
            train(run, progress)
            return cls.from_pretrained(run.part_folder(0, seed) / "model", **options)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` to the folder ``path``."""
        self.model.save_pretrained(path)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names, in the order of the columns of ``available`` and ``generated``."""
        return tuple(self.model.modalities)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of :meth:`recognise`'s columns; none for a model of scores."""
        return tuple(self.model.classes)

    @torch.no_grad()
    def forward(
        self,
        features: Mapping[str, Tensor | None],
        available: Tensor | None = None,
        lengths: Mapping[str, Tensor] | None = None,
        *,
        n_samples: int = 1,
        seed: int = 0,
        row_ids: Tensor | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Imputation:
        """Complete a batch.

        Args:
            features: name → ``[B, D]`` or ``[B, L, D]``; None or an absent name is missing in every row.
            available: bool ``[B, M]``, True = observed. Default: every modality given. Values that are not available
                are never read.
            lengths: name → int64 ``[B]``, true lengths of sequences. Default: all of L. Those of a modality that is not
                available are not read: it gets what the others' suggest (:meth:`CDTP.complete`).
            n_samples: K completions per row.
            seed, row_ids: the noise of a row depends on (seed, row id) alone. Ids in [0, 2⁴⁸); default 0…B−1.
            progress: called with the completions made so far and their number.

        Raises:
            TypeError: features that are no mapping, or no tensors.
            ValueError: an unknown modality, a wrong width, NaN or infinity in an observed feature, a row with nothing
                observed, an empty batch.
        """
        batch = self._batch(features, available, lengths, row_ids)
        return self.complete(batch, n_samples=n_samples, seed=seed, progress=progress)

    @torch.no_grad()
    def recognise(
        self,
        features: Mapping[str, Tensor | None],
        available: Tensor | None = None,
        lengths: Mapping[str, Tensor] | None = None,
        *,
        n_samples: int = 1,
        seed: int = 0,
        row_ids: Tensor | None = None,
    ) -> Tensor:
        """Class probabilities ``[B, classes]``, or scores ``[B]``, from the completed batch (ADMC §3.3, CDTP §3.5).

        Arguments and errors are those of calling the imputer. Where something is missing, probabilities are averaged
        over the ``n_samples`` completions.
        """
        batch = self._batch(features, available, lengths, row_ids)
        return self.model.recognise(batch, n_samples=n_samples, seed=seed, sampling=self.sampling)

    def _batch(
        self,
        features: Mapping[str, Tensor | None],
        available: Tensor | None,
        lengths: Mapping[str, Tensor] | None,
        row_ids: Tensor | None,
    ) -> Batch:
        if not isinstance(features, Mapping):
            raise TypeError(f"features: got {type(features).__name__}, expected a mapping from name to tensor")
        given = {name: x for name, x in features.items() if x is not None}
        unknown = sorted(set(features) - set(self.modalities))
        if unknown:
            raise ValueError(f"features: got unknown modality {unknown[0]!r}, expected {list(self.modalities)}")
        sequences = [name for name, spec in self.model.modalities.items() if spec.sequence]
        if lengths is not None and not isinstance(lengths, Mapping):
            raise TypeError(f"lengths: got {type(lengths).__name__}, expected a mapping from name to int64 tensor")
        for name, steps in (lengths or {}).items():
            if not isinstance(steps, Tensor):
                raise TypeError(f"lengths[{name!r}]: got {type(steps).__name__}, expected an int64 tensor [B]")
        unknown = sorted(set(lengths or {}) - set(sequences))
        if unknown:
            raise ValueError(f"lengths: got {unknown[0]!r}, expected names of sequence modalities, {sequences}")
        if not given:
            raise ValueError("features: got no modality at all, expected at least one")
        for name, x in given.items():
            spec = self.model.modalities[name]
            if not isinstance(x, Tensor):
                raise TypeError(f"features[{name!r}]: got {type(x).__name__}, expected a tensor (see torch.as_tensor)")
            spec.check(name, x)
        first = next(iter(given.values()))
        rows = torch.arange(len(first), device=first.device) if row_ids is None else row_ids
        present = torch.tensor([name in given for name in self.modalities], device=first.device)
        if available is None:
            available = present.expand(len(first), -1).clone()
        check_available("available", available, (len(first), len(present)))
        if bool((available & ~present).any()):
            absent = [n for n, a, p in zip(self.modalities, available.any(0), present, strict=True) if a and not p]
            raise ValueError(f"available: marks {absent[0]!r} as observed, but features has no such tensor")
        dtype = next(self.parameters()).dtype
        full, full_lengths = {}, {}
        for name, spec in self.model.modalities.items():
            shape = (len(first), 1, spec.width) if spec.sequence else (len(first), spec.width)
            full[name] = given[name].to(dtype) if name in given else first.new_zeros(shape, dtype=dtype)
            if spec.sequence:
                steps = torch.full((len(first),), full[name].shape[1], dtype=torch.int64, device=first.device)
                full_lengths[name] = (lengths or {}).get(name, steps) if name in given else steps
        return Batch(full, available, rows, full_lengths)

    @torch.no_grad()
    def complete(
        self,
        batch: Batch,
        *,
        n_samples: int = 1,
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Imputation:
        """As calling the imputer, for a :class:`~modafill.data.Batch`."""
        done = self.model.impute(batch, n_samples=n_samples, seed=seed, sampling=self.sampling, progress=progress)
        return Imputation(done.mean(batch.available), ~batch.available, done.samples, done.lengths)
