"""FP8 quantisation of index tensors, and the bytes that a cache of them holds."""

from typing import Any, Optional

import torch
from torch import Tensor

from skim.ops.checks import SCALE_BYTES
from skim.ops.dispatch import call, run

LATENT, LATENT_BLOCK, ROPE = 512, 128, 64  # channels of DeepSeek's latent cache, those that share a scale, rotated ones


def quantise(x: Tensor, *, scale_format: str = "float32", spread: bool = False, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """x `[..., E]` in FP8 e4m3 with one scale for the last axis: `scale = amax / 448`, the amax clamped at 1e-4.

    Source: DeepSeek-V3.2-Exp's inference code (spec section 1.5).

    Args:
        x: `[..., E]`, any floating dtype.
        scale_format: "float32", or "ue8m0" to round the scale up to a power of two (still stored as float32).
        spread: quantise `hadamard(x)`, in one pass.
        impl: "auto" or the name of an implementation.

    Returns:
        float8_e4m3fn values `[..., E]` and float32 scales `[...]`.

    Raises:
        ValueError: an unknown `scale_format`, or `spread` where E is no power of two.
    """
    _expect_scale_format(scale_format)
    if spread:
        _expect_power_of_two(x)
    return call(_quantise, _run_quantise, x.contiguous(), scale_format, impl, spread)


def dequantise(values: Tensor, scale: Tensor, *, impl: str = "auto") -> Tensor:
    """float32 `[..., E]` of `quantise`'s values `[..., E]` and scales `[...]`."""
    return call(_dequantise, _run_dequantise, values.contiguous(), scale, impl)


def hadamard(x: Tensor, *, impl: str = "auto") -> Tensor:
    """x `[..., E]` rotated by the orthonormal Sylvester-Hadamard matrix (natural order), in the dtype of x.

    Dot products stay as they are; outlying channels are spread before quantisation (spec section 1.4).

    Raises:
        ValueError: E is no power of two.
    """
    _expect_power_of_two(x)
    return call(_hadamard, _run_hadamard, x.contiguous(), impl)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str, impl: str = "auto") -> Tensor:
    """Index queries x with their first channels rotated by their positions, in the dtype of x. It has no gradient.

    Args:
        x: `[B, T, J, E]`, strides free.
        cos, sin: `[B, T, n]` of the frequencies that 2n <= E channels are rotated by. Strides are free, also 0.
        layout: "half" pairs channel i with i + n (DeepSeek-V3.2's indexer), "interleaved" 2i with 2i + 1 (GLM-5's).
        impl: "auto" or the name of an implementation.

    Raises:
        ValueError: an argument of the wrong shape, or an unknown `layout`.
    """
    _expect_positions(x, cos, sin, layout, "BTJE", tuple(x.shape[:2]))
    return call(_rotate, _run_rotate, x, cos, sin, layout, impl)


def index_keys(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str,
    scale_format: Optional[str] = None,
    impl: str = "auto",
) -> Tensor:
    """Finished index keys of L layers, as a cache holds them: a layer norm, rotation by positions, and FP8 if asked for.

    The same as `pack(*quantise(hadamard(...)))` of normalised and rotated keys; the norm is in float32 at least and every
    step's result in the dtype of x. It has no gradient. Source: DeepSeek-V3.2-Exp's inference code (spec sections 1.2 to 1.5).

    Args:
        x: `[L, B, T, E]`, what the key projections of L layers give for the same B * T tokens.
        weight, bias: `[L, E]` of the layer norms.
        eps: of the layer norms.
        cos, sin, layout: as `rotate`'s.
        scale_format: None keeps the dtype of x; "float32" or "ue8m0" gives FP8 with such scales (E is a power of two).
        impl: "auto" or the name of an implementation.

    Returns:
        `[L, B, T, E]` in the dtype of x, or uint8 rows `[L, B, T, E + 4]` (`pack`).

    Raises:
        ValueError: an argument of the wrong shape, an unknown `layout` or `scale_format`, or FP8 where E is no
            power of two.
    """
    _expect_positions(x, cos, sin, layout, "LBTE", tuple(x.shape[1:3]))
    for name, norm in (("weight", weight), ("bias", bias)):
        if tuple(norm.shape) != (x.shape[0], x.shape[3]):
            raise ValueError(f"{name}: expected [L, E] = {(x.shape[0], x.shape[3])}, got {tuple(norm.shape)}")
    if scale_format is not None:
        _expect_scale_format(scale_format)
        _expect_power_of_two(x)
    return call(_index_keys, _run_index_keys, x.contiguous(), weight, bias, eps, cos, sin, layout, scale_format, impl)


def _expect_scale_format(scale_format: str) -> None:
    if scale_format not in ("float32", "ue8m0"):
        raise ValueError(f"scale_format: expected 'float32' or 'ue8m0', got {scale_format!r}")


def _expect_power_of_two(x: Tensor) -> None:
    E = x.shape[-1]
    if E < 1 or E & (E - 1):
        raise ValueError(f"x: expected a last axis of a power of two, got {E}")


def _expect_positions(x: Tensor, cos: Tensor, sin: Tensor, layout: str, dims: str, tokens: tuple[int, ...]) -> None:
    """Raise ValueError unless cos and sin `[B, T, n]` rotate 2n channels of the tokens `(B, T)` of x."""
    if layout not in ("half", "interleaved"):
        raise ValueError(f"layout: expected 'half' or 'interleaved', got {layout!r}")
    if x.dim() != 4:
        raise ValueError(f"x: expected [{', '.join(dims)}], got shape {tuple(x.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        n = cos.shape[-1]
        if tuple(table.shape) != (*tokens, n) or not 0 < 2 * n <= x.shape[3]:
            raise ValueError(f"{name}: expected [B, T, n] = {tokens} and 1 to {x.shape[3] // 2} frequencies, got {tuple(table.shape)}")


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


def _run_quantise(x: Tensor, scale_format: str, impl: str, spread: bool = False) -> tuple[Tensor, Tensor]:
    return run("codec", "quantise", impl, x.device, x, scale_format, spread)


_quantise = torch.library.custom_op("skim::quantise", mutates_args=())(_run_quantise)


@_quantise.register_fake
def _(x, scale_format, impl, spread=False):  # type: ignore[no-untyped-def]
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


def _run_rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str, impl: str) -> Tensor:
    return run("codec", "rotate", impl, x.device, x, cos, sin, layout)


_rotate = torch.library.custom_op("skim::rotate", mutates_args=())(_run_rotate)


@_rotate.register_fake
def _(x, cos, sin, layout, impl):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _run_index_keys(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor, layout: str, scale_format: Optional[str], impl: str
) -> Tensor:
    return run("codec", "index_keys", impl, x.device, x, weight, bias, eps, cos, sin, layout, scale_format)


_index_keys = torch.library.custom_op("skim::index_keys", mutates_args=())(_run_index_keys)


@_index_keys.register_fake
def _(x, weight, bias, eps, cos, sin, layout, scale_format, impl):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape) if scale_format is None else x.new_empty((*x.shape[:3], x.shape[3] + SCALE_BYTES), dtype=torch.uint8)
