"""The deterministic DDIM step and its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from modafill import ops
from modafill.benchmarks.rivals import (
    SEED,
    Builders,
    Run,
    _compile,
    _compile_now,
    _diffusers_scheduler,
    _normal,
    _own_providers,
    _poisoned,
    _require,
    _set_count,
    _within,
    rooflines,
)
from modafill.benchmarks.runner import Case, Check, Contender
from modafill.diffusion.schedule import Schedule
from modafill.ops import reference

STRIDE = 25


class DdimStep:
    """A stride of 25 steps without noise, in the middle of CDTP's schedule."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.schedule = Schedule.linear(1000, 1e-4, 0.02)
        self.table = self.schedule.table.to(case.device)
        self.step, self.previous = 500, 500 - STRIDE
        generator = torch.Generator(case.device).manual_seed(SEED)

        def one_set() -> tuple[Tensor, Tensor, Tensor]:
            x, eps = (_normal(case, case.shape, generator) for _ in range(2))
            return x, eps, _poisoned(x) if case.mode == "out" else x[:0]

        first = one_set()
        self.traffic = 3 * first[0].nbytes
        self.buffers = [first, *(one_set() for _ in range(_set_count(case, self.traffic) - 1))]
        bar = self.schedule.alpha_bar.tolist()
        self.signal, self.sigma = math.sqrt(bar[self.step]), math.sqrt(1 - bar[self.step])
        self.next_signal, self.next_sigma = math.sqrt(bar[self.previous]), math.sqrt(1 - bar[self.previous])

    @property
    def sets(self) -> int:
        return len(self.buffers)

    @property
    def builders(self) -> Builders:
        ours = {name: partial(self._ours, backend) for name, backend in _own_providers(self.case)}
        rivals: dict[str, Callable[[], Contender]] = {
            "eager-folded": self._eager_folded,
            "torch.compile": self._compiled,
        }
        if self.case.mode == "fresh":
            rivals = {"eager-paper": self._eager_paper, **rivals, "diffusers-ddim": self._diffusers}
        return {**ours, **rivals, **rooflines(self.case, self.traffic)}

    def _ours(self, backend: str) -> Contender:
        _require(self.case, backend)
        buffers, table, reuse = self.buffers, self.table, self.case.mode == "out"

        def run(i: int) -> Tensor:
            x, eps, out = buffers[i]
            return ops.ddim_step(x, eps, table, self.step, self.previous, out=out if reuse else None, backend=backend)

        return self._contender(run)

    def _eager_paper(self) -> Contender:
        """CDTP eq. 8 and 9 as they are printed, coefficients as tensors."""
        bar = self.schedule.alpha_bar.float().to(self.case.device)
        buffers, now, before = self.buffers, bar[self.step], bar[self.previous]

        def run(i: int) -> Tensor:
            x, eps, _ = buffers[i]
            x0 = (x - torch.sqrt(1 - now) * eps) / torch.sqrt(now)
            return torch.sqrt(before) * x0 + torch.sqrt(1 - before) * eps

        return self._contender(run)

    def _folded(self) -> tuple[float, float]:
        ratio = self.next_signal / self.signal
        return ratio, self.next_sigma - ratio * self.sigma

    def _eager_folded(self) -> Contender:
        """One factor per operand: two passes."""
        to_x, to_eps = self._folded()
        buffers, reuse = self.buffers, self.case.mode == "out"

        def run(i: int) -> Tensor:
            x, eps, out = buffers[i]
            scaled = torch.mul(x, to_x, out=out) if reuse else x * to_x
            return scaled.add_(eps, alpha=to_eps)

        return self._contender(run)

    def _compiled(self) -> Contender:
        to_x, to_eps = self._folded()

        def into(x: Tensor, eps: Tensor, out: Tensor) -> Tensor:
            return out.copy_(to_x * x + to_eps * eps)

        def fresh(x: Tensor, eps: Tensor, _: Tensor) -> Tensor:
            return to_x * x + to_eps * eps

        compiled = _compile(into if self.case.mode == "out" else fresh, self.case)
        buffers = self.buffers
        _compile_now(lambda: compiled(*buffers[0]))
        return self._contender(lambda i: compiled(*buffers[i]))

    def _diffusers(self) -> Contender:
        scheduler = _diffusers_scheduler(
            "DDIMScheduler",
            num_train_timesteps=self.schedule.steps,
            trained_betas=self.schedule.betas.float().numpy(),
            clip_sample=False,
        )
        scheduler.set_timesteps(self.schedule.steps // STRIDE)
        buffers = self.buffers
        return self._contender(
            lambda i: scheduler.step(buffers[i][1], self.step - 1, buffers[i][0], return_dict=False)[0]
        )

    def _contender(self, run: Run) -> Contender:
        def check() -> Check:
            x, eps, _ = self.buffers[0]
            before = x.clone(), eps.clone()
            found = run(0)
            exact = reference.ddim_step(x, eps, self.table, self.step, self.previous)
            to_x, to_eps = self._folded()
            verdict = _within(found, exact, to_x * x + to_eps * eps)
            kept = torch.equal(x, before[0]) and torch.equal(eps, before[1])
            return Check(verdict.correct and kept, verdict.max_error)

        return Contender(run, check, self.traffic)
