from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modafill.diffusion import Schedule, angular_steps, sample_clean, sample_replace, sample_row_ids, solver_steps
from modafill.ops import reference
from modafill.ops.reference import Draw

M, D = 3, 2
SCHEDULE = Schedule.linear(40, 0.01, 0.4)


def covariance() -> Tensor:
    mix = torch.randn(M * D, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return mix @ mix.T + 0.3 * torch.eye(M * D, dtype=torch.float64)


def denoised(x: Tensor, mean: Tensor, cov: Tensor, alpha_bar: Tensor) -> Tensor:
    """E[x₀ | x_n] for x₀ ~ N(mean, cov), of ``x [B, k]``."""
    noisy = alpha_bar * cov + (1 - alpha_bar) * torch.eye(len(cov), dtype=torch.float64)
    return mean + (x - alpha_bar.sqrt() * mean) @ torch.linalg.solve(noisy, alpha_bar.sqrt() * cov)


def a_denoiser(x: Tensor, step: int) -> Tensor:
    """Some function of all tokens and the step, for comparing loops."""
    return torch.tanh(x.flip(1) * 0.7 - 0.2 * x.sum(1, keepdim=True) + 0.05 * step)


def mixed_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    observed = torch.randn(5, M, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    available = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
    return observed, available, torch.tensor([7, 0, 2**40, 3, 12])


class Conditional:
    """The exact law of the hidden coordinates of one observation, and the denoiser that knows it."""

    schedule = Schedule.linear()

    def __init__(self, seen: list[bool]) -> None:
        cov = covariance()
        keep = torch.tensor(seen).repeat_interleave(D)
        gain = torch.linalg.solve(cov[keep][:, keep], cov[keep][:, ~keep])
        self.seen, self.hidden = torch.tensor(seen), ~keep
        self.observation = torch.linspace(-0.7, 1.0, M * D, dtype=torch.float64)
        self.mean = self.observation[keep] @ gain
        self.cov = cov[~keep][:, ~keep] - cov[~keep][:, keep] @ gain

    def predict_v(self, x: Tensor, step: int) -> Tensor:
        flat, bar = x.flatten(1), self.schedule.alpha_bar[step]
        x0 = torch.zeros_like(flat)
        x0[:, self.hidden] = denoised(flat[:, self.hidden], self.mean, self.cov, bar)
        eps = (flat - bar.sqrt() * x0) / (1 - bar).sqrt()
        return (bar.sqrt() * eps - (1 - bar).sqrt() * x0).reshape(x.shape)

    def sample(self, rows: int, evaluations: int, eta: float, solver: str = "ddim") -> Tensor:
        steps = angular_steps(self.schedule, self.schedule.last_step(1e-4), evaluations)
        observed = self.observation.reshape(1, M, D).repeat(rows, 1, 1)
        out = sample_clean(
            self.predict_v, observed, self.seen.expand(rows, -1), self.schedule,
            steps=steps, solver=solver, eta=eta, seed=3,
        )  # fmt: skip
        return out.flatten(1)[:, self.hidden]

    def errors(self, mean: Tensor, cov: Tensor) -> tuple[float, float]:
        """Largest error of the mean in standard deviations, relative Frobenius error of the covariance."""
        shift = ((mean - self.mean) / self.cov.diagonal().sqrt()).abs().max()
        return shift.item(), ((cov - self.cov).norm() / self.cov.norm()).item()


one_and_two_seen = pytest.mark.parametrize("seen", [[True, False, False], [False, True, True]], ids=str)


@one_and_two_seen
def test_clean_with_the_exact_score_approaches_the_exact_conditional(seen: list[bool]) -> None:
    """Without noise DDIM maps its start z to c + z A here: mean c and covariance AᵀA need no Monte Carlo."""
    exact, rows = Conditional(seen), 32
    z = reference.randn((rows, M * D), seed=3)[:, exact.hidden]
    design = torch.cat([torch.ones(rows, 1, dtype=torch.float64), z], 1)
    errors = []
    for evaluations in (4, 16, 64, 256):
        out = exact.sample(rows, evaluations, eta=0.0)
        fit = torch.linalg.lstsq(design, out).solution
        torch.testing.assert_close(design @ fit, out, rtol=1e-4, atol=1e-4)
        errors.append(exact.errors(fit[0], fit[1:].T @ fit[1:]))
    means, covs = zip(*errors, strict=True)
    # The start lacks the mean √ᾱ μ of its step, which no number of evaluations makes good.
    left = exact.schedule.alpha_bar[exact.schedule.last_step(1e-4)].sqrt() * exact.mean.norm()
    assert max(means) < 1.1 * left
    assert covs[0] > 2 * covs[1] > 4 * covs[2]
    assert covs[3] < 0.03


@one_and_two_seen
def test_ancestral_clean_sampling_has_the_exact_law(seen: list[bool]) -> None:
    exact = Conditional(seen)
    out = exact.sample(4000, 64, eta=1.0)
    mean, cov = exact.errors(out.mean(0), out.T.cov())
    # Monte Carlo: 0.016 deviations, and about 0.03 of the covariance.
    assert mean < 0.06
    assert cov < 0.1


def test_replace_with_the_exact_score_samples_an_independent_modality() -> None:
    """All steps from pure noise; the observed token tells nothing here, so no bias of replacement is in the way."""
    rows, schedule = 6000, Schedule.linear(200, 1e-3, 0.1)
    cov = torch.tensor([[1.0, 0.5], [0.5, 0.4]], dtype=torch.float64)
    mean = torch.tensor([0.8, -0.3], dtype=torch.float64)

    def predict_eps(x: Tensor, step: int) -> Tensor:
        bar = schedule.alpha_bar[step]
        return (
            torch.stack([(x[:, m] - bar.sqrt() * denoised(x[:, m], mean, cov, bar)) for m in (0, 1)], 1)
            / (1 - bar).sqrt()
        )

    observed = torch.full((rows, 2, 2), 5.0, dtype=torch.float64)
    available = torch.tensor([False, True]).expand(rows, -1)
    out = sample_replace(predict_eps, observed, available, schedule, start_step=200, seed=1)[:, 0]
    assert (out.mean(0) - mean).abs().max() < 0.05
    assert (out.T.cov() - cov).norm() / cov.norm() < 0.06


@pytest.mark.parametrize("init", ["unit", "scaled"])
@pytest.mark.parametrize("start", [1, 2, 25])
def test_replace_is_the_papers_loop(start: int, init: str) -> None:
    observed, available, row_id = mixed_batch()
    beta, bar = SCHEDULE.betas, SCHEDULE.alpha_bar

    def noise(step: int, draw: Draw) -> Tensor:
        return reference.randn(tuple(observed.shape), seed=9, row_id=row_id, step=step, draw=draw)

    keep = available[..., None]
    begin = noise(start, Draw.INITIAL) * ((1 - bar[start]).sqrt() if init == "scaled" else 1.0)
    noised = bar[start].sqrt() * observed + (1 - bar[start]).sqrt() * noise(start, Draw.FORWARD)
    x = torch.where(keep, noised, begin)
    for n in range(start, 0, -1):
        z, b = noise(n, Draw.REVERSE), beta[n - 1]
        mean = (x - b / (1 - bar[n]).sqrt() * a_denoiser(x, n)) / (1 - b).sqrt()
        generated = mean + (b * (1 - bar[n - 1]) / (1 - bar[n])).sqrt() * z
        x = torch.where(keep, bar[n - 1].sqrt() * observed + (1 - bar[n - 1]).sqrt() * z, generated)

    got = sample_replace(a_denoiser, observed, available, SCHEDULE, start_step=start, seed=9, row_id=row_id, init=init)
    torch.testing.assert_close(got, x, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [[40, 0], [40, 39, 17, 2, 0], [1, 0]], ids=str)
def test_clean_is_ddim_beside_clean_tokens(steps: list[int], eta: float) -> None:
    observed, available, row_id = mixed_batch()
    bar, keep = SCHEDULE.alpha_bar, available[..., None]
    x = torch.where(keep, observed, reference.randn(tuple(observed.shape), seed=9, row_id=row_id, draw=Draw.INITIAL))
    for n, before in pairwise(steps):
        v = a_denoiser(x, n)
        x0 = bar[n].sqrt() * x - (1 - bar[n]).sqrt() * v
        eps = (1 - bar[n]).sqrt() * x + bar[n].sqrt() * v
        std = eta * ((1 - bar[before]) / (1 - bar[n])).sqrt() * (1 - bar[n] / bar[before]).sqrt()
        z = reference.randn(tuple(observed.shape), seed=9, row_id=row_id, step=n, draw=Draw.REVERSE)
        x = bar[before].sqrt() * x0 + (1 - bar[before] - std**2).clamp(min=0).sqrt() * eps + std * z
        x = torch.where(keep, observed, x)

    got = sample_clean(a_denoiser, observed, available, SCHEDULE, steps=steps, eta=eta, seed=9, row_id=row_id)
    # The rounding of the float32 table and noise, divided by √ᾱ.
    tolerance = 4 * 2**-24 / bar[steps[0]].sqrt().item()
    torch.testing.assert_close(got, x, rtol=0, atol=max(tolerance, 2e-6))


@pytest.mark.parametrize("steps", [[40, 0], [40, 22, 0], [38, 37, 20, 11, 2, 0]], ids=str)
@pytest.mark.parametrize("solver", ["dpm++", "heun"])
def test_second_order_solvers_are_those_of_diffusers(solver: str, steps: list[int]) -> None:
    observed, _, row_id = mixed_batch()
    nothing = torch.zeros(len(observed), M, dtype=torch.bool)
    options: Any = {"trained_betas": SCHEDULE.betas.numpy(), "prediction_type": "v_prediction"}
    x = reference.randn(tuple(observed.shape), seed=9, row_id=row_id, draw=Draw.INITIAL)
    if solver == "heun":
        scheduler = HeunDiscreteScheduler(**options)
        x = x / SCHEDULE.alpha_bar[steps[0]].sqrt()  # its variable
    else:
        scheduler = DPMSolverMultistepScheduler(**options, final_sigmas_type="zero", lower_order_final=True)
    # Their step t is our n = t + 1.
    scheduler.set_timesteps(timesteps=[n - 1 for n in steps[:-1]])
    for t in scheduler.timesteps:
        v = a_denoiser(scheduler.scale_model_input(x, t), int(t) + 1)
        x = scheduler.step(v, t, x).prev_sample
    got = sample_clean(a_denoiser, observed, nothing, SCHEDULE, steps=steps, solver=solver, seed=9, row_id=row_id)
    torch.testing.assert_close(got, x, rtol=2e-5, atol=2e-5)


@one_and_two_seen
@pytest.mark.parametrize("solver", ["dpm++", "heun"])
def test_second_order_solvers_converge_faster(seen: list[bool], solver: str) -> None:
    """Twice the steps leave less than 0.35 of the error; DDIM's is halved."""
    exact, rows = Conditional(seen), 32
    finest = exact.sample(rows, 400, eta=0.0, solver="dpm++")
    errors = {
        (method, n): (exact.sample(rows, n, eta=0.0, solver=method) - finest).abs().max()
        for method in ("ddim", solver)
        for n in (12, 24, 48)
    }
    for n in (12, 24):
        assert errors[solver, 2 * n] < 0.35 * errors[solver, n]
        assert errors["ddim", 2 * n] > 0.4 * errors["ddim", n]
    assert errors[solver, 48] < 0.5 * errors["ddim", 48]


@pytest.mark.parametrize("solver, expected", [("ddim", [5, 8, 1]), ("dpm++", [5, 8, 1]), ("heun", [5, 7, 1])])
def test_solvers_keep_to_the_evaluations(solver: str, expected: list[int]) -> None:
    observed, available, row_id = mixed_batch()
    for evaluations, most in zip((5, 8, 1), expected, strict=True):
        calls: list[int] = []
        steps = solver_steps(SCHEDULE, 40, evaluations, solver)
        sample_clean(
            lambda x, n, calls=calls: calls.append(n) or a_denoiser(x, n),
            observed, available, SCHEDULE, steps=steps, solver=solver, seed=1, row_id=row_id,
        )  # fmt: skip
        assert len(calls) == most
        assert 0 not in calls


def test_solvers_say_what_they_want() -> None:
    observed, available, _ = mixed_batch()
    with pytest.raises(ValueError, match="solver: got 'euler', expected one of ddim"):
        sample_clean(a_denoiser, observed, available, SCHEDULE, steps=[3, 0], solver="euler", seed=1)
    with pytest.raises(ValueError, match=r"eta: got 0\.5, expected 0 with solver 'heun'"):
        sample_clean(a_denoiser, observed, available, SCHEDULE, steps=[3, 0], solver="heun", eta=0.5, seed=1)
    with pytest.raises(ValueError, match="solver: got 'euler'"):
        solver_steps(SCHEDULE, 40, 5, "euler")
    with pytest.raises(ValueError, match="evaluations: got 0, expected 1…40"):
        solver_steps(SCHEDULE, 40, 0, "heun")


def run_replace(observed: Tensor, available: Tensor, row_id: Tensor, seed: int = 2) -> Tensor:
    return sample_replace(a_denoiser, observed, available, SCHEDULE, start_step=8, seed=seed, row_id=row_id)


def run_clean(observed: Tensor, available: Tensor, row_id: Tensor, seed: int = 2) -> Tensor:
    return sample_clean(a_denoiser, observed, available, SCHEDULE, steps=[30, 9, 0], eta=0.5, seed=seed, row_id=row_id)


samplers = pytest.mark.parametrize("run", [run_replace, run_clean])


@samplers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_observed_tokens_are_exact_and_hidden_ones_unread(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    observed, available, row_id = mixed_batch(dtype)
    out = run(observed, available, row_id)
    assert out.dtype == dtype
    assert torch.equal(out[available], observed[available])
    assert torch.isfinite(out).all()
    for poison in (1e6, torch.nan, torch.inf):
        assert torch.equal(run(torch.where(available[..., None], observed, poison), available, row_id), out)


@samplers
def test_a_row_does_not_depend_on_its_batch(run: Callable[..., Tensor]) -> None:
    observed, available, row_id = mixed_batch(torch.float32)
    whole = run(observed, available, row_id)
    for rows in ([3], [4, 1], [4, 3, 2, 1, 0]):
        assert torch.equal(run(observed[rows], available[rows], row_id[rows]), whole[rows])
    hidden = ~available
    assert (run(observed, available, row_id, seed=3)[hidden] != whole[hidden]).all()
    assert (run(observed, available, row_id + 1)[hidden] != whole[hidden]).all()


SCHEDULES = {"admc": Schedule.linear(), "short": Schedule.linear(12, 0.01, 0.4), "cosine": Schedule.cosine(300)}


@settings(max_examples=60)
@given(st.sampled_from(sorted(SCHEDULES)), st.data())
def test_angular_steps_go_down_to_zero(name: str, data: st.DataObject) -> None:
    schedule = SCHEDULES[name]
    start = data.draw(st.integers(1, schedule.steps))
    evaluations = data.draw(st.integers(1, start))
    steps = angular_steps(schedule, start, evaluations)
    assert steps[0] == start
    assert steps[-1] == 0
    assert all(a > b for a, b in pairwise(steps))
    assert len(steps) - 1 <= evaluations


def test_angular_steps_are_equal_arcs() -> None:
    schedule = Schedule.linear()
    steps = angular_steps(schedule, 547, 20)
    assert len(steps) == 21
    arcs = -torch.arccos(schedule.alpha_bar[steps].sqrt()).diff()
    # A step is met to half of the widest gap between neighbours, about 0.008 rad here.
    gap = torch.arccos(schedule.alpha_bar[:548].sqrt()).diff().max()
    assert (arcs - arcs.mean()).abs().max() <= gap + 1e-9


@pytest.mark.parametrize("start", [1, 2, 40])
def test_one_evaluation_is_one_stride(start: int) -> None:
    assert angular_steps(SCHEDULE, start, 1) == [start, 0]


@pytest.mark.parametrize(
    "start, evaluations, message",
    [(0, 1, "start_step: got 0"), (41, 1, "start_step: got 41"), (5, 0, "evaluations: got 0"), (5, 6, "1…5")],
)
def test_angular_steps_errors(start: int, evaluations: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        angular_steps(SCHEDULE, start, evaluations)


def test_sample_ids_keep_their_first_samples() -> None:
    rows = torch.tensor([5, 0, 2**48 - 1])
    many = sample_row_ids(rows, 9).reshape(9, 3)
    assert torch.equal(many[0], rows)
    assert many.unique().numel() == many.numel()
    assert (many >= 0).all()
    for k in (1, 4):
        assert torch.equal(sample_row_ids(rows, k), many[:k].flatten())
    assert (sample_row_ids(rows, 2**15 - 1) >= 0).all()


@pytest.mark.parametrize("rows", [[-1], [3, 2**48]])
def test_sample_ids_that_would_collide_are_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"row_id: got .* expected ids from 0 to 2\*\*48 - 1"):
        sample_row_ids(torch.tensor(rows), 2)


def test_sample_ids_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match=r"row_id: got torch.float32 \[2\], expected int64 \[B\]"):
        sample_row_ids(torch.zeros(2), 2)


@pytest.mark.parametrize("n_samples", [0, -1, 2**15])
def test_sample_ids_check_their_number(n_samples: int) -> None:
    with pytest.raises(ValueError, match=f"n_samples: got {n_samples}"):
        sample_row_ids(torch.arange(2), n_samples)


@pytest.mark.parametrize("start", [0, 41, -3])
def test_replace_starts_within_the_schedule(start: int) -> None:
    observed, available, _ = mixed_batch()
    with pytest.raises(ValueError, match=f"start_step: got {start}, expected a diffusion step in 1…40"):
        sample_replace(a_denoiser, observed, available, SCHEDULE, start_step=start, seed=0)


def test_replace_knows_its_inits() -> None:
    observed, available, _ = mixed_batch()
    with pytest.raises(ValueError, match="init: got 'zero'"):
        sample_replace(a_denoiser, observed, available, SCHEDULE, start_step=5, seed=0, init="zero")


@pytest.mark.parametrize("steps", [[], [0], [41, 0], [9, 4], [9, 9, 0], [4, 9, 0], [9, -1, 0], [9, 0, 0]], ids=str)
def test_clean_visits_steps_of_the_schedule_downwards(steps: list[int]) -> None:
    observed, available, _ = mixed_batch()
    with pytest.raises(ValueError, match="steps: got"):
        sample_clean(a_denoiser, observed, available, SCHEDULE, steps=steps, seed=0)
