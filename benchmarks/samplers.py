"""Imputation of tokens by ADN, all its steps, beside the paper's loop in plain PyTorch."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modafill import ops
from modafill.benchmarks.rivals import MAX_AUTOTUNE, SEED, Builders, _compile, _compile_now, captured, matmul
from modafill.benchmarks.runner import Case, Check, Contender
from modafill.diffusion import Sampling
from modafill.models.admc import ADN, ADMCConfig
from modafill.ops import Draw
from modafill.ops.backends import ENVIRONMENT

_CHECKED_ROWS = 32
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
_RIVALS_ROWS = 1024


class AdnSampler:
    """Missing tokens of a batch that mixes all incomplete patterns, in the paper's size and number of steps.

    "eager-paper" is the paper's loop as it is written: all tokens through PyTorch's own transformer at each step, the
    step's embedding too, eq. 3 and 4, torch's noise; "eager-folded" takes so many rows at a time as stay in the caches,
    has its coefficients as numbers and draws one noise for each step, and "eager-bfloat16" is that with the network's
    weights in bfloat16. "modafill-fast" is another network, that of the default conditioning, with fewer evaluations
    (``FAST``): "× rival" leaves it out. Each is held to its own loop in float64, with equal noise.
    """

    FAST = Sampling(steps=6, solver="dpm++")

    def __init__(self, case: Case) -> None:
        self.case = case
        batch, tokens, width = case.shape
        numbers: dict[str, Any] = {"width": width}
        if case.quick:
            numbers.update(adn_layers=2, adn_heads=2, adn_feedforward=2 * width, fusion_heads=2, start_step=5)
        self.configs = {c: ADMCConfig(conditioning=c, **numbers) for c in ("replace", "clean")}
        torch.manual_seed(SEED)
        self.networks = {c: ADN(tokens, config).to(case.device).eval() for c, config in self.configs.items()}
        self.tokens = torch.randn(case.shape, device=case.device)
        rows = torch.arange(batch, device=case.device)
        patterns = 1 + rows[:, None] % (2**tokens - 2)
        self.available = (patterns >> torch.arange(tokens, device=case.device)) & 1 == 1
        self.traffic = 2 * self.tokens.nbytes
        self.evaluations = 0

    sets = 1

    @property
    def builders(self) -> Builders:
        half = Sampling(dtype=torch.bfloat16)
        on_gpus: Builders = {
            "torch.compile-max-autotune": partial(self._eager, partial(_compile, case=self.case, mode=MAX_AUTOTUNE)),
            "eager-graph": self._eager_graph,
        }
        return {
            "modafill": partial(self._ours, "replace", Sampling()),
            "modafill-bfloat16": partial(self._ours, "replace", half),
            "modafill-fast": partial(self._ours, "clean", self.FAST),
            "eager-paper": partial(self._eager, lambda step: step),
            "eager-folded": self._folded,
            "eager-bfloat16": partial(self._folded, torch.bfloat16),
            "torch.compile": partial(self._eager, partial(_compile, case=self.case)),
            **(on_gpus if self.case.device.type == "cuda" else {}),
            "matmul": partial(matmul, self.case),
        }

    def _ours(self, conditioning: str, sampling: Sampling) -> Contender:
        adn = self.networks[conditioning]
        evaluations = sampling.steps or self.configs[conditioning].start_step

        def run(_: int) -> Tensor:
            return adn.sample(self.tokens, self.available, seed=SEED, sampling=sampling)[0]

        def expected(rows: slice) -> Tensor:
            exact = copy.deepcopy(adn).double()
            with by_the_references():
                return exact.sample(
                    self.tokens[rows].double(),
                    self.available[rows],
                    seed=SEED,
                    sampling=Sampling(steps=sampling.steps, solver=sampling.solver),
                )[0]

        ours = self._contender(lambda: run(0), run, expected, evaluations, sampling.dtype or torch.float32)
        return replace(ours, about={**ours.about, "another_network": True}) if conditioning == "clean" else ours

    def _folded(self, dtype: torch.dtype = torch.float32) -> Contender:
        config, adn, schedule = self.configs["replace"], self.networks["replace"], self.configs["replace"].schedule()
        start, network = config.start_step, copy.deepcopy(adn).to(dtype)
        beta, bar = [0.0, *schedule.betas.tolist()], schedule.alpha_bar.tolist()

        def loop(draw: Callable[[Draw, int, slice], Tensor]) -> Tensor:
            parts = []
            for at in range(0, len(self.tokens), _RIVALS_ROWS):
                rows = slice(at, at + _RIVALS_ROWS)
                tokens, seen = self.tokens[rows], self.available[rows, :, None]
                noised = tokens * math.sqrt(bar[start]) + draw(Draw.FORWARD, start, rows) * math.sqrt(1 - bar[start])
                x = torch.where(seen, noised, draw(Draw.INITIAL, start, rows))
                for n in range(start, 0, -1):
                    eps, noise = network(x.to(dtype), n).to(x.dtype), draw(Draw.REVERSE, n, rows)
                    slope = 1 / math.sqrt(1 - beta[n])
                    mean = torch.add(x * slope, eps, alpha=-slope * beta[n] / math.sqrt(1 - bar[n]))
                    generated = mean.add_(noise, alpha=math.sqrt(beta[n] * (1 - bar[n - 1]) / (1 - bar[n])))
                    renoised = torch.add(tokens * math.sqrt(bar[n - 1]), noise, alpha=math.sqrt(1 - bar[n - 1]))
                    x = torch.where(seen, renoised, generated)
                parts.append(x)
            return torch.cat(parts)

        def known(draw: Draw, n: int, rows: slice) -> Tensor:
            shape, ids = tuple(self.tokens[rows].shape), torch.arange(len(self.tokens), device=self.case.device)[rows]
            return ops.randn(shape, seed=SEED, row_id=ids, step=n, draw=draw, device=self.case.device)

        def run(_: int) -> Tensor:
            return loop(lambda draw, n, rows: torch.randn_like(self.tokens[rows]))

        return self._contender(lambda: loop(known), run, self._by_the_paper, start, dtype)

    def _by_the_paper(self, rows: slice) -> Tensor:
        """The paper's loop in float64."""
        exact = copy.deepcopy(self.networks["replace"]).double()
        with by_the_references():
            return exact.sample(self.tokens[rows].double(), self.available[rows], seed=SEED)[0]

    def _eager(self, prepare: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Contender:
        config, adn, case = self.configs["replace"], self.networks["replace"], self.case
        schedule, start = config.schedule(), config.start_step
        beta = torch.cat([torch.zeros(1, dtype=torch.float64), schedule.betas]).float().to(case.device)
        alpha, bar = 1 - beta, schedule.alpha_bar.float().to(case.device)
        mask = self.available[..., None].float()

        def reverse(x: Tensor, n: Tensor, other: Tensor, noise: Tensor) -> Tensor:
            eps = adn(x, n)
            renoised = torch.sqrt(bar[n - 1]) * self.tokens + torch.sqrt(1 - bar[n - 1]) * other
            mean = 1 / torch.sqrt(alpha[n]) * (x - beta[n] / torch.sqrt(1 - bar[n]) * eps)
            generated = mean + torch.sqrt(beta[n] * (1 - bar[n - 1]) / (1 - bar[n])) * noise
            return mask * renoised + (1 - mask) * generated

        step = prepare(reverse)
        every_step = torch.arange(start + 1, device=case.device)[:, None]

        def loop(draw: Callable[[Draw, int], Tensor]) -> Tensor:
            noised = torch.sqrt(bar[start]) * self.tokens + torch.sqrt(1 - bar[start]) * draw(Draw.FORWARD, start)
            x = mask * noised + (1 - mask) * draw(Draw.INITIAL, start)
            for n in range(start, 0, -1):
                x = step(x, every_step[n], draw(Draw.REVERSE, n), draw(Draw.REVERSE, n))
            return x

        def known(draw: Draw, n: int) -> Tensor:
            return ops.randn(tuple(self.tokens.shape), seed=SEED, step=n, draw=draw, device=case.device)

        def run(_: int) -> Tensor:
            return loop(lambda draw, n: torch.randn_like(self.tokens))

        _compile_now(lambda: step(self.tokens, every_step[start], self.tokens, self.tokens))
        return self._contender(lambda: loop(known), run, self._by_the_paper, start, torch.float32)

    def _eager_graph(self) -> Contender:
        """The paper's loop as one CUDA graph, free of launches; held to the loop that it was made of, at one seed."""
        eager = self._eager(lambda step: step)
        run = captured(eager.run, self.case.device)

        def seeded(call: Callable[[int], Tensor]) -> Tensor:
            torch.manual_seed(SEED)
            return call(0).clone()

        def check() -> Check:
            error = float((seeded(run) - seeded(eager.run)).abs().max())
            return Check(error <= _TOLERANCES[torch.float32] and eager.check().correct, error)

        return replace(eager, run=run, check=check)

    def _contender(
        self,
        checked: Callable[[], Tensor],
        run: Callable[[int], Tensor],
        expected: Callable[[slice], Tensor],
        evaluations: int,
        dtype: torch.dtype,
    ) -> Contender:
        rows = slice(0, _CHECKED_ROWS)
        about = {"network_evaluations": evaluations, "precision": str(dtype).removeprefix("torch.")}

        def check() -> Check:
            error = float((checked()[rows].double() - expected(rows)).abs().max())
            return Check(error <= _TOLERANCES[dtype], error)

        return Contender(run, check, self.traffic, about, flops=evaluations * self._flops())

    def _flops(self) -> int:
        """What one evaluation of the network has to multiply and add, for the missing tokens alone."""
        config, (batch, tokens, width) = self.configs["replace"], self.case.shape
        missing, all_tokens = int((~self.available).sum()), batch * tokens
        whole = 4 * width**2 + 2 * width * config.adn_feedforward
        last = all_tokens * 2 * width**2 + missing * (2 * width**2 + 2 * width * config.adn_feedforward)
        return 2 * (all_tokens * whole * (config.adn_layers - 1) + last + missing * width**2)


@contextmanager
def by_the_references() -> Iterator[None]:
    """Every op runs its float64 reference."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before
