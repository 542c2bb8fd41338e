"""FP8 quantisation as Triton kernels: bit for bit what the reference gives.

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


def quantise(x: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, E, tile, grid = _tiling(x)
    if rows:
        _quantise[grid](
            x, values.view(torch.uint8), scale, rows, E, SMALLEST_AMAX, UE8M0=scale_format == "ue8m0", MAX=E4M3_MAX, ROWS=tile[0], COLUMNS=tile[1]
        )
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
        _hadamard[grid](x, rotated, rows, E**-0.5, LEVELS=E.bit_length() - 1, ROWS=tile[0], COLUMNS=E)
    return rotated


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
def _quantise(x_ptr, values_ptr, scale_ptr, rows, E, smallest, UE8M0: tl.constexpr, MAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, place, inside = _places(rows, E, ROWS, COLUMNS)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), 1), smallest)
    amax = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), amax)  # as the reference's amax
    scale = tl.div_rn(amax, tl.full((ROWS,), MAX, tl.float32))
    if UE8M0:  # the exponent, one more if any bit of the mantissa is set
        bits = scale.to(tl.int32, bitcast=True)
        power = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(tl.abs(scale) < float("inf"), power, scale)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    y = tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, COLUMNS)))
    bits = y.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(y), MAX)
    magnitude = size.to(tl.int32, bitcast=True)
    # Three of 23 mantissa bits are kept, halves rounded to even, and the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, which is the spacing of float32 at 2^14: the addition rounds.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(y != y, 0x7F, code) | ((bits >> 24) & 0x80)
    tl.store(values_ptr + place, code.to(tl.uint8), mask=inside)


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
    for level in tl.static_range(LEVELS):
        pairs = tl.reshape(x, (ROWS, COLUMNS >> (level + 1), 2, 1 << level))
        a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, COLUMNS))
    tl.store(rotated_ptr + place, (x * factor).to(rotated_ptr.dtype.element_ty), mask=inside)
