import json

import numpy as np
import pytest

from modafill.data import Labels

ALL = np.arange(6)


def test_integer_classes() -> None:
    labels = Labels.fit({"name": "y", "kind": "class"}, np.array([5, -1, 5, 3, 3, 3]), ALL)
    assert labels.values == (-1, 3, 5)
    assert labels.n_classes == 3
    assert labels.class_names == ("-1", "3", "5")
    encoded = labels.encode(np.array([[3.0], [5.0]]))
    assert encoded.tolist() == [1, 2]
    assert encoded.dtype == np.int64


def test_string_classes() -> None:
    values = np.array(["joy", "anger", "joy", "fear", "anger", "joy"], dtype=object)
    labels = Labels.fit({"name": "y", "kind": "class"}, values, ALL)
    assert labels.class_names == ("anger", "fear", "joy")
    assert labels.encode(values).tolist() == [2, 0, 2, 1, 0, 2]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_quantiles_of_the_training_part(k: int) -> None:
    values = np.random.default_rng(0).normal(size=1000)
    train = np.arange(0, 1000, 3)
    labels = Labels.fit({"name": "y", "kind": "quantiles", "classes": k}, values, train)
    np.testing.assert_allclose(labels.thresholds, np.quantile(values[train], [i / k for i in range(1, k)]))
    expected = [sum(v > t for t in labels.thresholds) for v in values]
    assert labels.encode(values).tolist() == expected
    assert labels.n_classes == len(labels.class_names) == k
    balance = np.bincount(labels.encode(values[train])) / len(train)
    np.testing.assert_allclose(balance, 1 / k, atol=0.01)


def test_scores_are_rounded_first_and_ties_go_down() -> None:
    values = np.array([1.04, 0.96, 2.0, 2.04, 3.0, 2.96], dtype=np.float32)
    labels = Labels.fit({"name": "y", "kind": "quantiles", "classes": 3, "round": 1}, values, ALL)
    assert labels.encode(values).tolist() == [0, 0, 1, 1, 2, 2]
    at_threshold = Labels("y", "quantiles", thresholds=(5.0, 5.8), decimals=1)
    assert at_threshold.encode(np.float32([5.0, 5.04, 5.1, 5.8, 5.9])).tolist() == [0, 0, 1, 1, 2]
    assert at_threshold.class_names == ("≤5", "5–5.8", ">5.8")


def test_scores_are_numbers() -> None:
    spec = {"name": "y", "kind": "score", "sentiment": True}
    labels = Labels.fit(spec, np.array([1.5, -2.0, 0.25, 3.0]), np.array([0, 1]))
    assert (labels.regression, labels.sentiment, labels.n_classes, labels.class_names) == (True, True, 0, ())
    found = labels.encode(np.array([0.1, -3.0]))
    assert found.dtype == np.float32
    assert found.tolist() == np.float32([0.1, -3.0]).tolist()


@pytest.mark.parametrize(
    "spec, values",
    [
        ({"name": "y", "kind": "score"}, np.arange(6.0)),
        ({"name": "y", "kind": "class"}, np.array(list("abcabc"))),
        ({"name": "y", "kind": "class"}, np.array([1, 2, 3] * 2)),
        ({"name": "y", "kind": "quantiles", "classes": 2, "round": 0}, np.arange(6.0)),
    ],
)
def test_dict_round_trip(spec: dict[str, object], values: np.ndarray) -> None:
    labels = Labels.fit(spec, values, ALL)
    again = Labels.from_dict(json.loads(json.dumps(labels.to_dict())))
    assert again == labels
    assert again.encode(values).tolist() == labels.encode(values).tolist()


SCORE = {"name": "y", "kind": "score"}
CLASS, QUANTILES = {"name": "y", "kind": "class"}, {"name": "y", "kind": "quantiles", "classes": 2}


@pytest.mark.parametrize(
    "spec, values, train, message",
    [
        (CLASS, [0, 1, 2], [0, 1], r"label 'y': got 2, expected the training part's \[0, 1\]"),
        (CLASS, ["a", "b", "c"], [0, 1], r"got 'c', expected"),
        (CLASS, [0, 1, np.nan], [0, 1], "NaN in 1 samples, the first in row 2"),
        (QUANTILES, [0, 1, np.nan], [0, 1], "NaN in 1 samples"),
        (CLASS, [0.5, 1, 2], [0, 1], "got 0.5, expected integers of 64 bits or strings"),
        (CLASS, [0, 1, np.inf], [0, 1], "got inf, expected integers"),
        (CLASS, [0, 1, 2.0**63], [0, 1], "got 9.2.*e.18, expected integers"),
        (CLASS, np.array([0, 1, 2**63], dtype=np.uint64), [0, 1], "got 9223372036854775808, expected integers"),
        (CLASS, [1j, 2j], [0, 1], "got complex128, expected integers"),
        (QUANTILES, [1.0, 2.0, np.inf], [0, 1], "got infinity, expected finite scores"),
        (CLASS, [1, 1, 1], [0, 1], "only the class 1"),
        (CLASS, [[0, 1], [1, 0]], [0, 1], r"got shape \(2, 2\)"),
        (CLASS, [0, 1], [], "training part is empty"),
        (QUANTILES, ["a", "b"], [0, 1], "expected numbers"),
        (QUANTILES, [1.0, 1.0, 1.0], [0, 1, 2], r"training counts \[3, 0\]"),
        ({"name": "y", "kind": "regression"}, [0, 1], [0], "got kind 'regression'"),
        ({"name": "y", "kind": "quantiles"}, [0, 1], [0], "got classes None"),
        (SCORE, [1.0, 1.0, 2.0], [0, 1], "every training sample has the score 1.0"),
        (SCORE, [1.0, 2.0, np.inf], [0, 1], "got infinity, expected finite scores"),
        (SCORE, ["a", "b"], [0, 1], "expected numbers"),
        ({**SCORE, "sentiment": 3}, [0, 1], [0], "got sentiment 3, expected true or false"),
        ({**CLASS, "sentiment": True}, [0, 1], [0], r"got the keys \['sentiment'\]"),
        ({**QUANTILES, "thresholds": [1]}, [0, 1], [0], r"got the keys \['thresholds'\]"),
    ],
)
def test_errors(spec: dict[str, object], values: list[object], train: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labels.fit(spec, np.array(values), np.array(train, dtype=int))
