from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from modafill.data import FeatureStore, make_splits
from modafill.data.splits import describe_splits

MakeStore = Callable[..., FeatureStore]


def grouped(make_store: MakeStore, n: int = 200, groups: int = 17, **columns: Any) -> FeatureStore:
    names = np.array([f"g{i}" for i in range(groups)])
    drawn = np.r_[names, np.random.default_rng(0).choice(names, n - groups)]
    return make_store(n, groups={"who": drawn}, **columns)


def test_no_group_is_in_two_parts(make_store: MakeStore) -> None:
    store = grouped(make_store)
    groups = store.groups()
    partitions = set()
    for seed in range(20):
        splits = make_splits(store, folds=4, seed=seed)
        assert len(splits) == 4
        assert sorted(np.concatenate([s.test for s in splits])) == list(range(200)), "each sample is tested once"
        for split in splits:
            parts = [set(groups[rows]) for rows in split]
            assert not parts[0] & parts[1]
            assert not parts[0] & parts[2]
            assert not parts[1] & parts[2]
            assert sorted(np.concatenate(split)) == list(range(200))
            assert all(rows.dtype == np.int64 and (np.diff(rows) > 0).all() for rows in split)
        partitions.add(tuple(splits[0].test))
    assert len(partitions) > 10, "the seed matters"


def test_the_same_seed_gives_the_same_splits(make_store: MakeStore) -> None:
    store = grouped(make_store)
    one, two = (make_splits(store, folds=3, seed=5) for _ in range(2))
    assert all(np.array_equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))


def test_validation_is_a_share_of_the_groups(make_store: MakeStore) -> None:
    store = grouped(make_store, n=400, groups=100)
    groups = store.groups()
    for split in make_splits(store, folds=5, seed=0, valid_fraction=0.25):
        assert len(set(groups[split.valid])) == 20
        assert len(set(groups[split.train])) == 60


def test_one_fold_holds_out_a_fifth(make_store: MakeStore) -> None:
    (split,) = make_splits(grouped(make_store, n=400, groups=100), folds=1, seed=0)
    assert 60 <= len(split.test) <= 100


