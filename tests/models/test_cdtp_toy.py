"""CDTP's diffusion against an exact conditional mean: the target is the filtered source and noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modafill.models.cdtp import CDTPConfig, ConditionalDiffusion

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LENGTH, WIDTH, TAPS = 12, 8, 3
BATCH = 256
UPDATES = {"v": 600, "epsilon": 1200}
TEST_ROWS, SAMPLES = 24, 256

CONFIG = CDTPConfig(
    width=WIDTH,
    heads=2,
    layers=1,
    unet_channels=(32, 48),
    unet_blocks=1,
    condition_width=32,
    sampling_steps=20,
)


@pytest.fixture(scope="module")
def taps() -> Tensor:
    """A filter ``[TAPS, WIDTH, WIDTH]`` whose output has about the variance of its input."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TAPS, WIDTH, WIDTH, generator=generator) / (TAPS * WIDTH) ** 0.5


def draw(taps: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Source, exact conditional mean of the target, and target: that mean and noise of standard deviation 1."""
    source = torch.randn(rows, LENGTH, WIDTH, generator=generator)
    padded = torch.nn.functional.pad(source, (0, 0, TAPS // 2, TAPS // 2))
    mean = sum((padded[:, k : k + LENGTH] @ taps[k] for k in range(TAPS)), torch.zeros(()))
    return source, mean, mean + torch.randn(rows, LENGTH, WIDTH, generator=generator)


@pytest.fixture(scope="module", params=["v", "epsilon"])
def diffusion(taps: Tensor, request: pytest.FixtureRequest) -> ConditionalDiffusion:
    torch.manual_seed(0)
    model = ConditionalDiffusion((LENGTH, LENGTH), replace(CONFIG, prediction=request.param))
    model.std.copy_(torch.tensor([1.0, 2**0.5])[:, None].expand(2, WIDTH))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    updates = UPDATES[request.param]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(2)
    available, lengths = torch.ones(BATCH, 2, dtype=torch.bool), torch.full((BATCH,), LENGTH)
    for update in range(updates):
        source, _, target = draw(taps, BATCH, generator)
        step = torch.randint(1, model.last_step + 1, (BATCH, 2), generator=generator)
        loss = model.loss(
            [source, target], [lengths, lengths], available, step, seed=update, row_id=torch.arange(BATCH)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
    return averaged.module.eval()


def test_ddim_reaches_the_conditional_mean_and_its_spread(taps: Tensor, diffusion: ConditionalDiffusion) -> None:
    source, mean, _ = draw(taps, TEST_ROWS, torch.Generator().manual_seed(7))
    rows = TEST_ROWS * SAMPLES
    lengths = torch.full((rows,), LENGTH)
    made = diffusion.generate(
        [source.repeat(SAMPLES, 1, 1), torch.zeros(rows, LENGTH, WIDTH)],
        [lengths, lengths],
        torch.tensor([[True, False]]).expand(rows, 2),
        seed=5,
        row_id=torch.arange(rows),
    )
    samples = made[1, 0].view(SAMPLES, TEST_ROWS, LENGTH, WIDTH)
    # In units of the noise's standard deviation, which is 1; 256 samples alone err by 0.06.
    assert float((samples.mean(0) - mean).square().mean().sqrt()) < 0.15
    # In the last steps an error of ε̂ is one of x, of v̂ but a part of it.
    widest = {"v": 1.1, "epsilon": 1.25}[diffusion.config.prediction]
    assert 0.85 < float(samples.std(0).square().mean().sqrt()) < widest
    # Without the source the best guess is 0, which errs by the mean's own deviation.
    assert float(mean.square().mean().sqrt()) > 0.8
