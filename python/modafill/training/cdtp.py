"""CDTP's training: a backbone on what is there, the denoisers, then prompts and backbone with missing modalities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modafill.data import Batch, FeatureStore, Labels, Standardizer, random_available
from modafill.files import derive_seed
from modafill.models.cdtp import CDTP, VARIANTS, CDTPConfig, ConditionalDiffusion, Sequences, SequenceSpec
from modafill.models.cdtp.backbone import Projection
from modafill.models.cdtp.stacked import valid_mask
from modafill.models.cdtp.system import Pairs, check_sizes
from modafill.training.loop import Stage
from modafill.training.part import PartTrainer, check_rows

EVALUATION_BATCH = 256


class CDTPTrainer(PartTrainer):
    """Trains CDTP and its ablations, ``variants`` of :data:`modafill.models.cdtp.VARIANTS`.

    Stages: the plain backbone on whatever modalities each row really has; the denoisers on its frozen projections, from
    rows that have both ends of a pair; each variant from both, with modalities hidden at random, its projections and
    denoisers frozen (``training="two-stage"``) or trained along on task loss + λ diffusion loss (``"joint"``). Variants
    get the same order of rows, patterns and noise. Departures: the learning rate decays over the second half of the
    epochs, and gradients are clipped at norm 1, as in ADMC's training; the paper names neither.
    """

    CONFIG: ClassVar = CDTPConfig
    VARIANTS: ClassVar = tuple(VARIANTS)

    config: CDTPConfig

    def _build(self) -> None:
        self.specs = sequence_specs(self.store)
        self.plain = self._new("plain", "backbone")
        self.models = {variant: self._new(variant, "variants") for variant in self.variants}
        self.joint = self.config.training == "joint"

    @classmethod
    def check(cls, store: FeatureStore, labels: Labels, config: CDTPConfig, variants: tuple[str, ...]) -> None:
        """Raise ValueError for a size of the model that these sequences cannot have."""
        for variant in variants:
            check_sizes(sequence_specs(store), replace(config, **VARIANTS[variant]))

    def _new(self, variant: str, name: str) -> CDTP:
        torch.manual_seed(derive_seed(self.seed, name, "weights"))
        config = replace(self.config, **VARIANTS[variant])
        outputs = 1 if self.labels.regression else self.labels.n_classes
        return CDTP(self.specs, outputs, config, list(self.labels.class_names), self.store.window).to(self.device)

    @property
    def diffusing(self) -> list[CDTP]:
        """The variants whose completion is diffusion."""
        return [model for model in self.models.values() if model.diffusion is not None]

    @property
    def n_stages(self) -> int:
        return 1 + bool(self.diffusing and not self.joint) + len(self.variants)

    def run(self) -> None:
        self.train_backbone()
        if self.diffusing and not self.joint:
            self.train_diffusion()
        for variant in self.variants:
            self.train_variant(variant)
        if self.accelerator.is_main_process and not (self.folder / "model").is_dir():
            self.models[self.variants[0]].save_pretrained(self.folder / "model", seed=self.seed)

    def train_backbone(self) -> None:
        """MulT without prompts, on what each row has: what is frozen where a classifier of complete data is asked."""
        statistics = Standardizer.fit(self.store, self.split.train)
        for model in (self.plain, *self.models.values()):
            for module in model.backbone.projections:
                projection = cast(Projection, module)
                std = statistics.std[projection.name]
                projection.mean.copy_(statistics.mean[projection.name])
                projection.std.copy_(torch.where(std > 0, std, torch.inf))
        model = self.plain

        def loss(wrapped: nn.Module, batch: Batch, epoch: int) -> Tensor:
            return self.task_loss(wrapped(batch), batch.row_id)

        def validate() -> float:
            return self._validation_loss(lambda batch: model(batch))

        self._train("backbone", model, loss, self.config.epochs, validate)

    def train_diffusion(self) -> None:
        """The denoisers, on frozen projections (eq. 5); every variant that diffuses gets the same."""
        torch.manual_seed(derive_seed(self.seed, "diffusion", "weights"))
        diffusion = ConditionalDiffusion(self.plain.lengths, self.config).to(self.device)
        self._fit_scales(diffusion, self.plain)
        steps = self._steps(diffusion, "diffusion")

        def loss(wrapped: nn.Module, batch: Batch, epoch: int) -> Tensor:
            with torch.no_grad():
                given = self.plain.project(batch)
            return self._diffusion_loss(diffusion, given, steps, "diffusion", epoch)

        epochs, rate, decay = self.config.diffusion_epochs, self.config.diffusion_learning_rate, self.config.ema_decay

        self._train(
            "diffusion",
            diffusion,
            loss,
            epochs,
            learning_rate=rate,
            ema_decay=decay,
            weight=lambda batch, epoch: self._target_steps(batch),
        )
        for model in self.diffusing:
            cast(ConditionalDiffusion, model.diffusion).load_state_dict(diffusion.state_dict())

    def train_variant(self, variant: str) -> None:
        """Prompts, maps and backbone, each row with a pattern of its own in each epoch."""
        model, name, frozen = self.models[variant], f"variant-{variant}", not self.joint
        model.backbone.load_state_dict(self.plain.backbone.state_dict())
        diffusion = model.diffusion
        if frozen:
            model.backbone.projections.requires_grad_(False)
            if diffusion is not None:
                diffusion.requires_grad_(False)
        steps = None if diffusion is None or frozen else self._steps(diffusion, "variants")

        def project(batch: Batch) -> Sequences:
            if not frozen:
                return model.project(batch)
            # The same projections in evaluation mode: the denoisers know them without dropout.
            with torch.no_grad():
                return self.plain.project(batch)

        def pattern(row_id: Tensor, available: Tensor, draw: int, drop_rate: float) -> Tensor:
            seed = derive_seed(self.seed, "variants", "patterns")
            return random_available(
                row_id, len(self.names), seed=seed, draw=draw, drop_rate=drop_rate, available=available
            )

        def loss(wrapped: nn.Module, batch: Batch, epoch: int) -> Tensor:
            whole = project(batch)
            given = whole.hide(pattern(batch.row_id, batch.available, epoch, self.config.drop_rate))
            generated = model.generate(given, seed=derive_seed(self.seed, "variants", "noise", epoch))
            task = self.task_loss(model.predict(model.complete(given, generated)), batch.row_id)
            if steps is None:
                return task
            assert diffusion is not None
            noise = self._diffusion_loss(diffusion, whole, steps, "variants", epoch)
            return torch.stack([task, self.config.diffusion_weight * noise])

        def weight(batch: Batch, epoch: int) -> float | tuple[float, ...]:
            return len(batch) if steps is None else (len(batch), self._target_steps(batch))

        # Of all patterns, the complete one too, each as likely.
        rate = 1.0 - 1.0 / (2 ** len(self.names) - 1)
        kept: dict[int, tuple[Sequences, Pairs]] = {}

        def predict(batch: Batch) -> Tensor:
            """In validation rows keep their patterns, and with frozen networks what was generated for them."""
            at = int(batch.row_id[0])
            if at not in kept:
                given = project(batch.hide(pattern(batch.row_id, batch.available, -1, rate)))
                generated = model.generate(given, seed=derive_seed(self.seed, "variants", "validation"))
                if not frozen:
                    return model.predict(model.complete(given, generated))
                # Not on the device: it is as much as the projected validation part for every source.
                kept[at] = given.to("cpu"), {pair: made.cpu() for pair, made in generated.items()}
            given, generated = kept[at]
            on_device = {pair: made.to(self.device) for pair, made in generated.items()}
            return model.predict(model.complete(given.to(self.device), on_device))

        def begin(epoch: int) -> None:
            if steps is not None:
                assert diffusion is not None
                self._fit_scales(diffusion, model)

        def validate() -> float:
            return self._validation_loss(predict)

        self._train(name, model, loss, self.config.epochs, validate, begin=begin, order="variants", weight=weight)
        model.requires_grad_(True)

    def task_loss(self, prediction: Tensor, rows: Tensor) -> Tensor:
        """Cross-entropy of classes, L1 of scores (MulT), of ``prediction [B, outputs]`` for the rows ``[B]``."""
        if self.labels.regression:
            return F.l1_loss(prediction[:, 0], self.target[rows])
        return F.cross_entropy(prediction, self.target[rows])

    def _train(
        self,
        name: str,
        model: nn.Module,
        loss: Callable[[nn.Module, Any, int], Tensor],
        epochs: int,
        validate: Callable[[], float] | None = None,
        *,
        learning_rate: float | None = None,
        ema_decay: float = 0.0,
        begin: Callable[[int], None] = lambda _: None,
        order: str | None = None,
        weight: Callable[[Any, int], float | tuple[float, ...]] | None = None,
    ) -> None:
        """``order`` names what stages of equal rows and dropout have in common; None = the stage's own."""
        check_rows(name, self.split.train, self.split.valid)

        def batches(epoch: int, rank: int, processes: int) -> Iterator[Batch]:
            begin(epoch)
            return self.store_batches(self.split.train, self.config.batch_size, order or name, epoch, rank, processes)

        patience = self.config.patience if validate is not None else None
        rate = self.config.learning_rate if learning_rate is None else learning_rate
        stage = Stage(name, model, batches, loss, epochs, rate, validate, patience, ema_decay, draws=order)
        stage.weight = weight or stage.weight
        self.train_stage(stage)

    def _validation_loss(self, predict: Callable[[Batch], Tensor]) -> float:
        rows = torch.from_numpy(self.split.valid).to(self.device)
        parts = self.store.iter_batches(self.split.valid, EVALUATION_BATCH)
        return float(self.task_loss(torch.cat([predict(batch.to(self.device)) for batch in parts]), rows))

    def _steps(self, diffusion: ConditionalDiffusion, name: str) -> Callable[[int], Tensor]:
        """Diffusion steps ``[N, pairs]`` of an epoch."""

        @lru_cache(maxsize=1)
        def steps(epoch: int) -> Tensor:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, name, "steps", epoch))
            shape = len(self.store), len(diffusion.pairs)
            return torch.randint(1, diffusion.last_step + 1, shape, generator=generator).to(self.device)

        return steps

    def _diffusion_loss(
        self,
        diffusion: ConditionalDiffusion,
        given: Sequences,
        steps: Callable[[int], Tensor],
        name: str,
        epoch: int,
    ) -> Tensor:
        return diffusion.loss(
            given.x,
            given.lengths,
            given.available,
            steps(epoch)[given.row_id],
            seed=derive_seed(self.seed, name, "diffusion noise", epoch),
            row_id=given.row_id,
        )

    def _target_steps(self, batch: Batch) -> float:
        """Steps of all targets that a source can give: of so many the diffusion loss is a mean."""
        steps = torch.stack([batch.lengths.get(name, torch.ones_like(batch.row_id)) for name in self.names], dim=1)
        sources = batch.available.sum(1, keepdim=True) - 1
        return float((steps * batch.available * sources).sum())

    def _fit_scales(self, diffusion: ConditionalDiffusion, model: CDTP) -> None:
        mean, std = self.scales(model)
        diffusion.mean.copy_(mean)
        diffusion.std.copy_(std)

    @torch.no_grad()
    def scales(self, model: CDTP) -> tuple[Tensor, Tensor]:
        """Mean and deviation ``[M, d]`` of each channel of ``model``'s projections, over the training part's steps.

        A channel that never varies carries nothing: its deviation is 1 instead.
        """
        count = len(self.names)
        total = torch.zeros(count, 1, dtype=torch.float64, device=self.device)
        sums, squares = (
            torch.zeros(count, self.config.width, dtype=torch.float64, device=self.device) for _ in range(2)
        )
        training = model.training
        model.eval()
        for batch in self.store.iter_batches(self.split.train, EVALUATION_BATCH):
            given = model.project(batch.to(self.device))
            for m, (x, n) in enumerate(zip(given.x, given.lengths, strict=True)):
                valid = x[valid_mask(n, x.shape[1])].to(torch.float64)
                total[m] += len(valid)
                sums[m] += valid.sum(0)
                squares[m] += valid.square().sum(0)
        model.train(training)
        mean = sums / total.clamp(min=1)
        std = (squares / total.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        return mean, torch.where(std > 1e-6, std, 1.0)


def sequence_specs(store: FeatureStore) -> dict[str, SequenceSpec]:
    """What the model must know of each modality of ``store``, over all of its parts."""
    longest = store.max_lengths
    return {
        name: SequenceSpec(width, longest.get(name, 1), sequence=store.kinds[name] == "sequence")
        for name, width in store.widths.items()
    }
