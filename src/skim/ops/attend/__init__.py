"""Attention over selected keys (`attend`) and over all visible keys (`attend_dense`)."""

from typing import Any, Optional

import torch
from torch import Tensor

from skim.ops.attend.packed import expect_packed_inputs, is_packed
from skim.ops.checks import expect_attention_inputs, expect_device, expect_interval, expect_selection, expect_shape, expect_sink, expect_tensor
from skim.ops.dispatch import call, run
from skim.ops.workspace import accumulator, workspace
from skim.selection import Selection


def attend(
    q: Tensor,
    k: Tensor,
    v: Optional[Tensor] = None,
    selection: Optional[Selection] = None,
    *,
    v_channels: Optional[int] = None,
    indices: Optional[Tensor] = None,
    counts: Optional[Tensor] = None,
    scale: Optional[float] = None,
    sink: Optional[Tensor] = None,
    workspace_mb: Optional[int] = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the selected keys only, O(T * K).

    Differentiable in q, k, v and sink, through `out` and through `lse`; sums are made in float32. Two attends over
    disjoint selections, merged by their lse, equal one over the union. Source: DeepSeek-V3.2-Exp report, equation 2.

    Args:
        q: `[B, T, H, D]` queries; query head h reads key head `h * G // H`.
        k: `[B, S, G, D]` keys; or latents of MLA in FP8, uint8 `[B, S, 1, 656]` in the layout of `codec.pack_latent`, each read
            as 576 channels in the dtype of q, where nothing takes gradients. A paged cache is its pool, `[1, P * page, ...]`
            expanded to B, with indices that are slots of it.
        v: `[B, S, G, V]` values; None means `k[..., :v_channels]`, one storage and one gradient (MLA: G = 1, D = 576).
        selection: which keys each query reads.
        v_channels: V where v is None.
        indices: int32 or int64 `[B, T, R, K]` instead of a selection: positions in any order, -1 anywhere; R divides G.
            A key twice in one row is a caller's error (found under `__debug__` by `Selection.check` only).
        counts: int32 or int64 `[B, T, R]` with `indices`: only the first `counts` slots of a row are read.
        scale: factor of the scores; None is `D ** -0.5`.
        sink: `[H]` logits of a key without a value, one a head: part of the denominator, not of `lse`.
        workspace_mb: scratch memory, MiB; None is 32 on a CPU, 512 elsewhere.
        impl: "auto" or the name of an implementation.

    Returns:
        out `[B, T, H, V]` in the dtype of q, and lse float32 `[B, T, H]`, natural log. A row that reads nothing gives
        out = 0, lse = -inf and zero gradients.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; both or neither of selection and
            indices; gradients over packed latents.
    """
    V = _expect_inputs(q, k, v, v_channels, sink)
    if (selection is None) == (indices is None):
        raise ValueError("selection, indices: expected exactly one of them")
    if selection is not None:
        expect_selection(selection)
        if counts is not None:
            raise ValueError("counts: expected None where a selection is given (it has its own)")
        indices = selection.indices
    B, T, H, D = q.shape
    G = k.shape[2]
    indices = expect_tensor("indices", indices, "BTRK")
    if indices.shape[:2] != (B, T) or indices.shape[2] == 0 or G % indices.shape[2]:
        raise ValueError(f"indices: expected [B, T, R, K] = [{B}, {T}, a divisor of {G}, K], got {tuple(indices.shape)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: expected int32 or int64, got {indices.dtype}")
    expect_device("indices", indices, q.device)
    if counts is not None:
        expect_shape("counts", expect_tensor("counts", counts, "BTR"), tuple(indices.shape[:-1]), "BTR")
        if counts.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"counts: expected int32 or int64, got {counts.dtype}")
        expect_device("counts", counts, q.device)
        slot = torch.arange(indices.shape[-1], device=indices.device)
        indices = indices.masked_fill(slot >= counts[..., None], -1)
    expect_sink(sink, H, q.device)
    scale, mb = D**-0.5 if scale is None else scale, workspace(workspace_mb, q.device)
    return call(_attend, _run_attend, q, k, v, indices, sink, V, scale, mb, impl)


def attend_dense(
    q: Tensor,
    k: Tensor,
    v: Optional[Tensor] = None,
    *,
    start: Optional[Tensor] = None,
    end: Optional[Tensor] = None,
    v_channels: Optional[int] = None,
    scale: Optional[float] = None,
    sink: Optional[Tensor] = None,
    workspace_mb: Optional[int] = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention over every visible key, with its lse: for dense layers, windows and teachers.

    Args:
        q, k, v, v_channels, scale, sink, workspace_mb, impl: as in `attend`.
        start, end: int32 `[B, T]`, see `visible`; both None is causal.

    Returns:
        out `[B, T, H, V]` in the dtype of q, and lse float32 `[B, T, H]`, as `attend` gives them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; gradients over packed latents.
    """
    V = _expect_inputs(q, k, v, v_channels, sink)
    B, T, H, D = q.shape
    start, end = expect_interval(start, end, B, T, k.shape[1], q.device)
    expect_sink(sink, H, q.device)
    scale, mb = D**-0.5 if scale is None else scale, workspace(workspace_mb, q.device)
    return call(_attend_dense, _run_attend_dense, q, k, v, start, end, sink, V, scale, mb, impl)


def _expect_inputs(q: Tensor, k: Tensor, v: Optional[Tensor], v_channels: Optional[int], sink: Optional[Tensor]) -> int:
    """V of an attention's arguments, which are checked."""
    return expect_packed_inputs(q, k, v, v_channels, sink) if is_packed(k) else expect_attention_inputs(q, k, v, v_channels)


def _fake_attend(q: Tensor, v_channels: int) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v_channels), q.new_empty(B, T, H, dtype=accumulator(q.dtype))


