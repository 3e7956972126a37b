"""The transformer over tokens, and whole reverse loops, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from support.tokens import by_torch, inputs, modules, network

from modafill import ops
from modafill.diffusion import Sampling
from modafill.models.admc import ADN, ADMCConfig
from modafill.ops import can_loop, reverse_loop, token_denoiser

PATTERNS = torch.tensor([[p & 1, p & 2, p & 4] for p in range(1, 8)]) > 0
LOOPS = {
    "replace": Sampling(steps=6),
    "ddim": Sampling(steps=5, solver="ddim"),
    "dpm++": Sampling(steps=5, solver="dpm++"),
}


def adn(loop: str) -> ADN:
    torch.manual_seed(3)
    config = ADMCConfig(
        conditioning="replace" if loop == "replace" else "clean",
        width=24,
        adn_layers=2,
        adn_heads=2,
        adn_feedforward=40,
        fusion_heads=2,
    )
    return ADN(3, config).eval()


@pytest.mark.parametrize("size", ["narrow", "direct"])
@pytest.mark.parametrize("rows, tokens", [(1, 3), (5, 2), (11, 3), (4, 16), (3, 1)])
def test_it_is_the_transformer_of_pytorch(size: str, rows: int, tokens: int) -> None:
    given = inputs(size, rows, tokens)
    expected = by_torch(size, *given, torch.float64)
    found = token_denoiser(network(size), *given, backend="triton")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.1 or given[1].all()


@pytest.mark.parametrize("rows", [7, 13], ids=["tile of 16", "tile of 32"])
@pytest.mark.parametrize("size", ["narrow", "direct"])
def test_weights_of_half_precision(size: str, rows: int) -> None:
    given = inputs(size, rows, 3)
    exact = by_torch(size, *given, torch.float64)
    theirs = by_torch(size, *given, torch.float16).double() - exact
    error = token_denoiser(network(size, weights=torch.float16), *given, backend="triton") - exact
    assert 1e-6 < error.abs().max() <= 2 * theirs.abs().max() + 1e-6
    assert error.norm() <= 1.2 * theirs.norm()


def missing_two(rows: int) -> tuple[torch.Tensor, ...]:
    x, available, added = inputs("direct", rows, 3)
    return x, torch.tensor([True, False, False]).expand_as(available).contiguous(), added


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(bad: float) -> None:
    x, available, added = missing_two(9)
    clean = token_denoiser(network("direct"), x, available, added, backend="triton")
    x[4, 1, 3] = bad
    found = token_denoiser(network("direct"), x, available, added, backend="triton")
    others = torch.arange(9) != 4
    assert torch.equal(found[others], clean[others])
    assert found[4, 1:].isnan().all()
    assert not found[4, 0].any()


def test_a_value_too_large_for_half_precision_stays_in_its_sample() -> None:
    encoder, out, _ = modules("direct")
    x, available, added = missing_two(9)
    layer = encoder.layers[0]
    with torch.no_grad():
        h = layer.norm1(x + added[torch.arange(3), available.long()]).flatten(0, 1)
        wanted = 80_000.0 * (torch.arange(27) == 4 * 3 + 1)
        layer.self_attn.in_proj_weight[2 * 64] = torch.linalg.pinv(h) @ wanted
        layer.self_attn.in_proj_bias[2 * 64] = 0.0
    found = token_denoiser(ops.TokenNetwork(encoder, out, dtype=torch.float16), x, available, added, backend="triton")
    assert found.isfinite().flatten(1).all(1).tolist() == [row != 4 for row in range(9)]


def test_weights_that_are_not_finite_are_seen() -> None:
    encoder, out, _ = modules("direct")
    with torch.no_grad():
        encoder.layers[1].self_attn.in_proj_weight[2 * 64 + 5] = torch.nan
    x, available, added = missing_two(9)
    found = token_denoiser(ops.TokenNetwork(encoder, out), x, available, added, backend="triton")
    assert found[:, 1:].isnan().all()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_is_its_steps(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = adn(loop), LOOPS[loop]
    tokens, available = torch.randn(7, 3, 24), PATTERNS
    tokens[3, 2, :8] = -0.0
    kernels: list[str] = []
    launched = ops.backends.launch_triton
    monkeypatch.setattr(ops.backends, "launch_triton", lambda op, *a, **k: (kernels.append(op), launched(op, *a, **k)))
    results = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("MODAFILL_BACKEND", backend)
        results[backend] = model.sample(tokens, available, n_samples=2, seed=11, sampling=sampling)
    assert kernels.count("token_denoiser") == 1
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-4, atol=1e-4)
    found = results["triton"]
    assert torch.equal(found[:, available], tokens[available].expand(2, -1, -1))
    assert found[:, 3, 2, :8].signbit().all()
    assert (found[0] != found[1])[:, :][~available].any(-1).all()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_row_depends_on_its_id_alone(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODAFILL_BACKEND", "triton")
    model, tokens, ids = adn(loop), torch.randn(7, 3, 24), torch.arange(7) * 3
    whole = model.sample(tokens, PATTERNS, seed=2, row_id=ids, sampling=LOOPS[loop])
    for rows in (torch.arange(6, -1, -1), torch.tensor([5]), torch.tensor([2, 4, 1])):
        part = model.sample(tokens[rows], PATTERNS[rows], seed=2, row_id=ids[rows], sampling=LOOPS[loop])
        torch.testing.assert_close(part, whole[:, rows], rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.sample(tokens, PATTERNS, seed=3, row_id=ids, sampling=LOOPS[loop]), whole)


def test_a_seed_in_memory_is_the_integer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODAFILL_BACKEND", "triton")
    model = adn("replace")
    layers, added = model.predictor([3, 2, 1])
    x, coefficients = torch.randn(7, 3, 24), torch.rand(3, 5)
    results = [
        reverse_loop(layers, x, PATTERNS, added, coefficients, observed=x.flip(0), first_step=3, seed=seed)
        for seed in (2**63 + 5, torch.tensor(-(2**63) + 5), 6)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_what_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, available, added = inputs("narrow", 2, 17)
    with pytest.raises(RuntimeError, match="cannot run: 17 tokens are more than 16"):
        token_denoiser(network("narrow"), x, available, added, backend="triton")
    layer = torch.nn.TransformerEncoderLayer(64, 1, 16, activation="gelu", batch_first=True, norm_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 1, norm=torch.nn.LayerNorm(64), enable_nested_tensor=False)
    wide = ops.TokenNetwork(encoder, torch.nn.Linear(64, 64))
    with pytest.raises(RuntimeError, match="cannot run: 64 channels of a head are more than 32"):
        token_denoiser(wide, *inputs("direct", 2, 3), backend="triton")
    with pytest.raises(RuntimeError, match="cannot run: the network has a projection in"):
        token_denoiser(network("projected"), *inputs("projected", 2, 3), backend="triton")
    monkeypatch.setenv("MODAFILL_BACKEND", "triton")
    assert not can_loop(network("projected"), inputs("projected", 2, 3)[0])
    assert can_loop(network("narrow"), x[:, :16])
    assert not can_loop(network("narrow"), x)
    with pytest.raises(RuntimeError, match="reverse_loop: no kernel takes"):
        reverse_loop(network("narrow"), x, available, added[None], torch.rand(1, 5))
    monkeypatch.delenv("MODAFILL_BACKEND")
    assert not can_loop(network("narrow"), x[:, :16])
    monkeypatch.setenv("MODAFILL_BACKEND", "triton")
    x, available, added = x[:, :3], available[:, :3], added[None, :3]
    right = {"added": added, "coefficients": torch.rand(1, 5), "observed": x, "first_step": 1, "seed": 0}
    for name, bad in (
        ("added", added[:, :2]),
        ("coefficients", torch.tensor(1.0)),
        ("observed", x[:1]),
        ("row_id", torch.arange(3)),
        ("first_step", 0),
        ("first_step", 2**24),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            reverse_loop(network("narrow"), x, available, **{**right, name: bad})
    for name, wrong in (("first_step", None), ("first_step", 1.0), ("seed", None), ("coefficients", None)):
        with pytest.raises(TypeError, match=f"^{name}: got"):
            reverse_loop(network("narrow"), x, available, **{**right, name: wrong})
