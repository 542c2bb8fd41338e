"""Indexer alignment: the loss that distils the model's attention into the indexer."""

from typing import Any, Optional

import torch
from torch import Tensor

from skim.ops.checks import (
    expect_attention_inputs,
    expect_device,
    expect_index_inputs,
    expect_interval,
    expect_selection,
    expect_shape,
    expect_tensor,
)
from skim.ops.dispatch import call, run
from skim.ops.workspace import accumulator, unscaled, workspace
from skim.selection import Selection


def align(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    *,
    start: Optional[Tensor] = None,
    end: Optional[Tensor] = None,
    selection: Optional[Selection] = None,
    lse: Optional[Tensor] = None,
    scale: Optional[float] = None,
    group: Optional[Any] = None,
    workspace_mb: Optional[int] = None,
    impl: str = "auto",
) -> Tensor:
    """Mean over the rows of `KL(p || softmax(I))`, p the L1-normalised head sum of the attention's softmax, detached.

    Without a selection over all visible keys (warm-up, equation 3 of the DeepSeek-V3.2-Exp report); with one inside it:
    the attention's softmax inside it head by head, then the head sum (equation 4). Rows that see no key don't count.
    The gradient in a score is `(softmax(I) - p) / rows`; it reaches q_index, k_index and weights only.

    Args:
        q: `[B, T, H, D]` the attention's queries.
        k: `[B, S, G, D]` the attention's keys.
        q_index, k_index, weights: `[B, T, J, E]`, `[B, S, E]`, `[B, T, J]`, not FP8.
        start, end: int32 `[B, T]`, see `visible`; both None is causal.
        selection: `Selection` with R = 1 to align inside.
        lse: float32 `[B, T, H]` of that attention (`attend_dense`, or `attend` with this selection), without the sink;
            None costs one more pass.
        scale: factor of the attention's scores; None is `D ** -0.5`.
        group: `torch.distributed` process group over which the heads are sharded: the head sum is made over it.
        workspace_mb: scratch memory, MiB; None is 32 on a CPU, 512 elsewhere.
        impl: "auto" or the name of an implementation.

    Returns:
        The loss, a float32 scalar.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; FP8 index tensors; R > 1.
    """
    expect_attention_inputs(q, k, None, q.shape[-1] if isinstance(q, Tensor) else None)
    q_values, k_values, weights, q_scale, k_scale = expect_index_inputs(q_index, k_index, weights)
    if q_scale is not None or k_scale is not None:
        raise TypeError("q_index, k_index: expected unquantised tensors (FP8 has no gradient), got FP8")
    B, T, H, D = q.shape
    S = k.shape[1]
    expect_shape("q_index", q_values, (B, T, *q_values.shape[2:]), "BTJE")
    expect_shape("k_index", k_values, (B, S, k_values.shape[2]), "BSE")
    start, end = expect_interval(start, end, B, T, S, q.device)
    indices = None
    if selection is not None:
        expect_selection(selection)
        if selection.indices.shape[:3] != (B, T, 1):
            raise ValueError(f"selection: expected indices [B, T, 1, K] = [{B}, {T}, 1, K], got {tuple(selection.indices.shape)}")
        expect_device("selection", selection.indices, q.device)
        indices = selection.indices[:, :, 0]
    if lse is not None:
        expect_shape("lse", expect_tensor("lse", lse, "BTH"), (B, T, H), "BTH")
        expect_device("lse", lse, q.device)
    name = None if group is None else group.group_name
    factor = D**-0.5 if scale is None else scale
    teacher = q.detach(), k.detach()
    target_lse = None if lse is None else lse.detach()
    mb = workspace(workspace_mb, q.device)
    loss, *_ = call(_align, _run_align, *teacher, q_values, k_values, weights, start, end, indices, target_lse, factor, name, mb, impl)
    return loss


def _run_align(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    start: Tensor,
    end: Tensor,
    indices: Optional[Tensor],
    lse: Optional[Tensor],
    scale: float,
    group: Optional[str],
    workspace_mb: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run("align", "align", impl, q.device, q, k, q_index, k_index, weights, start, end, indices, lse, scale, group, workspace_mb)


_align = torch.library.custom_op("skim::align", mutates_args=())(_run_align)


@_align.register_fake
def _(q, k, q_index, k_index, weights, start, end, indices, lse, scale, group, workspace_mb, impl):  # type: ignore[no-untyped-def]
    grads = (x.new_empty(x.shape, dtype=unscaled(x.dtype)) for x in (q_index, k_index, weights))
    return q_index.new_empty((), dtype=accumulator(q_index.dtype)), *grads


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype for x in inputs[2:5]]


def _backward(ctx: Any, grad: Tensor, *unused: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
    # The gradients were made with the loss, so they only take its factor.
    dq, dk, dw = ((g * grad).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes))
    return (None, None, dq, dk, dw, *(None for _ in range(8)))


_align.register_autograd(_backward, setup_context=_setup)
