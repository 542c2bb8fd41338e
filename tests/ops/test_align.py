import math

import pytest
import reference_math
import sharded_align
import torch
import torch.multiprocessing
from cases import attention_inputs, index_inputs, random_indices, random_interval
from reference_math import error, index_mask, interval_mask, leaves
from torch import Tensor

from skim.ops import align, attend, attend_dense, index_scores, select
from skim.selection import Selection

B, T, S = 2, 33, 50


def teacher(dtype: torch.dtype = torch.float32, **shape: int) -> tuple[Tensor, Tensor]:
    return attention_inputs(B, T, S, dtype=dtype, **shape)[:2]


def assert_matches(q, k, index, mask: Tensor, bound: float = 1e-6, scale: float | None = None, **options) -> None:
    """The loss and its gradients in the index tensors against the oracle over `mask` [B, T, S]."""
    ours = [x.clone().requires_grad_() for x in index]
    theirs = leaves(*index)
    loss = align(q, k, *ours, scale=scale, **options)
    expected = reference_math.alignment(q, k, reference_math.index_scores(*theirs, mask), mask, scale)
    assert loss.shape == () and error(loss, expected) < bound
    loss.backward()
    expected.backward()
    for name, mine, reference in zip(("q_index", "k_index", "weights"), ours, theirs, strict=True):
        assert mine.grad.dtype == mine.dtype and error(mine.grad, reference.grad) < bound, name


def test_a_row_of_two_keys_by_hand():
    # The attention gives 3/4 and 1/4, the indexer 1/4 and 3/4: KL = 1/2 ln 3, gradient (-1/2, 1/2).
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1)
    q_index, k_index, weights = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 1.0 + math.log(3)]).view(1, 2, 1), torch.ones(1, 1, 1)
    index = [x.requires_grad_() for x in (q_index, k_index, weights)]
    loss = align(q, k, *index)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3) / 2)
    assert k_index.grad.flatten().tolist() == pytest.approx([-0.5, 0.5])
    assert weights.grad.item() == pytest.approx(math.log(3) / 2) and q_index.grad.item() == pytest.approx(math.log(3) / 2)


def test_the_target_is_the_head_sum_normalised_by_hand():
    # Two heads, 3/4 : 1/4 and 1/4 : 3/4: the target is even, and so is an indexer without an opinion.
    q, k = torch.tensor([[[[1.0], [-1.0]]]]), torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1)
    index = torch.zeros(1, 1, 1, 1), torch.zeros(1, 2, 1), torch.ones(1, 1, 1)
    assert align(q, k, *index).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("H, G", [(8, 1), (6, 2), (3, 3), (17, 1)])
def test_dense_loss_and_gradients_are_those_of_the_loops(H, G):
    start, end = random_interval(B, T, S)
    assert_matches(*teacher(H=H, G=G), index_inputs(B, T, S), interval_mask(start, end, S), start=start, end=end)


@pytest.mark.parametrize("H, G", [(8, 1), (6, 2), (3, 3), (17, 1)])
def test_sparse_loss_and_gradients_are_those_of_the_loops(H, G):
    indices = random_indices(B, T, 1, 13, S)
    assert_matches(*teacher(H=H, G=G), index_inputs(B, T, S), index_mask(indices, S)[:, :, 0], selection=Selection.from_indices(indices))


def test_default_visibility_is_causal_with_the_queries_at_the_end():
    end = torch.arange(S - T + 1, S + 1).expand(B, T)
    assert_matches(*teacher(), index_inputs(B, T, S), interval_mask(torch.zeros(B, T), end, S))


