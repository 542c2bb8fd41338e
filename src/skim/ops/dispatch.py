"""Picks the implementation of an operator; the only place that knows the hardware."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch

OPERATORS = ("score", "select", "attend", "align", "codec")
IMPLEMENTATIONS = ("reference",)
# The reference looks at its data on the host, so torch.compile must not put it into a CUDA graph (tag since torch 2.9).
TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


def implementation(operator: str, impl: str, device: torch.device) -> ModuleType:
    """The module that runs `operator` on `device`.

    Args:
        operator: one of `OPERATORS`.
        impl: "auto" for the fastest that supports the call, or the name of an implementation.
        device: the device of the operands.

    Raises:
        ValueError: `impl` is no implementation of `operator`.
    """
    if impl == "auto":
        impl = choice(operator, device)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected 'auto' or one of {IMPLEMENTATIONS} for {operator!r}, got {impl!r}")
    return import_module(f"skim.ops.{operator}.{impl}")


def run(operator: str, function: str, impl: str, device: torch.device, *args: Any) -> Any:
    """`function` of that implementation, without autocast: an operator says itself what it computes in."""
    module = implementation(operator, impl, device)
    with torch.autocast(device.type, enabled=False):
        return getattr(module, function)(*args)


def choice(operator: str, device: torch.device) -> str:
    """The name of the implementation that "auto" takes for `operator` on `device`."""
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {OPERATORS}, got {operator!r}")
    return "reference"
