import pytest
import reference_math
import torch
from cases import index_inputs, normal, random_interval
from reference_math import error, interval_mask, leaves

from skim.ops import codec, index_scores, visible


def test_two_heads_by_hand():
    # J = 2 heads of E = 1: the factors are 2^-1/2 and 1. Head 0 weighs 3, head 1 weighs -1.
    q = torch.tensor([[[[1.0], [-2.0]], [[1.0], [-2.0]]]])
    k = torch.tensor([[[5.0], [-4.0]]])
    weights = torch.tensor([[[3.0, -1.0], [3.0, -1.0]]])
    # key 0: 3 * relu(5) - relu(-10) = 15; key 1: 3 * relu(-4) - relu(8) = -8
    expected = torch.tensor([[[15.0, -torch.inf], [15.0, -8.0]]]) * 2**-0.5
    torch.testing.assert_close(index_scores(q, k, weights), expected)


def test_the_scale_factors_are_those_of_heads_and_channels():
    # one query, one key, all ones: sum over J heads of E, times J^-1/2 E^-1/2
    scores = index_scores(torch.ones(1, 1, 9, 16), torch.ones(1, 1, 16), torch.ones(1, 1, 9))
    assert scores.item() == pytest.approx(9 * 16 / 3 / 4)


def test_trap_06_relu_is_per_head_before_the_signed_weight():
    q, k = torch.tensor([[[[1.0], [-1.0]]]]), torch.tensor([[[1.0]]])
    # the head that agrees is voted down: the score is negative, which a ReLU behind the weight would hide
    assert index_scores(q, k, torch.tensor([[[-1.0, 0.0]]])).item() == pytest.approx(-(2**-0.5))
    # the head that disagrees says nothing, whatever its weight: without the ReLU this would be 5
    assert index_scores(q, k, torch.tensor([[[0.0, -5.0]]])).item() == 0.0


def test_trap_05_weights_keep_their_precision_beside_bf16_index_tensors():
    q, k = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, dtype=torch.bfloat16)
    assert index_scores(q, k, torch.full((1, 1, 1), 1.0009765625)).item() == 1.0009765625  # in bf16 it would be 1


@pytest.mark.parametrize("B, T, S, J, E", [(2, 33, 70, 4, 16), (1, 17, 1030, 3, 5), (1, 1, 600, 17, 8), (2, 40, 20, 1, 1)])
def test_scores_and_gradients_are_those_of_the_loops(B, T, S, J, E):
    inputs = index_inputs(B, T, S, J, E)
    start, end = random_interval(B, T, S)
    mask = interval_mask(start, end, S)
    ours = [x.clone().requires_grad_() for x in inputs]
    reference = leaves(*inputs)
    scores, expected = index_scores(*ours, start=start, end=end), reference_math.index_scores(*reference, mask)
    assert scores.dtype == torch.float32 and error(scores, expected) < 1e-6
    grad = normal(B, T, S, seed=9)
    scores[mask].mul(grad[mask]).sum().backward()
    expected[mask].mul(grad[mask].double()).sum().backward()
    for name, mine, theirs in zip("qkw", ours, reference, strict=True):
        assert error(mine.grad, theirs.grad) < 1e-6, name


def test_default_visibility_is_causal_with_the_queries_at_the_end():
    inputs = index_inputs(T=5, S=12)
    start, end = visible(12, 5)
    assert torch.equal(index_scores(*inputs), index_scores(*inputs, start=start, end=end))


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-6), (torch.float16, 1e-6), (torch.float64, 1e-14)])
def test_every_dtype_is_scored_in_float32_or_better(dtype, bound):
    inputs = index_inputs(dtype=dtype)
    start, end = visible(70, 33)
    scores = index_scores(*inputs)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(scores, reference_math.index_scores(*inputs, interval_mask(start, end, 70))) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_come_in_the_dtype_of_their_inputs(dtype):
    q, k, weights = (x.requires_grad_() for x in index_inputs(T=20, S=20, dtype=dtype))
    weights = weights.detach().float().requires_grad_()
    reference = leaves(q, k, weights)
    index_scores(q, k, weights).exp().sum().backward()
    reference_math.index_scores(*reference, interval_mask(*visible(20, 20), 20)).exp().sum().backward()
    for mine, theirs in zip((q, k, weights), reference, strict=True):
        assert mine.grad.dtype == mine.dtype and error(mine.grad, theirs.grad) < 0.01


def test_gradients_of_a_key_add_up_over_queries_and_chunks():
    inputs = index_inputs(1, 300, 400, J=2, E=3)
    ours, theirs = [x.clone().requires_grad_() for x in inputs], leaves(*inputs)
    index_scores(*ours, workspace_mb=1).exp().sum().backward()
    reference_math.index_scores(*theirs, interval_mask(*visible(400, 300), 400)).exp().sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert error(mine.grad, reference.grad) < 1e-6


