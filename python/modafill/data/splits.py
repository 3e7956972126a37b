"""Training, validation and test parts that no group straddles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from modafill.data.labels import Labels
from modafill.data.store import FeatureStore

PART_NAMES = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
# One fold alone holds out as much as one of this many would.
HOLD_OUT = 5


class Split(NamedTuple):
    """Row numbers of the three parts, int64, sorted and disjoint."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def make_splits(
    store: FeatureStore,
    *,
    folds: int,
    seed: int,
    valid_fraction: float = 0.15,
    group: str | None = None,
    split: str | None = None,
    own_split: bool = True,
) -> list[Split]:
    """Divide a store's samples for training and testing.

    A split column is used as it is (``train``, ``valid``/``val``/``dev``, ``test``; a sample without a part is left
    out), with the validation part carved out of the training part if it has none. Data that come with folds have a
    split column for each, and the first ``folds`` of them are used. Otherwise the folds are made of whole groups where
    there is a group column,
    and stratified by class where there is none. Validation is carved out of each fold's training part the same way.
    One fold without a split column is a plain hold-out of a fifth.

    Args:
        folds: number of test parts; 1 where one split is given.
        seed: of the shuffling.
        valid_fraction: share of the training part's groups (or samples) that becomes validation, in (0, 1).
        group: group column (default: the task's, or the only one).
        split: split column (default: the only one).
        own_split: use the split column; False divides all samples anew.

    Returns:
        ``folds`` splits. No group is in two parts of one split.

    Raises:
        ValueError: more folds than groups, an empty part, a given split that divides a group.
    """
    if folds < 1:
        raise ValueError(f"folds: got {folds}, expected at least 1")
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction: got {valid_fraction}, expected a value in (0, 1)")
    groups = None
    if store.group_names or group is not None:
        groups = np.unique(store.groups(group or store.task.get("group")), return_inverse=True)[1]
    divide = _Divider(groups, _strata(store) if groups is None else None, seed, valid_fraction)
    if own_split and (split is not None or store.split_names):
        splits = [_given(store.split(name), divide) for name in _own_columns(store, folds, split)]
    else:
        parts = divide.folds(len(store), folds)
        splits = [Split(*divide.carve(train, fold), test) for fold, (train, test) in enumerate(parts)]
    for parts_of_fold in splits:
        _check(parts_of_fold, groups)
    return splits


def describe_splits(store: FeatureStore, *, folds: int, seed: int, own_split: bool = True) -> str:
    """What :func:`make_splits` does with these arguments, in words."""
    label = store.task.get("label")
    how = f"at random with seed {seed}"
    if store.group_names:
        how = f"by whole groups of {store.task.get('group') or store.group_names[0]!r}, {how}"
    elif label is not None and label["kind"] != "score":
        how = f"stratified by {label['name']!r}, {how}"
    if not (own_split and store.split_names):
        return f"{f'{folds} folds' if folds > 1 else 'a hold-out'} {how}"
    columns = [name or store.split_names[0] for name in _own_columns(store, folds, None)]
    text = f"own {'folds' if folds > 1 else 'split'} {', '.join(map(repr, columns))}"
    named = {PART_NAMES.get(str(part).lower()) for column in columns for part in store.split(column)}
    return text if "valid" in named else f"{text}, validation {how}"


class _Divider(NamedTuple):
    groups: np.ndarray | None
    strata: np.ndarray | None
    seed: int
    valid_fraction: float

    def folds(self, n: int, folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(rest, test) of each fold; one fold alone is the first of HOLD_OUT."""
        # Loading scikit-learn takes longer than all else here, and inference has no use for it.
        from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

        unit, units = ("samples", n) if self.groups is None else ("groups", int(self.groups.max()) + 1)
        if folds > units or units < 2:
            raise ValueError(f"folds: got {folds}, expected at most the number of {unit}, {units}")
        k = folds if folds > 1 else min(HOLD_OUT, units)
        if self.groups is not None:
            parts = GroupKFold(k, shuffle=True, random_state=self.seed).split(np.zeros(n), groups=self.groups)
        elif self.strata is None:
            parts = KFold(k, shuffle=True, random_state=self.seed).split(np.zeros(n))
        else:
            smallest = int(np.bincount(self.strata).min())
            if smallest < k:
                raise ValueError(f"folds: got {folds}, but the rarest class has {smallest} samples")
            parts = StratifiedKFold(k, shuffle=True, random_state=self.seed).split(np.zeros(n), self.strata)
        return list(parts)[:folds]

    def carve(self, rows: np.ndarray, fold: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(train, valid) out of ``rows``, by group where there are groups."""
        from sklearn.model_selection import GroupShuffleSplit, train_test_split

        seed = self.seed + fold
        if self.groups is None:
            strata = None if self.strata is None else self.strata[rows]
            try:
                train, valid = train_test_split(rows, test_size=self.valid_fraction, random_state=seed, stratify=strata)
            except ValueError as error:
                raise ValueError(f"cannot carve validation out of {len(rows)} training samples: {error}") from None
            return np.sort(train), np.sort(valid)
        groups = self.groups[rows]
        if len(np.unique(groups)) < 2:
            raise ValueError("cannot carve validation out of a single training group")
        shuffle = GroupShuffleSplit(1, test_size=self.valid_fraction, random_state=seed)
        train, valid = next(shuffle.split(rows, groups=groups))
        return rows[train], rows[valid]


def _own_columns(store: FeatureStore, folds: int, split: str | None) -> list[str | None]:
    """The split columns to use, one for each fold; None for the only one."""
    own = store.task.get("folds", [])
    others = [name for name in store.split_names if name not in own]
    if split is None and own and (folds > 1 or not others):
        if folds > len(own):
            raise ValueError(f"folds: got {folds}, expected at most the {len(own)} that {store.name} comes with")
        return own[:folds]
    if folds != 1:
        raise ValueError(f"folds: got {folds}, expected 1: {store.name} comes with a split (ignore it to divide anew)")
    return [others[0] if split is None and len(others) == 1 else split]


def _given(column: np.ndarray, divide: _Divider) -> Split:
    names = [str(name).lower() for name in column]
    unknown = set(names) - {*PART_NAMES, ""}
    if unknown:
        raise ValueError(f"split: got the parts {sorted(unknown)}, expected names among {sorted(PART_NAMES)}")
    part = np.array([PART_NAMES.get(name, "") for name in names])
    train, valid, test = (np.flatnonzero(part == name) for name in Split._fields)
    if len(train) and not len(valid):
        train, valid = divide.carve(train)
    return Split(train, valid, test)


def _strata(store: FeatureStore) -> np.ndarray | None:
    """What to balance the parts by: the task's classes, taken over all samples; None for a score."""
    spec = store.task.get("label")
    if spec is None or spec["kind"] == "score":
        return None
    values = store.labels(spec["name"])
    return Labels.fit(spec, values, np.arange(len(store))).encode(values)


def _check(split: Split, groups: np.ndarray | None) -> None:
    for name, rows in split._asdict().items():
        if not len(rows):
            raise ValueError(f"split: the {name} part is empty")
    rows = np.concatenate(split)
    assert len(np.unique(rows)) == len(rows), "a sample is in two parts"
    if groups is not None:
        by_part = np.concatenate([np.unique(groups[part]) for part in split])
        shared = len(by_part) - len(np.unique(by_part))
        if shared:
            raise ValueError(f"split: {shared} groups have samples in more than one part")
