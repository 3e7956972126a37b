"""Labels: given classes, quantiles of a score with thresholds from the training part, or the score itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

KINDS = ("class", "quantiles", "score")
MAX_QUANTILES = 1000


def check_label_spec(spec: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``spec`` is a label specification (see :meth:`Labels.fit`)."""
    kind = spec.get("kind")
    if kind not in KINDS:
        raise ValueError(f"label: got kind {kind!r}, expected one of {list(KINDS)}")
    allowed = {"name", "kind", *{"quantiles": ("classes", "round"), "score": ("sentiment",)}.get(kind, ())}
    if set(spec) - allowed:
        raise ValueError(f"label: got the keys {sorted(set(spec) - allowed)}, expected only {sorted(allowed)}")
    if not isinstance(spec.get("sentiment", False), bool):
        raise ValueError(f"label: got sentiment {spec['sentiment']!r}, expected true or false")
    k = spec.get("classes")
    if kind == "quantiles" and (type(k) is not int or not 2 <= k <= MAX_QUANTILES):
        raise ValueError(f"label: got classes {k!r}, expected 2 to {MAX_QUANTILES} quantiles")
    decimals = spec.get("round")
    if decimals is not None and (type(decimals) is not int or not -15 <= decimals <= 15):
        raise ValueError(f"label: got round {decimals!r}, expected a whole number of decimals from -15 to 15")


@dataclass(frozen=True)
class Labels:
    """A fitted rule from label values to classes 0 … n_classes - 1, or to numbers (``"score"``).

    Attributes:
        name: the label column.
        kind: ``"class"``, ``"quantiles"`` or ``"score"``.
        values: the class values in order (``"class"``), integers or strings.
        thresholds: k - 1 rising thresholds (``"quantiles"``); a value equal to a threshold belongs to the class below.
        decimals: to how many decimals a score is rounded first, or None.
        sentiment: the score is an intensity in −3…3 whose sign counts, as in CMU-MOSI.
    """

    name: str
    kind: str
    values: tuple[int | str, ...] = ()
    thresholds: tuple[float, ...] = ()
    decimals: int | None = None
    sentiment: bool = False

    @classmethod
    def fit(cls, spec: Mapping[str, Any], values: np.ndarray, train_rows: np.ndarray) -> Labels:
        """Fit the rule on the training part and check that every value can be encoded.

        Args:
            spec: ``{"name": …, "kind": "class"}`` for integers or strings, or ``{"name": …, "kind": "quantiles",
                "classes": k, "round": decimals}`` for a score, where ``round`` may be left out, or ``{"name": …,
                "kind": "score"}`` to predict it as a number, with ``"sentiment": true`` for intensities in −3…3.
            values: ``[N]``, all labels.
            train_rows: ints, the training part.

        Raises:
            ValueError: malformed specification, NaN, a value outside the training part's classes, fewer than two
                classes, a quantile class that no training sample falls into, or scores that are all the same.
        """
        check_label_spec(spec)
        name, kind = str(spec.get("name", "label")), spec["kind"]
        train = _flat(name, values)[np.asarray(train_rows)]
        if not len(train):
            raise ValueError(f"label {name!r}: the training part is empty")
        if kind == "class":
            fitted = cls(name, kind, values=tuple(np.unique(_as_classes(name, train)).tolist()))
            if fitted.n_classes < 2:
                raise ValueError(f"label {name!r}: the training part has only the class {fitted.values[0]!r}")
        elif kind == "score":
            fitted = cls(name, kind, sentiment=spec.get("sentiment", False))
            if len(np.unique(_as_scores(name, train, None))) < 2:
                raise ValueError(f"label {name!r}: every training sample has the score {train[0]}")
        else:
            decimals, k = spec.get("round"), spec["classes"]
            scores = _as_scores(name, train, decimals)
            thresholds = np.quantile(scores, np.arange(1, k) / k)
            fitted = cls(name, kind, thresholds=tuple(thresholds.tolist()), decimals=decimals)
            counts = np.bincount(fitted.encode(train), minlength=k)
            if not counts.all():
                raise ValueError(f"label {name!r}: {k} quantiles give the training counts {counts.tolist()}, one is 0")
        fitted.encode(values)
        return fitted

    @property
    def regression(self) -> bool:
        """Whether a number is to be predicted, not a class."""
        return self.kind == "score"

    @property
    def n_classes(self) -> int:
        """0 where a number is to be predicted."""
        return {"class": len(self.values), "quantiles": len(self.thresholds) + 1, "score": 0}[self.kind]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The values as strings; for quantiles ``≤5``, ``5–5.8`` (5 left out), ``>5.8``; none for a score."""
        if self.regression:
            return ()
        if self.kind == "class":
            return tuple(str(value) for value in self.values)
        at = [f"{threshold:.4g}" for threshold in self.thresholds]
        return (f"≤{at[0]}", *(f"{low}–{high}" for low, high in pairwise(at)), f">{at[-1]}")

    def encode(self, values: np.ndarray) -> np.ndarray:
        """The classes of label values, int64 ``[n]``, or their scores, float32 ``[n]``.

        Raises:
            ValueError: NaN, an infinite score, or a value that is none of the classes.
        """
        flat = _flat(self.name, values)
        if self.regression:
            return _as_scores(self.name, flat, None).astype(np.float32)
        if self.kind == "quantiles":
            return np.searchsorted(self.thresholds, _as_scores(self.name, flat, self.decimals), side="left")
        classes = _as_classes(self.name, flat)
        number = {value: i for i, value in enumerate(self.values)}
        unknown = [value for value in np.unique(classes).tolist() if value not in number]
        if unknown:
            shown = ", ".join(map(repr, unknown[:5]))
            raise ValueError(f"label {self.name!r}: got {shown}, expected the training part's {list(self.values)}")
        return np.array([number[value] for value in classes.tolist()], dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; :meth:`from_dict` reads it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "values": list(self.values),
            "thresholds": list(self.thresholds),
            "decimals": self.decimals,
            "sentiment": self.sentiment,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Labels:
        """The rule that :meth:`to_dict` described."""
        values, thresholds = tuple(state["values"]), tuple(state["thresholds"])
        return cls(state["name"], state["kind"], values, thresholds, state["decimals"], state["sentiment"])


def _flat(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"label {name!r}: got shape {array.shape}, expected one value per sample")
    if array.dtype.kind == "f" and np.isnan(array).any():
        rows = np.flatnonzero(np.isnan(array))
        raise ValueError(f"label {name!r}: got NaN in {len(rows)} samples, the first in row {rows[0]}")
    return array


def _as_classes(name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind in "UO":
        return values.astype(str)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"label {name!r}: got {values.dtype}, expected integers or strings as classes")
    with np.errstate(invalid="ignore"):
        classes = values.astype(np.int64)
    if (wrong := classes != values).any():
        raise ValueError(f"label {name!r}: got {values[wrong][0]}, expected integers of 64 bits or strings as classes")
    return classes


def _as_scores(name: str, values: np.ndarray, decimals: int | None) -> np.ndarray:
    if values.dtype.kind not in "biuf":
        raise ValueError(f"label {name!r}: got {values.dtype}, expected numbers")
    scores = values.astype(np.float64)
    with np.errstate(over="ignore"):
        if not np.isfinite(scores.astype(np.float32)).all():
            raise ValueError(f"label {name!r}: got infinity, expected finite scores")
    return scores if decimals is None else np.round(scores, decimals)
