from itertools import product

import pytest
import torch

from modafill.data import all_patterns, missing_patterns, pattern_index, pattern_name, random_available

TAV = ("text", "audio", "vision")


def test_three_modalities_follow_the_papers_modes() -> None:
    missing = [{TAV[m][0] for m in range(3) if not row[m]} for row in missing_patterns(3)]
    assert missing == [{"t"}, {"a"}, {"v"}, {"t", "a"}, {"t", "v"}, {"a", "v"}]
    assert all_patterns(3)[6].all()


@pytest.mark.parametrize("m", [2, 3, 4, 7])
def test_patterns_are_complete_and_ordered(m: int) -> None:
    rows = [tuple(i for i in range(m) if not seen[i]) for seen in missing_patterns(m).tolist()]
    expected = [tuple(i for i in range(m) if bits[i]) for bits in product((0, 1), repeat=m)]
    expected = [c for c in expected if 0 < len(c) < m]
    assert rows == sorted(expected, key=lambda c: (len(c), c))


@pytest.mark.parametrize("m", [2, 3, 5])
def test_pattern_index_inverts_all_patterns(m: int) -> None:
    order = torch.randperm(2**m - 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pattern_index(all_patterns(m)[order]), order)
    assert pattern_index(all_patterns(m)).dtype == torch.int64


def test_pattern_index_names_the_empty_row() -> None:
    available = torch.tensor([[True, False], [False, False], [True, True]])
    with pytest.raises(ValueError, match=r"nothing is observed in row 1$"):
        pattern_index(available)
    with pytest.raises(ValueError, match=r"available: got torch.int64 \[1, 2\], expected torch.bool"):
        pattern_index(torch.ones(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("m", [0, 1, 17])
def test_number_of_modalities_is_checked(m: int) -> None:
    with pytest.raises(ValueError, match="n_modalities"):
        missing_patterns(m)


def test_names_are_those_of_the_tables() -> None:
    names = [pattern_name(row, TAV) for row in all_patterns(3)]
    assert names == ["{av}", "{tv}", "{at}", "{v}", "{a}", "{t}", "{atv}"]


def test_names_are_spelled_out_where_initials_collide() -> None:
    assert pattern_name([True, False, True], ["text", "touch", "audio"]) == "{audio+text}"
    with pytest.raises(ValueError, match="got 2 entries"):
        pattern_name([True, False], TAV)


def test_random_patterns_are_uniform() -> None:
    draw = random_available(torch.arange(60_000), 3, seed=1)
    counts = torch.bincount(pattern_index(draw), minlength=7)
    assert counts[6] == 0
    chi2 = ((counts[:6] - 10_000.0) ** 2 / 10_000).sum()
    assert chi2 < 20.5  # 0.1 % quantile of chi² with 5 degrees of freedom


def test_drop_rate_is_the_share_of_incomplete_rows() -> None:
    draw = random_available(torch.arange(50_000), 4, seed=2, drop_rate=0.2)
    assert abs((~draw.all(1)).float().mean().item() - 0.2) < 0.006
    assert random_available(torch.arange(100), 4, seed=2, drop_rate=0.0).all()


def test_random_patterns_depend_on_seed_draw_and_row_alone() -> None:
    rows = torch.randperm(1000, generator=torch.Generator().manual_seed(0)) * 2**40
    state = torch.random.get_rng_state()
    whole = random_available(rows, 3, seed=5, draw=3, drop_rate=0.7)
    parts = [random_available(part, 3, seed=5, draw=3, drop_rate=0.7) for part in rows.split(13)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(torch.random.get_rng_state(), state)
    for other in ({"seed": 6, "draw": 3}, {"seed": 5, "draw": 4}, {"seed": 3, "draw": 5}, {"seed": -5, "draw": 3}):
        assert not torch.equal(whole, random_available(rows, 3, drop_rate=0.7, **other))


def test_nothing_missing_becomes_available() -> None:
    available = all_patterns(3).repeat(2000, 1)
    draw = random_available(torch.arange(len(available)), 3, seed=0, available=available)
    assert not (draw & ~available).any()
    assert draw.any(1).all()
    single = available.sum(1) == 1
    assert torch.equal(draw[single], available[single])
    assert (draw.sum(1) < available.sum(1))[~single].all()
    pairs = draw[available.sum(1) == 2].float().mean(0)
    assert (pairs - 1 / 3).abs().max() < 0.02
