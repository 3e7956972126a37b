"""The reverse loops: short functions that read like the algorithms they implement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from modafill import ops
from modafill.diffusion.schedule import Schedule
from modafill.ops.reference import Draw

Denoiser = Callable[[Tensor, int], Tensor]

SAMPLE_SHIFT = 48
SOLVERS = ("ddim", "dpm++", "heun")


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; None leaves it to the model's configuration.

    Attributes:
        steps: network evaluations for a completion; with ADMC's ``"replace"`` the step n that it starts at, which is
            their number.
        solver: one of :data:`SOLVERS`; None with ``"replace"``.
        eta: 0 is deterministic DDIM, 1 ancestral sampling; None with ``"replace"``.
        dtype: of the weights in products, such as bfloat16; what is denoised keeps the model's own precision.
        chunk_size: completions that go through all steps at a time; CDTP's at least a batch.
    """

    steps: int | None = None
    solver: str | None = None
    eta: float | None = None
    dtype: torch.dtype | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "chunk_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: got {value!r}, expected a whole number, at least 1")
        if self.solver not in (None, *SOLVERS):
            raise ValueError(f"solver: got {self.solver!r}, expected one of {', '.join(SOLVERS)}")
        if self.dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: got {self.dtype}, expected a floating-point type")


def check_samples(n_samples: int) -> None:
    """Raise ValueError unless K is in 1…2¹⁵−1."""
    if not 1 <= n_samples < 1 << 15:
        raise ValueError(f"n_samples: got {n_samples}, expected 1…{(1 << 15) - 1}")


def sample_row_ids(row_id: Tensor, n_samples: int) -> Tensor:
    """Row ids of K independent samples of each row, int64 ``[K · B]``, sample-major.

    Sample k of row r has id ``r + k·2⁴⁸``: the first samples stay the same when K grows. Row ids must lie in [0, 2⁴⁸).
    """
    check_samples(n_samples)
    if row_id.dtype != torch.int64 or row_id.ndim != 1:
        raise ValueError(f"row_id: got {row_id.dtype} {list(row_id.shape)}, expected int64 [B]")
    if len(row_id) and not 0 <= int(row_id.min()) <= int(row_id.max()) < 1 << SAMPLE_SHIFT:
        raise ValueError(
            f"row_id: got {int(row_id.min())} to {int(row_id.max())}, expected ids from 0 to 2**{SAMPLE_SHIFT} - 1"
        )
    k = torch.arange(n_samples, dtype=torch.int64, device=row_id.device)
    return ((k << SAMPLE_SHIFT)[:, None] + row_id[None, :]).flatten()


def angular_steps(schedule: Schedule, start_step: int, evaluations: int) -> list[int]:
    """Steps ``start_step = t_0 > t_1 > … > 0`` of a sampler with at most that many network evaluations.

    Evenly spaced in the angle φ with √ᾱ = cos φ: a DDIM step on a v-prediction is a rotation by the difference of
    angles (Salimans & Ho 2022, app. D), so equal angles make equally long steps. Steps that coincide are visited once.
    """
    schedule.check_step("start_step", start_step)
    if not 1 <= evaluations <= start_step:
        raise ValueError(f"evaluations: got {evaluations}, expected 1…{start_step} (the start step)")
    angle = torch.arccos(schedule.alpha_bar.sqrt())
    wanted = angle[start_step] * (1 - torch.arange(1, evaluations, dtype=torch.float64) / evaluations)
    nearest = (angle[1:start_step, None] - wanted).abs().argmin(0) + 1 if start_step > 1 else wanted.long()
    return [start_step, *sorted(set(nearest.tolist()), reverse=True), 0]


