"""Launches every Triton kernel at small sizes, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py

and the same with racecheck, initcheck and synccheck. Without PyTorch's caching allocator each tensor is an allocation of
its own, so that a step outside of it is seen.
"""

from importlib import import_module

import torch

import skim
from skim.ops.codec import dequantise, hadamard, quantise

attention, selection, unions = (import_module(f"skim.ops.{name}") for name in ("attend.triton", "select.triton", "attend.union"))
OPTIONS = {"impl": "triton"}


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def backward(*outputs: torch.Tensor) -> None:
    sum(x.float().sum() for x in outputs).backward()


def scores_and_selections() -> None:
    for J, E, fp8 in ((4, 64, False), (8, 64, True), (3, 48, False)):
        q, k, w = draw(2, 37, J, E), draw(2, 700, E), draw(2, 37, J)
        index = (quantise(q, **OPTIONS), quantise(k, **OPTIONS), w) if fp8 else (q, k, w)
        skim.ops.index_scores(*index, **OPTIONS)
        skim.select(*index, 60, keep_first=2, keep_recent=3, with_scores=True, **OPTIONS)
        skim.select(index[0], index[1], index[2], 900, **OPTIONS)
        one = tuple(x[:, -1:].contiguous() for x in index[0]) if fp8 else index[0][:, -1:].contiguous()
        skim.select(one, index[1], w[:, -1:].contiguous(), 60, **OPTIONS)
    leaves = [x.requires_grad_() for x in (draw(1, 20, 4, 32), draw(1, 50, 32), draw(1, 20, 4))]
    backward(skim.ops.index_scores(*leaves, **OPTIONS).clamp(min=-1e3))
    dequantise(*quantise(draw(5, 70), **OPTIONS), **OPTIONS)
    hadamard(draw(5, 64), **OPTIONS)
    rows = torch.randn(5, 30000, device="cuda").round()  # plateaus
    interval = torch.zeros(5, dtype=torch.int32, device="cuda"), torch.full((5,), 30000, dtype=torch.int32, device="cuda")
    selection.top_k(rows, *interval, 100)
    selection.top_k(torch.full_like(rows, torch.nan), *interval, 100)  # flagged, so done again


def attentions() -> None:
    for H, G, D, tile in ((12, 3, 64, True), (4, 2, 96, False), (16, 1, 128, True)):
        attention.processors = lambda device, full=tile: 1 if full else 10_000  # either queries share unions, or keys are split
        T, S, K = (50, 130, 40) if tile else (3, 3000, 2000)
        indices = torch.rand(2, T, 1, S, device="cuda").topk(K, sorted=False).indices.to(torch.int32)
        indices[:, ::7] = -1
        near = indices[:, :1].expand_as(indices).contiguous()
        for chosen in (indices, near):
            for exact in (False, True):
                torch.use_deterministic_algorithms(exact)
                leaves = [x.requires_grad_() for x in (draw(2, T, H, D), draw(2, S, G, D), draw(2, S, G, D), draw(H))]
                backward(skim.attend(*leaves[:3], indices=chosen, sink=leaves[3], **OPTIONS)[0])
                index = [x.requires_grad_() for x in (draw(2, T, 4, 32), draw(2, S, 32), draw(2, T, 4))]
                q, k = leaves[0].detach(), leaves[1].detach()
                backward(skim.align(q, k, *index, selection=skim.Selection.from_indices(chosen), **OPTIONS))
                backward(skim.align(q, k, *index, **OPTIONS))
        torch.use_deterministic_algorithms(False)
        leaves = [x.requires_grad_() for x in (draw(2, T, H, D), draw(2, S, G, D), draw(2, S, G, D))]
        backward(skim.attend_dense(*leaves, **OPTIONS)[0])


torch.manual_seed(0)
selection.SAMPLE, selection.CAPACITY, selection.ROOM = 64, 32, 0
scores_and_selections()
attentions()
torch.cuda.synchronize()
print("launched every kernel")
