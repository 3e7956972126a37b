"""The imputer in other people's code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from modafill import ModalityImputer
from modafill.data import all_patterns
from modafill.models.admc import ADMC

NAMES = ("text", "audio", "vision")


class Clips(Dataset):
    """Seven rows for each pattern, what a pattern lacks full of NaN."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.available = all_patterns(3).repeat(7, 1)
        shapes = {"text": (6, 5), "audio": (8, 4), "vision": (3,)}
        self.features = {name: torch.randn(49, *shape, generator=generator) for name, shape in shapes.items()}
        self.labels = (self.features["vision"][:, 0] > 0).long()
        for m, x in enumerate(self.features.values()):
            x[~self.available[:, m]] = torch.nan

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = {name: x[i] for name, x in self.features.items()}
        return {**row, "available": self.available[i], "row_ids": torch.tensor(i), "labels": self.labels[i]}


class Classifier(nn.Module):
    """Somebody's network on top of completed embeddings."""

    def __init__(self, imputer: ModalityImputer) -> None:
        super().__init__()
        self.imputer = imputer
        self.head = nn.Linear(3 * 8, 2)

    def forward(
        self, text: Tensor, audio: Tensor, vision: Tensor, available: Tensor, row_ids: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        features = {"text": text, "audio": audio, "vision": vision}
        done = self.imputer(features, available, row_ids=row_ids)
        logits = self.head(torch.cat(list(done.embeddings.values()), dim=1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def classifier(make_admc: Callable[..., ADMC]) -> Classifier:
    torch.manual_seed(1)
    return Classifier(ModalityImputer(make_admc("clean"), solver="dpm++", steps=4))


def whole() -> dict[str, Tensor]:
    clips = Clips()
    return {**clips.features, "available": clips.available, "row_ids": torch.arange(49), "labels": clips.labels}


def bits(imputer: ModalityImputer, **changes: Any) -> list[Tensor]:
    given = {**whole(), **changes}
    done = imputer({name: given[name] for name in NAMES}, given["available"], n_samples=2, row_ids=given["row_ids"])
    return [*done.samples.values(), *done.embeddings.values()]


class Learns:
    """Around a training: the head has learned, the imputer and what it says are what they were."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    def _state(self) -> tuple[list[Tensor], list[Tensor]]:
        imputer = self.classifier.imputer
        return [t.clone() for t in imputer.state_dict().values()], bits(imputer)

    def __enter__(self) -> None:
        self.before = self._state()
        self.head = self.classifier.head.weight.detach().clone()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.classifier.cpu()
            assert all(torch.equal(a, b) for x, y in zip(self.before, self._state(), strict=True)
                       for a, b in zip(x, y, strict=True))  # fmt: skip
            assert not torch.equal(self.classifier.head.weight, self.head)
            assert not self.classifier.imputer.model.training


def test_inside_a_lightning_module(classifier: Classifier, tmp_path: Path) -> None:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = classifier

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.classifier(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with Learns(classifier):
        trainer.fit(Module(), DataLoader(Clips(), 10, shuffle=True))


def test_inside_a_hugging_face_trainer(classifier: Classifier, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=1, per_device_train_batch_size=10, learning_rate=0.01, use_cpu=True,
        report_to=[], save_strategy="epoch", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    with Learns(classifier):
        Trainer(classifier, arguments, train_dataset=Clips()).train()
    assert list(tmp_path.glob("checkpoint-*/model.safetensors"))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_under_compile(classifier: Classifier, backend: str) -> None:
    torch.compiler.reset()
    expected = classifier(**whole())
    found = torch.compile(classifier, backend=backend)(**whole())
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    found["loss"].backward()
    gradient = classifier.head.weight.grad.clone()
    classifier.zero_grad()
    expected["loss"].backward()
    torch.testing.assert_close(gradient, classifier.head.weight.grad, rtol=1e-3, atol=1e-4)


class Collate:
    def __init__(self, imputer: ModalityImputer) -> None:
        self.imputer = imputer

    def __call__(self, rows: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        done = self.imputer({name: batch[name] for name in NAMES}, batch["available"], row_ids=batch["row_ids"])
        return batch["row_ids"], torch.cat(list(done.embeddings.values()), dim=1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_the_workers_of_a_data_loader(classifier: Classifier, method: str) -> None:
    collate = Collate(classifier.imputer)
    _, expected = collate([Clips()[i] for i in range(49)])  # threads have run before the workers begin
    loader = DataLoader(Clips(), 10, num_workers=2, collate_fn=collate, multiprocessing_context=method)
    found = torch.empty_like(expected)
    for rows, embeddings in loader:
        found[rows] = embeddings
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_on_two_threads_at_once(classifier: Classifier) -> None:
    imputer, gate = classifier.imputer, threading.Barrier(2)
    shifted = {"text": whole()["text"] + 1.0}
    expected = [bits(imputer), bits(imputer, **shifted)]
    assert not torch.equal(expected[0][0], expected[1][0])

    def work(which: int) -> bool:
        gate.wait()
        return all(
            all(map(torch.equal, bits(imputer, **(shifted if which else {})), expected[which])) for _ in range(10)
        )

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, (0, 1)))


def test_in_float64(classifier: Classifier) -> None:
    """Inputs of another precision are cast; a module that is cast works in it."""
    imputer = classifier.imputer
    expected = bits(imputer)
    doubled = {name: whole()[name].double() for name in NAMES}
    assert all(map(torch.equal, bits(imputer, **doubled), expected))
    exact = bits(imputer.double(), **doubled)
    assert {t.dtype for t in exact} == {torch.float64}
    for a, b in zip(exact, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=1e-4)
