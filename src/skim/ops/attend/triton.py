"""Attention over selected keys, and over all visible keys, on NVIDIA GPUs from sm_80 on: plans and launches of kernels.py, and of hopper_union.py."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from skim.ops import codec
from skim.ops.attend import latent_backward, packed
from skim.ops.attend.kernels import DENSE, LOG2E, ROWS, UNION, backward, backward_keys, forward, forward_dense, prepare
from skim.ops.attend.union import tiles_of, unions
from skim.ops.attend.walks import MOST, merge, parts_of
from skim.ops.dispatch import capability, gluon, processors, shared_memory

UNION_MB = 256  # more makes nothing faster: a chunk fills the card
LARGEST_UNION = 0.5  # of a tile's selections together; beyond, sharing costs more arithmetic than it saves gathers
E4M3 = 89  # the first with instructions that convert it

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def refusal(function: str, args: tuple[Any, ...]) -> str | None:
    q = args[2] if function.endswith("backward") else args[0]
    if q.dtype == torch.float64:
        return "it computes in float32 at most, and the inputs are float64"
    if function in ("attend", "attend_dense") and args[5 if function == "attend" else 6] <= 0:
        return "it takes the largest score before it scales, and the scale is not positive"
    return None


class _Plan(NamedTuple):
    """How a call is cut: constants of the kernels."""

    D0: int  # channels of queries and keys: a power of two, and what is left
    D1: int
    V0: int
    TILE: int
    BLOCK_H: int
    BLOCK_K: int
    STAGES: int
    warps: int
    registers: int | None  # a thread, where fewer than the compiler would take let two programs share a processor
    VALUES_IN_KEYS: bool
    SHARED_SCALE: int  # channels of a packed latent with one scale, 0 where keys aren't packed


def _plan(q: Tensor, k: Tensor, v: Tensor | None, v_channels: int, tile: int, gradients: bool) -> _Plan:
    """Blocks of a call whose programs serve `tile` queries."""
    block_h = min(triton.next_power_of_2(q.shape[2] // k.shape[2]), _most_rows(q, k, v_channels, gradients))
    return _blocks(q, k, v, v_channels, tile, max(block_h, 16 // tile), gradients)


def _dense_plan(q: Tensor, k: Tensor, v: Tensor | None, v_channels: int) -> _Plan:
    """Blocks of a forward call over intervals, whose tiles are pairs of query and head."""
    pairs = triton.next_power_of_2(q.shape[1] * (q.shape[2] // k.shape[2]))
    plan = _blocks(q, k, v, v_channels, min(max(16, pairs), _most_rows(q, k, v_channels)), 1, False)
    more = plan.TILE * (plan.D0 + plan.D1) + 3 * plan.BLOCK_K * (plan.D0 + plan.D1 + (0 if plan.VALUES_IN_KEYS else plan.V0))
    fits_twice = plan.STAGES == 2 and 2 * more * q.element_size() <= shared_memory(q.device) - 4096
    return plan._replace(STAGES=3) if fits_twice else plan


def _blocks(q: Tensor, k: Tensor, v: Tensor | None, v_channels: int, tile: int, block_h: int, gradients: bool) -> _Plan:
    """As many keys at a time as shared memory and registers hold beside `tile * block_h` rows."""
    D = q.shape[3]
    D0 = max(16, 1 << (D.bit_length() - 1))
    D1 = 0 if D <= D0 else max(16, triton.next_power_of_2(D - D0))
    V0 = max(16, triton.next_power_of_2(v_channels))
    inside = v is None and v_channels == D0
    rows = tile * block_h
    item, depth = q.element_size(), D0 + D1 + (0 if inside else V0)
    resident = rows * (D0 + D1) * item
    stages, block_k = (2, 64) if item == 2 else (1, 32)
    packs = packed.is_packed(k)
    hopper = capability(q.device) == 90  # its matrix units read shared memory, so registers hold more of everything else
    if gradients:
        # Beside the keys: queries and gradients of out, and probabilities on their way through shared memory.
        resident += rows * V0 * item
        block_k = 64 if hopper and rows == 128 else 32
    elif packs and rows < 64:  # without a pipeline, whose bytes would fill the registers
        stages, block_k = 1, 512 // rows
    elif rows == 16:
        block_k *= 2
    limit = shared_memory(q.device)
    copies = 2 if inside or gradients else 1  # keys as they are and transposed, where no pipeline holds them
    while block_k > 16 and resident + (max(stages, copies) * depth + (2 if gradients else 1) * rows) * block_k * item > limit - 2048:
        if stages > 1 and block_k <= 32:
            stages -= 1
        else:
            block_k //= 2
    warps = 8 if rows == 128 or rows * max(D0 + D1, V0) >= 128 * 128 or D0 > 256 else 4
    registers = 128 if hopper and rows == 128 and not gradients else None
    return _Plan(D0, D1, V0, tile, block_h, block_k, stages, warps, registers, inside, codec.LATENT_BLOCK if packs else 0)


def _most_rows(q: Tensor, k: Tensor, v_channels: int, gradients: bool = False) -> int:
    """Rows of a program's matrix products: more fill the matrix units better until registers run out."""
    wide = max(q.shape[3], v_channels)
    if packed.is_packed(k) and capability(q.device) != 90:
        return 32  # registers hold keys as they are unpacked
    if wide > 256:
        rows = 32 if gradients or q.element_size() == 4 else 64
        return rows if shared_memory(q.device) > 128 << 10 else rows // 2
    if q.element_size() == 4:
        return 32
    return 128 if wide <= 128 else 64


