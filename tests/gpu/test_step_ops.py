"""The step ops on a GPU: bits, parity, streams, graphs, steps outside the schedule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modafill import ops
from modafill.ops import Draw, backends, reference

SHAPES = [(0, 3, 8), (1, 1, 1), (2, 3, 5), (7, 2, 256), (3, 5, 1), (4, 3, 0), (2, 3, 683), (1025, 3, 256)]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    why = backends._why_not(request.param, torch.device("cuda", 0), torch.float32)
    if why is not None:
        pytest.skip(why)
    return request.param


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, eps, observed = (torch.randn(shape, generator=generator).to(dtype).cuda() for _ in range(3))
    return x, eps, observed, (torch.rand(shape[:2], generator=generator) < 0.5).cuda()


def _calls(tensors: tuple[Tensor, ...], table: Tensor, step: int | Tensor, noise: dict[str, Any]) -> list[Any]:
    """Each op as a function of the module or backend that runs it, of the inputs and of what else it takes."""
    x, eps, observed, available = tensors
    calls: list[Any] = [
        lambda via, **kw: via.masked_reverse_step(x, eps, observed, available, table, step, **noise, **kw),
        lambda via, **kw: torch.stack(via.add_noise(x, table, step, **noise, **kw)),
    ]
    for eta, clip in itertools.product((0.0, 0.6, 1.0), (None, 0.8)):
        calls.append(
            lambda via, e=eta, c=clip, **kw: via.ddim_step(x, eps, table, step, step // 2, eta=e, clip=c, **noise, **kw)
        )
    return calls


def _steps(batch: int) -> list[int | Tensor]:
    return [1, 50, torch.tensor(17, device="cuda"), torch.arange(batch, device="cuda") * 17 % 50 + 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_has_the_bits_of_the_cpu(shape: tuple[int, ...], backend: str, table: Tensor) -> None:
    tensors = _inputs(shape)
    rows = torch.arange(shape[0], device="cuda") * (2**33 + 1) - 1
    for step, seed in itertools.product(_steps(shape[0]), (2**64 - 9, torch.tensor(-(2**40) - 7, device="cuda"))):
        on_gpu = _calls(tensors, table, step, {"seed": seed, "row_id": rows})
        noise = {"seed": seed.cpu() if isinstance(seed, Tensor) else seed, "row_id": rows.cpu()}
        step_cpu = step.cpu() if isinstance(step, Tensor) else step
        on_cpu = _calls(tuple(t.cpu() for t in tensors), table.cpu(), step_cpu, noise)
        for ours, expected in zip(on_gpu, on_cpu, strict=True):
            assert torch.equal(ours(ops, backend=backend).cpu(), expected(ops, backend="cpu"))


@pytest.mark.parametrize("seed", [0, -5, 2**63 + 11])
def test_noise_has_the_bits_of_the_cpu(seed: int, backend: str) -> None:
    rows = torch.tensor([0, -1, 2**40 + 3])
    for shape, draw, step in (((3, 4099), Draw.INITIAL, 9), ((3, 5), Draw.RESAMPLE, torch.tensor([0, 2**24 - 1, 3]))):
        expected = ops.randn(shape, seed=seed, row_id=rows, draw=draw, step=step)
        step_gpu = step.cuda() if isinstance(step, Tensor) else step
        ours = ops.randn(shape, seed=seed, row_id=rows.cuda(), draw=draw, step=step_gpu, backend=backend)
        assert torch.equal(ours.cpu(), expected)
        for dtype in (torch.bfloat16, torch.float16):
            ours = ops.randn(
                shape, seed=seed, row_id=rows.cuda(), draw=draw, step=step_gpu, dtype=dtype, backend=backend
            )
            assert torch.equal(ours.cpu(), expected.to(dtype))


def _in_torch(dtype: torch.dtype, tensors: tuple[Tensor, ...], table: Tensor, step: int, z: Tensor) -> Tensor:
    """masked_reverse_step as torch does it in ``dtype``."""
    x, eps, observed, available = tensors
    row, before = table[step].to(dtype), table[step - 1].to(dtype)
    z = z.to(dtype)
    generated = row[reference.POSTERIOR_X] * x + row[reference.POSTERIOR_EPS] * eps + row[reference.POSTERIOR_STD] * z
    renoised = before[reference.SQRT_ALPHA_BAR] * observed + before[reference.SQRT_ONE_MINUS_ALPHA_BAR] * z
    return torch.where(available[..., None], renoised, generated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[2:])
def test_the_error_is_at_most_twice_torchs_own(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str, table: Tensor
) -> None:
    if math.prod(shape) == 0:
        pytest.skip("nothing to compare")
    tensors = _inputs(shape, dtype)
    for step in (1, 17, 50):
        exact = reference.masked_reverse_step(*tensors, table, step, seed=3)
        z = reference.randn(shape, seed=3, step=step, draw=Draw.REVERSE, device="cuda")
        bound = 2 * (_in_torch(dtype, tensors, table, step, z).double() - exact).abs().max() + 1e-6
        ours = ops.masked_reverse_step(*tensors, table, step, seed=3, backend=backend)
        assert (ours.double() - exact).abs().max() <= bound
        for call in _calls(tensors, table, step, {"seed": 3})[1:]:
            exact = call(reference)
            rounding = torch.finfo(dtype).eps * exact.abs().max().clamp(min=1) * 4
            assert (call(ops, backend=backend).double() - exact).abs().max() <= rounding


def test_unaligned_and_strided_inputs(backend: str, table: Tensor) -> None:
    x, eps, observed, available = _inputs((4, 2, 64))
    storage = torch.empty(1 + x.numel(), device="cuda")
    unaligned = storage[1:].view_as(x).copy_(x)
    expected = ops.masked_reverse_step(x, eps, observed, available, table, 9, seed=1, backend=backend)
    for value in (unaligned, x.transpose(1, 2).contiguous().transpose(1, 2)):
        ours = ops.masked_reverse_step(value, eps, observed, available, table, 9, seed=1, backend=backend)
        assert torch.equal(ours, expected)
    ops.masked_reverse_step(unaligned, eps, observed, available, table, 9, seed=1, out=unaligned, backend=backend)
    assert torch.equal(unaligned, expected)


def test_an_element_reads_only_what_it_needs(backend: str, table: Tensor) -> None:
    x, eps, observed, available = _inputs((4, 3, 5))
    mask = available[..., None]
    for step in (1, 30):
        expected = ops.masked_reverse_step(x, eps, observed, available, table, step, seed=1, backend=backend)
        spoilt = (x.masked_fill(mask, math.nan), eps.masked_fill(mask, math.inf), observed.masked_fill(~mask, math.nan))
        ours = ops.masked_reverse_step(*spoilt, available, table, step, seed=1, backend=backend)
        assert torch.equal(ours, expected)


def test_runs_on_the_current_stream(backend: str, table: Tensor) -> None:
    x, eps, observed, available = _inputs((4096, 3, 256))
    expected = ops.masked_reverse_step(x, eps, observed, available, table, 9, seed=1, backend=backend)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        ours = ops.masked_reverse_step(late, eps, observed, available, table, 9, seed=1, backend=backend)
    stream.synchronize()
    assert torch.equal(ours, expected)


def test_a_replayed_graph_follows_its_seed_and_step_tensors(backend: str, table: Tensor) -> None:
    x, eps, observed, available = _inputs((16, 3, 256))
    seed, step = torch.tensor(1, device="cuda"), torch.tensor(40, device="cuda")
    out = torch.empty_like(x)

    def run() -> None:
        ops.masked_reverse_step(x, eps, observed, available, table, step, seed=seed, out=out, backend=backend)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for new_seed, new_step in ((1, 40), (2, 40), (-3, 7)):
        seed.fill_(new_seed)
        step.fill_(new_step)
        out.fill_(math.nan)
        graph.replay()
        expected = ops.masked_reverse_step(x, eps, observed, available, table, new_step, seed=new_seed, backend=backend)
        assert torch.equal(out, expected)


def test_a_run_repeats_to_the_bit(backend: str, table: Tensor) -> None:
    tensors = _inputs((1025, 3, 256), torch.bfloat16)
    for call in _calls(tensors, table, 9, {"seed": 1}):
        first = call(ops, backend=backend)
        assert all(torch.equal(call(ops, backend=backend), first) for _ in range(5))


def test_a_device_step_outside_the_schedule_gives_nan_in_its_row(backend: str, table: Tensor) -> None:
    x, eps, observed, available = _inputs((4, 2, 8))
    step, bad = torch.tensor([0, 50, 51, 7], device="cuda"), [True, False, True, False]
    for via, kw in ((ops, {"backend": backend}), (ops, {"backend": "reference"})):
        outputs = [
            via.masked_reverse_step(x, eps, observed, available, table, step, seed=1, **kw),
            via.add_noise(x, table, step, seed=1, **kw)[0],
            via.ddim_step(x, eps, table, step, torch.zeros_like(step), eta=1.0, seed=1, **kw),
            via.randn((4, 8), seed=1, step=torch.tensor([-1, 0, 2**24, 5], device="cuda"), **kw),
        ]
        for out in outputs:
            assert out.isnan().flatten(1).all(1).tolist() == bad
            assert out.isnan().flatten(1).any(1).tolist() == bad


def test_gradients_and_compilation(backend: str, table: Tensor) -> None:
    x, eps, observed, available = _inputs((4, 3, 8))

    def call(x: Tensor, step: int) -> Tensor:
        return ops.masked_reverse_step(x, eps, observed, available, table, step, seed=1, backend=backend)

    value = x.clone().requires_grad_()
    call(value, 9).sum().backward()
    expected = torch.where(available[..., None], 0.0, table[9, reference.POSTERIOR_X].expand_as(x))
    assert torch.equal(value.grad, expected)
    compiled = torch.compile(call, fullgraph=True)
    for step in (9, 10, 11):
        assert torch.equal(compiled(x, step), call(x, step))


def test_a_device_without_an_index_is_the_current_one() -> None:
    rows = torch.arange(4, device="cuda:0")
    noise = ops.randn((4, 8), seed=3, row_id=rows, device="cuda")
    assert noise.device == rows.device
    assert torch.equal(noise.cpu(), ops.randn((4, 8), seed=3))


def test_auto_prefers_the_compiled_kernels(table: Tensor) -> None:
    choice = ops.explain("randn", device="cuda")
    assert choice.backend == ("cuda" if backends.native_build()["cuda_architectures"] else "triton")


def test_large_tensors_are_indexed_in_64_bits(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    rows = 2**31 // 4096 + 3
    out = torch.full((rows, 4096), math.nan, dtype=torch.float16, device="cuda")
    ops.randn(tuple(out.shape), seed=1, dtype=torch.float16, out=out, backend=backend)
    for row in (0, rows // 2, rows - 1):
        expected = ops.randn((1, 4096), seed=1, row_id=torch.tensor([row])).half()
        assert torch.equal(out[row : row + 1].cpu(), expected)
