"""Attention over selected keys, and over all visible keys, in plain PyTorch, a chunk of queries at a time.

Letters: n queries of a chunk, s keys of a chunk, R selections a query, g = G / R key heads a selection, h = H / G query
heads a key head. Where unread keys may hold NaN they are zeroed before they meet a zero probability. Packed latents
are unpacked as they are read.
"""

from typing import Optional

import torch
from torch import Tensor

from skim.ops.attend.packed import is_packed, unpack
from skim.ops.score.reference import bounds, visible_mask
from skim.ops.workspace import accumulator, chunks

Pair = tuple[Tensor, Tensor]


def _softmax(scores: Tensor, valid: Optional[Tensor]) -> Pair:
    """Probabilities `[..., s]` and lse `[...]` of the keys alone; valid None where every key is."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    if valid is not None:
        scores = scores.masked_fill_(~valid, -torch.inf)
    largest = scores.amax(-1)
    p = scores.softmax(-1)
    lse = largest - p.amax(-1).log()  # the largest probability is exp(largest - lse)
    empty = largest == -torch.inf
    if bool(empty.any()):
        p, lse = p.masked_fill_(empty[..., None], 0.0), lse.masked_fill_(empty, -torch.inf)
    return p, lse


def _probabilities(scores: Tensor, valid: Optional[Tensor], lse: Tensor) -> Tensor:
    """`_softmax`'s probabilities `[..., s]` again, from its lse `[...]`: zero in a row that reads nothing."""
    if valid is not None:
        scores = scores.masked_fill_(~valid, -torch.inf)
    return scores.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp_()


def _shares(lse: Tensor, sink: Optional[Tensor]) -> Pair:
    """How much of its attention a row gives to its keys and how much to the sink, `[...]` each; nothing where it is empty."""
    empty = lse == -torch.inf
    if sink is None:
        return (~empty).to(lse.dtype), torch.zeros_like(lse)
    logit = lse - sink.to(lse.dtype)
    return logit.sigmoid().masked_fill_(empty, 0.0), (-logit).sigmoid_().masked_fill_(empty, 0.0)


def _score_gradient(p: Tensor, lse: Tensor, sink: Optional[Tensor], values: Tensor, out: Tensor, grad: Tensor, dlse: Tensor) -> tuple[Tensor, Pair]:
    """Gradient of the scores `[..., s]` from `_softmax`'s p and lse, and the parts of grad `[..., V]` of the keys' own
    output and of the sink's logit `[...]`. What flows into an empty row stops there, even NaN.
    """
    empty = lse == -torch.inf
    keys_share, sink_share = _shares(lse, sink)
    grad = grad.masked_fill(empty[..., None], 0.0)
    delta = (out * grad).sum(-1)
    grad_keys = grad * keys_share[..., None]
    common = dlse.masked_fill(empty, 0.0) - keys_share * delta
    return (grad_keys @ values.transpose(-1, -2)).add_(common[..., None]).mul_(p), (grad_keys, -sink_share * delta)


