"""CDTP's stages: what each one trains, what stays frozen, what the losses are, and which patterns rows get."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from modafill.data import Standardizer, convert
from modafill.files import read_tensors
from modafill.models.admc import ADMCConfig
from modafill.models.cdtp import CDTP, VARIANTS, CDTPConfig
from modafill.training import Run, TrainingError, train, train_stage


def ignore(*_):
    pass


def trainer_of(tiny, **changes):
    return replace(Run.load(tiny.run), **changes).trainer(0, 0, Accelerator(cpu=True), ignore)


def stage(tiny, name):
    return read_tensors(tiny.run / "fold0-seed0" / "stages" / f"{name}.safetensors")[0]


def test_projections_and_denoisers_are_frozen_where_the_variants_are_trained(tiny_cdtp):
    backbone, denoisers = stage(tiny_cdtp, "backbone"), stage(tiny_cdtp, "diffusion")
    for variant in ("full", "linear"):
        found = stage(tiny_cdtp, f"variant-{variant}")
        for name, tensor in found.items():
            if name.startswith("diffusion."):
                assert torch.equal(tensor, denoisers[name.removeprefix("diffusion.")]), name
        same = {name for name in found if name in backbone and torch.equal(found[name], backbone[name])}
        projections = {name for name in backbone if name.startswith("backbone.projections.")}
        assert projections <= same
        assert any(name in backbone and name not in same for name in found)
    assert not [name for name in stage(tiny_cdtp, "variant-linear") if name.startswith("diffusion.")]


def test_every_prompt_moves_and_so_do_the_maps_of_the_patterns_met(tiny_cdtp):
    trainer = trainer_of(tiny_cdtp)
    before = trainer.models["full"].state_dict()
    after = stage(tiny_cdtp, "variant-full")
    parts = [name for name in before if name.startswith(("prompts.", "maps."))]
    assert len(parts) > 10
    # With a drop rate of 0.2 and 60 rows, single maps of rare patterns may not have been met.
    still = [name for name in parts if torch.equal(before[name], after[name])]
    assert not [name for name in still if name.startswith("prompts.")]
    assert len(still) < len(parts) / 2


def test_statistics_are_those_of_the_training_part(tiny_cdtp):
    trainer = trainer_of(tiny_cdtp)
    trainer.run()
    statistics = Standardizer.fit(trainer.store, trainer.split.train)
    for projection in trainer.plain.backbone.projections:
        torch.testing.assert_close(projection.mean.double(), statistics.mean[projection.name].double())
    channels = [[], [], []]
    batch = trainer.store.read(trainer.split.train)
    given = trainer.plain.project(batch)
    for m, (x, n) in enumerate(zip(given.x, given.lengths, strict=True)):
        channels[m] = torch.cat([row[:end] for row, end in zip(x.detach(), n.tolist(), strict=True)])
    mean, std = trainer.models["full"].diffusion.mean, trainer.models["full"].diffusion.std
    for m, rows in enumerate(channels):
        torch.testing.assert_close(mean[m], rows.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std[m], rows.std(0, correction=0), rtol=1e-3, atol=1e-5)


def test_losses_of_classes_and_scores(tiny_cdtp):
    trainer = trainer_of(tiny_cdtp)
    rows, logits = torch.tensor([3, 1, 7]), torch.randn(3, 3)
    target = torch.from_numpy(np.unique(trainer.store.labels("mood"), return_inverse=True)[1])
    torch.testing.assert_close(trainer.task_loss(logits, rows), F.cross_entropy(logits, target[rows]))
    trainer.labels = replace(trainer.labels, kind="score")
    trainer.target = torch.arange(96.0)
    expected = (logits[:, 0] - torch.tensor([3.0, 1.0, 7.0])).abs().mean()
    torch.testing.assert_close(trainer.task_loss(logits[:, :1], rows), expected)


def test_model_folder_holds_the_first_variant(tiny_cdtp):
    model = CDTP.from_pretrained(tiny_cdtp.run / "fold0-seed0" / "model")
    expected = stage(tiny_cdtp, "variant-full")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.classes == ["calm", "glad", "sad"]


def test_denoisers_are_the_same_whichever_variants_there_are(tiny_cdtp, tmp_path):
    run = replace(Run.load(tiny_cdtp.run), folder=tmp_path / "run", variants=("append",))
    train(run, ignore)
    found = read_tensors(run.folder / "fold0-seed0" / "stages" / "diffusion.safetensors")[0]
    for name, tensor in stage(tiny_cdtp, "diffusion").items():
        assert torch.equal(found[name], tensor), name


def test_variants_begin_alike_and_get_the_same_dropout(tiny_cdtp, tmp_path, monkeypatch):
    """Equal configurations under two names end with the same weights."""
    monkeypatch.setitem(VARIANTS, "no-type", VARIANTS["no-signal"])
    run = replace(Run.load(tiny_cdtp.run), folder=tmp_path / "run", variants=("no-signal", "no-type"))
    train(replace(run, config=replace(run.config, epochs=1, dropout=0.3)), ignore)
    stages = run.folder / "fold0-seed0" / "stages"
    one, other = (read_tensors(stages / f"variant-{name}.safetensors")[0] for name in run.variants)
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("full", "linear", "plain")])
def test_other_variants_train(tiny_cdtp, tmp_path, variant):
    run = Run.load(tiny_cdtp.run)
    config = replace(run.config, epochs=1, diffusion_epochs=1)
    train(replace(run, folder=tmp_path / "run", variants=(variant,), config=config), ignore)
    model = CDTP.from_pretrained(tmp_path / "run" / "fold0-seed0" / "model")
    assert {name: getattr(model.config, name) for name in VARIANTS[variant]} == VARIANTS[variant]


def test_joint_training_moves_projections_and_denoisers(tiny_cdtp, tmp_path):
    run = Run.load(tiny_cdtp.run)
    config = replace(run.config, training="joint", epochs=2)
    done = []
    train(replace(run, folder=tmp_path / "run", variants=("full",), config=config), done.append)
    assert {d.stage for d in done if d.stage} == {"backbone", "variant-full"}
    assert max(d.stages for d in done) == 2
    stages = tmp_path / "run" / "fold0-seed0" / "stages"
    backbone, found = (read_tensors(stages / f"{name}.safetensors")[0] for name in ("backbone", "variant-full"))
    moved = [name for name in backbone if not torch.equal(backbone[name], found[name])]
    assert "backbone.projections.0.conv.weight" in moved
    fresh = replace(run, variants=("full",), config=config).trainer(0, 0, Accelerator(cpu=True), ignore)
    before = fresh.models["full"].diffusion.state_dict()
    assert any(not torch.equal(found[f"diffusion.{name}"], tensor) for name, tensor in before.items())


def test_scores_train_with_one_output(tiny_cdtp, tmp_path):
    mapping = json.loads(tiny_cdtp.mapping.read_text())
    mapping["labels"] = {"faces": {"name": "clip", "kind": "score"}}
    convert(tiny_cdtp.archive, tmp_path / "scores.h5", mapping)
    run = Run.load(tiny_cdtp.run)
    run = replace(
        run, folder=tmp_path / "run", data=str(tmp_path / "scores.h5"), mapping=None, label="faces",
        variants=("full",), config=replace(run.config, epochs=1, diffusion_epochs=1),
    )  # fmt: skip
    train(run, ignore)
    model = CDTP.from_pretrained(run.folder / "fold0-seed0" / "model")
    assert (model.outputs, model.classes) == (1, [])
    with pytest.raises(ValueError, match="label: got 'other', expected one of \\['faces'\\]"):
        train(replace(run, folder=tmp_path / "other", label="other"), ignore)
    run = replace(run, folder=tmp_path / "admc", model="admc", variants=("clean",), config=ADMCConfig())
    with pytest.raises(ValueError, match="label 'clip' is a score, expected classes: ADMC does not regress"):
        train(run, ignore)


def test_a_modality_that_many_rows_lack_for_good(tiny_cdtp, tmp_path):
    """Text is in 6 training rows alone: it trains, and rows without it are never a target or source of its pairs."""
    run = Run.load(tiny_cdtp.run)
    trainer = trainer_of(tiny_cdtp)
    mapping = json.loads(tiny_cdtp.mapping.read_text())
    arrays = dict(np.load(tiny_cdtp.archive))
    keep = np.zeros(96, bool)
    keep[[*trainer.split.train[:6], *trainer.split.valid, *trainer.split.test]] = True
    arrays["seen"] = arrays["seen"] & (np.arange(3) > 0) | keep[:, None]
    arrays["seen"][~arrays["seen"].any(1), 1] = True
    np.savez(tmp_path / "lacking.npz", **arrays)
    (tmp_path / "lacking.json").write_text(json.dumps(mapping))
    lacking = replace(
        run, folder=tmp_path / "run", data=str(tmp_path / "lacking.npz"), mapping=str(tmp_path / "lacking.json"),
        variants=("full",), config=replace(run.config, epochs=1, diffusion_epochs=1),
    )  # fmt: skip
    train(lacking, ignore)
    # What the rows lack is never read: other values there, the same bits.
    arrays["words"][~arrays["seen"][:, 0]] += 100
    np.savez(tmp_path / "lacking.npz", **arrays)
    again = replace(lacking, folder=tmp_path / "again")
    train(again, ignore)
    first, second = (
        read_tensors(r.folder / "fold0-seed0" / "model" / "model.safetensors")[0] for r in (lacking, again)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    none = replace(lacking, folder=tmp_path / "none")
    arrays["seen"][trainer.split.train, 0] = False
    arrays["seen"][~arrays["seen"].any(1), 1] = True
    np.savez(tmp_path / "lacking.npz", **arrays)
    with pytest.raises(ValueError, match=r"none of the \d+ training samples has text"):
        train(none, ignore)


def spied(tiny_cdtp, monkeypatch, folder, **changes):
    """A trainer that has run, with what each variant completed: (row ids, what was shown, generated pairs)."""
    run = Run.load(tiny_cdtp.run)
    config = replace(run.config, **{"epochs": 2, "diffusion_epochs": 1, "drop_rate": 0.7, **changes})
    trainer = replace(run, folder=folder, config=config).trainer(0, 0, Accelerator(cpu=True), ignore)
    seen = {name: [] for name in trainer.models}
    for name, model in trainer.models.items():

        def complete(given, generated, name=name, model=model):
            seen[name].append((given.row_id, given.available, generated))
            return CDTP.complete(model, given, generated)

        monkeypatch.setattr(model, "complete", complete)
    trainer.run()
    return trainer, seen


def test_variants_are_trained_on_the_same_patterns(tiny_cdtp, tmp_path, monkeypatch):
    trainer, seen = spied(tiny_cdtp, monkeypatch, tmp_path / "run")
    for name in ("linear", "plain"):
        assert len(seen[name]) == len(seen["full"])
        for one, other in zip(seen[name], seen["full"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))
    epochs = len(seen["full"]) // 2

    hidden = torch.cat([trainer.available[rows] & ~shown for rows, shown, _ in seen["full"]])
    assert 0.4 < float(hidden.any(1).float().mean()) < 0.9
    assert any(pairs for _, _, pairs in seen["full"])
    # A row has another pattern in the other epoch, and in validation the same one twice.
    train = torch.from_numpy(trainer.split.train)
    patterns = [
        {int(r): tuple(s.tolist()) for rows, shown, _ in part for r, s in zip(rows, shown, strict=True)}
        for part in (seen["full"][:epochs], seen["full"][epochs:])
    ]
    assert any(patterns[0][r] != patterns[1][r] for r in train.tolist())
    assert all(patterns[0][r] == patterns[1][r] for r in trainer.split.valid.tolist())


def test_validation_of_joint_training_is_generated_anew(tiny_cdtp, tmp_path, monkeypatch):
    """Its denoisers change, so that what they made in one epoch is stale in the next; frozen ones make the same."""
    for training, same in (("joint", False), ("two-stage", True)):
        trainer, seen = spied(tiny_cdtp, monkeypatch, tmp_path / training, training=training)
        valid = set(trainer.split.valid.tolist())
        made = [pairs for rows, _, pairs in seen["full"] if set(rows.tolist()) <= valid]
        assert len(made) == 2
        assert all(torch.equal(made[0][pair], made[1][pair]) for pair in made[0]) == same


def test_the_diffusion_loss_counts_by_its_weight(tiny_cdtp, tmp_path, monkeypatch):
    """The loss of weights that stand still is linear in it; with none of it nothing trains the denoisers."""
    losses = {}
    for weight in (0.0, 0.5, 1.0):
        monkeypatch.setattr("modafill.training.part.train_stage", partial(kept_losses, losses.setdefault(weight, {})))
        folder = tmp_path / str(weight)
        changes = {"training": "joint", "diffusion_weight": weight, "learning_rate": 1e-9, "epochs": 1}
        spied(tiny_cdtp, monkeypatch, folder, **changes)
    none, half, whole = (losses[weight]["variant-full"] for weight in (0.0, 0.5, 1.0))
    assert whole - none > 0.5
    assert half == pytest.approx((none + whole) / 2, rel=1e-5)
    monkeypatch.undo()
    trainer, _ = spied(tiny_cdtp, monkeypatch, tmp_path / "run", training="joint", diffusion_weight=0.0)
    fresh = replace(Run.load(tiny_cdtp.run), config=trainer.config).trainer(0, 0, Accelerator(cpu=True), ignore)
    before, after = (t.models["full"].diffusion.unet.state_dict() for t in (fresh, trainer))
    assert all(torch.equal(before[name], after[name]) for name in before)


def kept_losses(losses, stage, *args, report, **options):
    def keep(done):
        losses[done.stage] = done.scalars["loss"]
        report(done)

    train_stage(stage, *args, report=keep, **options)


def test_unknown_variant_and_model(tiny_cdtp):
    run = Run.load(tiny_cdtp.run)
    with pytest.raises(ValueError, match="variants: got 'clean', expected one of full, no-generative"):
        replace(run, variants=("full", "clean"))
    with pytest.raises(ValueError, match="model: got 'mult', expected one of admc, cdtp"):
        replace(run, model="mult")
    with pytest.raises(ValueError, match="seeds: got none"):
        replace(run, seeds=())


def test_a_loss_that_is_not_finite_stops(tiny_cdtp, tmp_path):
    run = Run.load(tiny_cdtp.run)
    run = replace(run, folder=tmp_path / "run", config=replace(run.config, learning_rate=10.0, epochs=30))
    trainer = run.trainer(0, 0, Accelerator(cpu=True), ignore)
    assert trainer.key  # of the labels as they are
    trainer.target = trainer.target.float() * torch.nan
    trainer.labels = replace(trainer.labels, kind="score")
    with pytest.raises(TrainingError, match="backbone: the loss of batch 1 of 4 in epoch 1 is nan"):
        trainer.run()


def test_small_preset_is_a_configuration():
    assert CDTPConfig.preset("small").width < CDTPConfig().width
