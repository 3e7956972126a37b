"""ADN's loss against a float64 computation by the reference."""

from __future__ import annotations

import pytest
import torch

from modafill.data import random_available
from modafill.files import derive_seed
from modafill.models.admc import ADN, ADMCConfig
from modafill.ops import reference
from modafill.training.admc import diffusion_loss

SEED, EPOCH = 11, 4


def make(conditioning: str, **changes: float) -> tuple[ADN, torch.Tensor]:
    torch.manual_seed(0)
    config = ADMCConfig(
        conditioning=conditioning,
        width=8,
        adn_heads=2,
        adn_layers=1,
        adn_feedforward=16,
        diffusion_steps=300,
        **changes,
    )
    return ADN(3, config), torch.randn(20, 3, 8)


def network(x: torch.Tensor, step: torch.Tensor, available: torch.Tensor | None = None) -> torch.Tensor:
    """Something in ADN's place that is simple in any precision and uses all that it gets."""
    out = 0.7 * x.roll(1, dims=1) + step[:, None, None] / 300
    return out if available is None else out * (2 + available[..., None])


@pytest.mark.parametrize("conditioning", ["replace", "clean"])
def test_value(conditioning):
    adn, tokens = make(conditioning)
    rows = torch.tensor([3, 17, 0, 8, 9, 4])
    loss = diffusion_loss(adn, tokens, SEED)(network, rows, EPOCH)

    last = 300 if conditioning == "replace" else adn.schedule.last_step(1e-4)
    assert (conditioning == "replace") == (last == 300)
    steps = torch.randint(
        1, last + 1, (20,), generator=torch.Generator().manual_seed(derive_seed(SEED, "steps", EPOCH))
    )
    step, x0 = steps[rows], tokens[rows].double()
    noise_seed = derive_seed(SEED, "noise", EPOCH)
    noise = reference.randn((6, 3, 8), seed=noise_seed, row_id=rows, step=step, draw=reference.Draw.FORWARD)
    alpha_bar = adn.schedule.alpha_bar[step][:, None, None]
    noisy = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    if conditioning == "replace":
        expected = (network(noisy, step) - noise).square().mean()
    else:
        available = random_available(rows, 3, seed=SEED, draw=EPOCH)
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
        shown = torch.where(available[..., None], x0, noisy)
        expected = (network(shown, step, available) - v)[~available].square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_observed_tokens_are_not_in_the_clean_loss():
    adn, tokens = make("clean")
    rows = torch.arange(20)
    available = random_available(rows, 3, seed=SEED, draw=EPOCH)
    assert available.any(1).all()
    assert not available.all(1).any()
    loss = diffusion_loss(adn, tokens, SEED)

    def model(shift: torch.Tensor):
        return lambda x, step, seen: adn(x, step, seen) + shift

    shift = torch.randn(20, 3, 8)
    plain = loss(model(torch.zeros(())), rows, EPOCH)
    assert torch.equal(loss(model(shift * available[..., None]), rows, EPOCH), plain)
    assert not torch.equal(loss(model(shift * ~available[..., None]), rows, EPOCH), plain)


def test_observed_tokens_enter_clean():
    adn, tokens = make("clean")
    rows, seen = torch.arange(20), []
    diffusion_loss(adn, tokens, SEED)(lambda x, step, shown: seen.append((x, shown)) or x, rows, EPOCH)
    ((x, shown),) = seen
    assert torch.equal(x[shown], tokens[shown])
    assert (x[~shown] != tokens[~shown]).all()


@pytest.mark.parametrize("conditioning", ["replace", "clean"])
def test_row_does_not_depend_on_its_batch(conditioning):
    adn, tokens = make(conditioning)

    def inputs(rows: list[int], epoch: int, fresh: bool = False) -> dict[int, list[torch.Tensor]]:
        out: dict[int, list[torch.Tensor]] = {}

        def spy(*arguments):
            out.update({row: [a[i] for a in arguments] for i, row in enumerate(rows)})
            return arguments[0]

        (diffusion_loss(adn, tokens, SEED) if fresh else shared)(spy, torch.tensor(rows), epoch)
        return out

    shared = diffusion_loss(adn, tokens, SEED)
    whole = inputs(list(range(20)), 0)
    other_epoch = inputs(list(range(20)), 1)
    for rows in ([7], [19, 7, 2], [2, 7]):
        for row, arguments in inputs(rows, 0, fresh=True).items():
            assert all(torch.equal(a, b) for a, b in zip(arguments, whole[row], strict=True))
    assert all(not torch.equal(whole[row][0], other_epoch[row][0]) for row in whole)
    assert sum(int(whole[row][1]) != int(other_epoch[row][1]) for row in whole) > 15


def test_noise_on_the_condition():
    """What is observed enters with that much noise of its own; the hidden tokens and the target stay as they were."""
    adn, tokens = make("clean")
    noised, _ = make("clean", condition_noise=0.5, latent_scale=2.0)
    rows, seen = torch.arange(20), []
    for network in (adn, noised):
        diffusion_loss(network, tokens, SEED)(lambda x, step, shown: seen.append((x, shown)) or x, rows, EPOCH)
    (plain, shown), (blurred, shown_again) = seen
    assert torch.equal(shown, shown_again)
    assert torch.equal(plain[~shown], blurred[~shown])
    blur = reference.randn((20, 3, 8), seed=derive_seed(SEED, "condition", EPOCH), row_id=rows)
    torch.testing.assert_close(blurred[shown], (tokens + 1.0 * blur).float()[shown], rtol=0, atol=1e-5)


def test_steps_reach_both_ends():
    adn, tokens = make("replace")
    seen: list[int] = []
    loss = diffusion_loss(adn, tokens, SEED)
    for epoch in range(200):
        loss(lambda x, step: seen.extend(step.tolist()) or x, torch.arange(20), epoch)
    assert (min(seen), max(seen)) == (1, 300)
