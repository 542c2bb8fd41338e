"""Latents of MLA as a cache holds them: in the model's own dtype, or in the 656 bytes a token of DeepSeek-V3.2's FP8 cache."""

from __future__ import annotations

import torch
from torch import Tensor

from skim.ops import codec
from skim.selection import Selection

ROW = codec.LATENT + codec.SCALE_BYTES * codec.LATENT // codec.LATENT_BLOCK + 2 * codec.ROPE


def pack(latents: Tensor, scale_format: str) -> Tensor:
    """uint8 rows `[..., 656]` of latents `[..., 512 + 64]`: e4m3 with a scale for 128 channels, and the rotated channels in bfloat16."""
    latent, rope = latents.split((codec.LATENT, codec.ROPE), dim=-1)
    values, scale = codec.quantise(latent.unflatten(-1, (-1, codec.LATENT_BLOCK)), scale_format=scale_format)
    return codec.pack_latent(values.flatten(-2), scale, rope.to(torch.bfloat16))


def unpack(held: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents `[..., C]` of what a cache holds: themselves, or `pack`'s rows `[..., 656]`."""
    if held.dtype != torch.uint8:
        return held
    values, scale, rope = codec.unpack_latent(held)
    latent = codec.dequantise(values.unflatten(-1, (-1, codec.LATENT_BLOCK)), scale).flatten(-2)
    return torch.cat((latent.to(dtype), rope.to(dtype)), dim=-1)


def unpack_read(held: Tensor, selection: Selection, dtype: torch.dtype) -> tuple[Tensor, Selection]:
    """Latents `[B, S', C]` of what a cache holds, `[B, S, ...]`, and the selection over them.

    Of FP8 rows only those that are read are unpacked where they are fewer than all: decoding reads K of a long text.
    """
    B, T, R, K = selection.indices.shape
    if held.dtype != torch.uint8 or held.shape[1] <= R * T * K:
        return unpack(held, dtype), selection
    row = torch.arange(B, device=held.device)[:, None]
    read = held[row, selection.indices.clamp(min=0).flatten(1)]
    place = torch.arange(R * T * K, dtype=torch.int32, device=held.device).view(1, T, R, K)
    return unpack(read, dtype), Selection(torch.where(selection.indices < 0, -1, place), selection.counts)