def test_trap_07_the_softmax_scale_is_the_callers():
    start, end = random_interval(B, T, S)
    mask = interval_mask(start, end, S)
    assert_matches(*teacher(), index_inputs(B, T, S), mask, scale=0.9, start=start, end=end)
    selection = Selection.from_indices(random_indices(B, T, 1, 13, S))
    assert_matches(*teacher(), index_inputs(B, T, S), index_mask(selection.indices, S)[:, :, 0], scale=0.9, selection=selection)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_gradient_in_the_scores_is_softmax_minus_p_by_rows(sparse):
    q, k = teacher()
    index = [x.requires_grad_() for x in index_inputs(B, T, S)]
    selection = select(*index, 7) if sparse else None
    mask = index_mask(selection.indices, S)[:, :, 0] if sparse else interval_mask(torch.zeros(B, T), torch.arange(S - T + 1, S + 1).expand(B, T), S)
    grads = torch.autograd.grad(align(q, k, *index, selection=selection), index)
    scores = index_scores(*index)
    heads = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(3, 2)) * q.shape[-1] ** -0.5
    p = heads.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).sum(2) / q.shape[2]
    gradient = (scores.masked_fill(~mask, -torch.inf).softmax(-1) - p) / (B * T)
    for mine, expected in zip(grads, torch.autograd.grad(scores, index, gradient.detach()), strict=True):
        assert error(mine, expected) < 1e-6


def test_sparse_softmax_is_made_inside_the_selection_head_by_head():
    # One head hardly looks at the selected keys, yet inside them it counts as much as the other.
    q = torch.tensor([[[[1.0], [-1.0]]]])
    k = torch.tensor([math.log(3), 0.0, -20.0]).view(1, 3, 1, 1)
    index = torch.zeros(1, 1, 1, 1), torch.zeros(1, 3, 1), torch.ones(1, 1, 1)
    inside = align(q, k, *index, selection=Selection.from_indices(torch.tensor([[[[0, 1]]]])))
    assert inside.item() == pytest.approx(0.0, abs=1e-7)  # heads 3/4 : 1/4 and 1/4 : 3/4
    # the dense head sum cut to the two keys would be 3/4 : 1/4, with another loss
    assert (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) == pytest.approx(0.130812, abs=1e-6)
    start, end = random_interval(1, 5, 9)
    q, k = attention_inputs(1, 5, 9)[:2]
    everything = Selection.from_mask(interval_mask(start, end, 9)[:, :, None], 9)
    torch.testing.assert_close(align(q, k, *index_inputs(1, 5, 9), selection=everything), align(q, k, *index_inputs(1, 5, 9), start=start, end=end))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_given_lse_saves_a_pass_and_changes_nothing(sparse):
    q, k, v = attention_inputs(B, T, S)
    start, end = random_interval(B, T, S)
    selection = Selection.from_indices(random_indices(B, T, 1, 13, S)) if sparse else None
    _, lse = attend(q, k, v, selection) if sparse else attend_dense(q, k, v, start=start, end=end)
    results = []
    for given in (None, lse):
        index = [x.requires_grad_() for x in index_inputs(B, T, S)]
        loss = align(q, k, *index, start=start, end=end, selection=selection, lse=given)
        results.append((loss, *torch.autograd.grad(loss, index)))
    for one, other in zip(*results, strict=True):
        assert error(one, other) < 1e-5


def test_the_given_lse_is_used():
    q, k, v = attention_inputs(B, T, S)
    _, lse = attend_dense(q, k, v)
    lse[:, :, 0] += 5  # as if the first head's softmax held next to nothing
    without = align(q[:, :, 1:], k.repeat_interleave(3, 2)[:, :, 1:], *index_inputs(B, T, S))
    assert align(q, k, *index_inputs(B, T, S), lse=lse).item() == pytest.approx(without.item(), rel=0.01)


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_that_see_nothing_do_not_count(sparse):
    q, k = attention_inputs(1, 4, 10)[:2]
    index = index_inputs(1, 4, 10)
    start, end = torch.tensor([[0, 3, 2, 9]], dtype=torch.int32), torch.tensor([[5, 3, 8, 4]], dtype=torch.int32)
    selection = Selection.from_mask(interval_mask(start, end, 10)[:, :, None], 10) if sparse else None
    loss = align(q, k, *index, start=start, end=end, selection=selection)
    seen = [0, 2]
    picked = None if selection is None else Selection(selection.indices[:, seen], selection.counts[:, seen])
    alone = align(q[:, seen], k, index[0][:, seen], index[1], index[2][:, seen], start=start[:, seen], end=end[:, seen], selection=picked)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6) and loss.item() > 0


