"""Gradients of attention over selected latents, 512 or 576 channels of which the first 512 are the values, on sm_90.

All that a query's heads do with its selection are matrix products, so three kernels make them, each as large as the matrix units like:

- `scores`: probabilities P and gradients of scores dS, `[heads, keys]`, of a query and a block of its keys;
- `of_queries`: dq = dS K, of a query, over all its keys;
- `of_keys`: P^T dout + dS^T q, of a query and a block of its keys, which is added to the keys' gradients. Its products sum over
  the heads, so each element is added once for 128 heads.

P and dS of a chunk of queries are written in between, in bounded memory. Nothing is computed twice. For 128 heads and multiples of
them the first and the last are there in Gluon too (hopper_backward.py), which goes first where it runs.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from skim.ops.attend.kernels import LOG2E, _dot
from skim.ops.attend.walks import ends_of
from skim.ops.dispatch import capability, gluon, processors
from skim.ops.workspace import chunks

VALUES, ROPE = 512, 64  # channels of the latent, which are the values too; those that may follow
HEADS = 64  # rows of a warp group's product


class _Plan(NamedTuple):
    """How each kernel cuts its work: keys of a block; channels of a step, or into how many parts; stages of a pipeline."""

    scores: dict[str, int]
    of_queries: dict[str, int]
    of_keys: dict[str, int]


PLANS = {  # of heads in a block
    64: _Plan(
        {"BLOCK_K": 128, "CHANNELS": 64, "STAGES": 2, "num_warps": 4},
        {"BLOCK_K": 64, "PARTS": 2, "STAGES": 3, "num_warps": 4},
        {"BLOCK_K": 128, "CHANNELS": 64, "num_warps": 8},
    ),
    128: _Plan(
        {"BLOCK_K": 128, "CHANNELS": 64, "STAGES": 3, "num_warps": 8},
        {"BLOCK_K": 64, "PARTS": 2, "STAGES": 5, "num_warps": 8},
        {"BLOCK_K": 128, "CHANNELS": 64, "num_warps": 8},
    ),
}


@triton.jit
def _block(READS, query, at, width, BLOCK_K: tl.constexpr):
    """Keys of a block of a query's selection, and which of them there are."""
    slot = at + tl.arange(0, BLOCK_K)
    key = tl.load(READS + query.to(tl.int64) * width + slot, mask=slot < width, other=-1)
    return tl.maximum(key, 0).to(tl.int64), key >= 0


