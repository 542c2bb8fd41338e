"""Attention over selected keys compiled for the CPU, forward only: one key head at a time.

Many queries read what they selected of a span of keys before any reads of the next, so that keys come from memory once for
all of them. All sums are made in an order that depends on nothing but the keys that the row reads.
"""

from typing import Any, Optional

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from skim.ops.attend.packed import is_packed
from skim.ops.jit import array, exp, in_threads, kernel, largest, scratch

KEYS = 64  # of a query that are read at a time
QUERIES = 512  # of a part that a thread takes, which share spans
FEWEST = 64  # queries that are worth a thread
SPAN = 1 << 17  # numbers of a span's keys, or of its values: half of what a second-level cache holds
LINE = 16  # floats of a cache line
GROUP = 8  # keys that are multiplied together
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


def _rows(x: Any, step: Any, keys: Any, at: Any, room: Any) -> Any:
    """An array with the rows of x, which lie `step` apart, of the keys `[n]` in float32; writes where in it they begin to at `[n]`.

    They are gathered into room `[., C]`; without a room x is float32 and they stay where they are.
    """


@overload(_rows)
def _(x, step, keys, at, room):  # type: ignore[no-untyped-def]
    def gathered(x, step, keys, at, room):  # type: ignore[no-untyped-def]
        C = room.shape[1]
        for i in range(keys.shape[0]):
            first = keys[i] * step
            source, row = x[first : first + C], room[i]
            for c in range(C):
                row[c] = _widen(source[c])
            at[i] = i * C
        return room.reshape(-1)

    def in_place(x, step, keys, at, room):  # type: ignore[no-untyped-def]
        for i in range(keys.shape[0]):
            at[i] = keys[i] * step
        return x

    return in_place if room == types.none else gathered


@kernel()
def _read_ahead(x, first, last):  # type: ignore[no-untyped-def]
    """Brings x from `first` to `last` into the cache: in order, memory is read several times as fast as in the order of selections."""
    seen = False
    for i in range(first, min(last, x.shape[0]), LINE):
        seen |= x[i] > 0
    return seen


# In what follows c and `at` are unsigned: a signed index may count from the end, and asking for that costs more than the sum.


@kernel(fastmath={"reassoc", "contract"})
def _dots(q, x, at, dots):  # type: ignore[no-untyped-def]
    """q `[h, D]` with each of the keys that begin in x at `[n]`: dots `[h, n]`."""
    n, channels = at.shape[0], range(np.uintp(q.shape[1]))
    paired = n // 4 * 4
    for i in range(0, paired, 4):
        k0, k1, k2, k3 = at[i], at[i + 1], at[i + 2], at[i + 3]
        for j in range(q.shape[0]):
            d0 = d1 = d2 = d3 = np.float32(0)
            for c in channels:
                d0 += q[j, c] * x[k0 + c]
                d1 += q[j, c] * x[k1 + c]
                d2 += q[j, c] * x[k2 + c]
                d3 += q[j, c] * x[k3 + c]
            dots[j, i], dots[j, i + 1], dots[j, i + 2], dots[j, i + 3] = d0, d1, d2, d3
    for i in range(paired, n):
        k0 = at[i]
        for j in range(q.shape[0]):
            d0 = np.float32(0)
            for c in channels:
                d0 += q[j, c] * x[k0 + c]
            dots[j, i] = d0


@kernel(fastmath={"contract"})
def _add_values(p, lse, x, at, out):  # type: ignore[no-untyped-def]
    """Adds p `[h, n]` times the values that begin in x at `[n]` to out `[h, V]`, but for heads that are empty by their lse `[h]`."""
    n, channels = at.shape[0], range(np.uintp(out.shape[1]))
    paired = n // GROUP * GROUP
    for i in range(0, paired, GROUP):
        v0, v1, v2, v3, v4, v5, v6, v7 = at[i], at[i + 1], at[i + 2], at[i + 3], at[i + 4], at[i + 5], at[i + 6], at[i + 7]
        for j in range(p.shape[0]):
            if lse[j] != -INFINITY:
                p0, p1, p2, p3 = p[j, i], p[j, i + 1], p[j, i + 2], p[j, i + 3]
                p4, p5, p6, p7 = p[j, i + 4], p[j, i + 5], p[j, i + 6], p[j, i + 7]
                for c in channels:
                    four = out[j, c] + p0 * x[v0 + c] + p1 * x[v1 + c] + p2 * x[v2 + c] + p3 * x[v3 + c]
                    out[j, c] = four + p4 * x[v4 + c] + p5 * x[v5 + c] + p6 * x[v6 + c] + p7 * x[v7 + c]
    for i in range(paired, n):
        v0 = at[i]
        for j in range(p.shape[0]):
            if lse[j] != -INFINITY:
                p0 = p[j, i]
                for c in channels:
                    out[j, c] += p0 * x[v0 + c]


@kernel(fastmath={"reassoc"})
def _softmax(scores):  # type: ignore[no-untyped-def]
    """Makes scores `[n]` exp(scores - shift); returns shift and their sum: 0 where no score is above -inf, NaN where one is."""
    most = largest(scores)
    shift = most if most > -INFINITY else np.float32(0)
    total = np.float32(0)
    for i in range(scores.shape[0]):
        scores[i] = exp(scores[i] - shift)
        total += scores[i]
    return shift, total


