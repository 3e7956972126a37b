"""Plain-PyTorch twins of every op, in float64: the only oracle the kernels are judged by.

A schedule table is float32 ``[N + 1, 5]``; row n holds the coefficients of diffusion step n (ᾱ_0 = 1):

====== =========================================================
column value
====== =========================================================
0      √ᾱ_n
1      √(1 − ᾱ_n)
2      1 / √α_n
3      −β_n / (√α_n √(1 − ᾱ_n))
4      √β̃_n, β̃_n = β_n (1 − ᾱ_{n−1}) / (1 − ᾱ_n)
====== =========================================================

Randomness is counter-based (Philox4x32-10, then Box–Muller): key = seed, counter = (quad of elements within the row,
row id low, row id high, step | draw << 24). Each function here returns float64 on the device of its input; a step
outside the schedule gives NaN, as does a number of keys outside 0…Lk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

SQRT_ALPHA_BAR, SQRT_ONE_MINUS_ALPHA_BAR, POSTERIOR_X, POSTERIOR_EPS, POSTERIOR_STD = range(5)
TABLE_COLUMNS = 5
MAX_STEP = (1 << 24) - 1

_MASK = 0xFFFFFFFF


class Draw(IntEnum):
    """Which of the independent draws of a step a noise value belongs to."""

    REVERSE = 0
    FORWARD = 1
    INITIAL = 2
    RESAMPLE = 3
    DROPOUT = 4


def philox(seed: int | Tensor, row_id: Tensor, quads: Tensor, c3: Tensor | int) -> Tensor:
    """Philox4x32-10 words (Salmon et al., SC'11) as int64 ``[rows, quads, 4]`` for ``row_id [rows]`` and ``quads [Q]``.

    ``c3`` is the fourth counter word, one for all rows or int64 ``[rows]``.
    """
    rows = row_id.to(torch.int64)[:, None]
    c = [
        quads.to(torch.int64)[None, :].expand(rows.shape[0], -1) & _MASK,
        (rows & _MASK).expand(-1, quads.shape[0]),
        ((rows >> 32) & _MASK).expand(-1, quads.shape[0]),
        torch.as_tensor(c3, dtype=torch.int64, device=rows.device).reshape(-1, 1).expand(rows.shape[0], quads.shape[0]),
    ]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # The product wraps modulo 2**64; both halves survive it.
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [((p1 >> 32) & _MASK) ^ c[1] ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c[3] ^ k1, p0 & _MASK]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack(c, dim=-1)


def box_muller(words: Tensor) -> Tensor:
    """Four standard normals from each four words: ``(r₀ cos θ₀, r₀ sin θ₀, r₁ cos θ₁, r₁ sin θ₁)``.

    r = √(−2 ln u) with u = w·2⁻³² + 2⁻³³ rounded to float32 by definition, so that kernels can be exact in it;
    θ = 2π·w·2⁻³².
    """
    u = (words[..., 0::2].to(torch.float32) * 2.0**-32 + 2.0**-33).to(torch.float64)
    r = torch.sqrt(-2.0 * torch.log(u))
    theta = words[..., 1::2].to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    return torch.stack((r * torch.cos(theta), r * torch.sin(theta)), dim=-1).flatten(-2)


def randn(
    shape: tuple[int, ...],
    *,
    seed: int | Tensor,
    row_id: Tensor | None = None,
    step: int | Tensor = 0,
    draw: int = Draw.INITIAL,
    device: torch.device | str | None = None,
) -> Tensor:
    """Normal noise of ``shape [B, ...]``; element e of row b depends on (seed, row_id[b], step, draw, e) alone."""
    batch, width = shape[0], math.prod(shape[1:])
    rows = torch.arange(batch, device=device) if row_id is None else row_id
    quads = torch.arange((width + 3) // 4, device=rows.device)
    step = torch.as_tensor(step, dtype=torch.int64, device=rows.device)
    z = box_muller(philox(seed, rows, quads, step | (int(draw) << 24))).flatten(1)[:, :width]
    return torch.where(((step >= 0) & (step <= MAX_STEP)).reshape(-1, 1), z, math.nan).reshape(shape)


def _column(table: Tensor, step: Tensor, column: int, like: Tensor) -> Tensor:
    """Coefficient of each row, shaped to broadcast against ``like [B, ...]``; NaN for a step outside the schedule."""
    step = step.reshape(-1)
    inside = (step >= 0) & (step < len(table))
    values = table[:, column].to(torch.float64).index_select(0, torch.where(inside, step, 0))
    values = torch.where(inside, values, math.nan)
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _steps(step: int | Tensor, table: Tensor) -> Tensor:
    """``step`` on the table's device, far outside the schedule where it is not in 1…N."""
    step = torch.as_tensor(step, dtype=torch.int64, device=table.device)
    return torch.where((step >= 1) & (step < len(table)), step, -MAX_STEP)


def masked_reverse_step(
    x: Tensor,
    eps: Tensor,
    observed: Tensor,
    available: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    seed: int | Tensor,
    row_id: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """ADMC eq. 3–4 for ``x, eps, observed [B, M, D]`` and ``available [B, M]``; see the op of this name."""
    x, eps, observed, step = x.to(torch.float64), eps.to(torch.float64), observed.to(torch.float64), _steps(step, table)
    z = randn(tuple(x.shape), seed=seed, row_id=row_id, step=step, draw=Draw.REVERSE, device=x.device)
    z = z if noise is None else noise.to(torch.float64)
    generated = _column(table, step, POSTERIOR_X, x) * x + _column(table, step, POSTERIOR_EPS, x) * eps
    generated = generated + _column(table, step, POSTERIOR_STD, x) * z
    renoised = _column(table, step - 1, SQRT_ALPHA_BAR, x) * observed
    renoised = renoised + _column(table, step - 1, SQRT_ONE_MINUS_ALPHA_BAR, x) * z
    return torch.where(available[..., None], renoised, generated)


def add_noise(
    x: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    seed: int | Tensor,
    row_id: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward process (ADMC eq. 1, CDTP eq. 4): ``(√ᾱ_n x + √(1 − ᾱ_n) ε, ε)`` for ``x [B, ...]``."""
    x, step = x.to(torch.float64), _steps(step, table)
    z = randn(tuple(x.shape), seed=seed, row_id=row_id, step=step, draw=Draw.FORWARD, device=x.device)
    z = z if noise is None else noise.to(torch.float64)
    noisy = _column(table, step, SQRT_ALPHA_BAR, x) * x + _column(table, step, SQRT_ONE_MINUS_ALPHA_BAR, x) * z
    return noisy, z


def stride_deviation(signal: Tensor, sigma: Tensor, prev_signal: Tensor, prev_sigma: Tensor) -> Tensor:
    """√(1 − ᾱ_t/ᾱ_t'), the noise that a stride adds, from √ᾱ and √(1 − ᾱ) at both ends of it."""
    # From whichever column of the float32 table is the more exact one.
    spread = torch.where(
        prev_sigma < prev_signal, (sigma**2 - prev_sigma**2) / prev_signal**2, 1.0 - (signal / prev_signal) ** 2
    )
    return torch.sqrt(spread)


def ddim_deviations(
    signal: Tensor, sigma: Tensor, prev_signal: Tensor, prev_sigma: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """DDIM's σ_t and √(1 − ᾱ_t' − σ_t²) from √ᾱ and √(1 − ᾱ) at both ends of a stride."""
    # A sum of squares, which rounding of the table cannot make negative.
    direction = torch.sqrt((1.0 - eta**2) * prev_sigma**2 + (eta * prev_sigma**2 * signal / (prev_signal * sigma)) ** 2)
    return eta * prev_sigma / sigma * stride_deviation(signal, sigma, prev_signal, prev_sigma), direction


def ddim_step(
    x: Tensor,
    eps: Tensor,
    table: Tensor,
    step: int | Tensor,
    prev_step: int | Tensor,
    *,
    eta: float = 0.0,
    seed: int | Tensor | None = None,
    row_id: Tensor | None = None,
    clip: float | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """CDTP eq. 8–9 for any stride ``step → prev_step`` and ``x, eps [B, ...]``; see :func:`modafill.ops.ddim_step`."""
    x, eps, step = x.to(torch.float64), eps.to(torch.float64), _steps(step, table)
    prev_step = torch.as_tensor(prev_step, dtype=torch.int64, device=table.device)
    prev_step = torch.where(prev_step < step, prev_step, -MAX_STEP)
    signal, sigma = _column(table, step, SQRT_ALPHA_BAR, x), _column(table, step, SQRT_ONE_MINUS_ALPHA_BAR, x)
    prev_signal = _column(table, prev_step, SQRT_ALPHA_BAR, x)
    prev_sigma = _column(table, prev_step, SQRT_ONE_MINUS_ALPHA_BAR, x)
    x0 = (x - sigma * eps) / signal
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
        eps = (x - signal * x0) / sigma
    if eta == 0.0:
        return prev_signal * x0 + prev_sigma * eps
    std, direction = ddim_deviations(signal, sigma, prev_signal, prev_sigma, eta)
    if noise is None:
        if seed is None:
            raise ValueError("seed: got None, expected an integer because eta > 0 draws noise")
        noise = randn(tuple(x.shape), seed=seed, row_id=row_id, step=step, draw=Draw.REVERSE, device=x.device)
    return prev_signal * x0 + direction * eps + std * noise


def visible(
    queries: int, keys: int, *, causal: bool, key_lengths: Tensor | None, device: torch.device | str
) -> Tensor | None:
    """Which keys a query may read, bool ``[B or 1, 1, Lq, Lk]``; None where it may read all.

    ``causal`` is MulT's mask: query i reads keys 0…i + |Lk − Lq|.
    """
    mask = None
    j = torch.arange(keys, device=device)
    if causal:
        mask = (j <= torch.arange(queries, device=device)[:, None] + abs(keys - queries))[None, None]
    if key_lengths is not None:
        within = (j < key_lengths[:, None])[:, None, None, :]
        mask = within if mask is None else mask & within
    return mask


def dropout_mask(
    shape: Sequence[int], dropout: float, *, seed: int | Tensor, row_id: Tensor | None, device: torch.device
) -> Tensor:
    """What dropout keeps of probabilities ``[B, H, Lq, Lk]``: bool, a function of (seed, row id, head, query, key)."""
    batch, heads, queries, keys = shape
    rows = torch.arange(batch, device=device) if row_id is None else row_id
    quads = (keys + 3) // 4
    words = philox(seed, rows, torch.arange(heads * queries * quads, device=device), int(Draw.DROPOUT) << 24)
    return (words >= int(dropout * 2**32)).reshape(batch, heads, queries, 4 * quads)[..., :keys]


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mode: Tensor | None = None,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    row_id: Tensor | None = None,
) -> Tensor:
    """softmax(QKᵀ·scale + bias[mode]) V with dropout on the softmax; see :func:`modafill.ops.prompt_attention`."""
    q, k, v = q.to(torch.float64), k.to(torch.float64), v.to(torch.float64)
    queries, keys = q.shape[2], k.shape[2]
    fits = torch.ones(len(q), dtype=torch.bool, device=q.device)
    table = torch.zeros(1, dtype=torch.int64, device=q.device)
    if bias is not None and mode is not None:
        fits = (mode >= 0) & (mode < len(bias))
        table = torch.where(fits, mode, 0)
    if key_lengths is not None:
        possible = (key_lengths >= 0) & (key_lengths <= keys)
        fits, key_lengths = fits & possible, torch.where(possible, key_lengths, keys)
        # What lies behind the last key is never read, NaN included.
        real = (torch.arange(keys, device=q.device) < key_lengths[:, None])[:, None, :, None]
        k, v = torch.where(real, k, 0.0), torch.where(real, v, 0.0)
    # A mode or a length out of range makes its sample NaN, gradients included.
    poison = torch.where(fits, 1.0, math.nan).to(torch.float64)[:, None, None, None]
    logits = q @ k.transpose(-1, -2) * (poison * (q.shape[-1] ** -0.5 if scale is None else scale))
    if bias is not None:
        logits = logits + bias[table].to(torch.float64)
    mask = visible(queries, keys, causal=causal, key_lengths=key_lengths, device=q.device)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    nothing = (logits == -math.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    if dropout > 0.0:
        if seed is None:
            raise ValueError("seed: got None, expected an integer because dropout > 0")
        kept = dropout_mask(logits.shape, dropout, seed=seed, row_id=row_id, device=q.device)
        weights = torch.where(kept, weights / (1.0 - dropout), 0.0)
    return weights @ v * poison


def token_denoiser(
    x: Tensor,
    available: Tensor,
    added: Tensor,
    tensors: Sequence[Tensor | None],
    *,
    heads: int,
    epsilon: float = 1e-5,
) -> Tensor:
    """A pre-norm transformer on ``x [B, M, width]``, zeros for observed tokens.

    ``tensors`` are weights and biases: projection in (or None twice); for each layer norm, attention in, attention out,
    norm, first and second; norm and projection out. See :func:`modafill.ops.token_denoiser`.
    """
    pairs = [
        None if w is None or b is None else (w.to(torch.float64), b.to(torch.float64))
        for w, b in zip(tensors[::2], tensors[1::2], strict=True)
    ]
    project_in, *middle, last_norm, project_out = pairs

    def linear(a: Tensor, pair: tuple[Tensor, Tensor] | None) -> Tensor:
        return a if pair is None else a @ pair[0].T + pair[1]

    def norm(a: Tensor, pair: tuple[Tensor, Tensor] | None) -> Tensor:
        centred = a - a.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled if pair is None else scaled * pair[0] + pair[1]

    count, tokens, _ = x.shape
    embeddings = added.to(torch.float64)
    h = linear(x.to(torch.float64), project_in) + torch.where(available[..., None], embeddings[:, 1], embeddings[:, 0])
    for norm1, into, out_of, norm2, first, second in zip(*[iter(middle)] * 6, strict=True):
        q, k, v = linear(norm(h, norm1), into).reshape(count, tokens, 3, heads, h.shape[-1] // heads).unbind(2)
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)
        h = h + linear(mixed.flatten(2), out_of)
        a = linear(norm(h, norm2), first)
        h = h + linear(0.5 * a * (1.0 + torch.erf(a / math.sqrt(2.0))), second)
    return torch.where(available[..., None], 0.0, linear(norm(h, last_norm), project_out))


def conv_gelu_conv(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, approximate: str = "none"
) -> Tensor:
    """Conv1D → GELU → Conv1D with same padding on ``x [B, L, C]``; see :func:`modafill.ops.conv_gelu_conv`."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taps = weight.shape[-1]
        windows = torch.nn.functional.pad(x, (0, 0, taps // 2, taps // 2)).unfold(1, taps, 1)
        out = torch.einsum("blct,oct->blo", windows, weight.to(torch.float64))
        return out if bias is None else out + bias.to(torch.float64)

    a = convolve(x.to(torch.float64), w1, b1)
    if approximate == "tanh":
        h = 0.5 * a * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * a**3)))
    else:
        h = 0.5 * a * (1.0 + torch.erf(a / math.sqrt(2.0)))
    return convolve(h, w2, b2)
