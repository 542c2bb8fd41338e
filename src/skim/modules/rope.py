"""Rotary position embedding of the first channels of a head, in the two layouts that indexers use."""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(table: Tensor, rope_dim: int, repeated: bool = False) -> Tensor:
    """cos or sin for `rope_dim` channels out of a model's own table: `[B, T, rope_dim / 2]`.

    A model that rotates `n` channels has frequencies `base^(-2i / n)`; every (n / rope_dim)-th of them is the table that
    the same base gives for rope_dim channels. So base, scaling and positions stay the model's own.

    Args:
        table: `[B, T, n]` cos or sin as a Hugging Face decoder hands it to its layers.
        rope_dim: even number of channels to rotate, a divisor of n.
        repeated: the table repeats each frequency side by side (Cohere), where others repeat the whole table.

    Raises:
        ValueError: `rope_dim` doesn't divide the table's width.
    """
    n = table.shape[-1]
    if n % rope_dim:
        raise ValueError(f"rope_dim: expected a divisor of the {n} channels that the model rotates, got {rope_dim}")
    own = table[..., ::2] if repeated else table[..., : n // 2]
    return own[..., :: n // rope_dim]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """x `[B, T, ..., E]` with its first `2 * cos.shape[-1]` channels rotated by cos, sin `[B, T, rope_dim / 2]`.

    layout "half" pairs channel i with i + rope_dim / 2 (DeepSeek-V3.2's indexer), "interleaved" 2i with 2i + 1 (GLM-5's).
    """
    half = cos.shape[-1]
    shape = (*cos.shape[:2], *(1 for _ in range(x.dim() - 3)), half)
    cos, sin = cos.view(shape), sin.view(shape)
    # split and unbind: their gradients are one copy, those of slices one each and their sum
    turned, rest = x.split((2 * half, x.shape[-1] - 2 * half), dim=-1)
    if layout == "half":
        a, b = turned.split(half, dim=-1)
        parts = [a * cos - b * sin, b * cos + a * sin]
    else:
        a, b = turned.unflatten(-1, (half, 2)).unbind(-1)
        parts = [torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)]
    return torch.cat((*parts, rest), dim=-1).to(x.dtype)
