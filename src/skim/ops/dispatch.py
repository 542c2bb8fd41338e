"""Picks the implementation of an operator; the only place that knows the hardware.

Each implementation module has, beside the operator's functions, `refusal(function, args)`: why it cannot run this call,
or None. "auto" takes the first that does not refuse; a name that the user gave runs or raises with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module, util
from types import ModuleType
from typing import Any

import torch

OPERATORS = ("score", "select", "attend", "align", "codec")
IMPLEMENTATIONS = ("hopper", "triton", "numba", "reference")  # the fastest first
GLUON = ("3.6", "3.7", "3.9")  # releases of Triton that hopper's kernels are written for: their language changes from one to the next
PLAIN = (torch.Tensor, torch.nn.Parameter)
SM = (8, 0)  # the first NVIDIA GPUs with bf16 matrix units and asynchronous copies


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _without(implementation: str, device_type: str, index: int | None) -> str | None:
    """Why `implementation` runs nothing on this device, or None."""
    if implementation in ("hopper", "triton") and util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'skim-attention[gpu]'"
    if implementation == "hopper":
        return _without_hopper(device_type, index)
    if implementation == "triton":
        if interpreted():
            return None
        if device_type != "cuda":
            return f"Triton kernels run on NVIDIA GPUs (or interpreted, TRITON_INTERPRET=1), not on {device_type}"
        capability = torch.cuda.get_device_capability(index)
        return None if capability >= SM else f"Triton kernels need an NVIDIA GPU of sm_80 or newer, this is sm_{capability[0]}{capability[1]}"
    if implementation == "numba":
        if device_type != "cpu":
            return f"numba kernels run on the CPU, not on {device_type}"
        if util.find_spec("numba") is None:
            return "numba is not installed: pip install 'skim-attention[cpu]'"
    return None


def _without_hopper(device_type: str, index: int | None) -> str | None:
    if device_type != "cuda":
        return f"Gluon kernels run on NVIDIA GPUs, not on {device_type}"
    if interpreted():
        return "Triton's interpreter (TRITON_INTERPRET=1) runs no Gluon kernels"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) != (9, 0):
        return f"Gluon kernels here need an NVIDIA GPU of sm_90, this is sm_{major}{minor}"
    from triton import __version__ as version

    if ".".join(version.split(".")[:2]) not in GLUON:
        return f"Gluon kernels here need Triton {' or '.join(GLUON)}, this is {version}"
    return None


@cache
def _module(operator: str, implementation: str, device_type: str, index: int | None) -> ModuleType | str:
    """The module of that implementation, or why there is none on this device."""
    if reason := _without(implementation, device_type, index):
        return reason
    name = f"skim.ops.{operator}.{implementation}"
    return import_module(name) if util.find_spec(name) else f"{operator} has no {implementation} implementation"


def implementation(operator: str, impl: str, device: torch.device, function: str | None = None, args: tuple[Any, ...] = ()) -> ModuleType:
    """The module that runs `operator` on `device`.

    Args:
        operator: one of `OPERATORS`.
        impl: "auto" for the fastest that supports the call, or the name of an implementation.
        device: the device of the operands.
        function, args: the call, if there is one already.

    Raises:
        ValueError: `operator` or `impl` is unknown, or the implementation named cannot run the call.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {OPERATORS}, got {operator!r}")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl: expected 'auto' or one of {IMPLEMENTATIONS} for {operator!r}, got {impl!r}")
    candidates: tuple[str, ...] = (impl,)
    if impl == "auto":  # kernels under the interpreter are for tests, which ask for them by name
        candidates = tuple(name for name in IMPLEMENTATIONS if name != "triton" or (device.type == "cuda" and not interpreted()))
    reason: str | None = None
    for name in candidates:
        module = _module(operator, name, device.type, device.index)
        if isinstance(module, str):
            reason = module
            continue
        reason = module.refusal(function, args) if function is not None and hasattr(module, "refusal") else None
        if reason is None:
            return module
    raise ValueError(f"impl: {impl!r} cannot run {operator}{'' if function is None else f' ({function})'} on {device}: {reason}")


def call(op: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """The library operator `op`, or directly the function behind it where nothing but its values is asked for.

    A library operator costs some 100 microseconds a call; gradients, compilers and tensors that stand for others need it.
    """
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0
    watched = torch.compiler.is_compiling() or transformed or any(type(x) not in PLAIN or x.is_meta for x in tensors)
    return op(*args) if recorded or watched else function(*args)


def run(operator: str, function: str, impl: str, device: torch.device, *args: Any) -> Any:
    """`function` of that implementation, without autocast: an operator says itself what it computes in."""
    module = implementation(operator, impl, device, function, args)
    if device.type == "cuda" and module.__name__.endswith("reference") and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{operator}: its reference implementation looks at data on the host and can't be captured into a CUDA graph")
    # Triton launches on the current device.
    with torch.autocast(device.type, enabled=False), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return getattr(module, function)(*args)


def capability(device: torch.device) -> int:
    """Compute capability of an NVIDIA GPU as Triton counts it (sm_90: 90); of the card compiled for where `device` is none."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    from triton.runtime import driver

    return 90 if interpreted() else driver.active.get_current_target().arch


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    found = capability(device)
    return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(found, 99) << 10


def gluon(device: torch.device) -> bool:
    """Whether kernels written in Gluon run on this device."""
    return _without("hopper", device.type, device.index) is None


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU: how many programs keep it busy."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choice(operator: str, device: torch.device) -> str:
    """The name of the implementation that "auto" takes for `operator` on `device`."""
    return implementation(operator, "auto", device).__name__.rpartition(".")[2]
