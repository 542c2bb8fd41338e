"""DeepGEMM's index scores in FP8 ("MQA logits"), of keys in one piece and of paged keys.

Signatures, layouts and conventions are those of DeepGEMM of June 2026: no factor but the weights (the scale of a query is
folded into them), float32 logits, -inf where a query sees no key. DeepGEMM leaves such places as they are unless it is told
`clean_logits`; here they are always clean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skim.ops import index_scores
from skim.ops.checks import Quantised
from skim.ops.codec import SCALE_BYTES
from skim.ops.dispatch import processors


def get_num_sms() -> int:
    """Streaming multiprocessors of the current GPU, 1 where there is none."""
    return processors(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else 1


def fp8_mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    *,
    impl: str = "auto",
) -> Tensor:
    """`sum_j weights[t, j] * ReLU(q[t, j] . k[s]) * scale[s]` for the keys that each query sees.

    Args:
        q: float8_e4m3fn `[seq_len, num_heads, head_dim]`.
        kv: float8_e4m3fn `[seq_len_kv, head_dim]` and float32 scales `[seq_len_kv]`.
        weights: float32 `[seq_len, num_heads]`.
        cu_seq_len_k_start, cu_seq_len_k_end: int32 `[seq_len]`: query t sees the keys from start[t] to end[t] - 1.
        clean_logits: False leaves open what stands outside; it is -inf.
        max_seqlen_k: if it is not 0, row t holds so many logits from key start[t] on; `clean_logits` must be False.
        impl: not DeepGEMM's: "auto" or the name of an implementation.

    Returns:
        float32 `[seq_len, seq_len_kv]`, or `[seq_len, max_seqlen_k]`.

    Raises:
        TypeError, ValueError: `clean_logits` with `max_seqlen_k`; otherwise as `skim.ops.index_scores`.
    """
    if max_seqlen_k and clean_logits:
        raise ValueError("clean_logits: expected False with max_seqlen_k, got True")
    start, end = cu_seq_len_k_start, cu_seq_len_k_end
    logits = _logits(q[None], (kv[0][None], kv[1][None]), weights[None], start[None], end[None], impl)[0]
    if not max_seqlen_k:
        return logits
    key = start[:, None].long() + torch.arange(max_seqlen_k, device=q.device)
    inside = key < end[:, None]
    return logits.gather(1, key.where(inside, 0)).masked_fill_(~inside, -torch.inf)


def get_paged_mqa_logits_metadata(context_lens: Tensor, block_kv: int, num_sms: int, indices: None = None) -> Tensor:
    """What `fp8_paged_mqa_logits` takes as `schedule_meta`: int32 `[num_sms + 1, 2]`. Skim makes no schedule, so it is zero."""
    return torch.zeros(num_sms + 1, 2, dtype=torch.int32, device=context_lens.device)


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    indices: None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The logits of `fp8_mqa_logits` for the next tokens of sequences whose keys lie in pages.

    Args:
        q: float8_e4m3fn `[batch_size, next_n, num_heads, head_dim]`.
        kv_cache: uint8 `[num_blocks, block_kv, 1, head_dim + 4]`; a block holds the e4m3 values of all its tokens and then
            their float32 scales (`codec.pack_pages`).
        weights: float32 `[batch_size * next_n, num_heads]`.
        context_lens: int32 `[batch_size]`, tokens of a sequence with the next ones, each of which sees those before it and
            itself; or `[batch_size, next_n]`, how many each of them sees.
        block_table: int32 `[batch_size, blocks]`: where a sequence's blocks are.
        schedule_meta: from `get_paged_mqa_logits_metadata`; not looked at.
        max_context_len: keys of a row of the result.
        clean_logits: False leaves open what stands outside; it is -inf.
        indices: sequences of several lengths in one batch, for other cards than sm_90; None.
        impl: not DeepGEMM's: "auto" or the name of an implementation.

    Returns:
        float32 `[batch_size * next_n, max_context_len]`.

    Raises:
        TypeError, ValueError: a cache of another shape, `indices`; otherwise as `skim.ops.index_scores`.
    """
    if indices is not None:
        raise ValueError(f"indices: expected None, got {type(indices).__name__}")
    B, T, J, E = q.shape
    blocks, page = kv_cache.shape[:2]
    if kv_cache.dtype != torch.uint8 or tuple(kv_cache.shape[2:]) != (1, E + SCALE_BYTES):
        raise ValueError(f"kv_cache: expected uint8 [num_blocks, block_kv, 1, {E + SCALE_BYTES}], got {kv_cache.dtype} {tuple(kv_cache.shape)}")
    lengths = context_lens
    if lengths.dim() == 1:
        lengths = (lengths[:, None] - torch.arange(T - 1, -1, -1, dtype=torch.int32, device=q.device)).clamp(min=0)
    table = block_table[:, : -(-max_context_len // page)]
    logits = _logits(q, kv_cache.flatten(1), weights.view(B, T, J), torch.zeros_like(lengths), lengths, impl, table)[..., :max_context_len]
    missing = max_context_len - logits.shape[-1]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf).flatten(0, 1)


def _logits(q: Tensor, k: Tensor | Quantised, weights: Tensor, start: Tensor, end: Tensor, impl: str, block_table: Tensor | None = None) -> Tensor:
    """Index scores `[B, T, S]` without the factors `J ** -0.5 * E ** -0.5` that Skim's have."""
    J, E = q.shape[2:]
    ones = torch.ones(q.shape[:-1], dtype=torch.float32, device=q.device)
    return index_scores((q, ones), k, weights * (J * E) ** 0.5, start=start, end=end, block_table=block_table, impl=impl)
