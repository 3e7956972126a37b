from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from support.tokens import SIZES, by_torch, inputs, modules, network
from torch import nn

from modafill import ops
from modafill.ops import TokenNetwork, token_denoiser
from modafill.ops.backends import _C


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_transformer_of_pytorch(size: str, dtype: torch.dtype, tolerance: float, backend: str) -> None:
    model = network(size, dtype)
    for tokens, rows, threads in ((3, 1, 1), (3, 1, 2), (2, 5, 2), (3, 40, 2), (5, 67, 1), (5, 67, 2), (1, 3, 2)):
        torch.set_num_threads(threads)
        given = inputs(size, rows, tokens, dtype)
        expected = by_torch(size, *given, torch.float64)
        found = token_denoiser(model, *given, backend=backend)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        assert expected.abs().max() > 0.1 or given[1].all()


@pytest.mark.parametrize(
    "backend, weights, pairs",
    [
        ("cpu", torch.bfloat16, False),
        ("cpu", torch.bfloat16, True),
        ("torch", torch.bfloat16, False),
        ("torch", torch.float16, False),
    ],
)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("size", SIZES)
def test_weights_of_half_precision(
    size: str, weights: torch.dtype, rows: int, backend: str, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the processor multiplies pairs of bfloat16, which rounds the tokens before each product."""
    if pairs and not _C.bfloat16_products:
        pytest.skip("this processor has no products of bfloat16")
    monkeypatch.setattr(ops.backends, "multiplies_bfloat16", lambda: pairs)
    model = network(size, weights=weights)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        given = inputs(size, rows, 3)
        exact = by_torch(size, *given, torch.float64)
        theirs = by_torch(size, *given, weights).double() - exact
        results.append(token_denoiser(model, *given, backend=backend))
        assert results[-1].dtype == torch.float32
        error = results[-1] - exact
        assert 1e-6 < error.abs().max() <= 2 * theirs.abs().max() + 1e-6
        assert error.norm() <= theirs.norm()
    if backend == "cpu":
        assert torch.equal(*results)


def test_a_sample_has_the_same_bits_in_any_batch_and_on_any_threads() -> None:
    model, (x, available, added) = network("projected"), inputs("projected", 200, 3)
    whole = token_denoiser(model, x, available, added, backend="cpu")
    for rows in (torch.arange(199, -1, -1), torch.arange(60, 71)):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            part = token_denoiser(model, x[rows], available[rows], added, backend="cpu")
            assert torch.equal(part, whole[rows])
    few = [token_denoiser(network("projected"), x[:4], available[:4], added, backend="cpu") for _ in range(2)]
    assert torch.equal(*few)
    torch.testing.assert_close(few[0], whole[:4], rtol=1e-5, atol=1e-5)
    used = network("projected")
    before = token_denoiser(used, x[:4], available[:4], added, backend="cpu")
    token_denoiser(used, x, available, added, backend="cpu")
    assert torch.equal(token_denoiser(used, x[:4], available[:4], added, backend="cpu"), before)


def test_a_complete_sample_is_not_read_and_no_sample_another() -> None:
    model, (x, available, added) = network("odd"), inputs("odd", 30, 3)
    available[::4] = True
    expected = token_denoiser(model, x, available, added)
    assert (expected[available] == 0).all()
    poisoned = x.masked_fill(available.all(1)[:, None, None], torch.nan)
    assert torch.equal(token_denoiser(model, poisoned, available, added), expected)
    poisoned[1] = torch.nan
    assert torch.isnan(token_denoiser(model, poisoned, available, added)[1][~available[1]]).all()
    rest = torch.arange(30) != 1
    assert torch.equal(token_denoiser(model, poisoned, available, added)[rest], expected[rest])


@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_to_do(rows: int) -> None:
    x, _, added = inputs("odd", max(rows, 1), 3)
    available = torch.ones(rows, 3, dtype=torch.bool)
    for backend in ("cpu", "torch", "reference"):
        out = token_denoiser(network("odd"), x[:rows], available, added, backend=backend)
        assert torch.equal(out, torch.zeros(rows, 3, 24))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_has_weights_of_its_own(copied: Callable[[TokenNetwork], TokenNetwork], rows: int) -> None:
    model, given = network("projected"), inputs("projected", rows, 3)
    expected = token_denoiser(model, *given)
    again = copied(model)
    for tensor in model.tensors:
        tensor.fill_(torch.nan)
    assert torch.equal(token_denoiser(again, *given), expected)


def test_an_instruction_set_without_pairs_refuses_them() -> None:
    code = """
import torch
from modafill import ops
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=True)
encoder = torch.nn.TransformerEncoder(layer, 1, norm=torch.nn.LayerNorm(16), enable_nested_tensor=False)
network = ops.TokenNetwork(encoder, torch.nn.Linear(16, 16), dtype=torch.bfloat16)
network._pairs = True
ops.token_denoiser(network, torch.ones(9, 3, 16), torch.zeros(9, 3).bool(), torch.ones(3, 2, 16), backend="cpu")
"""
    environment = {**os.environ, "MODAFILL_CPU_ISA": "baseline"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "pairs: this build or processor has no products of bfloat16" in run.stderr


def test_strided_inputs() -> None:
    model, (x, available, added) = network("odd"), inputs("odd", 12, 3)
    expected = token_denoiser(model, x, available, added)
    wide = torch.stack([x, x * torch.nan], -1)[..., 0]
    turned = available.T.contiguous().T
    assert not wide.is_contiguous()
    assert torch.equal(token_denoiser(model, wide, turned, added.mT.contiguous().mT), expected)


def test_what_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.explain("token_denoiser").backend == "cpu"
    assert ops.explain("token_denoiser", dtype=torch.float16).backend == "torch"
    given = inputs("odd", 12, 3)
    # A processor that multiplies bfloat16 fast, and an extension that can make it do so.
    for fast, can, takes in ((False, True, "cpu"), (True, True, "cpu"), (True, False, "torch")):
        monkeypatch.setattr(ops.backends, "multiplies_bfloat16", lambda fast=fast: fast)
        monkeypatch.setattr(
            importlib.import_module("modafill.ops.token_denoiser"),
            "_C",
            SimpleNamespace(**{**vars(_C), "bfloat16_products": can and _C.bfloat16_products}),
        )
        if fast and can and not _C.bfloat16_products:
            continue
        ops.backends._choose.cache_clear()
        model = network("odd", weights=torch.bfloat16)
        expected = token_denoiser(model, *given, backend=takes)
        assert torch.equal(token_denoiser(model, *given), expected)
        said = str(ops.explain("token_denoiser", dtype=torch.bfloat16))
        assert ("torch for bfloat16" in said) == (takes == "torch")
    ops.backends._choose.cache_clear()
    # Where something watches, PyTorch's own layers run.
    model = network("odd")
    compiled = torch.compile(lambda x, added: token_denoiser(model, x, given[1], added), backend="eager")
    torch.testing.assert_close(compiled(given[0], given[2]), token_denoiser(model, *given), rtol=1e-5, atol=1e-5)


def test_mistakes() -> None:
    model, (x, available, added) = network("odd"), inputs("odd", 4, 3)
    for wrong, message in (
        ((x[..., 1:], available, added), r"x: got float32 \[4, 3, 23\] on cpu, expected float32 \[B, M, 24\]"),
        ((x.double(), available, added), "x: got float64"),
        ((x[0], available, added), r"x: got float32 \[3, 24\]"),
        ((x, available.long(), added), r"available: got int64 \[4, 3\] on cpu, expected bool \[4, 3\]"),
        ((x, available[1:], added), r"available: got bool \[3, 3\]"),
        ((x, available, added[:2]), r"added: got float32 \[2, 2, 20\] on cpu, expected float32 \[3, 2, 20\]"),
    ):
        with pytest.raises(ValueError, match=message):
            token_denoiser(model, *wrong)
    with pytest.raises(ValueError, match="x: got a tensor on meta, expected cpu, as the network"):
        token_denoiser(model, x.to("meta"), available.to("meta"), added.to("meta"))
    with pytest.raises(TypeError, match="x: got NoneType"):
        token_denoiser(model, None, available, added)
    with pytest.raises(RuntimeError, match="token_denoiser has no such backend"):
        token_denoiser(model, x, available, added, backend="cuda")


@pytest.mark.parametrize("change", [{"norm_first": False}, {"activation": "relu"}, {"bias": False}])
def test_encoders_that_it_does_not_run(change: dict[str, object]) -> None:
    options = {"norm_first": True, "activation": "gelu", "batch_first": True, **change}
    layer = nn.TransformerEncoderLayer(8, 2, 16, **options)
    encoder = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    with pytest.raises(ValueError, match="encoder: expected layers with norm_first"):
        TokenNetwork(encoder, nn.Linear(8, 8))


def test_norms_and_projections_that_it_does_not_run() -> None:
    encoder, out, _ = modules("direct")
    encoder.layers[0].norm1.eps = 1e-5
    with pytest.raises(ValueError, match="encoder: got norms with different eps"):
        TokenNetwork(encoder, out)
    with pytest.raises(ValueError, match="project_out: got a projection without a bias"):
        TokenNetwork(modules("direct")[0], nn.Linear(64, 64, bias=False))


@pytest.mark.parametrize("dtype, weights", [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
def test_dtypes_that_do_not_go_together(dtype: torch.dtype, weights: torch.dtype) -> None:
    with pytest.raises(ValueError, match="dtype: got torch"):
        network("odd", dtype, weights)


@pytest.mark.parametrize(
    "project_in, out, message",
    [
        (None, nn.Linear(16, 64), "project_in: got None, expected one of 64 to 16"),
        (
            None,
            nn.Linear(8, 8),
            r"encoder: got layers of \(channels, heads, hidden\) \[\(16, 2, 32\)\], expected .* 8 ",
        ),
        (nn.Linear(12, 16), nn.Linear(16, 8), "project_in: got a projection of 12 to 16, expected one of 8 to 16"),
        (nn.Linear(8, 12), nn.Linear(16, 8), "project_in: got a projection of 8 to 12, expected one of 8 to 16"),
    ],
)
def test_layers_that_do_not_fit_together_are_refused(
    project_in: nn.Linear | None, out: nn.Linear, message: str
) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    with pytest.raises(ValueError, match=message):
        TokenNetwork(encoder, out, project_in)


def test_layers_of_other_sizes_are_refused() -> None:
    layers = [
        nn.TransformerEncoderLayer(16, 2, hidden, activation="gelu", batch_first=True, norm_first=True)
        for hidden in (32, 48)
    ]
    encoder = nn.TransformerEncoder(layers[0], 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    encoder.layers[1] = layers[1]
    with pytest.raises(ValueError, match="expected the same in all"):
        TokenNetwork(encoder, nn.Linear(16, 16))
