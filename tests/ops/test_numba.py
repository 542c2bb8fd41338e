"""The compiled CPU implementations of select and attend against the reference, on what compiled code gets wrong first."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import attention_inputs, index_inputs, normal, random_indices, random_interval
from reference_math import error
from torch import Tensor

from skim.ops import attend, attend_dense, codec, select, visible
from skim.ops.dispatch import choice, run
from skim.selection import Selection

pytest.importorskip("numba")

CPU = torch.device("cpu")
INTEGERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def small_integers(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Index inputs whose products and sums are exact in any order, with ties everywhere."""
    return tuple(x.mul(1.5).round().to(dtype) for x in index_inputs(*sizes, seed=seed))  # type: ignore[return-value]


def same(one: Selection, other: Selection) -> bool:
    scores = (one.scores is None) == (other.scores is None) and (one.scores is None or torch.equal(one.scores, other.scores))
    return torch.equal(one.indices, other.indices) and torch.equal(one.counts, other.counts) and scores


def assert_selects_as_the_reference(*inputs, **options) -> None:
    selection, lse = select(*inputs, with_scores=True, impl="numba", **options)
    expected, expected_lse = select(*inputs, with_scores=True, impl="reference", **options)
    assert same(selection, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert same(select(*inputs, impl="numba", **options), Selection(expected.indices, expected.counts))


def assert_attends_as_the_reference(*inputs, **options) -> tuple[Tensor, Tensor]:
    out, lse = attend(*inputs, impl="numba", **options)
    expected_out, expected_lse = attend(*inputs, impl="reference", **options)
    assert out.dtype == expected_out.dtype and lse.dtype == expected_lse.dtype
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)
    rounding = {torch.bfloat16: 2e-3, torch.float16: 3e-4}.get(out.dtype, 1e-6)
    finite = expected_out.isfinite()
    assert torch.equal(finite, out.isfinite()) and error(out.masked_fill(~finite, 0), expected_out.masked_fill(~finite, 0)) < rounding
    return out, lse


def test_auto_takes_the_compiled_implementation_on_the_cpu():
    assert choice("select", CPU) == choice("attend", CPU) == "numba"
    index, attention = index_inputs(), attention_inputs(B=1, S=70)
    selection = select(*index, 9, impl="numba")
    assert same(select(*index, 9), selection)
    assert torch.equal(attend(*attention, selection)[0], attend(*attention, selection, impl="numba")[0])


def test_what_it_cannot_run_goes_to_the_reference_or_is_an_error():
    index, (q, k, v) = [x.double() for x in index_inputs()], attention_inputs(B=1, S=70)
    assert same(select(*index, 9), select(*index, 9, impl="reference"))
    with pytest.raises(ValueError, match=r"impl: 'numba' cannot run select \(select\) on cpu: numba computes in float32 only, .* float64"):
        select(*index, 9, impl="numba")
    selection = select(*index, 9)
    with pytest.raises(ValueError, match=r"cannot run attend \(attend\) on cpu: numba computes in float32 only, .* float64"):
        attend(q.double(), k.double(), v.double(), selection, impl="numba")
    with pytest.raises(ValueError, match=r"cannot run attend \(attend_dense\) on cpu: numba has the forward of attend only"):
        attend_dense(q, k, v, impl="numba")
    with pytest.raises(ValueError, match=r"cannot run attend \(attend_backward\) on cpu: numba has the forward of attend only"):
        attend(q.requires_grad_(), k, v, selection, impl="numba")[0].sum().backward()


