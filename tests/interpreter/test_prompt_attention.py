"""Prompt attention's Triton kernels in the interpreter against the float64 reference."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import OPTIONS, compare, make, options_for, results

from modafill import ops
from modafill.kernels import tuned
from modafill.ops import reference

DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("bias_heads", [1, 2])
@pytest.mark.parametrize("queries, keys, width", [(1, 1, 4), (5, 7, 8), (7, 5, 12), (33, 65, 32), (70, 31, 20)])
def test_against_the_reference(
    queries: int, keys: int, width: int, bias_heads: int, name: str, dtype: torch.dtype
) -> None:
    inputs, mode = make(3, 2, queries, keys, width, 2, bias_heads, dtype)
    # With one key Σ dO·O and dO·V are the same number, made in two ways.
    compare(inputs, mode, "triton", 1.0 if keys == 1 else 0.1, **options_for(name, 3, keys))


@settings(max_examples=200)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    heads = 1 + draw(st.integers(0, 9)) // 9
    batch, keys = draw(st.integers(1, 2)), draw(st.integers(1, 24))
    inputs, mode = make(
        batch,
        heads,
        draw(st.integers(1, 24)),
        keys,
        4 * draw(st.integers(1, 12)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, heads])),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 99)),
    )
    # Of few keys the gradients of logits all but cancel.
    compare(inputs, mode, "triton", 8.0, **options_for(draw(st.sampled_from(list(OPTIONS))), batch, keys))


@pytest.mark.parametrize("width", [64, 100, 128])
def test_wide_heads(width: int) -> None:
    inputs, mode = make(2, 1, 20, 40, width, 2, 1, torch.float32)
    compare(inputs, mode, "triton", 0.1, causal=True)


@pytest.mark.parametrize("missing", list(itertools.product([False, True], repeat=4))[1:])
def test_every_subset_of_gradients(missing: tuple[bool, ...]) -> None:
    inputs, mode = make(dtype=torch.float32)
    options = {"causal": True, "dropout": 0.3, "seed": 2}
    leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, missing, strict=True)]
    ops.prompt_attention(*leaves, mode, **options, backend="triton").square().sum().backward()
    everything = [x.clone().requires_grad_() for x in inputs]
    ops.prompt_attention(*everything, mode, **options, backend="reference").square().sum().backward()
    for leaf, expected, need in zip(leaves, everything, missing, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("shape", [(0, 2, 5, 7, 8), (3, 2, 0, 7, 8), (3, 2, 5, 0, 8), (1, 1, 1, 1, 4), (3, 0, 5, 7, 8)])
def test_empty_and_smallest(shape: tuple[int, ...]) -> None:
    inputs, mode = make(*shape, modes=1, bias_heads=1, dtype=torch.float32)
    for x in compare(inputs, mode, "triton", 1.0):
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_samples_are_summed_in_groups(dtype: torch.dtype) -> None:
    inputs, mode = make(40, 1, 5, 7, 8, 3, 1, dtype)
    compare(inputs, mode, "triton", 0.1)


def test_extreme_logits() -> None:
    inputs, mode = make(queries=20, keys=40, dtype=torch.float32)
    inputs[3] = torch.where(inputs[3] > 0, 1e4, -1e4) + inputs[3]
    for found, expected in zip(
        results(ops.prompt_attention, inputs, torch.ones_like(inputs[0]), mode, backend="triton"),
        results(reference.prompt_attention, [x.double() for x in inputs], torch.ones(3, 2, 20, 8).double(), mode),
        strict=True,
    ):
        # A logit of 1e4 has an error of 5e-4.
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def test_rows_with_nothing_to_attend_to() -> None:
    inputs, _ = make(dtype=torch.float32)
    inputs[3][1] = -math.inf
    inputs[3][2, :, 3] = -math.inf
    inputs[3][0, :, :, 2:4] = -math.inf
    ours = compare(inputs, torch.tensor([0, 1, 2]), "triton", 0.1)
    assert not ours[0][1].any()
    assert not ours[0][2, :, 3].any()
    assert all(x.isfinite().all() for x in ours)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_lies_behind_the_last_key_is_never_read(bad: float) -> None:
    inputs, mode = make(dtype=torch.float32, keys=20)
    lengths, grad = torch.tensor([0, 13, 20]), torch.ones_like(inputs[0])
    clean = results(ops.prompt_attention, inputs, grad, mode, key_lengths=lengths, backend="triton")
    behind = torch.arange(20) >= lengths[:, None]
    for x in inputs[1:3]:
        x.masked_fill_(behind[:, None, :, None], bad)
    dirty = results(ops.prompt_attention, inputs, grad, mode, key_lengths=lengths, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_nan_comes_through_where_it_is_read() -> None:
    inputs, mode = make(dtype=torch.float32)
    inputs[0][1, 0, 2, 3] = math.nan
    out = ops.prompt_attention(*inputs, mode, backend="triton")
    assert torch.equal(out.isnan().any(-1).nonzero(), torch.tensor([[1, 0, 2]]))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("value", [-1, 99])
@pytest.mark.parametrize("named, lengths", [("mode", [7, 7, 7]), ("mode", [7, 0, 7]), ("key_lengths", [0, 7, 7])])
def test_a_value_out_of_range_gives_nan_in_its_sample(named: str, lengths: list[int], value: int, backend: str) -> None:
    """In the result, in its gradients, and in that of the table that was read."""
    # The op checks what it gives the reference on the CPU; on a GPU it does not read it.
    attention = functools.partial(ops.prompt_attention, backend=backend)
    attention = reference.prompt_attention if backend == "reference" else attention
    inputs, mode = make(dtype=torch.float32)[0], torch.tensor([1, 1, 2])
    options = {"mode": mode, "key_lengths": torch.tensor(lengths)}
    options[named][1] = value
    out, q_grad, *others = results(attention, inputs, torch.ones_like(inputs[0]), **options)
    for x in (out, q_grad):
        assert x.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert x.isnan().flatten(1).any(1).tolist() == [False, True, False]
    # Without a key nothing else is read; a mode that does not exist stands for the first table.
    table = 1 if named == "key_lengths" else 0
    for x, place in zip(others, (1, 1, table), strict=True):
        assert x.isnan().flatten(1).any(1).tolist() == [i == place and lengths[1] > 0 for i in range(3)]


def test_nothing_is_written_outside_the_outputs_and_all_of_them_is(monkeypatch: pytest.MonkeyPatch) -> None:
    arenas: list[torch.Tensor] = []

    def within(shape: torch.Size, **options: object) -> torch.Tensor:
        size = math.prod(shape)
        arenas.append(torch.full((size + 64,), math.nan))
        return arenas[-1][32 : 32 + size].view(shape)

    inputs, mode = make(5, 2, 37, 41, 12, dtype=torch.float32)
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: within(x.shape))
    found = results(ops.prompt_attention, inputs, torch.full((5, 2, 37, 12), 0.5), mode, backend="triton")
    assert len(arenas) >= 5
    assert all(x.isfinite().all() for x in found)
    assert all(a[:32].isnan().all() and a[-32:].isnan().all() and not a[32:-32].isnan().any() for a in arenas)


def test_strides() -> None:
    inputs, mode = make(3, 4, 9, 11, 8, 2, 4, torch.float32)
    grad = torch.ones(3, 4, 9, 8)
    dense = results(ops.prompt_attention, inputs, grad, mode, backend="triton")
    projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs[:3]]
    sliced = [F.pad(x, (3, 2))[..., 3:-2] for x in inputs[:3]]
    wide = F.pad(inputs[3], (0, 5))[..., :-5]
    for variant in ([*projected, inputs[3]], [*strided, wide], [*sliced, wide]):
        found = results(
            ops.prompt_attention, variant, torch.ones(3, 1, 1, 8).expand(3, 4, 9, 8), mode, backend="triton"
        )
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


def test_windows_that_share_elements() -> None:
    inputs, mode = make(2, 2, 5, 5, 8, dtype=torch.float32)
    inputs[:3] = [x[:, :, :2].flatten(2).unfold(-1, 8, 2) for x in inputs[:3]]
    grad = torch.ones_like(inputs[0])
    found = results(ops.prompt_attention, inputs, grad, mode, backend="triton")
    expected = results(ops.prompt_attention, [x.contiguous() for x in inputs], grad, mode, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("head", [1, 2])
def test_heads_that_lie_far_apart(head: int) -> None:
    """The third head begins 2³¹ elements behind the first; only what is read of the memory is touched."""
    inputs, mode = make(1, 3, 4, 4, 8, dtype=torch.float16, bias_heads=3)
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((1, 3, 4, 8), (0, 2**30, 8, 1))
    far.copy_(inputs[head - 1])
    spread = [*inputs]
    spread[head - 1] = far
    expected = ops.prompt_attention(*inputs, mode, backend="triton")
    assert torch.equal(ops.prompt_attention(*spread, mode, backend="triton"), expected)


def test_dropout_drops_what_the_cpu_drops() -> None:
    (q, k, _, bias), mode = make(2, 2, 40, 64, 64, dtype=torch.float32)
    identity = torch.eye(64).expand(2, 2, 64, 64)
    options = {"dropout": 0.3, "seed": torch.tensor(-(2**40)), "row_id": torch.tensor([2**40 + 1, -3])}
    ours = ops.prompt_attention(q, k, identity, bias, mode, **options, backend="triton") != 0
    assert torch.equal(ours, ops.prompt_attention(q, k, identity, bias, mode, **options, backend="cpu") != 0)


def test_every_configuration_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, mode = make(2, 1, 70, 90, 24, 2, 1, torch.float32)
    for block_m, block_n, block_k in ((16, 16, 16), (16, 64, 32), (64, 16, 16), (128, 32, 32)):
        entry = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 1}
        listed = [{"bytes": 4, "width": 32, **entry}]
        monkeypatch.setitem(
            tuned._listed("prompt_attention"), 80, dict.fromkeys(("forward", "queries", "keys", "bias"), listed)
        )
        compare(inputs, mode, "triton", 0.1, causal=True, dropout=0.2, seed=1)
