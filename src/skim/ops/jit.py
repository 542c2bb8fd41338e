"""What the operators' numba kernels share: how they are compiled, how calls run in threads, an exp and a maximum that vectorise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440054690581e-4)
_LEAST = np.float32(-87.3)  # exp of anything below is no normal float32
_LARGEST = np.float32(88.0)
_SIZE = np.int32(2**31 - 1)  # all bits of a float but its sign
_MINUS_INFINITY = np.int32(np.float32(-np.inf).view(np.int32) ^ _SIZE)  # its place in the order of the integers
# Taylor's terms: on [-ln 2 / 2, ln 2 / 2] what follows them is below float32's rounding.
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / n) for n in (2, 6, 24, 120, 720, 5040))


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function for the types that it is first called with, or takes it from numba's cache; it holds no GIL.

    The cache notices a change of the kernel's own file only: who changes `exp` or `largest` clears the `__pycache__` of their users.
    Kernels run in threads of ours, never in numba's: its usual threading layer ends the process if two callers meet in it.
    """

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        jit = partial(numba.jit, nopython=True, nogil=True, error_model="numpy", **options)
        try:
            return jit(cache=True)(function)
        except RuntimeError:  # no folder to write to, neither beside this file nor in the user's cache
            return jit()(function)

    return compiled


@kernel(fastmath={"contract"})
def exp(x):  # type: ignore[no-untyped-def]
    """e to the x, float32, for x up to 88; 0 where that is no normal number; NaN stays NaN."""
    bounded = min(max(x, _LEAST), _LARGEST)
    n = np.floor(bounded * _LOG2E + np.float32(0.5))
    r = bounded - n * _LN2_HIGH - n * _LN2_LOW
    p = _C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * (_C6 + r * _C7))))
    power = np.int32((np.int32(n) + 127) << 23).view(np.float32)
    result = (np.float32(1) + (r + r * r * p)) * power
    if x < _LEAST:
        result = np.float32(0)
    return result if x == x else x


@kernel()
def largest(x):  # type: ignore[no-untyped-def]
    """The largest of x `[n]`, float32, or -inf; where there is a NaN, that or the largest of the others.

    It compares integers in the order of the floats: a maximum of floats isn't vectorised, for which one it is depends on where a NaN stands.
    """
    most = _MINUS_INFINITY
    for i in range(x.shape[0]):
        bits = np.float32(x[i]).view(np.int32)
        most = max(most, np.int32(bits ^ ((bits >> 31) & _SIZE)))
    return np.int32(most ^ ((most >> 31) & _SIZE)).view(np.float32)


def array(x: Tensor) -> np.ndarray:
    """x as a numpy array that shares its memory."""
    return x.detach().numpy()


def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Uninitialised memory that begins where a cache line does, as torch's does and numpy's doesn't: no vector lies in two lines."""
    return torch.empty(shape, dtype=dtype).numpy()


def in_threads(call: Callable[..., object], arguments: Sequence[tuple[Any, ...]], threads: int) -> None:
    """`call(thread, *a)` for each a of `arguments`, in the order given, by as many threads as say which scratch memory is theirs.

    The threads live as long as this call, so that neither a fork nor several callers at a time disturb them.
    """
    todo = iter(arguments)

    def work(thread: int) -> None:
        for a in todo:
            call(thread, *a)

    threads = min(threads, len(arguments))
    if threads <= 1:
        return work(0)
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, thread) for thread in range(1, threads)]
        work(0)
        for other in others:
            other.result()
