"""The fused ops as modules, with the parameters and state dicts of PyTorch's own."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from modafill import ops
from modafill.ops import backends
from modafill.ops.conv_gelu_conv import MAX_TAPS
from modafill.ops.prompt_attention import MAX_LENGTH, MAX_WIDTH


class ConvGeluConv(nn.Sequential):
    """Conv1D → GELU → Conv1D on ``[B, L, C]``, on :func:`modafill.ops.conv_gelu_conv`.

    Its state dict is that of ``nn.Sequential(nn.Conv1d, nn.GELU, nn.Conv1d)``, which reads ``[B, C, L]``: what goes in
    there as ``x`` goes in here as ``x.mT``, and the result is the transposed one too. A square ``[B, C, C]`` cannot be
    told from its transpose. A state dict tells neither padding, stride and dilation (here zeros to the same length, 1
    and 1) nor the kind of GELU: one made with ``nn.GELU("tanh")`` needs ``approximate="tanh"``.

    It is an nn.Sequential for its names alone: its layers are fixed and never called, and forward hooks on them not
    either. Weights that are made by pre-hooks (``nn.utils.weight_norm``, ``nn.utils.prune``) are refused; those of
    ``nn.utils.parametrizations`` are not.

    Args:
        in_channels, hidden_channels, out_channels: widths, at least 1.
        kernel_size: of the first convolution, odd, 1…7; same padding.
        second_kernel_size: of the second one; None = ``kernel_size``.
        bias: whether both have one.
        approximate: ``"none"`` (exact GELU) or ``"tanh"``.
        device, dtype: of the parameters; None = torch's defaults.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        second_kernel_size: int | None = None,
        *,
        bias: bool = True,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_channels = backends.integer("in_channels", in_channels, low=1)
        hidden_channels = backends.integer("hidden_channels", hidden_channels, low=1)
        out_channels = backends.integer("out_channels", out_channels, low=1)
        sizes = kernel_size, kernel_size if second_kernel_size is None else second_kernel_size
        for name, size in zip(("kernel_size", "second_kernel_size"), sizes, strict=True):
            if backends.integer(name, size) % 2 == 0 or not 1 <= size <= MAX_TAPS:
                raise ValueError(f"{name}: got {size}, expected an odd number in 1…{MAX_TAPS}")
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate: got {approximate!r}, expected 'none' or 'tanh'")
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        super().__init__(
            nn.Conv1d(in_channels, hidden_channels, sizes[0], padding=sizes[0] // 2, **made),
            nn.GELU(approximate),
            nn.Conv1d(hidden_channels, out_channels, sizes[1], padding=sizes[1] // 2, **made),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            _refuse_change(self)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refused once the three layers are there."""
        if len(self) == 3:
            _refuse_change(self)
        super().add_module(name, module)

    register_module = add_module

    def __getitem__(self, index: Any) -> Any:
        """One of the three layers; a slice is refused."""
        if isinstance(index, slice):
            raise TypeError("ConvGeluConv: got a slice, expected the number of a layer")
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, out_channels]`` of ``x [B, L, in_channels]``, in the weights' dtype unless autocast casts both.

        Raises:
            TypeError: ``x`` is no tensor.
            ValueError: ``x`` has another shape, dtype or device.
            RuntimeError: a layer has forward pre-hooks, which would not run.
        """
        first, gelu, second = cast("tuple[nn.Conv1d, nn.GELU, nn.Conv1d]", tuple(self))
        if first._forward_pre_hooks or second._forward_pre_hooks:
            raise RuntimeError(
                "ConvGeluConv: got forward pre-hooks on a layer, expected none, because its layers are never called;"
                " nn.utils.parametrizations works"
            )
        weights = first.weight, first.bias, second.weight, second.bias
        backends.check_tensor("x", x)
        weight, shape, channels = weights[0], x.shape, first.in_channels
        if len(shape) != 3 or shape[2] != channels:
            hint = "; nn.Conv1d's [B, C, L] goes in as x.mT" if len(shape) == 3 and shape[1] == channels else ""
            raise ValueError(f"x: got {list(shape)}, expected [B, L, {channels}]{hint}")
        if x.dtype != weight.dtype or x.device != weight.device:
            _check_cast("x", x, weight)
        return ops.conv_gelu_conv(x, *weights, approximate=gelu.approximate)


def _refuse_change(self: ConvGeluConv, *args: Any, **kwargs: Any) -> Any:
    raise TypeError("ConvGeluConv: got a change of its layers, expected none: they are fixed")


for _name in (
    *("append", "insert", "extend", "pop", "__setitem__", "__delitem__"),
    *("__add__", "__iadd__", "__mul__", "__rmul__", "__imul__"),
):
    setattr(ConvGeluConv, _name, _refuse_change)


class PromptAttention(nn.Module):
    """Multi-head attention whose logits get a learned bias by missing mode, on :func:`modafill.ops.prompt_attention`.

    In place of ``nn.MultiheadAttention(embed_dim, num_heads, dropout, bias, batch_first=True)``: it has its parameters,
    loads its state dict and takes its arguments, also within PyTorch's transformer layers. What differs:

    - Queries, keys and values are batches ``[B, L, E]``, not nested, of lengths up to 2048. ``dropout`` is less than 1,
      and heads are a multiple of 4 wide, up to 128. There is no ``kdim``, ``vdim``, ``add_bias_kv`` or
      ``add_zero_attn``, and it is no instance of nn.MultiheadAttention.
    - A state dict does not tell the layout: one of ``batch_first=False``, PyTorch's default, loads too, but this module
      reads ``[B, L, E]`` all the same.
    - Attention weights are never made: ``need_weights`` must be False, its default here. ``torch.jit.trace`` fails on
      the None in their place; ``torch.compile`` and ``torch.export`` do not.
    - Padding is on the right, and a float ``key_padding_mask`` holds 0 and −inf alone.
    - An ``attn_mask [B·H, Lq, Lk]`` is refused beside a prompt bias; to ``[Lq, Lk]`` the prompt bias is added.
    - A query with nothing to attend to gives ``out_proj.bias``, as there without weights; with weights it gives NaN.
    - Dropout draws the noise of the ops, which is not PyTorch's.
    - The gradient is that of reverse mode and has no gradient itself.
    - PyTorch's transformer layers pass no ``mode``: in them ``n_modes`` is 0 or 1.

    After a state dict that nn.MultiheadAttention made, the tables of the prompt bias are those that they were: as
    initialised. Any other one has to hold them. PyTorch notes in a state dict what made it, but a file of bare tensors,
    like safetensors, has no notes: load nn.MultiheadAttention's weights from there with ``strict=False``, which names
    ``prompt_bias`` as missing.

    Args:
        embed_dim: width of queries, keys and values.
        num_heads: a divisor of ``embed_dim``; heads must be a multiple of 4 wide, up to 128.
        dropout: of the attention weights, in training, 0 or more and less than 1.
        bias: whether the projections have biases.
        batch_first: True; the attribute is not to be changed.
        device, dtype: of the parameters; None = torch's defaults.
        n_modes: P, how many tables of the prompt bias; 0 for none.
        max_query_length, max_key_length: their size ``[P, H or 1, Lq, Lk]``; shorter sequences use a corner.
        shared_heads: whether all heads share a table.
        init_std: of the tables' normal initialisation. Zeros would do here, but a prompt that multiplies another one
            would then never learn.

    Raises:
        ValueError: an argument is outside its range.
    """

    # PyTorch's transformer layers read both: with the second one False they call the module, where their own fused path
    # for inference would take its weights and leave out the prompt bias.
    batch_first = True
    _qkv_same_embed_dim = False
    # What PyTorch notes in a state dict: another number than nn.MultiheadAttention's.
    _version = 1001

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        n_modes: int = 0,
        max_query_length: int = 0,
        max_key_length: int = 0,
        shared_heads: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        embed_dim = backends.integer("embed_dim", embed_dim, low=1)
        num_heads = backends.integer("num_heads", num_heads, low=1)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of embed_dim, {embed_dim}")
        width = embed_dim // num_heads
        if width % 4 or not 4 <= width <= MAX_WIDTH:
            raise ValueError(
                f"embed_dim, num_heads: got heads of width {width}, expected a multiple of 4 in 4…{MAX_WIDTH}"
            )
        dropout = backends.number("dropout", dropout)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: got {dropout}, expected a value in [0, 1)")
        if not batch_first:
            raise ValueError("batch_first: got False, expected True; nn.MultiheadAttention's [L, B, E] is transposed")
        n_modes = backends.integer("n_modes", n_modes, low=0)
        lengths = {"max_query_length": max_query_length, "max_key_length": max_key_length}
        for name, length in lengths.items():
            if n_modes:
                lengths[name] = backends.integer(name, length, low=1, high=MAX_LENGTH)
            elif length != 0:
                raise ValueError(f"{name}: got {length!r} without n_modes, expected 0: no table has a size")
        init_std = backends.number("init_std", init_std)
        if not 0.0 <= init_std < math.inf:
            raise ValueError(f"init_std: got {init_std}, expected a finite value, 0 or more")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        # Built by PyTorch's own module, so that names, shapes and initialisation are its.
        twin = nn.MultiheadAttention(embed_dim, num_heads, bias=bias, batch_first=True, device=device, dtype=dtype)
        self.in_proj_weight, self.in_proj_bias, self.out_proj = twin.in_proj_weight, twin.in_proj_bias, twin.out_proj
        self.prompt_bias: nn.Parameter | None = None
        if n_modes:
            shape = (n_modes, 1 if shared_heads else num_heads, *lengths.values())
            self.prompt_bias = nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * init_std)

    def extra_repr(self) -> str:
        """Width, heads, dropout, and the modes with the lengths of their tables."""
        text = f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"
        if self.prompt_bias is not None:
            modes, _, queries, keys = self.prompt_bias.shape
            text += f", n_modes={modes}, max_query_length={queries}, max_key_length={keys}"
        return text

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        tables = self.prompt_bias
        made_there = local_metadata.get("version") == nn.MultiheadAttention._version
        # Tables on meta hold nothing that could be kept: they are reported as missing.
        if made_there and tables is not None and not tables.is_meta:
            state_dict.setdefault(f"{prefix}prompt_bias", tables.detach())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mode: Tensor | None = None,
        key_lengths: Tensor | None = None,
        causal: bool = False,
        seed: int | Tensor | None = None,
        row_id: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: ``[B, Lq, E]``; key, value: ``[B, Lk, E]``. In the weights' dtype unless autocast casts both.
            key_padding_mask: ``[B, Lk]``, padding on the right: bool, True = padding, or float, −inf = padding, else 0.
                On a GPU it is not read back, and a sample whose mask does not fit gives NaN.
            need_weights: False.
            attn_mask: ``[Lq, Lk]`` for all samples and heads, or without a prompt bias ``[B·H, Lq, Lk]``: bool, True =
                hidden, or float, added to the logits.
            average_attn_weights: without effect, as there are no weights.
            is_causal: nn.MultiheadAttention's hint that ``attn_mask`` is causal. The mask is what counts.
            mode: int64 ``[B]``, which table of the prompt bias a sample gets.
            key_lengths: int64 ``[B]``, how many keys exist.
            causal: MulT's mask (:func:`modafill.ops.prompt_attention`), a bool.
            seed: of the dropout, an integer or int64 ``[]``; None = from torch's generator.
            row_id: int64 ``[B]``, the identity of each sample's dropout: with ``seed``, the same in any batch.

        Returns:
            ``([B, Lq, E], None)``; under autocast in its dtype.

        Raises:
            TypeError: ``query``, ``key``, ``value`` or a mask is no tensor.
            ValueError: weights are asked for, ``is_causal`` comes without a mask, a shape, dtype, device or mask does
                not fit, sequences are longer than the prompt bias.
            RuntimeError: padding on the CPU does not fit and the module is compiled.
        """
        if need_weights:
            raise ValueError("need_weights: got True, expected False, because the weights are never made")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: got True without attn_mask, expected the mask that it is a hint about")
        weight = self.in_proj_weight
        queries, keys = self._lengths(query, key, value, weight)
        if key_padding_mask is not None:
            if key_lengths is not None:
                raise ValueError("key_padding_mask: got one beside key_lengths, expected one of the two")
            key_lengths = _key_lengths(key_padding_mask, key)
        weights = weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        if dropout and seed is None:
            seed = torch.randint(2**63 - 1, (), device=q.device)
        bias, mode = self._bias(queries, keys, attn_mask, mode, q)
        out = ops.prompt_attention(
            q,
            k,
            v,
            bias,
            mode,
            causal=causal,
            key_lengths=key_lengths,
            dropout=dropout,
            seed=seed,
            row_id=row_id,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def _lengths(self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> tuple[int, int]:
        """Lq and Lk of inputs that fit."""
        width, dtype, device = self.embed_dim, weight.dtype, weight.device
        shapes: list[torch.Size] = []
        last = query
        for name, x in (("query", query), ("key", key), ("value", value)):
            # One tensor often stands for two or three, and a small call takes 30 µs in all.
            if x is last and shapes:
                shapes.append(shapes[-1])
                continue
            backends.check_tensor(name, x)
            if x.is_nested:
                raise ValueError(
                    f"{name}: got a nested tensor, expected [B, L, {width}]; nn.TransformerEncoder makes none with"
                    " enable_nested_tensor=False"
                )
            shape = x.shape
            if len(shape) != 3 or shape[2] != width:
                raise ValueError(f"{name}: got {list(shape)}, expected [B, L, {width}]")
            if x.dtype != dtype or x.device != device:
                _check_cast(name, x, weight)
            shapes.append(shape)
            last = x
        of_query, of_key, of_value = shapes
        batch, queries, _ = of_query
        keys = of_key[1]
        if of_key[0] != batch:
            raise ValueError(f"key: got {list(of_key)}, expected [{batch}, Lk, {width}], as query")
        if of_value != of_key:
            raise ValueError(f"value: got {list(of_value)}, expected {list(of_key)}, as key")
        if queries > MAX_LENGTH or keys > MAX_LENGTH:
            raise ValueError(f"query, key: got lengths {queries} and {keys}, expected at most {MAX_LENGTH}")
        return queries, keys

    def _bias(
        self, queries: int, keys: int, mask: Tensor | None, mode: Tensor | None, q: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The op's ``bias`` and ``mode``."""
        bias: Tensor | None = None
        if self.prompt_bias is not None:
            most = tuple(self.prompt_bias.shape[2:])
            if queries > most[0] or keys > most[1]:
                raise ValueError(
                    f"query, key: got lengths {queries} and {keys}, expected at most {most[0]} and {most[1]}"
                )
            bias = self.prompt_bias[..., :queries, :keys].to(q.dtype)
        if mask is None:
            return bias, mode
        backends.check_tensor("attn_mask", mask)
        batch, heads = q.shape[:2]
        shapes = [[queries, keys]] if bias is not None else [[queries, keys], [batch * heads, queries, keys]]
        if list(mask.shape) not in shapes or not _is_mask(mask) or mask.device != q.device:
            expected = f"bool or floating-point {' or '.join(map(str, shapes))} on {q.device}"
            raise ValueError(f"attn_mask: got {backends.describe(mask)}, expected {expected}")
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        mask = mask.to(q.dtype)
        if mask.ndim == 2:
            return mask[None, None] if bias is None else bias + mask, mode
        if mode is not None:
            raise ValueError(f"mode: got {backends.describe(mode)}, expected None with attn_mask [B·H, Lq, Lk]")
        if batch == 0:
            return None, None
        # A table for each sample.
        return mask.unflatten(0, (batch, heads)), torch.arange(batch, device=q.device)


def _check_cast(name: str, x: Tensor, weight: Tensor) -> None:
    """``x``, of another dtype or device than ``weight``, comes to have the same under autocast."""
    device = weight.device.type
    casts = device != "meta" and torch.is_autocast_enabled(device)
    if x.device != weight.device or not (casts and _is_cast(x) and _is_cast(weight)):
        got, expected = backends.describe(x), f"{backends.dtype_name(weight.dtype)} on {weight.device}"
        raise ValueError(f"{name}: got {got}, expected {expected}, as the weights")


def _is_cast(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float64


def _is_mask(x: Tensor) -> bool:
    return x.dtype == torch.bool or x.is_floating_point()


def _key_lengths(padding: Tensor, key: Tensor) -> Tensor:
    """How many keys stand before the padding, int64 ``[B]``; −1, which the op makes NaN, for a misfit on a GPU."""
    batch, keys = key.shape[:2]
    backends.check_tensor("key_padding_mask", padding)
    if padding.shape != (batch, keys) or not _is_mask(padding) or padding.device != key.device:
        expected = f"bool or floating-point [{batch}, {keys}] on {key.device}"
        raise ValueError(f"key_padding_mask: got {backends.describe(padding)}, expected {expected}")
    hidden = padding if padding.dtype == torch.bool else padding == -torch.inf
    lengths = keys - hidden.sum(1)
    behind = torch.arange(keys, device=padding.device) >= lengths[:, None]
    fits = ((hidden == behind) & (hidden | (padding == 0))).all(1)
    if fits.is_cpu:
        wrong = "got padding before a key, or a number other than 0 and -inf, expected padding on the right only"
        if torch.compiler.is_compiling():
            torch._assert_async(fits.all(), f"key_padding_mask: {wrong}")
        elif not bool(fits.all()):
            raise ValueError(f"key_padding_mask: {wrong}")
    return torch.where(fits, lengths, -1)