def test_given_parts_are_kept(make_store: MakeStore) -> None:
    parts = np.array(["train"] * 20 + ["val"] * 5 + ["Test"] * 15)
    groups = {"g": np.r_[np.arange(20) // 2, [50] * 5, 60 + np.arange(15)]}
    (split,) = make_splits(make_store(40, splits={"official": parts}, groups=groups), folds=1, seed=0)
    assert split.train.tolist() == list(range(20))
    assert split.valid.tolist() == list(range(20, 25))
    assert split.test.tolist() == list(range(25, 40))


def test_validation_is_carved_out_of_the_given_training_part(make_store: MakeStore) -> None:
    parts, groups = np.array(["train"] * 30 + ["test"] * 10), np.r_[np.arange(30) // 3, 90 + np.arange(10)]
    (split,) = make_splits(make_store(40, splits={"s": parts}, groups={"g": groups}), folds=1, seed=0)
    assert split.test.tolist() == list(range(30, 40))
    assert sorted([*split.train, *split.valid]) == list(range(30))
    assert len(split.valid)
    assert not set(groups[split.train]) & set(groups[split.valid])


def test_classes_are_balanced_where_there_are_no_groups(make_store: MakeStore) -> None:
    labels = np.repeat(np.arange(4), 30)
    store = make_store(120, labels={"y": labels}, task={"label": {"name": "y", "kind": "class"}})
    for split in make_splits(store, folds=3, seed=1, valid_fraction=0.2):
        assert [np.bincount(labels[rows]).tolist() for rows in split] == [[16] * 4, [4] * 4, [10] * 4]


def test_scores_are_divided_at_random(make_store: MakeStore) -> None:
    task = {"label": {"name": "score", "kind": "score"}}
    scores = np.random.default_rng(0).normal(size=60)
    (split,) = make_splits(make_store(60, labels={"score": scores}, task=task), folds=1, seed=0)
    assert len(split.test) == 12


def test_a_split_that_comes_along_can_be_ignored(make_store: MakeStore) -> None:
    store = make_store(40, splits={"official": np.array(["train"] * 30 + ["test"] * 10)})
    splits = make_splits(store, folds=4, seed=0, own_split=False)
    assert sorted(np.concatenate([split.test for split in splits])) == list(range(40))


def test_without_labels_and_groups(make_store: MakeStore) -> None:
    splits = make_splits(make_store(30), folds=3, seed=1)
    assert sorted(np.concatenate([s.test for s in splits])) == list(range(30))


def test_description(make_store: MakeStore) -> None:
    n, seed = 40, 3
    task = {"label": {"name": "y", "kind": "class"}}
    labels, groups = {"y": np.arange(n) % 4}, {"who": np.arange(n) // 4}
    whole = {"split": np.array(["train"] * 20 + ["dev"] * 8 + ["test"] * 12)}
    carved = {name: np.array(["train"] * 20 + ["test"] * 20) for name in ("a", "b")}
    plain, by_class = make_store(n), make_store(n, labels=labels, task=task)
    by_group = make_store(n, labels=labels, task=task, groups=groups)
    own = make_store(n, groups=groups, splits=whole)
    own_folds = make_store(n, groups=groups, splits=carved, task={"folds": ["a", "b"]})
    for store, folds, own_split, expected in (
        (plain, 1, True, "a hold-out at random with seed 3"),
        (by_class, 5, True, "5 folds stratified by 'y', at random with seed 3"),
        (by_group, 5, True, "5 folds by whole groups of 'who', at random with seed 3"),
        (own, 1, True, "own split 'split'"),
        (own, 2, False, "2 folds by whole groups of 'who', at random with seed 3"),
        (own_folds, 2, True, "own folds 'a', 'b', validation by whole groups of 'who', at random with seed 3"),
    ):
        make_splits(store, folds=folds, seed=seed, own_split=own_split)
        assert describe_splits(store, folds=folds, seed=seed, own_split=own_split) == expected


def test_errors(make_store: MakeStore) -> None:
    store = grouped(make_store, n=20, groups=3)
    with pytest.raises(ValueError, match=r"folds: got 4, expected at most the number of groups, 3"):
        make_splits(store, folds=4, seed=0)
    with pytest.raises(ValueError, match="folds: got 0"):
        make_splits(store, folds=0, seed=0)
    with pytest.raises(ValueError, match="valid_fraction: got 1"):
        make_splits(store, folds=2, seed=0, valid_fraction=1)
    with pytest.raises(ValueError, match="a single training group"):
        make_splits(grouped(make_store, n=20, groups=2), folds=2, seed=0)
    with pytest.raises(ValueError, match="no groups named 'x'"):
        make_splits(store, folds=2, seed=0, group="x")
    with pytest.raises(ValueError, match="number of samples, 3"):
        make_splits(make_store(3), folds=4, seed=0)
    rare = make_store(9, labels={"y": np.r_[1, np.zeros(8)]}, task={"label": {"name": "y", "kind": "class"}})
    with pytest.raises(ValueError, match="the rarest class has 1 samples"):
        make_splits(rare, folds=3, seed=0)


@pytest.mark.parametrize(
    "parts, folds, message",
    [
        (["train"] * 6 + ["test"] * 4, 2, "folds: got 2, expected 1"),
        (["train"] * 10, 1, "the test part is empty"),
        (["test"] * 10, 1, "the train part is empty"),
        (["train"] * 6 + ["holdout"] * 4, 1, r"got the parts \['holdout'\]"),
        (["train"] * 5 + ["test"] * 5, 1, "1 groups have samples in more than one part"),
    ],
)
def test_errors_of_given_parts(make_store: MakeStore, parts: list[str], folds: int, message: str) -> None:
    store = make_store(10, splits={"s": np.array(parts)}, groups={"g": np.arange(10) // 2})
    with pytest.raises(ValueError, match=message):
        make_splits(store, folds=folds, seed=0)
