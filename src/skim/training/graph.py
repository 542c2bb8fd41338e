"""A training step's kernels as a CUDA graph: small models wait for Python to launch them longer than for the kernels themselves."""

from __future__ import annotations

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
        try:
            with torch.cuda.graph(self.graph):
                self.outputs = work(self.inputs)
        except RuntimeError:
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())  # the old one waits for the end of a capture
            raise

    def __call__(self, inputs: Tensors) -> Tensors:
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}  # the next call overwrites them
