"""FlashMLA's MLA calls: sparse prefill, and decoding from a paged cache, sparse (656-byte FP8 rows, or 16-bit) or dense.

Signatures, layouts and conventions are those of FlashMLA's interface of April 2026: indices in any order, -1 where there
is none, lse in natural log and +inf for a row that reads nothing, values the first channels of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skim.ops import attend, attend_dense
from skim.ops.attend.packed import BYTES
from skim.ops.codec import LATENT
from skim.ops.workspace import chunks, workspace


@dataclass
class FlashMLASchedMeta:
    """Stands where FlashMLA keeps its schedule. Skim makes none, so there is nothing in it."""


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """What `flash_mla_with_kvcache` takes as `tile_scheduler_metadata` and `num_splits`, whatever the arguments."""
    return FlashMLASchedMeta(), None


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = LATENT,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    with_max_logits: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Sparse prefill: each query attends to the tokens that its indices name.

    Args:
        q: `[s_q, h_q, d_qk]`.
        kv: `[s_kv, h_kv, d_qk]`, the dtype of q.
        indices: int32 `[s_q, h_kv, topk]`; -1 or a number from s_kv on is no token.
        sm_scale: factor of the scores.
        d_v: channels of the values.
        attn_sink: float32 `[h_q]`: the output is multiplied by `exp(lse) / (exp(lse) + exp(attn_sink))`.
        topk_length: int32 `[s_q]`: only so many of a query's indices are read.
        with_max_logits: not FlashMLA's: False gives None for `max_logits`, which otherwise costs a pass over the scores in PyTorch.
        impl: not FlashMLA's: "auto" or the name of an implementation.

    Returns:
        out `[s_q, h_q, d_v]`, max_logits float32 `[s_q, h_q]`, the largest scaled score (-inf if a query reads nothing),
        and lse float32 `[s_q, h_q]`, natural log, without the sink (+inf if it reads nothing).

    Raises:
        TypeError, ValueError: as `skim.attend`, whose q, k, v_channels, indices, counts and sink these are.
    """
    indices = indices.masked_fill(indices >= kv.shape[0], -1)
    if topk_length is not None:
        slot = torch.arange(indices.shape[-1], device=indices.device)
        indices = indices.masked_fill(slot >= topk_length[:, None, None], -1)
    out, lse = attend(q[None], kv[None], v_channels=d_v, indices=indices[None], scale=sm_scale, sink=attn_sink, impl=impl)
    return out[0], _max_logits(q, kv, indices, sm_scale) if with_max_logits else None, _infinite(lse[0])


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Decoding from a paged cache: over the tokens that `indices` name, or over all of a sequence.

    Args:
        q: `[batch_size, seq_len_q, num_heads_q, head_dim]`.
        k_cache: `[num_blocks, page_block_size, num_heads_k, head_dim]` in the dtype of q; with `is_fp8_kvcache`
            `[num_blocks, page_block_size, 1, 656]` in any type of one byte: 512 e4m3 values, 4 float32 scales of 128 of them
            each, 64 bfloat16 rotated channels. Read where it lies, unless pages lie apart by no whole number of rows.
        block_table, cache_seqlens: int32 `[batch_size, max_num_blocks_per_seq]` and `[batch_size]`, for dense attention.
        head_dim_v: channels of the values.
        tile_scheduler_metadata, num_splits: from `get_mla_metadata`; not looked at.
        softmax_scale: factor of the scores; None is `head_dim ** -0.5`, 576 channels for an FP8 cache.
        causal: dense only: the queries are the last tokens of the sequence, and each sees those before it.
        is_fp8_kvcache: sparse only.
        indices: int32 `[batch_size, seq_len_q, topk]`: block number * page_block_size + place in the block, -1 for none.
        attn_sink: float32 `[num_heads_q]`, as in `flash_mla_sparse_fwd`.
        extra_k_cache, extra_indices_in_kvcache: a second cache and its indices, attended to as well.
        topk_length, extra_topk_length: int32 `[batch_size]`: only so many indices are read.
        impl: not FlashMLA's: "auto" or the name of an implementation.

    Returns:
        out `[batch_size, seq_len_q, num_heads_q, head_dim_v]` in the dtype of q, and lse float32
        `[batch_size, num_heads_q, seq_len_q]`, natural log, +inf for a query that reads nothing.

    Raises:
        TypeError, ValueError: arguments that don't go together, or an argument of the wrong type, dtype, shape or device.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if indices is None:
        sparse = attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length
        if is_fp8_kvcache or any(x is not None for x in sparse):
            raise ValueError("indices: expected them with an FP8 cache, a sink, an extra cache or a top-k length, got None")
        if block_table is None or cache_seqlens is None:
            raise ValueError("block_table, cache_seqlens: expected both where indices is None")
        out, lse = _dense(q, k_cache, block_table, cache_seqlens, head_dim_v, scale, causal, impl)
    else:
        if causal:
            raise ValueError("causal: expected False with indices, which say what a query sees, got True")
        if (extra_k_cache is None) != (extra_indices_in_kvcache is None):
            raise ValueError("extra_k_cache, extra_indices_in_kvcache: expected both or none")
        options: dict[str, Any] = {"v_channels": head_dim_v, "scale": scale, "impl": impl}
        own = _selected(k_cache, indices, topk_length, q, is_fp8_kvcache)
        if extra_k_cache is None or extra_indices_in_kvcache is None:
            out, lse = attend(q, own[0], indices=own[1], sink=attn_sink, **options)
        else:
            extra = _selected(extra_k_cache, extra_indices_in_kvcache, extra_topk_length, q, is_fp8_kvcache)
            parts = [attend(q, keys, indices=slots, **options) for keys, slots in (own, extra)]
            out, lse = _merged(*parts[0], *parts[1], attn_sink)
    return out, _infinite(lse).transpose(1, 2)