@kernel()
def _probabilities(scores, sink):  # type: ignore[no-untyped-def]
    """Makes scores `[n]` of a head with a sink probabilities; returns the lse."""
    shift, total = _softmax(scores)
    if total == 0:
        return -INFINITY
    lse = np.float32(shift + np.log(total))
    share = np.float32(1) / (np.float32(1) + np.exp(sink - lse))
    for i in range(scores.shape[0]):
        scores[i] *= share / total
    return lse


@kernel()
def _below(keys, first, end):  # type: ignore[no-untyped-def]
    """The slot up to which keys `[n]` from slot `first` on are below `end`, or up to 7 less: whole groups, but for the row's last."""
    slot = first
    while slot < keys.shape[0] and keys[slot] < end:
        slot += 1
    return slot if slot == keys.shape[0] else slot - (slot - first) % GROUP


@kernel()
def _attend(  # type: ignore[no-untyped-def]
    q, k, k_step, v, v_step, span, indices, first_head, sink, keys, scores, k_room, v_room, out, lse
):
    """The heads of one key head of queries q `[n, H, D]` with keys `[n, K]` of indices: into out `[n, H, V]` and lse `[n, H]`.

    keys `[., K]`, scores `[., h, K]`, and k_room `[KEYS, D]` and v_room `[KEYS, V]` or None are scratch; h is how many heads there are.
    """
    n, h, at = q.shape[0], scores.shape[1], np.empty(KEYS, np.uintp)
    heads, counts = slice(first_head, first_head + h), np.zeros(n, np.int64)
    low, high = np.int64(2**31), np.int64(0)  # what any of the queries reads lies between
    for t in range(n):
        count = 0
        for slot in range(indices.shape[1]):
            keys[t, count] = indices[t, slot]
            count += indices[t, slot] >= 0
        for key in keys[t, :count]:
            low, high = min(low, key), max(high, key + 1)
        counts[t] = count
    slots = np.zeros(n, np.int64)
    for end in range(low + span, high + span, span):
        if k_room is None:
            at[0] = _read_ahead(k, (end - span) * k_step, end * k_step)  # overwritten; but without a use it would be left out
        for t in range(n):
            first, slots[t] = slots[t], _below(keys[t, : counts[t]], slots[t], end)
            for i in range(first, slots[t], KEYS):
                some = slice(i, min(i + KEYS, slots[t]))
                rows = _rows(k, k_step, keys[t, some], at, k_room)
                _dots(q[t, heads], rows, at[: some.stop - i], scores[t, :, some])
    for t in range(n):
        for j in range(h):
            lse[t, first_head + j] = _probabilities(scores[t, j, : counts[t]], sink[first_head + j])
    slots = np.zeros(n, np.int64)
    out[:, heads] = 0
    for end in range(low + span, high + span, span):
        if v_room is None:
            at[0] = _read_ahead(v, (end - span) * v_step, end * v_step)
        for t in range(n):
            first, slots[t] = slots[t], _below(keys[t, : counts[t]], slots[t], end)
            for i in range(first, slots[t], KEYS):
                some = slice(i, min(i + KEYS, slots[t]))
                rows = _rows(v, v_step, keys[t, some], at, v_room)
                _add_values(scores[t, :, some], lse[t, heads], rows, at[: some.stop - i], out[t, heads])


def _head(x: Tensor, b: int, g: int, pack: bool) -> tuple[np.ndarray, int]:
    """The numbers, or their bits, of head g of x `[B, S, G, C]` as they lie in memory, and how far apart its keys are.

    With `pack` they are in float32 and lie together.
    """
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
    fitting = (workspace_mb << 20) // (4 * ((h + 1) * K + D + v_channels))  # queries
    threads = max(1, min(torch.get_num_threads(), fitting, B * T * G // FEWEST))
    step = max(1, min(QUERIES, fitting // threads, -(-T // threads)))
    pack = min(T, 4 * step) * K > 4 * S  # keys that are read often are worth a copy that lies together, and spans: one head at a time
    span = max(1, SPAN // max(D, v_channels) if pack else S)
    own = [
        (scratch(step, K, dtype=torch.int32), scratch(step, h, K), *(None if pack else scratch(KEYS, C) for C in (D, v_channels)))
        for _ in range(threads)
    ]

    def part(thread: int, b: int, g: int, first: int, *keys_and_values: Any) -> None:
        some, results = slice(first, first + step), (outs[b, first : first + step], lses[b, first : first + step])
        _attend(queries[b, some], *keys_and_values, span, reads[b, some, g * R // G], g * h, sinks, *own[thread], *results)

    heads = [(b, g) for b in range(B) for g in range(G)]
    for some in [[head] for head in heads] if pack else [heads]:
        parts = []
        for b, g in some:
            keys = _head(k, b, g, pack)
            values = keys if v is None else _head(v, b, g, pack)
            parts += [(b, g, first, *keys, *values) for first in range(0, T, step)]
        in_threads(part, parts, threads)
    return out.to(q.dtype), lse
