"""Transformers over a few tokens, inputs for them, and what PyTorch's own modules say of these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modafill.ops import TokenNetwork

# channels, heads, hidden, width of the tokens: vectors of every length, whole and in part.
SIZES = {"odd": (20, 5, 52, 24), "projected": (96, 4, 192, 64), "narrow": (20, 5, 52, 20), "direct": (64, 8, 112, 64)}


def modules(size: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> tuple[nn.Module, nn.Module, nn.Module]:
    channels, heads, hidden, width = SIZES[size]
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(
        channels, heads, hidden, dropout=0.3, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(channels, eps=1e-3), enable_nested_tensor=False)
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
            module.eps = 1e-3
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_bias)
            nn.init.normal_(module.out_proj.bias)
    into = nn.Identity() if channels == width else nn.Linear(width, channels)
    return tuple(m.to(dtype).eval() for m in (encoder, nn.Linear(channels, width), into))


def network(
    size: str, dtype: torch.dtype = torch.float32, weights: torch.dtype | None = None, device: str = "cpu"
) -> TokenNetwork:
    encoder, out, into = (m.to(device) for m in modules(size, dtype))
    return TokenNetwork(encoder, out, None if isinstance(into, nn.Identity) else into, weights)


def inputs(size: str, rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    channels, _, _, width = SIZES[size]
    available = torch.rand(rows, tokens, generator=generator) < 0.5
    x = torch.randn(rows, tokens, width, generator=generator, dtype=torch.float64)
    added = torch.randn(tokens, 2, channels, generator=generator, dtype=torch.float64)
    return x.to(dtype), available, added.to(dtype)


def by_torch(size: str, x: Tensor, available: Tensor, added: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's own modules, asked for every token."""
    encoder, out, into = modules(size, dtype)
    with torch.no_grad():
        h = into(x.to(dtype)) + added.to(dtype)[torch.arange(x.shape[1]), available.long()]
        return out(encoder(h)).masked_fill(available[..., None], 0.0)