@pytest.mark.parametrize("dtype", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("J, E", [(1, 1), (2, 6), (3, 5), (4, 64), (17, 33)])
def test_select_is_bitwise_the_reference_where_sums_are_exact(J, E, dtype):
    inputs = small_integers(2, 33, 700, J, E, dtype=dtype)
    start, end = random_interval(2, 33, 700)
    for budget, first, recent in ((1, 0, 0), (7, 2, 3), (300, 0, 5), (800, 0, 0)):
        assert_selects_as_the_reference(*inputs, budget, start=start, end=end, keep_first=first, keep_recent=recent)


@pytest.mark.parametrize("T, S", [(1, 1), (1, 256), (3, 257), (70, 255), (70, 600)])
def test_tiles_that_are_not_full(T, S):
    assert_selects_as_the_reference(*small_integers(1, T, S, 3, 5), 40)


def test_selections_of_real_inputs_are_those_of_the_reference():
    inputs = index_inputs(1, 200, 3000, 4, 64)
    assert same(select(*inputs, 256, impl="numba"), select(*inputs, 256, impl="reference"))  # no two scores within rounding at the threshold


def test_fp8_inputs_and_their_scales():
    q, k, weights = small_integers(2, 33, 300, 4, 32)
    inputs = codec.quantise(q, scale_format="ue8m0"), codec.quantise(k, scale_format="ue8m0"), weights
    assert_selects_as_the_reference(*inputs, 40)


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(3000),
        torch.tensor([math.nan, -1.0, math.inf, -math.inf, 0.0] * 600),
        torch.full((3000,), math.nan),
        torch.arange(3000.0),
        -torch.arange(3000.0),
        1 + 2.0**-23 * torch.arange(3000).remainder(7),  # neighbours in float32
        torch.tensor([1e-45, -1e-45, 0.0, 3e38, -3e38, 1e-38] * 500),
        torch.cat((torch.full((2990,), -1.0), torch.linspace(0, 1e38, 10))),
    ],
    ids=["zeros", "specials", "nan", "rising", "falling", "narrow", "extremes", "skewed"],
)
@pytest.mark.parametrize("budget", [1, 5, 600, 1200, 2999])
def test_top_k_of_hard_rows(scores, budget):
    # J = E = 1 with a weight of 1; a sign goes in as its key's scale, since ReLU would take it away
    scale = torch.where(scores < 0, -1.0, 1.0)[None]
    q, k, weights = torch.ones(1, 1, 1, 1), scores.abs().view(1, -1, 1), torch.ones(1, 1, 1)
    whole = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), scores.shape[0], dtype=torch.int32)
    for first, recent in ((0, 0), (1, min(2, budget - 1))) if budget > 1 else ((0, 0),):
        args = q, k, weights, None, scale, *whole, budget, first, recent, False, 32
        indices, counts, *_ = run("select", "select", "numba", CPU, *args)
        position = torch.arange(scores.shape[0])
        forced = (position < first) | (position >= scores.shape[0] - recent)
        ranked = scores.double().nan_to_num(nan=-1e300, posinf=1e200, neginf=-1e200).masked_fill(forced, math.inf)
        best = sorted(position.tolist(), key=lambda s: (-ranked[s].item(), -s))[:budget]
        assert indices.flatten().tolist() == sorted(best) and counts.item() == budget


@pytest.mark.parametrize("J, E", [(1, 3), (4, 64), (6, 10)])
def test_select_has_the_same_bits_for_any_batch_split_workspace_and_thread_count(J, E):
    q, k, weights = index_inputs(2, 70, 1300, J, E)
    whole, lse = select(q, k, weights, 99, with_scores=True, impl="numba")
    start, end = (x.expand(2, 70) for x in visible(1300, 70))
    for step in (1, 23):
        for first in range(0, 70, step):
            rows = slice(None), slice(first, first + step)
            part, part_lse = select(q[rows], k, weights[rows], 99, start=start[rows], end=end[rows], with_scores=True, impl="numba")
            assert same(part, Selection(whole.indices[rows], whole.counts[rows], whole.scores[rows])) and torch.equal(part_lse, lse[rows])
    alone = select(q[1:], k[1:], weights[1:], 99, impl="numba")
    assert torch.equal(alone.indices, whole.indices[1:])
    threads = torch.get_num_threads()
    for workspace_mb, count in ((1, 1), (1, 3), (100, 3)):
        torch.set_num_threads(count)
        try:
            again, again_lse = select(q, k, weights, 99, with_scores=True, workspace_mb=workspace_mb, impl="numba")
        finally:
            torch.set_num_threads(threads)
        assert same(again, whole) and torch.equal(again_lse, lse)


