"""What tensors may be given to an op: any strides, none at all on ``meta``, and memory that holds anything before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.calls import gradient_of, make_call, same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modafill.ops import backends

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda t: torch.stack([t, torch.full_like(t, 77)], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda t: torch.cat([torch.full_like(t[..., :1], 77), t], -1)[..., 1:],
    "negated": lambda t: torch.complex(t, -t).conj().imag if t.is_floating_point() else t,
}


every_op = pytest.mark.parametrize("name", backends.REGISTERED)


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_bits(name: str, layout: str) -> None:
    call = make_call(name)
    expected = call.results()
    for argument, tensor in call.tensors.items():
        if tensor.ndim == 0:
            continue
        view = LAYOUTS[layout](tensor)
        assert torch.equal(view, tensor)
        if argument == "table":
            with pytest.raises(ValueError, match=r"^table: .* not contiguous, expected contiguous float32"):
                call(table=view)
        else:
            assert same(call.results(**{argument: view}), expected), argument


@pytest.mark.parametrize("name", [name for name in backends.REGISTERED if make_call(name).leaves])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_the_gradient_give_the_same_bits(name: str, layout: str) -> None:
    call = make_call(name)
    expected = call.results()[-len(call.leaves) :]
    leaves = {leaf: call.tensors[leaf].clone().requires_grad_() for leaf in call.leaves}
    out = call(**leaves)[0]
    assert same(list(torch.autograd.grad(out, list(leaves.values()), LAYOUTS[layout](gradient_of(out)))), expected)


class Seen(TorchDispatchMode):
    """Records the calls of registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "modafill":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@every_op
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_registered_ops_pass_opcheck(name: str, layout: str, backend: str) -> None:
    """Fakes tell the truth about shapes, dtypes and strides, whatever backend runs and whatever strides come in."""
    call = make_call(name).on(backend)
    moved = call.map(lambda t: t if t.ndim == 0 or t is call.tensors.get("table") else LAYOUTS[layout](t))
    with Seen() as seen:
        moved.results()
    assert f"modafill::{name}" in {op.name() for op, _ in seen.calls}
    differentiable = [moved.tensors[leaf].data_ptr() for leaf in call.leaves]
    for op, args in seen.calls:
        leaves = [
            a.detach().requires_grad_("backward" not in op.name() and a.data_ptr() in differentiable)
            if isinstance(a, Tensor)
            else a
            for a in args
        ]
        torch.library.opcheck(op, leaves)


@every_op
@pytest.mark.parametrize("kind", ["tensors", "integers"])
def test_meta_tensors_give_shapes_dtypes_and_strides(name: str, kind: str) -> None:
    """The steps and the seed are tensors or integers."""
    call = make_call(name)
    numbers = {"step": 9, "prev_step": 2, "seed": 5} if kind == "integers" else {}
    numbers = {argument: number for argument, number in numbers.items() if argument in call.tensors}
    on_meta = call.map(lambda t: t.to("meta"))
    found, expected = on_meta.results(**numbers), call.results(**numbers)
    for ours, real in zip([*found, *on_meta(**numbers)], [*expected, *call(**numbers)], strict=True):
        assert ours.is_meta
        assert (ours.shape, ours.dtype, ours.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", [name for name in backends.REGISTERED if name != "add_noise"])
def test_out_on_meta_and_out_of_no_element(name: str) -> None:
    call = make_call(name)
    on_meta = call.map(lambda t: t.to("meta"))
    out = torch.empty_like(on_meta()[0])
    assert on_meta(out=out)[0] is out
    rows = len(call()[0])
    nothing: dict[str, Any] = {argument: t[:0] for argument, t in call.tensors.items() if t.ndim > 0 and len(t) == rows}
    if name == "randn":
        nothing["shape"] = (0, 3)
    out = call(**nothing)[0]
    assert out.numel() == 0
    assert call(**nothing, out=out)[0] is out


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@every_op
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_deterministic_algorithms_change_no_bit(name: str, backend: str, request: pytest.FixtureRequest) -> None:
    """Fresh memory holds NaN there: nothing that was not written is read."""
    call = make_call(name).on(backend)
    expected = call.results()
    request.getfixturevalue("deterministic")
    found = call.results()
    assert same(found, expected)
    assert not any(t.isnan().any() for t in found)
