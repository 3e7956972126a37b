"""Conv1D → GELU → Conv1D's Triton kernels in the interpreter against the float64 reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.convolution import compare, make, results

from modafill import ops
from modafill.kernels import conv_gelu_conv as kernels
from modafill.kernels import tuned
from modafill.ops import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("taps", [(1, 1), (3, 1), (1, 3), (3, 3), (5, 7), (7, 5)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 6, 5, 7, 4), (9, 8, 20, 33, 17), (2, 70, 40, 50, 49)])
def test_against_the_reference(
    shape: tuple[int, ...], taps: tuple[int, int], approximate: str, dtype: torch.dtype
) -> None:
    compare(make(*shape, *taps, dtype), backend="triton", approximate=approximate)


@settings(max_examples=200)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, most)) for most in (2, 24, 20, 24, 20)]
    taps = [data.draw(st.sampled_from([1, 3, 5, 7])) for _ in range(2)]
    dtype, seed = data.draw(st.sampled_from([torch.float32, torch.float16])), data.draw(st.integers(0, 99))
    compare(make(*sizes, *taps, dtype, seed), "triton", approximate=data.draw(st.sampled_from(["none", "tanh"])))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5))[1:])
def test_every_subset_of_gradients(wanted: tuple[bool, ...]) -> None:
    inputs = make(second_taps=3, dtype=torch.float32)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, wanted, strict=True)]
    ops.conv_gelu_conv(*leaves, backend="triton").square().sum().backward()
    everything = [t.clone().requires_grad_() for t in inputs]
    ops.conv_gelu_conv(*everything, backend="reference").square().sum().backward()
    for leaf, expected, need in zip(leaves, everything, wanted, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    out, *grads = results(
        ops.conv_gelu_conv, make(*shape, dtype=torch.float32), torch.ones(*shape, 4), backend="triton"
    )
    assert out.shape == (*shape, 4)
    assert not any(g.any() for g in grads)


def test_without_biases() -> None:
    x, w1, _, w2, _ = make(second_taps=3, dtype=torch.float32)
    expected = reference.conv_gelu_conv(x, w1, None, w2, None)
    torch.testing.assert_close(ops.conv_gelu_conv(x, w1, None, w2, None, backend="triton"), expected.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_its_neighbours_alone(bad: float) -> None:
    inputs = make(2, 40, first_taps=3, second_taps=5, dtype=torch.float32)
    clean = ops.conv_gelu_conv(*inputs, backend="triton")
    inputs[0][1, 20, 2] = bad
    out = ops.conv_gelu_conv(*inputs, backend="triton")
    far = torch.ones(2, 40, dtype=torch.bool)
    far[1, 17:24] = False
    assert torch.equal(out[far], clean[far])
    torch.testing.assert_close(out, reference.conv_gelu_conv(*inputs).float(), equal_nan=True)


def test_the_gradient_in_slabs_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SLAB_BYTES", 2 * 2 * 30 * 7 * 4)
    monkeypatch.setattr(kernels, "_GROUP_ROWS", 16)
    for batch in (1, 5, 6):
        compare(make(batch, 30, first_taps=3, second_taps=5, dtype=torch.float32), "triton")


def test_no_tensor_holds_all_hidden_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SLAB_BYTES", 2 * 2 * 10 * 50 * 4)
    made: list[int] = []
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **o: made.append((r := real(t, *a, **o)).numel()) or r)
    inputs = [t.requires_grad_() for t in make(8, 10, 5, 50, 4, 3, 3, torch.float32)]
    ops.conv_gelu_conv(*inputs, backend="triton").sum().backward()
    assert made
    assert max(made) < 8 * 10 * 50


def test_nothing_is_written_outside_the_output() -> None:
    inputs = make(3, 21, second_taps=3, dtype=torch.float32)
    arena = torch.full((3 * 21 * 4 + 64,), math.nan)
    out = arena[32:-32].view(3, 21, 4)
    ops.conv_gelu_conv(*inputs, out=out, backend="triton")
    assert not out.isnan().any()
    assert arena[:32].isnan().all()
    assert arena[-32:].isnan().all()


def test_every_configuration_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    for block_m, block_n, block_k, block_h in ((16, 16, 16, 16), (64, 16, 32, 64), (128, 64, 16, 32)):
        entry = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 1}
        entries: dict[str, Any] = {key: {"4": entry} for key in ("hidden", "inputs", "weights")}
        entries["forward"] = {"4": {**entry, "BLOCK_H": block_h}}
        monkeypatch.setitem(tuned._listed("conv_gelu_conv"), 80, entries)
        compare(make(2, 70, 40, 50, 49, 3, 7, torch.float32), "triton")
