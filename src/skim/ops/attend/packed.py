"""Latents of MLA in the 656 bytes a token of DeepSeek-V3.2's FP8 cache, as keys that attention reads without gradients.

A row is 512 e4m3 values, the latent; 4 float32 scales, one for 128 of them; 64 bfloat16 channels, rotated and not quantised.
"""

from typing import Optional

import torch
from torch import Tensor

from skim.ops import codec
from skim.ops.checks import expect_device, expect_float, expect_shape, expect_tensor

SCALES = codec.LATENT // codec.LATENT_BLOCK
BYTES = codec.LATENT + codec.SCALE_BYTES * SCALES + 2 * codec.ROPE
CHANNELS = codec.LATENT + codec.ROPE


def is_packed(k: object) -> bool:
    return isinstance(k, Tensor) and k.dtype == torch.uint8


def expect_packed_inputs(q: Tensor, k: Tensor, v: Optional[Tensor], v_channels: Optional[int], sink: Optional[Tensor]) -> int:
    """Checks q `[B, T, H, 576]` and k uint8 `[B, S, 1, 656]`; returns V = 512."""
    q, k = expect_tensor("q", q, "BTHD"), expect_tensor("k", k, "BSGC")
    expect_float("q", q)
    expect_shape("q", q, (*q.shape[:3], CHANNELS), "BTHD")
    expect_shape("k", k, (q.shape[0], k.shape[1], 1, BYTES), "BSGC")
    expect_device("k", k, q.device)
    if v is not None or v_channels != codec.LATENT:
        given = "None" if v is None else "a tensor"
        raise ValueError(f"v, v_channels: expected None and {codec.LATENT} with packed latents, got {given} and {v_channels}")
    if torch.is_grad_enabled() and (q.requires_grad or (sink is not None and sink.requires_grad)):
        raise ValueError("k: expected latents in the dtype of q where gradients flow, got packed ones (uint8), which have none")
    return v_channels


def parts(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of rows `[..., 656]`: codes uint8 `[..., 512]`, scales float32 `[..., 4]`, rotated channels bfloat16 `[..., 64]`."""
    values, scales, rope = packed.split((codec.LATENT, codec.SCALE_BYTES * SCALES, 2 * codec.ROPE), dim=-1)
    return values, scales.view(torch.float32), rope.view(torch.bfloat16)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents `[..., 576]` of rows `[..., 656]`."""
    values, scale, rope = codec.unpack_latent(packed)
    latent = codec.dequantise(values.unflatten(-1, (-1, codec.LATENT_BLOCK)), scale).flatten(-2)
    return torch.cat((latent.to(dtype), rope.to(dtype)), dim=-1)
