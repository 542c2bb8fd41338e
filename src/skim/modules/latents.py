"""Latents of MLA as a cache holds them: in the model's own dtype, or in the 656 bytes a token of DeepSeek-V3.2's FP8 cache."""

from __future__ import annotations

import torch
from torch import Tensor

from skim.ops import codec
from skim.ops.attend import packed

ROW = packed.BYTES


def pack(latents: Tensor, scale_format: str) -> Tensor:
    """uint8 rows `[..., 656]` of latents `[..., 512 + 64]`: e4m3 with a scale for 128 channels, and the rotated channels in bfloat16."""
    latent, rope = latents.split((codec.LATENT, codec.ROPE), dim=-1)
    values, scale = codec.quantise(latent.unflatten(-1, (-1, codec.LATENT_BLOCK)), scale_format=scale_format)
    return codec.pack_latent(values.flatten(-2), scale, rope.to(torch.bfloat16))


def unpack(held: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents `[..., C]` of what a cache holds: themselves, or `pack`'s rows `[..., 656]`."""
    return packed.unpack(held, dtype) if packed.is_packed(held) else held
