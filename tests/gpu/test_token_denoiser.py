"""The transformer over tokens and whole reverse loops on a GPU: parity, one launch a loop, graphs, determinism."""

from __future__ import annotations

import pytest
import torch
from support.tokens import by_torch, inputs, network
from torch import Tensor

from modafill import ops
from modafill.diffusion import Sampling, replace_coefficients, replace_start
from modafill.models.admc import ADN, ADMCConfig
from modafill.ops import reverse_loop, token_denoiser

pytest.importorskip("triton")

LOOPS = {"replace": Sampling(), "ddim": Sampling(steps=20, solver="ddim"), "dpm++": Sampling(steps=6, solver="dpm++")}


def adn(loop: str) -> ADN:
    """Of the paper's size."""
    torch.manual_seed(0)
    return ADN(3, ADMCConfig(conditioning="replace" if loop == "replace" else "clean")).eval()


def rows(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    patterns = 1 + torch.arange(count)[:, None] % 6
    return torch.randn(count, 3, 256, generator=generator), (patterns >> torch.arange(3)) & 1 == 1


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count, tokens", [(1, 3), (5, 2), (700, 3), (9000, 3), (40, 16)])
@pytest.mark.parametrize("size", ["narrow", "direct"])
def test_parity(size: str, count: int, tokens: int, weights: torch.dtype) -> None:
    given = inputs(size, count, tokens)
    exact = by_torch(size, *given, torch.float64)
    theirs = by_torch(size, *given, weights).double() - exact
    found = token_denoiser(network(size, weights=weights, device="cuda"), *(t.cuda() for t in given), backend="triton")
    assert (found.cpu() - exact).abs().max() <= 2 * theirs.abs().max() + 1e-5


@pytest.mark.parametrize("count", [1, 6, 1024])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_is_its_steps(loop: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for all of them; PyTorch's layers, on the CPU, with the same noise."""
    tokens, available = rows(count)
    model = adn(loop)
    expected = model.sample(tokens, available, seed=3, sampling=LOOPS[loop])
    launches: list[str] = []
    run = ops.backends.launch_triton
    monkeypatch.setattr(ops.backends, "launch_triton", lambda op, *a, **k: (launches.append(op), run(op, *a, **k)))
    found = [model.cuda().sample(tokens.cuda(), available.cuda(), seed=3, sampling=LOOPS[loop]) for _ in range(2)]
    assert launches.count("token_denoiser") == 2
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].cpu(), expected, rtol=1e-3, atol=1e-3)


def test_a_replayed_graph_draws_by_its_seed() -> None:
    model = adn("replace").cuda()
    tokens, available = (t.cuda() for t in rows(64))
    schedule, seed, ids = model.schedule, torch.tensor(5, device="cuda"), torch.arange(64, device="cuda")
    layers, added = model.predictor(range(10, 0, -1))
    coefficients = replace_coefficients(schedule, 10).cuda()

    start = replace_start(tokens, available, schedule, start_step=10, seed=0, row_id=ids)

    def loop() -> Tensor:
        return reverse_loop(
            layers, start, available, added, coefficients, observed=tokens, first_step=10, seed=seed, row_id=ids
        )

    expected = loop()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = loop()
    graph.replay()
    first = out.clone()
    assert torch.equal(first, expected)
    seed.fill_(6)
    graph.replay()
    other = out.clone()
    assert not torch.equal(first, other)
    seed.fill_(5)
    graph.replay()
    assert torch.equal(out, first)
