"""Encoders, ADN and fusion: the networks of ADMC, one at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modafill import ops
from modafill.diffusion import SOLVERS, Sampling, angular_steps, sample_clean, sample_replace, step_embedding
from modafill.models.admc import ADN, ADMCConfig, Fusion, ModalityEncoder, TokenScaler

SMALL = ADMCConfig(
    width=16,
    textcnn_filters=8,
    mlp_hidden=12,
    classifier_hidden=8,
    adn_layers=2,
    adn_heads=2,
    adn_feedforward=32,
    fusion_feedforward=32,
    start_step=6,
    sampling_steps=4,
)
KINDS = ("lstm", "textcnn", "mlp")


def make_encoder(kind: str, width: int = 5) -> ModalityEncoder:
    torch.manual_seed(0)
    sequence = kind != "mlp"
    encoder = ModalityEncoder("x", width, sequence, replace(SMALL, encoders={"x": kind})).eval()
    # A mean of its own, so that zero padding is not zero after standardising.
    encoder.mean.copy_(torch.linspace(-2, 2, width))
    encoder.std.copy_(torch.linspace(0.5, 2, width))
    return encoder


def sequences(lengths: list[int], width: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, width, generator=generator) * 2 for n in lengths]


def padded(rows: list[Tensor], steps: int, fill: float = 0.0) -> Tensor:
    return torch.stack([nn.functional.pad(x, (0, 0, 0, steps - len(x)), value=fill) for x in rows])


@pytest.mark.parametrize("kind", ["lstm", "textcnn"])
@pytest.mark.parametrize("fill", [0.0, 1e4, math.nan])
def test_padding_does_not_reach_the_embedding(kind: str, fill: float) -> None:
    encoder = make_encoder(kind)
    # 1 to 4 steps: shorter than some or all of the kernels 3, 4, 5.
    rows = sequences([1, 2, 3, 4, 5, 9])
    lengths = torch.tensor([len(x) for x in rows])
    with torch.no_grad():
        together = encoder(padded(rows, 14, fill), lengths)
        for row, x in enumerate(rows):
            torch.testing.assert_close(encoder(x[None])[0], together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_company_does_not_reach_the_embedding(kind: str) -> None:
    encoder = make_encoder(kind)
    x = torch.stack(sequences([6] * 4))
    x = x if encoder.sequence else x[:, 0]
    other = x.clone()
    other[1:] = -7.0
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)[0], encoder(other)[0], rtol=1e-5, atol=1e-6)
        assert (encoder(x)[1:] - encoder(other)[1:]).abs().amax(1).min() > 1e-3


def test_padding_with_nan_gives_finite_gradients() -> None:
    for kind in ("lstm", "textcnn"):
        encoder = make_encoder(kind)
        encoder(padded(sequences([2, 4]), 7, math.nan), torch.tensor([2, 4])).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_lstm_takes_the_maximum_over_valid_steps() -> None:
    encoder = make_encoder("lstm")
    rows, lstm = sequences([3, 7]), encoder.encoder.lstm
    expected = torch.empty(2, SMALL.width)
    with torch.no_grad():
        for row, x in enumerate(rows):
            h = c = torch.zeros(1, SMALL.width)
            steps = []
            for step in ((x - encoder.mean) / encoder.std).clamp(-10, 10):
                gates = step @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
                i, f, g, o = gates.chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                steps.append(h[0])
            expected[row] = torch.stack(steps).max(0).values
        got = encoder(padded(rows, 10), torch.tensor([3, 7]))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 5, 8])
def test_textcnn_takes_the_maximum_over_valid_windows(steps: int) -> None:
    encoder = make_encoder("textcnn")
    x = sequences([steps])[0]
    standard = ((x - encoder.mean) / encoder.std).clamp(-10, 10)
    pooled = []
    with torch.no_grad():
        for conv in encoder.encoder.convs:
            kernel = conv.weight.shape[2]
            text = nn.functional.pad(standard, (0, 0, 0, max(0, kernel - steps)))
            windows = [
                torch.einsum("kc,ock->o", text[at : at + kernel], conv.weight) + conv.bias
                for at in range(len(text) - kernel + 1)
            ]
            pooled.append(torch.stack(windows).relu().max(0).values)
        project = encoder.encoder.project
        expected = (project.weight @ torch.cat(pooled) + project.bias).relu()
        got = encoder(padded([x], 12), torch.tensor([steps]))[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_input_is_standardised_and_bounded() -> None:
    encoder = make_encoder("mlp")
    x = torch.stack(sequences([1] * 3))[:, 0]
    with torch.no_grad():
        standard = (x - encoder.mean) / encoder.std
        torch.testing.assert_close(encoder(x), encoder.encoder(standard))
        x[0, 0], standard[0, 0] = 1e9, 10.0
        torch.testing.assert_close(encoder(x), encoder.encoder(standard))


@pytest.mark.parametrize(
    "name, sequence, chosen, kind",
    [
        ("text", True, None, "textcnn"),
        ("audio", True, None, "lstm"),
        ("text", False, None, "mlp"),
        ("text", True, "lstm", "lstm"),
        ("audio", True, "textcnn", "textcnn"),
        ("audio", True, "auto", "lstm"),
    ],
)
def test_choice_of_the_encoder(name: str, sequence: bool, chosen: str | None, kind: str) -> None:
    config = replace(SMALL, encoders={} if chosen is None else {name: chosen})
    assert ModalityEncoder(name, 4, sequence, config).kind == kind


@pytest.mark.parametrize("kind, sequence", [("mlp", True), ("lstm", False), ("textcnn", False)])
def test_an_encoder_that_cannot_read_the_features(kind: str, sequence: bool) -> None:
    with pytest.raises(ValueError, match=rf"encoders\['x'\]: got '{kind}', which cannot read"):
        ModalityEncoder("x", 4, sequence, replace(SMALL, encoders={"x": kind}))


@pytest.mark.parametrize(
    "kind, shape", [("lstm", (2, 3, 4)), ("lstm", (2, 5)), ("textcnn", (2, 3, 6)), ("mlp", (2, 4)), ("mlp", (2, 3, 5))]
)
def test_features_of_another_shape(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"features\['x'\]: got shape"):
        make_encoder(kind)(torch.zeros(shape))


def test_fusion_is_equation_6() -> None:
    """FC(mean over tokens of the attention's output), written out in float64."""
    torch.manual_seed(1)
    config = replace(SMALL, fusion_heads=4, fusion_layers=2)
    fusion = Fusion(3, 5, config).to(torch.float64).eval()
    tokens = torch.randn(6, 3, SMALL.width, dtype=torch.float64)
    heads, size = 4, SMALL.width // 4

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias

    with torch.no_grad():
        h = tokens + fusion.modality
        for layer in fusion.encoder.layers:
            attention = layer.self_attn
            q, k, v = (norm(h, layer.norm1) @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
            mixed = torch.empty_like(h)
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)).softmax(-1)
                mixed[..., part] = weights @ v[..., part]
            h = h + mixed @ attention.out_proj.weight.T + attention.out_proj.bias
            hidden = (norm(h, layer.norm2) @ layer.linear1.weight.T + layer.linear1.bias).relu()
            h = h + hidden @ layer.linear2.weight.T + layer.linear2.bias
        first, last = (m for m in fusion.classifier if isinstance(m, nn.Linear))
        pooled = (h[:, 0] + h[:, 1] + h[:, 2]) / 3
        expected = (pooled @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
        torch.testing.assert_close(fusion(tokens), expected, rtol=1e-10, atol=1e-12)


def test_fusion_tells_modalities_apart() -> None:
    fusion = Fusion(3, 5, SMALL).eval()
    tokens = torch.randn(2, 3, SMALL.width)
    assert (fusion(tokens) - fusion(tokens.flip(1))).abs().max() > 1e-4


def test_defaults_are_section_4_2_of_the_paper() -> None:
    config = ADMCConfig.preset("paper")
    assert config == ADMCConfig()
    assert (config.width, config.adn_layers, config.adn_heads, config.adn_feedforward) == (256, 4, 8, 1024)
    assert (config.diffusion_steps, config.beta_start, config.beta_end) == (1000, 3e-4, 0.06)
    assert (config.fusion_layers, config.fusion_heads, config.fusion_feedforward) == (2, 4, 1024)
    assert (config.fusion_dropout, config.classifier_hidden, config.learning_rate) == (0.3, 128, 1e-4)
    assert (config.conditioning, config.init, config.start_step) == ("replace", "unit", 50)
    assert (config.textcnn_kernels, config.textcnn_filters, config.textcnn_dropout) == ((3, 4, 5), 128, 0.5)


def test_paper_sized_adn() -> None:
    adn = ADN(3, ADMCConfig())
    layers = sum(p.numel() for p in adn.encoder.layers.parameters())
    # 4 × (4·256² + 4·256 attention, 2·256·1024 + 1280 feed-forward, 4·256 norms)
    assert layers == 4 * (4 * 256**2 + 4 * 256 + 2 * 256 * 1024 + 1280 + 4 * 256) == 3_159_040
    assert layers < sum(p.numel() for p in adn.parameters()) < 3_400_000
    assert adn.modality.shape == (3, 256)
    assert adn.last_step == 1000
    assert all(layer.self_attn.num_heads == 8 for layer in adn.encoder.layers)
    fusion = Fusion(3, 4, ADMCConfig())
    assert [layer.self_attn.num_heads for layer in fusion.encoder.layers] == [4, 4]
    assert {m.p for m in fusion.modules() if isinstance(m, nn.Dropout)} == {0.3}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conditioning": "none"}, "conditioning: got 'none'"),
        ({"encoders": {"a": "gru"}}, r"encoders\['a'\]: got 'gru'"),
        ({"adn_heads": 7}, "heads: got 7, expected a divisor of the width 256"),
        ({"fusion_heads": 3}, "heads: got 3"),
        ({"start_step": 1001}, "start_step: got 1001"),
        ({"diffusion_steps": 0}, "steps: got 0"),
    ],
)
def test_impossible_configurations(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADMCConfig(**changes)


def test_configuration_round_trip() -> None:
    config = replace(SMALL, encoders={"text": "lstm"}, textcnn_kernels=(2, 3), adn_width=32)
    assert ADMCConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown fields colour"):
        ADMCConfig.from_dict({**config.to_dict(), "colour": 1})
    with pytest.raises(ValueError, match="preset: got 'huge'"):
        ADMCConfig.preset("huge")
    assert ADMCConfig.preset("small", width=128).width == 128


@pytest.mark.parametrize("width", [8, 9])
def test_step_embedding(width: int) -> None:
    got = step_embedding(torch.tensor([1, 500]), width)
    for row, step in enumerate((1, 500)):
        for i in range(4):
            angle = step / 10_000 ** (i / 4)
            assert got[row, i].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert got[row, 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-4)
    assert (got[:, 8:] == 0).all()


def make_adn(conditioning: str, **changes: object) -> ADN:
    torch.manual_seed(2)
    return ADN(3, replace(SMALL, conditioning=conditioning, **changes)).eval()


conditionings = pytest.mark.parametrize("conditioning", ["replace", "clean"])

# Every pattern of three modalities, the complete one included, mixed up.
AVAILABLE = torch.tensor(
    [[0, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=torch.bool
)


def tokens_of(rows: int) -> Tensor:
    return torch.randn(rows, 3, SMALL.width, generator=torch.Generator().manual_seed(3))


@conditionings
def test_a_step_for_all_rows_or_one_for_each(conditioning: str) -> None:
    adn, x = make_adn(conditioning), tokens_of(8)
    with torch.no_grad():
        torch.testing.assert_close(adn(x, 7, AVAILABLE), adn(x, torch.full((8,), 7), AVAILABLE))
        assert (adn(x, 7, AVAILABLE) - adn(x, 400, AVAILABLE)).abs().max() > 1e-4
        swapped = adn(x[:, [1, 0, 2]], 7, AVAILABLE[:, [1, 0, 2]])[:, [1, 0, 2]]
        assert (swapped - adn(x, 7, AVAILABLE)).abs().max() > 1e-4, "modalities must not be interchangeable"


def test_clean_knows_what_is_observed() -> None:
    adn, x = make_adn("clean"), tokens_of(8)
    with torch.no_grad():
        assert (adn(x, 7, AVAILABLE) - adn(x, 7, ~AVAILABLE)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="available: got None"):
        adn(x, 7)


def test_last_step_of_clean() -> None:
    assert make_adn("clean").last_step == 547
    assert make_adn("clean", min_alpha_bar=1e-2).last_step < 547


@conditionings
@pytest.mark.parametrize("poison", [5.0, math.nan, math.inf])
def test_sample_reads_nothing_hidden(conditioning: str, poison: float) -> None:
    adn, tokens = make_adn(conditioning), tokens_of(8)
    out = adn.sample(tokens, AVAILABLE, n_samples=2, seed=1)
    assert torch.equal(
        adn.sample(torch.where(AVAILABLE[..., None], tokens, poison), AVAILABLE, n_samples=2, seed=1), out
    )
    assert torch.isfinite(out).all()
    for sample in out:
        assert torch.equal(sample[AVAILABLE], tokens[AVAILABLE])
    # The test means something only if what is observed does count.
    moved = tokens.clone()
    moved[0, 1] += 1.0
    assert (adn.sample(moved, AVAILABLE, seed=1)[0, 0, 0] != out[0, 0, 0]).any()


@conditionings
def test_a_row_is_imputed_the_same_wherever_it_stands(conditioning: str) -> None:
    adn, rows = make_adn(conditioning, start_step=3, sampling_steps=3), 512
    tokens, available, ids = tokens_of(rows), AVAILABLE.repeat(64, 1), torch.arange(rows)
    whole = adn.sample(tokens, available, seed=4)[0]

    def check(at: Tensor, **options: Any) -> None:
        again = adn.sample(tokens[at], available[at], seed=4, row_id=ids[at], **options)[0]
        torch.testing.assert_close(again, whole[at], rtol=0, atol=1e-5)

    check(ids.flip(0))
    check(ids[300:320])
    check(ids[:64], sampling=Sampling(chunk_size=7))
    check(ids[:16], n_samples=3)
    for row in (0, 2, 402, 511):
        check(ids[row : row + 1])
    two = adn.sample(tokens[:16], available[:16], n_samples=2, seed=4)
    other = adn.sample(tokens[:16], available[:16], seed=5)[0]
    hidden = ~available[:16]
    assert ((two[0] - two[1])[hidden].abs().amax(-1) > 1e-3).all()
    assert ((two[0] - other)[hidden].abs().amax(-1) > 1e-3).all()


def test_noise_has_the_same_bits_wherever_a_row_stands() -> None:
    table, ids = ADMCConfig().schedule().table, torch.arange(512) * 2**33
    x = torch.randn(512, 3, 5)
    steps = torch.randint(1, 1001, (512,), generator=torch.Generator().manual_seed(0))
    normal = ops.randn((512, 3, 5), seed=6, row_id=ids)
    noisy, noise = ops.add_noise(x, table, steps, seed=6, row_id=ids)
    assert normal.flatten(1).unique(dim=0).shape[0] == 512
    for rows in (torch.arange(511, -1, -1), torch.arange(200, 260), torch.tensor([17])):
        assert torch.equal(ops.randn((len(rows), 3, 5), seed=6, row_id=ids[rows]), normal[rows])
        part, part_noise = ops.add_noise(x[rows], table, steps[rows], seed=6, row_id=ids[rows])
        assert torch.equal(part, noisy[rows])
        assert torch.equal(part_noise, noise[rows])


@conditionings
@pytest.mark.parametrize("adn_width", [None, 24])
def test_the_fast_path_is_the_network(conditioning: str, adn_width: int | None) -> None:
    """What sampling runs, and the module itself in the same loop."""
    adn, tokens = make_adn(conditioning, adn_width=adn_width, start_step=9, sampling_steps=9), tokens_of(8)
    x = torch.randn(8, 3, SMALL.width, generator=torch.Generator().manual_seed(5))
    network, added = adn.predictor([400, 7, 1])
    for i, step in enumerate((400, 7, 1)):
        with torch.no_grad():
            expected = adn(x, step, AVAILABLE).masked_fill(AVAILABLE[..., None], 0.0)
        found = ops.token_denoiser(network, x, AVAILABLE, added[i])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    options = {"schedule": adn.schedule, "seed": 4, "row_id": torch.arange(8)}
    observed = torch.where(AVAILABLE[..., None], tokens, 0.0)
    with torch.no_grad():
        if conditioning == "replace":
            expected = sample_replace(adn, observed, AVAILABLE, start_step=9, **options)
        else:
            steps = angular_steps(adn.schedule, adn.last_step, 9)
            options["solver"] = adn.config.solver
            expected = sample_clean(partial(adn, available=AVAILABLE), observed, AVAILABLE, steps=steps, **options)
    torch.testing.assert_close(adn.sample(tokens, AVAILABLE, seed=4)[0], expected, rtol=0, atol=1e-4)
    half = adn.sample(tokens, AVAILABLE, seed=4, sampling=Sampling(dtype=torch.bfloat16))[0]
    assert 1e-6 < (half - expected).abs().max() < 0.1


def test_solvers_of_the_configuration_and_of_a_call() -> None:
    tokens, plain = tokens_of(8), make_adn("clean", sampling_steps=6)
    results = {solver: plain.sample(tokens, AVAILABLE, sampling=Sampling(solver=solver)) for solver in SOLVERS}
    for solver, expected in results.items():
        assert torch.equal(make_adn("clean", sampling_steps=6, solver=solver).sample(tokens, AVAILABLE), expected)
    assert len({tuple(out[0, 0, 0].tolist()) for out in results.values()}) == len(SOLVERS)
    with pytest.raises(ValueError, match="solver: got 'euler', expected one of ddim, dpm\\+\\+, heun"):
        Sampling(solver="euler")
    seen: list[tuple[int, int]] = []
    plain.sample(
        tokens, AVAILABLE, n_samples=2, sampling=Sampling(chunk_size=5), progress=lambda *done: seen.append(done)
    )
    assert seen == [(5, 12), (10, 12), (12, 12)]


@conditionings
def test_complete_rows_cost_nothing(conditioning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adn, tokens = make_adn(conditioning), tokens_of(4)
    calls: list[int] = []
    op = ops.token_denoiser
    monkeypatch.setattr(
        ops, "token_denoiser", lambda net, x, *more, **named: calls.append(len(x)) or op(net, x, *more, **named)
    )
    complete = torch.ones(4, 3, dtype=torch.bool)
    assert torch.equal(adn.sample(tokens, complete, n_samples=3), tokens.expand(3, -1, -1, -1))
    assert calls == []
    adn.sample(tokens, AVAILABLE[:4])
    assert set(calls) == {3}
    evaluations = {"replace": SMALL.start_step, "clean": SMALL.sampling_steps}
    assert len(calls) == evaluations[conditioning]
    calls.clear()
    adn.sample(tokens, AVAILABLE[:4], sampling=Sampling(steps=3))
    assert len(calls) == 3


@pytest.mark.parametrize("name, value", [("solver", "ddim"), ("eta", 0.5)])
def test_the_papers_loop_has_no_solver(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {value!r}, expected None with conditioning 'replace'"):
        make_adn("replace").sample(tokens_of(4), AVAILABLE[:4], sampling=Sampling(**{name: value}))


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("steps", 0, "a whole number, at least 1"),
        ("steps", 2.5, "a whole number, at least 1"),
        ("chunk_size", -1, "a whole number, at least 1"),
        ("solver", "euler", "one of ddim, dpm"),
        ("dtype", torch.int8, "a floating-point type"),
    ],
)
def test_sampling_says_what_it_wants(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {value!r}, expected {expected}"):
        Sampling(**{name: value})


def test_no_rows() -> None:
    out = make_adn("clean").sample(torch.zeros(0, 3, SMALL.width), torch.zeros(0, 3, dtype=torch.bool), n_samples=2)
    assert out.shape == (2, 0, 3, SMALL.width)


@conditionings
@pytest.mark.parametrize(
    "tokens, available, options, message",
    [
        (torch.zeros(2, 2, 16), torch.ones(2, 3).bool(), {}, r"tokens: got shape \[2, 2, 16\]"),
        (torch.zeros(2, 3, 15), torch.ones(2, 3).bool(), {}, "tokens: got shape"),
        (torch.zeros(2, 3, 16), torch.ones(2, 3), {}, "available: got torch.float32"),
        (torch.zeros(2, 3, 16), torch.ones(3, 3).bool(), {}, "available: got"),
        (torch.zeros(2, 3, 16), torch.tensor([[1, 0, 0], [0, 0, 0]]).bool(), {}, r"nothing is observed in rows \[1\]"),
        (torch.zeros(1, 3, 16), torch.tensor([[True, False, True]]), {"n_samples": 0}, "n_samples: got 0"),
        (
            torch.zeros(1, 3, 16),
            torch.tensor([[True, False, True]]),
            {"row_id": torch.arange(2)},
            r"row_id: got shape \[2\], expected \[1\]",
        ),
    ],
)
def test_sample_errors(
    conditioning: str, tokens: Tensor, available: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_adn(conditioning).sample(tokens, available, **options)


@pytest.mark.parametrize(
    "conditioning, steps, message",
    [("replace", 1001, "start_step: got 1001"), ("clean", 548, "evaluations: got 548, expected 1…547")],
)
def test_sampling_outside_the_schedule(conditioning: str, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_adn(conditioning).sample(tokens_of(8), AVAILABLE, sampling=Sampling(steps=steps))


def test_scaler_standardises_observed_rows() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 2, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 3
    x[:, 1, 2] = 0.75  # a unit that never changes
    available = torch.rand(200, 2, generator=generator) < 0.7
    scaler = TokenScaler(2, 4)
    scaler.fit(torch.where(available[..., None], x, torch.nan), available, scale=1.5)
    tokens = scaler(x)
    for m in range(2):
        seen = tokens[available[:, m], m]
        torch.testing.assert_close(seen.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
        expected = torch.full((4,), 1.5)
        if m == 1:
            expected[2] = 0.0
        torch.testing.assert_close(seen.std(0, correction=0), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaler.inverse(tokens), x, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="modality 1 is never observed"):
        TokenScaler(2, 4).fit(x, torch.tensor([True, False]).expand(200, -1), 1.0)
