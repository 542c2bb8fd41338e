"""Attention over selected keys compiled for the CPU, forward only: one query and one key head at a time.

Keys are gathered a block at a time into float32, so that what follows runs over memory that lies together. All sums are
made in an order that depends on nothing but the keys that the row reads.
"""

from typing import Any, Optional

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from skim.ops.attend.packed import is_packed
from skim.ops.jit import array, exp, in_threads, kernel

KEYS = 64  # gathered at a time
QUERIES = 64  # of a part that a thread takes
INFINITY = np.float32(np.inf)
# How a half becomes a float32: its exponent and fraction shifted into place, and the exponent's bias corrected by a factor.
SIGN, REST, TOP, BIAS, FLOAT_TOP = np.uint32(0x8000), np.uint32(0x7FFF), np.uint32(0x7C00), np.float32(2.0**112), np.uint32(0x7F800000)
UP_13, UP_16 = np.uint32(13), np.uint32(16)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.uint16}  # numpy has no bfloat16 and numba no float16: `_widen` tells them by these


def refusal(function: str, args: tuple[Any, ...]) -> Optional[str]:
    """Why `function` can't run on `args`, or None."""
    if function != "attend":
        return "numba has the forward of attend only"
    if is_packed(args[1]):
        return "numba reads no packed latents"
    return "numba computes in float32 only, the inputs are float64" if args[0].dtype == torch.float64 else None


def _widen(x: Any) -> Any:
    """x as float32: a float32, or the bits of a bfloat16 (int16) or of a half (uint16)."""


@overload(_widen, inline="always")
def _(x):  # type: ignore[no-untyped-def]
    if x == types.float32:
        return lambda x: x
    if x == types.int16:
        return lambda x: np.uint32(np.uint32(x) << UP_16).view(np.float32)

    def half(x):  # type: ignore[no-untyped-def]
        bits = np.uint32(x)
        rest = np.uint32(bits & REST)
        shifted = np.uint32(rest << UP_13)
        finite = np.float32(shifted.view(np.float32) * BIAS).view(np.uint32)
        size = finite if rest < TOP else np.uint32(FLOAT_TOP | shifted)
        return np.uint32(size | np.uint32(np.uint32(bits & SIGN) << UP_16)).view(np.float32)

    return half


@kernel()
def _gather(x, step, keys, rows):  # type: ignore[no-untyped-def]
    """rows `[n, C]` of the keys `[n]` of x, which lie `step` apart."""
    C = rows.shape[1]
    for i in range(keys.shape[0]):
        at = keys[i] * step
        source, row = x[at : at + C], rows[i]
        for c in range(C):
            row[c] = _widen(source[c])


@kernel(fastmath={"reassoc", "contract"})
def _dots(q, k, dots):  # type: ignore[no-untyped-def]
    """q `[D]` with each of k `[n, D]`: dots `[n]`."""
    n, D = k.shape
    paired = n // 4 * 4
    for i in range(0, paired, 4):
        k0, k1, k2, k3 = k[i], k[i + 1], k[i + 2], k[i + 3]
        d0 = d1 = d2 = d3 = np.float32(0)
        for c in range(D):
            d0 += q[c] * k0[c]
            d1 += q[c] * k1[c]
            d2 += q[c] * k2[c]
            d3 += q[c] * k3[c]
        dots[i], dots[i + 1], dots[i + 2], dots[i + 3] = d0, d1, d2, d3
    for i in range(paired, n):
        d0 = np.float32(0)
        for c in range(D):
            d0 += q[c] * k[i, c]
        dots[i] = d0


@kernel(fastmath={"contract"})
def _add_values(p, v, out):  # type: ignore[no-untyped-def]
    """Adds p `[n]` times v `[n, V]` to out `[V]`."""
    n, V = v.shape
    paired = n // 4 * 4
    for i in range(0, paired, 4):
        p0, p1, p2, p3 = p[i], p[i + 1], p[i + 2], p[i + 3]
        v0, v1, v2, v3 = v[i], v[i + 1], v[i + 2], v[i + 3]
        for c in range(V):
            out[c] = out[c] + p0 * v0[c] + p1 * v1[c] + p2 * v2[c] + p3 * v3[c]
    for i in range(paired, n):
        for c in range(V):
            out[c] += p[i] * v[i, c]


@kernel(fastmath={"reassoc"})
def _softmax(scores):  # type: ignore[no-untyped-def]
    """Makes scores `[n]` exp(scores - shift); returns shift and their sum: 0 where no score is above -inf, NaN where one is."""
    largest = -INFINITY
    for i in range(scores.shape[0]):
        largest = max(largest, scores[i])
    shift = largest if largest > -INFINITY else np.float32(0)
    total = np.float32(0)
    for i in range(scores.shape[0]):
        scores[i] = exp(scores[i] - shift)
        total += scores[i]
    return shift, total


