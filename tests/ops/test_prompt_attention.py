"""Prompt attention: the C++ path against the float64 reference and against torch's own attention."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import OPTIONS, TOLERANCE, compare, make, options_for, results
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
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("bias_heads", [1, 2])
@pytest.mark.parametrize(
    "queries, keys, width", [(1, 1, 4), (5, 7, 8), (7, 5, 12), (33, 65, 32), (70, 31, 20), (40, 64, 128), (16, 96, 64)]
)
def test_against_the_reference(
    queries: int, keys: int, width: int, bias_heads: int, name: str, dtype: torch.dtype
) -> None:
    inputs, mode = make(4, 2, queries, keys, width, 3, bias_heads, dtype)
    compare(inputs, mode, **options_for(name, 4, keys))


def test_the_reference_gives_nan_for_key_lengths_out_of_range() -> None:
    """What the op on a GPU promises, where nothing is read back."""
    q, k, v = (torch.randn(4, 2, n, 8) for n in (5, 7, 7))
    found = reference.prompt_attention(q, k, v, None, key_lengths=torch.tensor([-1, 0, 7, 8]))
    assert found.isnan().flatten(1).all(1).tolist() == [True, False, False, True]
    assert not found[1:3].isnan().any()


@settings(max_examples=200)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    heads = draw(st.integers(1, 4))
    batch, keys = draw(st.integers(1, 20)), draw(st.integers(1, 70))
    inputs, mode = make(
        batch,
        heads,
        draw(st.integers(1, 70)),
        keys,
        4 * draw(st.integers(1, 10)),
        draw(st.integers(1, 7)),
        draw(st.sampled_from([1, heads])),
        draw(st.sampled_from(EXACT)),
        draw(st.integers(0, 99)),
    )
    # Where few keys are left, gradients of the logits all but cancel.
    compare(inputs, mode, floor=0.1, **options_for(draw(st.sampled_from(list(OPTIONS))), batch, keys))


@pytest.mark.parametrize("missing", list(itertools.product([False, True], repeat=4))[1:])
def test_every_subset_of_gradients(missing: tuple[bool, ...]) -> None:
    inputs, mode = make(dtype=torch.float64)
    leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, missing, strict=True)]
    ops.prompt_attention(*leaves, mode, causal=True, dropout=0.3, seed=2).square().sum().backward()
    everything = [x.clone().requires_grad_() for x in inputs]
    reference.prompt_attention(*everything, mode, causal=True, dropout=0.3, seed=2).square().sum().backward()
    for leaf, expected, need in zip(leaves, everything, missing, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-10, atol=1e-12)
        else:
            assert leaf.grad is None


def test_gradcheck() -> None:
    inputs, mode = make(2, 2, 3, 4, 4, 2, 1)
    leaves = [x.requires_grad_() for x in inputs]
    for options in ({}, {"causal": True}, {"dropout": 0.4, "seed": 3}, {"key_lengths": torch.tensor([2, 4])}):
        assert torch.autograd.gradcheck(lambda *x, o=options: ops.prompt_attention(*x, mode, **o), leaves)


@pytest.mark.parametrize("shape", [(0, 2, 5, 7, 8), (3, 2, 0, 7, 8), (3, 2, 5, 0, 8), (1, 1, 1, 1, 4), (3, 0, 5, 7, 8)])
def test_empty_and_smallest(shape: tuple[int, ...]) -> None:
    inputs, mode = make(*shape, modes=1, bias_heads=1)
    for x in compare(inputs, mode):
        assert x.isfinite().all()
    if shape[3] == 0:
        assert not ops.prompt_attention(*inputs, mode).any()


@pytest.mark.parametrize("queries, keys", [(1, 2048), (2048, 1), (600, 513)])
def test_long_sequences(queries: int, keys: int) -> None:
    inputs, mode = make(2, 1, queries, keys, 16, 2, 1, torch.float32)
    compare(inputs, mode, causal=queries > 1)


def test_extreme_logits() -> None:
    inputs, mode = make(queries=20, keys=40)
    inputs[3] = torch.where(inputs[3] > 0, 1e4, -1e4) + inputs[3]
    compare(inputs, mode)
    inputs[0] *= 1e4
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert ops.prompt_attention(*(x.to(dtype) for x in inputs), mode).isfinite().all()


def test_rows_with_nothing_to_attend_to() -> None:
    inputs, mode = make(dtype=torch.float32)
    inputs[3][1] = -math.inf
    inputs[3][2, :, 3] = -math.inf
    inputs[3][0, :, :, 2:4] = -math.inf
    mode = torch.tensor([0, 1, 2])
    ours = compare(inputs, mode)
    assert not ours[0][1].any()
    assert not ours[0][2, :, 3].any()
    assert all(x.isfinite().all() for x in ours)
    assert not ours[4][1].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_lies_behind_the_last_key_is_never_read(bad: float) -> None:
    inputs, mode = make(dtype=torch.float32, keys=20)
    lengths, grad = torch.tensor([0, 13, 20]), torch.ones_like(inputs[0])
    clean = results(ops.prompt_attention, inputs, grad, mode, key_lengths=lengths)
    behind = torch.arange(20) >= lengths[:, None]
    for x in inputs[1:3]:
        x.masked_fill_(behind[:, None, :, None], bad)
    dirty = results(ops.prompt_attention, inputs, grad, mode, key_lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    for x in dirty[2:4]:
        assert not x.masked_select(behind[:, None, :, None]).any()


LARGEST_NANS = [
    torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32),
    torch.tensor(2**63 - 1).view(torch.float64),
]


@pytest.mark.parametrize("nan", [torch.tensor(math.nan), *LARGEST_NANS])
def test_nan_comes_through_where_it_is_read(nan: Tensor) -> None:
    inputs, mode = make(dtype=nan.dtype)
    inputs[0][1, 0, 2, 3] = nan
    out = ops.prompt_attention(*inputs, mode)
    assert torch.equal(out.isnan().any(-1).nonzero(), torch.tensor([[1, 0, 2]]))


@pytest.mark.parametrize("rest", ["hidden", "finite"])
@pytest.mark.parametrize("at", [0, 1, 15, 16, 17, 33, 36])
def test_one_nan_among_the_logits_comes_through(at: int, rest: str) -> None:
    inputs, mode = make(keys=37, dtype=torch.float32)
    bias = inputs[3][1, 0, 3]
    if rest == "hidden":
        bias.fill_(-math.inf)
    bias[at] = math.nan
    out = ops.prompt_attention(*inputs, torch.ones_like(mode))
    assert torch.equal(out.isnan().all(-1).nonzero(), torch.tensor([[b, 0, 3] for b in range(3)]))
    assert torch.equal(out.isnan().any(-1), out.isnan().all(-1))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is full of NaN."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=real, **o: f(*a, **o).fill_(math.nan))
    return


@pytest.mark.parametrize("name", ["plain", "both"])
@pytest.mark.usefixtures("poisoned")
def test_every_element_is_written(name: str) -> None:
    inputs, mode = make(5, 2, 37, 41, 12, dtype=torch.float32)
    grad = torch.ones_like(inputs[0]).fill_(1.0)
    assert all(
        x.isfinite().all() for x in results(ops.prompt_attention, inputs, grad, mode, **options_for(name, 5, 41))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_that_share_elements(backend: str) -> None:
    inputs, mode = make(2, 2, 5, 5, 8, dtype=torch.float32)
    inputs[:3] = [x[:, :, :2].flatten(2).unfold(-1, 8, 2) for x in inputs[:3]]
    grad = torch.ones_like(inputs[0])
    found = results(ops.prompt_attention, inputs, grad, mode, backend=backend)
    expected = results(ops.prompt_attention, [x.contiguous() for x in inputs], grad, mode, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_strides() -> None:
    """Projections give [B, L, H, d] in memory; the result has that layout too, and every layout the same bits."""
    inputs, mode = make(3, 4, 9, 11, 8, 2, 4, torch.float32)
    dense = results(ops.prompt_attention, inputs, torch.ones(3, 4, 9, 8), mode)
    projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    out = ops.prompt_attention(*projected, inputs[3], mode)
    assert out.transpose(1, 2).is_contiguous()
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs[:3]]
    sliced = [F.pad(x, (3, 2))[..., 3:-2] for x in inputs[:3]]
    wide = F.pad(inputs[3], (0, 5))[..., :-5]
    for variant in ([*projected, inputs[3]], [*strided, wide], [*sliced, wide]):
        found = results(ops.prompt_attention, variant, torch.ones(3, 1, 1, 8).expand(3, 4, 9, 8), mode)
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


def test_bfloat16_is_at_least_as_exact_as_torch() -> None:
    inputs, mode = make(4, 2, 33, 50, 32, dtype=torch.bfloat16)
    grad = torch.randn(4, 2, 33, 32).bfloat16()
    exact = results(reference.prompt_attention, [x.double() for x in inputs], grad.double(), mode)
    ours = results(ops.prompt_attention, inputs, grad, mode)

    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * 32**-0.5 + bias[mode]).softmax(-1) @ v

    torchs = results(eager, inputs, grad, mode)
    for found, other, expected in zip(ours, torchs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() <= 1.05 * (other - expected).norm()


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("bias_heads", [1, 2])
@pytest.mark.parametrize(
    "batch, queries, keys, width", [(4, 5, 7, 12), (4, 33, 65, 20), (4, 70, 31, 32), (37, 9, 13, 8)]
)
def test_bfloat16_is_float32_rounded(
    batch: int, queries: int, keys: int, width: int, bias_heads: int, name: str
) -> None:
    inputs, mode = make(batch, 2, queries, keys, width, 3, bias_heads, torch.bfloat16)
    grad, options = torch.ones_like(inputs[0]), options_for(name, batch, keys)
    wide = results(ops.prompt_attention, [x.float() for x in inputs], grad.float(), mode, **options)
    for found, expected in zip(results(ops.prompt_attention, inputs, grad, mode, **options), wide, strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("isa", ["baseline", "v3"])
def test_other_instruction_sets(isa: str) -> None:
    """The same tests, in a process that is told to use another instruction set."""
    tests = ["against_the_reference and float32 and everything", "long", "gradcheck", "behind", "bfloat16", "nan"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", " or ".join(tests)]
    environment = {**os.environ, "MODAFILL_CPU_ISA": isa, ENVIRONMENT: "cpu"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("bias_heads", [1, 4])
@pytest.mark.parametrize("batch", [1, 37])
def test_threads_and_repetition_change_no_bit(batch: int, bias_heads: int) -> None:
    inputs, mode = make(batch, 4, 60, 50, 32, 5, bias_heads, torch.float32)
    grad = torch.ones_like(inputs[0])
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(ops.prompt_attention, inputs, grad, mode, dropout=0.2, seed=1))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("bias", [(7, 8), (1, 8), (7, 1)])
def test_memory_is_that_of_inputs_results_and_a_table(bias: tuple[int, int], dtype: str) -> None:
    """The peak of forward and backward, inputs and all, for 32 samples of 500 × 500 and P tables of H heads or one.

    A bias of the shape of the logits would be 256 MB in float32.
    """
    code = f"""