def _fake_backward(q: Tensor, k: Tensor, v: Optional[Tensor], sink: Optional[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dv = k.new_empty(0) if v is None else v.new_empty(v.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), dv, q.new_empty(0, dtype=accumulator(q.dtype)) if sink is None else torch.empty_like(sink)


def _run_attend(
    q: Tensor, k: Tensor, v: Optional[Tensor], indices: Tensor, sink: Optional[Tensor], v_channels: int, scale: float, workspace_mb: int, impl: str
) -> tuple[Tensor, Tensor]:
    return run("attend", "attend", impl, q.device, q, k, v, indices, v_channels, scale, sink, workspace_mb)


_attend = torch.library.custom_op("skim::attend", mutates_args=())(_run_attend)


@_attend.register_fake
def _(q, k, v, indices, sink, v_channels, scale, workspace_mb, impl):  # type: ignore[no-untyped-def]
    return _fake_attend(q, v_channels)


@torch.library.custom_op("skim::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Optional[Tensor],
    indices: Tensor,
    sink: Optional[Tensor],
    out: Tensor,
    lse: Tensor,
    v_channels: int,
    scale: float,
    workspace_mb: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run("attend", "attend_backward", impl, q.device, grad, dlse, q, k, v, indices, sink, out, lse, v_channels, scale, workspace_mb)


@_attend_backward.register_fake
def _(grad, dlse, q, k, v, indices, sink, out, lse, v_channels, scale, workspace_mb, impl):  # type: ignore[no-untyped-def]
    return _fake_backward(q, k, v, sink)


def _run_attend_dense(
    q: Tensor,
    k: Tensor,
    v: Optional[Tensor],
    start: Tensor,
    end: Tensor,
    sink: Optional[Tensor],
    v_channels: int,
    scale: float,
    workspace_mb: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return run("attend", "attend_dense", impl, q.device, q, k, v, start, end, v_channels, scale, sink, workspace_mb)


_attend_dense = torch.library.custom_op("skim::attend_dense", mutates_args=())(_run_attend_dense)


@_attend_dense.register_fake
def _(q, k, v, start, end, sink, v_channels, scale, workspace_mb, impl):  # type: ignore[no-untyped-def]
    return _fake_attend(q, v_channels)


@torch.library.custom_op("skim::attend_dense_backward", mutates_args=())
def _attend_dense_backward(
    grad: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Optional[Tensor],
    start: Tensor,
    end: Tensor,
    sink: Optional[Tensor],
    out: Tensor,
    lse: Tensor,
    v_channels: int,
    scale: float,
    workspace_mb: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = grad, dlse, q, k, v, start, end, sink, out, lse, v_channels, scale, workspace_mb
    return run("attend", "attend_dense_backward", impl, q.device, *args)


@_attend_dense_backward.register_fake
def _(grad, dlse, q, k, v, start, end, sink, out, lse, v_channels, scale, workspace_mb, impl):  # type: ignore[no-untyped-def]
    return _fake_backward(q, k, v, sink)


# The two operators differ in one thing: what says which keys are read (indices, or start and end).
def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *reads, sink, v_channels, scale, workspace_mb, impl = inputs
    ctx.save_for_backward(q, k, v, *reads, sink, *output)
    ctx.options = v_channels, scale, workspace_mb, impl


def _backward(ctx: Any, operator: Any, grad: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    q, k, v, *reads, sink, out, lse = ctx.saved_tensors
    dq, dk, dv, dsink = operator(grad, dlse, q, k, v, *reads, sink, out, lse, *ctx.options)
    return (dq, dk, None if v is None else dv, *(None for _ in reads), None if sink is None else dsink, None, None, None, None)


_attend.register_autograd(lambda ctx, grad, dlse: _backward(ctx, _attend_backward, grad, dlse), setup_context=_setup)
_attend_dense.register_autograd(lambda ctx, grad, dlse: _backward(ctx, _attend_dense_backward, grad, dlse), setup_context=_setup)
