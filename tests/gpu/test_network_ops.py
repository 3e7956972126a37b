"""prompt_attention and conv_gelu_conv on a GPU: parity, streams, graphs, determinism, memory, what PyTorch asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import attention, convolution
from torch import Tensor

from modafill import nn, ops
from modafill.ops import backends, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Ratio = Callable[[float], None]


def _attention(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    inputs, mode = attention.make(*shape, dtype=dtype)
    return [x.cuda() for x in inputs], mode.cuda()


def _convolution(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.cuda() for x in convolution.make(*shape, dtype=dtype)]


def _on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}


def _eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mode: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    row_id: Tensor | None = None,
) -> Tensor:
    """As torch does it in the dtype of the inputs; a query with nothing to attend to gives 0."""
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias[mode]
    seen = reference.visible(q.shape[2], k.shape[2], causal=causal, key_lengths=key_lengths, device=q.device)
    if seen is not None:
        logits = logits.masked_fill(~seen, -math.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    if dropout:
        kept = reference.dropout_mask(logits.shape, dropout, seed=seed, row_id=row_id, device=q.device)
        weights = weights * kept / (1 - dropout)
    return weights @ v


def _eager_convolution(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, approximate: str) -> Tensor:
    hidden = F.gelu(F.conv1d(x.transpose(1, 2), w1, b1, padding=w1.shape[2] // 2), approximate=approximate)
    return F.conv1d(hidden, w2, b2, padding=w2.shape[2] // 2).transpose(1, 2)


def _no_worse_than_torch(
    ours: list[Tensor], torchs: list[Tensor], exact: list[Tensor], ratio: Ratio, rounding: float = 2**-19
) -> None:
    """Errors at most twice torch's, but for ``rounding`` of every element, and the last bit of a single one."""
    for found, other, expected in zip(ours, torchs, exact, strict=True):
        assert found.dtype == other.dtype
        usual = expected.norm() + expected.numel() ** 0.5
        least = (rounding + torch.finfo(found.dtype).eps / expected.numel() ** 0.5) * usual
        bound = 2 * (other.double() - expected).norm() + least
        error = (found.double() - expected).norm()
        ratio(float(error / bound))
        assert error <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(attention.OPTIONS))
@pytest.mark.parametrize("bias_heads", [1, 2])
@pytest.mark.parametrize(
    "batch, queries, keys, width",
    [
        (4, 1, 1, 4),
        (4, 5, 7, 8),
        (4, 33, 65, 32),
        (4, 70, 31, 20),
        (4, 375, 500, 32),
        (4, 130, 257, 64),
        (4, 64, 96, 128),
        (37, 20, 20, 32),
    ],
)
def test_the_attentions_error_is_at_most_twice_torchs(
    batch: int, queries: int, keys: int, width: int, bias_heads: int, name: str, dtype: torch.dtype, ratio: Ratio
) -> None:
    torch.manual_seed(0)
    inputs, mode = _attention(batch, 2, queries, keys, width, 3, bias_heads, dtype=dtype)
    options = _on_gpu(attention.options_for(name, batch, keys))
    grad = torch.randn_like(inputs[0])
    ours = attention.results(ops.prompt_attention, inputs, grad, mode, **options, backend="triton")
    torchs = attention.results(_eager_attention, inputs, grad, mode, **options)
    doubles = [x.double() for x in inputs]
    exact = attention.results(reference.prompt_attention, doubles, grad.double(), mode, **options)
    # Of one key the logits have no gradient; from a rounded result comes what rounding left.
    _no_worse_than_torch(ours, torchs, exact, ratio, 16 * torch.finfo(dtype).eps if keys == 1 else 2**-19)