@kernel()
def _attend(  # type: ignore[no-untyped-def]
    q, k, k_step, v, v_step, indices, first_head, sink, keys, scores, k_rows, v_rows, out, lse
):
    """The heads of one key head of queries q `[n, H, D]` with keys `[n, K]` of indices: into out `[n, H, V]` and lse `[n, H]`.

    keys `[K]`, scores `[h, K]`, k_rows `[., D]` and v_rows `[., V]` are scratch; h is how many heads there are.
    """
    h, heads = scores.shape[0], first_head
    for t in range(q.shape[0]):
        n = 0
        for slot in range(indices.shape[1]):
            if indices[t, slot] >= 0:
                keys[n] = indices[t, slot]
                n += 1
        for first in range(0, n, KEYS):
            last = min(first + KEYS, n)
            rows = k_rows[: last - first]
            _gather(k, k_step, keys[first:last], rows)
            for j in range(h):
                _dots(q[t, heads + j], rows, scores[j, first:last])
        for j in range(h):
            shift, total = _softmax(scores[j, :n])
            out[t, heads + j] = 0
            lse[t, heads + j] = -INFINITY
            if total == 0:
                scores[j, :n] = 0
            else:
                lse[t, heads + j] = shift + np.log(total)
                share = np.float32(1) / (np.float32(1) + np.exp(sink[heads + j] - lse[t, heads + j]))
                for i in range(n):
                    scores[j, i] *= share / total
        for first in range(0, n, KEYS):
            last = min(first + KEYS, n)
            rows = v_rows[: last - first]
            _gather(v, v_step, keys[first:last], rows)
            for j in range(h):
                if lse[t, heads + j] != -INFINITY:
                    _add_values(scores[j, first:last], rows, out[t, heads + j])


def _head(x: Tensor, b: int, g: int, pack: bool) -> tuple[np.ndarray, int]:
    """The numbers, or their bits, of head g of x `[B, S, G, C]` as they lie in memory, and how far apart its keys are."""
    head = x.detach()[b, :, g]
    head = head.to(torch.float32) if pack else head
    head = head.contiguous() if pack or head.stride(1) != 1 else head
    S, C = head.shape
    flat = head.as_strided(((S - 1) * head.stride(0) + C if S else 0,), (1,))
    return array(flat.view(BITS.get(flat.dtype, flat.dtype))), head.stride(0)


def attend(
    q: Tensor, k: Tensor, v: Optional[Tensor], indices: Tensor, v_channels: int, scale: float, sink: Optional[Tensor], workspace_mb: int
) -> tuple[Tensor, Tensor]:
    """As the reference: out `[B, T, H, V]` in the dtype of q, lse `[B, T, H]`."""
    B, T, H, D = q.shape
    S, G, (R, K) = k.shape[1], k.shape[2], indices.shape[2:]
    if indices.numel() and int(indices.max()) >= S:
        raise IndexError(f"indices: expected positions below {S}, the number of keys, got {int(indices.max())}")
    out, lse = (torch.empty(*shape, dtype=torch.float32, device=q.device) for shape in ((B, T, H, v_channels), (B, T, H)))
    queries, reads = array((q.to(torch.float32) * scale).contiguous()), array(indices.to(torch.int32).contiguous())
    sinks = np.full(H, -np.inf, np.float32) if sink is None else array(sink.to(torch.float32).contiguous())
    outs, lses = array(out), array(lse)

    h = H // G
    fitting = (workspace_mb << 20) // (4 * ((h + 2) * K + KEYS * (D + v_channels)))
    threads = max(1, min(torch.get_num_threads(), fitting, B * T * G // QUERIES))
    shapes = (h, K), (KEYS, D), (KEYS, v_channels)
    scratch = [(np.empty(K, np.int64), *(np.empty(shape, np.float32) for shape in shapes)) for _ in range(threads)]

    def part(thread: int, b: int, g: int, first: int, *keys_and_values: Any) -> None:
        some = slice(first, first + QUERIES)
        _attend(queries[b, some], *keys_and_values, reads[b, some, g * R // G], g * h, sinks, *scratch[thread], outs[b, some], lses[b, some])

    heads = [(b, g) for b in range(B) for g in range(G)]
    pack = T * K > 4 * S  # keys that are read often are worth a copy that lies together, one head at a time
    for some in [[head] for head in heads] if pack else [heads]:
        parts = []
        for b, g in some:
            keys = _head(k, b, g, pack)
            values = keys if v is None else _head(v, b, g, pack)
            parts += [(b, g, first, *keys, *values) for first in range(0, T, QUERIES)]
        in_threads(part, parts, threads)
    return out.to(q.dtype), lse
