"""The Gluon kernel of index scores against the reference: simulated on a CPU, or on an sm_90 GPU where there is one; and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import index_inputs, moved_to, random_interval
from reference_math import interval_mask
from torch import Tensor

kernels = pytest.importorskip("skim.ops.score.hopper", reason="Triton is not installed, or has no Gluon")

from simulated import LANGUAGE, Simulated, here  # noqa: E402
from test_compiled import SHARED, found  # noqa: E402

from skim.ops import codec, dispatch, index_scores, visible  # noqa: E402

FORWARD = kernels.forward
REAL = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if REAL else "cpu"
# Bytes that may be spilled for so many heads: counters and addresses, beside the weights and the products of a warp group.
SPILLED = {"64": 128, "32": 32, "17": 32, "8": 64}


def simulated(kernel: Any) -> Simulated:
    """A kernel to be run on the CPU, which says in PTX nothing but copies."""
    python = Simulated(kernel)
    python.replace("gl", SimpleNamespace(**{**vars(LANGUAGE), "inline_asm_elementwise": lambda asm, constraints, args, **options: args[0]}))
    return python


@pytest.fixture(autouse=True)
def simulated_without_a_card(monkeypatch: pytest.MonkeyPatch):
    if not REAL:
        dispatch._module.cache_clear()
        monkeypatch.setattr(dispatch, "_without_hopper", lambda device_type, index: None)
        monkeypatch.setattr(kernels, "forward", simulated(kernels.forward))
    yield
    dispatch._module.cache_clear()


def eight(B: int = 1, T: int = 5, S: int = 600, J: int = 64, E: int = 128) -> tuple[Any, Any, Tensor]:
    """Queries and keys in FP8 with their scales, and weights."""
    q, k, weights = index_inputs(B, T, S, J, E)
    return codec.quantise(q), codec.quantise(k), weights


def scores(inputs: tuple[Any, ...], impl: str = "hopper", **options: Any) -> Tensor:
    moved = {name: moved_to(DEVICE, x) for name, x in options.items()}
    return index_scores(*moved_to(DEVICE, inputs), impl=impl, **moved).cpu()


def check(inputs: tuple[Any, ...], **interval: Tensor) -> None:
    found, wanted = scores(inputs, **interval), index_scores(*inputs, impl="reference", **interval)
    assert torch.equal(found.isinf(), wanted.isinf())
    seen = wanted.isfinite()
    bound = 2e-4 if REAL else 1e-6  # matrix units sum FP8 products in fewer bits: 1.3e-4 of 128 channels, with Triton's kernel too
    assert float((found[seen] - wanted[seen]).norm()) <= bound * float(wanted[seen].norm())


@pytest.mark.parametrize(("J", "E"), [(64, 128), (64, 64), (40, 128), (32, 64), (17, 128), (8, 128)])
def test_any_number_of_heads(J: int, E: int) -> None:
    check(eight(2, 19, 600, J, E))


@pytest.mark.parametrize("S", (1, 255, 256, 257, 513, 700))
def test_any_number_of_keys(S: int) -> None:
    inputs = eight(T=5, S=S)
    start, end = random_interval(1, 5, S)
    check(inputs, start=start, end=end)


@pytest.mark.parametrize("blocks", (4, 5, 9))
def test_any_number_of_blocks_in_a_task(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "processors", lambda device: 1)
    check(eight(T=6, S=kernels.KEYS.value * blocks - 7))


@pytest.mark.parametrize(("processors", "chunk"), [(1, 256), (3, 256), (64, 256), (4, 8192), (5, 8192), (5, 512)])
def test_the_same_bits_for_any_chunk_batch_and_split(processors: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, weights = eight(2, 9, 900)
    start, end = (x.expand(2, 9) for x in visible(900, 9))
    whole = scores((q, k, weights), start=start, end=end)
    monkeypatch.setattr(kernels, "processors", lambda device: processors)
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    assert torch.equal(scores((q, k, weights), start=start, end=end), whole)
    for t in (0, 5):
        one = slice(t, t + 1)
        alone = scores((tuple(x[1:, one] for x in q), tuple(x[1:] for x in k), weights[1:, one]), start=start[1:, one], end=end[1:, one])
        assert torch.equal(alone, whole[1:, one])


@pytest.mark.parametrize(
    ("T", "S", "limit"), [(4096, 8192, 1.015), (4096, 32768, 1.005), (8192, 8192, 1.01), (128, 32768, 1.04), (268, 8192, 1.05), (560, 8192, 1.03)]
)
def test_no_processor_has_much_more_work_than_another(T: int, S: int, limit: float) -> None:
    queries = kernels.queries_of(64)
    tiles = T // queries
    chunk = kernels._chunk(S, tiles, 132)
    tasks = tiles * -(-S // chunk)
    here.programs = min(tasks, 132)
    kernel = Simulated(FORWARD).globals
    blocks, written = torch.zeros(132), torch.zeros(tiles, -(-S // kernels.KEYS.value), dtype=torch.int64)
    for program in range(here.programs):
        here.program = program
        for n in range(int(kernel["_parts"](tasks))):
            task, low, high = kernel["_part"](torch.tensor(n), tasks)
            _, t0, origin = kernel["task_of"](task, tiles, tiles, chunk, queries)
            end = S - T + t0 + 1 + torch.arange(queries)
            begin, stop, first, last = kernel["_walk"](torch.zeros_like(end), end, origin, chunk, S, low, high)
            blocks[program] += stop - begin
            written[t0 // queries, first:last] += 1
    assert bool((written == 1).all())
    assert blocks.max() <= limit * blocks.mean()


@pytest.mark.parametrize(("processors", "S", "T"), [(4, 2100, 9), (5, 2100, 9), (7, 2100, 9), (5, 1500, 33)])
def test_parts_of_tasks_of_which_little_is_seen(processors: int, S: int, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "processors", lambda device: processors)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(7))  # what nothing writes is seen
    inputs = eight(2, T, S)
    start, end = torch.full((2, T), 600, dtype=torch.int32), torch.full((2, T), 1400, dtype=torch.int32)
    check(inputs, start=start, end=end)
    check(inputs, start=start, end=start)


def test_queries_that_see_nothing_between_others() -> None:
    start, end = torch.zeros(1, 12, dtype=torch.int32), torch.full((1, 12), 500, dtype=torch.int32)
    end[0, 4:8] = 0
    start[0, 9], end[0, 9], end[0, 10] = 400, 300, 2000
    check(eight(T=12), start=start, end=end)


def test_nan_in_an_unseen_key_reaches_no_score() -> None:
    q, (k, k_scale), weights = eight(T=5)
    start, end = torch.tensor([[0, 0, 20, 20, 40]], dtype=torch.int32), torch.tensor([[5, 10, 21, 30, 200]], dtype=torch.int32)
    poisoned = k.clone()
    poisoned[:, 10:15], poisoned[:, 200:] = torch.nan, torch.nan
    seen = interval_mask(start, end, 600)
    clean, dirty = (scores((q, (x, k_scale), weights), start=start, end=end) for x in (k, poisoned))
    assert torch.equal(clean[seen], dirty[seen]) and bool((dirty[~seen] == -torch.inf).all())


def test_keys_of_rows_far_apart() -> None:
    q, (k, k_scale), weights = eight(2, 5, 300)
    apart = torch.empty(2, 500, 128, dtype=k.dtype, device=DEVICE)[:, :300].copy_(k)
    assert torch.equal(scores((q, (apart, k_scale), weights)), scores((q, (k, k_scale), weights)))


def test_keys_of_rows_that_share_memory() -> None:
    q, (k, k_scale), weights = eight(3, 5, 300)
    expanded, windows = (k[:1].to(DEVICE).contiguous().flatten().as_strided((3, n, 128), (step * 128, 128, 1)) for n, step in ((300, 0), (280, 7)))
    for keys in (expanded, windows):
        scale = k_scale[:1, : keys.shape[1]].expand(3, -1)
        assert torch.equal(scores((q, (keys, scale), weights)), scores((q, (keys.contiguous(), scale), weights)))


def test_scales_and_weights_in_half_precision() -> None:
    (q, q_scale), (k, k_scale), weights = eight(2, 5, 300)
    check(((q, q_scale.bfloat16()), (k, k_scale.bfloat16()), weights.bfloat16()))


def test_what_it_cannot_run_it_refuses_by_name() -> None:
    q, (k, k_scale), weights = eight(T=4, S=40)
    packed, (there, every) = codec.pack(k, k_scale), moved_to(DEVICE, (k, torch.ones_like(k)))
    with pytest.raises(ValueError, match="float8_e4m3fn queries and keys"):
        scores(index_inputs(T=4, S=40, E=64))
    with pytest.raises(ValueError, match="64 heads of 64 or 128 channels, got 65 of 128"):
        scores(eight(T=1, S=1, J=65))
    with pytest.raises(ValueError, match="gains nothing where heads times channels are less than 1024, got 8 heads of 64"):
        scores(eight(T=16, S=1, J=8, E=64))
    with pytest.raises(ValueError, match="computes in float32, not in float64"):
        scores((q, (k, k_scale), weights.double()))
    with pytest.raises(ValueError, match="rows of k_index don't follow each other"):
        scores((q, packed, weights))
    with pytest.raises(ValueError, match="rows of k_index don't follow each other"):
        scores((q, (torch.cat((there, every), 2)[..., :128], k_scale), weights))
    between = torch.empty(80 * 128 + 16, dtype=k.dtype, device=DEVICE).as_strided((2, 40, 128), (40 * 128 + 16, 128, 1)).copy_(k)
    with pytest.raises(ValueError, match="no whole number of rows apart"):
        scores((tuple(x.expand(2, *x.shape[1:]) for x in q), (between, k_scale.expand(2, -1)), weights.expand(2, -1, -1)))
    values, scale = (x.to(DEVICE) for x in q)
    shifted = torch.empty(values.numel() + 8, dtype=values.dtype, device=DEVICE)[8:].view(values.shape).copy_(values)
    with pytest.raises(ValueError, match="q_index begins at no multiple of 16 bytes"):
        scores(((shifted, scale), (k, k_scale), weights))


@pytest.mark.slow
def test_compiled_for_sm_90(tmp_path: Path) -> None:
    compiled = [row for row in found(90, ("hopper_score",), tmp_path) if row["kernel"] == "forward"]
    assert len(compiled) == 5
    for row in compiled:
        call = row["call"]
        # Two groups multiply 2 x 64 keys with two halves of the heads, 32 channels at a time.
        shape = "m64n128k32" if call.startswith("64") else "m64n64k32"
        assert row["products"] == {shape: 2 * 2 * 2 * (4 if "x128" in call else 2)}, call
        assert row["spilled"] <= SPILLED[call.split("x")[0]], call
        assert row["shared"] <= SHARED[90] << 10 and row["warps"] == 12, call
        assert row["handed_over"] == {"bar.sync": 5}, call  # of each of two groups one thread arrives, for keys and queries, and one has keys fetched
