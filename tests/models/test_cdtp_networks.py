"""CDTP's networks against plain reimplementations, and what a batch, its order and its padding must not change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from modafill.data import Batch, all_patterns
from modafill.models.cdtp import CDTP, CDTPConfig, MulT, SequenceSpec, positions
from modafill.models.cdtp.backbone import StackedEncoder
from modafill.models.cdtp.stacked import StackedConv, StackedLinear, StackedNorm, choose
from modafill.models.cdtp.unet import StackedUNet

SPECS = {"text": SequenceSpec(6, 5), "audio": SequenceSpec(4, 9), "vision": SequenceSpec(3, 5)}


def small(**changes: object) -> CDTPConfig:
    numbers: dict[str, object] = {
        "width": 16,
        "heads": 2,
        "layers": 2,
        "self_layers": 1,
        "prompt_length": 3,
        "unet_channels": (8, 16),
        "unet_blocks": 1,
        "diffusion_steps": 100,
        "sampling_steps": 3,
        "min_alpha_bar": 0.01,
        "beta_end": 0.1,
    }
    return CDTPConfig(**{**numbers, **changes})


def make_batch(rows: int = 7, seed: int = 0, specs: dict[str, SequenceSpec] = SPECS) -> Batch:
    """Complete samples of different lengths, the first ones as long as they may be."""
    g = torch.Generator().manual_seed(seed)
    features, lengths = {}, {}
    for name, spec in specs.items():
        n = torch.randint(1, spec.length + 1, (rows,), generator=g)
        n[0] = spec.length
        keep = torch.arange(spec.length) < n[:, None]
        features[name] = torch.randn(rows, spec.length, spec.width, generator=g) * keep[..., None]
        lengths[name] = n
    return Batch(features, torch.ones(rows, len(specs), dtype=torch.bool), torch.arange(rows) * 3 + 1, lengths)


def mixed(rows: int = 7) -> Batch:
    """One sample of each missing pattern."""
    return make_batch(rows).hide(all_patterns(3)[torch.arange(rows) % 7])


def make(**changes: object) -> CDTP:
    torch.manual_seed(0)
    model = CDTP(SPECS, 4, small(**changes))
    # Residual branches start at zero: without this much would be equal by accident.
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_positions_are_those_of_the_formula() -> None:
    found = positions(40, 7)
    for pos in (0, 1, 17, 39):
        for i in range(3):
            angle = pos / 10000 ** (2 * i / 7)
            assert float(found[pos, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(found[pos, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)
    assert torch.equal(positions(90, 7)[:40], found)


@pytest.mark.parametrize("which", [[0, 1, 2], [1, 2], [0, 2], [1]])
def test_stacked_layers_are_layers_side_by_side(which: list[int]) -> None:
    torch.manual_seed(0)
    linear, norm = StackedLinear(3, 5, 4), StackedNorm(3, 5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    chosen = choose(which, 3)
    x = torch.randn(len(which), 2, 7, 5)
    for i, (n, ours, normal) in enumerate(zip(which, linear(x, chosen), norm(x, chosen), strict=True)):
        torch.testing.assert_close(ours, nn.functional.linear(x[i], linear.weight[n].mT, linear.bias[n, 0]))
        torch.testing.assert_close(normal, nn.functional.layer_norm(x[i], (5,), norm.weight[n], norm.bias[n]))
    for taps, stride in ((1, 1), (3, 1), (5, 1), (3, 2)):
        conv = StackedConv(3, 5, 4, taps=taps, stride=stride)
        for i, (n, ours) in enumerate(zip(which, conv(x, chosen), strict=True)):
            weight = conv.linear.weight[n].view(taps, 5, 4).permute(2, 1, 0)
            expected = nn.functional.conv1d(x[i].mT, weight, conv.linear.bias[n, 0], stride=stride, padding=taps // 2)
            torch.testing.assert_close(ours, expected.mT)


def _plain_encoder(
    encoder: StackedEncoder, n: int, x: Tensor, source: Tensor | None, lengths: Tensor, bias: Tensor | None
) -> Tensor:
    """MulT's encoder number ``n`` on ``x [B, Lq, d]``, written down from its equations, a head at a time."""

    def embed(t: Tensor) -> Tensor:
        place = torch.arange(t.shape[1], dtype=t.dtype)[:, None]
        i = (torch.arange(t.shape[2]) // 2).to(t.dtype)
        angle = place / 10000 ** (2 * i / t.shape[2])
        even = torch.arange(t.shape[2]) % 2 == 0
        return t * t.shape[2] ** 0.5 + torch.where(even, angle.sin(), angle.cos())

    def norm(layer: StackedNorm, t: Tensor) -> Tensor:
        centred = t - t.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight[n] + layer.bias[n]

    def linear(layer: StackedLinear, t: Tensor) -> Tensor:
        return t @ layer.weight[n] + layer.bias[n]

    h, s = embed(x), None if source is None else embed(source)
    for layer in encoder.layers:
        read = norm(layer.attention_norm, h if s is None else s)
        q, (k, v) = linear(layer.query, norm(layer.attention_norm, h)), linear(layer.key_value, read).chunk(2, -1)
        heads = []
        for qh, kh, vh in zip(
            q.chunk(layer.heads, -1), k.chunk(layer.heads, -1), v.chunk(layer.heads, -1), strict=True
        ):
            logits = qh @ kh.mT / qh.shape[-1] ** 0.5
            if bias is not None:
                logits = logits + bias
            behind = torch.arange(kh.shape[1]) >= lengths[:, None, None]
            future = torch.ones(qh.shape[1], kh.shape[1]).triu(1 + abs(qh.shape[1] - kh.shape[1])).bool()
            heads.append(logits.masked_fill(behind | future, -torch.inf).softmax(-1) @ vh)
        h = h + linear(layer.out, torch.cat(heads, -1))
        h = h + linear(layer.narrow, linear(layer.widen, norm(layer.feedforward_norm, h)).relu())
    return norm(encoder.norm, h)


@pytest.mark.parametrize("self_attention", [False, True])
def test_mults_encoder_against_plain_float64(self_attention: bool) -> None:
    torch.manual_seed(0)
    encoder = StackedEncoder(3, 16, 2, 2, dropout=0.3, causal=True).double().eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 4, 6, 16, dtype=torch.float64)
    source = None if self_attention else torch.randn(3, 4, 9, 16, dtype=torch.float64)
    keys = 6 if self_attention else 9
    lengths = torch.randint(1, keys + 1, (3, 4))
    bias = torch.randn(3, 5, 1, 6, keys, dtype=torch.float64) if self_attention else None
    mode = torch.tensor([4, 0, 2, 0])
    found = encoder(x, source, lengths, bias=bias, mode=mode if self_attention else None)
    for n in range(3):
        expected = _plain_encoder(
            encoder,
            n,
            x[n],
            None if source is None else source[n],
            lengths[n],
            None if bias is None else bias[n, mode, 0],
        )
        torch.testing.assert_close(found[n], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["bias", "append"])
