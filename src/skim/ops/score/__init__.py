"""Lightning-indexer scores."""

from typing import Any, Optional, Union

import torch
from torch import Tensor

from skim.ops.checks import Quantised, expect_index_inputs, expect_interval
from skim.ops.dispatch import call, run
from skim.ops.score.pages import expect_block_table, length
from skim.ops.workspace import accumulator, workspace


def index_scores(
    q_index: Union[Tensor, Quantised],
    k_index: Union[Tensor, Quantised],
    weights: Tensor,
    *,
    start: Optional[Tensor] = None,
    end: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    workspace_mb: Optional[int] = None,
    impl: str = "auto",
) -> Tensor:
    """All index scores, `I[t, s] = sum_j w[t, j] * J^-1/2 * E^-1/2 * ReLU(q[t, j] . k[s])`: for small inputs and drawing.

    Holds T x S numbers; `select` does not. Differentiable in `q_index`, `k_index` and `weights` unless they are FP8 or paged.
    Source: DeepSeek-V3.2-Exp report, equation 1, with the scale factors of its code.

    Args:
        q_index: `[B, T, J, E]` index queries, or `(float8_e4m3fn values, float32 scale [B, T, J])`.
        k_index: `[B, S, E]` index keys, one head for all J, or `(float8_e4m3fn values, float32 scale [B, S])`, or both in uint8 `[B, S, E + 4]`
            (`codec.pack`). With `block_table` pages of a pool: `[P, page, E]`, `(values, scale [P, page])`, or uint8
            `[P, page * (E + 4)]` (`codec.pack_pages`). A GPU reads FP8 (from sm_89 on) and keys in the dtype of the queries where they
            lie, but for more than 16 queries only if E is a multiple of 16; elsewhere pages are copied together first.
        weights: `[B, T, J]` signed head weights; used in float32 at least.
        start, end: int32 `[B, T]`, see `visible`; both None is causal.
        block_table: int32 `[B, N]`, the pages of each sequence in order, so that S = N * page. Entries of pages that no query
            sees may be anything. `start` and `end` must be given.
        workspace_mb: scratch memory beside the result, MiB; None is 32 on a CPU, 512 elsewhere.
        impl: "auto" or the name of an implementation.

    Returns:
        float32 `[B, T, S]` (float64 for float64 inputs), -inf where the key is not visible.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
    """
    q, k, weights, q_scale, k_scale = expect_index_inputs(q_index, k_index, weights, paged=block_table is not None)
    block_table = expect_block_table(block_table, q.shape[0], k, end)
    start, end = expect_interval(start, end, q.shape[0], q.shape[1], length(k, block_table), q.device)
    mb = workspace(workspace_mb, q.device)
    return call(_index_scores, _run_index_scores, q, k, weights, q_scale, k_scale, start, end, mb, impl, block_table)


def _run_index_scores(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Optional[Tensor],
    k_scale: Optional[Tensor],
    start: Tensor,
    end: Tensor,
    workspace_mb: int,
    impl: str,
    block_table: Optional[Tensor] = None,
) -> Tensor:
    return run("score", "index_scores", impl, q.device, q, k, weights, q_scale, k_scale, start, end, workspace_mb, block_table)


_index_scores = torch.library.custom_op("skim::index_scores", mutates_args=())(_run_index_scores)


@_index_scores.register_fake
def _(q, k, weights, q_scale, k_scale, start, end, workspace_mb, impl, block_table=None):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[1], length(k, block_table), dtype=accumulator(q.dtype))


@torch.library.custom_op("skim::index_scores_backward", mutates_args=())
def _index_scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, weights: Tensor, start: Tensor, end: Tensor, workspace_mb: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return run("score", "index_scores_backward", impl, q.device, grad, q, k, weights, start, end, workspace_mb)


@_index_scores_backward.register_fake
def _(grad, q, k, weights, start, end, workspace_mb, impl):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), weights.new_empty(weights.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, weights, q_scale, k_scale, start, end, workspace_mb, impl, block_table = inputs
    ctx.cached = q_scale is not None or k_scale is not None or block_table is not None
    ctx.save_for_backward(q, k, weights, start, end)
    ctx.options = workspace_mb, impl


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if ctx.cached:
        raise NotImplementedError("index_scores: FP8 index tensors have no gradient, nor have pages; train on others")
    grads = _index_scores_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 7)


_index_scores.register_autograd(_backward, setup_context=_setup)
