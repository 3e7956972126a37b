from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modafill.data import Batch, all_patterns
from modafill.models import folder as folder_module
from modafill.models.admc import ADMC, ADMCConfig, ModalitySpec

MakeADMC = Callable[..., ADMC]

conditionings = pytest.mark.parametrize("conditioning", ["replace", "clean"])


def make_batch(copies: int = 2) -> Batch:
    """Every pattern of three modalities, twice."""
    generator = torch.Generator().manual_seed(1)
    available = all_patterns(3).repeat(copies, 1)
    rows = len(available)
    lengths = {name: torch.randint(1, 8, (rows,), generator=generator) for name in ("text", "audio")}
    return Batch(
        {
            "text": torch.randn(rows, 7, 5, generator=generator),
            "audio": torch.randn(rows, 7, 4, generator=generator),
            "vision": torch.randn(rows, 3, generator=generator),
        },
        available,
        torch.arange(rows) * 1001,
        lengths,
    )


def poisoned(batch: Batch, value: float) -> Batch:
    """Hidden features, and the padding of observed ones, replaced by ``value``; hidden lengths by another."""
    features, lengths = {}, {}
    for m, (name, x) in enumerate(batch.features.items()):
        seen = batch.available[:, m]
        if name in batch.lengths:
            lengths[name] = torch.where(seen, batch.lengths[name], 3)
            steps = torch.arange(x.shape[1]) < batch.lengths[name][:, None]
            features[name] = torch.where((steps & seen[:, None])[..., None], x, value)
        else:
            features[name] = torch.where(seen[:, None], x, value)
    return Batch(features, batch.available, batch.row_id, lengths)


@conditionings
@pytest.mark.parametrize("value", [9.0, math.nan, math.inf])
def test_nothing_hidden_is_read(make_admc: MakeADMC, conditioning: str, value: float) -> None:
    model, batch = make_admc(conditioning), make_batch()
    other = poisoned(batch, value)
    with torch.no_grad():
        tokens, probabilities = model.encode(batch), model.recognise(batch, n_samples=2)
        assert torch.equal(model.embed(other), model.embed(batch))
        assert torch.equal(model.encode(other), tokens)
        assert torch.equal(model.recognise(other, n_samples=2), probabilities)
    assert torch.isfinite(probabilities).all()
    assert (tokens[~batch.available] == 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(batch)))


@pytest.mark.parametrize("m", range(3))
def test_every_observed_modality_counts(make_admc: MakeADMC, m: int) -> None:
    model, batch = make_admc(), make_batch()
    before = model.recognise(batch)
    list(batch.features.values())[m].mul_(-3.0)
    changed = (model.recognise(batch) != before).any(1)
    assert torch.equal(changed, batch.available[:, m])


def test_tokens_are_standardised_embeddings(make_admc: MakeADMC) -> None:
    model, batch = make_admc(), make_batch()
    with torch.no_grad():
        embeddings, tokens = model.embed(batch), model.encode(batch)
        for row, m in batch.available.nonzero().tolist():
            name = batch.modalities[m]
            x = batch.features[name][row : row + 1]
            x = x[:, : batch.lengths[name][row]] if name in batch.lengths else x
            alone = model.unimodal[name].encoder(x)[0]
            torch.testing.assert_close(embeddings[row, m], alone, rtol=1e-5, atol=1e-5)
            expected = (alone - model.scaler.mean[m]) / model.scaler.std[m]
            torch.testing.assert_close(tokens[row, m], expected, rtol=1e-4, atol=1e-5)


@conditionings
def test_recognition_of_a_row_does_not_depend_on_its_batch(make_admc: MakeADMC, conditioning: str) -> None:
    model, batch = make_admc(conditioning), make_batch()
    whole = model.recognise(batch, n_samples=3, seed=2)
    for rows in (list(range(13, -1, -1)), [3], [6], [5, 0, 12]):
        again = model.recognise(batch.select(torch.tensor(rows)), n_samples=3, seed=2)
        torch.testing.assert_close(again, whole[rows], rtol=0, atol=1e-5)


