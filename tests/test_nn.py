"""The modules beside PyTorch's own, with the same state dicts."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune

from modafill import ops
from modafill.nn import ConvGeluConv, PromptAttention
from modafill.ops import backends


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernels", [(1, 1), (3, 5)])
def test_conv_gelu_conv(kernels: tuple[int, int], bias: bool, approximate: str) -> None:
    torch.manual_seed(0)
    a, b = kernels
    theirs = nn.Sequential(
        nn.Conv1d(6, 10, a, padding=a // 2, bias=bias),
        nn.GELU(approximate),
        nn.Conv1d(10, 4, b, padding=b // 2, bias=bias),
    )
    ours = ConvGeluConv(6, 10, 4, a, b, bias=bias, approximate=approximate)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 9, 6)
    found, expected = ours(x), theirs(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 9, 0, 3.0, "3", (3,), True])
def test_kernels_that_do_not_fit(size: object) -> None:
    whole = type(size) is int
    expected = f"got {size}, expected an odd number in 1…7$" if whole else f"got {backends.describe(size)}, expected an"
    for name, sizes in (("kernel_size", (size,)), ("second_kernel_size", (3, size))):
        with pytest.raises(ValueError if whole else TypeError, match=f"^{name}: {expected}"):
            ConvGeluConv(2, 2, 2, *sizes)


@pytest.mark.parametrize("width", [0, -1, 2.0, "2", None, True])
@pytest.mark.parametrize("name", ["in_channels", "hidden_channels", "out_channels"])
def test_widths_that_do_not_fit(name: str, width: object) -> None:
    widths = {"in_channels": 2, "hidden_channels": 2, "out_channels": 2, name: width}
    if type(width) is int:
        error, expected = ValueError, f"got {width}, expected at least 1"
    else:
        error, expected = TypeError, f"got {backends.describe(width)}, expected an integer"
    with pytest.raises(error, match=f"^{name}: {expected}$"):
        ConvGeluConv(**widths)


def test_layers_that_change() -> None:
    ours, other = ConvGeluConv(2, 2, 2), torch.nn.ReLU()
    changes = (
        lambda: ours.append(other),
        lambda: ours.insert(0, other),
        lambda: ours.extend([other]),
        lambda: ours.pop(0),
        lambda: ours.__setitem__(1, other),
        lambda: ours.__delitem__(1),
        lambda: ours.__iadd__(ours),
        lambda: ours * 2,
        lambda: ours + ours,
        lambda: setattr(ours, "0", other),
        lambda: ours.add_module("1", other),
        lambda: ours.register_module("2", other),
    )
    for change in changes:
        with pytest.raises(TypeError, match=r"^ConvGeluConv: got a change of its layers, expected none"):
            change()
    assert len(ours) == 3


def test_weights_that_hooks_make_are_refused_and_parametrized_ones_are_not() -> None:
    x = torch.randn(2, 5, 2)
    ours = ConvGeluConv(2, 2, 2)
    prune.random_unstructured(ours[2], "weight", amount=1)
    with pytest.raises(RuntimeError, match=r"^ConvGeluConv: got forward pre-hooks on a layer, expected none"):
        ours(x)
    ours = ConvGeluConv(2, 2, 2)
    torch.nn.utils.parametrizations.weight_norm(ours[0])
    before = ours(x)
    with torch.no_grad():
        ours[0].parametrizations.weight.original0.mul_(5.0)
    convolved = torch.nn.functional.conv1d(x.mT, ours[0].weight, ours[0].bias, padding=1)
    expected = ours[2](torch.nn.functional.gelu(convolved)).mT
    torch.testing.assert_close(ours(x), expected)
    assert not torch.equal(ours(x), before)


def test_a_gelu_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"^approximate: got 'quick', expected 'none' or 'tanh'$"):
        ConvGeluConv(2, 2, 2, approximate="quick")


def test_convolutions_take_whole_numbers_of_numpy() -> None:
    assert ConvGeluConv(*np.array([6, 10, 4, 3]))(torch.randn(2, 5, 6)).shape == (2, 5, 4)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), ("meta", torch.bfloat16)])
def test_parameters_are_made_where_and_as_asked(device: str, dtype: torch.dtype) -> None:
    modules = [
        ConvGeluConv(8, 6, 4, device=device, dtype=dtype),
        PromptAttention(24, 3, n_modes=2, max_query_length=5, max_key_length=7, device=device, dtype=dtype),
    ]
    for module, parameters in zip(modules, (4, 5), strict=True):
        found = [(p.device.type, p.dtype) for p in module.parameters()]
        assert found == [(device, dtype)] * parameters


X = torch.zeros(4, 20, 12)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X.mT, ValueError, "x: got [4, 12, 20], expected [B, L, 12]; nn.Conv1d's [B, C, L] goes in as x.mT"),
        (X[..., :5], ValueError, "x: got [4, 20, 5], expected [B, L, 12]"),
        (X[0], ValueError, "x: got [20, 12], expected [B, L, 12]"),
        (X.double(), ValueError, "x: got float64 [4, 20, 12] on cpu, expected float32 on cpu, as the weights"),
        (X.long(), ValueError, "x: got int64 [4, 20, 12] on cpu, expected float32 on cpu, as the weights"),
        (X.to("meta"), ValueError, "x: got float32 [4, 20, 12] on meta, expected float32 on cpu, as the weights"),
        (X.numpy(), TypeError, "x: got ndarray, expected a tensor"),
    ],
)
def test_what_the_convolutions_do_not_read(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ConvGeluConv(12, 8, 4)(x)


def test_autocast_casts_nothing_on_meta() -> None:
    module, x = ConvGeluConv(12, 8, 4, device="meta"), X.to("meta", torch.bfloat16)
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"^x: got bfloat16 .* expected float32 on meta"):
        module(x)


def test_hooks_on_the_convolutions_are_not_called() -> None:
    module = ConvGeluConv(12, 8, 4)
    called = []
    for inner in module:
        inner.register_forward_hook(lambda *_: called.append("inner"))
    module.register_forward_hook(lambda *_: called.append("outer"))
    module(X)
    assert called == ["outer"]


def pair(bias: bool = True, **options: object) -> tuple[nn.MultiheadAttention, PromptAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, bias=bias, batch_first=True).eval()
    ours = PromptAttention(24, 3, bias=bias, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, n, 24, generator=generator) for n in (5, 7, 7))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [None, "float", "bool"])
def test_as_multihead_attention(bias: bool, mask: str | None) -> None:
    theirs, ours = pair(bias)
    given = {"float": torch.randn(5, 7), "bool": torch.ones(5, 7, dtype=torch.bool).triu(4), None: None}[mask]
    padding = PADDING
    # Both masks of one kind, as PyTorch wants them.
    wanted = padding if mask == "bool" else torch.zeros(2, 7).masked_fill(padding, -torch.inf)
    expected = theirs(*inputs(), key_padding_mask=wanted, attn_mask=given, need_weights=False)[0]
    found, weights = ours(*inputs(), padding, False, given)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    again = ours(*inputs(), attn_mask=given, key_lengths=torch.tensor([7, 4]))[0]
    assert torch.equal(again, found)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


def encoder_layers(**options: object) -> tuple[nn.TransformerEncoderLayer, nn.TransformerEncoderLayer]:
    """PyTorch's layer and one with our attention, of the same weights."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True, **options)
    ours = copy.deepcopy(theirs)
    ours.self_attn = PromptAttention(24, 2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING, torch.zeros(2, 7).masked_fill(PADDING, -torch.inf)])