def test_completion_prompts_and_fusion_by_hand(kind: str) -> None:
    """Each sample alone, from the equations of §3.3 and §3.4, in float64."""
    model, batch = make(type_prompt=kind).double(), mixed()
    given = model.project(replace(batch, features={name: x.double() for name, x in batch.features.items()}))
    g = torch.Generator().manual_seed(1)
    pairs = model.backbone.pairs
    generated = {(t, s): torch.randn(7, model.lengths[t], 16, generator=g, dtype=torch.float64) for t, s in pairs}
    found = model.predict(model.complete(given, generated))
    prompts, maps, ends = model.prompts, model.maps, model.suggested_lengths(given)
    assert maps is not None

    def cut(x: Tensor, end: int) -> Tensor:
        return torch.cat([x[:end], torch.zeros_like(x[end:])])

    for row in range(7):
        seen = given.available[row].tolist()
        sources = [m for m in range(3) if seen[m]]
        n = [int(end[row]) for end in ends]
        x = []
        for m in range(3):
            whole = given.x[m][row]
            if not seen[m]:
                stack = torch.cat([prompts.generative[m], *(generated[m, s][row] for s in sources)])
                key = f"{m}<{'+'.join(map(str, sources))}"
                whole = nn.functional.gelu(maps.weights[key] @ stack + maps.biases[key])
            x.append(cut(whole + prompts.signal[m][1 if seen[m] else 0], n[m])[None])
        matrix = sum(prompts.signal[m][int(seen[m])].T @ prompts.projection[m] for m in range(3))
        fused = []
        for m in range(3):
            crossed = [
                _plain_encoder(model.backbone.crossmodal, i, x[t], x[s], torch.tensor([n[s]]), None)
                for i, (t, s) in enumerate(pairs)
                if t == m
            ]
            hidden, bias, types = torch.cat(crossed, dim=-1), None, prompts.missing_type[m] @ matrix
            if kind == "append":
                hidden = torch.cat([hidden[:, : n[m]], types[None]], dim=1)
            else:
                size = (model.lengths[m],) * 2
                bias = nn.functional.interpolate(types[None, None], size, mode="bilinear")[0]
            last = hidden.shape[1] if kind == "append" else n[m]
            encoded = _plain_encoder(model.backbone.memory, m, hidden, None, torch.tensor([last]), bias)
            fused.append(encoded[:, last - 1])
        y = torch.cat(fused, dim=-1)
        first, second = (layer for layer in model.backbone.head if isinstance(layer, nn.Linear))
        expected = model.backbone.classify(y + second(first(y).relu()))[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-9)


