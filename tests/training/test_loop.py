"""One stage: what it returns, when it stops, what it refuses, what it leaves on disk."""

from __future__ import annotations

import contextlib
import itertools
import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from modafill.files import read_tensors, write_tensors
from modafill.training import Stage, TrainingError, loop, train_stage


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def make_stage(**changes) -> Stage:
    """A linear regression on four batches an epoch, in an order that depends on the epoch."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 1))
    x = torch.randn(32, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])

    def batches(epoch, rank, processes):
        order = torch.randperm(32, generator=torch.Generator().manual_seed(epoch))
        return ((x[part], y[part]) for part in order.split(8))

    def loss(wrapped, batch, epoch):
        return F.mse_loss(wrapped(batch[0]), batch[1])

    return Stage(
        **{"name": "s", "model": model, "batches": batches, "loss": loss, "epochs": 6, "learning_rate": 0.05} | changes
    )


def ignore(*_):
    pass


def test_best_weights_are_kept(tmp_path, accelerator):
    losses, seen = iter([0.9, 0.3, 0.3, 0.7, 0.4, 0.8]), []
    stage = make_stage()
    stage.validate = lambda: seen.append(stage.model[1].weight.detach().clone()) or next(losses)
    train_stage(stage, tmp_path, accelerator, seed=0, report=ignore)
    assert len(seen) == 6
    assert torch.equal(stage.model[1].weight, seen[1])  # the first of equals
    assert not stage.model.training
    tensors, about = read_tensors(tmp_path / "s.safetensors")
    assert torch.equal(tensors["1.weight"], seen[1])
    assert about["state"] == {"epoch": 6, "lowest": 0.3, "stale": 4}


@pytest.mark.parametrize("patience, epochs", [(1, 3), (2, 4), (3, 6), (None, 6)])
def test_patience(tmp_path, accelerator, patience, epochs):
    losses, reports = iter([0.9, 0.3, 0.3, 0.7, 0.2, 0.8]), []
    stage = make_stage(validate=lambda: next(losses), patience=patience)
    train_stage(stage, tmp_path, accelerator, seed=0, report=reports.append)
    assert [(r.stage, r.epoch, r.epochs) for r in reports] == [("s", epoch + 1, 6) for epoch in range(epochs)]
    assert reports[0].scalars.keys() == {"loss", "learning_rate", "validation_loss"}
    assert reports[0].scalars["validation_loss"] == 0.9


@pytest.mark.parametrize("largest", [0.5, 0.99])  # reached at once, and never
def test_averaged_weights(tmp_path, accelerator, largest):
    stage, trail = make_stage(ema_decay=largest), []
    batches = stage.batches

    def watched(*arguments):
        for batch in batches(*arguments):
            yield batch
            trail.append(stage.model[1].weight.detach().double().clone())

    stage.batches = watched
    train_stage(stage, tmp_path, accelerator, seed=0, report=ignore)
    assert len(trail) == 24
    average = trail[0]
    for n, weight in enumerate(trail[1:], start=1):
        decay = min(largest, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(stage.model[1].weight.double(), average, rtol=1e-5, atol=1e-6)
    assert (average - trail[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("epochs", [1, 2, 7, 20])
def test_linear_decay(epochs):
    # MMIN: niter epochs at the full rate, then niter_decay towards zero, counted from epoch 1.
    niter_decay = epochs // 2
    niter = epochs - niter_decay
    expected = [1.0 - max(0, epoch + 1 - niter) / float(niter_decay + 1) for epoch in range(epochs)]
    assert [loop.linear_decay(epochs)(epoch) for epoch in range(epochs)] == expected
    assert all(factor == 1 for factor in expected[:niter])
    assert expected[-1] > 0


def test_learning_rate_of_each_epoch(tmp_path, accelerator):
    rates = []
    train_stage(make_stage(), tmp_path, accelerator, seed=0, report=lambda r: rates.append(r.scalars["learning_rate"]))
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.05 * 3 / 4, 0.05 * 2 / 4, 0.05 * 1 / 4])


def test_randomness_of_each_epoch_is_its_own(tmp_path, accelerator):
    def draws(folder: str, seed: int) -> list[float]:
        seen: list[float] = []
        stage, torch_seed = make_stage(epochs=3), len(folder)
        loss = stage.loss
        stage.loss = lambda *arguments: seen.append(float(torch.rand(()))) or loss(*arguments)
        torch.manual_seed(torch_seed)
        train_stage(stage, tmp_path / folder, accelerator, seed=seed, report=ignore)
        return seen

    first = draws("a", 0)
    assert len(set(first)) == 12
    assert draws("bb", 0) == first
    assert not set(draws("ccc", 1)) & set(first)


def stop_at(epoch: int):
    def report(progress):
        if progress.epoch == epoch:
            raise KeyboardInterrupt

    return report


def test_products_in_bfloat16(tmp_path, accelerator):
    """While losses are made; weights and validation stay as they are, and so, nearly, does what is learned."""
    kinds, losses = {"training": set(), "validation": set()}, {}
    for precision in ("float32", "bfloat16"):
        stage = make_stage(precision=precision)

        def loss(wrapped, batch, epoch, stage=stage):
            said = wrapped(batch[0])
            kinds["training"].add(said.dtype)
            return F.mse_loss(said, batch[1])

        def validate(stage=stage):
            said = stage.model(torch.ones(1, 3))
            kinds["validation"].add(said.dtype)
            return float(said)

        stage.loss, stage.validate = loss, validate
        losses[precision] = []
        train_stage(
            stage,
            tmp_path / precision,
            accelerator,
            seed=3,
            report=lambda done, kept=losses[precision]: kept.append(done.scalars["loss"]),
        )
        assert {p.dtype for p in stage.model.parameters()} == {torch.float32}
    assert kinds == {"training": {torch.float32, torch.bfloat16}, "validation": {torch.float32}}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"] != losses["float32"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema_decay": 0.9}, {"validated": True, "patience": 2}, {"precision": "bfloat16"}],
    ids=["plain", "averaged", "validated", "bfloat16"],
)
def test_resume_bit_equal(tmp_path, accelerator, changes):
    changes = dict(changes)
    validated = changes.pop("validated", False)

    def stage(factor):
        torch.manual_seed(factor)  # what another process would have in its generator
        stage = make_stage(**changes)
        if validated:
            stage.validate = lambda: -float((stage.model[1].weight.detach() - torch.tensor([0.2, -0.4, 0.1])).norm())
        return stage

    whole = stage(1)
    train_stage(whole, tmp_path / "whole", accelerator, seed=3, report=ignore)
    for epoch in range(1, 7):
        with contextlib.suppress(KeyboardInterrupt):
            train_stage(
                stage(epoch), tmp_path / "parts", accelerator, seed=3, report=stop_at(epoch), checkpoint_seconds=0
            )
    last = stage(9)
    train_stage(last, tmp_path / "parts", accelerator, seed=3, report=ignore)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(last.model.state_dict()[name], tensor), name
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["s.safetensors"]
    assert (
        read_tensors(tmp_path / "parts" / "s.safetensors")[1] == read_tensors(tmp_path / "whole" / "s.safetensors")[1]
    )


@pytest.mark.parametrize("what", ["loss", "norm of the gradient"])
@pytest.mark.parametrize("bad", [(3, 1), (3, 4), (5, 4)], ids=["first batch", "last batch", "last of all"])
def test_nan_keeps_the_last_checkpoint(tmp_path, accelerator, what, bad):
    def stage(bad):
        calls = itertools.count(1)

        def loss(wrapped, batch, epoch):
            found = F.mse_loss(wrapped(batch[0]), batch[1])
            if (epoch, (next(calls) - 1) % 4 + 1) != bad:
                return found
            # The root's derivative at 0 is infinite, and that times 0 no number.
            return found * math.nan if what == "loss" else found + 0.0 * (wrapped[1].bias * 0.0).sqrt().sum()

        return make_stage(loss=loss)

    train = partial(train_stage, accelerator=accelerator, seed=0, report=ignore, checkpoint_seconds=0)
    with pytest.raises(TrainingError, match=f"the {what} of batch 1 of 4 in epoch 1 is nan; there is no checkpoint"):
        train(stage((0, 1)), tmp_path)
    assert not list(tmp_path.iterdir())
    said = f"s: the {what} of batch {bad[1]} of 4 in epoch {bad[0] + 1} is nan; the last checkpoint is kept"
    with pytest.raises(TrainingError, match=said):
        train(stage(bad), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["s.resume.safetensors"]
    tensors, about = read_tensors(tmp_path / "s.resume.safetensors")
    assert about["state"]["epoch"] == bad[0]
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    train(stage(None), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("finished", [False, True])
def test_other_format_is_named(tmp_path, accelerator, monkeypatch, finished):
    train = partial(train_stage, folder=tmp_path, accelerator=accelerator, seed=0, checkpoint_seconds=0)
    monkeypatch.setattr(loop, "FORMAT", loop.FORMAT + 1)
    with contextlib.nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        train(make_stage(), report=ignore if finished else stop_at(3))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"safetensors: format {loop.FORMAT + 1}, expected {loop.FORMAT}, as this"):
        train(make_stage(), report=ignore)


@pytest.mark.parametrize("finished", [False, True])
def test_other_configuration_is_refused(tmp_path, accelerator, finished):
    train = partial(train_stage, folder=tmp_path, accelerator=accelerator, checkpoint_seconds=0)
    key = {"width": 8, "data": "a.h5"}
    if finished:
        train(make_stage(key=key), seed=0, report=ignore)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(make_stage(key=key), seed=0, report=stop_at(3))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for other, seed, named in [
        ({"width": 16, "data": "a.h5"}, 0, "other width;"),
        ({"width": 16, "data": "b.h5"}, 1, "other data, seed, width;"),
        ({"data": "a.h5"}, 0, "other width;"),
        ({**key, "new": 1}, 0, "other new;"),
    ]:
        with pytest.raises(ValueError, match=named):
            train(make_stage(key=other), seed=seed, report=ignore)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    stage = make_stage(key=key)
    train(stage, seed=0, report=ignore)


def test_finished_stage_is_loaded_and_not_trained(tmp_path, accelerator):
    first, second = make_stage(), make_stage()
    train_stage(first, tmp_path, accelerator, seed=0, report=ignore)
    (tmp_path / "s.resume.safetensors").write_bytes(b"left by a process that died just after the result was there")
    second.batches = None
    train_stage(second, tmp_path, accelerator, seed=0, report=ignore)
    assert torch.equal(second.model[1].weight, first.model[1].weight)
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


def test_damaged_result_is_named(tmp_path, accelerator):
    (tmp_path / "s.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"s\.safetensors: not a readable safetensors file"):
        train_stage(make_stage(), tmp_path, accelerator, seed=0, report=ignore)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: tensors.pop("model.1.weight"),
        lambda tensors, about: tensors.update({"model.1.weight": torch.zeros(7)}),
        lambda tensors, about: tensors.update({"adam.x.step": torch.zeros(1)}),
        lambda tensors, about: about.pop("state"),
        lambda tensors, about: about.update(state=[1]),
        lambda tensors, about: about["state"].pop("stale"),
        lambda tensors, about: about.update(param_groups=[]),
    ],
)
def test_damaged_checkpoint_is_named(tmp_path, accelerator, change):
    train = partial(train_stage, folder=tmp_path, accelerator=accelerator, seed=0, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        train(make_stage(), report=stop_at(3))
    checkpoint = tmp_path / "s.resume.safetensors"
    tensors, about = read_tensors(checkpoint)
    change(tensors, about)
    write_tensors(checkpoint, tensors, about)
    with pytest.raises(ValueError, match=rf"{checkpoint}: damaged \(.*\); remove it, and its stage begins anew"):
        train(make_stage(), report=ignore)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("about", [{}, {"key": 3}])
def test_foreign_checkpoint_is_named(tmp_path, accelerator, finished, about):
    file = tmp_path / ("s.safetensors" if finished else "s.resume.safetensors")
    write_tensors(file, {"1.weight": torch.zeros(1, 3)}, about)
    with pytest.raises(ValueError, match=f"{file}: format None, expected {loop.FORMAT}"):
        train_stage(make_stage(), tmp_path, accelerator, seed=0, report=ignore)


def test_gradients_are_clipped(tmp_path, accelerator):
    stage = make_stage(grad_clip=0.01, epochs=1)
    norms = []

    def step(optimizer, *_):
        norms.append(float(nn.utils.get_total_norm([p.grad for p in stage.model.parameters()])))

    handle = register_optimizer_step_pre_hook(step)
    try:
        train_stage(stage, tmp_path, accelerator, seed=0, report=ignore)
    finally:
        handle.remove()
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