@pytest.mark.parametrize("sparse", [False, True])
def test_no_row_that_sees_anything_is_a_loss_of_zero(sparse):
    q, k = teacher()
    index = [x.requires_grad_() for x in index_inputs(B, T, S)]
    zero = torch.zeros(B, T, dtype=torch.int32)
    selection = Selection.from_indices(torch.full((B, T, 1, 4), -1)) if sparse else None
    loss = align(q, k, *index, start=zero, end=zero, selection=selection)
    loss.backward()
    assert loss.item() == 0.0
    assert all(bool((x.grad == 0).all()) for x in index)


@pytest.mark.parametrize("sparse", [False, True])
def test_poison_that_no_query_sees_reaches_nothing(sparse):
    start, end = torch.tensor([[1, 1, 3, 20, 22, 22]], dtype=torch.int32), torch.tensor([[4, 10, 3, 25, 30, 22]], dtype=torch.int32)
    selection = Selection.from_mask(interval_mask(start, end, 30)[:, :, None], 30) if sparse else None
    q, k = attention_inputs(1, 6, 30)[:2]
    index = index_inputs(1, 6, 30)
    unread, unseeing = torch.tensor([0, *range(10, 20)]), torch.tensor([2, 5])

    def results(bad: float) -> list[Tensor]:
        teachers, students = [x.clone() for x in (q, k)], [x.clone() for x in index]
        for keys in (teachers[1], students[1]):
            keys[:, unread] = bad
        for queries in (teachers[0], students[0], students[2]):
            queries[:, unseeing] = bad
        for x in students:
            x.requires_grad_()
        loss = align(*teachers, *students, start=start, end=end, selection=selection)
        return [loss, *torch.autograd.grad(loss, students)]

    for bad in (torch.nan, torch.inf):
        for clean, dirty in zip(results(0.0), results(bad), strict=True):
            assert torch.equal(clean, dirty)


def test_trap_18_the_gradient_reaches_the_indexer_and_nothing_else():
    q, k, v = (x.requires_grad_() for x in attention_inputs(B, T, S))
    index = [x.requires_grad_() for x in index_inputs(B, T, S)]
    selection = select(*index, 5)
    _, lse = attend(q, k, v, selection)
    align(q, k, *index, selection=selection, lse=lse).backward()
    assert q.grad is None and k.grad is None and v.grad is None
    assert all(bool((x.grad != 0).any()) for x in index)
    assert not align(q, k, *(x.detach() for x in index), lse=lse).requires_grad


def test_the_factor_of_the_loss_reaches_the_gradient():
    index = [x.requires_grad_() for x in index_inputs(B, T, S)]
    loss = align(*teacher(), *index)
    for one, other in zip(torch.autograd.grad(loss * 3, index, retain_graph=True), torch.autograd.grad(loss, index), strict=True):
        torch.testing.assert_close(one, 3 * other)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradcheck(sparse):
    q, k = attention_inputs(1, 4, 6, H=4, G=2, D=3, dtype=torch.float64)[:2]
    index = [x.requires_grad_() for x in index_inputs(1, 4, 6, J=2, E=3, dtype=torch.float64)]
    selection = Selection.from_indices(torch.tensor([[5, 0, -1], [2, -1, -1], [-1, -1, -1], [1, 3, 4]]).view(1, 4, 1, 3)) if sparse else None
    assert torch.autograd.gradcheck(lambda *x: align(q, k, *x, selection=selection), index)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float64, 1e-13)])
