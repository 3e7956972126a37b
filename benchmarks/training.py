"""A training step of a diffusion network, noise to optimizer, beside the same in plain PyTorch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modafill.benchmarks.rivals import SEED, Builders, _compile, _compile_now, check_each, matmul, relative_errors
from modafill.benchmarks.runner import Case, Check, Contender
from modafill.benchmarks.samplers import by_the_references
from modafill.benchmarks.systems import Cdtp, plain_ops
from modafill.models.admc import ADN, ADMCConfig
from modafill.training.admc import diffusion_loss
from modafill.training.loop import adam

Loss = Callable[[nn.Module], Tensor]


class Training(ABC):
    """One update: loss, gradients, their norm clipped, Adam.

    "modafill" is what the training loop does. Rivals write the loss in PyTorch's own ops (but for the noise of the
    U-Net, which is ours in both), with the same Adam in one kernel. In bfloat16 both make their losses under
    :class:`torch.autocast`. Each is held to the gradients in float64 with equal noise
    (:func:`~modafill.benchmarks.rivals.check_each`).
    """

    sets = 1

    def __init__(self, case: Case, network: nn.Module, traffic: int, flops: int = 0) -> None:
        self.case, self.network, self.traffic, self.flops = case, network, traffic, flops

    def _contender(
        self,
        loss: Loss,
        checked: Loss | None = None,
        *,
        context: Callable[[], Any] = nullcontext,
        precision: str = "float32",
        compiled: bool = False,
    ) -> Contender:
        """``checked`` is ``loss`` with the noise that the reference draws."""
        network = copy.deepcopy(self.network)
        parameters = list(network.parameters())
        optimizer = adam(parameters, 1e-4)
        about: dict[str, Any] = {}

        def run(_: int) -> Tensor:
            value = _backward(network, loss, context, precision)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value

        def check() -> Check:
            _backward(network, checked or loss, context, precision)
            found = _gradients(network)
            optimizer.zero_grad(set_to_none=True)
            eager = {} if precision == "float32" else self.eager_errors
            verdict, fields = check_each(found, self.expected, precision, eager)
            about.update(fields)
            return verdict

        if compiled:
            _compile_now(lambda: _backward(network, loss, context, precision))
            optimizer.zero_grad(set_to_none=True)
        return Contender(run, check, self.traffic, about, self.flops)

    @property
    def expected(self) -> dict[str, Tensor]:
        """Gradients of the reference."""
        if self._expected is None:
            exact = copy.deepcopy(self.network).double()
            _backward(exact, self._exact_loss, by_the_references)
            self._expected = _gradients(exact)
        return self._expected

    @property
    def eager_errors(self) -> dict[str, float]:
        """Relative errors of eager's gradients in bfloat16, with the reference's noise."""
        if self._eager_errors is None:
            network = copy.deepcopy(self.network)
            _backward(network, self._known_loss, plain_ops, "bfloat16")
            self._eager_errors = relative_errors(_gradients(network), self.expected)
        return self._eager_errors

    _expected: dict[str, Tensor] | None = None
    _eager_errors: dict[str, float] | None = None

    @abstractmethod
    def _exact_loss(self, exact: nn.Module) -> Tensor:
        """The loss of the network in float64, by the references."""

    @abstractmethod
    def _known_loss(self, network: nn.Module) -> Tensor:
        """The loss of the network in PyTorch's own ops, with the reference's noise."""


def _backward(
    network: nn.Module, loss: Loss, context: Callable[[], Any] = nullcontext, precision: str = "float32"
) -> Tensor:
    device = next(network.parameters()).device.type
    with torch.enable_grad():
        with context(), torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss(network)
        value.backward()
    return value.detach()


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


class AdnTraining(Training):
    """ADN of the paper's size on ``[B, M, D]`` tokens: ε-MSE (ADMC §3.2)."""

    def __init__(self, case: Case) -> None:
        batch, tokens, width = case.shape
        tiny: dict[str, Any] = {"adn_layers": 2, "adn_heads": 2, "adn_feedforward": 2 * width, "fusion_heads": 2}
        self.config = replace(ADMCConfig(width=width), **tiny) if case.quick else ADMCConfig(width=width)
        torch.manual_seed(SEED)
        self.tokens = torch.randn(case.shape, device=case.device)
        self.rows = torch.arange(batch, device=case.device)
        self.adn = ADN(tokens, self.config).to(case.device)
        self.alpha_bar = self.config.schedule().alpha_bar.float().to(case.device)
        layer = 4 * width**2 + 2 * width * self.config.adn_feedforward
        # Each product once forward and twice backward.
        flops = 6 * batch * tokens * (self.config.adn_layers * layer + width**2)
        super().__init__(case, self.adn, 3 * self.tokens.nbytes, flops)

    @property
    def builders(self) -> Builders:
        ours = diffusion_loss(self.adn, self.tokens, SEED)

        def loss(network: nn.Module) -> Tensor:
            return ours(network, self.rows, 0)

        return {
            "modafill": partial(self._contender, loss),
            "modafill-bfloat16": partial(self._contender, loss, precision="bfloat16"),
            "eager-paper": lambda: self._eager(lambda network: network),
            "eager-bfloat16": lambda: self._eager(lambda network: network, "bfloat16"),
            "torch.compile": lambda: self._eager(partial(_compile, case=self.case)),
            "matmul": partial(matmul, self.case),
        }

    def _exact_loss(self, exact: nn.Module) -> Tensor:
        assert isinstance(exact, ADN)
        return diffusion_loss(exact, self.tokens.double(), SEED)(exact, self.rows, 0)

    def _known_loss(self, network: nn.Module) -> Tensor:
        return self._paper_loss(network, *self._known_noise())

    def _eager(self, prepare: Callable[[Any], Any], precision: str = "float32") -> Contender:
        step = prepare(self._paper_loss)

        def loss(network: nn.Module) -> Tensor:
            n = torch.randint(1, len(self.alpha_bar), (len(self.tokens),), device=self.case.device)
            return step(network, n, torch.randn_like(self.tokens))

        def checked(network: nn.Module) -> Tensor:
            return step(network, *self._known_noise())

        return self._contender(loss, checked, precision=precision, compiled=step != self._paper_loss)

    def _paper_loss(self, network: nn.Module, n: Tensor, noise: Tensor) -> Tensor:
        signal, sigma = self._levels(n)
        return F.mse_loss(network(signal * self.tokens + sigma * noise, n), noise)

    def _known_noise(self) -> tuple[Tensor, Tensor]:
        """Steps and noise that our loss draws."""
        found: list[Tensor] = []

        def listen(noisy: Tensor, n: Tensor) -> Tensor:
            found.extend((noisy, n))
            return noisy

        diffusion_loss(self.adn, self.tokens, SEED)(listen, self.rows, 0)  # type: ignore[arg-type]
        noisy, n = found
        signal, sigma = self._levels(n)
        return n, (noisy - signal * self.tokens) / sigma

    def _levels(self, n: Tensor) -> tuple[Tensor, Tensor]:
        bar = self.alpha_bar[n][:, None, None]
        return torch.sqrt(bar), torch.sqrt(1 - bar)


class UnetTraining(Training):
    """CDTP's denoisers of all pairs, small, at CMU-MOSI's lengths: the loss on projections that are given."""

    def __init__(self, case: Case) -> None:
        problem = Cdtp("small", None, case)
        assert problem.model.diffusion is not None
        self.steps = problem.steps
        with torch.no_grad():
            self.given = problem.model.project(problem.whole)
        super().__init__(case, problem.model.diffusion, sum(x.nbytes for x in self.given.x))

    @property
    def builders(self) -> Builders:
        eager = partial(self._contender, self._loss, context=plain_ops)
        return {
            "modafill": partial(self._contender, self._loss),
            "modafill-bfloat16": partial(self._contender, self._loss, precision="bfloat16"),
            "eager": eager,
            "eager-bfloat16": partial(eager, precision="bfloat16"),
        }

    def _loss(self, network: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        given = self.given
        x = [v.to(dtype) for v in given.x]
        loss: Any = network.loss
        return loss(x, given.lengths, given.available, self.steps, seed=SEED, row_id=given.row_id)

    def _exact_loss(self, exact: nn.Module) -> Tensor:
        return self._loss(exact, torch.float64)

    def _known_loss(self, network: nn.Module) -> Tensor:
        return self._loss(network)