import torch
from pathlib import Path
from modafill import ops

def resident(what):
    return 1024 * int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0])

def run(batch):
    shapes = [(batch, 8, 500, 32)] * 3 + [({bias[0]}, {bias[1]}, 500, 500)]
    leaves = [torch.randn(shape, dtype=torch.{dtype}, requires_grad=True) for shape in shapes]
    mode, grad = torch.arange(batch) % {bias[0]}, torch.randn(shapes[0], dtype=torch.{dtype})
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    out = ops.prompt_attention(*leaves, mode)
    out.backward(grad)
    inputs, table = sum(x.nbytes for x in leaves), 8 * 500 * 500 * out.itemsize
    return inputs + resident("VmHWM") - before, inputs + out.nbytes + sum(x.grad.nbytes for x in leaves) + table

torch.set_num_threads(2)
run(1)
print(*run(32))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, counted = map(int, run.stdout.split())
    assert peak <= 1.25 * counted, f"{peak / counted:.3f}"


def test_against_sdpa() -> None:
    inputs, mode = make(4, 2, 30, 45, 16, 3, 1, torch.float32)
    lengths = torch.tensor([45, 3, 20, 44])

    def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode: Tensor, causal: bool) -> Tensor:
        mask = (
            bias[mode]
            .expand(4, 2, 30, 45)
            .masked_fill((torch.arange(45) >= lengths[:, None])[:, None, None], -math.inf)
        )
        if causal:
            mask = mask.masked_fill(torch.ones(30, 45, dtype=torch.bool).triu(1 + abs(45 - 30)), -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    grad = torch.randn(4, 2, 30, 16)
    for causal in (False, True):
        theirs = results(sdpa, inputs, grad, mode, causal=causal)
        ours = results(ops.prompt_attention, inputs, grad, mode, causal=causal, key_lengths=lengths)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_against_multihead_attention() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 3, batch_first=True).double()
    x, source = torch.randn(2, 5, 24).double(), torch.randn(2, 9, 24).double()
    bias = torch.randn(1, 1, 5, 9).double()
    expected = module(x, source, source, attn_mask=bias[0, 0], need_weights=False)[0]
    weight, offset = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    heads = [
        F.linear(a, w, b).unflatten(-1, (3, 8)).transpose(1, 2)
        for a, w, b in zip((x, source, source), weight, offset, strict=True)
    ]
    out = ops.prompt_attention(*heads, bias).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.out_proj(out), expected, rtol=1e-10, atol=1e-12)