def test_gradcheck():
    inputs = [x.requires_grad_() for x in index_inputs(T=4, S=6, J=3, E=2, dtype=torch.float64)]
    start, end = random_interval(1, 4, 6, seed=3)
    assert torch.autograd.gradcheck(
        lambda *x: index_scores(*x, start=start, end=end).masked_fill(~interval_mask(start, end, 6), 0.0), inputs, fast_mode=False
    )


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_fp8_scores_are_those_of_the_dequantised_tensors(scale_format):
    q, k, weights = index_inputs(E=32)
    q8, k8 = (codec.quantise(x, scale_format=scale_format) for x in (q, k))
    expected = index_scores(codec.dequantise(*q8), codec.dequantise(*k8), weights)
    assert error(index_scores(q8, k8, weights), expected) < 1e-6
    assert 1e-4 < error(index_scores(q8, k8, weights), index_scores(q, k, weights)) < 0.1


def test_fp8_has_no_gradient_and_says_so():
    q, k, weights = index_inputs()
    scores = index_scores(codec.quantise(q), codec.quantise(k), weights.requires_grad_())
    with pytest.raises(NotImplementedError, match="FP8 index tensors have no gradient"):
        scores.nan_to_num(neginf=0.0).sum().backward()


def test_autocast_does_not_touch_the_scores():
    q, k, weights = (x.requires_grad_() for x in index_inputs())
    outside = index_scores(q, k, weights)
    grads = torch.autograd.grad(outside.exp().sum(), (q, k, weights))
    with torch.autocast("cpu", torch.bfloat16):
        inside = index_scores(q, k, weights)
        inside_grads = torch.autograd.grad(inside.exp().sum(), (q, k, weights))
    assert torch.equal(inside, outside)
    assert all(torch.equal(a, b) for a, b in zip(grads, inside_grads, strict=True))


def test_nan_in_an_unseen_key_reaches_neither_scores_nor_gradients():
    q, k, weights = index_inputs(T=6, S=30)
    start, end = torch.tensor([[0, 0, 0, 20, 20, 20]], dtype=torch.int32), torch.tensor([[5, 9, 10, 21, 30, 25]], dtype=torch.int32)

    def run(k):
        leaf = [x.clone().requires_grad_() for x in (q, k, weights)]
        scores = index_scores(*leaf, start=start, end=end)
        scores[interval_mask(start, end, 30)].sum().backward()
        return scores, *(x.grad for x in leaf)

    poisoned = k.clone()
    poisoned[:, 10:15], poisoned[:, 15:20] = torch.nan, torch.inf
    for clean, dirty in zip(run(k), run(poisoned), strict=True):
        assert torch.equal(clean, dirty)


def test_the_same_bits_for_any_chunk_batch_split_and_thread_count():
    q, k, weights = index_inputs(B=2, T=70, S=1300, J=5, E=24)
    start, end = (x.expand(2, 70) for x in visible(1300, 70))
    whole = index_scores(q, k, weights)
    one_by_one = [index_scores(q[:, t : t + 1], k, weights[:, t : t + 1], start=start[:, t : t + 1], end=end[:, t : t + 1]) for t in range(0, 70, 7)]
    assert torch.equal(torch.cat(one_by_one, 1), whole[:, ::7])
    assert torch.equal(torch.cat([index_scores(q[b : b + 1], k[b : b + 1], weights[b : b + 1]) for b in range(2)]), whole)
    assert torch.equal(index_scores(q, k, weights, workspace_mb=1), whole)
    torch.set_num_threads(2)
    assert torch.equal(index_scores(q, k, weights), whole)


@pytest.mark.parametrize("shift", [1, 37, 512])
def test_the_same_bits_wherever_the_keys_stand(shift):
    q, k, weights = index_inputs(T=3, S=700, J=3, E=20)
    start, end = torch.zeros(1, 3, dtype=torch.int32), torch.full((1, 3), 700, dtype=torch.int32)
    moved = torch.cat((normal(1, shift, 20, seed=5), k), 1)
    expected = index_scores(q, k, weights, start=start, end=end)
    assert torch.equal(index_scores(q, moved, weights, start=start + shift, end=end + shift)[..., shift:], expected)


def test_strides_are_free():
    q, k, weights = index_inputs(B=2)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2), torch.stack((k, k), 2)[:, :, 1], weights.transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(x.is_contiguous() for x in strided)
    assert torch.equal(index_scores(*strided), index_scores(q, k, weights))


def test_nothing_seen_is_minus_infinity_everywhere():
    zero = torch.zeros(1, 33, dtype=torch.int32)
    assert bool((index_scores(*index_inputs(), start=zero + 5, end=zero + 5) == -torch.inf).all())
