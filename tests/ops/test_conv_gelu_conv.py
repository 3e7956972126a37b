"""Conv1D → GELU → Conv1D: the C++ path against the float64 reference and against torch's own layers."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.convolution import NAMES, TOLERANCE, compare, make, results
from support.memory import neighbours
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from modafill import ops
from modafill.ops import reference
from modafill.ops.backends import ENVIRONMENT

EXACT = (torch.float64, torch.float32)
BACKENDS = ("auto", "reference")


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("taps", [(1, 1), (3, 1), (1, 3), (3, 3), (5, 7), (7, 5)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (3, 6, 5, 7, 4), (40, 8, 20, 33, 17), (2, 250, 16, 48, 32), (2, 97, 64, 50, 49)]
)
def test_against_the_reference(
    shape: tuple[int, ...], taps: tuple[int, int], approximate: str, dtype: torch.dtype
) -> None:
    compare(make(*shape, *taps, dtype), approximate=approximate)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("taps", [(1, 1), (3, 1), (5, 7)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 6, 5, 7, 4), (2, 97, 64, 50, 49)])
def test_pytorchs_own_layers(
    shape: tuple[int, ...], taps: tuple[int, int], approximate: str, dtype: torch.dtype
) -> None:
    compare(make(*shape, *taps, dtype), "torch", approximate=approximate)


def test_pytorchs_own_layers_as_the_registered_op() -> None:
    inputs = make(first_taps=3, second_taps=5, dtype=torch.float32)
    for approximate in ("none", "tanh"):
        torch.library.opcheck(torch.ops.modafill.conv_gelu_conv, (*inputs, approximate, "torch"))
    args = (torch.ones(3, 6, 4), *inputs, "none", [True] * 5, "torch")
    torch.library.opcheck(torch.ops.modafill.conv_gelu_conv_backward, args)
    out = torch.empty(3, 6, 4)
    assert torch.equal(
        ops.conv_gelu_conv(*inputs, out=out, backend="torch"), ops.conv_gelu_conv(*inputs, backend="torch")
    )


@pytest.mark.parametrize("dtype", [*EXACT, torch.bfloat16])
@pytest.mark.parametrize("taps", [(3, 3), (7, 5), (1, 7)])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 40])
def test_samples_shorter_than_the_taps(batch: int, length: int, taps: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = make(batch, length, 9, 21, 10, *taps, dtype)
    compare(inputs)
    compare(inputs, "cpu")
    # The registered op, which a compiler calls.
    found = torch.ops.modafill.conv_gelu_conv(*inputs, "none", "cpu")
    assert torch.equal(found, ops.conv_gelu_conv(*inputs, backend="cpu"))


@pytest.mark.parametrize("rows", [31, 32, 63, 64])
@pytest.mark.parametrize("channels", [40, 110])
def test_on_both_sides_of_few_rows(channels: int, rows: int) -> None:
    """What is few depends on whether a convolution has 32768 weights."""
    compare(make(1, rows, channels, channels, channels, 3, 3, torch.float32), backend="cpu")


@pytest.mark.parametrize("dtype", EXACT)
def test_few_rows_of_many_channels(dtype: torch.dtype) -> None:
    compare(make(2, 9, 270, 300, 290, 1, 3, dtype), backend="cpu")


def test_one_long_sample_in_torch() -> None:
    compare(make(1, 20, 256, 256, 256, 3, 3, torch.float32), backend="torch")


@pytest.mark.parametrize(
    "rows, channels, taps, dtype, grad, in_torch",
    [
        (1600, 128, 3, torch.float32, True, True),
        (1600, 128, 3, torch.float32, False, False),
        (300, 128, 3, torch.float32, True, False),
        (50, 512, 3, torch.float32, True, False),
        (255, 512, 3, torch.float32, True, False),
        (256, 256, 3, torch.float32, True, True),
        (1600, 256, 1, torch.float32, True, True),
        (8, 128, 1, torch.float32, True, False),
        (8, 64, 3, torch.float32, True, False),
        (8, 128, 1, torch.float32, False, False),
        (8, 512, 1, torch.float32, False, False),
        (5000, 64, 1, torch.float32, True, False),
        (1600, 64, 3, torch.float32, True, True),
        (256, 128, 1, torch.float32, True, False),
        (5000, 256, 1, torch.float32, False, False),
        (1600, 256, 3, torch.float32, False, True),
        (256, 256, 3, torch.float32, False, False),
        (256, 512, 1, torch.float32, False, False),
        (1600, 256, 3, torch.float64, True, False),
        (0, 512, 3, torch.float32, True, False),
        (8, 64, 3, torch.bfloat16, False, False),
        (1600, 64, 3, torch.bfloat16, False, True),
    ],
)
def test_auto_takes_torch_where_it_was_measured_to_be_faster(
    rows: int,
    channels: int,
    taps: int,
    dtype: torch.dtype,
    grad: bool,
    in_torch: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("modafill.ops.conv_gelu_conv")
    monkeypatch.setattr(module, "_HAS_BFLOAT16", True)
    taken: list[None] = []
    real = module._in_torch
    monkeypatch.setattr(module, "_in_torch", lambda *args: taken.append(None) or real(*args))
    batch = 2 - rows % 2
    inputs = make(batch, rows // batch, channels, channels, channels, taps, taps, dtype)
    ops.conv_gelu_conv(*(t.requires_grad_(grad) for t in inputs))
    assert bool(taken) == in_torch
    taken.clear()
    ops.conv_gelu_conv(*inputs, backend="cpu")
    assert not taken


@settings(max_examples=200)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, most)) for most in (20, 120, 40, 70, 60)]
    taps = [data.draw(st.sampled_from([1, 3, 5, 7])) for _ in range(2)]
    dtype, seed = data.draw(st.sampled_from(EXACT)), data.draw(st.integers(0, 99))
    compare(make(*sizes, *taps, dtype, seed), approximate=data.draw(st.sampled_from(["none", "tanh"])))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5))[1:])
def test_every_subset_of_gradients(wanted: tuple[bool, ...]) -> None:
    inputs = make(second_taps=3)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, wanted, strict=True)]
    ops.conv_gelu_conv(*leaves).square().sum().backward()
    everything = [t.clone().requires_grad_() for t in inputs]
    reference.conv_gelu_conv(*everything).square().sum().backward()
    for leaf, expected, need in zip(leaves, everything, wanted, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-10, atol=1e-12)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck(approximate: str) -> None:
    leaves = [t.requires_grad_() for t in make(2, 4, 3, 5, 2, 3, 3)]
    assert torch.autograd.gradcheck(lambda *t: ops.conv_gelu_conv(*t, approximate=approximate), leaves)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_against_torchs_layers(approximate: str) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv1d(6, 9, 5, padding=2), nn.GELU(approximate), nn.Conv1d(9, 4, 3, padding=1))
    x = torch.randn(3, 20, 6)
    first, second = layers[0], layers[2]
    ours = ops.conv_gelu_conv(x, first.weight, first.bias, second.weight, second.bias, approximate=approximate)
    theirs = layers(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    parameters, grad = list(layers.parameters()), torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, parameters, grad), torch.autograd.grad(theirs, parameters, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_over_its_whole_range(dtype: torch.dtype, approximate: str) -> None:
    """One channel and unit weights: the op is GELU itself, also far out, where it is tiny, huge or infinite."""
    x = torch.cat([torch.linspace(-40, 40, 20001), torch.tensor([-1e4, 1e4, -1e30, 1e30, 0.0])]).to(dtype)
    one, leaf = torch.ones(1, 1, 1, dtype=dtype), x.view(1, -1, 1).clone().requires_grad_()
    out = ops.conv_gelu_conv(leaf, one, None, one, None, approximate=approximate)
    exact = x.double().requires_grad_()
    expected = nn.functional.gelu(exact, approximate=approximate)
    # Where the exact value cancels, torch's own formulas do too; the Gaussian tail is known in closed form.
    if approximate == "none":
        expected = torch.where(exact < 0, exact * 0.5 * torch.special.erfc(-exact / math.sqrt(2)), expected)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    out.sum().backward()
    # The error of x² in exp(-x²/2) grows with x²: 84 roundings at x = 13.
    limit = 1e-5 if dtype == torch.float32 else 1e-13
    seen = expected.abs() > 1e-30
    error = (out.flatten() - expected).abs() / expected.abs()
    near = seen & (x.abs() < (13 if approximate == "none" else 4))
    assert error[near].max() < (limit if approximate == "none" else 100 * limit)
    tiny = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(out.flatten().double(), expected.detach(), rtol=1e-6, atol=tiny)
    torch.testing.assert_close(leaf.grad.flatten().double(), slope, rtol=1e-6, atol=2 * tiny)


def test_samples_do_not_touch() -> None:
    """What stands in one sample, NaN included, is not seen in its neighbours."""
    inputs = make(9, 7, 5, 8, 4, 5, 3, torch.float32)
    clean = ops.conv_gelu_conv(*inputs)
    inputs[0][4] = math.nan
    dirty = ops.conv_gelu_conv(*inputs)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(clean[others], dirty[others])
    assert dirty[4].isnan().all()


# Few rows, and blocks of rows.
LENGTHS = (9, 40)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("hidden", [1, 7, 16, 19, 50])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("length", LENGTHS)
def test_nonfinite_values_go_where_the_reference_sends_them(
    length: int, bad: float, hidden: int, approximate: str, dtype: torch.dtype
) -> None:
    x, w1, b1, w2, b2 = make(3, length, 5, hidden, 4, 3, 3, dtype)
    x[1, 4, 2] = bad
    for first, second in ((w1, w2), (w1.abs(), w2.abs())):
        inputs = [x, first, b1, second, b2]
        found = ops.conv_gelu_conv(*inputs, approximate=approximate, backend="cpu")
        expected = reference.conv_gelu_conv(*(t.double() for t in inputs), approximate=approximate)
        torch.testing.assert_close(found, expected.to(dtype), equal_nan=True)
    # Infinities of one sign never meet their opposites.
    assert bad != math.inf or (found[1, 2:7] == math.inf).all()


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("hidden", [1, 7, 16, 19, 50])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("length", LENGTHS)
def test_nonfinite_gradients_go_where_the_reference_sends_them(
    length: int, bad: float, hidden: int, approximate: str, dtype: torch.dtype
) -> None:
    # Hidden values above 0, where GELU has a positive slope, but not so far that it is 1.
    *inputs, b2 = (t.abs() / 2 for t in make(3, length, 5, hidden, 4, 3, 3, dtype))
    grad = torch.ones(3, length, 4, dtype=dtype)
    grad[1, 4, 2] = bad
    found = results(ops.conv_gelu_conv, [*inputs, b2], grad, approximate=approximate, backend="cpu")
    exact = [t.double() for t in (*inputs, b2)]
    expected = results(reference.conv_gelu_conv, exact, grad.double(), approximate=approximate)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(dtype), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("biases", [(True, False), (False, True), (False, False)])
def test_without_biases(biases: tuple[bool, bool]) -> None:
    x, w1, b1, w2, b2 = make()
    given = (b1 if biases[0] else None, b2 if biases[1] else None)
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    found = ops.conv_gelu_conv(x, w1, given[0], w2, given[1])
    expected = reference.conv_gelu_conv(x, w1, given[0], w2, given[1])
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 6, 5, 7, 4), (3, 0, 5, 7, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    inputs = make(*shape)
    for t in results(ops.conv_gelu_conv, inputs, torch.zeros(*shape[:2], 4, dtype=torch.float64)):
        assert not t.any()


def test_strides() -> None:
    inputs = make(dtype=torch.float32)
    grad = torch.ones(3, 6, 4)
    dense = results(ops.conv_gelu_conv, inputs, grad)
    strided = [torch.stack([t, t], -1)[..., 0] for t in inputs]
    strided[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    found = results(ops.conv_gelu_conv, strided, torch.ones(3, 1, 1).expand(3, 6, 4))
    assert all(torch.equal(a, b) for a, b in zip(dense, found, strict=True))


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(5, 101, 19, 21, 23, 3, 5, torch.float32)
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=real, **o: f(*a, **o).fill_(math.nan))
    assert all(t.isfinite().all() for t in results(ops.conv_gelu_conv, inputs, torch.zeros(5, 101, 23) + 1))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 64, 64, 64),
        (5, 11, 128, 129, 131),
        (1, 100, 128, 128, 128),
        (1, 250, 64, 64, 64),
        (32, 8, 96, 70, 20),
        (30, 50, 40, 70, 20),
        (4, 40, 300, 301, 303),
    ],
)
def test_threads_and_repetition_change_no_bit(shape: tuple[int, ...]) -> None:
    inputs = make(*shape, 3, 3, torch.float32)
    grad, before = torch.ones(*shape[:2], shape[4]), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(ops.conv_gelu_conv, inputs, grad, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0][0], reference.conv_gelu_conv(*inputs).float(), rtol=1e-4, atol=1e-4)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_bfloat16_is_at_least_as_exact_as_torch() -> None:
    inputs = make(4, 50, 64, 96, 32, 3, 3, torch.bfloat16)
    grad = torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()

    def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        h = nn.functional.gelu(nn.functional.conv1d(x.transpose(1, 2), w1, b1, padding=1))
        return nn.functional.conv1d(h, w2, b2, padding=1).transpose(1, 2)

    exact = results(reference.conv_gelu_conv, [t.double() for t in inputs], grad.double())
    ours, theirs = results(ops.conv_gelu_conv, inputs, grad), results(eager, inputs, grad)
    for found, other, expected in zip(ours, theirs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() <= 1.05 * (other - expected).norm()


@pytest.mark.parametrize("taps", [(1, 3), (7, 5)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (40, 8, 20, 33, 17), (2, 97, 13, 50, 49)])
def test_bfloat16_is_float32_rounded(shape: tuple[int, ...], taps: tuple[int, int]) -> None:
    inputs = make(*shape, *taps, torch.bfloat16)
    grad = torch.randn(*shape[:2], shape[4], generator=torch.Generator().manual_seed(1)).bfloat16()
    narrow = results(ops.conv_gelu_conv, inputs, grad, backend="cpu")
    wide = results(ops.conv_gelu_conv, [t.float() for t in inputs], grad.float(), backend="cpu")
    for found, expected in zip(narrow, wide, strict=True):
        atol = TOLERANCE[torch.float32] * expected.abs().max()
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=float(atol))


@pytest.mark.parametrize("isa", ["baseline", "v3"])
def test_other_instruction_sets(isa: str) -> None:
    """The same tests, in a process that is told to use another instruction set."""
    tests = ["against_the_reference and float32", "gradcheck", "range", "bfloat16", "touch", "nonfinite"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", " or ".join(tests)]
    environment = {**os.environ, "MODAFILL_CPU_ISA": isa, ENVIRONMENT: "cpu"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("batch, length, hidden, taps", [(64, 512, 2048, 1), (4096, 2, 8192, 7)])
def test_the_hidden_tensor_does_not_exist(batch: int, length: int, hidden: int, taps: int) -> None:
    """Growth of the resident set over forward and backward stays far below one [B, L, hidden] tensor of 256 MiB."""
    code = f"""
