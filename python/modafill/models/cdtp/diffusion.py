"""Conditional diffusion between every two modalities: all pairs and samples that need it as one batch (CDTP §3.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modafill import ops
from modafill.diffusion import Sampling, denoise, eps_of_v, solver_steps
from modafill.models.cdtp.backbone import groups_of
from modafill.models.cdtp.config import CDTPConfig
from modafill.models.cdtp.stacked import Which, choose, valid_mask
from modafill.models.cdtp.unet import Condition, StackedUNet
from modafill.nn import ConvGeluConv
from modafill.ops.reference import SQRT_ALPHA_BAR, SQRT_ONE_MINUS_ALPHA_BAR, Draw


@dataclass(frozen=True)
class _Work:
    """Pairs whose targets have one length, and the samples of each: ``rows [g, n]``, real where ``valid``."""

    pairs: list[int]
    rows: Tensor
    valid: Tensor


class ConditionalDiffusion(nn.Module):
    """A denoiser ε_θ(x_t, c, t) for every ordered pair (target ← source).

    The condition encoder, Conv1D-GELU-Conv1D (§3.2.3), is one per source and runs once for a sample that needs it,
    whatever the number of steps; its result stands beside the noisy target, resampled to the target's steps, and is
    attended to. Pairs whose targets are equally long are one batch. Departures: x₀ is standardised with
    the statistics in ``mean`` and ``std``; the sampler starts at the last step with ᾱ ≥ ``min_alpha_bar``; with
    ``prediction="v"`` the networks predict v = √ᾱ ε − √(1−ᾱ) x₀.

    Args:
        lengths: L of each modality.
        config: numbers of the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, lengths: Sequence[int], config: CDTPConfig) -> None:
        super().__init__()
        self.config, self.lengths, count = config, tuple(lengths), len(lengths)
        self.pairs = [(target, source) for target in range(count) for source in range(count) if source != target]
        inner = config.condition_width or config.width
        self.encoders = nn.ModuleList(
            ConvGeluConv(config.width, inner, inner, *config.condition_kernels) for _ in range(count)
        )
        self.networks = 1 if config.shared_denoiser else len(self.pairs)
        self.pair = nn.Parameter(torch.randn(len(self.pairs), inner) * 0.02) if config.shared_denoiser else None
        self.unet = StackedUNet(
            self.networks, config.width, inner, config.unet_channels, config.unet_blocks, config.heads
        )
        self.register_buffer("mean", torch.zeros(count, config.width))
        self.register_buffer("std", torch.ones(count, config.width))
        self._schedule = config.schedule()

    @property
    def last_step(self) -> int:
        """The step at which sampling starts, the largest that is trained."""
        return self._schedule.last_step(self.config.min_alpha_bar)

    def loss(
        self,
        x: Sequence[Tensor],
        lengths: Sequence[Tensor],
        available: Tensor,
        step: Tensor,
        *,
        seed: int,
        row_id: Tensor,
    ) -> Tensor:
        """Mean squared error of ε (eq. 5), or of v, over all pairs whose target and source are really there.

        Args:
            x: projected sequences ``[B, L, d]`` per modality; as targets they are detached, so that the projections
                cannot make the task easy by making x₀ constant.
            lengths: int64 ``[B]`` per modality.
            available: bool ``[B, M]``, what is really there.
            step: int64 ``[B, M(M−1)]`` in 1…``last_step``, the diffusion step of each sample and pair.
            seed, row_id: of the noise.
        """
        table = self._schedule.table.to(x[0].device)
        wanted = torch.stack([available[:, t] & available[:, s] for t, s in self.pairs], dim=1)
        total, count = x[0].new_zeros(()), available.new_zeros((), dtype=torch.int64)
        codes, clean = self._encode(x, lengths, wanted), self._standardise(x)
        for work in self._batched(wanted):
            target = self._pick(clean, work, 0)
            lengths_of_target = self._pick(lengths, work, 0)
            steps = torch.stack([step[rows, p] for p, rows in zip(work.pairs, work.rows, strict=True)])
            flat, ids = target.flatten(0, 1), self._row_ids(work, row_id)
            noisy, noise = ops.add_noise(flat, table, steps.flatten(), seed=seed, row_id=ids)
            condition = self._condition(codes, lengths, work)
            predicted = self._predict(noisy.view_as(target), steps, condition, lengths_of_target, work)
            expected = noise
            if self.config.prediction == "v":
                row = table[steps.flatten()][:, :, None, None]
                expected = row[:, SQRT_ALPHA_BAR] * noise - row[:, SQRT_ONE_MINUS_ALPHA_BAR] * flat
            keep = valid_mask(lengths_of_target, target.shape[2]) & work.valid[..., None]
            error = torch.where(keep[..., None], predicted - expected.view_as(predicted), 0.0)
            total = total + error.square().sum()
            count = count + keep.sum() * target.shape[-1]
        return total / count.clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        x: Sequence[Tensor],
        lengths: Sequence[Tensor],
        available: Tensor,
        *,
        seed: int,
        row_id: Tensor,
        sampling: Sampling = Sampling(),
    ) -> dict[tuple[int, int], Tensor]:
        """CondDiff_{target←source} by DDIM (eq. 8–9), for each missing target of a sample from each available source.

        Args:
            x, lengths, available: as in :meth:`loss`; ``lengths`` of missing modalities are those that they are to get.
            seed, row_id: of the noise: that of a pair of a row is a function of (seed, row id, pair).
            sampling: what differs from the configuration; ``chunk_size`` does not count here.

        Returns:
            (target, source) → ``[B, L, d]``, zero in samples that do not need it; pairs that none needs are left out.
        """
        schedule, solver = self._schedule, sampling.solver or self.config.solver
        steps = solver_steps(schedule, self.last_step, sampling.steps or self.config.sampling_steps, solver)
        eta = self.config.eta if sampling.eta is None else sampling.eta
        wanted = torch.stack([~available[:, t] & available[:, s] for t, s in self.pairs], dim=1)
        out, codes = {}, self._encode(x, lengths, wanted)
        for work in self._batched(wanted):
            lengths_of_target, ids = self._pick(lengths, work, 0), self._row_ids(work, row_id)
            shape = (*work.rows.shape, self.lengths[self.pairs[work.pairs[0]][0]], self.config.width)
            condition, weights = self._condition(codes, lengths, work), self._weights(work)
            flat = (shape[0] * shape[1], *shape[2:])
            # Also under autocast what is denoised keeps the precision of the parameters.
            kind, device = self.mean.dtype, available.device
            noisy = ops.randn(flat, seed=seed, row_id=ids, draw=Draw.INITIAL, dtype=kind, device=device)

            def predict(
                x: Tensor,
                step: int,
                shape: tuple[int, ...] = shape,
                context: tuple[Any, ...] = (condition, lengths_of_target, work, weights),
            ) -> Tensor:
                at = torch.full(shape[:2], step, device=x.device)
                return self._predict(x.view(shape), at, *context).flatten(0, 1).to(x.dtype)

            predict_eps = eps_of_v(predict, schedule) if self.config.prediction == "v" else predict
            noisy = denoise(predict_eps, noisy, schedule, steps=steps, solver=solver, eta=eta, seed=seed, row_id=ids)
            targets = [self.pairs[p][0] for p in work.pairs]
            real = noisy.view(shape) * self.std[targets][:, None, None] + self.mean[targets][:, None, None]
            real = torch.where(valid_mask(lengths_of_target, shape[2])[..., None], real, 0.0)
            for p, rows, valid, samples in zip(work.pairs, work.rows, work.valid, real, strict=True):
                made = samples.new_zeros(len(available), *samples.shape[1:])
                made[rows[valid]] = samples[valid]
                out[self.pairs[p]] = made
        return out

    def _standardise(self, x: Sequence[Tensor]) -> list[Tensor]:
        return [(v.detach() - mean) / std for v, mean, std in zip(x, self.mean, self.std, strict=True)]

    def _batched(self, wanted: Tensor) -> Iterator[_Work]:
        """What is wanted, bool ``[B, pairs]``, in batches: a pair's samples padded to as many as its neighbours'."""
        counts = wanted.sum(0).tolist()
        order = wanted.T.int().argsort(dim=1, descending=True, stable=True)
        for group in groups_of([self.lengths[target] for target, _ in self.pairs]):
            pairs = [p for p in group if counts[p]]
            if pairs:
                most = max(counts[p] for p in pairs)
                number = torch.tensor([counts[p] for p in pairs], device=wanted.device)
                yield _Work(pairs, order[pairs, :most], valid_mask(number, most))

    def _pick(self, values: Sequence[Tensor], work: _Work, end: int) -> Tensor:
        """``[g, n, …]`` of the targets (``end`` 0) or sources (1) of the work."""
        return torch.stack([values[self.pairs[p][end]][rows] for p, rows in zip(work.pairs, work.rows, strict=True)])

    def _row_ids(self, work: _Work, row_id: Tensor) -> Tensor:
        pairs = torch.tensor(work.pairs, device=row_id.device)
        return (row_id[work.rows] * len(self.pairs) + pairs[:, None]).flatten()

    def _which(self, work: _Work) -> Which:
        return choose(work.pairs, len(self.pairs))

    def _encode(self, x: Sequence[Tensor], lengths: Sequence[Tensor], wanted: Tensor) -> dict[int, Tensor]:
        """Conditions ``[B, L, C]`` of the sources that are ``wanted``, zero in samples that want none of them."""
        codes = {}
        for s, source in enumerate(x):
            rows = wanted[:, [p for p, pair in enumerate(self.pairs) if pair[1] == s]].any(1).nonzero().flatten()
            if not len(rows):
                continue
            code = cast(ConvGeluConv, self.encoders[s])(source[rows])
            code = torch.where(valid_mask(lengths[s][rows], code.shape[1])[..., None], code, 0.0)
            codes[s] = code.new_zeros(len(source), *code.shape[1:]).index_copy(0, rows, code)
        return codes

    def _condition(self, codes: dict[int, Tensor], lengths: Sequence[Tensor], work: _Work) -> Condition:
        sources = sorted({self.pairs[p][1] for p in work.pairs})
        steps = self.lengths[self.pairs[work.pairs[0]][0]]
        longest = max(codes[s].shape[1] for s in sources)
        encoded = {s: nn.functional.pad(codes[s], (0, 0, 0, longest - codes[s].shape[1])) for s in sources}
        pairs = list(zip(work.pairs, work.rows, strict=True))
        keys = torch.stack([encoded[self.pairs[p][1]][rows] for p, rows in pairs])
        near = torch.stack([_resample(codes[self.pairs[p][1]][rows], steps) for p, rows in pairs])
        source_lengths = self._pick(lengths, work, 1)
        if self.pair is None:
            return self.unet.condition(near, keys, source_lengths, self._which(work))
        told = self.pair[work.pairs][:, None, None]
        near, keys = ((t + told).flatten(0, 1)[None] for t in (near, keys))
        return self.unet.condition(near, keys, source_lengths.flatten()[None])

    def _weights(self, work: _Work) -> dict[str, Tensor] | None:
        """The networks' own weights where they would else be gathered anew in every layer at every step."""
        which = self._which(work)
        if self.pair is not None or isinstance(which, slice):
            return None
        return {name: parameter[which] for name, parameter in self.unet.named_parameters()}

    def _predict(
        self,
        x: Tensor,
        step: Tensor,
        condition: Condition,
        lengths: Tensor,
        work: _Work,
        weights: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if weights is not None:
            return functional_call(self.unet, weights, (x, step, condition, lengths))
        if self.pair is None:
            return self.unet(x, step, condition, lengths, self._which(work))
        noisy, at, ends = (t.flatten(0, 1)[None] for t in (x, step, lengths))
        return self.unet(noisy, at, condition, ends)[0].view_as(x)


def _resample(code: Tensor, steps: int) -> Tensor:
    return code if code.shape[1] == steps else nn.functional.interpolate(code.mT, steps, mode="linear").mT
