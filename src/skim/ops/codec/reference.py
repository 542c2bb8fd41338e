"""FP8 quantisation, and what comes before it, in plain PyTorch."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from skim.ops.workspace import accumulator

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x `[..., E]` normalised in float32 at least, in the dtype of x. Differentiable."""
    wide = accumulator(x.dtype)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """x `[B, T, ..., E]` with its first `2 * cos.shape[-1]` channels rotated by cos, sin `[B, T, rope_dim / 2]`. Differentiable.

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


def index_keys(x: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor, layout: str, scale_format: Optional[str]) -> Tensor:
    rotated = torch.stack([rotate(layer_norm(keys, w, b, eps), cos, sin, layout) for keys, w, b in zip(x, weight, bias)])
    if scale_format is None:
        return rotated
    values, scale = quantise(rotated, scale_format, spread=True)
    return torch.cat((values.view(torch.uint8), scale[..., None].view(torch.uint8)), dim=-1)


def quantise(x: Tensor, scale_format: str, spread: bool = False) -> tuple[Tensor, Tensor]:
    wide = (hadamard(x) if spread else x).float()
    amax = wide.abs().amax(-1).clamp(min=SMALLEST_AMAX)
    scale = amax / torch.full_like(amax, E4M3_MAX)  # CUDA divides by a number as it multiplies by its reciprocal
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scale)
        # scale = mantissa * 2^exponent with mantissa in [0.5, 1): the next power of two, exact, where log2 may round
        power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
        scale = torch.where(scale.isfinite(), power, scale)
    values = (wide / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    return values.to(torch.float8_e4m3fn), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    return values.float() * scale[..., None]


def hadamard(x: Tensor) -> Tensor:
    E = x.shape[-1]
    wide = x.float()
    width = 1
    while width < E:
        pairs = wide.view(*x.shape[:-1], E // (2 * width), 2, width)
        wide = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), dim=-2).view(x.shape)
        width *= 2
    return (wide * E**-0.5).to(x.dtype)
