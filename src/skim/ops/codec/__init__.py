"""FP8 quantisation of index tensors, and the bytes that a cache of them holds."""

from typing import Any

import torch
from torch import Tensor

from skim.ops.dispatch import call, run

SCALE_BYTES = 4
LATENT, LATENT_BLOCK, ROPE = 512, 128, 64  # channels of DeepSeek's latent cache, those that share a scale, rotated ones


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
    return call(_quantise, _run_quantise, x.contiguous(), scale_format, impl)


def dequantise(values: Tensor, scale: Tensor, *, impl: str = "auto") -> Tensor:
    """float32 `[..., E]` of `quantise`'s values `[..., E]` and scales `[...]`."""
    return call(_dequantise, _run_dequantise, values.contiguous(), scale, impl)


def hadamard(x: Tensor, *, impl: str = "auto") -> Tensor:
    """x `[..., E]` rotated by the orthonormal Sylvester-Hadamard matrix (natural order), in the dtype of x.

    Dot products stay as they are; outlying channels are spread before quantisation (spec section 1.4).

    Raises:
        ValueError: E is no power of two.
    """
    E = x.shape[-1]
    if E < 1 or E & (E - 1):
        raise ValueError(f"x: expected a last axis of a power of two, got {E}")
    return call(_hadamard, _run_hadamard, x.contiguous(), impl)


def pack(values: Tensor, scale: Tensor) -> Tensor:
    """One uint8 row `[..., E + 4]` a token: E bytes of e4m3 values, then the float32 scale (132 bytes at E = 128)."""
    return torch.cat((values.view(torch.uint8), scale.contiguous()[..., None].view(torch.uint8)), dim=-1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The values `[..., E]` and scales `[...]` of `pack`'s rows `[..., E + 4]`."""
    values, scale = packed[..., :-SCALE_BYTES].contiguous(), packed[..., -SCALE_BYTES:].contiguous()
    return values.view(torch.float8_e4m3fn), scale.view(torch.float32)[..., 0]


def pack_pages(values: Tensor, scale: Tensor, page: int = 64) -> Tensor:
    """uint8 pages `[..., P, page * (E + 4)]` of S tokens, P = ceil(S / page): DeepSeek's paged cache of index keys.

    Within a page come the values of all its tokens and then their scales. The slots behind the last token are zero.
    Kernels that take `[P, page, 1, E + 4]` take a view of it. Source: DeepGEMM's paged index scores (spec section 1.5).

    Args:
        values: float8_e4m3fn `[..., S, E]`.
        scale: float32 `[..., S]`.
        page: tokens of a page.
    """
    S, E = values.shape[-2:]
    pages = -(-S // page)
    padding = pages * page - S
    bytes_of_values = torch.nn.functional.pad(values.view(torch.uint8), (0, 0, 0, padding))
    bytes_of_scales = torch.nn.functional.pad(scale, (0, padding)).contiguous().view(torch.uint8)
    lead = values.shape[:-2]
    parts = bytes_of_values.reshape(*lead, pages, page * E), bytes_of_scales.reshape(*lead, pages, page * SCALE_BYTES)
    return torch.cat(parts, dim=-1)


def unpack_pages(packed: Tensor, page: int = 64) -> tuple[Tensor, Tensor]:
    """The values `[..., P * page, E]` and scales `[..., P * page]` of `pack_pages`'s pages, empty slots included."""
    lead, pages = packed.shape[:-2], packed.shape[-2]
    E = packed.shape[-1] // page - SCALE_BYTES
    values, scale = packed[..., : page * E].contiguous(), packed[..., page * E :].contiguous()
    return values.view(torch.float8_e4m3fn).view(*lead, pages * page, E), scale.view(torch.float32).view(*lead, pages * page)


def pack_latent(values: Tensor, scale: Tensor, rope: Tensor) -> Tensor:
    """One uint8 row `[..., 656]` a token: DeepSeek-V3.2's FP8 cache of attention latents (FlashMLA's; spec section 2.5).

    Args:
        values: float8_e4m3fn `[..., 512]`, the latent.
        scale: float32 `[..., 4]`, one for 128 channels of it.
        rope: bfloat16 `[..., 64]`, the rotated channels, which are never quantised.

    Raises:
        ValueError: another number of channels or scales, or `rope` in another dtype.
    """
    for name, part, width, dtype in (
        ("values", values, LATENT, torch.float8_e4m3fn),
        ("scale", scale, LATENT // LATENT_BLOCK, torch.float32),
        ("rope", rope, ROPE, torch.bfloat16),
    ):
        if part.shape[-1] != width or part.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype} [..., {width}], got {part.dtype} {tuple(part.shape)}")
    return torch.cat([part.contiguous().view(torch.uint8) for part in (values, scale, rope)], dim=-1)


def unpack_latent(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values `[..., 512]`, scales `[..., 4]` and rotated channels `[..., 64]` of `pack_latent`'s rows `[..., 656]`."""
    values, scale, rope = packed.split((LATENT, SCALE_BYTES * LATENT // LATENT_BLOCK, 2 * ROPE), dim=-1)
    return values.contiguous().view(torch.float8_e4m3fn), scale.contiguous().view(torch.float32), rope.contiguous().view(torch.bfloat16)


def _run_quantise(x: Tensor, scale_format: str, impl: str) -> tuple[Tensor, Tensor]:
    return run("codec", "quantise", impl, x.device, x, scale_format)


_quantise = torch.library.custom_op("skim::quantise", mutates_args=())(_run_quantise)


@_quantise.register_fake
def _(x, scale_format, impl):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _run_dequantise(values: Tensor, scale: Tensor, impl: str) -> Tensor:
    return run("codec", "dequantise", impl, values.device, values, scale)


_dequantise = torch.library.custom_op("skim::dequantise", mutates_args=())(_run_dequantise)


@_dequantise.register_fake
def _(values, scale, impl):  # type: ignore[no-untyped-def]
    return values.new_empty(values.shape, dtype=torch.float32)


def _run_hadamard(x: Tensor, impl: str) -> Tensor:
    return run("codec", "hadamard", impl, x.device, x)


_hadamard = torch.library.custom_op("skim::hadamard", mutates_args=())(_run_hadamard)


@_hadamard.register_fake
def _(x, impl):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.impl = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _hadamard(grad.contiguous(), ctx.impl), None  # the matrix is its own transpose


_hadamard.register_autograd(_backward, setup_context=_setup)
