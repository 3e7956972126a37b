"""Missing rates against what they are the rates of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modafill.data import MissingRate

NAMES = ("text", "audio", "vision")
ROWS = torch.arange(200_000)


def draw(text: str, seed: int = 0, names: tuple[str, ...] = NAMES) -> np.ndarray:
    return MissingRate.parse(text).draw(ROWS, names, seed).numpy()


@pytest.mark.parametrize("rate", [0, 0.1, 0.3, 0.5, 1])
def test_a_rate_of_samples(rate: float) -> None:
    observed = draw(f"{rate}")
    lacking = ~observed.all(1)
    assert abs(lacking.mean() - rate) < 0.005
    sets, counts = np.unique(observed[lacking], axis=0, return_counts=True)
    if rate:
        assert len(sets) == 6
        np.testing.assert_allclose(counts / lacking.sum(), 1 / 6, atol=0.01)


@pytest.mark.parametrize("names", [NAMES, ("a", "b"), ("a", "b", "c", "d")])
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.9, 1])
def test_a_rate_of_entries(names: tuple[str, ...], share: float) -> None:
    most = 1 - 1 / len(names)
    observed = draw(f"entries:{share * most!r}", names=names)
    assert observed.any(1).all()
    assert abs((~observed).mean() - share * most) < 0.005
    np.testing.assert_allclose((~observed).mean(0), share * most, atol=0.006)
    if share == 1:
        assert (observed.sum(1) == 1).all()


def test_a_rate_for_each_modality() -> None:
    """The rates are met although something always stays; draws are independent otherwise."""
    observed = draw("text=0.5,vision=0.8")
    assert observed[:, 1].all()
    np.testing.assert_allclose((~observed).mean(0), [0.5, 0, 0.8], atol=0.005)
    for rates in ((0.5, 0.5, 0.8), (0.1, 0.9, 0.9), (0.3, 0, 0.5)):
        observed = draw(",".join(f"{name}={rate}" for name, rate in zip(NAMES, rates, strict=True)))
        assert observed.any(1).all()
        np.testing.assert_allclose((~observed).mean(0), rates, atol=0.005)
    # The odds of a modality do not depend on whether another one is there.
    observed = draw("text=0.5,audio=0.5,vision=0.5")
    shares = {
        tuple(seen): n / len(ROWS) for seen, n in zip(*np.unique(observed, axis=0, return_counts=True), strict=True)
    }
    pairs = shares[True, True, False] * shares[True, False, True]
    assert pairs / (shares[True, True, True] * shares[True, False, False]) == pytest.approx(1, abs=0.05)
    assert draw("text=1,audio=1,vision=0").tolist()[:2] == [[False, False, True]] * 2


def test_a_draw_depends_on_the_seed_the_rate_and_the_row_alone() -> None:
    for text in ("0.4", "entries:0.4", "text=0.4"):
        whole = draw(text)
        some = torch.tensor([7, 3, 199_999, 3])
        np.testing.assert_array_equal(MissingRate.parse(text).draw(some, NAMES, 0).numpy(), whole[some])
        assert (draw(text, seed=1) != whole).any()
    assert (draw("0.4") != draw("entries:0.4")).any()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected a rate such as 0.3"),
        ("much", "expected a rate such as 0.3"),
        ("0.3,0.4", "expected a rate such as 0.3"),
        ("text=0.3,0.4", "expected a rate such as 0.3"),
        ("text=0.3,text=0.4", "expected a rate such as 0.3"),
        ("text=0.3, text=0.4", "expected a rate such as 0.3"),
        ("entries:text=0.3", "expected a rate such as 0.3"),
        ("rows:0.3", "expected a rate such as 0.3"),
        ("1.2", r"expected rates in 0…1"),
        ("nan", r"expected rates in 0…1"),
        ("entries:0.7", r"each sample keeps one of 3 modalities: at most 0\.667 \(papers call that 0\.7\)"),
        ("smell=0.3", r"got the modalities \['smell'\], expected some of \['text', 'audio', 'vision'\]"),
        ("text=1,audio=1,vision=0.1", "each sample keeps one of 3 modalities: rates that come to at most 2"),
    ],
)
def test_what_cannot_be_had(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MissingRate.parse(text).check(NAMES)


@pytest.mark.parametrize("text", ["0.3", "entries:0.25", "text=0.3,vision=0.5"])
def test_its_text_reads_back(text: str) -> None:
    rate = MissingRate.parse(text)
    assert str(rate) == text
    assert MissingRate.parse(str(rate)) == rate
    assert MissingRate.parse("samples:0.3") == MissingRate.parse("0.3")