import resource, torch
from modafill import ops
torch.set_num_threads(2)
x = torch.randn({batch}, {length}, 16, requires_grad=True)
w1, w2 = (torch.randn(s, requires_grad=True) for s in (({hidden}, 16, {taps}), (16, {hidden}, {taps})))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
ops.conv_gelu_conv(x[:1], w1, None, w2, None, backend="cpu").sum().backward()
before = peak()
ops.conv_gelu_conv(x, w1, None, w2, None, backend="cpu").sum().backward()
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64


def test_out() -> None:
    inputs = make(outputs=5, dtype=torch.float32)
    expected, out = ops.conv_gelu_conv(*inputs), torch.full((3, 6, 5), math.nan)
    assert ops.conv_gelu_conv(*inputs, out=out) is out
    assert torch.equal(out, expected)
    for bad in (inputs[0], out.transpose(0, 1), out.double()):
        with pytest.raises(ValueError, match=r"^out: "):
            ops.conv_gelu_conv(*inputs, out=bad)
    with pytest.raises(ValueError, match=r"^out: "):
        ops.conv_gelu_conv(inputs[0].requires_grad_(), *inputs[1:], out=out)


def test_out_overlaps_no_input() -> None:
    inputs = make(dtype=torch.float32)
    expected = ops.conv_gelu_conv(*inputs)
    for i, t in enumerate(inputs):
        for copy, out, shared in neighbours(t, expected.shape):
            args = [copy if j == i else other for j, other in enumerate(inputs)]
            if shared:
                with pytest.raises(ValueError, match=r"^out: got a tensor that overlaps an input"):
                    ops.conv_gelu_conv(*args, out=out)
            else:
                assert torch.equal(ops.conv_gelu_conv(*args, out=out), expected)


