"""The operators on a GPU: equal to the CPU's, forward and backward, and within their workspace."""

import pytest
import torch

import skim

pytestmark = pytest.mark.gpu

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def index_tensors(T: int, J: int = 4, E: int = 64) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, T, J, E), torch.randn(2, T, E), torch.randn(2, T, J)


def test_selections_equal_the_cpus_except_within_rounding_of_the_threshold():
    q, k, w = index_tensors(700)
    here, there = skim.select(q, k, w, 64), skim.select(q.cuda(), k.cuda(), w.cuda(), 64)
    different = (here.indices != there.indices.cpu()).any(-1)
    assert float(different.float().mean()) < 0.01
    assert torch.equal(here.counts, there.counts.cpu())


def test_a_selection_does_not_depend_on_chunks():
    q, k, w = (x.cuda() for x in index_tensors(1500))
    whole = skim.select(q, k, w, 64)
    start, end = skim.visible(1500, 500, offset=1000)
    part = skim.select(q[:, 1000:], k, w[:, 1000:], 64, start=start.cuda().expand(2, -1), end=end.cuda().expand(2, -1), workspace_mb=64)
    assert torch.equal(part.indices, whole.indices[:, 1000:])


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float8_e4m3fn))
@pytest.mark.parametrize("J", (1, 2, 3, 4, 8, 20, 64))
def test_few_queries_score_bitwise_as_among_many(J, dtype):
    T, S, E = 40, 300, 64
    q, k, w = torch.randn(1, T, J, E), torch.randn(1, S, E), torch.randn(1, T, J)
    q, k = (skim.ops.codec.quantise(x) if dtype == torch.float8_e4m3fn else x.to(dtype) for x in (q, k))
    wide = [skim.ops.codec.dequantise(*x) if isinstance(x, tuple) else x.double() for x in (q, k)]
    wanted = skim.index_scores(*(x.double() for x in wide), w.double())

    def scores(rows: slice) -> torch.Tensor:
        some = tuple(x[:, rows].cuda() for x in q) if isinstance(q, tuple) else q[:, rows].cuda()
        keys = tuple(x.cuda() for x in k) if isinstance(k, tuple) else k.cuda()
        start, end = (x[:, rows].cuda() for x in skim.visible(S, T))
        return skim.index_scores(some, keys, w[:, rows].cuda(), start=start, end=end)

    many = scores(slice(0, T))
    seen = wanted.isfinite()
    assert error(many.cpu()[seen], wanted[seen]) < (1e-4 if dtype == torch.float8_e4m3fn else 1e-6)
    for few in (1, 3, 4, 17):
        assert torch.equal(scores(slice(T - few, T)), many[:, T - few :])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float8_e4m3fn))
@pytest.mark.parametrize("J, E", ((8, 64), (17, 100), (64, 128)))
@pytest.mark.parametrize("T", (1, 40, 100))  # by way of scores in memory, and more rows than that takes
def test_selected_keys_have_bitwise_the_scores_that_index_scores_gives(T, J, E, dtype):
    S = 20000
    q, k, w = torch.randn(1, T, J, E).cuda(), torch.randn(1, S, E).cuda(), torch.randn(1, T, J).cuda()
    q, k = (skim.ops.codec.quantise(x) if dtype == torch.float8_e4m3fn else x.to(dtype) for x in (q, k))
    selection, _ = skim.select(q, k, w, 512, keep_first=4, keep_recent=16, with_scores=True, impl="triton")
    scores = skim.index_scores(q, k, w, impl="triton")
    assert torch.equal(selection.scores[:, :, 0], scores.gather(2, selection.indices[:, :, 0].long()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", (False, True))
def test_attention_and_its_gradients_equal_float64(dtype, dense):
    T, budget = 300, 40
    selection = skim.select(*index_tensors(T), budget)
    on_gpu = skim.Selection(selection.indices.cuda(), selection.counts.cuda())
    inputs = [torch.randn(2, T, heads, 64).to(dtype) for heads in (9, 3, 3)]
    results = []
    for device, precise in (("cpu", True), ("cuda", False)):
        leaves = [x.to(device, torch.float64 if precise else dtype).requires_grad_() for x in inputs]
        out, lse = skim.attend_dense(*leaves) if dense else skim.attend(*leaves, selection if precise else on_gpu)
        (out.double().square().sum() + lse.double().sum()).backward()
        results.append([out, lse, *(x.grad for x in leaves)])
    for wanted, found in zip(*results):
        assert error(found, wanted) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("H", (64, 128, 256))  # the last two by kernels in Gluon on sm_90
def test_gradients_over_latents_equal_those_of_float32(H, dtype):
    """Two batch rows of causal queries, short selections among long ones, with a sink; dq repeats bit for bit."""
    T, K = 500, 400
    own = torch.arange(T, device="cuda")
    value, indices = torch.rand(2, T, T, device="cuda").masked_fill(own > own[:, None], -1.0).topk(K)
    indices = indices.to(torch.int32).masked_fill(value < torch.rand(2, T, 1, device="cuda") - 0.5, -1)[:, :, None]
    indices[:, ::7] = -1
    inputs = [torch.randn(*shape, device="cuda") for shape in ((2, T, H, 576), (2, T, 1, 576), (H,))]
    toward = torch.randn(2, T, H, 512, device="cuda").to(dtype)

    def gradients(of):
        leaves = [x.to(dtype).to(of).requires_grad_() for x in inputs]
        out, _ = skim.attend(*leaves[:2], indices=indices, v_channels=512, sink=leaves[2])
        return torch.autograd.grad(out, leaves, toward.to(of))

    found = gradients(dtype)
    assert torch.equal(gradients(dtype)[0], found[0])
    for a, b in zip(found, gradients(torch.float32)):
        assert error(a, b) < DTYPES[dtype]


def test_deterministic_algorithms_repeat_bit_for_bit():
    q, k, v = (torch.randn(1, 400, heads, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2))
    selection = skim.select(*(x[:1].cuda() for x in index_tensors(400)), 32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(skim.attend(q, k, v, selection)[0].square().sum(), (q, k, v)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_alignment_equals_the_cpus():
    q, k = torch.randn(2, 300, 9, 64), torch.randn(2, 300, 3, 64)
    index, results = index_tensors(300), []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device, copy=True).requires_grad_() for x in index]
        loss = skim.align(q.to(device), k.to(device), *leaves)
        loss.backward()
        results.append([loss, *(x.grad for x in leaves)])
    for wanted, found in zip(*results):
        assert error(found, wanted) < 1e-5


def test_memory_is_bounded_by_the_workspace():
    T = 16384
    q, k, w = torch.randn(1, T, 4, 64, device="cuda"), torch.randn(1, T, 64, device="cuda"), torch.randn(1, T, 4, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    selection = skim.select(q, k, w, 256, workspace_mb=256)
    held = torch.cuda.memory_allocated() - before
    assert held <= T * 257 * 4 + (1 << 20)
    assert torch.cuda.max_memory_allocated() - before < held + (2 * 256 << 20)  # T x T scores alone would be 1 GiB
    assert selection.counts.max() == 256
