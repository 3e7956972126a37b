"""Under autocast network ops run in its dtype, as torch's attention and convolutions do; other ops never notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.calls import NETWORK_OPS, STEP_OPS, Call, gradient_of, make_call, same
from torch import Tensor

from modafill import ops
from modafill.ops import backends

LOWER = [torch.bfloat16, torch.float16]

network_ops = pytest.mark.parametrize("name", NETWORK_OPS)


def cast(call: Call, dtype: torch.dtype) -> Call:
    return call.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


@network_ops
@pytest.mark.parametrize("dtype", LOWER)
def test_network_ops_run_in_its_dtype(name: str, dtype: torch.dtype) -> None:
    """As on tensors that the caller cast; gradients are those, in the dtype of the leaves."""
    call = make_call(name)
    leaves = {leaf: call.tensors[leaf].clone().requires_grad_() for leaf in call.leaves}
    with torch.autocast("cpu", dtype=dtype):
        out = call(**leaves)[0]
    grads = torch.autograd.grad(out, list(leaves.values()), gradient_of(out))
    expected = cast(call, dtype).results()
    assert same([out.detach()], expected[:1])
    assert same(list(grads), [g.float() for g in expected[1:]])


@network_ops
@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_torchs_own(name: str, given: torch.dtype, dtype: torch.dtype) -> None:
    call = make_call(name)
    x = torch.randn(1, 2, 4, 8, dtype=given)
    with torch.autocast("cpu", dtype=dtype):
        attention = F.scaled_dot_product_attention(x, x, x).dtype
        convolution = F.conv1d(x[0], x[0]).dtype
        found = cast(call, given)()[0].dtype
    assert found == {"prompt_attention": attention, "conv_gelu_conv": convolution}[name]
    assert found == (given if given == torch.float64 else dtype)


@network_ops
def test_tensors_of_mixed_dtypes_are_brought_together(name: str) -> None:
    call = make_call(name)
    first, second = call.leaves[:2]
    mixed = {second: call.tensors[second].bfloat16()}
    with pytest.raises(ValueError, match=f"^{second}: "):
        call(**mixed)
    with torch.autocast("cpu"):
        assert call(**mixed)[0].dtype == torch.bfloat16
        with pytest.raises(ValueError, match=rf"^{second}: got bfloat16 .* expected float64"):
            call(**{first: call.tensors[first].double()})


@network_ops
def test_only_where_it_is_on_and_for_this_device(name: str) -> None:
    call = make_call(name)
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        assert call()[0].dtype == torch.float32
    torch.set_autocast_enabled("cuda", True)
    try:
        assert call()[0].dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)
    with torch.autocast("cpu"):
        assert call.map(lambda t: t.to("meta"))()[0].dtype == torch.float32


@network_ops
def test_a_backend_that_lacks_its_dtype_is_passed_over_or_refused(name: str) -> None:
    call = make_call(name)
    with torch.autocast("cpu", dtype=torch.float16):
        other = "torch" if name == "conv_gelu_conv" else "reference"
        assert same([call()[0]], [call(backend=other)[0]])
        with pytest.raises(RuntimeError, match="it takes float32, float64, bfloat16, not float16"):
            call(backend="cpu")


@network_ops
def test_out_has_its_dtype(name: str) -> None:
    call = make_call(name)
    plain = call()[0]
    with torch.autocast("cpu"):
        with pytest.raises(ValueError, match=r"^out: got float32 .* expected contiguous bfloat16"):
            call(out=torch.empty_like(plain))
        assert call(out=torch.empty_like(plain, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", STEP_OPS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_other_ops_run_in_the_dtype_of_their_inputs(name: str, backend: str) -> None:
    call = make_call(name).on(backend)
    expected = call.results()
    with torch.autocast("cpu"):
        assert same(call.results(), expected)


@pytest.mark.parametrize("name", backends.REGISTERED)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compiles_whole(name: str, where: str) -> None:
    """With the context within what is compiled, and around it."""
    call = make_call(name)
    torch._dynamo.reset()

    def within(**tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu"):
            return call(**tensors)

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(**tensors: Tensor) -> tuple[Tensor, ...]:
            with torch.autocast("cpu"):
                return function(**tensors)

        return run

    function = within if where == "inside" else call.__call__
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    if where == "outside":
        assert same(call.results(compiled), call.results())
        function, compiled = around(function), around(compiled)
    found, expected = call.results(compiled), call.results(function)
    assert all(a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager)


def test_the_rule_is_part_of_an_exported_program() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, bias: Tensor) -> Tensor:
            with torch.autocast("cpu"):
                return ops.prompt_attention(q, q, q, bias)

    q, bias = torch.randn(2, 2, 3, 8), torch.randn(1, 2, 3, 3)
    program = torch.export.export(Attention(), (q, bias))
    assert same([program.module()(q, bias)], [Attention()(q, bias)])
    assert Attention()(q, bias).dtype == torch.bfloat16