def test_index_lse_of_infinite_and_missing_scores():
    k = torch.tensor([1.0, torch.inf, 2.0, torch.nan]).view(1, 4, 1)
    start, end = torch.tensor([[0, 0, 2, 3, 1]], dtype=torch.int32), torch.tensor([[1, 2, 3, 4, 1]], dtype=torch.int32)
    for sign in (1.0, -1.0):
        inputs = torch.ones(1, 5, 1, 1), k, torch.full((1, 5, 1), sign)
        ours, expected = (select(*inputs, 1, start=start, end=end, with_scores=True, impl=impl)[1] for impl in ("numba", "reference"))
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("H, G, R, D, V", [(8, 1, 1, 8, 5), (6, 2, 2, 64, 64), (6, 3, 1, 33, 17), (17, 1, 1, 7, 3), (8, 4, 2, 1, 1)])
def test_attend_is_the_reference(H, G, R, D, V, dtype):
    inputs = attention_inputs(2, 33, 300, H, G, D, V, dtype=dtype)
    for K in (1, 3, 64, 131, 300):
        indices = random_indices(2, 33, R, K, 300)
        assert_attends_as_the_reference(*inputs, indices=indices)
    assert_attends_as_the_reference(*inputs, indices=indices.long(), sink=normal(H, seed=4).to(dtype), scale=0.2)


@pytest.mark.parametrize("dtype", INTEGERS.values(), ids=INTEGERS)
def test_values_that_are_channels_of_the_keys(dtype):
    q, k, _ = attention_inputs(1, 9, 90, 20, 1, 48, dtype=dtype)
    assert_attends_as_the_reference(q, k, None, v_channels=40, indices=random_indices(1, 9, 1, 70, 90))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_is_read_as_it_is(dtype):
    # the only key that a query reads has probability 1, so its value comes out as it went in
    v = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(1, 256, 1, 256)
    out, _ = attend(torch.zeros(1, 256, 1, 4, dtype=dtype), torch.zeros(1, 256, 1, 4, dtype=dtype), v, indices=torch.arange(256).view(1, 256, 1, 1))
    number = v.view(256, 256).isnan().logical_not()
    assert torch.equal(out.view(256, 256)[number], v.view(256, 256)[number]) and bool(out.view(256, 256)[~number].isnan().all())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["unread", "key", "value", "query"])
def test_nan_and_infinities(what, poison):
    q, k, v = attention_inputs(1, 10, 40)
    indices = random_indices(1, 10, 1, 7, 39)
    {"unread": k[:, 39], "key": k[:, 11, 0, :1], "value": v[:, 11, 0, :2], "query": q[:, 4, 2, :1]}[what].fill_(poison)
    if what == "unread":
        v[:, 39] = poison
    out, lse = assert_attends_as_the_reference(q, k, v, indices=indices)
    assert what != "unread" or bool(out.isfinite().all())


def test_a_row_whose_scores_are_all_minus_infinity_is_empty():
    q, k, v = torch.ones(1, 1, 1, 1), torch.full((1, 3, 1, 1), -torch.inf), torch.ones(1, 3, 1, 2)
    out, lse = assert_attends_as_the_reference(q, k, v, indices=torch.tensor([[[[0, 2]]]]))
    assert out.tolist() == [[[[0.0, 0.0]]]] and lse.tolist() == [[[-math.inf]]]


@pytest.mark.parametrize("logit", [-math.inf, math.inf, 300.0, -300.0])
def test_sinks_of_any_size(logit):
    sink = torch.full((6,), logit)
    assert_attends_as_the_reference(*attention_inputs(), indices=random_indices(2, 33, 1, 9, 50), sink=sink)


