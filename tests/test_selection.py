import pytest
import torch

from skim.selection import Selection


def selection(rows, counts=None):
    indices = torch.tensor(rows, dtype=torch.int32)[None, :, None]
    counts = (indices >= 0).sum(-1, dtype=torch.int32) if counts is None else torch.tensor(counts, dtype=torch.int32)[None, :, None]
    return Selection(indices, counts)


def test_from_mask_is_ascending_and_padded_on_the_right():
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)[None, :, None]
    made = Selection.from_mask(mask, 3)
    assert made.indices[0, :, 0].tolist() == [[1, 3, -1], [-1, -1, -1], [0, 1, 2]]
    assert made.counts[0, :, 0].tolist() == [2, 0, 3]
    assert made.indices.dtype == made.counts.dtype == torch.int32 and made.budget == 3
    made.check(4)


def test_from_mask_with_a_budget_above_the_number_of_keys():
    made = Selection.from_mask(torch.ones(1, 1, 1, 2, dtype=torch.bool), 5)
    assert made.indices.flatten().tolist() == [0, 1, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_indices_puts_any_order_and_any_holes_in_order(dtype):
    made = Selection.from_indices(torch.tensor([[7, -1, 0, 3], [-1, -1, -1, -1]], dtype=dtype)[None, :, None])
    assert made.indices[0, :, 0].tolist() == [[0, 3, 7, -1], [-1, -1, -1, -1]]
    assert made.counts.flatten().tolist() == [3, 0]
    made.check(8)


def test_from_mask_and_from_indices_keep_batches_and_selections_apart():
    mask = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    made = Selection.from_mask(mask, 9)
    made.check(9)
    back = torch.zeros_like(mask)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        back[(*place, made.indices[tuple(place)][: made.counts[tuple(place)]].long())] = True
    assert torch.equal(back, mask)
    again = Selection.from_indices(made.indices.flip(-1))
    assert torch.equal(again.indices, made.indices) and torch.equal(again.counts, made.counts)


def test_check_accepts_full_short_and_empty_rows():
    selection([[0, 1, 2], [5, -1, -1], [-1, -1, -1]]).check(6)


@pytest.mark.parametrize(
    "broken, message",
    [
        (selection([[0, 6]]), r"indices: expected positions in \[0, 6\)"),
        (selection([[-1, 3]], counts=[2]), r"indices: expected positions in \[0, 6\)"),
        (selection([[3, 2]]), "strictly ascending"),
        (selection([[3, 3]]), r"no key twice"),
        (selection([[1, 2]], counts=[1]), r"indices: expected -1 behind"),
        (Selection(torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.int32)), "indices: expected int32"),
        (Selection(torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32)), r"indices: expected int32 \[B, T, R, K\]"),
        (Selection(torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1)), r"counts: expected int32 \(1, 1, 1\), got torch.float32"),
        (Selection(torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32)), r"counts: expected int32 \(1, 1, 1\)"),
    ],
)
def test_check_names_the_broken_invariant(broken, message):
    with pytest.raises(ValueError, match=message):
        broken.check(6)


def test_a_selection_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        selection([[0]]).indices = torch.zeros(1)


def test_selections_are_compared_by_identity():
    one, other = selection([[0, 1]]), selection([[0, 1]])
    assert one == one and one != other and len({one, other}) == 2