def test_without_a_bias() -> None:
    (q, k, v, _), _ = make(dtype=torch.float32)
    torch.testing.assert_close(ops.prompt_attention(q, k, v, None), F.scaled_dot_product_attention(q, k, v))
    q.requires_grad_()
    ops.prompt_attention(q, k, v, None).sum().backward()
    assert q.grad.any()


def test_dropout_keeps_its_share_and_belongs_to_the_row() -> None:
    (q, k, _, bias), mode = make(6, 2, 40, 64, 64, dtype=torch.float32)
    identity = torch.eye(64).expand(6, 2, 64, 64)
    weights = ops.prompt_attention(q, k, identity, bias[..., :64], mode)
    dropped = ops.prompt_attention(q, k, identity, bias, mode, dropout=0.3, seed=4)
    kept = dropped != 0
    assert abs(kept.float().mean() - 0.7) < 4 * (0.21 / kept.numel()) ** 0.5
    torch.testing.assert_close(dropped[kept], (weights / 0.7)[kept], rtol=1e-5, atol=1e-7)
    assert torch.equal(kept, reference.dropout_mask((6, 2, 40, 64), 0.3, seed=4, row_id=None, device="cpu"))
    some = torch.tensor([4, 1])
    part = ops.prompt_attention(q[some], k[some], identity[some], bias, mode[some], dropout=0.3, seed=4, row_id=some)
    assert torch.equal(part, dropped[some])
    assert not torch.equal(ops.prompt_attention(q, k, identity, bias, mode, dropout=0.3, seed=5) != 0, kept)


