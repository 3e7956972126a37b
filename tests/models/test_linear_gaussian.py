"""Clean conditioning, trained and sampled, against the exact conditional law of a linear-Gaussian source."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modafill.data import missing_patterns
from modafill.models.admc import ADN, ADMCConfig
from modafill.training.admc import diffusion_loss

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

MODALITIES, WIDTH, LATENT = 3, 8, 2
BATCH, STEPS_PER_EPOCH, EPOCHS = 256, 200, 20
TEST_ROWS, SAMPLES, EVALUATIONS = 16, 256, 50

CONFIG = ADMCConfig(
    width=WIDTH,
    adn_width=64,
    adn_layers=2,
    adn_heads=4,
    adn_feedforward=128,
    fusion_heads=1,
    conditioning="clean",
    ema_decay=0.998,
    sampling_steps=EVALUATIONS,
)


@pytest.fixture(scope="module")
def covariance() -> Tensor:
    """Float64 ``[M·D, M·D]`` with unit diagonal: every coordinate mixes one latent vector and noise of its own."""
    mix = torch.randn(MODALITIES * WIDTH, LATENT, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    full = mix @ mix.T + LATENT * torch.eye(MODALITIES * WIDTH, dtype=torch.float64)
    scale = full.diagonal().rsqrt()
    return scale[:, None] * full * scale


def draw(covariance: Tensor, rows: int, seed: int) -> Tensor:
    z = torch.randn(rows, len(covariance), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (z @ torch.linalg.cholesky(covariance).T).reshape(rows, MODALITIES, WIDTH)


@pytest.fixture(scope="module")
def adn(covariance: Tensor) -> ADN:
    torch.manual_seed(0)
    model = ADN(MODALITIES, CONFIG)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(CONFIG.ema_decay))
    tokens = draw(covariance, BATCH * STEPS_PER_EPOCH, seed=2).to(torch.float32)
    loss = diffusion_loss(model, tokens, seed=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS_PER_EPOCH)
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(tokens)).split(BATCH):
            optimizer.zero_grad()
            loss(model, rows, epoch).backward()
            optimizer.step()
            decay.step()
            averaged.update_parameters(model)
    model.load_state_dict(averaged.module.state_dict())
    return model.eval()


@pytest.mark.parametrize("pattern", missing_patterns(MODALITIES).tolist(), ids=str)
def test_samples_follow_the_exact_conditional_law(adn: ADN, covariance: Tensor, pattern: list[bool]) -> None:
    tokens = draw(covariance, TEST_ROWS, seed=4)
    seen = torch.tensor(pattern).repeat_interleave(WIDTH)
    gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, ~seen])
    exact_mean = tokens.flatten(1)[:, seen] @ gain
    exact_covariance = covariance[~seen][:, ~seen] - covariance[~seen][:, seen] @ gain

    available = torch.tensor(pattern).expand(TEST_ROWS, -1)
    sampled = adn.sample(tokens.to(torch.float32), available, n_samples=SAMPLES, seed=5).to(torch.float64)
    sampled = sampled.flatten(2)[:, :, ~seen]
    mean = sampled.mean(0)
    around = (sampled - mean).flatten(0, 1)
    pooled = around.T @ around / (TEST_ROWS * (SAMPLES - 1))

    deviation = exact_covariance.diagonal().sqrt()
    assert (exact_mean / deviation).square().mean().sqrt() > 0.5, "the observed modalities must tell something"
    # The mean of 256 samples alone is off by 1/16 deviation.
    assert ((mean - exact_mean) / deviation).square().mean().sqrt() < 0.10
    assert (pooled - exact_covariance).norm() / exact_covariance.norm() < 0.15
