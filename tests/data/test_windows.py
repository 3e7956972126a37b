from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from modafill.data import FeatureStore

MakeStore = Callable[..., FeatureStore]


def dialogues(make_store: MakeStore, n: int = 60) -> FeatureStore:
    """Interleaved groups whose turns are out of order, some turns lacking a modality."""
    random = np.random.default_rng(3)
    available = random.random((n, 3)) < 0.6
    return make_store(
        n,
        available=available,
        groups={"dialogue": random.choice(["a", "b", "c", "lone"], n, p=[0.4, 0.3, 0.28, 0.02])},
        order=random.permutation(n),
    )


@pytest.mark.parametrize("length", [1, 3, 8, 100])
def test_windows_against_a_loop(make_store: MakeStore, length: int) -> None:
    store = dialogues(make_store)
    plain = store.read(np.arange(len(store)))
    groups, order, available = store.groups(), store.order(), store.available()
    rows = np.random.default_rng(0).integers(0, len(store), 90)
    view = store.windowed(length)
    batch = view.read(rows)
    assert set(view.kinds.values()) == {"sequence"}
    assert view.max_lengths == dict.fromkeys(store.modalities, length)
    np.testing.assert_array_equal(batch.available, available[rows])
    for m, name in enumerate(store.modalities):
        expected = torch.zeros(len(rows), length, store.widths[name])
        for i, row in enumerate(rows):
            earlier = [r for r in range(len(store)) if groups[r] == groups[row] and order[r] <= order[row]]
            turns = sorted(earlier, key=lambda r: order[r])[-length:]
            if not available[row, m]:
                assert batch.lengths[name][i] == 0
                continue
            turns = [turn for turn in turns if available[turn, m]]
            assert batch.lengths[name][i] == len(turns)
            for place, turn in enumerate(turns):
                expected[i, place] = plain.features[name][turn]
        assert torch.equal(batch.features[name], expected)


def test_batches_of_windows(make_store: MakeStore) -> None:
    view = dialogues(make_store).windowed(4)
    for batch in view.iter_batches(np.arange(60), 16, shuffle_seed=0):
        assert torch.equal(batch.features["text"], view.read(batch.row_id.numpy()).features["text"])


def test_unwindowed(make_store: MakeStore) -> None:
    store = dialogues(make_store)
    back = store.windowed(4).unwindowed()
    assert back.window is None
    assert back.kinds == store.kinds
    rows = np.arange(60)
    assert torch.equal(back.read(rows).features["text"], store.read(rows).features["text"])


def test_earlier_generated_turns_are_read_on_request(make_store: MakeStore) -> None:
    x = {"a": np.ones((3, 1)), "b": np.ones((3, 1))}
    seen = np.array([[1, 0], [1, 1], [1, 1]], dtype=bool)
    filled = np.array([[0, 1], [0, 0], [0, 0]], dtype=bool)
    store = make_store(features=x, available=seen, generated=filled, groups={"g": np.zeros(3)}, order=np.arange(3))
    view = store.windowed(3)
    for with_generated, length in ((False, 2), (True, 3)):
        batch = view.read(np.array([2]), generated=with_generated)
        assert batch.features["b"].flatten().tolist() == [1, 1, float(with_generated)]
        assert batch.lengths["b"].tolist() == [length]


def test_what_windows_need(make_store: MakeStore) -> None:
    with pytest.raises(ValueError, match="a group column and an order column"):
        make_store(4).windowed(2)
    with pytest.raises(ValueError, match="a group column and an order column"):
        make_store(4, order=np.arange(4)).windowed(2)
    columns = {"groups": {"g": np.zeros(4)}, "order": np.arange(4)}
    with pytest.raises(ValueError, match="length: got 0"):
        make_store(4, **columns).windowed(0)
    sequences = {"a": np.ones((4, 2, 1)), "b": np.ones((4, 2, 1))}
    with pytest.raises(ValueError, match="every modality here is a sequence"):
        make_store(features=sequences, **columns).windowed(2)
