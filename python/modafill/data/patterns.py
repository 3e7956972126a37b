"""Missing patterns: which modalities of a sample are observed; their numbering, names and random draws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

MAX_MODALITIES = 16


def missing_patterns(n_modalities: int) -> Tensor:
    """Every incomplete pattern that leaves at least one modality observed.

    Ordered by the number of missing modalities, then lexicographically by their indices: for (text, audio, vision) rows
    0–5 are the papers' modes with {t}, {a}, {v}, {t,a}, {t,v}, {a,v} missing.

    Returns:
        bool ``[2^M - 2, M]``, True = observed.
    """
    return all_patterns(n_modalities)[:-1]


def all_patterns(n_modalities: int) -> Tensor:
    """:func:`missing_patterns` with the complete pattern as the last row: bool ``[2^M - 1, M]``, True = observed."""
    if not 2 <= n_modalities <= MAX_MODALITIES:
        raise ValueError(f"n_modalities: got {n_modalities}, expected 2…{MAX_MODALITIES}")
    table = torch.ones(2**n_modalities - 1, n_modalities, dtype=torch.bool)
    missing = (c for k in range(1, n_modalities) for c in combinations(range(n_modalities), k))
    for row, indices in enumerate(missing):
        table[row, list(indices)] = False
    return table


@lru_cache(maxsize=MAX_MODALITIES)
def _index_by_bits(n_modalities: int) -> Tensor:
    patterns = all_patterns(n_modalities)
    index = torch.full((2**n_modalities,), -1, dtype=torch.int64)
    index[patterns.long() @ (1 << torch.arange(n_modalities))] = torch.arange(len(patterns))
    return index


def pattern_index(available: Tensor) -> Tensor:
    """The row of :func:`all_patterns` that each sample's availability is.

    Args:
        available: bool ``[B, M]``, True = observed.

    Returns:
        int64 ``[B]`` on the same device; the complete pattern has the largest index, ``2^M - 2``.

    Raises:
        ValueError: a row has nothing observed (the message names the rows).
    """
    check_available("available", available)
    bits = (available.long() << torch.arange(available.shape[1], device=available.device)).sum(1)
    if not bool(bits.all()):
        raise ValueError(f"available: nothing is observed in {name_rows((bits == 0).nonzero()[:, 0].tolist())}")
    return _index_by_bits(available.shape[1]).to(available.device)[bits]


def pattern_name(row: Tensor | Sequence[bool], modalities: Sequence[str]) -> str:
    """The name of a pattern by what it observes: ``{at}`` is audio and text.

    Initials in alphabetical order, as in ADMC's tables; where two modalities share an initial, full names joined by
    ``+``.
    """
    if len(row) != len(modalities):
        raise ValueError(f"row: got {len(row)} entries, expected {len(modalities)}, one for each of {list(modalities)}")
    observed = [name for name, seen in zip(modalities, row, strict=True) if bool(seen)]
    if len({name[0] for name in modalities}) == len(modalities):
        return "{" + "".join(sorted(name[0] for name in observed)) + "}"
    return "{" + "+".join(sorted(observed)) + "}"


def random_available(
    row_id: Tensor,
    n_modalities: int,
    *,
    seed: int,
    draw: int = 0,
    drop_rate: float = 1.0,
    available: Tensor | None = None,
) -> Tensor:
    """A random missing pattern for each sample, a function of (seed, draw, row id) alone.

    With probability ``drop_rate`` a row gets one of the incomplete, non-empty patterns, each as likely as the others;
    otherwise nothing is hidden. The result does not depend on the batch a row comes in, and torch's generator is
    untouched.

    Args:
        row_id: int64 ``[B]``.
        n_modalities: M.
        seed: any integer; its low 64 bits count.
        draw: the number of the draw, such as the epoch.
        drop_rate: probability that something is hidden, in [0, 1].
        available: bool ``[B, M]``, what there is to choose from (default: everything). A row with one observed modality
            keeps it.

    Returns:
        bool ``[B, M]`` on ``row_id``'s device, a subset of ``available``.
    """
    if row_id.ndim != 1 or row_id.dtype != torch.int64:
        raise ValueError(f"row_id: got {row_id.dtype} {list(row_id.shape)}, expected int64 [B]")
    if not 2 <= n_modalities <= MAX_MODALITIES:
        raise ValueError(f"n_modalities: got {n_modalities}, expected 2…{MAX_MODALITIES}")
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate: got {drop_rate}, expected a probability")
    rows = row_id.cpu().numpy().astype(np.uint64)
    if available is None:
        present = np.ones((len(rows), n_modalities), dtype=bool)
    else:
        check_available("available", available, (len(rows), n_modalities))
        present = available.cpu().numpy()
    word = _words(rows, seed, draw)
    hide = _as_uniform(word) < drop_rate
    # 1 … 2^k - 2 are the non-empty proper subsets of k modalities; the remainder's bias is below 2^-47.
    n_subsets = np.maximum((1 << present.sum(1)) - 2, 1).astype(np.uint64)
    subset = (_mix(word) % n_subsets).astype(np.int64) + 1
    bit = np.maximum(present.cumsum(1) - 1, 0)
    chosen = present & ((subset[:, None] >> bit) & 1).astype(bool)
    return torch.from_numpy(np.where(hide[:, None], chosen, present)).to(row_id.device)


def uniform(row_id: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """A number in [0, 1) for each row id ``[B]``, a function of it, the seed and the number of the draw alone."""
    return _as_uniform(_words(row_id.astype(np.uint64), seed, draw))


_WORD = 2**64 - 1


def _words(rows: np.ndarray, seed: int, draw: int) -> np.ndarray:
    key = _mix(_mix(np.array([seed & _WORD], np.uint64)) ^ np.array([draw & _WORD], np.uint64))
    return _mix(key ^ rows)


def _as_uniform(word: np.ndarray) -> np.ndarray:
    return (word >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea & Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_available(name: str, available: Tensor, shape: tuple[int, int] | None = None) -> None:
    """Raise ValueError unless ``available`` is bool ``[B, M]`` (of the given shape)."""
    fits = available.ndim == 2 and (shape is None or tuple(available.shape) == shape)
    if available.dtype != torch.bool or not fits:
        expected = list(shape) if shape else "[B, M]"
        raise ValueError(f"{name}: got {available.dtype} {list(available.shape)}, expected torch.bool {expected}")


def name_rows(rows: Sequence[int], what: str = "row") -> str:
    """``row 3`` or ``rows 3, 5, 7 … (12 in all)`` for messages."""
    shown = ", ".join(str(r) for r in rows[:8])
    return (
        f"{what} {shown}"
        if len(rows) == 1
        else f"{what}s {shown}" + (f" … ({len(rows)} in all)" if len(rows) > 8 else "")
    )