@pytest.fixture(params=["ieee", "tf32"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """How float32 convolutions, ours and PyTorch's, may multiply."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("taps", [(1, 1), (3, 1), (1, 3), (3, 3), (5, 7)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 6, 5, 7, 4), (9, 50, 64, 96, 64), (4, 375, 256, 256, 256)])
def test_the_convolutions_error_is_at_most_twice_torchs(
    shape: tuple[int, ...], taps: tuple[int, int], approximate: str, dtype: torch.dtype, precision: str, ratio: Ratio
) -> None:
    if precision == "tf32" and dtype != torch.float32:
        pytest.skip("TF32 is for float32")
    torch.manual_seed(0)
    inputs = _convolution(*shape, *taps, dtype=dtype)
    grad = torch.randn(*shape[:2], shape[4], device="cuda").to(dtype)
    ours = convolution.results(ops.conv_gelu_conv, inputs, grad, approximate=approximate, backend="triton")
    torchs = convolution.results(_eager_convolution, inputs, grad, approximate=approximate)
    doubles = [x.double() for x in inputs]
    exact = convolution.results(reference.conv_gelu_conv, doubles, grad.double(), approximate=approximate)
    # TF32 has ten bits; Triton cuts the others off of both factors, PyTorch may round or not use it.
    _no_worse_than_torch(ours, torchs, exact, ratio, 2**-9 if precision == "tf32" else 2**-19)


def test_tf32_is_used_where_pytorch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, found = _convolution(9, 50, 64, 96, 64, 3, 3), {}
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", precision)
        found[precision] = ops.conv_gelu_conv(*inputs, backend="triton")
    assert not torch.equal(found["ieee"], found["tf32"])


def test_dropout_drops_what_the_cpu_drops() -> None:
    inputs, mode = attention.make(2, 2, 40, 64, 64, dtype=torch.float32)
    inputs[2] = torch.eye(64).expand(2, 2, 64, 64).contiguous()
    options = {"dropout": 0.3, "seed": torch.tensor(-(2**40)), "row_id": torch.tensor([2**40 + 1, -3])}
    expected = ops.prompt_attention(*inputs, mode, **options) != 0
    ours = ops.prompt_attention(*(x.cuda() for x in inputs), mode.cuda(), **_on_gpu(options), backend="triton") != 0
    assert torch.equal(ours.cpu(), expected)


def test_extreme_logits_rows_with_nothing_and_unread_keys() -> None:
    inputs, mode = _attention(3, 2, 20, 40, 8)
    lengths = torch.tensor([0, 13, 40], device="cuda")
    behind = (torch.arange(40, device="cuda") >= lengths[:, None])[:, None, :, None]
    for x in inputs[1:3]:
        x.masked_fill_(behind, math.nan)
    inputs[3] = torch.where(inputs[3] > 0, 1e4, -1e4) + inputs[3]
    inputs[3][1, :, 3] = -math.inf
    found = attention.results(
        ops.prompt_attention, inputs, torch.ones_like(inputs[0]), mode, key_lengths=lengths, backend="triton"
    )
    assert all(x.isfinite().all() for x in found)
    assert not found[0][0].any()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("named", ["mode", "key_lengths"])
def test_a_value_out_of_range_gives_nan_in_its_sample(named: str, backend: str) -> None:
    inputs, mode = _attention()
    for value in (-1, 2**40):
        given = {"mode": mode.clone(), "key_lengths": torch.full((3,), 7, device="cuda")}
        given[named][1] = value
        grad = torch.ones_like(inputs[0])
        *found, bias_grad = attention.results(ops.prompt_attention, inputs, grad, **given, backend=backend)
        for x in found:
            assert x.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert bias_grad.isnan().any()


def _calls(
    dtype: torch.dtype = torch.float32, mode: Tensor | None = None, seed: Tensor | None = None
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each op as a function of the tensors that it has gradients for, and those."""
    inputs, some = _attention(32, 8, 50, 50, 32, 7, 8, dtype=dtype)
    mode = some if mode is None else mode
    seed = torch.tensor(3, device="cuda") if seed is None else seed

    def attend(*leaves: Tensor) -> Tensor:
        return ops.prompt_attention(*leaves, mode, dropout=0.1, seed=seed, backend="triton")

    def convolve(*leaves: Tensor) -> Tensor:
        return ops.conv_gelu_conv(*leaves, backend="triton")

    return {
        "prompt_attention": (attend, inputs),
        "conv_gelu_conv": (convolve, _convolution(32, 50, 64, 64, 64, 3, 3, dtype=dtype)),
    }


def _everything(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["prompt_attention", "conv_gelu_conv"])
def test_a_run_repeats_to_the_bit(op: str, dtype: torch.dtype) -> None:
    call, inputs = _calls(dtype)[op]
    first = _everything(call, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(_everything(call, inputs), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", ["prompt_attention", "conv_gelu_conv"])
def test_runs_on_the_current_stream(op: str) -> None:
    call, inputs = _calls()[op]
    expected = _everything(call, inputs)
    late = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for to, x in zip(late, inputs, strict=True):
            to.copy_(x)
        ours = _everything(call, late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("op", ["prompt_attention", "conv_gelu_conv"])
def test_a_replayed_graph_follows_its_inputs(op: str) -> None:
    mode, seed = torch.arange(32, device="cuda") % 7, torch.tensor(3, device="cuda")
    call, inputs = _calls(mode=mode, seed=seed)[op]
    static = [x.clone().requires_grad_() for x in inputs]

    def step() -> list[Tensor]:
        out = call(*static)
        return [out.detach(), *torch.autograd.grad(out, static, torch.ones_like(out))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for factor in (1.0, -0.5):
        with torch.no_grad():
            for to, x in zip(static, inputs, strict=True):
                to.copy_(x * factor)
        mode.copy_(mode.roll(1))
        seed.add_(1)
        graph.replay()
        expected = _everything(call, [x * factor for x in inputs])
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("op", ["prompt_attention", "conv_gelu_conv"])
def test_on_a_second_device(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, mode = _attention()
    tensors = [*inputs, mode] if op == "prompt_attention" else _convolution()
    call = getattr(ops, op)
    elsewhere = call(*(x.to("cuda:1") for x in tensors), backend="triton")
    assert elsewhere.device == torch.device("cuda:1")
    assert torch.equal(elsewhere.cpu(), call(*tensors, backend="triton").cpu())


@pytest.mark.parametrize("op", ["prompt_attention", "conv_gelu_conv"])
def test_compiles_whole(op: str) -> None:
    call, inputs = _calls()[op]
    compiled = torch.compile(call, fullgraph=True)
    for found, expected in zip(_everything(compiled, inputs), _everything(call, inputs), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_under_autocast(dtype: torch.dtype) -> None:
    x = torch.randn(4, 20, 64, device="cuda")
    for module in (
        nn.PromptAttention(64, 4, n_modes=7, max_query_length=20, max_key_length=20),
        nn.ConvGeluConv(64, 64, 64, 3),
    ):
        module.cuda()
        with torch.autocast("cuda", dtype):
            if isinstance(module, nn.PromptAttention):
                out, _ = module(x, x, x, mode=torch.arange(4, device="cuda"))
            else:
                out = module(x)
        assert out.dtype == dtype
        out.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def _peak(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates at most, beside what is there before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_prompt_attention(dtype: torch.dtype, ratio: Ratio) -> None:
    inputs, mode = _attention(32, 8, 500, 500, 32, 7, 8, dtype=dtype)
    grad = torch.randn_like(inputs[0])
    size = sum(x.nbytes for x in inputs)
    table = inputs[3][0].nbytes
    peak = size + _peak(lambda: attention.results(ops.prompt_attention, inputs, grad, mode, backend="triton"))
    bound = 1.25 * (size + inputs[0].nbytes + size + table)
    ratio(peak / bound)
    assert peak <= bound


def test_memory_of_conv_gelu_conv(ratio: Ratio) -> None:
    inputs = _convolution(256, 500, 64, 512, 64, 3, 3, dtype=torch.bfloat16)
    hidden = 256 * 500 * 512 * 2
    with torch.no_grad():
        forward = _peak(lambda: ops.conv_gelu_conv(*inputs, backend="triton"))
    grad = torch.ones(256, 500, 64, device="cuda", dtype=torch.bfloat16)
    both = _peak(lambda: convolution.results(ops.conv_gelu_conv, inputs, grad, backend="triton"))
    extra = max(forward, both - 2 * inputs[0].nbytes)
    ratio(extra / hidden)
    assert extra < hidden


def test_a_short_training_follows_the_references() -> None:
    """The same loss curve with the kernels and with the float64 reference."""

    def train(backend: str) -> list[float]:
        torch.manual_seed(0)
        attend = nn.PromptAttention(32, 4, n_modes=3, max_query_length=12, max_key_length=12).cuda()
        convolve = nn.ConvGeluConv(32, 64, 32, 3).cuda()
        x, y = torch.randn(16, 12, 32, device="cuda"), torch.randn(16, 12, 32, device="cuda")
        mode = torch.arange(16, device="cuda") % 3
        optimizer = torch.optim.Adam([*attend.parameters(), *convolve.parameters()], 1e-3)
        losses = []
        for _ in range(20):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MODAFILL_BACKEND", backend)
                loss = F.mse_loss(convolve(attend(x, x, x, mode=mode)[0]), y)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    torch.testing.assert_close(train("triton"), train("reference"), rtol=1e-3, atol=1e-4)


def test_auto_takes_the_kernels() -> None:
    for op, dtype in itertools.product(("prompt_attention", "conv_gelu_conv"), DTYPES):
        assert ops.explain(op, device="cuda", dtype=dtype).backend == "triton"


@pytest.mark.parametrize("op", list(backends.REGISTERED))
def test_tuning_runs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from modafill.kernels import tuned, tuning

    for name in ("ROW_CANDIDATES", "ATTENTION_CANDIDATES", "CONVOLUTION_CANDIDATES"):
        monkeypatch.setattr(tuning, name, getattr(tuning, name)[:2])
    capability = tuned.capability_of(torch.empty(0, device="cuda"))
    monkeypatch.setitem(tuned._listed(op), capability, tuned.tuned(op, capability))

    def timer(call: Callable[[], Any]) -> float:
        call()
        torch.cuda.synchronize()
        return 1.0

    assert tuning.tune(op, timer, lambda line: None).keys() == tuned.tuned(op, capability).keys()
