"""Latents of MLA as a cache holds them (in the model's own dtype, or in the 656 bytes a token of DeepSeek-V3.2's FP8 cache), and what meets them."""

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


def absorb(nope: Tensor, rope: Tensor, into: Tensor) -> Tensor:
    """Queries `[B, T, H, r + p]` that meet latents: `nope` `[B, T, H, n]` by each head's `into` `[H, n, r]`, and behind it `rope` `[B, T, H, p]`."""
    if not _writes_in_place(nope, rope, into):
        return torch.cat((torch.einsum("bthn,hnr->bthr", nope, into), rope), dim=-1)
    B, T, H, _ = nope.shape
    r, p = into.shape[2], rope.shape[3]
    q = nope.new_empty(B, T, H, r + p)
    torch.bmm(_by_head(nope), into, out=_by_head(q)[..., :r])  # several times as wide as what it is made of, so written once
    q[..., r:] = rope
    return q


def emerge(read: Tensor, out_of: Tensor) -> Tensor:
    """Outputs `[B, T, H, v]` of what heads read of the latents, `[B, T, H, r]`, by each head's `out_of` `[H, v, r]`."""
    if not _writes_in_place(read, out_of):
        return torch.einsum("bthr,hvr->bthv", read, out_of)
    out = read.new_empty(*read.shape[:3], out_of.shape[1])
    torch.bmm(_by_head(read), out_of.mT, out=_by_head(out))
    return out


def _writes_in_place(*operands: Tensor) -> bool:
    """Whether a product of these may be written where it is wanted: neither gradients nor autocast nor a compiler follow that."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(operands[0].device.type):
        return False
    return len({x.dtype for x in operands}) == 1


def _by_head(x: Tensor) -> Tensor:
    """`[H, B * T, C]` of x `[B, T, H, C]`: a view, where the rows of the batch follow each other."""
    return x.flatten(0, 1).transpose(0, 1)
