"""Measured memory: the record of every allocation, torch's and numpy's, forward and backward, what single calls take for themselves too."""

import tracemalloc
from collections.abc import Callable
from importlib import util

import numpy as np
import pytest
import torch
from cases import attention_inputs, index_inputs, normal
from torch.profiler import ProfilerActivity, profile

from skim.ops import align, attend, attend_dense, index_scores, select
from skim.selection import Selection

MIB = 2**20
WORKSPACE = 4
CPU = ["reference", pytest.param("numba", marks=pytest.mark.skipif(not util.find_spec("numba"), reason="numba is not installed"))]
N = 4096  # queries and keys: N x N numbers of float32 are 64 MiB, of one byte 16 MiB


def memory(call: Callable[[], object]) -> tuple[float, float]:
    """MiB that live at most at a time beside what lived before, and the largest single allocation.

    Scratch of numpy is seen by Python's own tracing. Its peak, as if it were one allocation, is added: that may be too much, never too little.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        tracemalloc.start()
        call()
        numpys = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    events = sorted((e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    return (peak + numpys) / MIB, max([numpys, *(size for _, size in events)]) / MIB


def size_of(*tensors: torch.Tensor) -> float:
    """MiB of these tensors in float32, the dtype that gradients are summed in."""
    return sum(x.numel() for x in tensors) * 4 / MIB


def assert_bounded(call: Callable[[], object], inputs_and_outputs: float) -> None:
    """The workspace, half as much again for what it doesn't count, and each input and output in float32 three times."""
    peak, largest = memory(call)
    assert peak < 1.5 * WORKSPACE + 3 * inputs_and_outputs, f"{peak:.1f} MiB"
    assert peak < N * N * 4 / MIB / 2 and largest < N * N / MIB, f"{peak:.1f} MiB, largest {largest:.1f} MiB"


def causal_neighbours(K: int) -> Selection:
    return Selection.from_indices((torch.arange(N)[:, None] - torch.arange(K)).clamp(min=-1)[None, :, None])


def test_the_measure_sees_what_it_has_to():
    peak, largest = memory(lambda: torch.ones(N, N).sum())
    assert 65 > peak >= largest == 64
    assert all(65 > x >= 64 for x in memory(lambda: np.ones((N, N), np.float32).sum()))
    assert memory(lambda: [torch.ones(MIB).sum() for _ in range(10)])[0] < 5  # 4 MiB at a time
    assert memory(lambda: index_scores(*index_inputs(1, N, N, J=1, E=4), workspace_mb=WORKSPACE))[1] >= 64


@pytest.mark.parametrize("impl", CPU)
@pytest.mark.parametrize("with_scores", [False, True])
def test_trap_15_select_holds_no_score_matrix(with_scores, impl):
    select(*index_inputs(1, 9, 9, J=4, E=16), 3, with_scores=with_scores, impl=impl)  # compiles
    inputs = index_inputs(1, N, N, J=4, E=16)
    results = size_of(*inputs) + 3 * N * 64 * 4 / MIB
    assert_bounded(lambda: select(*inputs, 64, with_scores=with_scores, workspace_mb=WORKSPACE, impl=impl), results)


@pytest.mark.parametrize("impl", CPU)
def test_an_adaptive_budget_takes_no_more_than_the_workspace_and_what_is_selected(impl):
    select(*index_inputs(1, 9, 9, J=4, E=16), 3, mass=0.5, impl=impl)  # compiles
    inputs = index_inputs(1, N, N, J=4, E=16)
    results = size_of(*inputs) + 3 * N * 64 * 4 / MIB
    assert_bounded(lambda: select(*inputs, 64, mass=0.5, workspace_mb=WORKSPACE, impl=impl), results)


@pytest.mark.parametrize("impl", CPU)
def test_select_holds_no_score_per_head_for_many_heads(impl):
    # 64 heads x 16 queries x 64 Ki keys are 256 MiB: heads are summed a tile of keys at a time
    select(*index_inputs(1, 9, 9, J=64, E=4), 3, impl=impl)
    inputs = index_inputs(1, 16, 65536, J=64, E=4)
    peak, largest = memory(lambda: select(*inputs, 64, workspace_mb=WORKSPACE, impl=impl))
    assert peak < 48 and largest < 17


@pytest.mark.parametrize("impl", CPU)
def test_attend_forward_holds_no_mask_and_no_dense_scores(impl):
    small = attention_inputs(1, 9, 9, H=4, G=1, D=16, V=8)
    attend(*small, indices=torch.zeros(1, 9, 1, 1, dtype=torch.int32), impl=impl)
    q, k, v = attention_inputs(1, N, N, H=4, G=1, D=16, V=8)
    selection = causal_neighbours(32)
    assert_bounded(lambda: attend(q, k, v, selection, workspace_mb=WORKSPACE, impl=impl), size_of(q, k, v, q[..., :8], selection.indices))


@pytest.mark.parametrize("v_channels", [None, 8])
def test_trap_16_attend_holds_no_mask_and_no_dense_scores(v_channels):
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, N, N, H=4, G=1, D=16, V=8))
    selection = causal_neighbours(32)
    grad = normal(1, N, 4, 8)

    def call():
        out, lse = attend(q, k, v if v_channels is None else None, selection, v_channels=v_channels, sink=torch.zeros(4), workspace_mb=WORKSPACE)
        torch.autograd.backward((out, lse), (grad, lse.detach()))

    assert_bounded(call, size_of(q, k, v, grad, selection.indices))


def test_attend_dense_holds_no_score_matrix():
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, N, N, H=2, G=1, D=8, V=8))
    grad = normal(1, N, 2, 8)

    def call():
        out, lse = attend_dense(q, k, v, workspace_mb=WORKSPACE)
        torch.autograd.backward((out, lse), (grad, lse.detach()))

    assert_bounded(call, size_of(q, k, v, grad))


@pytest.mark.parametrize("sparse", [False, True])
def test_align_holds_no_score_matrix(sparse):
    q, k, _ = attention_inputs(1, N, N, H=2, G=1, D=8)
    index = [x.requires_grad_() for x in index_inputs(1, N, N, J=2, E=8)]
    selection = causal_neighbours(64) if sparse else None
    assert_bounded(lambda: align(q, k, *index, selection=selection, workspace_mb=WORKSPACE).backward(), size_of(q, k, *index))


def test_backward_keeps_what_is_needed_and_no_more():
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, 512, 512, H=4, G=1, D=16, V=8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = attend(q, k, v, Selection.from_indices(torch.zeros(1, 512, 1, 3, dtype=torch.int64).add(torch.arange(3))))
    assert sum(x.numel() for x in saved) <= q.numel() + k.numel() + v.numel() + out.numel() + lse.numel() + 512 * 3
