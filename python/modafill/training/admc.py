"""ADMC's training: encoders, diffusion networks, fusion networks, one fold and seed at a time (ADMC §3, Fig. 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn import functional as F

from modafill import ops
from modafill.data import Batch, FeatureStore, Labels, Standardizer, missing_patterns, random_available
from modafill.diffusion import Sampling
from modafill.files import derive_seed, read_tensors, write_tensors
from modafill.models.admc import ADMC, ADN, ADMCConfig, Fusion, ModalitySpec, UnimodalClassifier, encoder_kind
from modafill.models.admc.config import CONDITIONINGS
from modafill.models.baselines import MeanFill, RidgeFill, ZeroFill
from modafill.ops.reference import SQRT_ALPHA_BAR, SQRT_ONE_MINUS_ALPHA_BAR
from modafill.training.loop import Stage, check_key, reading
from modafill.training.part import PartTrainer, check_rows

RIVALS = ("zero", "mean", "ridge")


class ADMCTrainer(PartTrainer):
    """Trains ADMC and the rivals' fusion networks; ``variants`` are conditionings, each with a diffusion network."""

    CONFIG: ClassVar = ADMCConfig
    VARIANTS: ClassVar = CONDITIONINGS

    config: ADMCConfig

    def _build(self) -> None:
        self.specs = modality_specs(self.store)
        torch.manual_seed(derive_seed(self.seed, "weights"))
        self.model = ADMC(
            self.specs,
            self.labels.n_classes,
            self._config(self.variants[0]),
            list(self.labels.class_names),
            self.store.window,
        ).to(self.device)
        self.adns = {self.variants[0]: self.model.adn}
        for conditioning in self.variants[1:]:
            self.adns[conditioning] = ADN(len(self.specs), self._config(conditioning)).to(self.device)
        self._fills: dict[str, ZeroFill | MeanFill | RidgeFill | ADN] = {}
        self._fusions: dict[str, Fusion] = {}
        self.complete_fusion = self._new_fusion("fusion-complete", None)

    @classmethod
    def check(cls, store: FeatureStore, labels: Labels, config: ADMCConfig, variants: tuple[str, ...]) -> None:
        """Raise ValueError for a label that is no class, or an encoder that does not fit its modality or has none."""
        if labels.regression:
            raise ValueError(f"{store.name}: label {labels.name!r} is a score, expected classes: ADMC does not regress")
        specs = modality_specs(store)
        unknown = sorted(config.encoders.keys() - specs)
        if unknown:
            raise ValueError(f"encoders: got the modality {unknown[0]!r}, expected some of {', '.join(specs)}")
        for name, modality in specs.items():
            encoder_kind(name, modality.sequence, config)

    def _config(self, conditioning: str) -> ADMCConfig:
        return replace(self.config, conditioning=conditioning)

    @property
    def n_stages(self) -> int:
        encoders = 1 if self.config.joint_encoders else len(self.specs)
        methods = len(RIVALS) + len(self.variants)
        return encoders + 2 * len(self.variants) + 1 + methods * len(missing_patterns(len(self.specs)))

    def run(self) -> None:
        self.train_encoders()
        self.embed()
        for conditioning in self.variants:
            self.train_diffusion(conditioning)
        self.train_fusion("fusion-complete", self.complete_fusion, lambda rows: self.tokens[rows], self.rows_with(None))
        for method in (*RIVALS, *self.variants):
            for index in range(len(missing_patterns(len(self.specs)))):
                self.train_fusion_for(method, index)
        for conditioning, adn in self.adns.items():
            enhanced = self.enhanced_for(conditioning)
            self.model.adn = adn
            self.train_fusion(
                f"enhanced-{conditioning}",
                enhanced,
                lambda rows: self.model.enhance(self.tokens[rows], seed=self.seed, row_id=rows),
                self.rows_with(None),
            )
        self.model.adn = self.adns[self.variants[0]]
        if self.accelerator.is_main_process and not (self.folder / "model").is_dir():
            self.model.save_pretrained(self.folder / "model", seed=self.seed)

    def train_encoders(self) -> None:
        """ITFN: each encoder by its own classifier, or all with one fusion network (``joint_encoders``)."""
        statistics = Standardizer.fit(self.store, self.split.train)
        for name in self.specs:
            encoder, std = self.model.encoder(name), statistics.std[name]
            encoder.mean.copy_(statistics.mean[name])
            encoder.std.copy_(torch.where(std > 0, std, torch.inf))
        if self.config.joint_encoders:
            joint = _Joint(self.model.unimodal, Fusion(len(self.specs), self.labels.n_classes, self.config))
            self._fit_on_store("encoders-joint", joint.to(self.device), lambda batch: (batch,), self.rows_with(None))
            return
        for m, (name, unimodal) in enumerate(self.model.unimodal.items()):
            keep = self.available[:, m]
            self._fit_on_store(
                f"encoder-{name}",
                unimodal,
                partial(_one_modality, name),
                (self.split.train[keep[self.split.train].numpy()], self.split.valid[keep[self.split.valid].numpy()]),
            )

    def _fit_on_store(
        self, name: str, model: nn.Module, inputs: Callable[[Batch], tuple[Any, ...]], rows: tuple[Any, Any]
    ) -> None:
        train, valid = rows
        check_rows(name, train, valid)

        def batches(epoch: int, rank: int, processes: int) -> Iterator[Batch]:
            yield from self.store_batches(train, self.config.batch_size, name, epoch, rank, processes)

        def loss(wrapped: nn.Module, batch: Batch, epoch: int) -> Tensor:
            return F.cross_entropy(wrapped(*inputs(batch)), self.target[batch.row_id])

        def validate() -> float:
            parts = [batch.to(self.device) for batch in self.store.iter_batches(valid, 1024)]
            logits = torch.cat([model(*inputs(batch)) for batch in parts])
            return float(F.cross_entropy(logits, self.target[torch.cat([batch.row_id for batch in parts])]))

        self._train(Stage(name, model, batches, loss, self.config.encoder_epochs, self.config.learning_rate, validate))

    def embed(self) -> None:
        """Tokens of all rows, ``[N, M, D]``, by the frozen encoders; kept beside the stages."""
        path = self.stages / "tokens.safetensors"
        if broadcast_object_list([path.is_file()])[0]:
            tensors, about = read_tensors(path)
            check_key(path, about.get("key"), self.key)
            with reading(path):
                self.model.scaler.load_state_dict({"mean": tensors["mean"], "std": tensors["std"]})
                self.tokens = tensors["tokens"].to(self.device)
            return
        parts = []
        with torch.no_grad():
            for batch in self.store.iter_batches(torch.arange(len(self.store)).numpy(), 1024):
                parts.append(self.model.embed(batch.to(self.device)))
        embeddings = torch.cat(parts)
        train = torch.from_numpy(self.split.train)
        self.model.scaler.fit(embeddings[train], self.available[train], self.config.latent_scale)
        self.tokens = torch.where(self.available.to(self.device)[..., None], self.model.scaler(embeddings), 0.0)
        if self.accelerator.is_main_process:
            state = self.model.scaler.state_dict()
            write_tensors(path, {"tokens": self.tokens, **state}, {"key": self.key})
        self.accelerator.wait_for_everyone()

    def train_diffusion(self, conditioning: str) -> None:
        """ADN on the complete training rows: ε-MSE (``"replace"``) or v-MSE on hidden tokens (``"clean"``)."""
        adn, name = self.adns[conditioning], f"adn-{conditioning}"
        train, _ = self.rows_with(None)
        schedule = diffusion_loss(adn, self.tokens, derive_seed(self.seed, name))

        def batches(epoch: int, rank: int, processes: int) -> Iterator[Tensor]:
            yield from _index_batches(
                train,
                self.config.batch_size,
                derive_seed(self.seed, name, "order", epoch),
                rank,
                processes,
                self.device,
            )

        def weight(rows: Tensor, epoch: int) -> float:
            hidden = ~random_available(rows, len(self.specs), seed=derive_seed(self.seed, name), draw=epoch)
            return float(hidden.sum() if conditioning == "clean" else len(rows))

        stage = Stage(name, adn, batches, schedule, self.config.adn_epochs, self.config.learning_rate, weight=weight)
        stage.ema_decay = self.config.ema_decay if conditioning == "clean" else 0.0
        self._train(stage)

    def fill(self, method: str) -> ZeroFill | MeanFill | RidgeFill | ADN:
        """The rival or the diffusion network by that name."""
        if method not in self._fills:
            train, valid = self.rows_with(None)
            if method == "zero":
                self._fills[method] = ZeroFill(self.model.scaler.mean, self.model.scaler.std)
            elif method == "mean":
                self._fills[method] = MeanFill(self.tokens[train])
            elif method == "ridge":
                self._fills[method] = RidgeFill(self.tokens[train].cpu(), self.tokens[valid].cpu())
            else:
                self._fills[method] = self.adns[method]
        return self._fills[method]

    def complete(
        self, method: str, rows: Tensor, pattern: Tensor, n_samples: int, seed: int, sampling: Sampling = Sampling()
    ) -> Tensor:
        """Tokens ``[K, B, M, D]`` of ``rows`` with only ``pattern [M]`` shown: K samples, or a rival's one estimate."""
        available = pattern.to(self.device).expand(len(rows), -1)
        fill = self.fill(method)
        if isinstance(fill, ADN):
            return fill.sample(
                self.tokens[rows],
                available,
                n_samples=n_samples,
                seed=seed,
                row_id=rows.to(torch.int64),
                sampling=sampling,
            )
        return fill.point(self.tokens[rows], available)[None]

    def fusion_for(self, method: str, index: int) -> Fusion:
        """The fusion network of a pattern on tokens completed by ``method``."""
        if method == self.variants[0]:
            return cast(Fusion, self.model.fusions[index])
        return self._new_fusion(f"fusion-{method}-{index}", None)

    def enhanced_for(self, conditioning: str) -> Fusion:
        """As :meth:`fusion_for`, for MMER's enhanced tokens."""
        if conditioning == self.variants[0]:
            return self.model.enhanced
        return self._new_fusion(f"enhanced-{conditioning}", 2 * self.config.width)

    def _new_fusion(self, name: str, in_width: int | None) -> Fusion:
        if name not in self._fusions:
            torch.manual_seed(derive_seed(self.seed, name, "weights"))
            fusion = Fusion(len(self.specs), self.labels.n_classes, self.config, in_width)
            self._fusions[name] = fusion.to(self.device)
        return self._fusions[name]

    def train_fusion_for(self, method: str, index: int) -> None:
        """MMCR: the fusion network of one pattern on tokens completed by ``method``."""
        pattern = missing_patterns(len(self.specs))[index]
        seed = derive_seed(self.seed, "complete", index)
        self.train_fusion(
            f"fusion-{method}-{index}",
            self.fusion_for(method, index),
            lambda rows: self.complete(method, rows, pattern, 1, seed)[0],
            self.rows_with(pattern),
        )

    def train_fusion(
        self, name: str, fusion: Fusion, complete: Callable[[Tensor], Tensor], rows: tuple[Tensor, Tensor]
    ) -> None:
        """Train a fusion network on completed tokens, best on validation."""
        train, valid = rows
        cache: dict[str, Tensor] = {}

        def tokens(part: str, part_rows: Tensor) -> Tensor:
            if part not in cache:
                cache[part] = complete(part_rows)
            return cache[part]

        def batches(epoch: int, rank: int, processes: int) -> Iterator[Tensor]:
            order = derive_seed(self.seed, name, "order", epoch)
            positions = torch.arange(len(train), device=self.device)
            yield from _index_batches(positions, self.config.batch_size, order, rank, processes, self.device)

        def loss(wrapped: nn.Module, at: Tensor, epoch: int) -> Tensor:
            return F.cross_entropy(wrapped(tokens("train", train)[at]), self.target[train[at]])

        def validate() -> float:
            return float(F.cross_entropy(fusion(tokens("valid", valid)), self.target[valid]))

        self._train(Stage(name, fusion, batches, loss, self.config.fusion_epochs, self.config.learning_rate, validate))

    def _train(self, stage: Stage) -> None:
        stage.patience = self.config.patience if stage.validate is not None else None
        self.train_stage(stage)


