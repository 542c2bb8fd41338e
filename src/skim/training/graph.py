"""A training step's kernels as a CUDA graph: small models wait for Python to launch them longer than for the kernels themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Captured:
    """Work on a GPU that was recorded once and is replayed by each call.

    Args:
        work: tensors by name -> tensors by name, with kernels that ran before. It reads nothing on the host, and whatever
            else it changes, gradients say, it changes in place.
        inputs: an example; those of the calls have its names, shapes and dtypes.

    Raises:
        RuntimeError: CUDA can't record it, because it waits for the GPU, say.
    """

    def __init__(self, work: Callable[[Tensors], Tensors], inputs: Tensors) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.graph = torch.cuda.CUDAGraph()
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph, pool=pool):
                self.outputs = work(self.inputs)
        except RuntimeError:
            _abandon(pool, stream)
            raise

    def __call__(self, inputs: Tensors) -> Tensors:
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}  # the next call overwrites them


def _abandon(pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
    """Undo what a capture that failed leaves in force: its stream, and what waits for its end, the allocator and random numbers."""
    torch.cuda.set_stream(stream)
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # PyTorch 2.12 does this itself; before, the next empty_cache() would fail
        torch._C._cuda_endAllocateToPool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