def test_out() -> None:
    inputs, mode = make(dtype=torch.float32)
    expected, out = ops.prompt_attention(*inputs, mode), torch.full_like(inputs[0], math.nan)
    assert ops.prompt_attention(*inputs, mode, out=out) is out
    assert torch.equal(out, expected)
    for bad in (inputs[0], out.transpose(0, 1), out.double()):
        with pytest.raises(ValueError, match=r"^out: "):
            ops.prompt_attention(*inputs, mode, out=bad)
    with pytest.raises(ValueError, match=r"^out: "):
        ops.prompt_attention(inputs[0].requires_grad_(), *inputs[1:], mode, out=out)


def test_out_overlaps_no_input() -> None:
    inputs, mode = make(dtype=torch.float32)
    expected = ops.prompt_attention(*inputs, mode)
    for i, x in enumerate(inputs):
        for copy, out, shared in neighbours(x, expected.shape):
            args = [copy if j == i else y for j, y in enumerate(inputs)]
            if shared:
                with pytest.raises(ValueError, match=r"^out: got a tensor that overlaps an input"):
                    ops.prompt_attention(*args, mode, out=out)
            else:
                assert torch.equal(ops.prompt_attention(*args, mode, out=out), expected)


def test_out_lies_in_no_part_of_packed_projections() -> None:
    packed = torch.randn(2, 64, 3, 2, 16)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    for out in (packed.view(-1)[-q.numel() :], packed.view(-1)[: q.numel()]):
        with pytest.raises(ValueError, match=r"^out: "):
            ops.prompt_attention(q, k, v, None, out=out.view(q.shape))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7, 8), (3, 2, 0, 7, 8), (3, 2, 5, 0, 8)])
