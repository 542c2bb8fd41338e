import pytest
import torch

from skim.ops import visible
from skim.ops.checks import expect_interval


def intervals(pair):
    start, end = pair
    assert start.dtype == end.dtype == torch.int32 and start.shape == end.shape
    return start.tolist(), end.tolist()


def test_causal_queries_stand_at_the_end_of_the_keys():
    assert intervals(visible(4, 4)) == ([[0, 0, 0, 0]], [[1, 2, 3, 4]])
    assert intervals(visible(5, 2)) == ([[0, 0]], [[4, 5]])


@pytest.mark.parametrize("B, T, S", [(2, 1, 5), (2, 1, 0), (2, 3, 5), (1, 5, 5)])
def test_no_interval_is_causal_and_that_of_one_query_needs_no_copy(B, T, S):
    interval = expect_interval(None, None, B, T, S, torch.device("cpu"))
    assert all(torch.equal(x, y.expand(B, T)) and x.dtype == y.dtype for x, y in zip(interval, visible(S, T), strict=True))
    assert T > 1 or all(x.is_contiguous() for x in interval)


def test_without_an_interval_the_first_of_more_queries_than_keys_see_none():
    assert intervals(expect_interval(None, None, 1, 5, 3, torch.device("cpu"))) == ([[0] * 5], [[0, 0, 1, 2, 3]])


def test_a_chunk_of_a_prefill_stands_at_its_offset():
    assert intervals(visible(8, 3, offset=2)) == ([[0, 0, 0]], [[3, 4, 5]])


def test_the_chunks_of_a_prefill_together_are_the_whole():
    whole = visible(10, 10)
    parts = [visible(10, n, offset=first) for first, n in ((0, 4), (4, 4), (8, 2))]
    assert torch.equal(torch.cat([p[1] for p in parts], 1), whole[1])


def test_trap_21_packed_boundaries_are_never_crossed():
    cu_seqlens = torch.tensor([0, 3, 3, 5])  # the second sequence is empty
    assert intervals(visible(5, 5, cu_seqlens=cu_seqlens)) == ([[0, 0, 0, 3, 3]], [[1, 2, 3, 4, 5]])


def test_a_chunk_of_packed_sequences_may_begin_inside_one():
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert intervals(visible(7, 3, cu_seqlens=cu_seqlens, offset=2)) == ([[0, 3, 3]], [[3, 4, 5]])


def test_right_padding_hides_the_keys_behind_each_length():
    start, end = visible(4, 4, lengths=torch.tensor([2, 4]))
    assert start.tolist() == [[0] * 4, [0] * 4]
    assert end.tolist() == [[1, 2, 2, 2], [1, 2, 3, 4]]


def test_a_decoding_step_stands_at_the_last_valid_key_of_its_row():
    assert intervals(visible(8, 1, lengths=torch.tensor([3, 8]))) == ([[0], [0]], [[3], [8]])


def test_left_padding_is_a_start_clamped_from_below():
    start, end = visible(5, 5)
    start = start.clamp(min=torch.tensor([[2], [0]], dtype=torch.int32))
    end = end.expand(2, 5)
    assert start.tolist() == [[2] * 5, [0] * 5]
    assert (end - start).clamp(min=0)[0].tolist() == [0, 0, 1, 2, 3]


def test_every_row_may_have_its_own_offset():
    assert intervals(visible(9, 2, offset=torch.tensor([0, 7]))) == ([[0, 0], [0, 0]], [[1, 2], [8, 9]])


def test_a_query_before_the_first_key_sees_nothing():
    start, end = visible(4, 3, offset=-2)
    assert (end - start).tolist() == [[0, 0, 1]]


def test_no_queries_and_no_keys():
    assert visible(0, 0)[0].shape == (1, 0)
    assert intervals(visible(0, 2)) == ([[0, 0]], [[0, 0]])
    assert intervals(visible(6, 2, lengths=torch.tensor([0]))) == ([[0, 0]], [[0, 0]])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(S=-1, T=2), r"S, T: expected sizes >= 0, got -1, 2"),
        (dict(S=4, T=4, cu_seqlens=torch.tensor([0, 4]), lengths=torch.tensor([4])), r"lengths: expected None where cu_seqlens is given"),
        (dict(S=4, T=4, cu_seqlens=torch.tensor([0, 3])), r"cu_seqlens: expected to run from 0 to S = 4, got 0 to 3"),
        (dict(S=4, T=4, cu_seqlens=torch.tensor([1, 4])), r"cu_seqlens: expected to run from 0 to S = 4, got 1 to 4"),
        (dict(S=4, T=4, cu_seqlens=torch.tensor([[0, 4]])), r"cu_seqlens: expected \[N \+ 1\] with N >= 1, got \(1, 2\)"),
        (dict(S=4, T=4, lengths=torch.tensor([[4]])), r"lengths: expected \[B\], got \(1, 1\)"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        visible(**arguments)