def neighbours(q: Tensor, k: Tensor, v_channels: int, gradients: bool = False) -> int:
    """How many neighbouring queries share a union: 1 where the heads of one query fill a program by themselves."""
    heads = triton.next_power_of_2(q.shape[2] // k.shape[2])
    return max(1, min(_most_rows(q, k, v_channels, gradients) // heads, 32))


def _splits(programs: int, walk: int, block_k: int, device: torch.device) -> int:
    """Over how many programs a long walk is split where there are too few of them to fill the card."""
    return max(1, min(-(-2 * processors(device) // max(programs, 1)), walk // (4 * block_k), MOST))


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor | None, sink: Tensor | None, out: Tensor, lse: Tensor, scale: float, plan: _Plan, mode: int, tiles: int,
    R: int, reads: tuple[Tensor, ...], first: int = 0, limit: int = 0, shared_tile: int = 0,
) -> None:  # fmt: skip
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    V = out.shape[3]
    values = k if v is None else v
    scales = rope = q
    if plan.SHARED_SCALE:
        k, scales, rope = packed.parts(k)
    width = reads[0].shape[-1]
    list_, bits, counts = (*reads, *(q,) * (3 - len(reads)))
    heads = G * -(-(H // G) // plan.BLOCK_H)
    splits = 1 if mode == UNION.value or shared_tile else _splits(tiles * heads, width, plan.BLOCK_K, q.device)
    into, into_lse = parts_of(splits, out, lse)
    grid = (tiles, heads, splits)
    forward[grid](
        q, k, values, scales, rope, into, into_lse, sink, list_, bits, counts,
        first, scale * LOG2E.value, T, S, tiles, width, limit, B * T * H, *_strides(q, k, values),
        H, G, R, D, plan.D0, plan.D1, V, plan.V0, plan.TILE, plan.BLOCK_H, plan.BLOCK_K, plan.STAGES, splits,
        mode, shared_tile, sink is not None and splits == 1, plan.VALUES_IN_KEYS, plan.SHARED_SCALE, capability(q.device) >= E4M3,
        num_warps=plan.warps, maxnreg=plan.registers, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        merge(into, into_lse, out, lse, sink)


def _contiguous_channels(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _whole_words(k: Tensor) -> Tensor:
    """k; packed latents copied where their rows don't begin at multiples of four bytes."""
    if packed.is_packed(k) and any(x % codec.SCALE_BYTES for x in (k.storage_offset(), *k.stride()[:2])):
        return k.clone(memory_format=torch.contiguous_format)
    return k


def attend(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, v_channels: int, scale: float, sink: Tensor | None, workspace_mb: int
) -> tuple[Tensor, Tensor]:
    q, k, v, sink = _contiguous_channels(q, k, v, sink)  # type: ignore[assignment]
    k = _whole_words(k)
    B, T, H, _ = q.shape
    R, K = indices.shape[2:]
    out, lse = q.new_empty(B, T, H, v_channels), q.new_empty(B, T, H, dtype=torch.float32)
    if k.shape[1] == 0 or K == 0 or out.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    indices = indices.to(torch.int32).contiguous()
    alone = _plan(q, k, v, v_channels, 1, False)
    tile = _shared_tile(q, k, v_channels, False)
    if tile == 1:
        _launch_forward(q, k, v, sink, out, lse, scale, alone, ROWS.value, B * T, R, (indices,))
        return out, lse
    plan = _plan(q, k, v, v_channels, tile, False)
    limit = int(LARGEST_UNION * tile * K)
    faster = _hopper_union(q, k, v, v_channels, tile)
    for part, keys, bits, counts in unions(indices, k.shape[1], tile, min(workspace_mb, UNION_MB), limit):
        n, first = part.stop - part.start, part.start
        if faster is not None:
            faster.launch(q, k, v, sink, out, lse, scale, tile, first, limit, keys, bits, counts)
        else:
            _launch_forward(q, k, v, sink, out, lse, scale, plan, UNION.value, n, R, (keys, bits, counts), first=first, limit=limit)
        rest = ROWS.value, n * tile, R, (indices, bits, counts)
        _launch_forward(q, k, v, sink, out, lse, scale, alone, *rest, first=first, limit=limit, shared_tile=tile)
    return out, lse


def _hopper_union(q: Tensor, k: Tensor, v: Tensor | None, v_channels: int, tile: int) -> ModuleType | None:
    """The module whose kernel serves unions on sm_90, where it runs and takes these inputs."""
    if not gluon(q.device):
        return None
    from skim.ops.attend import hopper_union  # whose language other releases of Triton may lack

    return hopper_union if hopper_union.serves(q, k, v, v_channels, tile) else None


def _shared_tile(q: Tensor, k: Tensor, v_channels: int, gradients: bool) -> int:
    """Queries a union, or 1 where there are too few of them to fill the card (decoding), or nothing to gain."""
    B, T = q.shape[:2]
    tile = neighbours(q, k, v_channels, gradients)
    return tile if tile <= T and B * T * k.shape[2] >= tile * processors(q.device) // 2 else 1


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor | None, start: Tensor, end: Tensor, v_channels: int, scale: float, sink: Tensor | None, workspace_mb: int
) -> tuple[Tensor, Tensor]:
    q, k, v, sink = _contiguous_channels(q, k, v, sink)  # type: ignore[assignment]
    k = _whole_words(k)
    B, T, H, D = q.shape
    out, lse = q.new_empty(B, T, H, v_channels), q.new_empty(B, T, H, dtype=torch.float32)
    if k.shape[1] == 0 or out.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    S, G = k.shape[1:3]
    values = k if v is None else v
    plan = _dense_plan(q, k, v, v_channels)
    scales = rope = q
    if plan.SHARED_SCALE:
        k, scales, rope = packed.parts(k)
    tiles = B * tiles_of(T * (H // G), plan.TILE)
    splits = _splits(tiles * G, S, plan.BLOCK_K, q.device)
    into, into_lse = parts_of(splits, out, lse)
    forward_dense[(tiles * G, splits)](
        q, k, values, scales, rope, into, into_lse, sink, start.contiguous(), end.contiguous(), scale * LOG2E.value, T, S, tiles, B * T * H,
        *_strides(q, k, values), H, G, D, plan.D0, plan.D1, v_channels, plan.V0, plan.TILE, plan.BLOCK_K, plan.STAGES, splits,
        sink is not None and splits == 1, plan.VALUES_IN_KEYS, plan.SHARED_SCALE, capability(q.device) >= E4M3,
        num_warps=plan.warps, maxnreg=plan.registers, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        merge(into, into_lse, out, lse, sink)
    return out, lse


def _dense_tile(q: Tensor, k: Tensor, v_channels: int) -> int:
    heads = triton.next_power_of_2(q.shape[2] // k.shape[2])
    return min(max(1, _most_rows(q, k, v_channels, True) // heads), triton.next_power_of_2(q.shape[1]))


class _Prepared(NamedTuple):
    """What every backward kernel reads."""

    grad: Tensor
    full: Tensor
    shift: Tensor
    dsink: Tensor


def _prepare(grad: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None) -> _Prepared:
    B, T, H, V = out.shape
    grad, sink = _contiguous_channels(grad, sink)  # type: ignore[assignment]
    full, shift = torch.empty(2, B, T, H, dtype=torch.float32, device=out.device)
    dsink = torch.empty(B, T, H if sink is not None else 0, dtype=torch.float32, device=out.device)
    V0 = max(16, triton.next_power_of_2(V))
    block = max(1, 4096 // V0)
    prepare[(triton.cdiv(B * T * H, block),)](
        out.contiguous(), grad, dlse.contiguous(), lse.contiguous(), sink, full, shift, dsink, *_strides(grad),
        T, B * T * H, H, V, V0, block, sink is not None, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    total = dsink.sum((0, 1)) if sink is None else dsink.sum((0, 1)).to(sink.dtype)
    return _Prepared(grad, full, shift, total)


def _factors(q: Tensor, v: Tensor, prepared: _Prepared, scale: float, shared: bool) -> Tensor:
    """Powers of two that turn the gradients of a key and of a value into integers: their largest possible sums become 2^62.

    shared: the keys' gradient holds the values' too.
    """

    def largest(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)

    rows = q.shape[1] * q.shape[2]
    grad = largest(prepared.grad)
    ds = grad * largest(v) * v.shape[3] + largest(prepared.shift)
    of_key, of_value = ds * largest(q) * abs(scale) * rows, grad * rows
    bounds = torch.stack((of_key + of_value if shared else of_key, of_value))
    exponent = (62 - bounds.log2()).floor().clamp(max=120)
    return torch.where(exponent.isfinite(), exponent, 24.0).exp2()


def _launch_backward(
    q: Tensor, k: Tensor, v: Tensor | None, p: _Prepared, dq: Tensor, dk: Tensor, dv: Tensor, factors: Tensor | None, scale: float, plan: _Plan,
    mode: int, tiles: int, R: int = 1, reads: tuple[Tensor, ...] = (), interval: tuple[Tensor, ...] = (), first: int = 0, limit: int = 0,
    shared_tile: int = 0,
) -> None:  # fmt: skip
    T, H, D = q.shape[1:]
    S, G = k.shape[1:3]
    values = k if v is None else v
    list_, bits, counts = (*reads, *(q,) * (3 - len(reads)))
    start, end = interval or (q, q)
    grid = (tiles, G * -(-(H // G) // plan.BLOCK_H))
    backward[grid](
        q, k, values, p.grad, p.full, p.shift, dq, dk, dv, factors, list_, bits, counts, start, end,
        first, scale * LOG2E.value, T, S, tiles, reads[0].shape[-1] if reads else 0, limit, *_strides(q, k, values, p.grad),
        H, G, R, D, plan.D0, plan.D1, p.grad.shape[3], plan.V0, plan.TILE, plan.BLOCK_H, plan.BLOCK_K, plan.STAGES,
        mode, shared_tile, plan.VALUES_IN_KEYS, factors is not None, num_warps=plan.warps, enable_fp_fusion=True,
    )  # fmt: skip


def attend_backward(
    grad: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    indices: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    v_channels: int,
    scale: float,
    workspace_mb: int,
) -> Gradients:
    """Gradients of q, k, v and sink (empty where there is none); k's holds the values' part where v is None."""
    q, k, v = _contiguous_channels(q, k, v)  # type: ignore[assignment]
    prepared = _prepare(grad, dlse, out, lse, sink)
    if latent_backward.serves(q, k, v, indices, v_channels):
        reads = indices.to(torch.int32).contiguous()
        dq, dk = latent_backward.gradients(q, k, prepared.grad, prepared.full, prepared.shift, reads, scale, workspace_mb)
        return _finish(dq, dk, dk, v, prepared)
    B, T = q.shape[:2]
    R, K = indices.shape[2:]
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    values = k[..., :v_channels] if v is None else v
    alone = _plan(q, k, v, v_channels, 1, True)
    exact = torch.are_deterministic_algorithms_enabled() and min(q.numel(), k.numel()) > 0
    factors = _factors(q, values, prepared, scale, alone.VALUES_IN_KEYS) if exact else None
    sums = torch.int64 if factors is not None else torch.float32
    dk = torch.zeros(k.shape, dtype=sums, device=k.device)
    dv = dk if alone.VALUES_IN_KEYS else torch.zeros(values.shape, dtype=sums, device=k.device)
    if k.shape[1] and K and q.numel():
        indices = indices.to(torch.int32).contiguous()
        tile = _shared_tile(q, k, v_channels, True)
        args = q, k, v, prepared, dq, dk, dv, factors, scale
        if tile == 1:
            _launch_backward(*args, alone, ROWS.value, B * T, R, (indices,))
        else:
            plan = _plan(q, k, v, v_channels, tile, True)
            limit = int(LARGEST_UNION * tile * K)
            for part, keys, bits, counts in unions(indices, k.shape[1], tile, min(workspace_mb, UNION_MB), limit):
                n, first = part.stop - part.start, part.start
                _launch_backward(*args, plan, UNION.value, n, R, (keys, bits, counts), first=first, limit=limit)
                _launch_backward(*args, alone, ROWS.value, n * tile, R, (indices, bits, counts), first=first, limit=limit, shared_tile=tile)
    if factors is not None:
        shared = dv is dk
        dk = dk / factors[0]
        dv = dk if shared else dv / factors[1]
    return _finish(dq, dk, dv, v, prepared)


def _finish(dq: Tensor, dk: Tensor, dv: Tensor, v: Tensor | None, prepared: _Prepared) -> Gradients:
    if v is not None:
        return dq, dk.to(dq.dtype), dv.to(dq.dtype), prepared.dsink
    if dv is not dk:
        dk[..., : dv.shape[3]] += dv
    return dq, dk.to(dq.dtype), dq.new_empty(0), prepared.dsink


def attend_dense_backward(
    grad: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    start: Tensor,
    end: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    v_channels: int,
    scale: float,
    workspace_mb: int,
) -> Gradients:
    """As `attend_backward`, over all visible keys."""
    q, k, v = _contiguous_channels(q, k, v)  # type: ignore[assignment]
    prepared = _prepare(grad, dlse, out, lse, sink)
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    start, end = start.contiguous(), end.contiguous()
    plan = _plan(q, k, v, v_channels, _dense_tile(q, k, v_channels), True)
    values = k[..., :v_channels] if v is None else v
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=torch.float32 if v is None else k.dtype, device=k.device)
    dv = dk if plan.VALUES_IN_KEYS else torch.zeros(values.shape, dtype=dk.dtype, device=k.device)
    if S and q.numel():
        tiles = B * tiles_of(T, plan.TILE)
        _launch_backward(q, k, v, prepared, dq, dk, dv, None, scale, plan, DENSE.value, tiles, interval=(start, end))
        rows = 32 if plan.D0 + plan.V0 <= 512 else 16
        block_k = 64 if q.element_size() == 2 and plan.D0 + plan.V0 <= 256 else rows
        keys_plan = plan._replace(TILE=max(1, rows // plan.BLOCK_H), BLOCK_H=min(plan.BLOCK_H, rows), BLOCK_K=block_k)
        values = k if v is None else v
        backward_keys[(triton.cdiv(S, keys_plan.BLOCK_K), G, B)](
            q, k, values, prepared.grad, prepared.full, prepared.shift, dk, dv, start, end, scale * LOG2E.value, T, S,
            *_strides(q, k, values, prepared.grad),
            H, G, D, plan.D0, plan.D1, v_channels, plan.V0, keys_plan.TILE, keys_plan.BLOCK_H, keys_plan.BLOCK_K, plan.VALUES_IN_KEYS,
            num_warps=plan.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return _finish(dq, dk, dv, v, prepared)
