"""Checks of arguments that several operators share. Every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
from torch import Tensor

from skim.selection import Selection

Quantised = tuple[Tensor, Tensor]
SCALE_BYTES = torch.float32.itemsize
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expect_tensor(name: str, value: object, dims: Sequence[str]) -> Tensor:
    """`value` as a tensor with as many axes as `dims` has letters or names."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor [{', '.join(dims)}], got {type(value).__name__}")
    if value.dim() != len(dims):
        raise ValueError(f"{name}: expected [{', '.join(dims)}], got shape {tuple(value.shape)}")
    return value


def expect_shape(name: str, value: Tensor, shape: tuple[int, ...], dims: Sequence[str]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected [{', '.join(dims)}] = {tuple(shape)}, got {tuple(value.shape)}")


def expect_float(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point dtype of 16 bits or more, got {value.dtype}")


def expect_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def expect_interval(start: Optional[Tensor], end: Optional[Tensor], B: int, T: int, S: int, device: torch.device) -> Quantised:
    """start and end as int32 `[B, T]`; both None is causal, with the queries at the end of the keys."""
    if (start is None) != (end is None):
        raise ValueError(f"start, end: expected both or none, got only {'end' if start is None else 'start'}")
    if start is None or end is None:
        start = torch.zeros(B, T, dtype=torch.int32, device=device)
        if T == 1:  # a decoding step: as few launches as may be
            return start, torch.full_like(start, S)
        end = torch.arange(S - T + 1, S + 1, dtype=torch.int32, device=device)
        return start, (end.clamp(min=0) if S < T else end).expand(B, T)
    for name, bound in (("start", start), ("end", end)):
        expect_tensor(name, bound, "BT")
        if bound.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {bound.dtype}")
        if bound.shape[1] != T or bound.shape[0] not in (1, B):
            raise ValueError(f"{name}: expected [B, T] = {(B, T)}, got {tuple(bound.shape)}")
        expect_device(name, bound, device)
    return start.expand(B, T), end.expand(B, T)


def _packed_keys(packed: Tensor, E: int, paged: bool) -> Quantised:
    """Values and scales in the bytes of `codec.pack` `[B, S, E + 4]` or, paged, of `codec.pack_pages` `[P, page * (E + 4)]`: views."""
    dims = ("P", "page * (E + 4)") if paged else ("B", "S", "E + 4")
    row, width = E + SCALE_BYTES, expect_tensor("k_index", packed, dims).shape[-1]
    page = max(1, width // row) if paged else 1
    expect_shape("k_index", packed, (*packed.shape[:-1], page * row), dims)
    values, scale = packed.split((page * E, page * SCALE_BYTES), dim=-1)
    # float32 lies at multiples of four bytes; a compiler doesn't say where.
    if torch.compiler.is_compiling() or any(x % SCALE_BYTES for x in (scale.storage_offset(), *scale.stride()[:-1])) or scale.stride(-1) != 1:
        scale = scale.contiguous()
    values, scale = values.view(torch.float8_e4m3fn), scale.view(torch.float32)
    return (values.unflatten(-1, (page, E)), scale) if paged else (values, scale[..., 0])


def _values_and_scale(name: str, value: Union[Tensor, Quantised]) -> tuple[Tensor, Optional[Tensor]]:
    """A tensor and no scale, or the pair that came."""
    if not isinstance(value, tuple):
        return value, None
    if len(value) != 2:
        raise TypeError(f"{name}: expected a tensor or a pair (values, scale), got a tuple of {len(value)}")
    return value


def expect_index_inputs(
    q_index: Union[Tensor, Quantised], k_index: Union[Tensor, Quantised], weights: Tensor, *, paged: bool = False
) -> tuple[Tensor, Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:
    """The index tensors, their shapes checked: q `[B, T, J, E]`, k `[B, S, E]` or pages `[P, page, E]`, weights `[B, T, J]`, and the FP8 scales."""
    keys = ("P", "page", "E") if paged else ("B", "S", "E")
    q, q_scale = _values_and_scale("q_index", q_index)
    B, T, J, E = expect_tensor("q_index", q, "BTJE").shape
    if isinstance(k_index, Tensor) and k_index.dtype == torch.uint8:
        k_index = _packed_keys(k_index, E, paged)
    k, k_scale = _values_and_scale("k_index", k_index)
    k, weights = expect_tensor("k_index", k, keys), expect_tensor("weights", weights, "BTJ")
    expect_shape("k_index", k, (k.shape[0] if paged else B, k.shape[1], E), keys)
    expect_shape("weights", weights, (B, T, J), "BTJ")
    expect_float("weights", weights)
    for name, value, scale in (("q_index", q, q_scale), ("k_index", k, k_scale)):
        expect_device(name, value, weights.device)
        if scale is None:
            expect_float(name, value)
        elif value.dtype != torch.float8_e4m3fn:
            raise TypeError(f"{name}: expected (float8_e4m3fn values, scale), got {value.dtype} values")
        else:
            dims = ("B", "T", "J") if name == "q_index" else keys[:2]
            expect_shape(f"{name} scale", expect_tensor(f"{name} scale", scale, dims), tuple(value.shape[:-1]), dims)
            expect_float(f"{name} scale", scale)
            expect_device(f"{name} scale", scale, value.device)
    return q, k, weights, q_scale, k_scale


def expect_attention_inputs(q: Tensor, k: Tensor, v: Optional[Tensor], v_channels: Optional[int]) -> int:
    """Checks q `[B, T, H, D]`, k `[B, S, G, D]`, v `[B, S, G, V]` or None; returns V."""
    q, k = expect_tensor("q", q, "BTHD"), expect_tensor("k", k, "BSGD")
    expect_float("q", q)
    B, _, H, D = q.shape
    _, S, G, _ = k.shape
    expect_shape("k", k, (B, S, G, D), "BSGD")
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected the dtype of q, {q.dtype}, got {k.dtype}")
    expect_device("k", k, q.device)
    if G == 0 or H % G:
        raise ValueError(f"q: expected a number of heads that the {G} key heads divide, got {H}")
    if v is None:
        if v_channels is None or not 0 < v_channels <= D:
            raise ValueError(f"v_channels: expected 1 to {D} where v is None (values are the first channels of k), got {v_channels}")
        return v_channels
    v = expect_tensor("v", v, "BSGV")
    if v_channels is not None:
        raise ValueError(f"v_channels: expected None where v is given, got {v_channels}")
    expect_shape("v", v, (B, S, G, v.shape[3]), "BSGV")
    if v.dtype != q.dtype:
        raise TypeError(f"v: expected the dtype of q, {q.dtype}, got {v.dtype}")
    expect_device("v", v, q.device)
    return v.shape[3]


def expect_selection(selection: object) -> None:
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a Selection (`Selection.from_indices` makes one of indices), got {type(selection).__name__}")


def expect_sink(sink: Optional[Tensor], H: int, device: torch.device) -> None:
    if sink is not None:
        expect_shape("sink", expect_tensor("sink", sink, "H"), (H,), "H")
        expect_device("sink", sink, device)
