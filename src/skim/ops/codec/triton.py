"""FP8 quantisation, and what comes before it, as Triton kernels: bit for bit what the reference gives.

All but a layer norm, whose sums are made in another order: within a rounding of the reference's.
FP8 codes are made and read by integer arithmetic, so one kernel serves GPUs with and without FP8 conversions.
"""

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4
ELEMENTS = 4096  # of a program: short rows share one


def refusal(function: str, args: tuple[Any, ...]) -> Optional[str]:
    if args[0].dtype == torch.float64:
        return "its kernels compute in float32, got float64"
    return None


def quantise(x: Tensor, scale_format: str, spread: bool = False) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, E, tile, grid = _tiling(x)
    if rows:
        _quantise[grid](
            x, values.view(torch.uint8), scale, rows, E, SMALLEST_AMAX, E**-0.5,
            LEVELS=_levels(E) if spread else 0, UE8M0=scale_format == "ue8m0", MAX=E4M3_MAX, ROWS=tile[0], COLUMNS=tile[1],
        )  # fmt: skip
    return values, scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    x = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    rows, E, tile, grid = _tiling(values)
    if rows:
        _dequantise[grid](values.view(torch.uint8), scale.contiguous(), x, rows, E, ROWS=tile[0], COLUMNS=tile[1])
    return x


def hadamard(x: Tensor) -> Tensor:
    rotated = torch.empty_like(x)
    rows, E, tile, grid = _tiling(x)
    if rows:
        _hadamard[grid](x, rotated, rows, E**-0.5, LEVELS=_levels(E), ROWS=tile[0], COLUMNS=E)
    return rotated


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    rotated = x.new_empty(x.shape)
    rows, E, tile, grid = _tiling(x)
    if rows:
        cos, sin = _alike(cos, sin)
        x, apart = _spaced(x)
        _rotate[grid](
            x, rotated, cos, sin, *cos.stride(), rows, x.shape[1], x.shape[2], apart, E, cos.shape[2],
            INTERLEAVED=layout == "interleaved", ROUNDED=x.dtype == cos.dtype, ROWS=tile[0], COLUMNS=tile[1], enable_fp_fusion=False,
        )  # fmt: skip
    return rotated