def test_each_pattern_has_its_fusion_network(make_admc: MakeADMC) -> None:
    model, batch = make_admc(), make_batch()
    before = model.recognise(batch)
    assert len(model.fusions) == 6
    for index, network in enumerate([*model.fusions, model.enhanced]):
        bias = network.classifier[-1].bias
        kept = bias.detach().clone()
        with torch.no_grad():
            bias[0] += 1.0
            changed = (model.recognise(batch) != before).any(1)
            bias.copy_(kept)
        assert changed.nonzero().flatten().tolist() == [index, index + 7]


def test_probabilities_are_averaged_over_completions(make_admc: MakeADMC) -> None:
    model, batch = make_admc(), make_batch(1).select(slice(0, 6))
    with torch.no_grad():
        completed = model.adn.sample(model.encode(batch), batch.available, n_samples=3, seed=5, row_id=batch.row_id)
        for row in range(6):
            each = [model.fusions[row](sample[row : row + 1]).softmax(-1)[0] for sample in completed]
            got = model.recognise(batch, n_samples=3, seed=5)[row]
            torch.testing.assert_close(got, sum(each) / 3, rtol=1e-5, atol=1e-6)


def test_enhanced_tokens_hold_each_modality_made_from_the_others(make_admc: MakeADMC) -> None:
    model = make_admc()
    tokens = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    enhanced = model.enhance(tokens, seed=1)
    assert torch.equal(enhanced[..., :8], tokens)
    for m in range(3):
        moved = tokens.clone()
        moved[:, m] += 5.0
        again = model.enhance(moved, seed=1)[..., 8:]
        assert torch.equal(again[:, m], enhanced[:, m, 8:]), "a modality must not be made from itself"
        others = [i for i in range(3) if i != m]
        assert (again[:, others] != enhanced[:, others, 8:]).all(1).any()


@conditionings
def test_round_trip_gives_the_same_bits(make_admc: MakeADMC, conditioning: str, tmp_path: Path) -> None:
    model, batch = make_admc(conditioning, encoders={"text": "lstm"}, adn_width=16), make_batch()
    model.window = 6
    model.save_pretrained(tmp_path / "model", seed=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["seed"] == 3
    again = ADMC.from_pretrained(str(tmp_path / "model"))
    assert not again.training
    for name in ("modalities", "config", "classes", "window"):
        assert getattr(again, name) == getattr(model, name)
    assert torch.equal(again.recognise(batch, n_samples=2), model.recognise(batch, n_samples=2))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


@pytest.fixture
def saved(make_admc: MakeADMC, tmp_path: Path) -> Path:
    make_admc().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in changes}
    kept |= {name: value for name, value in changes.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "adn.modality"}, path / "model.safetensors")


def widen(path: Path) -> None:
    # Terabytes, if it were made before it was compared.
    numbers = json.loads((path / "config.json").read_text())["config"]
    edit_config(path, config=numbers | {"classifier_hidden": 10**9})


