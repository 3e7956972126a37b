import math

import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor

from modafill.data import all_patterns, missing_patterns
from modafill.models.admc import TokenScaler
from modafill.models.baselines import MeanFill, RidgeFill, ZeroFill

M, D = 3, 4


def source(rows: int, seed: int) -> Tensor:
    """Correlated tokens; odd coordinates are much noisier, so that residuals differ."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 3, generator=generator)
    mix = torch.randn(3, M * D, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(rows, M * D, generator=generator) * torch.tensor([0.1, 0.8]).repeat(M * D // 2)
    return (latent @ mix + noise).reshape(rows, M, D) + 0.5


TRAIN, VALID = source(400, 0), source(100, 1)
TOKENS = source(14, 2)
AVAILABLE = all_patterns(M).repeat(2, 1)
ROWS = torch.arange(14) * 1000


def fills() -> dict[str, ZeroFill | MeanFill | RidgeFill]:
    scaler = TokenScaler(M, D)
    scaler.fit(TRAIN * 3 + 1, torch.ones(400, M, dtype=torch.bool), 1.0)
    return {
        "zero": ZeroFill(scaler.mean, scaler.std),
        "mean": MeanFill(TRAIN),
        "ridge": RidgeFill(TRAIN, VALID),
    }


every_fill = pytest.mark.parametrize("name", ["zero", "mean", "ridge"])


@every_fill
@pytest.mark.parametrize("poison", [3.0, math.nan, math.inf])
def test_nothing_hidden_is_read_and_nothing_observed_is_changed(name: str, poison: float) -> None:
    fill = fills()[name]
    poisoned = torch.where(AVAILABLE[..., None], TOKENS, poison)
    for completed, again in (
        (fill.point(TOKENS, AVAILABLE)[None], fill.point(poisoned, AVAILABLE)[None]),
        (fill.sample(TOKENS, AVAILABLE, 3, 1, ROWS), fill.sample(poisoned, AVAILABLE, 3, 1, ROWS)),
    ):
        assert torch.equal(completed, again)
        assert torch.isfinite(completed).all()
        for sample in completed:
            assert torch.equal(sample[AVAILABLE], TOKENS[AVAILABLE])


@every_fill
def test_shapes_and_dtypes(name: str) -> None:
    fill = fills()[name]
    assert fill.point(TOKENS, AVAILABLE).shape == TOKENS.shape
    samples = fill.sample(TOKENS, AVAILABLE, 5, 0, ROWS)
    assert samples.shape == (5, *TOKENS.shape)
    assert samples.dtype == torch.float32


def test_zero_fill_is_zero_before_standardising() -> None:
    embeddings = TRAIN * torch.tensor([1.0, 20.0, 0.3, 2.0]) - 4
    scaler = TokenScaler(M, D)
    scaler.fit(embeddings, torch.ones(400, M, dtype=torch.bool), 0.7)
    filled = scaler.inverse(ZeroFill(scaler.mean, scaler.std).point(scaler(embeddings[:14]), AVAILABLE))
    torch.testing.assert_close(filled[~AVAILABLE], torch.zeros_like(filled[~AVAILABLE]), rtol=0, atol=1e-5)
    torch.testing.assert_close(filled[AVAILABLE], embeddings[:14][AVAILABLE])


def test_mean_fill_is_the_mean_of_training() -> None:
    filled = MeanFill(TRAIN).point(TOKENS, AVAILABLE)
    for row, m in (~AVAILABLE).nonzero().tolist():
        torch.testing.assert_close(filled[row, m], sum(TRAIN[:, m]) / 400, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["zero", "mean"])
def test_constants_are_certain(name: str) -> None:
    fill = fills()[name]
    samples = fill.sample(TOKENS, AVAILABLE, 3, 1, ROWS)
    assert all(torch.equal(sample, fill.point(TOKENS, AVAILABLE)) for sample in samples)


def by_hand(pattern: Tensor, penalty: float) -> Tensor:
    """Ridge's normal equations in float64: predictions for ``TOKENS``."""
    x, y = TRAIN[:, pattern].flatten(1).double(), TRAIN[:, ~pattern].flatten(1).double()
    centred = x - x.mean(0)
    gain = torch.linalg.solve(
        centred.T @ centred + penalty * torch.eye(x.shape[1]).double(), centred.T @ (y - y.mean(0))
    )
    return (TOKENS[:, pattern].flatten(1).double() - x.mean(0)) @ gain + y.mean(0)


