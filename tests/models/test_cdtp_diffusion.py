"""CDTP's loss and sampler against their equations, a sample and a pair at a time, without padding."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from modafill import ops
from modafill.data import Batch, all_patterns
from modafill.diffusion import angular_steps, sample_row_ids
from modafill.models.cdtp import CDTP, CDTPConfig, ConditionalDiffusion, SequenceSpec, StackedUNet
from modafill.models.cdtp import system as cdtp_system
from modafill.models.cdtp.stacked import _Windows
from modafill.ops import Draw

LENGTHS = (5, 9, 5)
WIDTH = 8


def make(**changes: object) -> ConditionalDiffusion:
    torch.manual_seed(0)
    numbers: dict[str, object] = {
        "width": WIDTH, "heads": 2, "unet_channels": (8, 16), "unet_blocks": 1, "diffusion_steps": 50, "beta_end": 0.2,
        "sampling_steps": 4, "min_alpha_bar": 0.01, "condition_width": 6,
    }  # fmt: skip
    model = ConditionalDiffusion(LENGTHS, CDTPConfig(**{**numbers, **changes}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.mean.normal_()
    model.std.uniform_(0.5, 2.0)
    return model.eval()


def inputs(rows: int = 9) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """Ragged sequences, zero behind their ends, of which each row has others; steps and row ids."""
    g = torch.Generator().manual_seed(1)
    available = all_patterns(3)[torch.arange(rows) % 7]
    x, lengths = [], []
    for m, longest in enumerate(LENGTHS):
        n = torch.randint(1, longest + 1, (rows,), generator=g)
        keep = (torch.arange(longest) < n[:, None]) & available[:, m, None]
        x.append(torch.randn(rows, longest, WIDTH, generator=g) * keep[..., None])
        lengths.append(n)
    step = torch.randint(1, 40, (rows, 6), generator=g)
    return x, lengths, available, step, torch.randperm(100, generator=g)[:rows]


def alone(model: ConditionalDiffusion, pair: int) -> StackedUNet:
    net = StackedUNet(1, WIDTH, 6, model.config.unet_channels, 1, 2).eval()
    net.load_state_dict({name: value[pair : pair + 1] for name, value in model.unet.state_dict().items()})
    return net


def predict(
    model: ConditionalDiffusion, pair: int, noisy: Tensor, step: int, source: Tensor, keys: int, steps: int
) -> Tensor:
    """Of one sample, ``noisy [n, d]``, whose source has ``keys`` real steps."""
    net = alone(model, pair)
    code = model.encoders[model.pairs[pair][1]](source[None, :keys])
    padded = nn.functional.pad(code, (0, 0, 0, len(source) - keys))
    near = padded if len(source) == steps else nn.functional.interpolate(padded.mT, steps, mode="linear").mT
    condition = net.condition(near[None, :, : len(noisy)], code[None], torch.tensor([[keys]]))
    return net(noisy[None, None], torch.tensor([[step]]), condition, torch.tensor([[len(noisy)]]))[0, 0]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("order", ["as it is", "reversed"])
def test_loss_is_the_mean_over_real_steps_of_real_pairs(prediction: str, order: str) -> None:
    model = make(prediction=prediction)
    x, lengths, available, step, row_id = inputs()
    if order == "reversed":
        x, lengths = [t.flip(0) for t in x], [t.flip(0) for t in lengths]
        available, step, row_id = available.flip(0), step.flip(0), row_id.flip(0)
    schedule = model.config.schedule()
    total, count = 0.0, 0
    with torch.no_grad():
        for b in range(len(row_id)):
            for p, (t, s) in enumerate(model.pairs):
                if not (available[b, t] and available[b, s]):
                    continue
                n, keys, at = int(lengths[t][b]), int(lengths[s][b]), int(step[b, p])
                own = row_id[b : b + 1] * 6 + p
                x0 = (x[t][b] - model.mean[t]) / model.std[t]
                noise = ops.add_noise(x0[None], schedule.table, at, seed=3, row_id=own)[1][0]
                bar = float(schedule.alpha_bar[at])
                noisy = bar**0.5 * x0 + (1 - bar) ** 0.5 * noise
                found = predict(model, p, noisy[:n], at, x[s][b], keys, LENGTHS[t])
                expected = noise if prediction == "epsilon" else bar**0.5 * noise - (1 - bar) ** 0.5 * x0
                total += float((found - expected[:n]).double().square().sum())
                count += n * WIDTH
        loss = model.loss(x, lengths, available, step, seed=3, row_id=row_id)
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_sampler_is_ddim(prediction: str) -> None:
    model = make(prediction=prediction)
    x, lengths, available, _, row_id = inputs()
    made = model.generate(x, lengths, available, seed=4, row_id=row_id)
    schedule = model.config.schedule()
    for b in range(len(row_id)):
        for p, (t, s) in enumerate(model.pairs):
            if available[b, t] or not available[b, s]:
                assert (t, s) not in made or not made[t, s][b].any()
                continue
            n, keys = int(lengths[t][b]), int(lengths[s][b])
            own = row_id[b : b + 1] * 6 + p
            z = ops.randn((1, LENGTHS[t], WIDTH), seed=4, row_id=own, draw=Draw.INITIAL)[0, :n]
            with torch.no_grad():
                for step, previous in pairwise(angular_steps(schedule, model.last_step, 4)):
                    signal, sigma = (float(v) ** 0.5 for v in (schedule.alpha_bar[step], 1 - schedule.alpha_bar[step]))
                    said = predict(model, p, z, step, x[s][b], keys, LENGTHS[t])
                    if prediction == "epsilon":
                        x0, eps = (z - sigma * said) / signal, said
                    else:
                        x0, eps = signal * z - sigma * said, sigma * z + signal * said
                    bar = float(schedule.alpha_bar[previous])
                    z = bar**0.5 * x0 + (1 - bar) ** 0.5 * eps
            torch.testing.assert_close(made[t, s][b, :n], z * model.std[t] + model.mean[t], rtol=2e-3, atol=2e-3)
            assert not made[t, s][b, n:].any()


def test_a_denoiser_runs_once_a_step_for_all_pairs_of_a_length_and_encoders_once() -> None:
    model = make()
    x, lengths, available, _, row_id = inputs()
    calls = {"unet": 0, "encoders": 0}

    def count(name: str) -> object:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    model.unet.register_forward_hook(count("unet"))
    for encoder in model.encoders:
        encoder.register_forward_hook(count("encoders"))
    model.generate(x, lengths, available, seed=4, row_id=row_id)
    assert calls == {"unet": 2 * 4, "encoders": 3}  # two lengths of targets, four steps
    rows: list[int] = []
    for encoder in model.encoders:
        encoder.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    model.generate(x, lengths, available, seed=4, row_id=row_id)
    # Each source for the incomplete samples that have it: complete ones cost nothing.
    incomplete = ~available.all(1)
    assert rows == [int((available[:, s] & incomplete).sum()) for s in range(3)]


@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_gradient_of_windows(taps: int, stride: int, steps: int) -> None:
    x = torch.randn(2, 3, steps, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: _Windows.apply(t, taps, stride), (x,))


SPECS = {"text": SequenceSpec(6, 5), "audio": SequenceSpec(4, 9), "vision": SequenceSpec(3, 1, sequence=False)}
SMALL = {"width": 8, "heads": 2, "layers": 1, "self_layers": 1, "unet_channels": (8,), "unet_blocks": 1,
         "prompt_length": 2, "sampling_steps": 2}  # fmt: skip


def batch_of(rows: int = 7) -> Batch:
    g = torch.Generator().manual_seed(0)
    features = {
        "text": torch.randn(rows, 5, 6, generator=g),
        "audio": torch.randn(rows, 9, 4, generator=g),
        "vision": torch.randn(rows, 3, generator=g),
    }
    lengths = {"text": torch.tensor([5, 1, 3, 2, 5, 4, 1]), "audio": torch.tensor([9, 9, 1, 4, 2, 8, 3])}
    return Batch(features, torch.ones(rows, 3, dtype=torch.bool), torch.arange(rows), lengths)


def system(**changes: object) -> CDTP:
    torch.manual_seed(0)
    return CDTP(SPECS, 4, CDTPConfig(**{**SMALL, **changes})).eval()


def test_hiding_projected_sequences_is_projecting_hidden_ones() -> None:
    model, whole = system(projection_kernel=3), batch_of()
    shown = all_patterns(3)
    before, after = model.project(whole.hide(shown)), model.project(whole).hide(shown)
    for one, other in zip((*before.x, *before.lengths), (*after.x, *after.lengths), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before.available, after.available)


def test_lengths_of_what_is_missing_come_from_sequences() -> None:
    """A vector says nothing of length while a sequence is there."""
    model = system()
    given = model.project(batch_of().hide(torch.tensor([True, False, True]).expand(7, 3)))
    assert model.suggested_lengths(given)[1].tolist() == [9, 2, 6, 4, 9, 8, 2]  # ⌈9 n / 5⌉
    given = model.project(batch_of().hide(torch.tensor([False, False, True]).expand(7, 3)))
    assert [n[0].item() for n in model.suggested_lengths(given)] == [5, 9, 1]


def test_an_empty_modality_is_pooled_where_it_sees_all_of_the_others() -> None:
    torch.manual_seed(0)
    numbers = {**SMALL, "completion": "none", "type_prompt": "none", "signal_prompt": False, "generative_prompt": False}
    model = CDTP({"text": SequenceSpec(6, 5), "audio": SequenceSpec(4, 5)}, 4, CDTPConfig(**numbers)).eval()
    with torch.no_grad():
        # The classifier reads audio's token alone.
        model.backbone.head[-1].weight.zero_()
        model.backbone.head[-1].bias.zero_()
        model.backbone.classify.weight[:, :8] = 0
    x, lengths = torch.randn(3, 5, 6), torch.tensor([5, 3, 2])
    batch = Batch(
        {"text": x, "audio": torch.zeros(3, 5, 4)}, torch.tensor([[True, False]] * 3), torch.arange(3),
        {"text": lengths, "audio": torch.zeros(3, dtype=torch.int64)},
    )  # fmt: skip
    before = model(batch)
    x[torch.arange(3), lengths - 1] += 1
    assert bool((model(batch) != before).any(1).all())


def test_what_a_batch_must_have() -> None:
    batch = batch_of()
    del batch.lengths["audio"]
    with pytest.raises(ValueError, match=r"lengths\['audio'\]: got no lengths, expected an int64 \[7\]"):
        system()(batch)


def pair_of(length: int) -> dict[str, SequenceSpec]:
    return {"a": SequenceSpec(3, length), "b": SequenceSpec(3, 1)}


@pytest.mark.parametrize(
    ("specs", "outputs", "changes", "classes", "message"),
    [
        (SPECS, 4, {}, ["a", "b"], "classes: got 2 names, expected 4 or none"),
        (pair_of(1), 2, {}, None, "type_prompt: got 'bias' for modalities of one step"),
        (pair_of(2049), 2, {}, None, "got sequences of 2049 steps, expected at most 2048"),
        (pair_of(2048), 2, {"type_prompt": "append"}, None, "expected at most 2046"),
        (SPECS, 4, {"width": 512, "heads": 4, "unet_channels": (16,)}, None, "width: got 512 with 4 heads"),
        ({"a": SequenceSpec(3, 4)}, 2, {}, None, r"modalities: got \['a'\], expected at least two"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(specs, outputs, changes, classes, message) -> None:
    with pytest.raises(ValueError, match=message):
        CDTP(specs, outputs, CDTPConfig(**{**SMALL, **changes}), classes)


@pytest.mark.parametrize(("length", "sequence"), [(0, True), (3, False)])
def test_lengths_that_cannot_be(length: int, sequence: bool) -> None:
    with pytest.raises(ValueError, match=f"length: got {length}, expected"):
        SequenceSpec(3, length, sequence=sequence)


@pytest.mark.parametrize("rows_at_a_time", [1, 21, 256])
def test_draws_are_the_same_however_many_run_together(rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = system()
    batch = batch_of().hide(all_patterns(3))
    given = model.project(batch)
    ids = sample_row_ids(batch.row_id, 5).view(5, 7)
    one_by_one = [model.generate(replace(given, row_id=ids[k]), seed=2) for k in range(5)]
    expected = torch.stack([model.predict(model.complete(given, drawn)).softmax(-1) for drawn in one_by_one]).mean(0)
    monkeypatch.setattr(cdtp_system, "_ROWS_AT_A_TIME", rows_at_a_time)
    found = list(model.samples(given, 5, seed=2))
    assert len(found) == 5
    for drawn, right in zip(found, one_by_one, strict=True):
        assert drawn.keys() == right.keys()
        for pair in right:
            torch.testing.assert_close(drawn[pair], right[pair])
    torch.testing.assert_close(model.recognise(batch, n_samples=5, seed=2), expected)


def test_what_is_denoised_stays_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step, seen = system(), ops.ddim_step, []
    given = model.project(batch_of().hide(all_patterns(3)))
    monkeypatch.setattr(ops, "ddim_step", lambda x, *args, **named: seen.append(x.dtype) or step(x, *args, **named))
    with torch.autocast("cpu", torch.bfloat16):
        made = model.generate(model.project(batch_of().hide(all_patterns(3))))
    assert set(seen) == {torch.float32}
    for pair, right in model.generate(given).items():
        torch.testing.assert_close(made[pair], right, rtol=0.05, atol=0.05)


def test_samples_beyond_64_bits_are_refused() -> None:
    model = system()
    given = model.project(batch_of().hide(torch.tensor([True, False, False]).expand(7, 3)))
    with pytest.raises(ValueError, match="n_samples: got 6000, expected at most 5460"):
        next(model.samples(given, 6000))


def test_recognition_of_one_sample_where_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = system(completion="linear"), []
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda completed: calls.append(1) or predict(completed))
    many = model.recognise(batch_of(), n_samples=16)
    assert len(calls) == 1
    torch.testing.assert_close(many, model.recognise(batch_of()))
    assert many.shape == (7, 4)