def test_mplmms_map_reads_no_padding() -> None:
    model, batch = make(completion="linear"), mixed()
    given = model.project(batch)
    assert model.channel_maps is not None
    for (target, source), made in model._mapped(given).items():
        i = model.backbone.pairs.index((target, source))
        for row, end in enumerate(given.lengths[source].tolist()):
            weight, bias = model.channel_maps.weight[i], model.channel_maps.bias[i]
            expected = nn.functional.gelu(given.x[source][row, :end] @ weight + bias)
            torch.testing.assert_close(made[row, :end], expected)
            assert not made[row, end:].any()


@pytest.mark.parametrize("length", [1, 2, 5, 7, 8])
def test_the_denoisers_are_those_of_a_loop_over_pairs(length: int) -> None:
    torch.manual_seed(0)
    stack = StackedUNet(4, 6, 8, (8, 16, 24), 2, 2)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, step = torch.randn(3, 5, length, 6), torch.randint(1, 100, (3, 5))
    beside, sources = torch.randn(3, 5, length, 8), torch.randn(3, 5, 4, 8)
    key_lengths, lengths = torch.randint(1, 5, (3, 5)), torch.randint(1, length + 1, (3, 5))
    chosen = choose([0, 1, 3], 4)
    together = stack(x, step, stack.condition(beside, sources, key_lengths, chosen), lengths, chosen)
    for i, n in enumerate((0, 1, 3)):
        alone = StackedUNet(1, 6, 8, (8, 16, 24), 2, 2)
        alone.load_state_dict({name: value[n : n + 1] for name, value in stack.state_dict().items()})
        for b in range(5):
            # Without padding, one sample at a time.
            end, keys = int(lengths[i, b]), int(key_lengths[i, b])
            at = (slice(i, i + 1), slice(b, b + 1))
            condition = alone.condition(beside[at][:, :, :end], sources[at][:, :, :keys], key_lengths[at])
            expected = alone(x[at][:, :, :end], step[at], condition, lengths[at])
            torch.testing.assert_close(together[at][:, :, :end], expected, rtol=1e-4, atol=1e-4)
            assert not together[at][:, :, end:].any()


