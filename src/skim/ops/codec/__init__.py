"""FP8 quantisation of index tensors, and the bytes that a cache of them holds."""

from typing import Any

import torch
from torch import Tensor

from skim.ops.dispatch import TAGS, run

SCALE_BYTES = 4


def quantise(x: Tensor, *, scale_format: str = "float32", impl: str = "auto") -> tuple[Tensor, Tensor]:
    """x `[..., E]` in FP8 e4m3 with one scale for the last axis: `scale = amax / 448`, the amax clamped at 1e-4.

    Source: DeepSeek-V3.2-Exp's inference code (spec section 1.5).

    Args:
        x: `[..., E]`, any floating dtype.
        scale_format: "float32", or "ue8m0" to round the scale up to a power of two (still stored as float32).
        impl: "auto" or the name of an implementation.

    Returns:
        float8_e4m3fn values `[..., E]` and float32 scales `[...]`.

    Raises:
        ValueError: an unknown `scale_format`.
    """
    if scale_format not in ("float32", "ue8m0"):
        raise ValueError(f"scale_format: expected 'float32' or 'ue8m0', got {scale_format!r}")
    return _quantise(x.contiguous(), scale_format, impl)


def dequantise(values: Tensor, scale: Tensor, *, impl: str = "auto") -> Tensor:
    """float32 `[..., E]` of `quantise`'s values `[..., E]` and scales `[...]`."""
    return _dequantise(values.contiguous(), scale, impl)


def hadamard(x: Tensor, *, impl: str = "auto") -> Tensor:
    """x `[..., E]` rotated by the orthonormal Sylvester-Hadamard matrix (natural order), in the dtype of x.

    Dot products stay as they are; outlying channels are spread before quantisation (spec section 1.4).

    Raises:
        ValueError: E is no power of two.
    """
    E = x.shape[-1]
    if E < 1 or E & (E - 1):
        raise ValueError(f"x: expected a last axis of a power of two, got {E}")
    return _hadamard(x.contiguous(), impl)


def pack(values: Tensor, scale: Tensor) -> Tensor:
    """One uint8 row `[..., E + 4]` a token: E bytes of e4m3 values, then the float32 scale (132 bytes at E = 128)."""
    return torch.cat((values.view(torch.uint8), scale.contiguous()[..., None].view(torch.uint8)), dim=-1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The values `[..., E]` and scales `[...]` of `pack`'s rows `[..., E + 4]`."""
    values, scale = packed[..., :-SCALE_BYTES].contiguous(), packed[..., -SCALE_BYTES:].contiguous()
    return values.view(torch.float8_e4m3fn), scale.view(torch.float32)[..., 0]


@torch.library.custom_op("skim::quantise", mutates_args=(), tags=TAGS)
def _quantise(x: Tensor, scale_format: str, impl: str) -> tuple[Tensor, Tensor]:
    return run("codec", "quantise", impl, x.device, x, scale_format)


@_quantise.register_fake
def _(x, scale_format, impl):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("skim::dequantise", mutates_args=(), tags=TAGS)
def _dequantise(values: Tensor, scale: Tensor, impl: str) -> Tensor:
    return run("codec", "dequantise", impl, values.device, values, scale)


@_dequantise.register_fake
def _(values, scale, impl):  # type: ignore[no-untyped-def]
    return values.new_empty(values.shape, dtype=torch.float32)


@torch.library.custom_op("skim::hadamard", mutates_args=(), tags=TAGS)
def _hadamard(x: Tensor, impl: str) -> Tensor:
    return run("codec", "hadamard", impl, x.device, x)


@_hadamard.register_fake
def _(x, impl):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.impl = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _hadamard(grad.contiguous(), ctx.impl), None  # the matrix is its own transpose


_hadamard.register_autograd(_backward, setup_context=_setup)