@pytest.mark.parametrize("index, pattern", list(enumerate(missing_patterns(M))))
def test_ridge_is_sklearns_with_the_penalty_that_validates_best(index: int, pattern: Tensor) -> None:
    penalties = (1.0, 100.0, 1e4)
    x, y = TRAIN[:, pattern].flatten(1), TRAIN[:, ~pattern].flatten(1)
    x_valid, y_valid = VALID[:, pattern].flatten(1), VALID[:, ~pattern].flatten(1)
    losses = {p: ((Ridge(alpha=p).fit(x, y).predict(x_valid) - y_valid.numpy()) ** 2).mean() for p in penalties}
    best = min(losses, key=losses.__getitem__)
    filled = RidgeFill(TRAIN, VALID, penalties).point(TOKENS, pattern.expand(14, -1))
    expected = by_hand(pattern, best).float().reshape(14, -1, D)
    torch.testing.assert_close(filled[:, ~pattern], expected, rtol=1e-3, atol=1e-4)


def test_ridge_chooses_on_the_validation_part() -> None:
    """Validation of pure noise wants the largest penalty, training itself the smallest."""
    noise = torch.randn(50, M, D, generator=torch.Generator().manual_seed(4))
    assert {model.alpha for model in RidgeFill(TRAIN, noise, (1e-3, 1e6)).models} == {1e6}
    assert {model.alpha for model in RidgeFill(TRAIN, TRAIN, (1e-3, 1e6)).models} == {1e-3}


def test_ridge_in_a_mixed_batch_is_ridge_alone() -> None:
    fill = fills()["ridge"]
    mixed = fill.point(TOKENS, AVAILABLE)
    for row in range(14):
        alone = fill.point(TOKENS[row : row + 1], AVAILABLE[row : row + 1])[0]
        torch.testing.assert_close(alone, mixed[row], rtol=1e-5, atol=1e-5)


def test_ridge_samples_have_the_spread_of_validation_residuals() -> None:
    fill, pattern = RidgeFill(TRAIN, VALID, (1e-6,)), missing_patterns(M)[0]
    samples = fill.sample(TOKENS, pattern.expand(14, -1), 3000, 5, ROWS)[:, :, 0]
    regression = LinearRegression().fit(TRAIN[:, pattern].flatten(1), TRAIN[:, 0])
    residual = (VALID[:, 0] - torch.from_numpy(regression.predict(VALID[:, pattern].flatten(1)))).std(0)
    around = samples - fill.point(TOKENS, pattern.expand(14, -1))[:, 0]
    torch.testing.assert_close(around.mean((0, 1)) / residual, torch.zeros(D), rtol=0, atol=0.03)
    torch.testing.assert_close(around.std((0, 1)), residual.float(), rtol=0.02, atol=0)


def test_ridge_noise_belongs_to_the_row() -> None:
    fill = fills()["ridge"]
    whole = fill.sample(TOKENS, AVAILABLE, 4, 1, ROWS)
    torch.testing.assert_close(fill.sample(TOKENS, AVAILABLE, 2, 1, ROWS), whole[:2])
    part = fill.sample(TOKENS[5:9], AVAILABLE[5:9], 4, 1, ROWS[5:9])
    torch.testing.assert_close(part, whole[:, 5:9], rtol=1e-5, atol=1e-5)
    other = fill.sample(TOKENS, AVAILABLE, 4, 2, ROWS)
    assert (other != whole)[:, ~AVAILABLE].any(-1).all()
