"""attend (selected keys) and attend_dense (an interval of keys); where both promise the same, one test runs both."""

import math
from collections.abc import Callable

import pytest
import reference_math
import torch
import torch.nn.functional as F
from cases import attention_inputs, deterministic, normal, random_indices, random_interval, selection_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_math import error, index_mask, interval_mask, leaves
from torch import Tensor

from skim.ops import attend, attend_dense, visible
from skim.selection import Selection

pytestmark = pytest.mark.usefixtures("both_on_the_cpu")


def backward(out: Tensor, lse: Tensor, seed: int = 50) -> None:
    """Gradients of random size through out and, where a row reads something, through lse."""
    seen = lse.detach() != -torch.inf
    upstream = normal(*out.shape, seed=seed, dtype=torch.float64), normal(*lse.shape, seed=seed + 1, dtype=torch.float64)
    ((out.double() * upstream[0]).sum() + (lse[seen].double() * upstream[1][seen]).sum()).backward()


def assert_matches(
    run: Callable, inputs: tuple, mask: Tensor, *, sink: Tensor | None = None, scale: float | None = None, v_channels: int | None = None, bound=2e-6
) -> None:
    """run(q, k, v, sink=, scale=, ...) against the oracle over `mask` [B, T, R, S]: out, lse and every gradient."""
    ours = [None if x is None else x.clone().requires_grad_() for x in (*inputs, sink)]
    theirs = leaves(*ours)
    q, k, v, s = ours
    out, lse = run(q, k, v, sink=s, scale=scale, **({} if v_channels is None else {"v_channels": v_channels}))
    values = theirs[1][..., :v_channels] if v is None else theirs[2]
    expected_out, expected_lse = reference_math.attention(theirs[0], theirs[1], values, mask, scale, theirs[3])
    assert out.dtype == q.dtype and lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert error(out, expected_out) < bound and error(lse, expected_lse) < bound
    assert bool((out[expected_lse == -torch.inf] == 0).all())
    backward(out, lse)
    backward(expected_out, expected_lse)
    for name, mine, reference in zip(("q", "k", "v", "sink"), ours, theirs, strict=True):
        if mine is not None:
            assert mine.grad.dtype == mine.dtype and error(mine.grad, reference.grad) < bound, name


def sparse(indices: Tensor, counts: Tensor | None = None, **options) -> Callable:
    return lambda q, k, v, **rest: attend(q, k, v, indices=indices, counts=counts, **rest, **options)


def dense(start: Tensor, end: Tensor, **options) -> Callable:
    return lambda q, k, v, **rest: attend_dense(q, k, v, start=start, end=end, **rest, **options)


