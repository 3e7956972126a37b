"""modafill and its rivals, op by op, each with the check that its result passes before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modafill import ops
from modafill.benchmarks.runner import Case, Check, Contender, Unavailable
from modafill.diffusion.schedule import Schedule
from modafill.ops import Draw, reference

SEED = 20_240_613
_CHECKED_ROWS = 512
_MAX_SETS = 256
# Results of its CUDA graphs would be written over by the next call.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"

Builders = Mapping[str, Callable[[], Contender]]
Run = Callable[[int], Any]


@dataclass(frozen=True)
class StepSet:
    """One buffer set of a reverse step: ``x, eps, observed, out [B, M, D]``, ``available`` bool ``[B, M]``.

    ``mask`` is ``available`` as the rivals want it, ``[B, M, 1]`` in the dtype of ``x``. ``out`` is empty where results
    are fresh.
    """

    x: Tensor
    eps: Tensor
    observed: Tensor
    available: Tensor
    mask: Tensor
    out: Tensor


class MaskedReverseStep:
    """ADMC's reverse step with noise, in the middle of its schedule, on a batch that mixes all missing patterns."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.schedule = Schedule.linear()
        self.table = self.schedule.table.to(case.device)
        self.step = self.schedule.steps // 2
        batch, modalities, _ = case.shape
        generator = torch.Generator(case.device).manual_seed(SEED)

        def one_set() -> StepSet:
            x, eps, observed = (_normal(case, case.shape, generator) for _ in range(3))
            patterns = 1 + torch.randint(2**modalities - 2, (batch, 1), device=case.device, generator=generator)
            available = (patterns >> torch.arange(modalities, device=case.device)) & 1 == 1
            mask = available[..., None].to(case.dtype)
            return StepSet(x, eps, observed, available, mask, _poisoned(x) if case.mode == "out" else x[:0])

        first = one_set()
        present = int(first.available.sum())
        # An observed modality is read once, a missing one twice, and each is written once.
        values = (2 * present + 3 * (batch * modalities - present)) * case.shape[2]
        self.traffic = values * first.x.element_size() + first.available.numel()
        self.buffers = [first, *(one_set() for _ in range(_set_count(case, 3 * first.x.nbytes) - 1))]
        alpha_bar, beta = self.schedule.alpha_bar.tolist(), [0.0, *self.schedule.betas.tolist()]
        n = self.step
        # The five coefficients of the step as Python floats: posterior of x, ε̂ and noise; signal and noise of the rest.
        self.folded = (
            1 / math.sqrt(1 - beta[n]),
            -beta[n] / math.sqrt((1 - beta[n]) * (1 - alpha_bar[n])),
            math.sqrt(beta[n] * (1 - alpha_bar[n - 1]) / (1 - alpha_bar[n])),
            math.sqrt(alpha_bar[n - 1]),
            math.sqrt(1 - alpha_bar[n - 1]),
        )

    @property
    def sets(self) -> int:
        return len(self.buffers)

    @property
    def builders(self) -> Builders:
        if self.case.mode == "out":
            rivals: dict[str, Callable[[], Contender]] = {
                "eager-folded": self._eager_folded,
                "torch.compile": self._compiled,
            }
            if self.case.device.type == "cuda":
                rivals["eager-graph"] = self._eager_graph
        else:
            rivals = {
                "eager-paper": self._eager_paper,
                "eager-folded": self._eager_folded,
                "torch.compile": self._compiled,
                "diffusers-repaint": self._repaint,
            }
        ours = {name: partial(self._ours, backend) for name, backend in _own_providers(self.case)}
        return {**ours, **rivals, **rooflines(self.case, self.traffic)}

    def _ours(self, backend: str) -> Contender:
        _require(self.case, backend)
        buffers, table, step, reuse = self.buffers, self.table, self.step, self.case.mode == "out"

        def run(i: int) -> Tensor:
            b = buffers[i]
            out = b.out if reuse else None
            return ops.masked_reverse_step(
                b.x, b.eps, b.observed, b.available, table, step, seed=SEED, out=out, backend=backend
            )

        return self._contender(run, lambda: self._compare(run(0), None))

    def _eager_paper(self) -> Contender:
        """Eq. 3 and 4 as they are printed (with 1/√α_n, the posterior's own variance and two independent noises)."""
        device = self.case.device
        beta = torch.cat([torch.zeros(1, dtype=torch.float64), self.schedule.betas]).float().to(device)
        alpha, alpha_bar = 1 - beta, self.schedule.alpha_bar.float().to(device)
        buffers, n = self.buffers, self.step

        def run(i: int) -> Tensor:
            b = buffers[i]
            renoised = torch.sqrt(alpha_bar[n - 1]) * b.observed
            renoised = renoised + torch.sqrt(1 - alpha_bar[n - 1]) * torch.randn_like(b.observed)
            mean = 1 / torch.sqrt(alpha[n]) * (b.x - beta[n] / torch.sqrt(1 - alpha_bar[n]) * b.eps)
            std = torch.sqrt(beta[n] * (1 - alpha_bar[n - 1]) / (1 - alpha_bar[n]))
            generated = mean + std * torch.randn_like(b.x)
            return b.mask * renoised + (1 - b.mask) * generated

        return self._contender(run, lambda: self._seeded(run, draws=2))

    def _eager_folded(self) -> Contender:
        """Coefficients folded into one weight per modality and operand: one draw, four passes in place.

        Of the forms tried (``where`` of two affine maps, ``where`` of the operands first, this one) the fastest at
        every size.
        """
        x_weight, eps_weight, std, signal, sigma = self.folded
        buffers, reuse = self.buffers, self.case.mode == "out"

        def run(i: int) -> Tensor:
            b = buffers[i]
            present = b.available[..., None]
            z = b.out.normal_() if reuse else torch.randn_like(b.x)
            z.mul_(torch.where(present, sigma, std))
            z.addcmul_(b.x, torch.where(present, 0.0, x_weight))
            z.addcmul_(b.eps, torch.where(present, 0.0, eps_weight))
            return z.addcmul_(b.observed, torch.where(present, signal, 0.0))

        return self._contender(run, lambda: self._seeded(run, draws=1))

    def _eager_graph(self) -> Contender:
        """The folded form replayed as a CUDA graph, free of launches; each replay draws new noise."""
        run = captured(self._eager_folded().run, self.case.device)
        return self._contender(run, lambda: self._implied_noise(run))

    def _compiled(self) -> Contender:
        x_weight, eps_weight, std, signal, sigma = self.folded

        def step(b_x: Tensor, eps: Tensor, observed: Tensor, available: Tensor, noise: Tensor | None) -> Tensor:
            z = torch.randn_like(b_x) if noise is None else noise
            generated = x_weight * b_x + eps_weight * eps + std * z
            return torch.where(available[..., None], signal * observed + sigma * z, generated).to(b_x.dtype)

        def step_into(
            out: Tensor, b_x: Tensor, eps: Tensor, observed: Tensor, available: Tensor, noise: Tensor | None
        ) -> Tensor:
            return out.copy_(step(b_x, eps, observed, available, noise))

        buffers = self.buffers
        if self.case.mode == "out":
            into = _compile(step_into, self.case)

            def call(i: int, noise: Tensor | None = None) -> Tensor:
                b = buffers[i]
                return into(b.out, b.x, b.eps, b.observed, b.available, noise)
        else:
            fresh = _compile(step, self.case)

            def call(i: int, noise: Tensor | None = None) -> Tensor:
                b = buffers[i]
                return fresh(b.x, b.eps, b.observed, b.available, noise)

        noise = _normal(self.case, self.case.shape, torch.Generator(self.case.device).manual_seed(SEED + 1))
        _compile_now(lambda: (call(0), call(0, noise)))
        return self._contender(call, lambda: _both(self._compare(call(0, noise), noise), self._implied_noise(call)))

    def _repaint(self) -> Contender:
        n, steps = self.step, self.schedule.steps
        # η = 1 at stride 1 is the posterior that ADMC samples; diffusers counts steps from 0.
        scheduler = _diffusers_scheduler(
            "RePaintScheduler",
            num_train_timesteps=steps,
            trained_betas=self.schedule.betas.float().numpy(),
            eta=1.0,
            clip_sample=False,
        )
        scheduler.set_timesteps(steps, jump_length=1, jump_n_sample=1)
        buffers = self.buffers

        def run(i: int) -> Tensor:
            b = buffers[i]
            return scheduler.step(b.eps, n - 1, b.x, b.observed, b.mask, return_dict=False)[0]

        return self._contender(run, lambda: self._seeded(run, draws=1))

    def _contender(self, run: Run, check: Callable[[], Check]) -> Contender:
        return Contender(run, self._inputs_kept(check), self.traffic)

    def _inputs_kept(self, check: Callable[[], Check]) -> Callable[[], Check]:
        """``check``, which also fails where the provider has written into its inputs."""

        def checked() -> Check:
            b = self.buffers[0]
            before = [t.clone() for t in (b.x, b.eps, b.observed, b.available)]
            verdict = check()
            kept = all(torch.equal(t, u) for t, u in zip((b.x, b.eps, b.observed, b.available), before, strict=True))
            return Check(verdict.correct and kept, verdict.max_error)

        return checked

    def _seeded(self, run: Run, *, draws: int) -> Check:
        """Run from a known state of torch's generator and compare, on the noise that the same state gives again."""
        torch.manual_seed(SEED)
        result = run(0)
        torch.manual_seed(SEED)
        b = self.buffers[0]
        noise = torch.randn_like(b.x)
        if draws == 2:
            noise = torch.where(b.available[..., None], noise, torch.randn_like(b.x))
        return self._compare(result, noise)

    def _compare(self, result: Tensor, noise: Tensor | None) -> Check:
        """Against the oracle on ``noise``, or where that is None on the counter-based noise of SEED."""
        rows = _sampled_rows(self.case)
        b = self.buffers[0]
        x, eps, observed, available = (t[rows] for t in (b.x, b.eps, b.observed, b.available))
        if noise is None:
            z = reference.randn(tuple(x.shape), seed=SEED, row_id=rows, step=self.step, draw=Draw.REVERSE)
        else:
            z = noise[rows].double()
        expected = reference.masked_reverse_step(x, eps, observed, available, self.table, self.step, seed=SEED, noise=z)
        x_weight, eps_weight, std, signal, sigma = self.folded
        z = z.to(x.dtype)
        eager = x_weight * x + eps_weight * eps + std * z
        eager = torch.where(available[..., None], signal * observed + sigma * z, eager)
        return _within(result[rows], expected, eager)

    def _implied_noise(self, run: Run) -> Check:
        """Solve two results for their noise, which has to be standard normal and independent of every operand."""
        first, second = run(0).clone(), run(0)
        b = self.buffers[0]
        x_weight, eps_weight, std, signal, sigma = self.folded
        present = b.available[..., None].expand_as(b.x)
        x, eps, observed = b.x.double(), b.eps.double(), b.observed.double()

        def solve(result: Tensor) -> Tensor:
            generated = (result.double() - x_weight * x - eps_weight * eps) / std
            return torch.where(present, (result.double() - signal * observed) / sigma, generated)

        z, other = solve(first), solve(second)
        good = all(
            _standard_normal(z[side], [x[side], eps[side], observed[side], other[side]])
            for side in (present, ~present)
            if bool(side.any())
        )
        return Check(good, 0.0)