@triton.jit
def _place(first, T, wide, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of a program of `scores` or `of_keys`: query within the chunk, query, where its block of keys begins, heads, row of the batch, position."""
    parts: tl.constexpr = H // BLOCK_H
    blocks = tl.cdiv(wide, BLOCK_K)
    row, at = tl.program_id(0) // (parts * blocks), tl.program_id(0) // parts % blocks * BLOCK_K
    query = first + row
    head = (tl.program_id(0) % parts * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    return row, query, at, head, (query // T).to(tl.int64), (query % T).to(tl.int64)


@triton.jit(do_not_specialize=["first"])
def scores(
    Q, K, GRAD, FULL, SHIFT, READS, ENDS, P, DS, first, scale, T, width, wide, q_b, q_t, q_h, k_b, k_s, g_b, g_t, g_h,
    H: tl.constexpr, D: tl.constexpr, V_: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """P and dS `[.., H, wide]` of query first + n and a block of its keys, dS with the factor of the scores: a program each block of heads."""
    row, query, at, head, b, t = _place(first, T, wide, H, BLOCK_H, BLOCK_K)
    key, real = _block(READS, query, at, width, BLOCK_K)
    if at >= tl.load(ENDS + query):
        return
    keys = K + b * k_b + (key * k_s)[:, None]
    queries = Q + b * q_b + t * q_t + (head * q_h)[:, None]
    grads = GRAD + b * g_b + t * g_t + (head * g_h)[:, None]
    full, shift = tl.load(FULL + query.to(tl.int64) * H + head), tl.load(SHIFT + query.to(tl.int64) * H + head)
    s = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    dp = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    for channel in tl.range(0, D, CHANNELS, num_stages=STAGES):
        c = channel + tl.arange(0, CHANNELS)[None, :]
        k = tl.load(keys + c, mask=real[:, None], other=0.0)
        q = tl.load(queries + c)
        grad = tl.load(grads + c, mask=channel < V_, other=0.0)  # rotated channels are no values
        s = _dot(q, tl.trans(k), s)
        dp = _dot(grad, tl.trans(k), dp)
    p = tl.where(real[None, :], tl.exp2(s * scale - full[:, None]), 0.0)
    ds = p * (dp + shift[:, None]) * (scale / LOG2E)
    into = (row * H + head)[:, None] * wide + at + tl.arange(0, BLOCK_K)[None, :]
    tl.store(P + into, p.to(P.dtype.element_ty))
    tl.store(DS + into, ds.to(DS.dtype.element_ty))


@triton.jit(do_not_specialize=["first"])
def of_queries(
    K, DS, READS, ENDS, DQ, first, T, width, wide, k_b, k_s,
    H: tl.constexpr, D: tl.constexpr, V_: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of query first + n: a program each block of heads and part of the channels."""
    C0: tl.constexpr = V_ // PARTS
    C1: tl.constexpr = (D - V_) // PARTS
    row, part = tl.program_id(0) // (H // BLOCK_H * PARTS), tl.program_id(0) % PARTS
    query = first + row
    end = tl.load(ENDS + query)
    head = (tl.program_id(0) // PARTS % (H // BLOCK_H) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    c0 = part * C0 + tl.arange(0, C0)[None, :]
    keys = K + (query // T).to(tl.int64) * k_b
    of_scores = DS + (row * H + head)[:, None] * wide + tl.arange(0, BLOCK_K)[None, :]
    dq0 = tl.zeros([BLOCK_H, C0], tl.float32)
    if C1 > 0:
        c1 = V_ + part * C1 + tl.arange(0, C1)[None, :]
        dq1 = tl.zeros([BLOCK_H, C1], tl.float32)
    for at in tl.range(0, end, BLOCK_K, num_stages=STAGES):
        key, real = _block(READS, query, at, width, BLOCK_K)
        ds = tl.load(of_scores + at)
        dq0 = _dot(ds, tl.load(keys + (key * k_s)[:, None] + c0, mask=real[:, None], other=0.0), dq0)
        if C1 > 0:
            dq1 = _dot(ds, tl.load(keys + (key * k_s)[:, None] + c1, mask=real[:, None], other=0.0), dq1)
    into = DQ + (query.to(tl.int64) * H + head)[:, None] * D
    tl.store(into + c0, dq0.to(DQ.dtype.element_ty))
    if C1 > 0:
        tl.store(into + c1, dq1.to(DQ.dtype.element_ty))


@triton.jit(do_not_specialize=["first"])
def of_keys(
    Q, GRAD, P, DS, READS, ENDS, DK, first, T, S, width, wide, q_b, q_t, q_h, g_b, g_t, g_h,
    H: tl.constexpr, D: tl.constexpr, V_: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Add what query first + n gives to the gradient of a block of its keys to DK, float32 `[B, S, D]`: a program each block of heads."""
    row, query, at, head, b, t = _place(first, T, wide, H, BLOCK_H, BLOCK_K)
    key, real = _block(READS, query, at, width, BLOCK_K)
    if at >= tl.load(ENDS + query):
        return
    queries = Q + b * q_b + t * q_t + (head * q_h)[:, None]
    grads = GRAD + b * g_b + t * g_t + (head * g_h)[:, None]
    into = DK + ((b * S + key) * D)[:, None]
    source = (row * H + head)[:, None] * wide + at + tl.arange(0, BLOCK_K)[None, :]
    p = tl.trans(tl.load(P + source))
    ds = tl.trans(tl.load(DS + source))
    c = tl.arange(0, CHANNELS)[None, :]
    for channel in tl.static_range(0, D, CHANNELS):  # two programs share a processor instead of a pipeline
        dk = tl.zeros([BLOCK_K, CHANNELS], tl.float32)
        if channel < V_:
            dk = _dot(p, tl.load(grads + channel + c), dk)
        dk = _dot(ds, tl.load(queries + channel + c), dk)
        tl.atomic_add(into + channel + c, dk, mask=real[:, None], sem="relaxed")


def serves(q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, v_channels: int) -> bool:
    """Whether these are latents and heads that fill the matrix units of a card with the shared memory, and sums may be made in any order."""
    if min(q.numel(), k.numel(), indices.numel()) == 0 or torch.are_deterministic_algorithms_enabled():
        return False
    latents = v is None and k.shape[2] == 1 and v_channels == VALUES and q.shape[3] in (VALUES, VALUES + ROPE)
    return latents and q.shape[2] % HEADS == 0 and q.element_size() == 2 and capability(q.device) == 90


def _hopper(q: Tensor, k: Tensor, grad: Tensor) -> ModuleType | None:
    """The module of the kernels in Gluon, where they run and take these inputs."""
    if not gluon(q.device):
        return None
    from skim.ops.attend import hopper_backward  # whose language other releases of Triton may lack

    return hopper_backward if hopper_backward.serves(q, k, grad) else None


def gradients(
    q: Tensor, k: Tensor, grad: Tensor, full: Tensor, shift: Tensor, indices: Tensor, scale: float, workspace_mb: int
) -> tuple[Tensor, Tensor]:
    """dq in the dtype of q, and dk with the values' part, float32.

    Args:
        q, k: `[B, T, H, D]`, `[B, S, 1, D]`, channels contiguous.
        grad: `[B, T, H, 512]`, gradient of the output.
        full, shift: as `kernels.prepare` makes them.
        indices: int32 `[B, T, 1, K]`, contiguous, any order, -1 anywhere.
        scale: factor of the scores.
        workspace_mb: how much P and dS may hold, MiB.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1], indices.shape[3]
    block_h = math.gcd(H, 128)
    parts, plan = H // block_h, PLANS[block_h]
    rows, blocks = B * T, triton.cdiv(K, plan.scores["BLOCK_K"])
    wide = blocks * plan.scores["BLOCK_K"]
    ends = ends_of(indices)
    slices = _chunks(rows, 2 * H * wide * q.element_size(), workspace_mb, processors(q.device))
    p, ds = q.new_empty(2, slices[0].stop, H, wide)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    faster = _hopper(q, k, grad)
    if faster is not None:
        q, grad = q.contiguous(), grad.contiguous()
        fetched = faster.descriptors(q, grad, p, ds)
    of_q, of_k, of_grad, shape = q.stride()[:3], k.stride()[:2], grad.stride()[:3], (H, D, VALUES, block_h)
    for part in slices:
        queries, first = part.stop - part.start, part.start
        n = queries * parts
        if faster is not None:
            faster.launch_scores(q, k, full, shift, indices, ends, p, ds, fetched, first, queries, scale)
        else:
            scores[(n * blocks,)](
                q, k, grad, full, shift, indices, ends, p, ds, first, scale * LOG2E.value, T, K, wide, *of_q, *of_k, *of_grad, *shape,
                **plan.scores, enable_fp_fusion=True,
            )  # fmt: skip
        of_queries[(n * plan.of_queries["PARTS"],)](
            k, ds, indices, ends, dq, first, T, K, wide, *of_k, *shape, **plan.of_queries, enable_fp_fusion=True
        )
        if faster is not None:
            faster.launch_of_keys(q, indices, ends, dk, fetched, first, queries)
        else:
            of_keys[(n * triton.cdiv(wide, plan.of_keys["BLOCK_K"]),)](
                q, grad, p, ds, indices, ends, dk, first, T, S, K, wide, *of_q, *of_grad, *shape, **plan.of_keys, enable_fp_fusion=True
            )
    return dq, dk


def _chunks(rows: int, bytes_per_row: int, workspace_mb: int, programs: int) -> list[slice]:
    """Chunks of queries, in whole rounds of the card's processors where the memory is enough for one."""
    fits = bytes_per_row * programs <= workspace_mb << 20
    return list(chunks(rows, bytes_per_row, workspace_mb, programs if fits else 1))