def solver_steps(schedule: Schedule, start_step: int, evaluations: int, solver: str) -> list[int]:
    """The steps that ``solver`` (of :data:`SOLVERS`) visits with at most that many network evaluations.

    :func:`angular_steps`; Heun's evaluates twice between two steps, but for the last.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: got {solver!r}, expected one of {', '.join(SOLVERS)}")
    if not 1 <= evaluations <= start_step:
        raise ValueError(f"evaluations: got {evaluations}, expected 1…{start_step} (the start step)")
    return angular_steps(schedule, start_step, (evaluations + 1) // 2 if solver == "heun" else evaluations)


def sample_replace(
    predict_eps: Denoiser,
    observed: Tensor,
    available: Tensor,
    schedule: Schedule,
    *,
    start_step: int = 50,
    seed: int,
    row_id: Tensor | None = None,
    init: str = "unit",
) -> Tensor:
    """ADMC's reverse process (§3.2–3.3): ancestral steps from ``start_step``, observed tokens replaced after each.

    Args:
        predict_eps: ε_θ(x ``[B, M, D]``, step).
        observed: ``[B, M, D]``; values of missing tokens are never read.
        available: bool ``[B, M]``.
        start_step: n, the step at which the reverse process starts (30, 50 and 80 in Table 4).
        seed: 64-bit key of the noise.
        row_id: int64 ``[B]`` in [0, 2⁶³); a row's noise depends on (seed, row id) alone. Default: 0…B−1.
        init: missing tokens start as N(0, I) (``"unit"``, the paper's text) or as √(1 − ᾱ_n) N(0, I) (``"scaled"``,
            which has the noise level that the network expects at step n).

    Returns:
        ``[B, M, D]``: observed tokens bit-exact, missing ones generated.
    """
    x = replace_start(observed, available, schedule, start_step=start_step, seed=seed, row_id=row_id, init=init)
    table = schedule.table.to(observed.device)
    for n in range(start_step, 0, -1):
        eps = predict_eps(x, n)
        x = ops.masked_reverse_step(x, eps, observed, available, table, n, seed=seed, row_id=row_id)
    return x


def replace_start(
    observed: Tensor,
    available: Tensor,
    schedule: Schedule,
    *,
    start_step: int,
    seed: int,
    row_id: Tensor | None = None,
    init: str = "unit",
) -> Tensor:
    """x ``[B, M, D]`` at ``start_step`` of :func:`sample_replace`: observed tokens noised, missing ones noise."""
    schedule.check_step("start_step", start_step)
    if init not in ("unit", "scaled"):
        raise ValueError(f"init: got {init!r}, expected 'unit' or 'scaled'")
    start = ops.randn(tuple(observed.shape), seed=seed, row_id=row_id, step=start_step, device=observed.device)
    start = start.to(observed.dtype)
    if init == "scaled":
        start = start * float(schedule.table[start_step, ops.reference.SQRT_ONE_MINUS_ALPHA_BAR])
    noised, _ = ops.add_noise(observed, schedule.table.to(observed.device), start_step, seed=seed, row_id=row_id)
    return torch.where(available[..., None], noised, start)


def replace_coefficients(schedule: Schedule, start_step: int) -> Tensor:
    """What :func:`modafill.ops.reverse_loop` needs of each step of :func:`sample_replace`, float32 ``[S, 5]``.

    Factors of x and ε̂, the posterior's deviation; √ᾱ and √(1 − ᾱ) of the step before.
    """
    posterior = [ops.reference.POSTERIOR_X, ops.reference.POSTERIOR_EPS, ops.reference.POSTERIOR_STD]
    before = [ops.reference.SQRT_ALPHA_BAR, ops.reference.SQRT_ONE_MINUS_ALPHA_BAR]
    table = schedule.table[: start_step + 1]
    return torch.cat([table[1:, posterior], table[:-1, before]], 1).flip(0)


def sample_clean(
    predict_v: Denoiser,
    observed: Tensor,
    available: Tensor,
    schedule: Schedule,
    *,
    steps: list[int],
    solver: str = "ddim",
    eta: float = 0.0,
    seed: int,
    row_id: Tensor | None = None,
) -> Tensor:
    """:func:`denoise` over missing tokens with the observed tokens clean at every step.

    Args:
        predict_v: v_θ(x ``[B, M, D]``, step), v = √ᾱ ε − √(1 − ᾱ) x₀ (Salimans & Ho 2022). ε-prediction would divide
            the network's error by √ᾱ, which is 10⁻² at the first step.
        observed: ``[B, M, D]``; values of missing tokens are never read.
        available: bool ``[B, M]``.
        steps: the visited steps, descending, last one 0 (:func:`solver_steps`).
        solver: ``"ddim"``, ``"dpm++"`` or ``"heun"``.
        eta: 0 is deterministic DDIM, 1 is ancestral sampling; 0 with the other solvers.
        seed, row_id: as in :func:`sample_replace`.

    Returns:
        ``[B, M, D]``: observed tokens bit-exact, missing ones generated.
    """
    if len(steps) < 2 or steps[-1] != 0 or any(n <= previous for n, previous in pairwise(steps)):
        raise ValueError(f"steps: got {steps}, expected at least one diffusion step, descending, and 0 at the end")
    x = clean_start(observed, available, seed=seed, row_id=row_id)

    def keep_observed(x: Tensor) -> Tensor:
        return torch.where(available[..., None], observed, x)

    predict = eps_of_v(predict_v, schedule)
    return denoise(
        predict, x, schedule, steps=steps, solver=solver, eta=eta, seed=seed, row_id=row_id, after=keep_observed
    )


def clean_start(observed: Tensor, available: Tensor, *, seed: int, row_id: Tensor | None = None) -> Tensor:
    """What :func:`sample_clean` starts from, ``[B, M, D]``: observed tokens, and noise."""
    start = ops.randn(tuple(observed.shape), seed=seed, row_id=row_id, draw=Draw.INITIAL, device=observed.device)
    return torch.where(available[..., None], observed, start.to(observed.dtype))


def clean_coefficients(schedule: Schedule, steps: list[int], solver: str) -> Tensor:
    """What :func:`modafill.ops.reverse_loop` needs of each step of :func:`sample_clean`, float32 ``[S, 5]``.

    √ᾱ and √(1 − ᾱ), which make x̂₀ of x and v; factors of x, of x̂₀ and of the x̂₀ before. η is 0.

    Raises:
        ValueError: ``solver`` is neither ``"ddim"`` nor ``"dpm++"``, whose steps are linear in these.
    """
    if solver not in ("ddim", "dpm++"):
        raise ValueError(f"solver: got {solver!r}, expected ddim or dpm++")
    signals, sigmas = _signals_and_sigmas(schedule)
    rows = []
    for (n, previous), ahead in zip(pairwise(steps), _extrapolations(schedule, steps, solver), strict=True):
        step = signals[previous] - sigmas[previous] * signals[n] / sigmas[n]
        rows.append([signals[n], sigmas[n], sigmas[previous] / sigmas[n], (1 + ahead) * step, -ahead * step])
    return torch.tensor(rows, dtype=torch.float64).float()


def _signals_and_sigmas(schedule: Schedule) -> tuple[list[float], list[float]]:
    """√ᾱ and √(1 − ᾱ) of each step, as the ops read them."""
    columns = schedule.table[:, [ops.reference.SQRT_ALPHA_BAR, ops.reference.SQRT_ONE_MINUS_ALPHA_BAR]]
    signals, sigmas = columns.T.tolist()
    return signals, sigmas


def _extrapolations(schedule: Schedule, steps: list[int], solver: str) -> list[float]:
    """How far each step of DPM-Solver++(2M) looks ahead of x̂₀, in differences of it and that before; else 0."""
    signals, sigmas = _signals_and_sigmas(schedule)
    found, length_before = [], math.inf
    for n, previous in pairwise(steps):
        # Of the step in log(signal / sigma), of which there is no end at step 0.
        length = math.log(signals[previous] / sigmas[previous] * sigmas[n] / signals[n]) if previous else 0.0
        found.append(length / (2 * length_before) if solver == "dpm++" else 0.0)
        length_before = length
    return found


def eps_of_v(predict_v: Denoiser, schedule: Schedule) -> Denoiser:
    """ε̂ of a network that predicts v = √ᾱ ε − √(1 − ᾱ) x₀ (Salimans & Ho 2022)."""
    signals, sigmas = _signals_and_sigmas(schedule)
    return lambda x, n: signals[n] * predict_v(x, n) + sigmas[n] * x


def denoise(
    predict_eps: Denoiser,
    x: Tensor,
    schedule: Schedule,
    *,
    steps: list[int],
    solver: str = "ddim",
    eta: float = 0.0,
    seed: int,
    row_id: Tensor | None = None,
    after: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """x₀ ``[B, …]`` from ``x [B, …]`` at ``steps[0]``; ``after`` is applied to x after each step.

    ``"ddim"`` is CDTP's eq. 8–9. The second-order solvers are DDIM steps on another ε̂. DPM-Solver++(2M) (Lu et al.
    2022, algorithm 2) extrapolates x̂₀ from the step before; the last step, to σ = 0, does not. Heun's method (Karras
    et al. 2022, algorithm 1, in their variables x/√ᾱ and √((1 − ᾱ)/ᾱ)) takes the mean of ε̂ at both ends of a step, but
    for the last, with twice the evaluations.

    Args:
        predict_eps: ε_θ(x, step).
        steps: the visited steps, descending, last one 0 (:func:`solver_steps`).
        solver, eta, seed, row_id: as in :func:`sample_clean`.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: got {solver!r}, expected one of {', '.join(SOLVERS)}")
    if eta and solver != "ddim":
        raise ValueError(f"eta: got {eta}, expected 0 with solver {solver!r}")
    schedule.check_step("steps", steps[0])
    table = schedule.table.to(x.device)
    signals, sigmas = _signals_and_sigmas(schedule)

    def step(x: Tensor, eps: Tensor, n: int, previous: int) -> Tensor:
        return after(ops.ddim_step(x, eps, table, n, previous, eta=eta, seed=seed, row_id=row_id))

    clean_before = x
    for (n, previous), ahead in zip(pairwise(steps), _extrapolations(schedule, steps, solver), strict=True):
        eps = predict_eps(x, n)
        if solver == "dpm++":
            clean = (x - sigmas[n] * eps) / signals[n]
            if ahead:
                eps = eps - (signals[n] * ahead / sigmas[n]) * (clean - clean_before)
            clean_before = clean
        elif solver == "heun" and previous:
            eps = (eps + predict_eps(step(x, eps, n, previous), previous)) / 2
        x = step(x, eps, n, previous)
    return x
