"""A whole model at work, beside the same one in plain PyTorch, batched and sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modafill import ops
from modafill.benchmarks.rivals import SEED, Builders, check_each, relative_errors
from modafill.benchmarks.runner import Case, Check, Contender
from modafill.data import Batch, random_available
from modafill.models.cdtp import CDTP, CDTPConfig, SequenceSpec
from modafill.ops.reference import SQRT_ALPHA_BAR, SQRT_ONE_MINUS_ALPHA_BAR

# CMU-MOSI as MPLMM reads it: steps and features of text, audio and vision.
MOSI = {"text": (50, 768), "audio": (375, 5), "vision": (500, 20)}
QUICK = {"text": (5, 8), "audio": (9, 5), "vision": (11, 4)}
CLASSES = 4


class Cdtp:
    """One training step or one imputation of CDTP on a batch in which every sample has a missing pattern of its own.

    A training step is that of joint training: the task's and the diffusion's loss, with what is missing generated,
    forward and backward. "eager" has the ops in plain PyTorch, its attention too (``scaled_dot_product_attention`` with
    a mask), "eager-per-sample" one sample after the other, as public code does. "modafill-bfloat16" is ours under
    :class:`torch.autocast`. All are held to what a further run of "eager" gives, without dropout, each gradient and
    each completed modality by itself (:func:`~modafill.benchmarks.rivals.check_each`).

    Args:
        preset: of the model.
        micro_batch: so many samples at a time go through a training step of the batched ones, whose gradients add up to
            those of the batch; for a machine whose memory the whole batch does not fit. None = all.
        case: batch and lengths.
    """

    def __init__(self, preset: str, micro_batch: int | None, case: Case) -> None:
        self.case = case
        self.micro_batch = micro_batch
        batch, *lengths = case.shape
        shapes = QUICK if case.quick else MOSI
        specs = {
            name: SequenceSpec(width, length)
            for (name, (_, width)), length in zip(shapes.items(), lengths, strict=True)
        }
        torch.manual_seed(SEED)
        self.model = CDTP(specs, CLASSES, CDTPConfig.preset(preset)).to(case.device)
        for parameter in self.model.parameters():
            # Residual branches begin at zero: a check would not see them.
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.02)
        rows = torch.arange(batch, device=case.device)
        whole = Batch(
            {name: torch.randn(batch, s.length, s.width, device=case.device) for name, s in specs.items()},
            torch.ones(batch, len(specs), dtype=torch.bool, device=case.device),
            rows,
            {name: torch.full((batch,), s.length, device=case.device) for name, s in specs.items()},
        )
        self.whole = whole
        self.shown = random_available(rows, len(specs), seed=SEED)
        self.target = torch.randint(CLASSES, (batch,), device=case.device)
        assert self.model.diffusion is not None
        last, pairs = self.model.diffusion.last_step, len(self.model.diffusion.pairs)
        self.steps = torch.randint(1, last + 1, (batch, pairs), device=case.device)
        self.traffic = sum(x.nbytes for x in whole.features.values())

    sets = 1

    @property
    def builders(self) -> Builders:
        return {
            "modafill": partial(self._contender, nullcontext),
            "modafill-bfloat16": partial(self._contender, self._in_bfloat16, precision="bfloat16"),
            "eager": partial(self._contender, plain_ops),
            "eager-per-sample": partial(self._contender, plain_ops, one_by_one=True),
        }

    def _contender(
        self, context: Callable[[], Any], *, one_by_one: bool = False, precision: str = "float32"
    ) -> Contender:
        training, batch = self.case.mode == "train", len(self.whole)
        work = self._train if training else self._impute
        size = 1 if one_by_one else (self.micro_batch if training else None) or batch

        def run(_: int, context: Callable[[], Any] = context) -> Any:
            with context():
                return [work(slice(i, i + size)) for i in range(0, batch, size)]

        def outcome(context: Callable[[], Any]) -> dict[str, Tensor]:
            self.model.eval()
            parts = run(0, context)
            self.model.train(training)
            if training:
                return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
            return {name: torch.cat([part[name] for part in parts]) for name in self.model.modalities}

        @contextmanager
        def eager_in_bfloat16() -> Iterator[None]:
            with plain_ops(), self._in_bfloat16():
                yield

        evaluations = 0

        def count(*_: Any) -> None:
            nonlocal evaluations
            evaluations += 1

        def check() -> Check:
            assert self.model.diffusion is not None
            if self._expected is None:
                self._expected = outcome(plain_ops)
            eager = {} if precision == "float32" else relative_errors(outcome(eager_in_bfloat16), self._expected)
            handle = self.model.diffusion.unet.register_forward_hook(count)
            found = outcome(context)
            handle.remove()
            verdict, fields = check_each(found, self._expected, precision, eager)
            about.update(fields, network_evaluations=evaluations)
            return verdict

        about: dict[str, Any] = {"samples_at_a_time": size}
        return Contender(run, check, self.traffic, about)

    _expected: dict[str, Tensor] | None = None

    def _in_bfloat16(self) -> Any:
        return torch.autocast(self.case.device.type, torch.bfloat16)

    def _train(self, part: slice) -> Tensor:
        model, batch = self.model, self.whole.select(part)
        if part.start == 0:
            model.zero_grad(set_to_none=True)
        assert model.diffusion is not None
        with torch.enable_grad():
            whole = model.project(batch)
            given = whole.hide(self.shown[part])
            said = model.predict(model.complete(given, model.generate(given, seed=SEED)))
            task = F.cross_entropy(said, self.target[part], reduction="sum") / len(self.whole)
            noise = model.diffusion.loss(
                whole.x, whole.lengths, whole.available, self.steps[part], seed=SEED, row_id=whole.row_id
            )
            (task + noise * len(batch) / len(self.whole)).backward()
        return task.detach()

    def _impute(self, part: slice) -> dict[str, Tensor]:
        batch = self.whole.select(part).hide(self.shown[part])
        done = self.model.impute(batch, seed=SEED)
        return {name: samples[0] for name, samples in done.samples.items()}


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mode: Tensor | None = None,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: Any = None,
) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    mask = torch.zeros((), dtype=q.dtype, device=q.device)
    if bias is not None:
        mask = bias if mode is None else bias.index_select(0, mode)
    if causal:
        future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + abs(keys - queries))
        mask = mask.masked_fill(future, -torch.inf)
    if key_lengths is not None:
        mask = mask.masked_fill(torch.arange(keys, device=q.device) >= key_lengths[:, None, None, None], -torch.inf)
    whole = mask.expand(*mask.shape[:-2], queries, keys) if mask.ndim else None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=whole, dropout_p=dropout)
    return out if key_lengths is None else out.masked_fill((key_lengths == 0)[:, None, None, None], 0.0)


def _conv_gelu_conv(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, approximate: str = "none"
) -> Tensor:
    hidden = F.gelu(F.conv1d(x.mT, w1, b1, padding=w1.shape[2] // 2), approximate=approximate)
    return F.conv1d(hidden, w2, b2, padding=w2.shape[2] // 2).mT


def _ddim_step(
    x: Tensor, eps: Tensor, table: Tensor, step: int, prev_step: int, *, eta: float = 0.0, seed: Any, row_id: Any
) -> Tensor:
    signal, sigma = table[step, SQRT_ALPHA_BAR], table[step, SQRT_ONE_MINUS_ALPHA_BAR]
    prev_signal, prev_sigma = table[prev_step, SQRT_ALPHA_BAR], table[prev_step, SQRT_ONE_MINUS_ALPHA_BAR]
    return prev_signal * (x - sigma * eps) / signal + prev_sigma * eps


@contextmanager
def plain_ops() -> Iterator[None]:
    """The models' ops in plain PyTorch; the noise stays that of the op, so that results can be compared."""
    plain: Mapping[str, Any] = {
        "prompt_attention": _attention,
        "conv_gelu_conv": _conv_gelu_conv,
        "ddim_step": _ddim_step,
    }
    ours = {name: getattr(ops, name) for name in plain}
    try:
        for name, op in plain.items():
            setattr(ops, name, op)
        yield
    finally:
        for name, op in ours.items():
            setattr(ops, name, op)