class _Gathered:
    """The selected keys and values of a chunk of queries: k `[n, R, g, K, D]`, v `[n, R, g, K, V]`, valid `[n, R, 1, 1, K]` or None for all."""

    def __init__(self, k: Tensor, v: Optional[Tensor], v_channels: int, indices: Tensor, dtype: torch.dtype) -> None:
        S, G, C = k.shape
        if S == 0:  # then every slot is -1, and there is no key 0 to stand in for it
            indices = indices[..., :0]
        n, R, K = indices.shape
        valid = indices >= 0
        head = torch.arange(G, device=k.device).view(1, R, G // R, 1)
        self.flat = (indices.clamp(min=0)[:, :, None].long() * G + head).flatten()
        shape = n, R, G // R, K
        self.valid = None if bool(valid.all()) else valid[:, :, None, None]
        rows = k.reshape(S * G, C).index_select(0, self.flat)
        dtype, rows = accumulator(dtype), unpack(rows, dtype) if is_packed(k) else rows
        self.k = rows.view(*shape, rows.shape[-1]).to(dtype)
        self.v = self.k[..., :v_channels]
        if v is not None:
            self.v = v.reshape(S * G, v_channels).index_select(0, self.flat).view(*shape, v_channels).to(dtype)
        if self.valid is not None:
            hidden = ~valid[:, :, None, :, None]
            self.k = self.k.masked_fill_(hidden, 0.0)
            self.v = self.k[..., :v_channels] if v is None else self.v.masked_fill_(hidden, 0.0)


def _grouped(x: Tensor, R: int, G: int) -> Tensor:
    """Heads of x `[n, H, C]` by selection and key head, in the accumulating dtype: `[n, R, g, h, C]`."""
    return x.to(accumulator(x.dtype)).reshape(x.shape[0], R, G // R, x.shape[1] // G, x.shape[2])


def _attend_bytes(q: Tensor, k: Tensor, v_channels: int, K: int) -> int:
    G, H, D = k.shape[2], q.shape[2], q.shape[3]
    return accumulator(q.dtype).itemsize * K * (2 * G * (D + v_channels + 1) + 4 * H)


def attend(
    q: Tensor, k: Tensor, v: Optional[Tensor], indices: Tensor, v_channels: int, scale: float, sink: Optional[Tensor], workspace_mb: int
) -> Pair:
    B, T, H, _ = q.shape
    G, (R, K) = k.shape[2], indices.shape[2:]
    out = torch.empty(B, T, H, v_channels, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=accumulator(q.dtype), device=q.device)
    sinks = None if sink is None else sink.view(R, G // R, H // G)
    for b in range(B):
        for rows in chunks(T, _attend_bytes(q, k, v_channels, K), workspace_mb):
            read = _Gathered(k[b], None if v is None else v[b], v_channels, indices[b, rows], q.dtype)
            scores = (_grouped(q[b, rows], R, G) * scale) @ read.k.transpose(-1, -2)
            p, row_lse = _softmax(scores, read.valid)
            part = p @ read.v
            if sink is not None:
                part *= _shares(row_lse, sinks)[0][..., None]
            out[b, rows] = part.view(-1, H, v_channels).to(out.dtype)
            lse[b, rows] = row_lse.view(-1, H)
    return out, lse


def attend_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sink (empty where there is none); k's holds the values' part where v is None."""
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    R, K = indices.shape[2:]
    dtype = accumulator(q.dtype)
    dq, dk = q.new_empty(q.shape), torch.zeros(B, S * G, D, dtype=dtype, device=q.device)
    dv = None if v is None else torch.zeros(B, S * G, v_channels, dtype=dtype, device=q.device)
    dsink = torch.zeros(H if sink is not None else 0, dtype=dtype, device=q.device)
    sinks = None if sink is None else sink.view(R, G // R, H // G)
    for b in range(B):
        for rows in chunks(T, 2 * _attend_bytes(q, k, v_channels, K), workspace_mb):
            read = _Gathered(k[b], None if v is None else v[b], v_channels, indices[b, rows], q.dtype)
            query, do, o = _grouped(q[b, rows], R, G), _grouped(grad[b, rows], R, G), _grouped(out[b, rows], R, G)
            row_lse = lse[b, rows].view(o.shape[:-1])
            p = _probabilities((query * scale) @ read.k.transpose(-1, -2), read.valid, row_lse)
            ds, (do, dsink_logit) = _score_gradient(p, row_lse, sinks, read.v, o, do, dlse[b, rows].view(row_lse.shape))
            ds *= scale
            query = query.masked_fill(row_lse[..., None] == -torch.inf, 0.0)
            dq[b, rows] = (ds @ read.k).reshape(-1, H, D).to(q.dtype)
            dk_read, dv_read = ds.transpose(-1, -2) @ query, p.transpose(-1, -2) @ do
            if dv is None:
                dk_read[..., :v_channels] += dv_read
            else:
                dv[b].index_add_(0, read.flat, dv_read.view(-1, v_channels))
            dk[b].index_add_(0, read.flat, dk_read.view(-1, D))
            if sink is not None:
                dsink += dsink_logit.view(-1, H).sum(0)
    grad_v = dk.new_zeros(0) if dv is None else dv.view(B, S, G, v_channels)
    return dq, dk.view(B, S, G, D).to(q.dtype), grad_v.to(q.dtype), dsink if sink is None else dsink.to(sink.dtype)


def by_key_head(x: Tensor, G: int) -> Tensor:
    """x `[n, H, C]` as `[G, n * h, C]`, in the accumulating dtype."""
    n, H, C = x.shape
    return x.to(accumulator(x.dtype)).view(n, G, H // G, C).transpose(0, 1).reshape(G, n * (H // G), C)


def by_query(x: Tensor, n: int) -> Tensor:
    """`[G, n * h, C]` back as `[n, H, C]`."""
    G, rows, C = x.shape
    return x.view(G, n, rows // n, C).transpose(0, 1).reshape(n, G * (rows // n), C)


def _sinks_of_rows(sink: Tensor, G: int, n: int) -> Tensor:
    """sink `[H]` beside `by_key_head`'s rows: `[G, n * h]`."""
    return sink.view(G, 1, -1).expand(-1, n, -1).reshape(G, -1)


def dense_bytes(q: Tensor, S: int) -> int:
    """Scratch of one query that reads S keys with all its heads, in bytes."""
    return 4 * accumulator(q.dtype).itemsize * S * q.shape[2]


def dense_keys(k: Tensor, low: int, high: int) -> Tensor:
    """The keys low to high - 1 of k `[S, G, D]`, head by head: `[G, s, D]`."""
    return k[low:high].to(accumulator(k.dtype)).transpose(0, 1)


def _dense_values(k: Tensor, v: Optional[Tensor], v_channels: int, low: int, high: int) -> Tensor:
    return dense_keys(k[..., :v_channels] if v is None else v, low, high)


def _dense_softmax(query: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Pair:
    """`_softmax` of queries `[G, n * h, D]` over keys `[G, s, D]` under mask `[n, s]`: `[G, n * h, s]` and `[G, n * h]`."""
    scores = (query * scale) @ keys.transpose(1, 2)
    p, lse = _softmax(scores.view(keys.shape[0], mask.shape[0], -1, mask.shape[1]), mask[None, :, None])
    return p.view(scores.shape), lse.view(scores.shape[:-1])


def attend_dense(
    q: Tensor, k: Tensor, v: Optional[Tensor], start: Tensor, end: Tensor, v_channels: int, scale: float, sink: Optional[Tensor], workspace_mb: int
) -> Pair:
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    out = torch.zeros(B, T, H, v_channels, dtype=q.dtype, device=q.device)
    lse = torch.full((B, T, H), -torch.inf, dtype=accumulator(q.dtype), device=q.device)
    for b in range(B):
        keys = unpack(k[b], q.dtype) if is_packed(k) else k[b]
        for rows in chunks(T, dense_bytes(q, S), workspace_mb):
            low, high = bounds(start[b, rows], end[b, rows], S)
            if low == high:
                continue
            mask = visible_mask(start[b, rows], end[b, rows], low, high)
            n = mask.shape[0]
            p, row_lse = _dense_softmax(by_key_head(q[b, rows], G), dense_keys(keys, low, high), mask, scale)
            values = _dense_values(keys, None if v is None else v[b], v_channels, low, high)
            unread = values.isfinite().logical_not_()
            if bool(unread.any()):  # zero times NaN is NaN: keep it from the rows that don't see that value
                touched = (p > 0).to(p.dtype) @ unread.to(p.dtype)
                part = (p @ values.masked_fill(unread, 0.0)).masked_fill_(touched > 0, torch.nan)
            else:
                part = p @ values
            if sink is not None:
                part = part * _shares(row_lse, _sinks_of_rows(sink, G, n))[0][..., None]
            out[b, rows] = by_query(part, n).to(out.dtype)
            lse[b, rows] = by_query(row_lse[..., None], n)[..., 0]
    return out, lse


def attend_dense_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `attend_backward`, over all visible keys."""
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    dtype = accumulator(q.dtype)
    dq, dk = q.new_zeros(q.shape), torch.zeros(B, G, S, D, dtype=dtype, device=q.device)
    dv = None if v is None else torch.zeros(B, G, S, v_channels, dtype=dtype, device=q.device)
    dsink = torch.zeros(H if sink is not None else 0, dtype=dtype, device=q.device)
    for b in range(B):
        for rows in chunks(T, 2 * dense_bytes(q, S), workspace_mb):
            low, high = bounds(start[b, rows], end[b, rows], S)
            if low == high:
                continue
            mask = visible_mask(start[b, rows], end[b, rows], low, high)
            n = mask.shape[0]
            keys = dense_keys(k[b], low, high)
            query, do, o, dl, row_lse = (by_key_head(x[b, rows], G) for x in (q, grad, out, dlse[..., None], lse[..., None]))
            row_lse = row_lse[..., 0]
            scores = ((query * scale) @ keys.transpose(1, 2)).view(G, n, -1, high - low)
            p = _probabilities(scores, mask[None, :, None], row_lse.view(G, n, -1)).view(G, -1, high - low)
            values = _dense_values(k[b], None if v is None else v[b], v_channels, low, high)
            keys, values = (x.nan_to_num(0.0, 0.0, 0.0) for x in (keys, values))  # where they are read, p and out tell
            sinks = None if sink is None else _sinks_of_rows(sink, G, n)
            ds, (do, dsink_logit) = _score_gradient(p, row_lse, sinks, values, o, do, dl[..., 0])
            ds *= scale
            query = query.masked_fill(row_lse[..., None] == -torch.inf, 0.0)
            dq[b, rows] = by_query(ds @ keys, n).to(q.dtype)
            dk[b, :, low:high] += ds.transpose(1, 2) @ query
            into = dk[b, :, low:high, :v_channels] if dv is None else dv[b, :, low:high]
            into += p.transpose(1, 2) @ do
            if sink is not None:
                dsink += by_query(dsink_logit[..., None], n)[..., 0].sum(0)
    grad_k = dk.transpose(1, 2).to(q.dtype).contiguous()
    grad_v = grad_k.new_zeros(0) if dv is None else dv.transpose(1, 2).to(q.dtype).contiguous()
    return dq, grad_k, grad_v, dsink if sink is None else dsink.to(sink.dtype)