@pytest.mark.parametrize("mask", [None, torch.linspace(-1, 1, 49).reshape(7, 7), CAUSAL, CAUSAL < 0])
def test_in_place_of_an_encoder_layers_attention(mask: Tensor | None, padding: Tensor | None, norm_first: bool) -> None:
    theirs, ours = encoder_layers(norm_first=norm_first)
    if mask is not None and padding is not None and mask.dtype != padding.dtype:
        padding = PADDING if mask.dtype == torch.bool else torch.zeros(2, 7).masked_fill(PADDING, -torch.inf)
    real = ~PADDING if padding is not None else torch.ones_like(PADDING)
    x, causal = inputs()[1], mask is not None and not mask.is_floating_point()
    options = {"src_key_padding_mask": padding, "is_causal": causal}
    # In training PyTorch calls its attention as it calls ours; its fused path would take any float mask for a bool one.
    expected = theirs(x, mask, **options)[real]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, mask, **options)[real], expected, rtol=1e-4, atol=1e-5)
    found = ours.train()(x, mask, **options)[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found, expected = found.square().sum(), expected.square().sum()
    found.backward()
    expected.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_in_an_encoder_and_a_decoder() -> None:
    theirs, ours = encoder_layers()
    x, memory = inputs()[1], inputs()[0]
    both = [nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval() for layer in (ours, theirs)]
    with torch.no_grad():
        # The causal mask is detected, and the layers are called with is_causal=True.
        found, expected = (encoder(x, CAUSAL) for encoder in both)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        theirs = nn.TransformerDecoderLayer(24, 2, 32, batch_first=True).eval()
        ours = copy.deepcopy(theirs)
        ours.self_attn, ours.multihead_attn = PromptAttention(24, 2), PromptAttention(24, 2)
        ours.load_state_dict(theirs.state_dict())
        found, expected = (layer.eval()(x, memory, CAUSAL, tgt_is_causal=True) for layer in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pytorchs_fused_layer_does_not_leave_out_the_prompt_bias() -> None:
    _, ours = encoder_layers()
    ours.self_attn = PromptAttention(24, 2, n_modes=1, max_query_length=7, max_key_length=7, init_std=2.0)
    x = inputs()[1]
    ours.eval()
    expected = ours(x)
    with torch.no_grad():
        assert torch.equal(ours(x), expected)
        ours.self_attn.prompt_bias.zero_()
        assert not torch.allclose(ours(x), expected, atol=1e-2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    theirs, ours = encoder_layers()
    encoder = nn.TransformerEncoder(theirs, 1).eval()
    encoder.layers[0].self_attn = ours.self_attn
    with torch.no_grad(), pytest.raises(ValueError, match=r"query: got a nested tensor, .*enable_nested_tensor=False"):
        encoder(inputs()[1], src_key_padding_mask=PADDING)


def test_a_sample_gets_the_table_of_its_mode() -> None:
    theirs, ours = pair(n_modes=3, max_query_length=6, max_key_length=9)
    assert ours.prompt_bias.shape == (3, 3, 6, 9)
    assert 0.01 < ours.prompt_bias.std() < 0.03
    found = ours(*inputs(), mode=torch.tensor([2, 0]))[0]
    for row, mode in enumerate((2, 0)):
        x = [t[row : row + 1] for t in inputs()]
        table = ours.prompt_bias[mode, :, :5, :7]
        expected = theirs(*x, attn_mask=table, need_weights=False)[0]
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert ours.prompt_bias.grad[[0, 2], :, :5, :7].abs().sum() > 0
    assert not ours.prompt_bias.grad[1].any()
    assert not ours.prompt_bias.grad[:, :, 5:].any()


def test_one_table_for_all_heads() -> None:
    _, ours = pair(n_modes=2, max_query_length=5, max_key_length=7, shared_heads=True)
    assert ours.prompt_bias.shape == (2, 1, 5, 7)
    assert ours(*inputs(), mode=torch.tensor([1, 0]))[0].shape == (2, 5, 24)


def test_state_dicts_of_its_own_are_strict() -> None:
    _, ours = pair(n_modes=2, max_query_length=5, max_key_length=7)
    other = PromptAttention(24, 3, n_modes=2, max_query_length=5, max_key_length=7)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.prompt_bias, ours.prompt_bias)
    with pytest.raises(RuntimeError, match="prompt_bias"):
        PromptAttention(24, 3, n_modes=2, max_query_length=4, max_key_length=7).load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match="out_proj"):
        other.load_state_dict({"in_proj_weight": ours.in_proj_weight, "in_proj_bias": ours.in_proj_bias})


def test_only_a_state_dict_of_multihead_attention_may_lack_the_prompts() -> None:
    options = {"n_modes": 2, "max_query_length": 5, "max_key_length": 7}
    theirs, ours = pair(**options)
    initial = ours.prompt_bias.detach().clone()
    layers = [nn.Sequential(m) for m in (theirs, ours)]
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(ours.prompt_bias, initial)
    assert torch.equal(ours.in_proj_weight, theirs.in_proj_weight)
    # PyTorch's notes on a state dict say whose it is; without them it could be our own that lost its prompts.
    bare = dict(theirs.state_dict())
    lost = ours.state_dict()
    del lost["prompt_bias"]
    renamed = {name.replace("prompt_bias", "prompts"): value for name, value in ours.state_dict().items()}
    for given in (bare, lost, renamed, pair()[1].state_dict()):
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "prompt_bias"'):
            ours.load_state_dict(given)
    assert ours.load_state_dict(bare, strict=False).missing_keys == ["prompt_bias"]
    assert torch.equal(ours.prompt_bias, initial)


def test_dropout_in_training_alone_and_by_torchs_seed() -> None:
    ours = PromptAttention(24, 3, dropout=0.5)
    torch.manual_seed(3)
    first, second = (ours(*inputs())[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ours(*inputs())[0], first)
    assert not torch.equal(first, second)
    ours.eval()
    assert torch.equal(ours(*inputs())[0], ours(*inputs())[0])


def test_dropout_by_row_is_the_same_in_any_batch() -> None:
    ours = PromptAttention(24, 3, dropout=0.5)
    rows = torch.tensor([70, 4])
    whole = ours(*inputs(), seed=9, row_id=rows)[0]
    for row in range(2):
        part = ours(*(x[row : row + 1] for x in inputs()), seed=9, row_id=rows[row : row + 1])[0]
        torch.testing.assert_close(part, whole[row : row + 1])
    assert not torch.equal(ours(*inputs(), seed=9)[0], whole)


class Network(nn.Module):
    """Both modules, for 24 channels, two modes and lengths to 7."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = PromptAttention(24, 3, dropout, n_modes=2, max_query_length=7, max_key_length=7)
        self.encoder = ConvGeluConv(24, 8, 24)

    def forward(self, x: Tensor, mode: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x + self.attention(x, x, x, padding, mode=mode)[0])


def network_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return inputs()[1], torch.tensor([1, 0]), PADDING


def gradients(network: nn.Module, *args: Tensor) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    grads = torch.autograd.grad(network(*args).float().square().mean(), list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_parameters_stay_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = Network()
    expected, exact = network(*network_inputs()), gradients(network, *network_inputs())
    with torch.autocast("cpu", dtype=dtype):
        found = network(*network_inputs())
        of_modules = [
            module(*inputs(), need_weights=False)[0]
            for module in (PromptAttention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True))
        ]
        grads = gradients(network, *network_inputs())
    assert [found.dtype, *(x.dtype for x in of_modules)] == [dtype] * 3
    assert (found - expected).norm() < 0.02 * expected.norm()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - exact[name]).norm() < 0.05 * exact[name].norm() + 1e-4, name


def test_under_autocast_inputs_may_have_any_dtype_that_it_casts() -> None:
    theirs, attend = pair()
    convolve = ConvGeluConv(24, 8, 24)
    x = inputs()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = theirs(x, x, x, need_weights=False)[0]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = x.to(dtype)
            torch.testing.assert_close(attend(given, given, given)[0], expected, rtol=0.05, atol=0.02)
            torch.testing.assert_close(convolve(given), convolve(x), rtol=0.05, atol=0.02)
        # Each layer after the first one reads bfloat16 and has weights of float32.
        compiled = torch.compile(lambda x: convolve(attend(*[convolve(x)] * 3)[0]), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), convolve(attend(*[convolve(x)] * 3)[0]), rtol=0.05, atol=0.02)
        for wrong in (x.double(), x.long()):
            with pytest.raises(ValueError, match=r"^query: got \w+64 .* expected float32 on cpu, as the"):
                attend(wrong, wrong, wrong)
            with pytest.raises(ValueError, match=r"^x: got \w+64 .* expected float32 on cpu, as the"):
                convolve(wrong)
        for module in (lambda x: attend(x, x, x), convolve):
            with pytest.raises(ValueError, match=r": got float32 .* on meta, expected float32 on cpu, as the"):
                module(x.to("meta"))
        exact = attend.double()(*(t.double() for t in inputs()))[0]
        assert exact.dtype == torch.float64


def test_compiles_whole() -> None:
    torch.manual_seed(0)
    network = Network()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*network_inputs()), network(*network_inputs()))
    expected = gradients(network, *network_inputs())
    for name, grad in gradients(compiled, *network_inputs()).items():
        torch.testing.assert_close(grad, expected[name.removeprefix("_orig_mod.")])
    x, mode, padding = network_inputs()
    with pytest.raises(RuntimeError, match="padding before a key"):
        compiled(x, mode, padding.flip(1))
    dropped = torch.compile(Network(dropout=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(dropped(*network_inputs()), dropped(*network_inputs()))


def test_exports_for_any_batch() -> None:
    network = Network().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, network_inputs(), dynamic_shapes=({0: batch},) * 3)
    five = [torch.cat([t, t, t])[:5] for t in network_inputs()]
    torch.testing.assert_close(program.module()(*five), network(*five))


@pytest.mark.parametrize("trace", ["export", "make_fx", "jit"])
def test_what_is_traced_on_a_short_sample_reads_long_ones(trace: str) -> None:
    network = ConvGeluConv(6, 10, 6, 5, 3).eval().requires_grad_(False)
    short = torch.randn(40, 2, 6)
    if trace == "export":
        length = torch.export.Dim("length", min=1, max=500)
        traced = torch.export.export(network, (short,), dynamic_shapes=({1: length},)).module()
    elif trace == "make_fx":
        traced = make_fx(network)(short)
    else:
        traced = torch.jit.trace(network, short, check_trace=False)
    for steps in (1, 2, 3, 20):
        x = torch.randn(40, steps, 6)
        torch.testing.assert_close(traced(x), network(x))


def test_copies_and_files_hold_the_same_module(tmp_path: Path) -> None:
    network = Network(dropout=0.1).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    loaded = Network(dropout=0.1).eval()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    expected = network(*network_inputs())
    for other in (loaded, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(*network_inputs()), expected)
        assert other.attention.dropout == 0.1
        with torch.no_grad():
            other.attention.prompt_bias.add_(1.0)
            other.encoder[0].weight.add_(1.0)
    assert torch.equal(network(*network_inputs()), expected)
    on_meta = copy.deepcopy(network).to("meta")
    assert on_meta(*(t.to("meta") for t in network_inputs()[:2]), None).shape == expected.shape


def test_mistakes() -> None:
    _, ours = pair(n_modes=2, max_query_length=5, max_key_length=6)
    q, k, v = inputs()
    mode = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="query, key: got lengths 5 and 7, expected at most 5 and 6"):
        ours(q, k, v, mode=mode)
    with pytest.raises(ValueError, match="need_weights: got True, expected False"):
        ours(q, k, v, need_weights=True)
    _, ours = pair()
    with pytest.raises(ValueError, match="is_causal: got True without attn_mask"):
        ours(q, k, v, is_causal=True)
    with pytest.raises(ValueError, match="beside key_lengths"):
        ours(q, k, v, torch.zeros(2, 7, dtype=torch.bool), key_lengths=torch.tensor([7, 7]))
    with pytest.raises(ValueError, match="num_heads: got 5, expected a divisor of embed_dim, 24"):
        PromptAttention(24, 5)
    for embed_dim, heads, width in ((30, 5, 6), (264, 2, 132), (6, 3, 2)):
        with pytest.raises(ValueError, match=f"embed_dim, num_heads: got heads of width {width}, expected a multiple"):
            PromptAttention(embed_dim, heads)
    for dropout in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"dropout: got {dropout}, expected a value in \[0, 1\)"):
            PromptAttention(24, 3, dropout=dropout)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"embed_dim": 24.0}, TypeError, "embed_dim: got float 24.0, expected an integer"),
        ({"embed_dim": 0}, ValueError, "embed_dim: got 0, expected at least 1"),
        ({"num_heads": 3.0}, TypeError, "num_heads: got float 3.0, expected an integer"),
        ({"num_heads": True}, TypeError, "num_heads: got bool True, expected an integer"),
        ({"num_heads": 0}, ValueError, "num_heads: got 0, expected at least 1"),
        ({"dropout": None}, TypeError, "dropout: got NoneType None, expected a number"),
        ({"dropout": "0.1"}, TypeError, "dropout: got str '0.1', expected a number"),
        ({"n_modes": -1}, ValueError, "n_modes: got -1, expected at least 0"),
        ({"n_modes": 1.0}, TypeError, "n_modes: got float 1.0, expected an integer"),
        ({"n_modes": None}, TypeError, "n_modes: got NoneType None, expected an integer"),
        ({"max_query_length": 0}, ValueError, "max_query_length: got 0, expected 1…2048"),
        ({"max_key_length": 2049}, ValueError, "max_key_length: got 2049, expected 1…2048"),
        ({"max_key_length": 3.0}, TypeError, "max_key_length: got float 3.0, expected an integer"),
        ({"n_modes": 0}, ValueError, "max_query_length: got 5 without n_modes, expected 0: no table has a size"),
        ({"init_std": math.nan}, ValueError, "init_std: got nan, expected a finite value, 0 or more"),
        ({"init_std": -1}, ValueError, "init_std: got -1.0, expected a finite value, 0 or more"),
        ({"init_std": "a"}, TypeError, "init_std: got str 'a', expected a number"),
    ],
)
def test_what_attention_is_not_made_with(given: dict[str, object], error: type[Exception], message: str) -> None:
    asked = {"embed_dim": 24, "num_heads": 3, "n_modes": 1, "max_query_length": 5, "max_key_length": 7, **given}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        PromptAttention(**asked)


def test_tables_on_meta_are_missing_after_other_weights() -> None:
    theirs, _ = pair()
    ours = PromptAttention(24, 3, n_modes=2, max_query_length=5, max_key_length=7, device="meta")
    with pytest.raises(RuntimeError, match=r'Missing key.*"prompt_bias"'):
        ours.load_state_dict(theirs.state_dict(), assign=True)


Q, K, V = torch.zeros(2, 5, 24), torch.zeros(2, 7, 24), torch.zeros(2, 7, 24)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((Q[..., :20], K, V), ValueError, "query: got [2, 5, 20], expected [B, L, 24]"),
        ((Q, K[..., :20], V), ValueError, "key: got [2, 7, 20], expected [B, L, 24]"),
        ((Q, K, V[..., :20]), ValueError, "value: got [2, 7, 20], expected [B, L, 24]"),
        ((Q[0], K[0], V[0]), ValueError, "query: got [5, 24], expected [B, L, 24]"),
        ((Q, K[0], V), ValueError, "key: got [7, 24], expected [B, L, 24]"),
        ((Q, K[:1], V[:1]), ValueError, "key: got [1, 7, 24], expected [2, Lk, 24], as query"),
        ((Q, K, V[:, :6]), ValueError, "value: got [2, 6, 24], expected [2, 7, 24], as key"),
        ((Q, K, V[:1]), ValueError, "value: got [1, 7, 24], expected [2, 7, 24], as key"),
        ((Q, K, Q), ValueError, "value: got [2, 5, 24], expected [2, 7, 24], as key"),
        (
            (Q.double(), K, V),
            ValueError,
            "query: got float64 [2, 5, 24] on cpu, expected float32 on cpu, as the weights",
        ),
        (
            (Q, K.bfloat16(), V),
            ValueError,
            "key: got bfloat16 [2, 7, 24] on cpu, expected float32 on cpu, as the weights",
        ),
        (
            (Q, K, V.to("meta")),
            ValueError,
            "value: got float32 [2, 7, 24] on meta, expected float32 on cpu, as the weights",
        ),
        ((Q.numpy(), K, V), TypeError, "query: got ndarray, expected a tensor"),
        ((Q, K, V.tolist()), TypeError, "value: got list, expected a tensor"),
        ((Q, None, None), TypeError, "key: got NoneType None, expected a tensor"),
        ((None, None, None), TypeError, "query: got NoneType None, expected a tensor"),
        (
            (Q, *[torch.zeros(2, 2049, 24)] * 2),
            ValueError,
            "query, key: got lengths 5 and 2049, expected at most 2048",
        ),
    ],
)
def test_what_attention_does_not_read(given: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        PromptAttention(24, 3)(*given)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(7, 5), ValueError, "got float32 [7, 5] on cpu"),
        (torch.zeros(2, 5, 7), ValueError, "got float32 [2, 5, 7] on cpu"),
        (torch.zeros(2, 3, 5, 7), ValueError, "got float32 [2, 3, 5, 7] on cpu"),
        # As a number to add, 1 would not hide.
        (torch.ones(5, 7, dtype=torch.uint8), ValueError, "got uint8 [5, 7] on cpu"),
        (torch.zeros(5, 7, device="meta"), ValueError, "got float32 [5, 7] on meta"),
        ([[0.0] * 7] * 5, TypeError, "got list"),
    ],
)
def test_masks_that_do_not_fit(mask: object, error: type[Exception], message: str) -> None:
    expected = "bool or floating-point [5, 7] or [6, 5, 7] on cpu" if error is ValueError else "a tensor"
    with pytest.raises(error, match=f"^attn_mask: {re.escape(f'{message}, expected {expected}')}$"):
        PromptAttention(24, 3)(Q, K, V, attn_mask=mask)


def test_a_mask_for_each_head_is_refused_beside_a_prompt_bias_and_a_mode() -> None:
    mask = torch.zeros(6, 5, 7)
    prompted = PromptAttention(24, 3, n_modes=1, max_query_length=5, max_key_length=7)
    with pytest.raises(ValueError, match=r"^attn_mask: got float32 \[6, 5, 7\] .* floating-point \[5, 7\] on cpu$"):
        prompted(Q, K, V, attn_mask=mask)
    with pytest.raises(ValueError, match=r"^mode: got int64 \[2\] on cpu, expected None with attn_mask \[B·H"):
        PromptAttention(24, 3)(Q, K, V, attn_mask=mask, mode=torch.tensor([0, 1]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", ["float", "bool"])
def test_a_mask_for_each_sample_and_head(kind: str, padding: bool, causal: bool) -> None:
    theirs, ours = pair()
    mask = torch.randn(6, 5, 7)
    if kind == "bool":
        mask = mask > 0.5
        mask[:, :, 0] = False
    else:
        mask.requires_grad_()
    # MulT's mask: query i reads keys 0…i + |Lk − Lq|.
    later = torch.ones(5, 7, dtype=torch.bool).triu(3) if causal else torch.zeros(5, 7, dtype=torch.bool)
    whole = mask | later if kind == "bool" else mask.masked_fill(later, -torch.inf)
    hidden = PADDING if kind == "bool" else torch.zeros(2, 7).masked_fill(PADDING, -torch.inf)
    wanted = {"key_padding_mask": hidden if padding else None, "attn_mask": whole}
    expected = theirs(*inputs(), need_weights=False, **wanted)[0]
    given = {"key_padding_mask": PADDING if padding else None, "attn_mask": mask, "causal": causal}
    found = ours(*inputs(), **given)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    parameters = [[*module.parameters(), *([mask] if mask.requires_grad else [])] for module in (ours, theirs)]
    grads, exact = (
        torch.autograd.grad(out.square().sum(), p) for out, p in zip((found, expected), parameters, strict=True)
    )
    for mine, other in zip(grads, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_a_mask_for_each_head_goes_where_one_for_all_goes() -> None:
    theirs, ours = pair()
    one = torch.linspace(-1, 1, 35).reshape(5, 7)
    each = one.expand(6, 5, 7)
    given = {"attn_mask": each, "is_causal": True, "key_lengths": torch.tensor([7, 4])}
    found = ours(*inputs(), **given)[0]
    torch.testing.assert_close(found, ours(*inputs(), **{**given, "attn_mask": one})[0])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*inputs(), **given)[0], found)
    # Mapped over three batches that differ.
    batches = [torch.stack([x, x + 1, x - 1]) for x in inputs()]
    mapped = torch.vmap(lambda *x: ours(*x, attn_mask=each)[0])(*batches)
    expected = torch.stack([theirs(*x, attn_mask=each, need_weights=False)[0] for x in zip(*batches, strict=True)])
    torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-5)
    nothing = [x[:0] for x in inputs()]
    assert ours(*nothing, attn_mask=each[:0])[0].shape == (0, 5, 24)
    dropping = PromptAttention(24, 3, dropout=0.5)
    first, second = (dropping(*inputs(), attn_mask=mask, seed=9)[0] for mask in (one, each))
    torch.testing.assert_close(first, second)
    exported = torch.export.export(ours, inputs(), {"attn_mask": each}).module()
    torch.testing.assert_close(exported(*inputs(), attn_mask=each)[0], ours(*inputs(), attn_mask=each)[0])


def test_batch_first_is_all_there_is() -> None:
    theirs = nn.MultiheadAttention(24, 3)
    ours = PromptAttention(24, 3, batch_first=True)
    # Nothing in it tells the layout.
    ours.load_state_dict(theirs.state_dict())
    expected = theirs(*(x.transpose(0, 1) for x in inputs()), need_weights=False)[0].transpose(0, 1)
    torch.testing.assert_close(ours(*inputs())[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"^batch_first: got False, expected True"):
        PromptAttention(24, 3, batch_first=False)


def test_what_differs_from_multihead_attention() -> None:
    """As the docstring has it; lengths, layouts and masks have tests of their own."""
    theirs, ours = pair()
    with torch.no_grad():
        ours.out_proj.bias.copy_(torch.arange(24.0))
        theirs.load_state_dict(ours.state_dict())
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[2] = True
    nothing = ours(*inputs(), attn_mask=mask)[0][:, 2]
    torch.testing.assert_close(nothing, ours.out_proj.bias.expand(2, 24))
    torch.testing.assert_close(nothing, theirs(*inputs(), attn_mask=mask, need_weights=False)[0][:, 2])
    assert theirs(*inputs(), attn_mask=mask)[0][:, 2].isnan().all()
    for name in ("kdim", "vdim", "add_bias_kv", "add_zero_attn"):
        with pytest.raises(TypeError, match=name):
            PromptAttention(24, 3, **{name: 24})
    assert not isinstance(ours, nn.MultiheadAttention)
    x = inputs()[1].requires_grad_()
    (grad,) = torch.autograd.grad(ours(x, x, x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="prompt_attention: its gradient has no gradient"):
        grad.sum().backward()
    _, layer = encoder_layers()
    layer.self_attn = PromptAttention(24, 2, n_modes=2, max_query_length=7, max_key_length=7)
    with pytest.raises(ValueError, match=r"mode: got None, expected int64 \[2\]"):
        layer(x)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_traces_no_attention() -> None:
    with pytest.raises(RuntimeError, match="Only tensors, lists, tuples of tensors"):
        torch.jit.trace(PromptAttention(24, 3), inputs())


def test_it_prints_its_sizes() -> None:
    assert "PromptAttention(\n  24, num_heads=3, dropout=0.1\n" in str(PromptAttention(24, 3, 0.1))
    prompted = PromptAttention(24, 3, n_modes=2, max_query_length=5, max_key_length=7)
    assert "24, num_heads=3, dropout=0.0, n_modes=2, max_query_length=5, max_key_length=7\n" in str(prompted)


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        (
            torch.zeros(2, 6, dtype=torch.bool),
            r"got bool \[2, 6\] on cpu, expected bool or floating-point \[2, 7\] on cpu",
        ),
        (torch.zeros(2, 7, device="meta"), r"got float32 \[2, 7\] on meta"),
        (torch.zeros(7, dtype=torch.bool), r"got bool \[7\] on cpu"),
        (torch.zeros(2, 7, dtype=torch.int64), r"got int64 \[2, 7\] on cpu"),
        (torch.tensor([[True] + [False] * 6] * 2), "got padding before a key"),
        (torch.full((2, 7), 0.5), "a number other than 0 and -inf"),
        (torch.full((2, 7), torch.nan), "a number other than 0 and -inf"),
    ],
)
def test_padding_that_does_not_fit(padding: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"key_padding_mask: .*{message}"):
        PromptAttention(24, 3)(*inputs(), padding)


def test_padding_in_a_list_is_named() -> None:
    with pytest.raises(TypeError, match=r"^key_padding_mask: got list, expected a tensor$"):
        PromptAttention(24, 3)(*inputs(), PADDING.tolist())


def test_padding_compiles_whole() -> None:
    _, ours = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    given = torch.zeros(2, 7).masked_fill(PADDING, -torch.inf)
    torch.testing.assert_close(compiled(*inputs(), given)[0], ours(*inputs(), PADDING)[0])
    with pytest.raises(RuntimeError, match="padding before a key"):
        compiled(*inputs(), given.flip(1))


def test_padding_outside_the_cpu_is_not_read_back() -> None:
    """On meta nothing can be read."""
    x = torch.empty(2, 7, 24, device="meta")
    for padding in (PADDING, torch.zeros(2, 7)):
        assert PromptAttention(24, 3).to("meta")(x, x, x, padding.to("meta"))[0].shape == x.shape


def test_arguments_are_those_of_multihead_attention() -> None:
    ours, theirs = (
        [p.name for p in inspect.signature(m.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for m in (PromptAttention, nn.MultiheadAttention)
    )
    assert ours == theirs
    theirs, ours = pair()
    mask = torch.ones(5, 7, dtype=torch.bool).triu(1)
    found, expected = (m(*inputs(), None, False, mask, False, True)[0] for m in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_they_run_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("prompt_attention", "conv_gelu_conv"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=real, **o: called.append(n) or f(*a, **o))
    PromptAttention(24, 3)(*inputs())
    ConvGeluConv(24, 8, 24)(inputs()[0])
    assert called == ["prompt_attention", "conv_gelu_conv"]
