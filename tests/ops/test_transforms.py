"""Functorch's transforms, forward mode and compilation, for every op and for the reference as a backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.calls import NETWORK_OPS, Call, gradient_of, make_call, same
from torch import Tensor
from torch.autograd import forward_ad

from modafill.ops import backends

DIFFERENTIABLE = [name for name in backends.REGISTERED if make_call(name).leaves]

every_op = pytest.mark.parametrize("name", backends.REGISTERED)
both_backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


def of_one(call: Call, argument: str) -> Callable[[Tensor], Tensor]:
    """The call as a function of one of its tensors."""
    return lambda t: call(**{argument: t})[0]


def three(argument: str, tensor: Tensor) -> Tensor:
    """Three tensors of an argument, all valid."""
    if argument in ("step", "mode", "key_lengths", "prev_step"):
        return torch.stack([tensor, tensor.roll(1) if argument != "prev_step" else tensor // 2, tensor.clone()])
    if argument == "available":
        return torch.stack([tensor, ~tensor, tensor.T.reshape(tensor.shape)])
    return torch.stack([tensor, tensor + 1, tensor * 2])


@every_op
@both_backends
def test_vmap_is_a_loop(name: str, backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    call = make_call(name).on(backend)
    if name == "ddim_step":  # any step of the schedule is later than 0
        call.tensors["prev_step"].zero_()
    for argument, tensor in call.tensors.items():
        batch, function = three(argument, tensor), of_one(call, argument)
        expected = torch.stack([function(t) for t in batch])
        assert torch.equal(torch.vmap(function)(batch), expected), argument
        nested = torch.vmap(torch.vmap(function))(batch[:, None])
        assert torch.equal(nested[:, 0], expected), argument
        if tensor.ndim and argument != "table":
            assert torch.equal(torch.vmap(function, in_dims=-1)(batch.movedim(0, -1)), expected), argument
    assert "performance drop" not in capfd.readouterr().err, "torch's fallback, which says so"


def test_vmap_over_several_tensors_and_results() -> None:
    call = make_call("add_noise")
    x, row_id = three("x", call.tensors["x"]), three("row_id", call.tensors["row_id"])
    found = torch.vmap(lambda x, row_id: call(x=x, row_id=row_id), out_dims=1)(x, row_id)
    expected = [call(x=a, row_id=b) for a, b in zip(x, row_id, strict=True)]
    for which, ours in enumerate(found):
        assert torch.equal(ours, torch.stack([results[which] for results in expected], 1))


def test_vmap_over_nothing_is_refused() -> None:
    call = make_call("ddim_step")
    with pytest.raises(ValueError, match=r"^vmap: got a dimension of size 0"):
        torch.vmap(of_one(call, "x"))(torch.empty(0, 4, 3, 5))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@both_backends
def test_gradients_under_vmap(name: str, backend: str) -> None:
    """Of each sample, and of a mapped function."""
    call = make_call(name).on(backend)
    argument = call.leaves[-1]
    function, batch = of_one(call, argument), three(argument, call.tensors[argument])

    def loss(t: Tensor) -> Tensor:
        return function(t).square().sum()

    leaf = batch.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(t) for t in leaf), leaf)
    for found in (
        torch.vmap(torch.func.grad(loss))(batch),
        torch.func.grad(lambda t: torch.vmap(loss)(t).sum())(batch),
        torch.autograd.grad(torch.vmap(loss)(leaf).sum(), leaf)[0],
    ):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.grad(loss)(batch[0]), expected[0])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_jacobians(name: str) -> None:
    call = make_call(name)
    function, x = of_one(call, call.leaves[-1]), call.tensors[call.leaves[-1]]
    expected = torch.autograd.functional.jacobian(function, x)
    torch.testing.assert_close(torch.func.jacrev(function)(x), expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@both_backends
def test_forward_mode_is_refused_by_name(name: str, backend: str) -> None:
    call = make_call(name).on(backend)
    for argument in call.leaves:
        function, x = of_one(call, argument), call.tensors[argument]
        with pytest.raises(NotImplementedError, match=rf"^{name}: it has no forward-mode derivative .* reverse mode"):
            torch.func.jvp(function, (x,), (x,))
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=rf"^{name}: it has no forward-mode derivative"),
        ):
            function(forward_ad.make_dual(x, x))


@every_op
def test_forward_mode_of_something_else_goes_through(name: str) -> None:
    call = make_call(name)
    constant = call()[0]
    value, tangent = torch.func.jvp(lambda t: t * call()[0], (torch.tensor(2.0),), (torch.tensor(1.0),))
    assert torch.equal(value, 2 * constant)
    assert torch.equal(tangent, constant)


@every_op
@both_backends
def test_compiles_whole(name: str, backend: str) -> None:
    torch._dynamo.reset()
    call = make_call(name).on(backend)
    assert same(call.results(torch.compile(call.__call__, fullgraph=True, backend="aot_eager")), call.results())


@pytest.mark.parametrize("name", NETWORK_OPS)
def test_vmap_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    call = make_call(name)
    argument = call.leaves[0]
    function, batch = of_one(call, argument), three(argument, call.tensors[argument])
    compiled = torch.compile(torch.vmap(function), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(batch), torch.vmap(function)(batch))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@both_backends
def test_the_dispatcher_makes_the_same_gradients(name: str, backend: str) -> None:
    """A profiler and ``create_graph`` take the registered ops in place of the direct path."""
    call = make_call(name).on(backend)
    expected = call.results()
    with torch.autograd.profiler.profile() as profile:
        assert same(call.results(), expected)
    assert any(event.key == f"modafill::{name}" for event in profile.key_averages())
    leaves = [call.tensors[leaf].clone().requires_grad_() for leaf in call.leaves]
    out = call(**dict(zip(call.leaves, leaves, strict=True)))[0]
    assert same(list(torch.autograd.grad(out, leaves, gradient_of(out), create_graph=True)), expected[-len(leaves) :])
