"""FP8 quantisation in plain PyTorch."""

import torch
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4


def quantise(x: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
    wide = x.float()
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