def both(start: Tensor, end: Tensor, S: int) -> list[Callable]:
    """The two operators over the same keys."""
    return [dense(start, end), sparse(selection_of((start, end), S).indices)]


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One attend out of several over disjoint keys: (out, lse) pairs, weighed by exp(lse)."""
    lse = torch.stack([p[1] for p in parts]).logsumexp(0)
    return sum(out * (part - lse).exp()[..., None] for out, part in parts), lse


SHAPES = {
    "MQA": dict(H=8, G=1),
    "GQA": dict(H=6, G=2),
    "MHA": dict(H=3, G=3),
    "17 heads": dict(H=17, G=1, D=7, V=3),
    "wide values": dict(H=4, G=2, D=3, V=11),
}


def test_two_keys_by_hand():
    # scores ln 3 and 0: probabilities 3/4 and 1/4, lse = ln 4
    q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[math.log(3)]], [[9.0]], [[0.0]]]])
    v = torch.tensor([[[[8.0]], [[100.0]], [[4.0]]]])
    out, lse = attend(q, k, v, indices=torch.tensor([[[[2, -1, 0]]]], dtype=torch.int32))
    assert out.item() == pytest.approx(7.0) and lse.item() == pytest.approx(math.log(4))
    # a sink of logit ln 4 takes half of it, and is no part of the lse
    out, lse = attend(q, k, v, indices=torch.tensor([[[[0, 2]]]]), sink=torch.tensor([math.log(4)]))
    assert out.item() == pytest.approx(3.5) and lse.item() == pytest.approx(math.log(4))
    out, lse = attend_dense(q, k[:, ::2], v[:, ::2])
    assert out.item() == pytest.approx(7.0) and lse.item() == pytest.approx(math.log(4))


def test_trap_07_the_softmax_scale_is_the_callers():
    q, k, v = attention_inputs(T=5, S=5, D=9)
    start, end = (x.expand(2, 5) for x in visible(5, 5))
    for run in both(start, end, 5):
        assert torch.equal(run(q, k, v)[0], run(q, k, v, scale=1 / 3)[0])  # the default is D^-1/2
        assert_matches(run, (q, k, v), interval_mask(start, end, 5)[:, :, None], scale=0.1352338)
    assert error(attend_dense(q, k, v, scale=0.1352338)[0], attend_dense(q, k, v)[0]) > 0.01


@pytest.mark.parametrize("K", [1, 13, 50])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attend_and_its_gradients_are_those_of_the_full_mask(shape, K):
    inputs = attention_inputs(**shape)
    indices = random_indices(2, 33, 1, K, 50)
    assert_matches(sparse(indices), inputs, index_mask(indices, 50))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attend_dense_and_its_gradients_are_those_of_the_full_mask(shape, sinks):
    start, end = random_interval(2, 33, 50)
    sink = normal(shape["H"], seed=4) if sinks else None
    assert_matches(dense(start, end), attention_inputs(**shape), interval_mask(start, end, 50)[:, :, None], sink=sink)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attend_with_a_sink(shape):
    indices = random_indices(2, 33, 1, 13, 50)
    assert_matches(sparse(indices), attention_inputs(**shape), index_mask(indices, 50), sink=normal(shape["H"], seed=4))


@pytest.mark.parametrize("R", [1, 2, 4])
def test_every_group_of_key_heads_may_read_its_own_selection(R):
    indices = random_indices(2, 33, R, 9, 50)
    assert_matches(sparse(indices), attention_inputs(H=8, G=4), index_mask(indices, 50), sink=normal(8, seed=4))


def test_R_selections_equal_one_attend_per_key_head():
    q, k, v = attention_inputs(H=6, G=3)
    indices = random_indices(2, 33, 3, 9, 50)
    together, lse = attend(q, k, v, indices=indices)
    for g in range(3):
        heads = slice(2 * g, 2 * g + 2)
        alone, alone_lse = attend(q[:, :, heads], k[:, :, g : g + 1], v[:, :, g : g + 1], indices=indices[:, :, g : g + 1])
        torch.testing.assert_close(together[:, :, heads], alone)
        torch.testing.assert_close(lse[:, :, heads], alone_lse)


@pytest.mark.parametrize("v_channels", [1, 5, 8])
def test_mla_values_are_the_first_channels_of_the_keys_with_one_gradient(v_channels):
    q, k, _ = attention_inputs(H=8, G=1)
    indices = random_indices(2, 33, 1, 13, 50)
    assert_matches(sparse(indices), (q, k, None), index_mask(indices, 50), v_channels=v_channels, sink=normal(8, seed=4))
    start, end = random_interval(2, 33, 50)
    assert_matches(dense(start, end), (q, k, None), interval_mask(start, end, 50)[:, :, None], v_channels=v_channels)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_order_and_dtype_of_the_indices_are_free(dtype):
    inputs = attention_inputs()
    indices = random_indices(2, 33, 1, 13, 50)
    ordered = Selection.from_indices(indices)
    expected = attend(*inputs, ordered)
    for got, wanted in zip(attend(*inputs, indices=indices.to(dtype)), expected, strict=True):
        assert error(got, wanted) < 1e-6
    for got, wanted in zip(attend(*inputs, indices=ordered.indices), expected, strict=True):
        assert torch.equal(got, wanted)


def test_trap_13_only_the_first_counts_slots_are_read():
    indices = random_indices(2, 33, 1, 13, 50)
    counts = torch.randint(0, 14, (2, 33, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert_matches(sparse(indices, counts), attention_inputs(), index_mask(indices, 50, counts))


def test_rows_that_read_nothing_give_zero_and_minus_infinity_and_no_gradient():
    q, k, v = (x.requires_grad_() for x in attention_inputs())
    sink = normal(6, seed=4).requires_grad_()
    nothing = torch.full((2, 33, 1, 4), -1)
    zero = torch.zeros(2, 33, dtype=torch.int32)
    for run in (sparse(nothing), dense(zero + 7, zero + 7), sparse(nothing[..., :0])):
        out, lse = run(q, k, v, sink=sink)
        assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
        grads = torch.autograd.grad((out.sum() + lse.exp().sum()), (q, k, v, sink))
        assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_what_flows_back_into_an_empty_row_stops_there_even_nan(which):
    # A padded query is whatever the model made of padding, and a merge of two empty parts has NaN gradients.
    q, k, v = attention_inputs(B=1, T=4, S=6)
    start, end = torch.tensor([[0, 0, 3, 0]], dtype=torch.int32), torch.tensor([[6, 0, 3, 2]], dtype=torch.int32)
    run = both(start, end, 6)[0 if which == "dense" else 1]
    sink = normal(6, seed=4)

    def gradients(bad: float):
        query = q.clone()
        query[:, 1:3] = bad
        ours = [x.clone().requires_grad_() for x in (query, k, v, sink)]
        out, lse = run(*ours[:3], sink=ours[3])
        upstream = torch.ones_like(out), torch.ones_like(lse)
        for grad in upstream:
            grad[:, 1:3] = bad
        assert bool((out[:, 1:3] == 0).all()) and bool((lse[:, 1:3] == -torch.inf).all())
        return torch.autograd.grad((out, lse), ours, upstream)

    for clean, dirty in zip(gradients(0.0), gradients(torch.nan), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("which", ["sparse", "dense"])
@pytest.mark.parametrize("mla", [False, True])
def test_poison_in_unread_keys_and_values_reaches_nothing(poison, which, mla):
    q, k, v = attention_inputs(B=1, T=9, S=30)
    # One chunk reads both ends, nobody the middle; key 0 stands where -1 is clamped to.
    start, end = torch.tensor([[1] * 5 + [20] * 4], dtype=torch.int32), torch.tensor([[4, 6, 10, 3, 5, 25, 30, 21, 20]], dtype=torch.int32)
    run = both(start, end, 30)[0 if which == "dense" else 1]
    unread = torch.tensor([0, *range(10, 20)])

    def results(poisoned: bool):
        keys, values = k.clone(), v.clone()
        if poisoned:
            keys[:, unread], values[:, unread] = poison, poison
        ours = [x.clone().requires_grad_() for x in ((q, keys) if mla else (q, keys, values))]
        out, lse = run(*ours, None, v_channels=5) if mla else run(*ours)
        backward(out, lse)
        return out, lse, *(x.grad for x in ours)

    for clean, dirty in zip(results(False), results(True), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_poison_that_another_query_reads_stays_with_that_query(which):
    q, k, v = attention_inputs(B=1, T=2, S=8)
    v[:, 5] = torch.nan
    start, end = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([[5, 6]], dtype=torch.int32)
    ours = [x.requires_grad_() for x in (q, k, v)]
    out, lse = both(start, end, 8)[0 if which == "dense" else 1](*ours)
    assert bool(out[0, 0].isfinite().all()) and bool(out[0, 1].isnan().all())
    backward(out, lse)
    assert bool(q.grad[0, 0].isfinite().all()) and bool(q.grad[0, 1].isnan().all())


@pytest.mark.parametrize("logit, share", [(-torch.inf, 1.0), (300.0, 0.0), (torch.inf, 0.0)])
@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_extreme_sinks_switch_off_or_take_all(logit, share, which):
    inputs = attention_inputs(B=1, T=5, S=9)
    start, end = (x.clone() for x in visible(9, 5))
    end[:, 2] = 0
    run = both(start, end, 9)[0 if which == "dense" else 1]
    ours = [x.clone().requires_grad_() for x in (*inputs, torch.full((6,), logit))]
    out, lse = run(*ours[:3], sink=ours[3])
    expected_out, expected_lse = run(*inputs)
    torch.testing.assert_close(out, share * expected_out)
    torch.testing.assert_close(lse, expected_lse)
    backward(out, lse)
    assert all(bool(x.grad.isfinite().all()) for x in ours)
    plain = [x.clone().requires_grad_() for x in inputs]
    out, lse = run(*plain)
    backward(share * out, lse)
    for mine, reference in zip(ours, plain, strict=False):
        torch.testing.assert_close(mine.grad, reference.grad)


@pytest.mark.parametrize("sink", [None, normal(6, seed=4)], ids=["no sink", "sink"])
def test_attend_over_everything_visible_equals_attend_dense(sink):
    start, end = random_interval(2, 33, 50)
    results = []
    for run in both(start, end, 50):
        ours = [x.clone().requires_grad_() for x in attention_inputs()]
        out, lse = run(*ours, sink=sink)
        backward(out, lse)
        results.append((out, lse, *(x.grad for x in ours)))
    for one, other in zip(*results, strict=True):
        assert error(one, other) < 1e-6


def test_default_visibility_of_attend_dense_is_causal_and_that_of_sdpa():
    q, k, v = attention_inputs(T=40, S=40, V=8)
    ours, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    out, _ = attend_dense(*ours)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in theirs), is_causal=True, enable_gqa=True).transpose(1, 2)
    assert error(out, expected) < 1e-6
    grad = normal(*out.shape, seed=8)
    out.backward(grad)
    expected.backward(grad)
    for mine, reference in zip(ours, theirs, strict=True):
        assert error(mine.grad, reference.grad) < 2e-6
    start, end = visible(50, 33)
    inputs = attention_inputs()
    assert torch.equal(attend_dense(*inputs)[0], attend_dense(*inputs, start=start, end=end)[0])


def test_trap_21_packed_sequences_attend_as_if_alone():
    q, k, v = attention_inputs(B=1, T=60, S=60)
    start, end = visible(60, 60, cu_seqlens=torch.tensor([0, 25, 60]))
    for run in both(start, end, 60):
        out, lse = run(q, k, v)
        for part in (slice(0, 25), slice(25, 60)):
            alone, alone_lse = attend_dense(q[:, part], k[:, part], v[:, part])
            assert error(out[:, part], alone) < 1e-6 and error(lse[:, part], alone_lse) < 1e-6


def test_padded_rows_attend_as_if_unpadded():
    q, k, v = attention_inputs(B=1, T=20, S=20)
    start, end = visible(20, 20, lengths=torch.tensor([12]))
    right = attend_dense(q, k, v, start=start, end=end)[0][:, :12]
    assert error(right, attend_dense(q[:, :12], k[:, :12], v[:, :12])[0]) < 1e-6
    start, end = visible(20, 20)
    left = attend_dense(q, k, v, start=start.clamp(min=8), end=end)[0]
    assert error(left[:, 8:], attend_dense(q[:, 8:], k[:, 8:], v[:, 8:])[0]) < 1e-6
    assert bool((left[:, :8] == 0).all())


@pytest.mark.parametrize("sink", [None, normal(6, seed=4)], ids=["no sink", "sink"])
def test_disjoint_attends_merged_by_lse_equal_the_union_forward_and_backward(sink):
    indices = random_indices(2, 33, 1, 24, 50)
    indices[:, 3, :, :10] = -1  # a row whose first part is empty
    inputs = attention_inputs(dtype=torch.float64)
    results = []
    for cuts in ([slice(0, 24)], [slice(0, 10), slice(10, 24)], [slice(0, 3), slice(3, 20), slice(20, 24)]):
        ours = [x.clone().requires_grad_() for x in inputs]
        out, lse = (
            merge(*(attend(*ours, indices=indices[..., cut]) for cut in cuts)) if len(cuts) > 1 else attend(*ours, indices=indices[..., cuts[0]])
        )
        keep = lse.detach() != -torch.inf
        out = torch.where(keep[..., None], out, 0.0)
        if sink is not None:  # the sink joins behind the merge
            out = out * torch.sigmoid(lse - sink)[..., None]
        backward(out, lse)
        results.append((out, torch.where(keep, lse, 0.0), *(x.grad for x in ours)))
    whole, *merged = results
    if sink is not None:
        out, _ = attend(*inputs, indices=indices, sink=sink.double())
        assert error(whole[0], out) < 1e-12
    for parts in merged:
        for one, other in zip(parts, whole, strict=True):
            assert error(one, other) < 1e-12


def test_merging_selected_keys_with_a_dense_window():
    ours, theirs = ([x.requires_grad_() for x in attention_inputs(B=1, T=20, S=40, dtype=torch.float64)] for _ in range(2))
    start, end = visible(40, 20)
    window = (end - 6).clamp(min=0)
    far = Selection.from_mask(interval_mask(start, window, 40)[:, :, None], 40)
    merged = merge(attend(*ours, far), attend_dense(*ours, start=window, end=end))
    whole = attend_dense(*theirs)
    backward(*merged)
    backward(*whole)
    for one, other in zip((*merged, *(x.grad for x in ours)), (*whole, *(x.grad for x in theirs)), strict=True):
        assert error(one, other) < 1e-12


@pytest.mark.parametrize("mla", [False, True])
def test_gradcheck(mla):
    q, k, v = (x.requires_grad_() for x in attention_inputs(B=1, T=3, S=5, H=4, G=1 if mla else 2, D=3, V=2, dtype=torch.float64))
    sink = normal(4, seed=4, dtype=torch.float64).requires_grad_()
    indices = torch.tensor([[4, 0, -1], [2, -1, 3], [1, 2, 0]]).view(1, 3, 1, 3)
    start, end = torch.tensor([[0, 2, 1]], dtype=torch.int32), torch.tensor([[2, 5, 4]], dtype=torch.int32)
    for run in (sparse(indices), dense(start, end)):
        if mla:
            assert torch.autograd.gradcheck(lambda q, k, s, run=run: run(q, k, None, sink=s, v_channels=2), (q, k, sink))
        else:
            assert torch.autograd.gradcheck(lambda q, k, v, s, run=run: run(q, k, v, sink=s), (q, k, v, sink))


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 6e-3), (torch.float16, 8e-4), (torch.float64, 1e-13)])
def test_every_dtype_is_summed_in_float32_or_better(dtype, bound):
    inputs, sink = attention_inputs(dtype=dtype), normal(6, seed=4).to(dtype)
    indices = random_indices(2, 33, 1, 13, 50)
    start, end = random_interval(2, 33, 50)
    assert_matches(sparse(indices), inputs, index_mask(indices, 50), sink=sink, bound=bound)
    assert_matches(dense(start, end), inputs, interval_mask(start, end, 50)[:, :, None], sink=sink, bound=bound)


def test_bf16_gradients_of_a_key_that_a_thousand_queries_read_are_summed_in_float32():
    q, k, v = (x.requires_grad_() for x in attention_inputs(B=1, T=1000, S=2, H=1, G=1, dtype=torch.bfloat16))
    out, _ = attend(q, k, v, indices=torch.tensor([0, 1]).expand(1, 1000, 1, 2))
    out.backward(torch.ones_like(out))
    # the values' gradients are sums of 1000 probabilities of about 1/2; in bf16 a running sum would stall at 256
    assert v.grad.sum((1, 2)).tolist()[0] == pytest.approx([1000.0] * 5, rel=0.01)
    assert bool((v.grad > 300).all())


def test_gradients_of_a_key_add_up_over_queries_and_chunks():
    inputs = attention_inputs(B=1, T=3000, S=3, H=2, G=1)
    indices = torch.tensor([2, 0]).expand(1, 3000, 1, 2)
    assert_matches(sparse(indices, workspace_mb=1), inputs, index_mask(indices[:, :1], 3).expand(1, 3000, 1, 3))


def test_gradients_only_of_what_asks_for_them():
    q, k, v = attention_inputs()
    indices = random_indices(2, 33, 1, 5, 50)
    k.requires_grad_()
    attend(q, k, v, indices=indices)[0].sum().backward()
    assert q.grad is None and v.grad is None and k.grad is not None
    assert not attend(q, k.detach(), v, indices=indices)[0].requires_grad


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_deterministic_algorithms_repeat_bitwise(which):
    indices = random_indices(2, 200, 1, 40, 50)
    run = sparse(indices) if which == "sparse" else dense(*random_interval(2, 200, 50))
    torch.set_num_threads(2)

    def once():
        ours = [x.requires_grad_() for x in (*attention_inputs(T=200), normal(6, seed=4))]
        out, lse = run(*ours[:3], sink=ours[3])
        backward(out, lse)
        return out, lse, *(x.grad for x in ours)

    with deterministic():
        first = once()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_the_workspace_changes_nothing_but_rounding(which):
    inputs = attention_inputs(B=1, T=300, S=400, H=4, G=2)
    run, mask = (
        (lambda mb: sparse(indices, workspace_mb=mb), lambda: index_mask(indices, 400))
        if which == "sparse"
        else (lambda mb: dense(*interval, workspace_mb=mb), lambda: interval_mask(*interval, 400)[:, :, None])
    )
    indices, interval = random_indices(1, 300, 1, 60, 400), random_interval(1, 300, 400)
    for mb in (1, None):
        assert_matches(run(mb), inputs, mask())


def test_strides_are_free():
    q, k, v = attention_inputs()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]  # [B, H, T, D] as Hugging Face keeps them
    wide = torch.cat((v, v), -1).requires_grad_()
    leaf = [x.detach().requires_grad_() for x in strided]
    indices = random_indices(2, 33, 1, 13, 50)
    indices = indices.transpose(1, 3).contiguous().transpose(1, 3)
    start, end = random_interval(2, 33, 50)
    for run, mask in ((sparse(indices), index_mask(indices, 50)), (dense(start, end), interval_mask(start, end, 50)[:, :, None])):
        theirs = leaves(q, k, v)
        out, lse = run(*leaf, wide[..., :5])
        expected = reference_math.attention(*theirs, mask)
        assert error(out, expected[0]) < 1e-6
        grads = torch.autograd.grad((out.sum() + lse.exp().sum()), (*leaf, wide))  # expanded gradients have stride 0
        expected_grads = torch.autograd.grad(expected[0].sum() + expected[1].exp().sum(), theirs)
        for mine, reference in zip(grads, expected_grads, strict=True):
            assert error(mine[..., : reference.shape[-1]], reference) < 1e-5


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_autocast_does_not_touch_the_result(which):
    start, end = random_interval(2, 33, 50)
    run = both(start, end, 50)[0 if which == "dense" else 1]

    def once():
        ours = [x.requires_grad_() for x in attention_inputs()]
        out, lse = run(*ours)
        backward(out, lse)
        return out, lse, *(x.grad for x in ours)

    outside = once()
    with torch.autocast("cpu", torch.bfloat16):
        inside = once()
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_no_queries_no_keys_and_no_slots():
    q, k, v = attention_inputs()
    none = torch.zeros(2, 0, dtype=torch.int32)
    assert attend(q[:, :0], k, v, indices=torch.zeros(2, 0, 1, 4, dtype=torch.int32))[0].shape == (2, 0, 6, 5)
    assert attend_dense(q[:, :0], k, v, start=none, end=none)[0].shape == (2, 0, 6, 5)
    zero = torch.zeros(2, 33, dtype=torch.int32)
    for run in (sparse(torch.full((2, 33, 1, 4), -1)), dense(zero, zero)):
        ours = [x.requires_grad_() for x in (q.detach(), k[:, :0].detach(), v[:, :0].detach())]
        out, lse = run(*ours)
        out.sum().backward()
        assert bool((out == 0).all()) and bool((lse == -torch.inf).all()) and bool((ours[0].grad == 0).all())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 12),
    S=st.integers(1, 20),
    groups=st.sampled_from([(1, 1, 1), (2, 1, 1), (6, 2, 1), (6, 2, 2), (3, 3, 3), (17, 1, 1), (8, 4, 2)]),
    D=st.integers(1, 9),
    V=st.integers(1, 9),
    K=st.integers(0, 9),
    sinks=st.booleans(),
    mla=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_any_shape_any_holes_and_any_interval(B, T, S, groups, D, V, K, sinks, mla, dtype, seed):
    H, G, R = groups
    q, k, v = attention_inputs(B, T, S, H, G, D, V, seed, dtype)
    sink = normal(H, seed=4).to(dtype) if sinks and dtype != torch.bfloat16 else None  # its gradient is a sum that may cancel
    inputs = (q, k, None) if mla else (q, k, v)
    options = dict(sink=sink, v_channels=min(D, V) if mla else None, bound={torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float64: 1e-12}[dtype])
    indices = random_indices(B, T, R, K, S, seed)
    assert_matches(sparse(indices), inputs, index_mask(indices, S), **options)
    start, end = random_interval(B, T, S, seed)
    assert_matches(dense(start, end), inputs, interval_mask(start, end, S)[:, :, None], **options)
