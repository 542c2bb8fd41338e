"""A function in place of a module's forward, where a hook would make each call three times as dear or couldn't take its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def bind(module: Any, function: Callable[..., Any]) -> None:
    """Let a module run `function(module, own, ...)`, with `own` what it ran before.

    The module holds itself from then on: behind `del model` its memory is free once Python has collected cycles (`gc.collect()`).
    """
    name = "_old_forward" if hasattr(module, "_old_forward") else "forward"  # accelerate's hooks put their own in front of it
    setattr(module, name, partial(function, module, getattr(module, name)))


def release(module: Any, function: Callable[..., Any]) -> None:
    """Undo `bind`, wherever accelerate has put it since."""
    for name in ("forward", "_old_forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, partial) and bound.func is function:
            own = bound.args[1]
            if name == "forward" and getattr(own, "__func__", None) is type(module).forward:
                del module.forward
            else:
                setattr(module, name, own)