@dataclass(frozen=True)
class NoiseSet:
    """One buffer set of ``add_noise``: clean ``x [B, M, D]`` and the step of each row, int64 ``[B]``."""

    x: Tensor
    step: Tensor


class AddNoise:
    """The forward process as training uses it: each row at a random step of its own; results are always fresh."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.schedule = Schedule.linear()
        self.table = self.schedule.table.to(case.device)
        generator = torch.Generator(case.device).manual_seed(SEED)

        def one_set() -> NoiseSet:
            step = 1 + torch.randint(self.schedule.steps, case.shape[:1], device=case.device, generator=generator)
            return NoiseSet(_normal(case, case.shape, generator), step)

        first = one_set()
        self.traffic = 3 * first.x.nbytes + first.step.nbytes
        self.buffers = [first, *(one_set() for _ in range(_set_count(case, 3 * first.x.nbytes) - 1))]

    @property
    def sets(self) -> int:
        return len(self.buffers)

    @property
    def builders(self) -> Builders:
        ours = {name: partial(self._ours, backend) for name, backend in _own_providers(self.case)}
        return {
            **ours,
            "eager-paper": self._eager_paper,
            "eager-folded": self._eager_folded,
            "torch.compile": self._compiled,
            "diffusers-ddpm": self._diffusers,
            **rooflines(self.case, self.traffic),
        }

    def _ours(self, backend: str) -> Contender:
        _require(self.case, backend)
        buffers, table = self.buffers, self.table

        def run(i: int) -> tuple[Tensor, Tensor]:
            return ops.add_noise(buffers[i].x, table, buffers[i].step, seed=SEED, backend=backend)

        def check() -> Check:
            rows = _sampled_rows(self.case)
            b = self.buffers[0]
            noise = reference.randn(
                tuple(b.x[rows].shape), seed=SEED, row_id=rows, step=b.step[rows], draw=Draw.FORWARD
            )
            return self._compare(run(0), noise, rows)

        return Contender(run, check, self.traffic)

    def _eager_paper(self) -> Contender:
        """Eq. 1 as it is printed: two look-ups and two square roots per row, then the sum."""
        alpha_bar, buffers = self.schedule.alpha_bar.float().to(self.case.device), self.buffers

        def run(i: int) -> tuple[Tensor, Tensor]:
            b = buffers[i]
            noise = torch.randn_like(b.x)
            a = alpha_bar[b.step][:, None, None].to(b.x.dtype)
            return torch.sqrt(a) * b.x + torch.sqrt(1 - a) * noise, noise

        return Contender(run, lambda: self._seeded(run), self.traffic)

    def _eager_folded(self) -> Contender:
        """Both coefficients from one gather of a table of square roots, the sum in two passes."""
        roots, buffers = self._roots(), self.buffers

        def run(i: int) -> tuple[Tensor, Tensor]:
            b = buffers[i]
            signal, sigma = roots[b.step][..., None, None].unbind(1)
            noise = torch.randn_like(b.x)
            return torch.mul(b.x, signal).addcmul_(noise, sigma), noise

        return Contender(run, lambda: self._seeded(run), self.traffic)

    def _compiled(self) -> Contender:
        roots, buffers = self._roots(), self.buffers

        def noisy(x: Tensor, step: Tensor, roots: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
            signal, sigma = roots[step][..., None, None].unbind(1)
            z = torch.randn_like(x) if noise is None else noise.clone()
            return signal * x + sigma * z, z

        compiled = _compile(noisy, self.case)

        def call(i: int) -> tuple[Tensor, Tensor]:
            return compiled(buffers[i].x, buffers[i].step, roots, None)

        _compile_now(lambda: call(0))

        def check() -> Check:
            result, other = call(0), call(0)
            z = result[1].double()
            drawn = _standard_normal(z, [buffers[0].x.double(), other[1].double()])
            return _both(Check(drawn, 0.0), self._compare(result, result[1], _sampled_rows(self.case), own_noise=True))

        return Contender(call, check, self.traffic)

    def _diffusers(self) -> Contender:
        scheduler = _diffusers_scheduler(
            "DDPMScheduler",
            num_train_timesteps=self.schedule.steps,
            trained_betas=self.schedule.betas.float().numpy(),
        )
        buffers, earlier = self.buffers, [b.step - 1 for b in self.buffers]

        def run(i: int) -> tuple[Tensor, Tensor]:
            noise = torch.randn_like(buffers[i].x)
            return scheduler.add_noise(buffers[i].x, noise, earlier[i]), noise

        return Contender(run, lambda: self._seeded(run), self.traffic)

    def _roots(self) -> Tensor:
        """√ᾱ_n and √(1 − ᾱ_n), ``[N + 1, 2]`` in the dtype of the case."""
        columns = [reference.SQRT_ALPHA_BAR, reference.SQRT_ONE_MINUS_ALPHA_BAR]
        return self.table[:, columns].to(self.case.dtype).contiguous()

    def _seeded(self, run: Run) -> Check:
        torch.manual_seed(SEED)
        result = run(0)
        torch.manual_seed(SEED)
        noise = torch.randn_like(self.buffers[0].x)
        rows = _sampled_rows(self.case)
        return self._compare(result, noise[rows], rows)

    def _compare(self, result: tuple[Tensor, Tensor], noise: Tensor, rows: Tensor, *, own_noise: bool = False) -> Check:
        """Against the oracle for ``noise`` of the sampled rows; ``own_noise``: of all rows, as the provider drew it."""
        b = self.buffers[0]
        x, step = b.x[rows], b.step[rows]
        z = (noise[rows] if own_noise else noise).double()
        expected, _ = reference.add_noise(x, self.table, step, seed=SEED, noise=z)
        signal, sigma = self._roots()[step][..., None, None].unbind(1)
        verdict = _within(result[0][rows], expected, signal * x + sigma * z.to(x.dtype))
        return _both(verdict, _within(result[1][rows], z, z.to(x.dtype)))


class Randn:
    """Standard normal noise alone."""

    def __init__(self, case: Case) -> None:
        self.case = case
        first = torch.full(case.shape, math.nan, dtype=case.dtype, device=case.device)
        self.traffic = first.nbytes
        self.buffers = [first, *(_poisoned(first) for _ in range(_set_count(case, first.nbytes) - 1))]

    @property
    def sets(self) -> int:
        return len(self.buffers)

    @property
    def builders(self) -> Builders:
        ours = {name: partial(self._ours, backend) for name, backend in _own_providers(self.case)}
        case, buffers = self.case, self.buffers
        if case.mode == "out":
            rivals = {
                "torch.randn": self._torch(lambda i: torch.randn(case.shape, out=buffers[i])),
                "torch.normal_": self._torch(lambda i: buffers[i].normal_()),
            }
        else:
            rivals = {
                "torch.randn": self._torch(lambda i: torch.randn(case.shape, dtype=case.dtype, device=case.device))
            }
        return {**ours, **rivals, **rooflines(case, self.traffic)}

    def _ours(self, backend: str) -> Contender:
        _require(self.case, backend)
        case, buffers = self.case, self.buffers
        reuse = case.mode == "out"

        def run(i: int) -> Tensor:
            out = buffers[i] if reuse else None
            return ops.randn(case.shape, seed=SEED, dtype=case.dtype, device=case.device, out=out, backend=backend)

        def check() -> Check:
            rows = _sampled_rows(case)
            expected = reference.randn((len(rows), *case.shape[1:]), seed=SEED, row_id=rows)
            return _within(run(0)[rows], expected, expected.to(case.dtype))

        return Contender(run, check, self.traffic)

    def _torch(self, run: Callable[[int], Tensor]) -> Callable[[], Contender]:
        def check() -> Check:
            first = run(0).double()
            return Check(_standard_normal(first, [run(0).double()]), 0.0)

        return lambda: Contender(run, check, self.traffic)


def rooflines(case: Case, traffic: int) -> Builders:
    """STREAM's triad ``a = b + s·c`` and a copy through torch, sized to move ``traffic`` bytes.

    The faster of the two is the roofline of its case. torch stores past no cache, so a kernel that does can exceed it.
    """

    def buffers(operands: int) -> list[list[Tensor]]:
        # float32 whatever the dtype of the case: bandwidth is what it measures.
        length = max(1, traffic // (4 * operands))
        sets = _set_count(case, 4 * operands * length)
        return [[torch.rand(length, device=case.device) for _ in range(operands)] for _ in range(sets)]

    def triad() -> Contender:
        sets = buffers(3)

        def run(i: int) -> Tensor:
            a, b, c = sets[i % len(sets)]
            return torch.add(b, c, alpha=0.5, out=a)

        return Contender(run, lambda: _within(run(0), *[sets[0][1].double() + 0.5 * sets[0][2].double()] * 2), traffic)

    def copy() -> Contender:
        sets = buffers(2)

        def run(i: int) -> Tensor:
            a, b = sets[i % len(sets)]
            return a.copy_(b)

        return Contender(run, lambda: _within(run(0), *[sets[0][1].double()] * 2), traffic)

    return {"triad": triad, "copy": copy}


def _own_providers(case: Case) -> list[tuple[str, str]]:
    """Names of modafill's rows with the backend of each; on a GPU the two that can run there have rows of their own."""
    named = ("cuda", "triton") if case.device.type == "cuda" else ()
    return [("modafill", "auto"), *((f"modafill-{backend}", backend) for backend in named)]


