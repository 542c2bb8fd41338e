"""Indexer alignment in plain PyTorch, a chunk of queries at a time: the loss and, with it, its gradients.

The gradient of the loss in the scores is `softmax(I) - p` over the rows, so it is made beside the loss, while both are
at hand; nothing of size T x S or T x K outlives its chunk.
"""

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from skim.ops.attend.reference import by_key_head, dense_bytes, dense_keys
from skim.ops.score.reference import bounds, bytes_per_row, score_gradients, visible_mask
from skim.ops.score.weights import head_weights
from skim.ops.workspace import accumulator, chunks, unscaled

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _target(scores: Tensor, valid: Tensor, lse: Optional[Tensor], head_axes: tuple[int, ...], group: Optional[str]) -> Tensor:
    """L1-normalised sum over the heads of the attention's softmax: from scores with s last, `[n, s]`."""
    scores = scores.masked_fill_(~valid, -torch.inf)
    heads = scores.softmax(-1) if lse is None else scores.sub_(lse[..., None]).exp_()
    p = heads.sum(head_axes).masked_fill_(~valid.any(-1).view(-1, 1), 0.0)  # a row that sees nothing holds NaN
    if group is not None:
        dist.all_reduce(p, group=_resolve_process_group(group))  # type: ignore[arg-type, unused-ignore]
    return p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)


def _divergence(p: Tensor, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """sum of KL(p || softmax(scores)) over the rows `[n, s]`, and its gradient in the scores."""
    scores = scores.masked_fill_(~valid, -torch.inf)
    log_q = scores - scores.logsumexp(-1, keepdim=True)
    log_q = log_q.masked_fill_(~valid, 0.0)
    gradient = (log_q.exp() - p).masked_fill_(~valid, 0.0)
    return (torch.special.xlogy(p, p) - p * log_q).sum(), gradient


def align(
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
) -> Gradients:
    """loss (a scalar) and its gradients for q_index, k_index and weights."""
    dtype, (J, E) = accumulator(q_index.dtype), q_index.shape[2:]
    w, w_scale = head_weights(weights, None, E).to(dtype), J**-0.5 * E**-0.5
    loss = torch.zeros((), dtype=dtype, device=q.device)
    dq, dk, dw = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q_index, k_index, w))
    counted = (end.clamp(max=k.shape[1]) > start.clamp(min=0)) if indices is None else (indices >= 0).any(-1)
    for b in range(q.shape[0]):
        step = _dense_rows if indices is None else _sparse_rows
        width = k.shape[1] if indices is None else indices.shape[-1]
        inside = bytes_per_row(q_index, width) * 2 + dense_bytes(q, width)
        gathered = 0 if indices is None else dtype.itemsize * width * (2 * k.shape[2] * k.shape[3] + 2 * E + 4 * J)
        for rows in chunks(q.shape[1], inside + gathered, workspace_mb):
            row_lse = None if lse is None else lse[b, rows]
            reads = (start[b, rows], end[b, rows]) if indices is None else (indices[b, rows],)
            query = q_index[b, rows].to(dtype)
            loss += step(q[b, rows], k[b], query, k_index[b], w[b, rows], reads, row_lse, scale, group, dq[b, rows], dk[b], dw[b, rows])
    count = counted.sum().clamp(min=1).to(dtype)
    dq, dk, dw = dq / count, dk / count, dw * (w_scale / count)
    return loss / count, dq.to(unscaled(q_index.dtype)), dk.to(unscaled(k_index.dtype)), dw.to(unscaled(weights.dtype))


def _dense_rows(
    q: Tensor,
    k: Tensor,
    query: Tensor,
    k_index: Tensor,
    w: Tensor,
    reads: tuple[Tensor, ...],
    lse: Optional[Tensor],
    scale: float,
    group: Optional[str],
    dq: Tensor,
    dk: Tensor,
    dw: Tensor,
) -> Tensor:
    start, end = reads
    low, high = bounds(start, end, k.shape[0])
    if low == high:
        return dq.new_zeros(())
    mask = visible_mask(start, end, low, high)
    G, n = k.shape[1], q.shape[0]
    attention = ((by_key_head(q, G) * scale) @ dense_keys(k, low, high).transpose(1, 2)).view(G, n, -1, high - low)
    rows_lse = None if lse is None else by_key_head(lse[..., None], G).view(G, n, -1)
    p = _target(attention, mask[None, :, None], rows_lse, (0, 2), group)
    keys = k_index[low:high].to(query.dtype)
    scores = sum((query[:, j] @ keys.T).clamp_(min=0) * w[:, j, None] for j in range(query.shape[1]))
    assert isinstance(scores, Tensor)
    loss, gradient = _divergence(p, scores, mask)
    row_dq, row_dk, row_dw = score_gradients(gradient, query, keys, w)
    dq.copy_(row_dq)
    dk[low:high] += row_dk
    dw.copy_(row_dw)
    return loss


def _sparse_rows(
    q: Tensor,
    k: Tensor,
    query: Tensor,
    k_index: Tensor,
    w: Tensor,
    reads: tuple[Tensor, ...],
    lse: Optional[Tensor],
    scale: float,
    group: Optional[str],
    dq: Tensor,
    dk: Tensor,
    dw: Tensor,
) -> Tensor:
    (indices,) = reads  # [n, K]
    valid, flat = indices >= 0, indices.clamp(min=0).long().flatten()
    empty = ~valid.any(-1)  # what a padded query holds, even NaN, stays with it
    query, w = query.masked_fill(empty[:, None, None], 0.0), w.masked_fill(empty[:, None], 0.0)
    n, K = indices.shape
    G = k.shape[1]
    dtype = accumulator(q.dtype)
    read = k.index_select(0, flat).view(n, K, G, -1).to(dtype).permute(0, 2, 3, 1)
    attention = (q.to(dtype) * scale).view(n, G, -1, q.shape[2]) @ read
    rows_lse = None if lse is None else lse.view(n, G, -1)
    p = _target(attention, valid[:, None, None], rows_lse, (1, 2), group)
    keys = k_index.index_select(0, flat).view(n, K, -1).to(query.dtype).masked_fill_(~valid[..., None], 0.0)
    dots = (query @ keys.transpose(1, 2)).clamp_(min=0)  # [n, J, K]
    loss, gradient = _divergence(p, (w[:, None] @ dots)[:, 0], valid)
    dw.copy_((dots @ gradient[..., None])[..., 0])
    grad_dots = torch.where(dots > 0, gradient[:, None], 0.0) * w[..., None]
    dq.copy_(grad_dots @ keys)
    dk.index_add_(0, flat, (grad_dots.transpose(1, 2) @ query).view(n * K, -1))
    return loss
