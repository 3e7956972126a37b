"""The imputer as a step of a scikit-learn pipeline."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from modafill.data import StoreWriter
from modafill.imputer import ModalityImputer

_ROWS_AT_A_TIME = 1024


class ModalityTransformer(TransformerMixin, BaseEstimator):
    """Completed embeddings of rows that lack modalities.

    A row of the input holds the features of all modalities side by side; a modality that the row lacks is NaN in all
    its columns. A row of the output holds their embeddings side by side, what is missing generated.

    Args:
        widths: modality → columns, in their order.
        imputer: a trained one of vector modalities; None trains an ADMC on what :meth:`fit` gets, with classes as ``y``
            (a fifth of the rows is held out, as by ``modafill train``).
        preset: of that training: ``"small"`` (minutes on two CPU cores) or ``"paper"``.
        n_samples: completions per row, averaged.
        random_state: of weights, order and noise; the noise of a row depends on this and its number in ``X`` alone.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        imputer: ModalityImputer | None = None,
        *,
        preset: str = "small",
        n_samples: int = 1,
        random_state: int = 0,
    ) -> None:
        self.widths = widths
        self.imputer = imputer
        self.preset = preset
        self.n_samples = n_samples
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> ModalityTransformer:
        """Check ``X [N, ΣD]``, and train on it with classes ``y [N]`` unless there is an imputer.

        Raises:
            ValueError: widths that do not fit, a modality that is NaN in part, infinity, a row of NaN alone, or no
                classes to train with.
        """
        if self.imputer is not None:
            expected = {name: spec.width for name, spec in self.imputer.model.modalities.items()}
            if list(self.widths.items()) != list(expected.items()):
                raise ValueError(f"widths: got {dict(self.widths)}, expected {expected}, in the imputer's order")
        features, available = self._modalities(X, reset=True)
        if self.imputer is not None:
            self.imputer_ = self.imputer
            return self
        if y is None:
            raise ValueError("y: got None, expected classes to train the encoders with, or an imputer")
        with tempfile.TemporaryDirectory() as folder:
            path, names = Path(folder) / "rows.h5", list(self.widths)
            with StoreWriter(
                path,
                modalities=names,
                widths=dict(self.widths),
                kinds=dict.fromkeys(names, "vector"),
                task={"label": {"name": "y", "kind": "class"}},
            ) as writer:
                writer.append(
                    {name: x.numpy() for name, x in features.items()},
                    available=available.numpy(),
                    labels={"y": np.asarray(y)},
                )
            self.imputer_ = ModalityImputer.fit(path, preset=self.preset, seed=self.random_state)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Embeddings float32 ``[N, M · width]`` of ``X [N, ΣD]``."""
        check_is_fitted(self, "imputer_")
        features, available = self._modalities(X, reset=False)
        device, rows = next(self.imputer_.parameters()).device, torch.arange(len(available))
        parts = []
        for part in rows.split(_ROWS_AT_A_TIME):
            done = self.imputer_(
                {name: x[part].to(device) for name, x in features.items()},
                available[part].to(device),
                n_samples=self.n_samples,
                seed=self.random_state,
                row_ids=part.to(device),
            )
            parts.append(torch.cat(list(done.embeddings.values()), dim=1).cpu())
        return torch.cat(parts).numpy()

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """``text_0``, ``text_1``, … of each modality."""
        check_is_fitted(self, "imputer_")
        width = self.imputer_.model.config.width
        return np.array([f"{name}_{i}" for name in self.widths for i in range(width)], dtype=object)

    def _modalities(self, X: Any, *, reset: bool) -> tuple[dict[str, Tensor], Tensor]:
        rows = validate_data(self, X, reset=reset, dtype=np.float32, ensure_all_finite=False, ensure_min_samples=0)
        total = sum(self.widths.values())
        if rows.ndim != 2 or rows.shape[1] != total or not len(rows):
            raise ValueError(f"X: got shape {list(rows.shape)}, expected [N, {total}] with at least one row")
        features, available = {}, []
        for name, block in zip(
            self.widths, np.split(rows, np.cumsum(list(self.widths.values()))[:-1], axis=1), strict=True
        ):
            absent = np.isnan(block)
            partly = np.flatnonzero(absent.any(1) & ~absent.all(1))
            if len(partly):
                raise ValueError(f"X: {name} is NaN in part in row {partly[0]}, expected all of its columns or none")
            if np.isinf(block).any():
                raise ValueError(f"X: {name} has infinity in row {np.flatnonzero(np.isinf(block).any(1))[0]}")
            features[name] = torch.from_numpy(np.ascontiguousarray(block))
            available.append(torch.from_numpy(~absent.all(1)))
        seen = torch.stack(available, dim=1)
        if not bool(seen.any(1).all()):
            row = int((~seen.any(1)).nonzero()[0])
            raise ValueError(f"X: nothing is observed in row {row}, expected at least one modality")
        return features, seen
