"""ADN: the attention-based diffusion network over modality tokens (ADMC §3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from modafill import ops
from modafill.diffusion import (
    Sampling,
    Schedule,
    check_samples,
    clean_coefficients,
    clean_start,
    replace_coefficients,
    replace_start,
    sample_clean,
    sample_replace,
    sample_row_ids,
    solver_steps,
    step_embedding,
)
from modafill.models.admc.config import ADMCConfig


class ADN(nn.Module):
    """Self-attention denoiser over tokens ``[B, M, D]``.

    The paper leaves open how a token knows its step and its modality: here a sinusoidal step embedding through an MLP
    and a learned modality embedding are added to every token (attention alone cannot tell modalities apart). With
    ``conditioning="clean"`` an embedding also says whether a token is observed.

    Args:
        n_modalities: M.
        config: numbers of the model.
    """

    def __init__(self, n_modalities: int, config: ADMCConfig) -> None:
        super().__init__()
        self.config = config
        self.n_modalities = n_modalities
        d = config.adn_width or config.width
        self.width = d
        self.project_in = nn.Identity() if d == config.width else nn.Linear(config.width, d)
        self.modality = nn.Parameter(torch.randn(n_modalities, d) * 0.02)
        self.state = nn.Parameter(torch.randn(2, d) * 0.02) if config.conditioning == "clean" else None
        self.step_mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        layer = nn.TransformerEncoderLayer(
            d,
            config.adn_heads,
            config.adn_feedforward,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, config.adn_layers, norm=nn.LayerNorm(d), enable_nested_tensor=False)
        self.project_out = nn.Linear(d, config.width)
        self._schedule = config.schedule()

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self._schedule

    @property
    def last_step(self) -> int:
        """Largest diffusion step used: N for ``"replace"``, the one with ᾱ ≥ ``min_alpha_bar`` for ``"clean"``."""
        if self.config.conditioning == "replace":
            return self.schedule.steps
        return self.schedule.last_step(self.config.min_alpha_bar)

    def forward(self, x: Tensor, step: Tensor | int, available: Tensor | None = None) -> Tensor:
        """ε (``"replace"``) or v (``"clean"``) ``[B, M, D]`` for tokens ``x`` at ``step`` (int or int64 ``[B]``)."""
        if isinstance(step, int):
            step = torch.full((1,), step, dtype=torch.int64, device=x.device)
        h = self.project_in(x) + self.modality + self._embed(step)[:, None]
        if self.state is not None:
            if available is None:
                raise ValueError("available: got None, expected a bool [B, M] because conditioning is 'clean'")
            h = h + self.state[available.to(torch.int64)]
        return self.project_out(self.encoder(h))

    def _embed(self, step: Tensor) -> Tensor:
        return self.step_mlp(step_embedding(step, self.width).to(self.modality.dtype))

    @torch.no_grad()
    def predictor(self, steps: Sequence[int], dtype: torch.dtype | None = None) -> tuple[ops.TokenNetwork, Tensor]:
        """:meth:`forward` for the missing tokens alone: arguments of :func:`modafill.ops.token_denoiser`.

        Args:
            steps: those that will be asked for; what depends on them alone is computed here.
            dtype: of the weights in products, as :class:`modafill.ops.TokenNetwork`; None = the module's own.

        Returns:
            The network, and what is added at each of the steps, ``[steps, M, 2, d]``.
        """
        project_in = None if isinstance(self.project_in, nn.Identity) else self.project_in
        network = ops.TokenNetwork(self.encoder, self.project_out, project_in, dtype)
        embedded = self._embed(torch.tensor(steps, device=self.modality.device))
        states = 0.0 if self.state is None else self.state
        added = (embedded[:, None, None] + (self.modality[:, None] + states)).expand(-1, -1, 2, -1)
        return network, added.contiguous()

    def _reverse_process(self, sampling: Sampling, tokens: Tensor) -> Callable[..., Tensor]:
        """``(observed, available, seed=…, row_id=…)`` → completed tokens, in one kernel where there is one."""
        replace, schedule = self.config.conditioning == "replace", self.schedule
        start: Callable[..., Tensor]
        sample: Callable[..., Tensor]
        if replace:
            first, init = sampling.steps or self.config.start_step, self.config.init
            schedule.check_step("start_step", first)
            steps, linear = list(range(first, -1, -1)), True
            start = partial(replace_start, schedule=schedule, start_step=first, init=init)
            sample = partial(sample_replace, schedule=schedule, start_step=first, init=init)
        else:
            solver, eta = sampling.solver or self.config.solver, sampling.eta or 0.0
            steps = solver_steps(schedule, self.last_step, sampling.steps or self.config.sampling_steps, solver)
            linear, start = solver != "heun" and not eta, clean_start
            sample = partial(sample_clean, schedule=schedule, steps=steps, solver=solver, eta=eta)
        network, added = self.predictor(steps[:-1], sampling.dtype)
        if linear and ops.can_loop(network, tokens):
            of = replace_coefficients(schedule, first) if replace else clean_coefficients(schedule, steps, solver)
            coefficients = of.to(tokens.device)

            def at_once(observed: Tensor, available: Tensor, *, seed: int, row_id: Tensor) -> Tensor:
                return ops.reverse_loop(
                    network,
                    start(observed, available, seed=seed, row_id=row_id),
                    available,
                    added,
                    coefficients,
                    observed=observed if replace else None,
                    first_step=steps[0],
                    seed=seed,
                    row_id=row_id,
                )

            return at_once
        added_at = dict(zip(steps, added, strict=False))

        def step_by_step(observed: Tensor, available: Tensor, *, seed: int, row_id: Tensor) -> Tensor:
            missing = ops.find_missing(available)

            def predict(x: Tensor, step: int) -> Tensor:
                return ops.token_denoiser(network, x, available, added_at[step], missing=missing)

            return sample(predict, observed, available, seed=seed, row_id=row_id)

        return step_by_step

    @torch.no_grad()
    def sample(
        self,
        tokens: Tensor,
        available: Tensor,
        *,
        n_samples: int = 1,
        seed: int = 0,
        row_id: Tensor | None = None,
        sampling: Sampling = Sampling(),
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Tensor:
        """K completions ``[K, B, M, D]`` of ``tokens [B, M, D]``: observed tokens bit-exact, missing ones generated.

        Complete rows cost nothing; values of missing tokens are never read.

        Args:
            sampling: what differs from the configuration.
            progress: called with the completions made so far and their number.
        """
        if tokens.ndim != 3 or tokens.shape[1:] != (self.n_modalities, self.config.width):
            expected = f"[B, {self.n_modalities}, {self.config.width}]"
            raise ValueError(f"tokens: got shape {list(tokens.shape)}, expected {expected}")
        if available.dtype != torch.bool or available.shape != tokens.shape[:2]:
            raise ValueError(
                f"available: got {available.dtype} {list(available.shape)}, expected bool {list(tokens.shape[:2])}"
            )
        check_samples(n_samples)
        if row_id is not None and row_id.shape != (len(tokens),):
            raise ValueError(f"row_id: got shape {list(row_id.shape)}, expected [{len(tokens)}]")
        self.config.check_sampling(sampling)
        bad = (~available.any(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"available: nothing is observed in rows {bad[:5]}, expected at least one modality in each"
            )
        rows = torch.arange(len(tokens), device=tokens.device) if row_id is None else row_id
        todo = (~available.all(1)).nonzero().flatten()
        tokens = torch.where(available[..., None], tokens, 0.0)
        out = tokens.expand(n_samples, *tokens.shape).clone()
        sample_ids = sample_row_ids(rows[todo], n_samples)
        index = todo.repeat(n_samples)
        chunk_size = sampling.chunk_size or 4096
        parts = []
        # ``sampling.dtype`` decides what is rounded, not a caller's autocast, which would round a part of it.
        with torch.autocast(tokens.device.type, enabled=False):
            complete = self._reverse_process(sampling, tokens)
            for at in range(0, len(index), chunk_size):
                part = slice(at, at + chunk_size)
                parts.append(complete(tokens[index[part]], available[index[part]], seed=seed, row_id=sample_ids[part]))
                progress(min(at + chunk_size, len(index)), len(index))
        if parts:
            out[:, todo] = torch.cat(parts).reshape(n_samples, len(todo), *tokens.shape[1:])
        return out