def index_keys(x: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor, layout: str, scale_format: Optional[str]) -> Tensor:
    eight, (*lead, E) = scale_format is not None, x.shape
    keys = torch.empty(*lead, E + 4, dtype=torch.uint8, device=x.device) if eight else torch.empty_like(x)
    rows, columns = x.numel() // E, triton.next_power_of_2(E)
    # Half a tile, for there is another of partners; the same for any number of rows, for its layout decides in what order a norm is summed.
    height = max(1, ELEMENTS // 2 // columns)
    if rows:
        cos, sin = _alike(cos, sin)
        _index_keys[(triton.cdiv(rows, height),)](
            x, weight.contiguous(), bias.contiguous(), keys, cos, sin, *cos.stride(), rows, x.shape[1] * x.shape[2], x.shape[2], E, cos.shape[2],
            eps, SMALLEST_AMAX, E**-0.5, LEVELS=_levels(E) if eight else 0, UE8M0=scale_format == "ue8m0", MAX=E4M3_MAX, EIGHT=eight,
            INTERLEAVED=layout == "interleaved", ROUNDED=x.dtype == cos.dtype, ROWS=height, COLUMNS=columns, enable_fp_fusion=False,
        )  # fmt: skip
    return keys


def _levels(E: int) -> int:
    """Butterflies of a rotation of E channels."""
    return E.bit_length() - 1


def _alike(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of one dtype and the same strides."""
    if cos.stride() != sin.stride() or cos.dtype != sin.dtype:
        cos, sin = cos.contiguous(), sin.to(cos.dtype).contiguous()
    return cos, sin


def _spaced(x: Tensor) -> tuple[Tensor, int]:
    """x `[B, T, J, E]`, copied if its rows aren't as far apart everywhere as heads are, and how far that is."""
    _, T, J, E = x.shape
    apart = x.stride(2) if J > 1 else x.stride(1)
    even = x.stride(3) == 1 and (T == 1 or x.stride(1) == J * apart) and (x.shape[0] == 1 or x.stride(0) == T * J * apart)
    return (x, apart) if even else (x.contiguous(), E)


def _tiling(x: Tensor) -> tuple[int, int, tuple[int, int], tuple[int]]:
    """Rows and columns of x, those of a program's tile, and the grid."""
    E = x.shape[-1]
    rows = x.numel() // E
    columns = triton.next_power_of_2(E)
    height = max(1, min(ELEMENTS // columns, triton.next_power_of_2(rows)))
    return rows, E, (height, columns), (triton.cdiv(rows, height),)


@triton.jit
def _places(rows, E, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row numbers, and offsets and mask of this program's tile in a contiguous [rows, E]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    return row, row[:, None] * E + column[None, :], (row < rows)[:, None] & (column < E)[None, :]


@triton.jit
def _spread(x, factor, dtype: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x float32 times the Hadamard matrix, rounded to `dtype`; as it is where there are no levels."""
    for level in tl.static_range(LEVELS):
        pairs = tl.reshape(x, (ROWS, COLUMNS >> (level + 1), 2, 1 << level))
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, COLUMNS))
    return (x * factor).to(dtype) if LEVELS > 0 else x.to(dtype)


@triton.jit
def _scales(x, smallest, UE8M0: tl.constexpr, MAX: tl.constexpr, ROWS: tl.constexpr):
    """The scale of each row of x."""
    amax = tl.maximum(tl.max(tl.abs(x), 1), smallest)
    amax = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), amax)  # as the reference's amax
    scale = tl.div_rn(amax, tl.full((ROWS,), MAX, tl.float32))
    if UE8M0:  # the exponent, one more if any bit of the mantissa is set
        bits = scale.to(tl.int32, bitcast=True)
        power = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(tl.abs(scale) < float("inf"), power, scale)
    return scale


@triton.jit
def _codes(x, scale, MAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x over its rows' scales as e4m3 codes."""
    y = tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, COLUMNS)))
    bits = y.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(y), MAX)
    magnitude = size.to(tl.int32, bitcast=True)
    # Three of 23 mantissa bits are kept, halves rounded to even, and the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, which is the spacing of float32 at 2^14: the addition rounds.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    return (tl.where(y != y, 0x7F, code) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quantise(
    x_ptr, values_ptr, scale_ptr, rows, E, smallest, factor,
    LEVELS: tl.constexpr, UE8M0: tl.constexpr, MAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, place, inside = _places(rows, E, ROWS, COLUMNS)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x = _spread(x, factor, x_ptr.dtype.element_ty, LEVELS, ROWS, COLUMNS).to(tl.float32)
    scale = _scales(x, smallest, UE8M0, MAX, ROWS)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    tl.store(values_ptr + place, _codes(x, scale, MAX, ROWS, COLUMNS), mask=inside)


@triton.jit
def _dequantise(values_ptr, scale_ptr, x_ptr, rows, E, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, place, inside = _places(rows, E, ROWS, COLUMNS)
    code = tl.load(values_ptr + place, mask=inside, other=0).to(tl.int32)
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    size = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    size = tl.where(magnitude == 0x7F, float("nan"), size)
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    signed = (size.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
    tl.store(x_ptr + place, signed * scale[:, None], mask=inside)


@triton.jit
def _hadamard(x_ptr, rotated_ptr, rows, factor, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    _, place, inside = _places(rows, COLUMNS, ROWS, COLUMNS)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(rotated_ptr + place, _spread(x, factor, rotated_ptr.dtype.element_ty, LEVELS, ROWS, COLUMNS), mask=inside)


@triton.jit
def _pairs(half, INTERLEAVED: tl.constexpr, COLUMNS: tl.constexpr):
    """Of each channel: the one that it is rotated with, the number of their frequency, whether it is the first of the two, whether it is rotated."""
    column = tl.arange(0, COLUMNS)
    turned = column < 2 * half
    if INTERLEAVED:
        first, partner, frequency = column % 2 == 0, column ^ 1, column // 2
    else:
        first = column < half
        partner = tl.where(first, column + half, column - half)
        frequency = tl.where(first, column, column - half)
    return tl.where(turned, partner, column), frequency, first, turned


@triton.jit
def _turn(
    x, y, cos_ptr, sin_ptr, position, stride_b, stride_t, stride_n, T, half, dtype: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROUNDED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x `[rows, COLUMNS]` rotated by the angles of its rows' positions, which count the tokens of all batch rows; y holds its partners."""
    _, frequency, first, turned = _pairs(half, INTERLEAVED, COLUMNS)
    angle = (position // T * stride_b + position % T * stride_t)[:, None] + frequency[None, :] * stride_n
    cos = tl.load(cos_ptr + angle, mask=turned[None, :], other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=turned[None, :], other=0.0).to(tl.float32)
    own, other = x * cos, y * sin
    if ROUNDED:
        own, other = own.to(dtype).to(tl.float32), other.to(dtype).to(tl.float32)
    rotated = tl.where(first[None, :], own - other, own + other).to(dtype).to(tl.float32)
    return tl.where(turned[None, :], rotated, x)


@triton.jit
def _rotate(
    x_ptr, rotated_ptr, cos_ptr, sin_ptr, stride_b, stride_t, stride_n, rows, T, J, apart, E, half,
    INTERLEAVED: tl.constexpr, ROUNDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, place, inside = _places(rows, E, ROWS, COLUMNS)
    partner, _, _, _ = _pairs(half, INTERLEAVED, COLUMNS)
    start = row[:, None] * apart
    x = tl.load(x_ptr + start + tl.arange(0, COLUMNS)[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + start + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    position = tl.minimum(row, rows - 1) // J
    x = _turn(x, y, cos_ptr, sin_ptr, position, stride_b, stride_t, stride_n, T, half, dtype, INTERLEAVED, ROUNDED, COLUMNS)
    tl.store(rotated_ptr + place, x.to(dtype), mask=inside)


@triton.jit
def _normed(x, weight_ptr, bias_ptr, place, inside, dtype: tl.constexpr):
    """x with a norm's weight and bias, rounded to `dtype`."""
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + place, mask=inside, other=0.0).to(tl.float32)
    return (x * weight + bias).to(dtype).to(tl.float32)


@triton.jit
def _index_keys(
    x_ptr, weight_ptr, bias_ptr, keys_ptr, cos_ptr, sin_ptr, stride_b, stride_t, stride_n, rows, tokens, T, E, half, eps, smallest, factor,
    LEVELS: tl.constexpr, UE8M0: tl.constexpr, MAX: tl.constexpr, EIGHT: tl.constexpr, INTERLEAVED: tl.constexpr, ROUNDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows are tokens of one layer after those of another, each layer with a norm of its own."""
    row, place, inside = _places(rows, E, ROWS, COLUMNS)
    column = tl.arange(0, COLUMNS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    partner, _, _, _ = _pairs(half, INTERLEAVED, COLUMNS)
    partner_place, norm = row[:, None] * E + partner[None, :], (row // tokens * E)[:, None]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + partner_place, mask=inside, other=0.0).to(tl.float32)
    mean = (tl.sum(x, 1) / E)[:, None]
    centred = tl.where(inside, x - mean, 0.0)
    deviation = tl.sqrt_rn(tl.sum(centred * centred, 1) / E + eps)[:, None]
    x = _normed((x - mean) / deviation, weight_ptr, bias_ptr, norm + column[None, :], inside, dtype)
    y = _normed((y - mean) / deviation, weight_ptr, bias_ptr, norm + partner[None, :], inside, dtype)
    x = _turn(x, y, cos_ptr, sin_ptr, row % tokens, stride_b, stride_t, stride_n, T, half, dtype, INTERLEAVED, ROUNDED, COLUMNS)
    if EIGHT:
        x = _spread(x, factor, dtype, LEVELS, ROWS, COLUMNS).to(tl.float32)
        scale = _scales(x, smallest, UE8M0, MAX, ROWS)
        start = row[:, None] * (E + 4)
        tl.store(keys_ptr + start + column[None, :], _codes(x, scale, MAX, ROWS, COLUMNS), mask=inside)
        byte = tl.arange(0, 4)
        scale_bytes = scale.to(tl.int32, bitcast=True)[:, None] >> (8 * byte)[None, :]
        tl.store(keys_ptr + start + E + byte[None, :], (scale_bytes & 0xFF).to(tl.uint8), mask=(row < rows)[:, None])
    else:
        tl.store(keys_ptr + place, x.to(dtype), mask=inside)