def test_scores_of_any_size():
    q, k, v = attention_inputs(1, 9, 60)
    for scale in (1e-30, 1e4, 1e30):
        assert_attends_as_the_reference(q, k, v, indices=random_indices(1, 9, 1, 50, 60), scale=scale)


def test_attend_has_the_same_bits_for_any_batch_split_workspace_and_thread_count():
    q, k, v = attention_inputs(2, 150, 200)
    indices = random_indices(2, 150, 1, 80, 200)
    out, lse = attend(q, k, v, indices=indices, impl="numba")
    for step in (1, 37):  # so few queries read the keys where they lie, many copy them first
        for first in range(0, 150, step):
            rows = slice(1, 2), slice(first, first + step)
            part, part_lse = attend(q[rows], k[1:], v[1:], indices=indices[rows], impl="numba")
            assert torch.equal(part, out[rows]) and torch.equal(part_lse, lse[rows])
    threads = torch.get_num_threads()
    for workspace_mb, count in ((1, 1), (1, 3), (100, 3)):
        torch.set_num_threads(count)
        try:
            again = attend(q, k, v, indices=indices, workspace_mb=workspace_mb, impl="numba")
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.parametrize("dtype", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("T", [1, 40])  # so many read keys a span at a time
def test_keys_of_several_spans_in_any_order(T, dtype):
    q, k, v = attention_inputs(1, T, 5000, 3, 1, 64, 48, dtype=dtype)
    ascending = random_indices(1, T, 1, 600, 5000).sort(-1).values
    shuffled = ascending[..., torch.randperm(600)]
    for indices in (ascending, shuffled):
        out, lse = assert_attends_as_the_reference(q, k, v, indices=indices)
        last, last_lse = attend(q[:, -1:], k, v, indices=indices[:, -1:], impl="numba")
        assert torch.equal(last, out[:, -1:]) and torch.equal(last_lse, lse[:, -1:])


@pytest.mark.parametrize("T", [2, 40])
def test_strides_are_free(T):
    q, k, v = (torch.stack((x, x), 2)[:, :, 1].transpose(1, 2).contiguous().transpose(1, 2) for x in attention_inputs(2, T, 90, D=8, V=6))
    indices = random_indices(2, T, 1, 20, 90).transpose(1, 3).contiguous().transpose(1, 3)
    both = torch.cat((k, v), -1)
    expected = assert_attends_as_the_reference(q.contiguous(), k.contiguous(), v.contiguous(), indices=indices)
    apart = k.mT.contiguous().mT, v.repeat_interleave(2, -1)[..., ::2]  # no stride of 1
    for keys, values in ((k, v), (both[..., :8], both[..., 8:]), apart):
        assert all(torch.equal(a, b) for a, b in zip(attend(q, keys, values, indices=indices, impl="numba"), expected, strict=True))
    one = attend(q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), indices=indices, impl="numba")
    assert torch.equal(one[0][0], expected[0][0])


def test_several_callers_at_once():
    index, attention = index_inputs(1, 130, 900), attention_inputs(1, 130, 900)
    expected = select(*index, 60, impl="numba")
    out, _ = attend(*attention, expected, impl="numba")

    def call(_: int) -> bool:
        selection = select(*index, 60, impl="numba")
        return same(selection, expected) and torch.equal(attend(*attention, selection, impl="numba")[0], out)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(20)))


CHILD = """
import os, torch
from skim.ops import select
torch.set_num_threads(2)
inputs = torch.randn(1, 200, 2, 8), torch.randn(1, 200, 8), torch.randn(1, 200, 2)
expected = select(*inputs, 9, impl="numba").indices
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(select(*inputs, 9, impl="numba").indices, expected) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_selects_too():
    run = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_importing_the_operators_loads_no_numba():
    code = "import sys, skim.ops\nassert 'numba' not in sys.modules and 'skim.ops.select.numba' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_kernel_compiles_where_nothing_can_be_cached():
    code = "from skim.ops.jit import kernel\nassert kernel()(lambda x: x + 1)(1) == 2"  # without a file numba finds no place for a cache
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