def modality_specs(store: FeatureStore) -> dict[str, ModalitySpec]:
    """What a model must know of each modality of ``store``."""
    return {name: ModalitySpec(store.widths[name], store.kinds[name] == "sequence") for name in store.modalities}


class _Joint(nn.Module):
    """Encoders and a fusion network trained together ("w/o ITFN", the unrestricted networks of ADMC Table 5)."""

    def __init__(self, unimodal: nn.ModuleDict, fusion: Fusion) -> None:
        super().__init__()
        self.unimodal, self.fusion = unimodal, fusion

    def forward(self, batch: Batch) -> Tensor:
        tokens = [
            cast(UnimodalClassifier, unimodal).encoder(*_one_modality(name, batch))
            for name, unimodal in self.unimodal.items()
        ]
        return self.fusion(torch.stack(tokens, dim=1))


def _one_modality(name: str, batch: Batch) -> tuple[Tensor, Tensor | None]:
    return batch.features[name], batch.lengths.get(name)


def diffusion_loss(adn: ADN, tokens: Tensor, seed: int) -> Callable[[nn.Module, Tensor, int], Tensor]:
    """Loss of rows ``[B]`` of complete ``tokens [N, M, D]`` in an epoch.

    ``"replace"``: MSE of ε over all tokens, steps 1…N (ADMC §3.2). ``"clean"``: MSE of v over the hidden tokens of a
    random pattern per row, steps 1…``last_step``. Steps, patterns and noise depend on (seed, epoch, row) alone.
    """
    table = adn.schedule.table.to(tokens.device)
    clean = adn.config.conditioning == "clean"

    @lru_cache(maxsize=1)
    def steps(epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, "steps", epoch))
        return torch.randint(1, adn.last_step + 1, (len(tokens),), generator=generator).to(tokens.device)

    def loss(model: nn.Module, rows: Tensor, epoch: int) -> Tensor:
        step = steps(epoch)[rows]
        x0 = tokens[rows]
        noisy, noise = ops.add_noise(x0, table, step, seed=derive_seed(seed, "noise", epoch), row_id=rows)
        if not clean:
            return F.mse_loss(model(noisy, step), noise)
        available = random_available(rows, tokens.shape[1], seed=seed, draw=epoch)
        coefficients = table[step][:, :, None, None]
        v = coefficients[:, SQRT_ALPHA_BAR] * noise - coefficients[:, SQRT_ONE_MINUS_ALPHA_BAR] * x0
        observed = x0
        if adn.config.condition_noise > 0:
            seed_of_epoch = derive_seed(seed, "condition", epoch)
            blur = ops.randn(tuple(x0.shape), seed=seed_of_epoch, row_id=rows, device=x0.device)
            observed = x0 + adn.config.condition_noise * adn.config.latent_scale * blur
        predicted = model(torch.where(available[..., None], observed, noisy), step, available)
        return F.mse_loss(predicted[~available], v[~available])

    return loss


def _index_batches(
    rows: Tensor, batch_size: int, seed: int, rank: int, processes: int, device: torch.device
) -> Iterator[Tensor]:
    """Shuffled batches of ``rows``; each process gets every ``processes``-th row of each batch."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(device)
    for batch in order.split(batch_size):
        yield rows[batch[rank::processes]]