def _selected(cache: Tensor, indices: Tensor, length: Tensor | None, q: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    """A cache as keys `[batch, rows, 1, ..]` that all queries share, and indices `[batch, queries, 1, topk]` of these, -1 for none."""
    blocks, page, heads, width = cache.shape
    if heads != 1 or (fp8 and width != BYTES):
        raise ValueError(f"k_cache: expected [num_blocks, page_block_size, 1, {BYTES if fp8 else q.shape[-1]}], got {tuple(cache.shape)}")
    real = (indices >= 0) & (indices < blocks * page)
    if length is not None:
        real &= torch.arange(indices.shape[-1], device=indices.device) < length[:, None, None]
    if fp8:
        cache = cache.view(torch.uint8)
    if cache.stride(0) % cache.stride(1):
        cache = cache.contiguous()
    apart = cache.stride(0) // cache.stride(1)  # rows from page to page, of which a page may fill less
    rows = cache.as_strided((q.shape[0], (blocks - 1) * apart + page, 1, width), (0, cache.stride(1), width, cache.stride(3)))
    slots = indices if apart == page else indices // page * apart + indices % page
    return rows, slots.masked_fill(~real, -1)[:, :, None]


def _merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """out and lse over the keys of two attentions together, and a sink."""
    both = torch.logaddexp(lse, more_lse)
    whole = both if sink is None else torch.logaddexp(both, sink)
    share, rest = ((x - whole).exp().masked_fill(x == -torch.inf, 0.0)[..., None] for x in (lse, more_lse))
    return (out * share + more * rest).to(out.dtype), both


def _dense(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, v_channels: int, scale: float, causal: bool, impl: str) -> tuple[Tensor, Tensor]:
    used = torch.arange(table.shape[1], device=table.device) * cache.shape[1] < lengths[:, None]
    keys = cache[table.long().where(used, 0)].flatten(1, 2)  # entries behind a sequence may be anything
    B, T = q.shape[:2]
    behind = torch.arange(T - 1, -1, -1, device=q.device) if causal else torch.zeros(T, dtype=torch.int64, device=q.device)
    end = (lengths[:, None] - behind).clamp(min=0).to(torch.int32)
    return attend_dense(q, keys, v_channels=v_channels, start=torch.zeros_like(end), end=end, scale=scale, impl=impl)


def _max_logits(q: Tensor, kv: Tensor, indices: Tensor, scale: float) -> Tensor:
    """The largest scaled score of each query and head, float32 `[s_q, h_q]`."""
    (T, H, D), (G, K) = q.shape, indices.shape[1:]
    largest = q.new_empty(T, H, dtype=torch.float32)
    heads = torch.arange(G, device=kv.device)[:, None]
    for rows in chunks(T, 4 * K * (2 * G * D + H), workspace(None, q.device)):
        index = indices[rows]
        keys = kv[index.long().clamp(min=0), heads].float()
        scores = q[rows].float().unflatten(1, (G, -1)) @ keys.transpose(2, 3) * scale
        largest[rows] = scores.masked_fill_((index < 0)[:, :, None], -torch.inf).amax(-1).flatten(1)
    return largest


def _infinite(lse: Tensor) -> Tensor:
    """lse with +inf where nothing is read."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