def _require(case: Case, backend: str) -> None:
    try:
        ops.explain(case.op, device=case.device, dtype=case.dtype, backend=backend)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error


def _diffusers_scheduler(name: str, **config: Any) -> Any:
    try:
        import diffusers

        return getattr(diffusers, name)(**config)
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"diffusers does not import: {error}") from error


def largest(errors: Iterable[Tensor]) -> float:
    """The largest of all, NaN if one is; infinity if there are none."""
    found = [error.max() for error in errors]
    return float(torch.stack(found).max()) if found else math.inf


def relative_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ by name, NaN if it is; infinity for a name that only one side has."""
    errors = dict.fromkeys(found.keys() | expected.keys(), math.inf)
    for name in found.keys() & expected.keys():
        errors[name] = float((found[name].double() - expected[name].double()).norm() / expected[name].double().norm())
    return errors


def check_each(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], precision: str, eager: Mapping[str, float]
) -> tuple[Check, dict[str, Any]]:
    """Every tensor by itself, in the norm: 0.1 % of it, or in bfloat16 twice what ``eager`` is wrong by, 2 to 50 %.

    Args:
        found, expected: by name.
        precision: ``"float32"`` or ``"bfloat16"``.
        eager: the relative errors of eager in that precision; read for bfloat16 alone.

    Returns:
        The verdict, and the fields ``precision`` and ``largest_relative_error`` of the row.
    """
    errors = relative_errors(found, expected)
    allowed = (lambda name: 1e-3) if precision == "float32" else (lambda name: min(0.5, max(0.02, 2 * eager[name])))
    verdict = Check(
        all(name in expected and error <= allowed(name) for name, error in errors.items()),
        largest((found[name] - expected[name]).abs() for name in found.keys() & expected.keys()),
    )
    relative = float(torch.tensor(list(errors.values())).max())
    return verdict, {"precision": precision, "largest_relative_error": relative}


def captured(eager: Run, device: torch.device) -> Run:
    """``eager`` on buffer set 0 as a CUDA graph: each call replays it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        eager(0)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = eager(0)

    def run(_: int) -> Tensor:
        graph.replay()
        return out

    return run