def _plain_unet(net: StackedUNet, n: int, x: Tensor, step: int, beside: Tensor, source: Tensor) -> Tensor:
    """U-Net number ``n`` on one sample without padding, ``[L, width]``, with PyTorch's own layers."""
    f = nn.functional

    def linear(layer: StackedLinear, t: Tensor) -> Tensor:
        return f.linear(t, layer.weight[n].mT, layer.bias[n, 0])

    def norm(layer: StackedNorm, t: Tensor) -> Tensor:
        return f.layer_norm(t, t.shape[-1:], layer.weight[n], layer.bias[n])

    def conv(layer: StackedConv, t: Tensor) -> Tensor:
        weight = layer.linear.weight[n].view(layer.taps, t.shape[-1], -1).permute(2, 1, 0)
        return f.conv1d(t.mT[None], weight, layer.linear.bias[n, 0], layer.stride, layer.taps // 2)[0].mT

    def block(layer: nn.Module, t: Tensor) -> Tensor:
        scale, shift = linear(layer.film, told).chunk(2)
        h = conv(layer.conv_in, f.silu(norm(layer.norm_in, t)))
        h = conv(layer.conv_out, f.silu(norm(layer.norm_out, h) * (1 + scale) + shift))
        return (t if layer.skip is None else linear(layer.skip, t)) + h

    frequency = 10_000.0 ** (-torch.arange(net.step_width // 2, dtype=x.dtype) / (net.step_width // 2))
    sinusoids = torch.cat([(step * frequency).sin(), (step * frequency).cos()])
    told = linear(net.step_out, f.silu(linear(net.step_in, sinusoids))) + linear(net.summary, source.mean(0))
    told = f.silu(told)
    h, skips = conv(net.conv_in, torch.cat([x, beside], -1)), []
    for level, blocks in enumerate(net.down):
        for layer in blocks:
            h = block(layer, h)
        skips.append(h)
        if level < len(net.shrink):
            h = conv(net.shrink[level], h)
    h = block(net.before, h)
    q, (k, v) = (
        linear(net.attention.query, norm(net.attention.norm, h)),
        linear(net.attention.key_value, source).chunk(2, -1),
    )
    heads = (t.unflatten(-1, (net.attention.heads, -1)).transpose(0, 1)[None] for t in (q, k, v))
    read = f.scaled_dot_product_attention(*heads)[0].transpose(0, 1).flatten(1)
    h = block(net.after, h + linear(net.attention.out, read))
    for level in reversed(range(len(net.up))):
        if level < len(net.grow):
            h = conv(net.grow[level], f.interpolate(h.mT[None], scale_factor=2)[0].mT[: len(skips[level])])
        h = torch.cat([h, skips[level]], -1)
        for layer in net.up[level]:
            h = block(layer, h)
    return conv(net.conv_out, f.silu(norm(net.norm, h)))


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_a_denoiser_by_pytorchs_layers(length: int) -> None:
    torch.manual_seed(0)
    net = StackedUNet(3, 6, 8, (8, 16, 24), 2, 2).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, beside, source = (torch.randn(3, 2, n, c, dtype=torch.float64) for n, c in ((length, 6), (length, 8), (4, 8)))
    step, ends = torch.randint(1, 100, (3, 2)), torch.full((3, 2), length)
    found = net(x, step, net.condition(beside, source, torch.full((3, 2), 4)), ends)
    for n in range(3):
        for b in range(2):
            expected = _plain_unet(net, n, x[n, b], int(step[n, b]), beside[n, b], source[n, b])
            # Sinusoids of the step are made in float32.
            torch.testing.assert_close(found[n, b], expected, rtol=1e-4, atol=1e-5)


OPTIONS: list[dict[str, object]] = [
    {},
    {"type_prompt": "append"},
    {"type_prompt": "none", "signal_prompt": False, "generative_prompt": False},
    {"completion": "linear"},
    {"completion": "none"},
    {"shared_denoiser": True, "prediction": "v", "eta": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_gets_a_gradient(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = make(**options).train()
    batch = mixed(14)
    given = model.project(make_batch(14))
    loss = model(batch, seed=1).logsumexp(1).sum()
    if model.diffusion is not None:
        step = torch.randint(1, model.diffusion.last_step + 1, (14, 6))
        loss = loss + model.diffusion.loss(given.x, given.lengths, given.available, step, seed=2, row_id=given.row_id)
    loss.backward()
    config = model.config
    unused = set()
    if not config.generative_prompt or config.completion == "none":
        unused.add("prompts.generative")
    if config.type_prompt == "none":
        unused |= {"prompts.missing_type", *(f"prompts.projection.{m}" for m in range(3))}
        if not config.signal_prompt:
            unused |= {f"prompts.signal.{m}" for m in range(3)}
    for name, parameter in model.named_parameters():
        assert (name in unused) == (parameter.grad is None or not parameter.grad.any()), name
    stacked = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, StackedLinear | StackedNorm)
        for own, _ in module.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if (name in stacked or name.startswith("prompts.")) and name not in unused:
            assert parameter.grad is not None
            assert parameter.grad.flatten(1).any(1).all(), f"{name}: a network or a prompt is left out"


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_under_autocast_are_those_of_float32(options: dict[str, object]) -> None:
    found = {}
    for on in (False, True):
        torch.manual_seed(0)
        model = make(**options)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            given = model.project(make_batch()).hide(mixed().available)
            said = model.predict(model.complete(given, model.generate(given, seed=1)))
            assert said.dtype == (torch.bfloat16 if on else torch.float32)
            loss = said.float().square().sum()
        loss.backward()
        found[on] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found[True].keys() == found[False].keys()
    theirs, ours = (torch.cat([g.flatten() for g in found[on].values()]) for on in (False, True))
    assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 0.1


@pytest.mark.parametrize("options", OPTIONS)
def test_a_hidden_modality_changes_no_bit(options: dict[str, object]) -> None:
    model = make(**options)
    batch = mixed()
    expected = model(batch, seed=3)
    for value in (7.0, math.nan, math.inf):
        spoilt = Batch(
            {
                name: torch.where(batch.available[:, m, None, None], x, value)
                for m, (name, x) in enumerate(batch.features.items())
            },
            batch.available,
            batch.row_id,
            {name: torch.where(batch.available[:, m], n, 4) for m, (name, n) in enumerate(batch.lengths.items())},
        )
        assert torch.equal(model(spoilt, seed=3), expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_batch_and_its_order_change_nothing(options: dict[str, object]) -> None:
    model = make(**options)
    batch = mixed()
    expected = model(batch, seed=3)
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    torch.testing.assert_close(model(batch.select(order), seed=3), expected[order], rtol=1e-5, atol=1e-5)
    for i in range(len(batch)):
        alone = batch.select(slice(i, i + 1))
        torch.testing.assert_close(model(alone, seed=3)[0], expected[i], rtol=1e-5, atol=1e-5)


def test_a_batch_that_is_padded_less_gives_the_same() -> None:
    model = make()
    batch = mixed().select(slice(1, None))
    longest = {name: max(1, int(n.max())) for name, n in batch.lengths.items()}
    cut = Batch(
        {name: x[:, : longest[name]] for name, x in batch.features.items()},
        batch.available,
        batch.row_id,
        batch.lengths,
    )
    torch.testing.assert_close(model(cut, seed=3), model(batch, seed=3))


def test_complete_samples_bypass_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    assert model.diffusion is not None
    expected = model(make_batch())
    monkeypatch.setattr(model.diffusion, "generate", None)
    assert torch.equal(model(make_batch()), expected)


def test_the_backbone_alone_reads_only_what_is_there() -> None:
    torch.manual_seed(0)
    model = MulT(SPECS, 4, small()).eval()
    batch = mixed()
    features, lengths = list(batch.features.values()), list(batch.lengths.values())
    expected = model(features, lengths)
    assert expected.shape == (7, 4)
    behind = [
        torch.where(torch.arange(x.shape[1])[:, None] < n[:, None, None], x, math.nan)
        for x, n in zip(features, lengths, strict=True)
    ]
    assert torch.equal(model(behind, lengths), expected)


def test_prompts_do_not_start_at_a_saddle() -> None:
    torch.manual_seed(0)
    model = CDTP(SPECS, 4, small())
    types = model.prompts.types().detach()
    assert types.shape == (7, 3, 3, 3)
    assert 0.01 < float(types.std()) < 0.04
    assert not torch.equal(types[0], types[1])
    model(mixed(14), seed=1).logsumexp(1).sum().backward()
    for name, parameter in model.prompts.named_parameters():
        assert parameter.detach().flatten(1).any(1).all()
        assert parameter.grad is not None
        assert parameter.grad.flatten(1).any(1).all(), name