@pytest.mark.parametrize("shape", [(0, 6, 4), (3, 0, 4)])
def test_out_of_an_empty_call(shape: tuple[int, ...]) -> None:
    inputs, out = make(*shape[:2], dtype=torch.float32), torch.empty(shape)
    assert ops.conv_gelu_conv(*inputs, out=out) is out


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_knows_that_out_was_written(backend: str) -> None:
    inputs, out = make(dtype=torch.float32), torch.ones(3, 6, 4)
    loss = (out * torch.ones_like(out, requires_grad=True)).sum()
    ops.conv_gelu_conv(*inputs, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the address space of a process")
def test_memory_that_a_thread_does_not_get_is_an_error_of_the_call() -> None:
    """300 MiB, where the hidden rows of each of two threads take 576 MiB."""
    code = """
import resource, torch
from modafill import ops
torch.set_num_threads(2)
x, w1, w2 = torch.ones(1, 192, 1), torch.ones(1_500_000, 1, 1), torch.ones(1, 1_500_000, 1)
small = x, torch.ones(10_000, 1, 1), None, torch.ones(1, 10_000, 1), None
expected = ops.conv_gelu_conv(*small)  # the threads are there
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
try:
    ops.conv_gelu_conv(x, w1, None, w2, None)
except MemoryError:
    print(torch.equal(ops.conv_gelu_conv(*small), expected))
"""
    environment = {**os.environ, ENVIRONMENT: "cpu"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "True"), run.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend: str) -> None:
    inputs = make()
    x = inputs[0].requires_grad_()
    (first,) = torch.autograd.grad(ops.conv_gelu_conv(*inputs, backend=backend).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    inputs = make(dtype=torch.float32)
    grad = [t.clone().requires_grad_() for t in inputs]
    x, w1, _, w2, _ = grad
    for args in ((*inputs, "none"), (*grad, "tanh"), (x, w1, None, w2, None, "none")):
        torch.library.opcheck(torch.ops.modafill.conv_gelu_conv, (*args, backend))
    for need in ([True] * 5, [False, True, False, False, True]):
        args = (torch.ones(3, 6, 4), *inputs, "none", need, backend)
        torch.library.opcheck(torch.ops.modafill.conv_gelu_conv_backward, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fakes_have_the_strides_of_results(backend: str) -> None:
    inputs = [t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else t for t in make(dtype=torch.float32)]
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.modafill.conv_gelu_conv, (*inputs, "none", backend), test_utils=utils)
    args = (torch.ones(3, 6, 4), *inputs, "none", [True] * 5, backend)
    torch.library.opcheck(torch.ops.modafill.conv_gelu_conv_backward, args, test_utils=utils)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_registered_backward_checks_its_arguments(backend: str) -> None:
    good = {"grad": torch.ones(3, 6, 4), **GOOD}
    bad = [
        ("grad", torch.ones(1, 1, 1)),
        ("grad", torch.ones(3, 6, 4, dtype=torch.float64)),
        ("x", torch.zeros(3, 6)),
        ("w1", torch.zeros(7, 4, 3)),
        ("b2", torch.zeros(5)),
    ]
    for named, value in bad:
        args = {**good, named: value}.values()
        with pytest.raises(ValueError, match=f"^{named}: "):
            torch.ops.modafill.conv_gelu_conv_backward(*args, "none", [True] * 5, backend)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=f"^{named}: "):
            torch.ops.modafill.conv_gelu_conv_backward(*args, "none", [True] * 5, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool, backend: str) -> None:
    torch._dynamo.reset()
    op = functools.partial(ops.conv_gelu_conv, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 5):
        inputs, grad = make(batch, dtype=torch.float32), torch.ones(batch, 6, 4)
        found, expected = results(compiled, inputs, grad), results(op, inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_functorch_modes_and_profilers(backend: str) -> None:
    inputs, grad = make(), torch.ones(3, 6, 4, dtype=torch.float64)
    op = functools.partial(ops.conv_gelu_conv, backend=backend)
    expected = results(op, inputs, grad)
    assert torch.equal(torch.func.grad(lambda x: op(x, *inputs[1:]).sum())(inputs[0]), expected[1])
    for context in (torch.autograd.profiler.profile(), FlopCounterMode(display=False)):
        with context:
            found = results(op, inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_fakes() -> None:
    inputs = make()
    with torch._subclasses.FakeTensorMode() as fake:
        assert ops.conv_gelu_conv(*(fake.from_tensor(t) for t in inputs)).shape == (3, 6, 4)


def test_the_reference_backend_is_the_reference() -> None:
    inputs, grad = make(dtype=torch.float32), torch.ones(3, 6, 4)
    ours = results(ops.conv_gelu_conv, inputs, grad, backend="reference")
    exact = results(reference.conv_gelu_conv, [t.double() for t in inputs], grad.double())
    for found, expected in zip(ours, exact, strict=True):
        assert torch.equal(found, expected.float())


GOOD = dict(zip(NAMES, make(dtype=torch.float32), strict=True))
BAD: list[tuple[str, dict[str, Any], type[Exception]]] = [
    *((name, {name: [1.0]}, TypeError) for name in NAMES),
    ("x", {"x": torch.zeros(3, 6)}, ValueError),
    ("x", {"x": torch.zeros(3, 6, 5, dtype=torch.int64)}, ValueError),
    ("w1", {"x": torch.zeros(3, 6, 4)}, ValueError),
    ("w1", {"w1": torch.zeros(7, 5, 2)}, ValueError),
    ("w1", {"w1": torch.zeros(7, 5, 9)}, ValueError),
    ("w1", {"w1": torch.zeros(7, 5)}, ValueError),
    ("w1", {"w1": torch.zeros(())}, ValueError),
    ("w1", {"w1": torch.zeros(7, 5, 3, dtype=torch.float64)}, ValueError),
    ("b1", {"b1": torch.zeros(6)}, ValueError),
    ("w2", {"w2": torch.zeros(4, 6, 1)}, ValueError),
    ("w2", {"w2": torch.zeros(4, 7, 1, device="meta")}, ValueError),
    ("w2", {"w2": torch.zeros(4, 7, 4)}, ValueError),
    ("b2", {"b2": torch.zeros(5)}, ValueError),
    ("b2", {"b2": torch.zeros(4, dtype=torch.float64)}, ValueError),
    ("approximate", {"approximate": "erf"}, ValueError),
    ("backend", {"backend": "fast"}, ValueError),
]


@pytest.mark.parametrize("named, change, error", BAD)
def test_errors_name_the_argument(named: str, change: dict[str, Any], error: type[Exception]) -> None:
    for backend in ("auto", "reference"):
        with pytest.raises(error, match=f"^{named}: "):
            ops.conv_gelu_conv(**{**GOOD, "backend": backend, **change})