def test_out_of_an_empty_call(shape: tuple[int, ...]) -> None:
    (q, k, v, bias), mode = make(*shape, dtype=torch.float32)
    out = torch.full_like(q, math.nan)
    assert ops.prompt_attention(q, k, v, bias, mode, out=out) is out
    assert not out.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_knows_that_out_was_written(backend: str) -> None:
    inputs, mode = make(dtype=torch.float32)
    out = torch.ones_like(inputs[0])
    loss = (out * torch.ones_like(out, requires_grad=True)).sum()
    ops.prompt_attention(*inputs, mode, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend: str) -> None:
    inputs, mode = make()
    q = inputs[0].requires_grad_()
    out = ops.prompt_attention(*inputs, mode, backend=backend)
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(first.sum(), q)


def cases(backend: str) -> list[tuple[Any, ...]]:
    inputs, mode = make(dtype=torch.float32)
    grad = [x.clone().requires_grad_() for x in inputs]
    lengths, rows, seed = torch.tensor([7, 2, 5]), torch.arange(3), torch.tensor(3)
    return [
        (*x, mode, causal, lengths, 0.4, dropout, 5, given, rows, False, backend)
        for x in (inputs, grad)
        for causal, dropout, given in ((False, 0.0, None), (True, 0.2, seed))
    ]


# What the registered ops take between mode and the last arguments.
TAIL = (False, None, 0.4, 0.0, 0, None, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    for args in cases(backend):
        torch.library.opcheck(torch.ops.modafill.prompt_attention, args)
    inputs, mode = make(dtype=torch.float32)
    out, logsumexp = torch.ops.modafill.prompt_attention(*inputs, mode, *TAIL, True, backend)
    for need in ([True] * 4, [False, True, False, False]):
        args = (torch.ones_like(out), *inputs, mode, *TAIL, None, logsumexp, need, backend)
        torch.library.opcheck(torch.ops.modafill.prompt_attention_backward, args)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "projected": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(x.shape),
    "sliced": lambda x: F.pad(x, (2, 2))[..., 2:-2],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_have_the_strides_of_results(layout: str, backend: str) -> None:
    inputs, mode = make(dtype=torch.float32)
    inputs = [LAYOUTS[layout](x) for x in inputs]
    op, backward = torch.ops.modafill.prompt_attention, torch.ops.modafill.prompt_attention_backward
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*inputs, mode, *TAIL, True, backend), test_utils=utils)
    out, logsumexp = op(*inputs, mode, *TAIL, True, backend)
    args = (torch.ones_like(out), *inputs, mode, *TAIL, None, logsumexp, [True] * 4, backend)
    torch.library.opcheck(backward, args, test_utils=utils)


def test_the_registered_backward_checks_its_arguments() -> None:
    (q, k, v, bias), mode = make(dtype=torch.float32)
    names = ("grad", "q", "k", "v", "bias", "mode", "out", "logsumexp")
    good = dict(zip(names, (torch.ones_like(q), q, k, v, bias, mode, None, torch.zeros(3, 2, 5)), strict=True))
    bad: list[tuple[str, str, Any]] = [
        ("grad", "auto", torch.ones(1, 1, 1, 1)),
        ("grad", "reference", torch.ones(3, 2, 1, 8)),
        ("grad", "auto", torch.ones(3, 2, 5, 8, dtype=torch.float64)),
        ("logsumexp", "auto", torch.zeros(3, 2, 4)),
        ("logsumexp", "auto", torch.zeros(3, 2, 5, dtype=torch.float64)),
        ("v", "auto", torch.zeros(3, 2, 6, 8)),
        ("bias", "auto", torch.zeros(3, 2, 5, 6)),
        ("mode", "reference", torch.tensor([0, 1, -1])),
    ]
    for named, backend, value in bad:
        args = {**good, named: value}
        first, last = [args[n] for n in names[:6]], [args[n] for n in names[6:]]
        with pytest.raises(ValueError, match=f"^{named}: "):
            torch.ops.modafill.prompt_attention_backward(*first, *TAIL, *last, [True] * 4, backend)
        # Of a fake, values are not known.
        if named != "mode":
            with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=f"^{named}: "):
                torch.ops.modafill.prompt_attention_backward(*first, *TAIL, *last, [True] * 4, backend)


