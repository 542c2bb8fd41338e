"""Visibility in Hugging Face models: start and end of each query's keys, made once per forward where masks are made.

The mask of a sparse forward is an int32 tensor `[B, 1, T, 2]`: start and end. It has four axes so that transformers
passes it through as a mask that is already prepared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

PREFIX = "skim_"


def is_visibility(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 2


def unpack_visibility(mask: Tensor) -> tuple[Tensor, Tensor]:
    """start, end `[B, T]`."""
    return mask[:, 0, :, 0], mask[:, 0, :, 1]


def is_decided_dense(mask: Any) -> bool:
    """Whether a mask came from the model's own mask function because every row keeps all its keys."""
    return mask is None or getattr(mask, "skim_dense", False)


def sees_no_more(mask: Any, limit: int) -> bool:
    """Whether no row of a mask without that mark (it is lost on the way to another device) sees more than `limit` keys."""
    if not isinstance(mask, Tensor) or is_tracing():
        return False
    visible = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    return int(visible.sum(-1).max()) <= limit


def register(original: str) -> str:
    """Register the mask function that stands before `original`'s; the name of the implementation."""
    name = PREFIX + original
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask_function(original))
    return name


def _mask_function(original: str) -> Callable[..., Any]:
    def mask(**arguments: Any) -> Any:
        config, limit = arguments["config"], arguments["config"].skim_limit
        dense = ALL_MASK_ATTENTION_FUNCTIONS[original]
        if limit is None:
            return _dense(dense, arguments)
        expands = _expands(config, arguments["q_length"])
        if expands and isinstance(arguments["kv_length"], int) and arguments["kv_length"] <= limit:
            return _dense(dense, arguments)
        visibility = _visibility(getattr(config, "model_type", "this model"), **arguments)
        if expands and limit > 0 and not is_tracing():
            start, end = unpack_visibility(visibility)
            if int((end - start).max()) <= limit:
                return _dense(dense, arguments)
        return visibility

    return mask


def _expands(config: Any, queries: int) -> bool:
    """Whether a model's own attention is no dearer for so many queries than Skim's over the same keys.

    MLA's own attention makes keys and values of every head from every latent, old ones too, and then reads fewer channels; Skim's
    reads the latents. Per key and head: 2 r (n + v) + 2 T (n + p + v) operations against 2 T (2 r + p).
    """
    rank = getattr(config, "kv_lora_rank", None)
    if rank is None:
        return True
    made = config.qk_nope_head_dim + config.v_head_dim
    return rank * made <= queries * (2 * rank - made)


def _dense(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    mask = function(**arguments)
    if isinstance(mask, Tensor):
        mask = mask.contiguous()  # generate() would copy it otherwise, and the mark would be lost
    if mask is not None:
        mask.skim_dense = True  # on flex attention's BlockMask too
    return mask


def _visibility(
    family: str,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None,
    use_vmap: bool,
    device: torch.device,
    **_: Any,
) -> Tensor:
    """The interval of keys that each query sees, `[B, 1, T, 2]`, from transformers' index-based mask function.

    Raises:
        ValueError: the mask is no interval that ends at the query: an extra mask of the family, keys behind the query,
            a 2-D mask with holes.
    """
    if use_vmap:
        raise ValueError(f"attention_mask: {family} adds a mask of its own to the causal one, which Skim can't read as an interval of keys")
    row = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros_like(row)
    query = (torch.arange(q_length, device=device) + q_offset).expand(batch_size, -1)
    first_key, last_key = kv_offset, kv_offset + kv_length - 1

    def sees(key: Tensor) -> Tensor:
        return mask_function(row, head, query, key.clamp(first_key, last_key)).expand_as(query)

    eager, whole, unpadded = not is_tracing(), False, False
    padding = None if attention_mask is None else attention_mask.bool()
    first = torch.full_like(query, first_key)
    if eager:  # in one wait for the device; what has no holes is seen whole by whoever sees the first key
        later, all_shown = sees(query + 1) & (query < last_key), () if padding is None else (padding.all(),)
        ahead, whole, unpadded = (*torch.stack((later.any(), sees(first).all(), *all_shown)).tolist(), False)[:3]
        if ahead:
            raise ValueError(f"attention_mask: {family} lets a token read later ones (a bidirectional prefix, say), which Skim can't express")
    # A compiled graph takes as many steps as any length needs, so that it serves them all.
    start = first if whole else _first_seen(sees, first, query, 31 if torch.compiler.is_compiling() else kv_length.bit_length())
    end = query + 1
    if padding is not None and unpadded:
        end = end.clamp(max=padding.shape[1])
    elif padding is not None:
        shown, hidden = _padding(padding, eager)
        start, end = torch.maximum(start, shown[:, None]), torch.minimum(end, hidden[:, None])
    start, end = (start - kv_offset).clamp(min=0), (end - kv_offset).clamp(min=0)
    # Laid out so that `unpack_visibility` gives contiguous tensors, as the kernels read them.
    return torch.stack((torch.minimum(start, end), end)).to(torch.int32).permute(1, 2, 0)[:, None]


def _first_seen(sees: Callable[[Tensor], Tensor], first: Tensor, query: Tensor, steps: int) -> Tensor:
    """The first key that each query sees, `[B, T]`, found by halving: what a query sees ends at itself, and has no holes."""
    low, high = first - 1, query
    for _step in range(steps):
        middle = (low + high) // 2
        visible = sees(middle) & (middle > low)
        low, high = torch.where(visible, low, middle), torch.where(visible, middle, high)
    return high


def _padding(mask: Tensor, eager: bool) -> tuple[Tensor, Tensor]:
    """First visible token and the one behind the last, `[B]` each, of a 2-D mask `[B, n]`."""
    length = mask.sum(-1)
    first = mask.to(torch.int8).argmax(-1)
    last = mask.shape[1] - mask.flip(1).to(torch.int8).argmax(-1)
    if eager and bool(((length > 0) & (last - first != length)).any()):
        raise ValueError("attention_mask: expected no hidden token between visible ones (padding on the left or right only), got holes")
    return first, torch.where(length > 0, last, first)
