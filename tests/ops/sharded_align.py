"""One rank of test_align's sharded run; a module of its own because spawned processes import it by name."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from cases import attention_inputs, index_inputs, random_indices

from skim.ops import align, attend, attend_dense
from skim.selection import Selection

T, S = 12, 20


def run(heads: slice, key_heads: slice, group: object = None) -> list[torch.Tensor]:
    """Loss and gradients, dense and sparse, with and without a given lse, of an attention that has only some of the heads."""
    q, k, v = attention_inputs(B=2, T=T, S=S, H=4, G=2)
    q, k, v = q[:, :, heads], k[:, :, key_heads], v[:, :, key_heads]
    results = []
    for selection in (None, Selection.from_indices(random_indices(2, T, 1, 6, S))):
        _, lse = attend_dense(q, k, v) if selection is None else attend(q, k, v, selection)
        for given in (None, lse):
            index = [x.requires_grad_() for x in index_inputs(2, T, S)]
            loss = align(q, k, *index, selection=selection, lse=given, group=group)
            loss.backward()
            results += [loss.detach(), *(x.grad for x in index)]
    return results


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        torch.save(run(slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1), dist.group.WORLD), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
