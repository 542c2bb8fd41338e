"""Index scores by Triton, in its interpreter or on a GPU where there is one, against the reference on the CPU."""

import pytest
import torch
from cases import KERNELS, index_inputs, normal, random_interval, triton
from reference_math import error, interval_mask

from skim.ops import codec, index_scores, visible
from skim.ops.score import triton as kernels


def by(impl, *args, **options):
    return triton(index_scores, *args, **options) if impl == "triton" else index_scores(*args, impl=impl, **options)


@pytest.mark.parametrize(
    "B, T, S, J, E",
    [(2, 17, 70, 4, 16), (1, 9, 130, 3, 5), (1, 1, 300, 17, 8), (2, 20, 20, 1, 1), (1, 2, 70, 40, 20)],  # 40 heads: two blocks
)
def test_scores_and_gradients_are_the_references(B, T, S, J, E):
    start, end = random_interval(B, T, S)
    results = []
    for impl in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in index_inputs(B, T, S, J, E)]
        scores = by(impl, *leaves, start=start, end=end)
        seen = interval_mask(start, end, S)
        (scores[seen] * normal(B, T, S, seed=9)[seen]).sum().backward()
        results.append((scores, *(x.grad for x in leaves)))
    for name, mine, theirs in zip(("scores", "q", "k", "w"), *results, strict=True):
        assert error(mine, theirs) < 1e-6, name


@pytest.mark.parametrize("which", ["both", "queries", "keys"])
def test_fp8_scores_are_those_of_the_dequantised_tensors(which):
    q, k, weights = index_inputs(T=5, E=32)
    q8, k8 = codec.quantise(q) if which != "keys" else q, codec.quantise(k) if which != "queries" else k
    bound = 1e-4 if which == "both" and KERNELS == "cuda" else 1e-6  # matrix units sum FP8 products in fewer bits
    assert error(triton(index_scores, q8, k8, weights), index_scores(q8, k8, weights, impl="reference")) < bound


def test_infinite_and_nan_keys_score_as_in_the_reference():
    q, k, weights = index_inputs(T=4, S=12, J=3, E=4)  # the fourth head is padding
    k[0, 2], k[0, 5, 1], k[0, 7, 2] = torch.inf, torch.nan, -torch.inf
    q, start, end = q.abs(), torch.zeros(1, 4, dtype=torch.int32), torch.full((1, 4), 12, dtype=torch.int32)
    mine, theirs = (by(impl, q, k, weights, start=start, end=end) for impl in ("triton", "reference"))
    torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_nan_in_an_unseen_key_reaches_neither_scores_nor_gradients():
    q, k, weights = index_inputs(T=4, S=30)
    start, end = torch.tensor([[0, 0, 20, 20]], dtype=torch.int32), torch.tensor([[5, 10, 21, 30]], dtype=torch.int32)
    poisoned = k.clone()
    poisoned[:, 10:15], poisoned[:, 15:20] = torch.nan, torch.inf
    results = []
    for keys in (k, poisoned):
        leaves = [x.clone().requires_grad_() for x in (q, keys, weights)]
        scores = triton(index_scores, *leaves, start=start, end=end)
        scores[interval_mask(start, end, 30)].sum().backward()
        results.append((scores, *(x.grad for x in leaves)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_the_same_bits_for_any_chunk_batch_and_split(monkeypatch):
    q, k, weights = index_inputs(B=2, T=20, S=200, J=5, E=24)
    start, end = (x.expand(2, 20) for x in visible(200, 20))
    whole = triton(index_scores, q, k, weights)
    for t in (0, 7, 19):
        alone = triton(index_scores, q[1:, t : t + 1], k[1:], weights[1:, t : t + 1], start=start[1:, t : t + 1], end=end[1:, t : t + 1])
        assert torch.equal(alone, whole[1:, t : t + 1])
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    assert torch.equal(triton(index_scores, q, k, weights), whole)


def test_strides_are_free():
    q, k, weights = index_inputs(B=2, T=5)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2), torch.stack((k, k), 2)[:, :, 1], weights.transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(x.is_contiguous() for x in strided)
    assert torch.equal(triton(index_scores, *strided), triton(index_scores, q, k, weights))


def test_what_it_cannot_run_it_refuses_by_name():
    with pytest.raises(ValueError, match="float32, not in float64"):
        triton(index_scores, *index_inputs(dtype=torch.float64))
    with pytest.raises(ValueError, match="up to 512 index channels, got 513"):
        triton(index_scores, *index_inputs(T=1, S=1, E=513))
