"""A transformer over the few tokens of each sample, which is asked for the missing ones alone. For inference."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modafill.ops import backends, reference
from modafill.ops.backends import _C

# Fewer tokens do not pay for a copy of the weights.
_FEW_TOKENS = 24
# Of networks that the Triton kernel keeps on chip.
_MOST_CHANNELS, _WIDEST_HEAD, _MOST_TOKENS = 256, 32, 16
# Samples that PyTorch's layers take at a time on a CPU, so that what lies between the layers stays in the caches.
_ROWS_AT_A_TIME = 128
_TENSORS_PER_LAYER = 12


def _has_bfloat16_products() -> bool:
    return backends.multiplies_bfloat16() and _C is not None and _C.bfloat16_products


def _rule(dtype: torch.dtype, backend: str) -> str:
    """What :func:`modafill.ops.explain` says of weights of ``dtype``."""
    if backend == "triton":
        return (
            f"torch for more than {_MOST_CHANNELS} channels, {_WIDEST_HEAD} of a head or {_MOST_TOKENS} tokens, and "
            "with a projection in"
        )
    if backend != "cpu":
        return ""
    if dtype == torch.bfloat16 and backends.multiplies_bfloat16() and not _has_bfloat16_products():
        return "torch for bfloat16 weights: this processor multiplies them faster than float32"
    return ""


backends.RULES["token_denoiser"] = _rule


class TokenNetwork:
    """The weights of a transformer that :func:`token_denoiser` runs: make another when the module has changed.

    Args:
        encoder: pre-norm layers with exact GELU (``norm_first=True, activation="gelu", batch_first=True``) and a norm
            behind the last one. Its dropout is not applied.
        project_out: from its channels to the width of the tokens.
        project_in: from the width of the tokens to its channels; None where both are equal.
        dtype: of the matrices and their biases, None = theirs: beside float32, bfloat16 or float16. Normalisations, and
            what lies between the layers, stay in the precision of the module.

    Raises:
        ValueError: another kind of encoder, or a dtype that does not go with the module's.
    """

    def __init__(
        self,
        encoder: nn.TransformerEncoder,
        project_out: nn.Linear,
        project_in: nn.Linear | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layers = [cast(nn.TransformerEncoderLayer, layer) for layer in encoder.layers]
        norms_of = [encoder.norm, *(norm for layer in layers for norm in (layer.norm1, layer.norm2))]
        fits = all(
            layer.norm_first and layer.activation is F.gelu and layer.self_attn.in_proj_bias is not None
            for layer in layers
        ) and all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms_of)
        if not layers or not fits:
            raise ValueError("encoder: expected layers with norm_first, exact GELU and biases, and a norm behind them")
        if len({cast(nn.LayerNorm, norm).eps for norm in norms_of}) > 1:
            raise ValueError("encoder: got norms with different eps, expected the same in all")
        for name, projection in (("project_out", project_out), ("project_in", project_in)):
            if projection is not None and projection.bias is None:
                raise ValueError(f"{name}: got a projection without a bias, expected one")
        self.state_dtype = project_out.weight.dtype
        self.dtype = dtype or self.state_dtype
        if self.state_dtype not in (torch.float32, torch.float64) or (
            self.dtype != self.state_dtype
            and (self.state_dtype != torch.float32 or self.dtype not in (torch.bfloat16, torch.float16))
        ):
            raise ValueError(
                f"dtype: got {self.dtype} for a module of {self.state_dtype}, expected that of a float32 or float64 "
                "module, or bfloat16 or float16 for a float32 one"
            )
        norm = cast(nn.LayerNorm, encoder.norm)
        self.device = project_out.weight.device
        self.heads, self.epsilon = layers[0].self_attn.num_heads, norm.eps
        self.width, self.channels = project_out.weight.shape
        self.hidden, self.n_layers = layers[0].linear1.out_features, len(layers)
        made = {(layer.self_attn.embed_dim, layer.self_attn.num_heads, layer.linear1.out_features) for layer in layers}
        if made != {(self.channels, self.heads, self.hidden)}:
            raise ValueError(
                f"encoder: got layers of (channels, heads, hidden) {sorted(made)}, expected the same in all, and the "
                f"{self.channels} channels that project_out reads"
            )
        entered = (self.channels, self.channels) if project_in is None else tuple(project_in.weight.shape)
        if entered != (self.channels, self.width):
            got = "None" if project_in is None else f"a projection of {entered[1]} to {entered[0]}"
            raise ValueError(f"project_in: got {got}, expected one of {self.width} to {self.channels}")

        # The module's own, and as the products read them.
        self._exact: list[Tensor | None] = []
        self.tensors: list[Tensor | None] = []

        def add(weight: Any, bias: Any, dtype: torch.dtype) -> None:
            self._exact += [weight.detach(), bias.detach()]
            self.tensors += [t.detach().to(dtype).contiguous() for t in (weight, bias)]

        if project_in is None:
            self._exact, self.tensors = [None, None], [None, None]
        else:
            add(project_in.weight, project_in.bias, self.dtype)
        for layer in layers:
            attention = layer.self_attn
            add(layer.norm1.weight, layer.norm1.bias, self.state_dtype)
            add(attention.in_proj_weight, attention.in_proj_bias, self.dtype)
            add(attention.out_proj.weight, attention.out_proj.bias, self.dtype)
            add(layer.norm2.weight, layer.norm2.bias, self.state_dtype)
            add(layer.linear1.weight, layer.linear1.bias, self.dtype)
            add(layer.linear2.weight, layer.linear2.bias, self.dtype)
        add(norm.weight, norm.bias, self.state_dtype)
        add(project_out.weight, project_out.bias, self.dtype)
        self._pointers = [backends.pointer(tensor) for tensor in self.tensors]
        self._packed: Tensor | None = None
        self._flat: Tensor | None = None
        self._pairs = self.dtype == torch.bfloat16 and _has_bfloat16_products()

    def __getstate__(self) -> dict[str, Any]:
        # Addresses are those of this very object's tensors.
        return {**self.__dict__, "_pointers": None, "_packed": None, "_flat": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pairs = self.dtype == torch.bfloat16 and _has_bfloat16_products()
        self._pointers = [backends.pointer(tensor) for tensor in self.tensors]

    def _described(self, x: Tensor, available: Tensor, added: Tensor, out: Tensor, packed: Tensor | None) -> Any:
        return _C.TokenDenoiserArgs(
            backends.DTYPE_CODES[x.dtype],
            backends.DTYPE_CODES[self.dtype],
            *map(backends.pointer, (out, x, available, added)),
            self._pointers,
            backends.pointer(packed),
            self._pairs,
            *x.shape,
            self.channels,
            self.heads,
            self.hidden,
            self.n_layers,
            self.epsilon,
        )

    def run_triton(self, out: Tensor | None, x: Tensor, available: Tensor, added: Tensor, **loop: Any) -> None:
        """Call the Triton kernel for arguments that were checked."""
        if self._flat is None:
            self._flat = self._flattened()
        backends.launch_triton(
            "token_denoiser",
            *(out, x, available.contiguous(), added.contiguous(), self._flat),
            **loop,
            heads=self.heads,
            hidden=self.hidden,
            layers=self.n_layers,
            epsilon=self.epsilon,
        )

    def _flattened(self) -> Tensor:
        """All matrices with their biases, one behind the other, weights and biases of normalisations in them."""
        tensors: Any = self._exact

        def behind(norm: int, matrix: int) -> list[Tensor]:
            """A linear layer that reads what a normalisation gives before its own weight and bias."""
            weight, bias = tensors[matrix : matrix + 2]
            return [weight * tensors[norm], bias + (weight * tensors[norm + 1]).sum(1)]

        flat: list[Tensor] = []
        for i in range(2, 2 + self.n_layers * _TENSORS_PER_LAYER, _TENSORS_PER_LAYER):
            flat += [*behind(i, i + 2), *tensors[i + 4 : i + 6], *behind(i + 6, i + 8), *tensors[i + 10 : i + 12]]
        flat += behind(len(tensors) - 4, len(tensors) - 2)
        return torch.cat([t.flatten() for t in flat]).to(self.dtype)

    def run(self, x: Tensor, available: Tensor, added: Tensor) -> Tensor:
        """As :func:`token_denoiser` by the extension, for arguments that were checked."""
        out = torch.empty_like(x)
        many = x.shape[0] * x.shape[1] > _FEW_TOKENS
        if self._packed is None and (many or self.dtype != self.state_dtype):
            described = self._described(x, available, added, out, None)
            packed = x.new_empty(_C.token_denoiser_size(described))
            # Read from end to end for every few samples: in small pages the addresses leave their cache.
            _C.prefer_huge_pages(packed.data_ptr(), packed.nbytes)
            backends.launch("pack_token_denoiser", "cpu", x.device, self._described(x, available, added, out, packed))
            self._packed = packed
        backends.launch("token_denoiser", "cpu", x.device, self._described(x, available, added, out, self._packed))
        return out


def _in_torch(network: TokenNetwork, x: Tensor, available: Tensor, added: Tensor, missing: Tensor) -> Tensor:
    """The op in PyTorch's own layers."""
    count, tokens, width = x.shape
    channels, heads, dtype = network.channels, network.heads, network.dtype
    tensors: Any = network.tensors
    h = x if tensors[0] is None else F.linear(x.to(dtype), tensors[0], tensors[1]).to(x.dtype)
    h = h + added[torch.arange(tokens, device=x.device), available.to(torch.int64)]

    def normalised(weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(h, (channels,), weight, bias, network.epsilon).to(dtype)

    for i in range(network.n_layers):
        n1, m1, w_in, b_in, w_out, b_out, n2, m2, w1, c1, w2, c2 = tensors[
            2 + i * _TENSORS_PER_LAYER : 2 + (i + 1) * _TENSORS_PER_LAYER
        ]
        qkv = F.linear(normalised(n1, m1), w_in, b_in).reshape(count, tokens, 3, heads, channels // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if i + 1 == network.n_layers:
            # Nobody reads what the last layer says of observed tokens.
            samples = missing // tokens
            q = q.transpose(1, 2).flatten(0, 1)[missing].unsqueeze(2)
            k, v, h = k[samples], v[samples], h.flatten(0, 1)[missing].unsqueeze(1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + F.linear(attended, w_out, b_out).to(x.dtype)
        h = h + F.linear(F.gelu(F.linear(normalised(n2, m2), w1, c1)), w2, c2).to(x.dtype)
    norm, shift, w, b = tensors[-4:]
    said = F.linear(normalised(norm, shift), w, b).to(x.dtype).flatten(0, 1)
    return x.new_zeros(count * tokens, width).index_copy(0, missing, said).view_as(x)


def _no_kernel(network: TokenNetwork, tokens: int) -> str | None:
    """Why the Triton kernel cannot run samples of so many tokens, or None."""
    if network.tensors[0] is not None:
        return "the network has a projection in"
    for name, value, most in (
        ("channels", network.channels, _MOST_CHANNELS),
        ("channels of a head", network.channels // network.heads, _WIDEST_HEAD),
        ("tokens", tokens, _MOST_TOKENS),
    ):
        if value > most:
            return f"{value} {name} are more than {most}"
    return None


def find_missing(available: Tensor) -> Tensor:
    """Places int64 ``[n]`` of missing tokens among the B·M of bool ``[B, M]``; a GPU has to be waited for."""
    return (~available).flatten().nonzero().flatten()


def token_denoiser(
    network: TokenNetwork,
    x: Tensor,
    available: Tensor,
    added: Tensor,
    *,
    missing: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What a transformer says of the missing tokens of each sample: ADN (ADMC §3.2), without what nobody reads.

    The last layer asks for missing tokens alone. In C++ a complete sample costs nothing, and each thread takes some
    samples through all layers at a time. In Triton a program takes all tokens of some samples through all layers: of up
    to 16 tokens, in networks of up to 256 channels, 32 a head, without a projection in. No GPU has timed it yet.

    Args:
        network: the weights.
        x: ``[B, M, width]``, float32 or float64 as the network's normalisations.
        available: bool ``[B, M]``, True = observed.
        added: ``[M, 2, channels]`` like ``x``: what is added to each token after the projection in, where it is missing
            and where it is observed (embeddings of step, modality and state).
        missing: :func:`find_missing` of ``available``, for those who call many times with the same; None finds it.
        backend: ``"auto"`` or one of :data:`modafill.ops.backends.BACKENDS`; see :func:`modafill.ops.explain`.

    Returns:
        Like ``x``: the network's output for missing tokens, zeros for observed ones. No gradient flows through it.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        RuntimeError: ``backend`` names one that cannot run here.
    """
    backends.check_tensor("x", x)
    if x.ndim != 3 or x.shape[2] != network.width or x.dtype != network.state_dtype:
        expected = f"{backends.dtype_name(network.state_dtype)} [B, M, {network.width}]"
        raise ValueError(f"x: got {backends.describe(x)}, expected {expected}")
    if x.device != network.device:
        raise ValueError(f"x: got a tensor on {x.device}, expected {network.device}, as the network")
    for name, value, shape, dtype in (
        ("available", available, x.shape[:2], torch.bool),
        ("added", added, (x.shape[1], 2, network.channels), x.dtype),
    ):
        backends.check_tensor(name, value)
        backends.check_described(name, value, shape, dtype, x.device)
    automatic = backends.requested(backend) == "auto"
    if automatic and not backends.runs_eagerly(x, available, added):
        chosen = "torch"
    else:
        chosen = backends.select("token_denoiser", x.device, network.dtype, backend)
        if automatic and chosen == "cpu" and _rule(network.dtype, chosen):
            chosen = "torch"
        if chosen == "triton" and (why := _no_kernel(network, x.shape[1])):
            if not automatic:
                raise backends.BackendError(f"token_denoiser: the triton backend cannot run: {why}")
            chosen = "torch"
    with torch.no_grad():
        if chosen == "cpu":
            return network.run(x.contiguous(), available.contiguous(), added.contiguous())
        if chosen == "triton":
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            network.run_triton(out, x.contiguous(), available, added)
            return out
        if chosen == "reference":
            return reference.token_denoiser(
                x, available, added, network.tensors, heads=network.heads, epsilon=network.epsilon
            ).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if not x.is_cpu:
                return _in_torch(network, x, available, added, find_missing(available) if missing is None else missing)
            parts = [
                _in_torch(network, some, seen, added, find_missing(seen))
                for some, seen in zip(x.split(_ROWS_AT_A_TIME), available.split(_ROWS_AT_A_TIME), strict=True)
            ]
        return torch.cat(parts)


def can_loop(network: TokenNetwork, x: Tensor) -> bool:
    """Whether :func:`reverse_loop` takes ``x [B, M, W]`` through all steps in one kernel here.

    Raises:
        RuntimeError: the environment names a backend that cannot run here.
    """
    # A quad of normals belongs to one token.
    if network.state_dtype != torch.float32 or network.width % 4 or x.ndim != 3 or _no_kernel(network, x.shape[1]):
        return False
    chosen = backends.select("token_denoiser", network.device, network.dtype, "auto")
    return chosen == "triton" and backends.runs_eagerly(x)


def reverse_loop(
    network: TokenNetwork,
    x: Tensor,
    available: Tensor,
    added: Tensor,
    coefficients: Tensor,
    *,
    observed: Tensor | None = None,
    first_step: int | None = None,
    seed: int | Tensor | None = None,
    row_id: Tensor | None = None,
) -> Tensor:
    """All steps of a reverse process over missing tokens in one Triton kernel; see :func:`can_loop`.

    It gives what :func:`modafill.diffusion.sample_replace` (with ``observed``) and
    :func:`modafill.diffusion.sample_clean` (without; η = 0) give from their start, with the same noise.

    Args:
        x: ``[B, M, W]`` float32, the start.
        available: bool ``[B, M]``.
        added: ``[S, M, 2, C]``, that of :func:`token_denoiser` for each step.
        coefficients: float32 ``[S, 5]``, of :func:`modafill.diffusion.replace_coefficients` or
            :func:`~modafill.diffusion.clean_coefficients`.
        observed: like ``x``: ADMC's replacement of observed tokens after each step, with the next three arguments. None
            leaves them as they are in ``x``.
        first_step: the diffusion step n of the first of S steps, whose noise belongs to n, n − 1, …
        seed: 64-bit key, or int64 ``[]`` on the device: a captured graph draws other noise for another value.
        row_id: int64 ``[B]``; default 0…B−1.

    Raises:
        ValueError: a shape, dtype or device does not fit, or a step out of range.
        TypeError: an argument of another type, or ``observed`` without ``first_step`` and ``seed``.
        RuntimeError: :func:`can_loop` is False.
    """
    for name, value in (("x", x), ("available", available), ("added", added), ("coefficients", coefficients)):
        backends.check_tensor(name, value)
    if not can_loop(network, x):
        raise backends.BackendError(f"reverse_loop: no kernel takes {backends.describe(x)} on {network.device}")
    count, tokens, width = x.shape
    steps = len(coefficients) if coefficients.ndim else 0
    for name, value, shape, dtype in (
        ("x", x, (count, tokens, network.width), torch.float32),
        ("available", available, (count, tokens), torch.bool),
        ("coefficients", coefficients, (steps, 5), torch.float32),
        ("added", added, (steps, tokens, 2, network.channels), torch.float32),
    ):
        backends.check_described(name, value, shape, dtype, network.device)
    loop: dict[str, Any] = {"loop": "clean"}
    if observed is not None:
        backends.check_tensor("observed", observed)
        backends.check_described("observed", observed, (count, tokens, width), torch.float32, network.device)
        last = backends.integer("first_step", first_step, low=steps, high=reference.MAX_STEP)
        seed_value, seed_tensor = backends.split_seed(seed)  # type: ignore[arg-type]
        backends.check_noise(seed_tensor, row_id, count, x.device)
        row_id = torch.arange(count, device=x.device) if row_id is None else row_id.contiguous()
        loop = {"loop": "replace", "observed": observed.contiguous(), "first_step": last, "row_id": row_id}
        loop |= {"seed": seed_value, "seed_tensor": seed_tensor}
    out = x.clone(memory_format=torch.contiguous_format)
    network.run_triton(None, out, available, added, coefficients=coefficients.contiguous(), **loop)
    return out