def matmul(case: Case) -> Contender:
    """Float32 products of 2048 rows and columns: the rate that fractions of a roofline are of."""
    if case.quick:
        raise Unavailable("a quick run measures no rate")
    a, b = (torch.randn(2048, 2048, device=case.device) for _ in range(2))

    def check() -> Check:
        error = float((a[:8] @ b - a[:8].double() @ b.double()).abs().max())
        return Check(error < 0.1, error)

    return Contender(lambda _: a @ b, check, 3 * a.nbytes, flops=2 * 2048**3)


def _compile(function: Callable[..., Any], case: Case, mode: str | None = None) -> Callable[..., Any]:
    """torch.compile for static shapes; ``mode`` on GPUs alone."""
    if case.quick:
        raise Unavailable("a quick run compiles nothing")
    # Inductor writes the thread count into the code that it generates; more threads overrun FlexAttention's buffers.
    options: dict[str, Any] | None = {"cpp.threads": case.threads} if case.device.type == "cpu" else None
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode, options=options)


def _compile_now(calls: Callable[[], Any]) -> None:
    try:
        calls()
    except Exception as error:
        raise Unavailable(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error


def _normal(case: Case, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device=case.device).to(case.dtype)


def _poisoned(like: Tensor) -> Tensor:
    """A buffer of NaN, so that an element that nobody writes fails the gate."""
    return torch.full_like(like, math.nan)


def _set_count(case: Case, set_bytes: int) -> int:
    """How many buffer sets exceed twice the last-level cache together; on a GPU a flush does their work."""
    if case.device.type == "cuda":
        return 1
    return max(2, min(_MAX_SETS, math.ceil(2 * last_level_cache() / max(1, set_bytes))))


def last_level_cache() -> int:
    """Bytes of the CPU's last-level cache; 32 MiB where Linux does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def _sampled_rows(case: Case) -> Tensor:
    """Row indices for the gate: all of a small batch, else both ends and an even spread."""
    batch = case.shape[0]
    if batch <= _CHECKED_ROWS:
        return torch.arange(batch, device=case.device)
    part = _CHECKED_ROWS // 4
    spread = torch.linspace(part, batch - part - 1, _CHECKED_ROWS - 2 * part).long()
    return torch.cat([torch.arange(part), spread, torch.arange(batch - part, batch)]).to(case.device)


def _within(result: Tensor, expected: Tensor, eager: Tensor, *, terms: int = 1) -> Check:
    """At most twice the error of eager in the same dtype, plus units in the last place of the largest value.

    These are a few, or for sums of more than that many ``terms`` their root: rounding errors add up as a random walk
    (Higham and Mary, 2019), and one order of summation, such as eager's, may be luckier than another.
    """
    if result.shape != expected.shape:
        return Check(False, math.inf)
    errors = (result.double() - expected.double()).abs()
    worst = errors.max().item() if errors.numel() else 0.0
    allowed = 2 * (eager.double() - expected).abs().max().item() if errors.numel() else 0.0
    precision = torch.finfo(result.dtype).eps if result.is_floating_point() else 0.0
    allowed += max(8, math.sqrt(terms)) * precision * (expected.abs().max().item() if errors.numel() else 0.0)
    return Check(worst <= allowed, math.inf if math.isnan(worst) else worst)


def _standard_normal(z: Tensor, independent_of: Iterable[Tensor]) -> bool:
    """Whether the first four moments, the neighbours and the given tensors all fit independent N(0, 1) to 6 σ."""
    z = z.flatten()
    n = z.numel()
    if not bool(z.isfinite().all()):
        return False
    # Standard errors of the moments of a normal sample, as multiples of 1/√n.
    moments = [(z.mean(), 0.0, 1.0), ((z**2).mean(), 1.0, 2**0.5), ((z**3).mean(), 0.0, 15**0.5)]
    moments += [((z**4).mean(), 3.0, 96**0.5), ((z[1:] * z[:-1]).mean(), 0.0, 1.0)]
    moments += [((z * other.flatten()).mean(), 0.0, other.square().mean().sqrt().item()) for other in independent_of]
    return all(abs(value.item() - mean) <= 6 * spread / math.sqrt(n) for value, mean, spread in moments)


def _both(first: Check, second: Check) -> Check:
    return Check(first.correct and second.correct, max(first.max_error, second.max_error))
