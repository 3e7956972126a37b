from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from modafill.data import Batch, valid_steps

NAN = float("nan")


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        features={"text": torch.randn(4, 3, generator=generator), "audio": torch.randn(4, 5, 2, generator=generator)},
        available=torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]], dtype=torch.bool),
        row_id=torch.tensor([10, 11, 12, 13]),
        lengths={"audio": torch.tensor([5, 0, 2, 1])},
        label=torch.tensor([0, 1, 2, 3]),
    )


def test_hide_zeroes_and_marks() -> None:
    batch = make_batch()
    batch.features["text"][1] = NAN
    batch.features["audio"][3] = float("inf")
    may_see = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0]], dtype=torch.bool)
    hidden = batch.hide(may_see)
    assert hidden.available.tolist() == [[True, False], [False, False], [False, True], [True, False]]
    assert torch.equal(hidden.features["text"][[0, 3]], batch.features["text"][[0, 3]])
    assert not hidden.features["text"][[1, 2]].any()
    assert torch.equal(hidden.features["audio"][2], batch.features["audio"][2])
    assert not hidden.features["audio"][[0, 1, 3]].any()
    assert hidden.lengths["audio"].tolist() == [0, 0, 2, 0]
    assert batch.lengths["audio"].tolist() == [5, 0, 2, 1], "the batch itself is untouched"


def test_hidden_values_leave_no_trace() -> None:
    may_see = torch.tensor([[1, 0]] * 4, dtype=torch.bool)
    one, other = make_batch(), make_batch()
    other.features["audio"].fill_(NAN)
    other.features["text"][2] = 1e30  # not available to begin with
    other.lengths["audio"].fill_(3)
    a, b = one.hide(may_see), other.hide(may_see)
    for name in a.features:
        assert torch.equal(a.features[name], b.features[name])
    assert torch.equal(a.lengths["audio"], b.lengths["audio"])


@pytest.mark.parametrize(
    "rows", [torch.tensor([3, 0, 0]), torch.tensor([True, False, True, False]), [2, 1], slice(1, 3)], ids=str
)
def test_select(rows: torch.Tensor | list[int] | slice) -> None:
    expected = torch.arange(4)[torch.tensor(rows) if isinstance(rows, list) else rows]
    batch = make_batch()
    chosen = batch.select(rows)
    assert len(chosen) == len(expected)
    assert torch.equal(chosen.label, expected)
    assert torch.equal(chosen.row_id, expected + 10)
    assert torch.equal(chosen.features["audio"], batch.features["audio"][expected])
    assert torch.equal(chosen.lengths["audio"], batch.lengths["audio"][expected])
    assert torch.equal(chosen.available, batch.available[expected])


def test_to_moves_everything() -> None:
    moved = make_batch().to("meta")
    tensors = [*moved.features.values(), *moved.lengths.values(), moved.available, moved.row_id, moved.label]
    assert {x.device.type for x in tensors} == {"meta"}
    assert replace(make_batch(), label=None).to("meta").label is None


def test_valid_steps() -> None:
    batch = make_batch()
    assert valid_steps(batch, 0).tolist() == [True, True, False, True]
    assert valid_steps(batch, 1).int().tolist() == [[1] * 5, [0] * 5, [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_hidden_and_padding_values_may_be_anything() -> None:
    batch = make_batch()
    batch.features["text"][2] = NAN
    batch.features["audio"][1] = NAN
    batch.features["audio"][2, 2:] = float("inf")
    assert batch.validate({"text": 3, "audio": 2}) is batch


def edit(change: Callable[[Batch], object]) -> Batch:
    batch = make_batch()
    change(batch)
    return batch


@pytest.mark.parametrize(
    "batch, message",
    [
        (make_batch().select([]), "batch: got no rows"),
        (edit(lambda b: b.features["text"].__setitem__((0, 1), NAN)), r"features\['text'\]: got NaN .* in row id 10,"),
        (
            edit(lambda b: b.features["audio"].__setitem__((slice(2, 4), 0), NAN)),
            r"'audio'\]: got NaN .* row ids 12, 13",
        ),
        (edit(lambda b: b.features["audio"].__setitem__((0, 4, 1), -torch.inf)), r"row id 10"),
        (edit(lambda b: b.available.__setitem__(1, False)), "nothing is observed in row id 11, expected"),
        (replace(make_batch(), available=torch.ones(4, 3, dtype=torch.bool)), r"available: got .*\[4, 3\]"),
        (replace(make_batch(), available=torch.ones(4, 2)), r"available: got torch.float32"),
        (replace(make_batch(), label=torch.zeros(3)), "label: got 3 rows, expected 4"),
        (edit(lambda b: b.lengths.clear()), r"lengths\['audio'\]: got no lengths"),
        (edit(lambda b: b.lengths.__setitem__("text", torch.ones(4).long())), r"lengths\['text'\]: got lengths"),
        (edit(lambda b: b.lengths.__setitem__("audio", torch.tensor([5, 0, 6, 1]))), r"got 6 in row 2, expected 1…5"),
        (edit(lambda b: b.lengths.__setitem__("audio", torch.tensor([0, 0, 1, 1]))), r"got 0 in row 0, expected 1…5"),
        (edit(lambda b: b.lengths.__setitem__("audio", torch.ones(4))), r"expected torch.int64 \[4\]"),
        (edit(lambda b: b.features.__setitem__("text", torch.zeros(3, 3))), r"features\['text'\]: got .*\[3, 3\]"),
        (edit(lambda b: b.features.__setitem__("text", torch.zeros(4, 3).int())), r"got torch.int32"),
    ],
)
def test_validate_names_what_is_wrong(batch: Batch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch.validate()


@pytest.mark.parametrize(
    "widths, message",
    [
        ({"text": 4, "audio": 2}, r"features\['text'\]: got width 3, expected 4"),
        ({"text": 3}, r"unknown modality 'audio', expected \['text'\]"),
        ({"text": 3, "audio": 2, "vision": 1}, r"got modalities \['text', 'audio'\]"),
        ({"audio": 2, "text": 3}, "in this order"),
    ],
)
def test_validate_against_a_model(widths: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_batch().validate(widths)
