"""What the trainers of all models share: the data of one fold and seed, its key, the stages' place and number."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from modafill.data import Batch, FeatureStore, Labels, Split, pattern_name
from modafill.files import derive_seed
from modafill.models.config import ModelConfig
from modafill.training.loop import EpochDone, Report, Stage, train_stage


class PartTrainer(ABC):
    """Trains everything that one fold and seed needs into one folder, skipping what is done.

    Attributes:
        CONFIG: class of the model's configuration.
        VARIANTS: what can be trained.

    Args:
        folder: ``stages/*.safetensors`` and the assembled ``model/`` go here.
        store: features; windowed where sequences are windows of turns.
        split: row numbers of the training, validation and test parts.
        labels: what is to be recognised in every row, fitted on the training part.
        config: numbers of the model, a ``CONFIG``.
        variants: what is trained beside each other; the first one goes into ``model/``.
        seed: of weights, order, dropout and noise.
        report: called after each epoch.

    Set ``load_only`` before :meth:`run` to refuse to train what is not finished.
    """

    CONFIG: ClassVar[type[ModelConfig]]
    VARIANTS: ClassVar[tuple[str, ...]]
    config: Any

    def __init__(
        self,
        folder: Path,
        store: FeatureStore,
        split: Split,
        labels: Labels,
        config: Any,
        variants: tuple[str, ...],
        seed: int,
        accelerator: Accelerator,
        report: Report,
    ) -> None:
        self.folder, self.store, self.split, self.labels = folder, store, split, labels
        self.variants, self.seed = variants, seed
        self.accelerator, self.report = accelerator, report
        self.device = accelerator.device
        self.target = torch.from_numpy(labels.encode(store.labels(labels.name))).to(self.device)
        self.available = torch.from_numpy(store.available())
        self.names = list(store.modalities)
        self.config = config
        self.load_only = False
        self._number = 0
        self._build()

    @abstractmethod
    def _build(self) -> None:
        """Make the networks, untrained."""

    @cached_property
    def key(self) -> dict[str, Any]:
        """What every result depends on: a stage that was made with something else is refused."""
        (digest,) = digest_data(self.store, [(self.split, self.labels)])
        return {**self.config.to_dict(), "seed": self.seed, "data": digest}

    @property
    def stages(self) -> Path:
        """Folder of finished and unfinished stages."""
        return self.folder / "stages"

    @classmethod
    @abstractmethod
    def check(cls, store: FeatureStore, labels: Labels, config: Any, variants: tuple[str, ...]) -> None:
        """Raise ValueError where the model cannot be trained on these data."""

    @property
    @abstractmethod
    def n_stages(self) -> int:
        """How many networks :meth:`run` trains."""

    @abstractmethod
    def run(self) -> None:
        """Train what is not trained yet and write the assembled system to ``model/``."""

    def rows_with(self, pattern: Tensor | None) -> tuple[Tensor, Tensor]:
        """Training and validation rows in which all of ``pattern`` (None: every modality) is really observed."""
        wanted = torch.ones(len(self.names), dtype=torch.bool) if pattern is None else pattern
        usable = self.available[:, wanted].all(1)
        train, valid = torch.from_numpy(self.split.train), torch.from_numpy(self.split.valid)
        train, valid = train[usable[train]], valid[usable[valid]]
        check_rows("complete rows" if pattern is None else pattern_name(pattern, self.names), train, valid)
        return train.to(self.device), valid.to(self.device)

    def store_batches(
        self, rows: np.ndarray, batch_size: int, what: str, epoch: int, rank: int, processes: int
    ) -> Iterator[Batch]:
        """Shuffled batches of the store on the device, in an order of their own for each ``what`` and epoch.

        Of several processes each gets every ``processes``-th row of each batch.
        """
        shuffle = derive_seed(self.seed, what, "order", epoch)
        for batch in self.store.iter_batches(rows, batch_size, shuffle_seed=shuffle):
            yield (batch if processes == 1 else batch.select(slice(rank, None, processes))).to(self.device)

    def train_stage(self, stage: Stage) -> None:
        """:func:`modafill.training.train_stage` under the part's key, reported as one of its ``n_stages``."""
        if self.load_only and not (self.stages / f"{stage.name}.safetensors").is_file():
            gone = f"stages/{stage.name}.safetensors"
            raise ValueError(f"{self.folder}: {gone} is gone; remove {self.folder.name}/model and train again")
        stage.key, stage.precision = self.key, self.config.precision
        self._number += 1

        def report(done: EpochDone) -> None:
            self.report(replace(done, number=self._number, stages=self.n_stages))

        train_stage(stage, self.stages, self.accelerator, seed=self.seed, report=report)


def digest_data(store: FeatureStore, parts: Sequence[tuple[Split, Labels]]) -> list[str]:
    """For each fold, given as its split and labels, a digest of all that its results depend on, in one pass."""
    digests = [hashlib.sha256(str(store.window).encode()) for _ in parts]
    for digest, (split, labels) in zip(digests, parts, strict=True):
        for array in (*split, labels.encode(store.labels(labels.name)), store.available()):
            digest.update(array.tobytes())
    for batch in store.unwindowed().iter_batches(np.arange(len(store)), 1024):
        for features in (*batch.features.values(), *batch.lengths.values()):
            for digest in digests:
                digest.update(features.numpy().tobytes())
    if store.window:
        turns = [np.asarray(turn).tolist() for turn in (store.order(), *map(store.groups, store.group_names))]
        for digest in digests:
            digest.update(repr((store.task.get("group"), turns)).encode())
    return [digest.hexdigest()[:16] for digest in digests]


def check_rows(what: str, train: Any, valid: Any) -> None:
    """Raise ValueError unless both parts have rows."""
    if len(train) == 0 or len(valid) == 0:
        raise ValueError(
            f"{what}: {len(train)} training and {len(valid)} validation samples, expected at least one of each"
        )
