import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from modafill.diffusion import Schedule
from modafill.ops import reference

LINEAR = [(1000, 3e-4, 0.06), (1000, 1e-4, 0.02), (50, 1e-3, 0.1), (1, 0.5, 0.7)]


@pytest.mark.parametrize("steps, start, end", LINEAR)
def test_linear_is_the_product_of_one_minus_beta(steps: int, start: float, end: float) -> None:
    schedule = Schedule.linear(steps, start, end)
    betas = [start + (end - start) * n / max(steps - 1, 1) for n in range(steps)]
    product = [1.0]
    for beta in betas:
        product.append(product[-1] * (1 - beta))
    assert schedule.steps == steps
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-14)
    np.testing.assert_allclose(schedule.alpha_bar, product, rtol=1e-12)


@pytest.mark.parametrize("steps", [10, 1000])
def test_cosine_follows_nichol_and_dhariwal(steps: int) -> None:
    schedule = Schedule.cosine(steps, offset=0.008, max_beta=0.999)

    def f(n: int) -> float:
        return math.cos((n / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    # The last β would be 1 without its bound.
    np.testing.assert_allclose(schedule.alpha_bar[:-1], [f(n) / f(0) for n in range(steps)], rtol=1e-10)
    assert schedule.betas[-1] == 0.999
    np.testing.assert_allclose(schedule.alpha_bar[-1], f(steps - 1) / f(0) * 0.001, rtol=1e-10)


@pytest.mark.parametrize("steps, start, end", LINEAR[:3])
def test_linear_agrees_with_diffusers(steps: int, start: float, end: float) -> None:
    theirs = DDPMScheduler(steps, start, end, "linear").alphas_cumprod
    # diffusers multiplies in float32: one rounding for each factor.
    np.testing.assert_allclose(Schedule.linear(steps, start, end).alpha_bar[1:], theirs, rtol=steps * 2**-23)


def test_cosine_agrees_with_diffusers() -> None:
    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    np.testing.assert_allclose(Schedule.cosine(1000).alpha_bar[1:], theirs, rtol=1000 * 2**-23)


def test_admc_defaults() -> None:
    alpha_bar = Schedule.linear().alpha_bar
    assert len(alpha_bar) == 1001
    assert [round(alpha_bar[n].item(), 3) for n in (30, 50, 80, 200)] == [0.966, 0.915, 0.808, 0.285]


@pytest.mark.parametrize("schedule", [Schedule.linear(), Schedule.cosine(100)], ids=["linear", "cosine"])
def test_table_holds_the_coefficients(schedule: Schedule) -> None:
    beta = schedule.betas.numpy()
    bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    # 1 − ᾱ by its own recursion, which loses no digits near n = 0.
    rest = np.zeros(len(bar))
    for n, b in enumerate(beta, start=1):
        rest[n] = rest[n - 1] * (1 - b) + b
    expected = np.zeros((len(bar), reference.TABLE_COLUMNS))
    expected[:, reference.SQRT_ALPHA_BAR] = np.sqrt(bar)
    expected[:, reference.SQRT_ONE_MINUS_ALPHA_BAR] = np.sqrt(rest)
    expected[0, reference.POSTERIOR_X] = 1.0
    expected[1:, reference.POSTERIOR_X] = 1 / np.sqrt(1 - beta)
    expected[1:, reference.POSTERIOR_EPS] = -beta / np.sqrt((1 - beta) * rest[1:])
    expected[1:, reference.POSTERIOR_STD] = np.sqrt(beta * rest[:-1] / rest[1:])
    assert schedule.table.dtype == torch.float32
    assert schedule.table.shape == expected.shape
    np.testing.assert_allclose(schedule.table, expected, rtol=2**-23)


def test_posterior_columns_are_the_posterior_of_the_forward_process() -> None:
    """x_{n−1} given x_n and x₀, by Bayes' rule on the two Gaussians (not by the formulas of the table)."""
    schedule = Schedule.linear(20, 0.01, 0.3)
    x0, xn, n = 0.7, -1.3, 11
    beta, before = schedule.betas[n - 1].item(), schedule.alpha_bar[n - 1].item()
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (math.sqrt(1 - beta) * xn / beta + math.sqrt(before) * x0 / (1 - before)) / precision
    row = schedule.table[n].double()
    eps = (xn - row[reference.SQRT_ALPHA_BAR] * x0) / row[reference.SQRT_ONE_MINUS_ALPHA_BAR]
    assert float(row[reference.POSTERIOR_X] * xn + row[reference.POSTERIOR_EPS] * eps) == pytest.approx(mean, rel=1e-5)
    assert float(row[reference.POSTERIOR_STD]) == pytest.approx(precision**-0.5, rel=1e-6)


@pytest.mark.parametrize("bound", [0.5, 1e-4, 1e-9, 0.9999])
def test_last_step_is_the_last_above_the_bound(bound: float) -> None:
    schedule = Schedule.linear()
    last = schedule.last_step(bound)
    assert last == max([n for n in range(1, 1001) if schedule.alpha_bar[n] >= bound], default=1)


@pytest.mark.parametrize("bound", [0.0, 1.0, -1.0])
def test_last_step_checks_its_bound(bound: float) -> None:
    with pytest.raises(ValueError, match="min_alpha_bar"):
        Schedule.linear().last_step(bound)


@pytest.mark.parametrize("step", [0, -1, 51])
def test_a_step_outside_the_schedule(step: int) -> None:
    with pytest.raises(ValueError, match=rf"start: got {step}, expected a diffusion step in 1…50"):
        Schedule.linear(50).check_step("start", step)


@pytest.mark.parametrize(
    "betas, message",
    [
        ([0.1, 1.0], r"betas: got values in \[0.1, 1\]"),
        ([0.0, 0.1], r"betas: got values in \[0, 0.1\]"),
        ([0.1, math.nan], "betas: got values"),
        ([], r"betas: got shape \(0,\)"),
        ([[0.1]], r"betas: got shape \(1, 1\)"),
    ],
)
def test_impossible_betas(betas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(torch.tensor(betas))


@pytest.mark.parametrize("make", [Schedule.linear, Schedule.cosine])
def test_no_steps(make: type[Schedule]) -> None:
    with pytest.raises(ValueError, match="steps: got 0"):
        make(0)
