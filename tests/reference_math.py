"""Dumb oracles of the operators in float64: full masks and Python loops, nothing shared with the library.

Letters as in the library: B rows, T queries, S keys, H heads, G key heads, R selections, J indexer heads, E channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||; infinities have to be in the same places and count for nothing else."""
    x, reference = x.detach().double(), reference.detach().double()
    assert x.shape == reference.shape, (x.shape, reference.shape)
    infinite = reference.isinf()
    assert torch.equal(x[infinite], reference[infinite]), "infinities differ"
    difference = (x[~infinite] - reference[~infinite]).norm()
    norm = reference[~infinite].norm()
    return float(difference / norm) if norm > 0 else float(difference)


def leaves(*tensors: Tensor | None) -> list:
    """float64 copies that ask for gradients (None stays None)."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def interval_mask(start: Tensor, end: Tensor, S: int) -> Tensor:
    """bool [B, T, S]: the keys that each query sees."""
    position = torch.arange(S)
    return (position >= start[..., None]) & (position < end[..., None])


def index_mask(indices: Tensor, S: int, counts: Tensor | None = None) -> Tensor:
    """bool [B, T, R, S] from indices [B, T, R, K] with -1 anywhere."""
    mask = torch.zeros(*indices.shape[:-1], S, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in indices.shape[:-1])).view(-1, 3).tolist():
        row = indices[tuple(place)].tolist()
        for index in row if counts is None else row[: int(counts[tuple(place)])]:
            if index >= 0:
                mask[(*place, index)] = True
    return mask


def index_scores(q: Tensor, k: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """[B, T, S] in float64, -inf where the mask [B, T, S] is False."""
    J, E = q.shape[2:]
    dots = torch.einsum("btje,bse->btjs", q.double(), k.double()).relu()
    scores = torch.einsum("btjs,btj->bts", dots, weights.double()) / math.sqrt(J) / math.sqrt(E)
    return scores.masked_fill(~mask, -math.inf)


def chosen(scores: Tensor, start: int, end: int, budget: int, keep_first: int = 0, keep_recent: int = 0) -> list[int]:
    """Positions that one row keeps, ascending: a sort by (kept anyway, score descending, position descending), NaN last."""
    forced = {*range(start, end)[:keep_first], *range(max(start, end - keep_recent), end)}

    def rank(position: int) -> tuple:
        score = float(scores[position])
        return (position not in forced, math.isnan(score), 0.0 if math.isnan(score) else -score, -position)

    return sorted(sorted(range(start, end), key=rank)[:budget])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out [B, T, H, V] and lse [B, T, H] in float64, differentiable; mask bool [B, T, R, S]."""
    H, D, G, R = q.shape[2], q.shape[3], k.shape[2], mask.shape[2]
    key_head = [h * G // H for h in range(H)]
    selection = [g * R // G for g in key_head]
    scores = torch.einsum("bthd,bshd->bths", q.double(), k.double()[:, :, key_head]) * (D**-0.5 if scale is None else scale)
    read = mask[:, :, selection]
    empty = ~read.any(-1)
    scores = scores.masked_fill(~read, -math.inf).masked_fill(empty[..., None], 0.0)
    lse = scores.logsumexp(-1)
    whole = lse if sink is None else torch.logaddexp(lse, sink.double().expand_as(lse))
    p = (scores - whole[..., None]).exp().masked_fill(empty[..., None], 0.0)
    return torch.einsum("bths,bshv->bthv", p, v.double()[:, :, key_head]), lse.masked_fill(empty, -math.inf)


def alignment(q: Tensor, k: Tensor, scores: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Mean over the rows that see something of KL(p || softmax(scores)): scores [B, T, S], mask bool [B, T, S]."""
    B, T, H, D = q.shape
    G = k.shape[2]
    q, k = q.detach().double(), k.detach().double()
    losses = []
    for b in range(B):
        for t in range(T):
            seen = mask[b, t].nonzero().flatten()
            if seen.numel() == 0:
                continue
            heads = [torch.softmax(k[b, seen, h * G // H] @ q[b, t, h] * (D**-0.5 if scale is None else scale), 0) for h in range(H)]
            p = sum(heads) / H
            losses.append((p * (p.log() - torch.log_softmax(scores[b, t, seen], 0))).sum())
    return torch.stack(losses).mean() if losses else scores.new_zeros(())