def rename_a_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["adn.colour"] = torch.zeros(2)
    save_file(tensors, path / "model.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder's contents": (lambda p: [f.unlink() for f in p.iterdir()], "no config.json there"),
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json there"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "no such file"),
    "broken config": (lambda p: (p / "config.json").write_text('{"model": '), r"config\.json: not valid JSON"),
    "binary config": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json: not valid JSON"),
    "a list for config": (lambda p: (p / "config.json").write_text("[1]"), "got a list, expected an object"),
    "older format": (lambda p: edit_config(p, format_version=1), "format version 1, this modafill reads version 2"),
    "newer format": (lambda p: edit_config(p, format_version=3), "format version 3, this modafill reads version 2"),
    "no format": (lambda p: edit_config(p, format_version=None), "format version None"),
    "other model": (lambda p: edit_config(p, model="cdtp"), "holds the model 'cdtp', expected 'admc'"),
    "no modalities": (lambda p: edit_config(p, modalities=None), "not the description of an ADMC"),
    "odd modality": (lambda p: edit_config(p, modalities={"text": {"size": 3}}), "not the description of an ADMC"),
    "no numbers": (lambda p: edit_config(p, config=None), "not the description of an ADMC"),
    "unknown numbers": (lambda p: edit_config(p, config={"colour": 1}), "unknown fields colour"),
    "sizes of another model": (widen, "not the description of an ADMC|got \\[.*\\], expected \\[.*1000000000"),
    "other classes": (lambda p: edit_config(p, n_classes=5), r"got \[4\], expected \[5\]"),
    "empty weights": (lambda p: (p / "model.safetensors").write_bytes(b""), "not a readable safetensors file"),
    "cut weights": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-4]),
        "not a readable safetensors file",
    ),
    "a tensor less": (drop_a_tensor, r"adn\.modality: got nothing, expected \[3, 8\]"),
    "a tensor more": (rename_a_tensor, r"adn\.colour: got \[2\], expected nothing"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_what_cannot_be_loaded_is_named(saved: Path, damage: str) -> None:
    break_it, message = DAMAGES[damage]
    break_it(saved)
    with pytest.raises(ValueError, match=message) as caught:
        ADMC.from_pretrained(saved)
    if damage != "unknown numbers":
        assert str(saved) in str(caught.value)


def test_weights_of_other_dimensions(make_admc: MakeADMC, saved: Path, tmp_path: Path) -> None:
    make_admc(width=16).save_pretrained(tmp_path / "wider")
    shutil.copy(tmp_path / "wider" / "model.safetensors", saved)
    with pytest.raises(ValueError, match=r"got \[.*16.*\], expected \[.*8.*\]; the checkpoint is of another model"):
        ADMC.from_pretrained(saved)


@pytest.mark.parametrize("path", ["nowhere", "/no/such/folder", "a/b/c"])
def test_an_unknown_folder(path: str) -> None:
    with pytest.raises(ValueError, match=f"path: got '{path}', expected an existing folder or a hub id"):
        ADMC.from_pretrained(path)


def test_a_name_in_a_folder_that_is_here_is_not_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder_module, "snapshot_download", None)
    with pytest.raises(ValueError, match="path: got 'runs/nope', expected an existing folder or a hub id"):
        ADMC.from_pretrained("runs/nope")


@pytest.mark.parametrize("path", ["runs/", "-bad-/name"])
def test_what_is_no_name_on_the_hub(path: str) -> None:
    with pytest.raises(ValueError, match=f"path: got '{path}', not a folder here, and not to be had from the hub"):
        ADMC.from_pretrained(path)


def test_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(folder_module, "snapshot_download", lambda name, **_: asked.append(name) or str(saved))
    assert ADMC.from_pretrained("someone/model").n_classes == 4
    assert asked == ["someone/model"]

    def unreachable(name: str, **_: object) -> str:
        raise ConnectionError("offline\nand so on")

    monkeypatch.setattr(folder_module, "snapshot_download", unreachable)
    with pytest.raises(
        ValueError, match=r"path: got 'runs/model', not a folder here, and not to be had from the hub \(offline\)"
    ):
        ADMC.from_pretrained("runs/model")


@pytest.mark.parametrize("existing", [False, True])
def test_a_save_that_fails_leaves_what_was_there(
    make_admc: MakeADMC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    path = tmp_path / "model"
    if existing:
        make_admc().save_pretrained(path)
    before = {p.name: p.read_bytes() for p in path.iterdir()} if existing else {}

    def full(target: Path, *_: object) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(folder_module, "write_tensors", full)
    with pytest.raises(OSError, match="disk full"):
        make_admc(width=16).save_pretrained(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["model"] if existing else [])
    assert {p.name: p.read_bytes() for p in path.glob("*")} == before


def test_saving_again_replaces_the_model_alone(make_admc: MakeADMC, saved: Path) -> None:
    (saved / "README.md").write_text("my model")
    make_admc(width=16).save_pretrained(saved)
    assert (saved / "README.md").read_text() == "my model"
    assert ADMC.from_pretrained(saved).config.width == 16


def test_one_modality_is_no_system() -> None:
    with pytest.raises(ValueError, match=r"modalities: got \['text'\], expected at least two"):
        ADMC({"text": ModalitySpec(3, False)}, 2, ADMCConfig())


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_modalities(make_admc: MakeADMC, count: int) -> None:
    config = make_admc().config
    model = ADMC({f"m{i}": ModalitySpec(3 + i, False) for i in range(count)}, 2, config).eval()
    available = all_patterns(count)
    rows = len(available)
    batch = Batch({f"m{i}": torch.randn(rows, 3 + i) for i in range(count)}, available, torch.arange(rows))
    assert len(model.fusions) == 2**count - 2
    assert model.recognise(batch).shape == (rows, 2)
