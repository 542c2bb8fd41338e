"""Index scores in plain PyTorch: `I[t, s] = sum_j w[t, j] * J^-1/2 * E^-1/2 * ReLU(q[t, j] . k[s])`.

Every score is made by the same arithmetic whatever the number of queries, keys, chunks or rows in the batch: matrix
products run on tiles of one fixed shape (a library may sum in another order for another shape), heads are added one
after the other. So a token scores bitwise the same in a prefill, in a chunk of it and in a decoding step.
"""

from typing import Optional

import torch
from torch import Tensor

from skim.ops.score.pages import in_one_piece
from skim.ops.score.weights import head_weights
from skim.ops.workspace import accumulator, chunks

KEYS = 512


def queries_per_tile(device: torch.device) -> int:
    return 16 if device.type == "cpu" else 256


def _dots_bytes(device: torch.device) -> int:
    """How much of the heads' products is held at a time: on a CPU what its caches hold."""
    return (4 if device.type == "cpu" else 128) << 20


class TiledKeys:
    """The keys of one row, cut into tiles `[n, KEYS, E]` (zeros behind the last), in the accumulating dtype."""

    def __init__(self, k: Tensor, scale: Optional[Tensor]) -> None:
        S, E = k.shape
        self.size, self.scale = S, scale
        self.tiles = torch.zeros(-(-S // KEYS), KEYS, E, dtype=accumulator(k.dtype), device=k.device)
        self.tiles.view(-1, E)[:S] = k.to(self.tiles.dtype)


def score_rows(q: Tensor, keys: TiledKeys, w: Tensor, low: int, high: int) -> Tensor:
    """Scores of queries q `[n, J, E]` with weights w `[n, J]` for the keys low to high - 1: `[n, high - low]`."""
    n, J, E = q.shape
    size = queries_per_tile(q.device)
    first, last = low // KEYS, -(-high // KEYS)
    step = max(1, _dots_bytes(q.device) // (keys.tiles.itemsize * J * size * KEYS))
    scores = torch.empty(n, high - low, dtype=keys.tiles.dtype, device=q.device)
    for begin in range(0, n, size):
        rows = min(size, n - begin)
        tile_q = torch.zeros(J, size, E, dtype=keys.tiles.dtype, device=q.device)
        tile_q[:, :rows] = q[begin : begin + rows].transpose(0, 1)
        tile_w = torch.zeros(J, 1, size, 1, dtype=keys.tiles.dtype, device=q.device)
        tile_w[:, 0, :rows, 0] = w[begin : begin + rows].T
        for tile in range(first, last, step):
            tiles = keys.tiles[tile : min(tile + step, last)].transpose(1, 2)
            dots = torch.bmm(tile_q.view(1, J * size, E).expand(tiles.shape[0], -1, -1), tiles).clamp_(min=0)
            dots = dots.view(-1, J, size, KEYS)
            total = dots[:, 0].mul_(tile_w[0])
            for j in range(1, J):
                total += dots[:, j].mul_(tile_w[j])
            row_major = total.transpose(0, 1).reshape(size, -1)
            origin = tile * KEYS
            a, z = max(low, origin), min(high, origin + row_major.shape[1])
            scores[begin : begin + rows, a - low : z - low] = row_major[:rows, a - origin : z - origin]
    return scores if keys.scale is None else scores * keys.scale[low:high]


def bytes_per_row(q: Tensor, S: int) -> int:
    """Scratch of one query whose scores for S keys, or their gradients, are being made, in bytes; the heads' products apart."""
    return 4 * accumulator(q.dtype).itemsize * (S + KEYS)


def bounds(start: Tensor, end: Tensor, S: int) -> tuple[int, int]:
    """The smallest range of keys that holds everything that the rows of start, end `[n]` see; (0, 0) if nothing."""
    seen = end > start
    if not bool(seen.any()):
        return 0, 0
    low = max(0, int(start[seen].min()))
    return low, max(low, min(S, int(end[seen].max())))


def visible_mask(start: Tensor, end: Tensor, low: int, high: int) -> Tensor:
    """bool `[n, high - low]`: which of the keys low to high - 1 each row of start, end `[n]` sees."""
    position = torch.arange(low, high, dtype=start.dtype, device=start.device)
    return (position >= start[:, None]) & (position < end[:, None])


def index_scores(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Optional[Tensor],
    k_scale: Optional[Tensor],
    start: Tensor,
    end: Tensor,
    workspace_mb: int,
    block_table: Optional[Tensor] = None,
) -> Tensor:
    B, T, _, E = q.shape
    k, k_scale = in_one_piece(k, k_scale, block_table)
    S = k.shape[1]
    w = head_weights(weights, q_scale, E)
    scores = torch.full((B, T, S), -torch.inf, dtype=accumulator(q.dtype), device=q.device)
    for b in range(B):
        keys = TiledKeys(k[b], None if k_scale is None else k_scale[b])
        for rows in chunks(T, bytes_per_row(q, S), workspace_mb, queries_per_tile(q.device)):
            low, high = bounds(start[b, rows], end[b, rows], S)
            if low < high:
                part = score_rows(q[b, rows], keys, w[b, rows], low, high)
                scores[b, rows, low:high] = part.masked_fill_(~visible_mask(start[b, rows], end[b, rows], low, high), -torch.inf)
    return scores


def score_gradients(grad: Tensor, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scores `[n, s]` for q `[n, J, E]`, k `[s, E]` and the scaled head weights w `[n, J]`, head by head.

    Unseen keys, whose gradient is zero, may hold NaN; so may queries that see no key.
    """
    unseen = (grad == 0).all(1)
    q, w, k = q.masked_fill(unseen[:, None, None], 0.0), w.masked_fill(unseen[:, None], 0.0), k.nan_to_num(0.0, 0.0, 0.0)
    grad_q, grad_w = torch.empty_like(q), torch.empty_like(w)
    grad_k = torch.zeros_like(k)
    for j in range(q.shape[1]):
        dots = (q[:, j] @ k.T).clamp_(min=0)
        grad_w[:, j] = torch.einsum("ns,ns->n", grad, dots)
        grad_dots = torch.where(dots > 0, grad, 0.0) * w[:, j, None]
        grad_q[:, j] = grad_dots @ k
        grad_k += grad_dots.T @ q[:, j]
    return grad_q, grad_k, grad_w


def index_scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, weights: Tensor, start: Tensor, end: Tensor, workspace_mb: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, J, E = q.shape
    dtype, S = accumulator(q.dtype), k.shape[1]
    w, scale = head_weights(weights, None, E).to(dtype), J**-0.5 * E**-0.5
    grad_q, grad_k, grad_w = q.new_zeros(q.shape), k.new_zeros(k.shape, dtype=dtype), weights.new_zeros(weights.shape)
    for b in range(B):
        for rows in chunks(T, bytes_per_row(q, S), workspace_mb):
            low, high = bounds(start[b, rows], end[b, rows], S)
            if low < high:
                seen = torch.where(visible_mask(start[b, rows], end[b, rows], low, high), grad[b, rows, low:high], 0.0)
                dq, dk, dw = score_gradients(seen, q[b, rows].to(dtype), k[b, low:high].to(dtype), w[b, rows])
                grad_q[b, rows], grad_w[b, rows] = dq.to(q.dtype), (dw * scale).to(weights.dtype)
                grad_k[b, low:high] += dk
    return grad_q, grad_k.to(k.dtype), grad_w
