"""The strong simple rival: a linear model of the observed features, one per pattern."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_absolute_error
from threadpoolctl import threadpool_limits
from torch import Tensor

from modafill.data import FeatureStore, Standardizer, valid_steps
from modafill.training.part import PartTrainer

# From strong to weak.
_CLASSIFIER_STRENGTHS = (1e-4, 1e-3, 0.01, 0.1, 1, 10)
_RIDGE_PENALTIES = (1e5, 1e4, 1e3, 100.0, 10.0, 1.0)


class LinearModel:
    """Logistic regression of classes, ridge regression of scores, on the standardised features that are observed.

    Sequences enter as their mean over time, windows of turns as the last turn beside the mean of all. The penalty is
    the best on validation, by log-loss or mean absolute error.
    """

    def __init__(self, trainer: PartTrainer) -> None:
        self.trainer = trainer
        statistics = Standardizer.fit(trainer.store, trainer.split.train, clip=10.0)
        self.features = _summaries(trainer.store, statistics)

    @property
    def name(self) -> str:
        """What the tables call it."""
        return "ridge regression" if self.trainer.labels.regression else "logistic regression"

    def answer(self, pattern: Tensor, rows: Tensor) -> Tensor:
        """Class probabilities or scores of ``rows`` by the model that reads ``pattern [M]``."""
        t = self.trainer
        x = torch.cat([self.features[name] for name, seen in zip(t.names, pattern, strict=True) if seen], 1).numpy()
        y = t.target.cpu().numpy()
        train, valid = (part[t.available[part][:, pattern].all(1).numpy()] for part in (t.split.train, t.split.valid))
        candidates: list[Any] = (
            [Ridge(alpha=penalty) for penalty in _RIDGE_PENALTIES]
            if t.labels.regression
            else [LogisticRegression(C=strength, max_iter=1000) for strength in _CLASSIFIER_STRENGTHS]
        )

        def predict(model: Any, part: np.ndarray) -> np.ndarray:
            if t.labels.regression:
                return model.predict(x[part]).astype(np.float32)
            out = np.zeros((len(part), t.labels.n_classes), dtype=np.float32)
            out[:, model.classes_] = model.predict_proba(x[part])
            return out

        models: list[tuple[float, Any]] = []
        for model in candidates:
            # BLAS threads would wait for each other, for minutes where another program has a core.
            with threadpool_limits(1):
                model.fit(x[train], y[train])
            predicted = predict(model, valid)
            if t.labels.regression:
                loss = float(mean_absolute_error(y[valid], predicted))
            else:
                loss = log_loss(y[valid], predicted, labels=list(range(t.labels.n_classes)))
            models.append((loss, model))
            # Once the loss is clearly worse, weaker ones only over-fit more, and converge slowly.
            if loss > 1.01 * min(models, key=itemgetter(0))[0]:
                break
        best = min(models, key=itemgetter(0))[1]
        return torch.from_numpy(predict(best, rows.cpu().numpy())).to(t.device)


def _summaries(store: FeatureStore, statistics: Standardizer) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {name: [] for name in store.modalities}
    for batch in store.iter_batches(np.arange(len(store)), 1024):
        batch = statistics.transform(batch)
        for m, (name, x) in enumerate(batch.features.items()):
            if x.ndim == 3:
                count = valid_steps(batch, m).sum(1, keepdim=True).clamp(min=1)
                mean = x.sum(1) / count
                last = x.gather(1, (count - 1)[..., None].expand(-1, 1, x.shape[2])).squeeze(1)
                x = torch.cat([last, mean], dim=1) if store.window else mean
            parts[name].append(x)
    return {name: torch.cat(p).to(torch.float32) for name, p in parts.items()}