def test_the_registered_backward_reads_strided_arguments() -> None:
    inputs, mode = make(dtype=torch.float32)
    out, logsumexp = torch.ops.modafill.prompt_attention(*inputs, mode, *TAIL, True, "auto")
    expected, found = (
        torch.ops.modafill.prompt_attention_backward(grad, *inputs, mode, *TAIL, None, kept, [True] * 4, "auto")
        for grad, kept in ((out, logsumexp), (out.mT.contiguous().mT, logsumexp.mT.contiguous().mT))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_logsumexp_has_no_gradient(backend: str) -> None:
    inputs, mode = make(dtype=torch.float32)
    out, logsumexp = torch.ops.modafill.prompt_attention(
        inputs[0].requires_grad_(), *inputs[1:], mode, *TAIL, True, backend
    )
    assert out.requires_grad
    assert not logsumexp.requires_grad


def test_partial_bias_gradients_take_little_memory() -> None:
    module = importlib.import_module("modafill.ops.prompt_attention")

    def groups(samples: int, heads: int, size: int) -> int:
        q, bias = (torch.empty(shape, device="meta") for shape in ((samples, heads, 1, 4), (1, heads, size, size)))
        return module._groups(q, bias)

    assert groups(256, 1, 64) == 32
    assert groups(256, 8, 64) == 4
    assert groups(16, 1, 64) == 2
    # Tables of 4 MiB each, and one that is larger than all partial sums may be.
    assert groups(256, 1, 1024) == 4
    assert groups(256, 2, 2048) == 1


def test_the_backward_runs_where_the_forward_did(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, mode = make(dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    out = ops.prompt_attention(*leaves, mode)
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.prompt_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 5):
        inputs, mode = make(batch, dtype=torch.float32)
        options = {"causal": True, "dropout": 0.1, "seed": 3, "key_lengths": torch.tensor([7, 2, 5, 0, 1][:batch])}
        options["backend"] = backend
        grad = torch.ones_like(inputs[0])
        found = results(compiled, inputs, grad, mode, **options)
        expected = results(ops.prompt_attention, inputs, grad, mode, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_exports() -> None:
    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode: Tensor) -> Tensor:
            return ops.prompt_attention(q, k, v, bias, mode)

    inputs, mode = make(dtype=torch.float32)
    program = torch.export.export(Module(), (*inputs, mode))
    assert torch.equal(program.module()(*inputs, mode), ops.prompt_attention(*inputs, mode))


@pytest.mark.parametrize("backend", BACKENDS)
def test_functorch_modes_and_profilers(backend: str) -> None:
    inputs, mode = make()
    attention = functools.partial(ops.prompt_attention, backend=backend)
    grad = torch.ones_like(inputs[0])
    expected = results(attention, inputs, grad, mode)
    assert torch.equal(torch.func.grad(lambda q: attention(q, *inputs[1:], mode).sum())(inputs[0]), expected[1])
    for context in (torch.autograd.profiler.profile(), FlopCounterMode(display=False)):
        with context:
            found = results(attention, inputs, grad, mode)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_meta_and_fake_tensors() -> None:
    inputs, mode = make(dtype=torch.float32)
    with torch._subclasses.FakeTensorMode() as fake:
        fakes = [fake.from_tensor(x) for x in (*inputs, mode)]
        assert ops.prompt_attention(*fakes).shape == inputs[0].shape


@pytest.mark.parametrize("name", list(OPTIONS))
def test_the_reference_backend_is_the_reference(name: str) -> None:
    inputs, mode = make(4, dtype=torch.float32)
    grad, options = torch.ones_like(inputs[0]), options_for(name, 4, 7)
    ours = results(ops.prompt_attention, inputs, grad, mode, **options, backend="reference")
    exact = results(reference.prompt_attention, [x.double() for x in inputs], grad.double(), mode, **options)
    for found, expected in zip(ours, exact, strict=True):
        assert torch.equal(found, expected.float())


def test_the_references_own_law() -> None:
    """One query, one head, by hand."""
    q, k = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]]), torch.eye(4)[None, None, :3]
    v, bias = torch.arange(12.0).view(1, 1, 3, 4), torch.tensor([[[[0.0, 1.0, -1.0]]]])
    weights = [math.exp(0.5), math.exp(1.0), math.exp(-1.0)]
    expected = sum(w / sum(weights) * v[0, 0, j] for j, w in enumerate(weights))
    torch.testing.assert_close(reference.prompt_attention(q, k, v, bias)[0, 0, 0], expected.double())