def test_every_dtype_is_summed_in_float32_or_better(dtype, bound, sparse):
    q, k = teacher(dtype)
    start, end = random_interval(B, T, S)
    selection = Selection.from_indices(random_indices(B, T, 1, 13, S)) if sparse else None
    mask = index_mask(selection.indices, S)[:, :, 0] if sparse else interval_mask(start, end, S)
    assert_matches(q, k, index_inputs(B, T, S, dtype=dtype), mask, bound, start=start, end=end, selection=selection)


def test_float32_weights_beside_bf16_tensors_keep_a_float32_gradient():
    q_index, k_index, weights = index_inputs(B, T, S, dtype=torch.bfloat16)
    end = torch.arange(S - T + 1, S + 1).expand(B, T)
    mask = interval_mask(torch.zeros(B, T), end, S)
    assert_matches(*teacher(torch.bfloat16), (q_index, k_index, weights.float()), mask, bound=5e-3)


@pytest.mark.parametrize("sparse", [False, True])
def test_autocast_does_not_touch_the_loss(sparse):
    def once() -> list[Tensor]:
        index = [x.requires_grad_() for x in index_inputs(B, T, S)]
        loss = align(*teacher(), *index, selection=Selection.from_indices(random_indices(B, T, 1, 13, S)) if sparse else None)
        return [loss, *torch.autograd.grad(loss, index)]

    outside = once()
    with torch.autocast("cpu", torch.bfloat16):
        inside = once()
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("sparse", [False, True])
def test_the_workspace_changes_nothing_but_rounding(sparse):
    q, k = attention_inputs(1, 500, 600, H=4, G=1)[:2]
    index = index_inputs(1, 500, 600)
    selection = select(*index, 100) if sparse else None
    results = []
    for workspace_mb in (1, 64):
        leaf = [x.clone().requires_grad_() for x in index]
        loss = align(q, k, *leaf, selection=selection, workspace_mb=workspace_mb)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for one, other in zip(*results, strict=True):
        assert error(one, other) < 1e-6


@pytest.mark.parametrize("sparse", [False, True])
def test_strides_are_free(sparse):
    q, k = teacher()
    index = index_inputs(B, T, S)
    selection = Selection.from_indices(random_indices(B, T, 1, 13, S)) if sparse else None
    _, lse = attend(q, k, k, selection) if sparse else attend_dense(q, k, k)

    def strided(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    expected = align(q, k, *index, selection=selection, lse=lse)
    k_index = torch.cat((index[1], index[1]), 1)[:, :S]
    got = align(strided(q), strided(k), strided(index[0]), k_index, strided(index[2]), selection=selection, lse=strided(lse))
    torch.testing.assert_close(got, expected)


def test_gradient_descent_finds_the_teacher():
    q, k = attention_inputs(1, 10, 10, H=2, G=1, D=4)[:2]
    index = [x.requires_grad_() for x in index_inputs(1, 10, 10, J=8, E=16)]
    optimizer = torch.optim.Adam(index, lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = align(q, k, *index)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.2 and losses[-1] < 1e-3
    p = torch.einsum("bthd,bsd->bths", q, k[:, :, 0]).mul(0.5).masked_fill(torch.ones(10, 10).triu(1).bool()[:, None], -torch.inf).softmax(-1).mean(2)
    assert error(index_scores(*index).softmax(-1), p) < 0.05


def test_trap_19_heads_sharded_over_ranks_are_summed_before_they_are_normalised(tmp_path):
    expected = sharded_align.run(slice(0, 4), slice(0, 2))
    torch.multiprocessing.spawn(sharded_align.rank_main, args=(str(tmp_path),), nprocs=2)
    alone = sharded_align.run(slice(0, 2), slice(0, 1))
    for rank in range(2):
        for mine, whole, half in zip(torch.load(tmp_path / f"{rank}.pt"), expected, alone, strict=True):
            assert error(mine, whole) < 1e-5 < error(half, whole)
