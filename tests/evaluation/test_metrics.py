"""Metrics against scikit-learn, closed forms and loops."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

from modafill.evaluation.metrics import crps, nrmse, recognition, sentiment


@pytest.mark.parametrize("classes, n, seed", [(2, 40, 0), (3, 200, 1), (7, 60, 2)])
def test_recognition(classes, n, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (n,), generator=generator).pow(2) // max(1, classes - 1)  # unbalanced
    target[:classes] = torch.arange(classes)
    probabilities = torch.rand(n, classes, generator=generator).softmax(1)
    predicted, exact = probabilities.argmax(1), probabilities.double()
    got = recognition(probabilities, target)
    assert got == pytest.approx(
        {
            "WA": accuracy_score(target, predicted),
            "UA": recall_score(target, predicted, average="macro", zero_division=0),
            "F1": f1_score(target, predicted, average="macro", zero_division=0),
            "F1 weighted": f1_score(target, predicted, average="weighted", zero_division=0),
            "NLL": log_loss(target, exact / exact.sum(1, keepdim=True), labels=range(classes)),
        },
        abs=1e-6,
    )
    assert len(set(got.values())) == 5


def test_recognition_by_hand():
    # Class 0: 3 of 4 right, class 1: 1 of 2 right.
    probabilities = torch.eye(2)[torch.tensor([0, 0, 0, 1, 1, 0])]
    got = recognition(probabilities, torch.tensor([0, 0, 0, 0, 1, 1]))
    certain_and_wrong = -math.log(2**-23) * 2 / 6
    expected = {"WA": 4 / 6, "UA": (3 / 4 + 1 / 2) / 2, "F1": (6 / 8 + 2 / 4) / 2, "NLL": certain_and_wrong}
    expected["F1 weighted"] = (4 * 6 / 8 + 2 * 2 / 4) / 6
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_not_recognised(value):
    with pytest.raises(ValueError, match="probabilities: got NaN or infinity"):
        recognition(torch.tensor([[0.5, 0.5], [value, 0.1]]), torch.tensor([0, 0]))


def test_nrmse_by_hand():
    estimate, truth = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert nrmse(estimate, truth, 2.0) == pytest.approx(math.sqrt((4 + 9) / 4) / 2)
    assert nrmse(truth, truth, 1.0) == 0


@pytest.mark.parametrize("k", [2, 3, 8])
def test_crps_by_a_double_loop(k):
    samples, truth = torch.randn(k, 5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    error = sum((samples[i] - truth).abs().mean() for i in range(k)) / k
    pairs = sum((samples[i] - samples[j]).abs().mean() for i in range(k) for j in range(k)) / (k * (k - 1))
    assert crps(samples, truth, 0.5) == pytest.approx(float(error - pairs / 2) / 0.5, rel=1e-12)


@pytest.mark.parametrize("mean, std, y", [(0.0, 1.0, 0.3), (2.0, 0.5, 0.0), (-1.0, 3.0, 4.0)])
def test_crps_of_a_gaussian(mean, std, y):
    k = 200_000
    samples = mean + std * torch.from_numpy(np.random.default_rng(0).normal(size=(k, 1)))
    z = (y - mean) / std
    density, below = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), 0.5 * (1 + math.erf(z / math.sqrt(2)))
    expected = std * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi))
    # Both terms are means of k values whose standard deviation is below that of the samples: five standard errors.
    assert crps(samples, torch.tensor([y], dtype=torch.float64), 1.0) == pytest.approx(expected, abs=5 * std / k**0.5)


def test_crps_does_not_favour_many_samples():
    """The mean over many draws is the same for 2 and for 16 samples, which the biased estimate does not have."""
    truth = torch.zeros(100_000, dtype=torch.float64)
    draws = torch.from_numpy(np.random.default_rng(1).normal(size=(16, 100_000)))
    assert crps(draws[:2], truth, 1.0) == pytest.approx(crps(draws, truth, 1.0), abs=0.01)


@pytest.mark.parametrize("k", [4, 5, 16])
def test_crps_of_draws_that_take_their_sources_in_turn(k):
    """As of independent draws of the mixture, whose share of pairs within a source does not depend on K."""
    random = np.random.default_rng(2)
    n = 100_000
    first, second = (torch.from_numpy(random.normal(mean, 0.3, (16, n))) for mean in (-1.0, 2.0))
    turns = torch.stack([(first, second)[i % 2][i] for i in range(k)])
    mixture = torch.where(torch.from_numpy(random.random((16, n)) < 0.5), first, second)
    truth = torch.zeros(n, dtype=torch.float64)
    # With an odd K the sources have unequal shares of the first term.
    weighted = (1 / k) * (k % 2) * float((turns[0] - truth).abs().mean() - (turns[1] - truth).abs().mean()) / 2
    expected = crps(mixture, truth, 1.0) + weighted
    assert crps(turns, truth, 1.0, strata=2) == pytest.approx(expected, abs=0.01)
    assert abs(crps(turns, truth, 1.0) - expected) > 0.02


@pytest.mark.parametrize("samples", [torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, -2.0]]).expand(4, 2)])
def test_crps_of_a_point_forecast(samples):
    assert crps(samples, torch.tensor([0.0, 1.0]), 2.0) == pytest.approx((1 + 3) / 2 / 2)


def test_sentiment_by_hand() -> None:
    target = torch.tensor([-3.0, -1.5, 0.0, 0.0, 0.4, 2.5, 3.0, -0.6])
    prediction = torch.tensor([-4.0, 0.2, -0.1, 0.1, 0.6, 2.4, 1.0, -0.2])
    found = sentiment(prediction, target)
    # Rounded targets -3 -2 0 0 0 2 3 -1, predictions -3 0 0 0 1 2 1 0.
    assert found["ACC-7"] == pytest.approx(4 / 8)
    # Non-negative: targets 0 0 1 1 1 1 1 0, predictions 0 1 0 1 1 1 1 0.
    assert found["ACC-2"] == pytest.approx(6 / 8)
    # Of class 1 (5 targets) precision and recall are 4/5, of class 0 (3 targets) 2/3.
    assert found["F1"] == pytest.approx((5 * 4 / 5 + 3 * 2 / 3) / 8)
    # Without zeros: targets 0 0 1 1 1 0, predictions 0 1 1 1 1 0; precision and recall 3/4 and 1, and 1 and 2/3.
    assert found["ACC-2 nonzero"] == pytest.approx(5 / 6)
    assert found["F1 nonzero"] == pytest.approx((3 * 6 / 7 + 3 * 4 / 5) / 6)
    assert found["MAE"] == pytest.approx((1 + 1.7 + 0.1 + 0.1 + 0.2 + 0.1 + 2 + 0.4) / 8)
    assert found["Corr"] == pytest.approx(np.corrcoef(prediction, target)[0, 1])


def test_the_weights_of_f1_are_the_targets_classes() -> None:
    """The argument order matters: swapped, the weights are those of the predictions."""
    target, prediction = torch.tensor([1.0, 1, 1, -1]), torch.tensor([1.0, -1, -1, -1])
    # Class 1: precision 1, recall 1/3, F1 1/2, 3 targets; class 0: precision 1/3, recall 1, F1 1/2, 1 target.
    assert sentiment(prediction, target)["F1"] == pytest.approx(0.5)
    target, prediction = torch.tensor([1.0, 1, 1, -1, -1]), torch.tensor([1.0, 1, 1, 1, -1])
    # Class 1: F1 6/7, 3 targets; class 0: F1 2/3, 2 targets. By the predictions it would be (4 · 6/7 + 2/3) / 5.
    assert sentiment(prediction, target)["F1"] == pytest.approx((3 * 6 / 7 + 2 * 2 / 3) / 5)
    assert sentiment(target, prediction)["F1"] == pytest.approx((4 * 6 / 7 + 2 / 3) / 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_correlates_with_a_constant(dtype: torch.dtype) -> None:
    target = torch.linspace(-3, 3, 50, dtype=dtype)
    for value in torch.linspace(-2, 2, 41, dtype=dtype):
        assert "Corr" not in sentiment(value.expand(50), target)


def test_sentiment_of_what_it_cannot_read() -> None:
    good = torch.tensor([1.0, -1.0])
    for prediction, target, message in (
        (good[:1], good, "prediction: got [1], expected [B] as target, [2]"),
        (good * math.nan, good, "prediction: got NaN or infinity, expected finite values"),
        (good, good / 0, "target: got NaN or infinity, expected finite values"),
        (good, good * 0, "target: got zeros alone, expected at least one other value"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            sentiment(prediction, target)