GOOD: dict[str, Any] = dict(zip(("q", "k", "v", "bias"), make(dtype=torch.float32)[0], strict=True))
BAD: list[tuple[str, dict[str, Any], type[Exception]]] = [
    *((name, {name: [1.0]}, TypeError) for name in ("q", "k", "v", "bias", "mode", "key_lengths", "row_id")),
    ("q", {"q": torch.zeros(3, 2, 8)}, ValueError),
    ("q", {"q": torch.zeros(3, 2, 5, 8, dtype=torch.int64)}, ValueError),
    ("q", {"q": torch.zeros(3, 2, 5, 6), "k": torch.zeros(3, 2, 7, 6), "v": torch.zeros(3, 2, 7, 6)}, ValueError),
    ("q", {n: torch.zeros(3, 2, 5 if n == "q" else 7, 132) for n in "qkv"}, ValueError),
    ("q, k", {n: torch.zeros(1, 2, 2049 if n == "q" else 7, 8) for n in "qkv"}, ValueError),
    ("k", {"k": torch.zeros(3, 2, 7, 12)}, ValueError),
    ("k", {"k": torch.zeros(3, 1, 7, 8)}, ValueError),
    ("k", {"k": torch.zeros(3, 2, 7, 8, dtype=torch.float64)}, ValueError),
    ("v", {"v": torch.zeros(3, 2, 6, 8)}, ValueError),
    ("v", {"v": torch.zeros(3, 2, 7, 8, device="meta")}, ValueError),
    ("bias", {"bias": torch.zeros(3, 2, 5, 6)}, ValueError),
    ("bias", {"bias": torch.zeros(3, 4, 5, 7)}, ValueError),
    ("bias", {"bias": torch.zeros(0, 2, 5, 7)}, ValueError),
    ("bias", {"bias": torch.zeros(3, 2, 5, 7, dtype=torch.float64)}, ValueError),
    ("mode", {"mode": None}, ValueError),
    ("mode", {"mode": torch.tensor([0, 1, 3])}, ValueError),
    ("mode", {"mode": torch.tensor([0, -1, 1])}, ValueError),
    ("mode", {"mode": torch.zeros(2, dtype=torch.int64)}, ValueError),
    ("mode", {"mode": torch.zeros(3)}, ValueError),
    ("mode", {"bias": None}, ValueError),
    ("key_lengths", {"key_lengths": torch.tensor([1, 2, 8])}, ValueError),
    ("key_lengths", {"key_lengths": torch.tensor([1, 2, -1])}, ValueError),
    ("key_lengths", {"key_lengths": torch.tensor([1, 2])}, ValueError),
    ("q", {"q": torch.tensor(1.0)}, ValueError),
    ("q", {n: torch.zeros(3, 2, 5 if n == "q" else 7, 0) for n in "qkv"}, ValueError),
    ("scale", {"scale": math.inf}, ValueError),
    ("scale", {"scale": "1"}, TypeError),
    ("dropout", {"dropout": None}, TypeError),
    ("causal", {"causal": "no"}, TypeError),
    ("causal", {"causal": 1}, TypeError),
    ("dropout", {"dropout": 1.0, "seed": 0}, ValueError),
    ("dropout", {"dropout": -0.1, "seed": 0}, ValueError),
    ("seed", {"dropout": 0.1}, ValueError),
    ("row_id", {"row_id": torch.arange(2)}, ValueError),
    ("backend", {"backend": "fast"}, ValueError),
]


@pytest.mark.parametrize("named, change, error", BAD)
def test_errors_name_the_argument(named: str, change: dict[str, Any], error: type[Exception]) -> None:
    for backend in ("auto", "reference"):
        with pytest.raises(error, match=f"^{named}: "):
            ops.prompt_attention(**{**GOOD, "mode": torch.tensor([0, 1, 2]), "backend": backend, **change})


def test_explain_names_what_it_has_not() -> None:
    with pytest.raises(RuntimeError, match="the cuda backend cannot run: prompt_attention has no such backend"):
        ops.explain("prompt_attention", backend="cuda")
