"""How time is measured: differing inputs in turn, results overwritten, NaN found."""

import os

import pytest
import torch

from skim.bench.measure import REPETITIONS, measure, poison, tensors
from skim.bench.roofs import Roofs, Stage, measured_roofs
from skim.selection import Selection

CPU = torch.device("cpu")


def test_inputs_are_taken_in_turn():
    seen = []
    inputs = [torch.full((2,), float(i)) for i in range(3)]
    took = measure(lambda x: seen.append(int(x[0])) or x * 2, inputs, CPU, seconds=0.0)
    assert took.repetitions == REPETITIONS[0] and took.ms > 0 and took.peak_mib is None
    warm_ups = len(seen) - 1 - took.repetitions  # the first call checks the result
    assert seen[1 : 1 + warm_ups] == [i % 3 for i in range(warm_ups)] and set(seen[1 + warm_ups :]) == {0, 1, 2}


def test_a_result_left_over_from_the_repetition_before_is_found():
    held = torch.zeros(4)

    def stale(x):
        if not stale.written:
            held.copy_(x)
            stale.written = True
        return held

    stale.written = False
    measure(stale, [torch.ones(4)], CPU, seconds=0.0)
    assert bool(held.isnan().all()), "each result was overwritten after it was used"
    with pytest.raises(ValueError, match="the result holds NaN"):
        measure(stale, [torch.ones(4)], CPU, seconds=0.0)


def test_everything_in_a_result_is_overwritten():
    selection = Selection(torch.zeros(1, 2, 1, 3, dtype=torch.int32), torch.zeros(1, 2, 1, dtype=torch.int32))
    result = (torch.zeros(3), [torch.zeros(2, dtype=torch.float8_e4m3fn), None], selection)
    poison(result)
    found = list(tensors(result))
    assert len(found) == 4
    assert all(bool(x.float().isnan().all()) if x.is_floating_point() else bool((x == -1).all()) for x in found)


def test_the_least_time_of_a_stage_is_that_of_its_tightest_roof():
    roofs = Roofs(matmul=100.0, fp8=200.0, copy=10.0, gather=50.0, gather_far=None)
    assert Stage("x", "", flops=300, moved=10).seconds(roofs) == 3.0
    assert Stage("x", "", fp8_flops=300, flops=100, gathered=100).seconds(roofs) == 2.5
    assert Stage("x", "", fp8_flops=300, moved=100).seconds(roofs) == 10.0
    without = Roofs(matmul=100.0, fp8=None, copy=10.0, gather=None, gather_far=None)
    assert Stage("x", "", fp8_flops=100).seconds(without) == 1.0 and Stage("x", "", flops=100, gathered=900).seconds(without) == 1.0


@pytest.mark.gpu
def test_memory_beyond_inputs_and_beyond_results():
    def run(x):
        scratch = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
        return x + scratch[:1]

    x = torch.ones(16 << 20, dtype=torch.uint8, device="cuda")
    took = measure(run, [x, x.clone()], x.device, seconds=0.0)
    assert took.peak_mib == pytest.approx(80, abs=1) and took.scratch_mib == pytest.approx(64, abs=1)


@pytest.mark.gpu
def test_graphs_are_measured_with_their_own_inputs():
    inputs = [torch.full((1024,), float(i), device="cuda") for i in range(3)]
    took = measure(lambda x: x * 2, inputs, inputs[0].device, graph=True, seconds=0.0)
    assert 0 < took.ms < 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_roofs_are_rates(device):
    roofs = measured_roofs(torch.device(device), quick=True)
    assert roofs.matmul > 0 and roofs.copy > 0
    assert (roofs.gather is None) == (device == "cpu")


def test_the_gather_sums_rows_by_their_numbers():
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter must be chosen before Triton is imported")
    from skim.bench.gather import ROWS, WIDTH, gather

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randint(-4, 5, (37, WIDTH), device=device).to(torch.bfloat16)
    indices = torch.randint(0, 37, (2, ROWS), dtype=torch.int32, device=device)
    assert torch.equal(gather(x, indices), x.float()[indices.long()].sum(1))
