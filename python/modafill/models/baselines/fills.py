"""Completions of tokens ``[B, M, D]`` without a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from torch import Tensor

from modafill import ops
from modafill.data import missing_patterns, pattern_index
from modafill.diffusion import sample_row_ids


class _ConstantFill:
    def __init__(self, constant: Tensor) -> None:
        self.constant = constant

    def point(self, tokens: Tensor, available: Tensor) -> Tensor:
        """Tokens with the constant ``[M, D]`` in place of the missing ones."""
        return torch.where(available[..., None], tokens, self.constant)

    def sample(self, tokens: Tensor, available: Tensor, n_samples: int, seed: int, row_id: Tensor) -> Tensor:
        """K equal completions ``[K, B, M, D]``: a constant claims to be certain."""
        return self.point(tokens, available).expand(n_samples, *tokens.shape)


class ZeroFill(_ConstantFill):
    """Missing embeddings become zero vectors ("w/o ADN"); ``mean, std [M, D]`` are those of the tokens' scaler."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__(-mean / std)


class MeanFill(_ConstantFill):
    """Missing tokens become the mean of the training tokens ``[N, M, D]``."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__(tokens.mean(0))


class RidgeFill:
    """Ridge regression from the observed to the missing tokens, one per pattern, with Gaussian residuals.

    The penalty is the best on the validation part, where the residuals' standard deviation is taken too.

    Args:
        tokens, valid_tokens: complete rows ``[N, M, D]`` of the training and validation parts.
        penalties: grid of ridge penalties.
        valid_real: bool like ``valid_tokens``, which of their elements are no padding; errors are of these alone.
    """

    def __init__(
        self,
        tokens: Tensor,
        valid_tokens: Tensor,
        penalties: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4),
        valid_real: Tensor | None = None,
    ) -> None:
        self.patterns = missing_patterns(tokens.shape[1])
        self.models: list[Ridge | _DualRidge] = []
        self.spreads: list[Tensor] = []
        for pattern in self.patterns:
            x, y = tokens[:, pattern].flatten(1).numpy(), tokens[:, ~pattern].flatten(1).numpy()
            x_valid, y_valid = valid_tokens[:, pattern].flatten(1).numpy(), valid_tokens[:, ~pattern].flatten(1).numpy()
            padding: Any = np.ma.nomask if valid_real is None else ~valid_real[:, ~pattern].flatten(1).numpy()
            best: tuple[float, Ridge | _DualRidge, np.ndarray] | None = None
            for penalty in penalties:
                model = _ridge(penalty, x, y)
                residuals = np.ma.masked_array(y_valid - model.predict(x_valid), padding)
                error = float((residuals**2).mean())
                if best is None or error < best[0]:
                    best = error, model, residuals.std(0).filled(0.0)
            assert best is not None
            self.models.append(best[1])
            self.spreads.append(torch.from_numpy(best[2]))

    def point(self, tokens: Tensor, available: Tensor) -> Tensor:
        """Tokens with the regression's prediction in place of the missing ones."""
        return self._fill(tokens, available, None)

    def sample(self, tokens: Tensor, available: Tensor, n_samples: int, seed: int, row_id: Tensor) -> Tensor:
        """K completions ``[K, B, M, D]``: prediction plus independent Gaussian residuals."""
        noise = ops.randn(
            (n_samples * len(tokens), *tokens.shape[1:]),
            seed=seed,
            row_id=sample_row_ids(row_id, n_samples),
            device=tokens.device,
        )
        noise = noise.reshape(n_samples, *tokens.shape)
        return torch.stack([self._fill(tokens, available, z) for z in noise])

    def _fill(self, tokens: Tensor, available: Tensor, noise: Tensor | None) -> Tensor:
        out = torch.where(available[..., None], tokens, 0.0)
        pattern = pattern_index(available)
        for index, (mask, model, spread) in enumerate(zip(self.patterns, self.models, self.spreads, strict=True)):
            rows = (pattern == index).nonzero().flatten()
            if len(rows) == 0:
                continue
            missing = (~mask).nonzero().flatten().to(tokens.device)
            filled = torch.from_numpy(model.predict(tokens[rows][:, mask].flatten(1).cpu().numpy())).to(tokens)
            if noise is not None:
                filled = filled + spread.to(tokens) * noise[rows][:, missing].flatten(1)
            out[rows[:, None], missing] = filled.reshape(len(rows), len(missing), -1)
        return out


class _DualRidge:
    """Ridge regression that keeps a weight per training row: for fewer rows than features."""

    def __init__(self, penalty: float, x: np.ndarray, y: np.ndarray) -> None:
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        self.dual = KernelRidge(alpha=penalty, kernel="linear").fit(x - self.x_mean, y - self.y_mean)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.dual.predict(x - self.x_mean) + self.y_mean


def _ridge(penalty: float, x: np.ndarray, y: np.ndarray) -> Ridge | _DualRidge:
    return Ridge(alpha=penalty).fit(x, y) if x.shape[1] <= len(x) else _DualRidge(penalty, x, y)
