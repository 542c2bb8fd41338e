"""What a model kept of another's behaviour: how near their next tokens' distributions are, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # tokens whose logits are float32 at a time


@dataclass(frozen=True)
class Agreement:
    """How near a model is to a reference, each row of tokens weighing the same.

    Attributes:
        kl: mean KL(reference || model) of the next token's distribution, in nats.
        top1: share of the tokens after which both have the same most probable next token.
        kl_by_row, top1_by_row: the same of each row, to pair with another model's (`paired_t`).
    """

    kl: float
    top1: float
    kl_by_row: list[float]
    top1_by_row: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def agreement(model: Any, reference: Any, rows: Iterable[Tensor], last: Sequence[int] | None = None) -> Agreement:
    """Compare two models of one vocabulary on the same tokens, each as it reads at present.

    Args:
        model, reference: causal language models of transformers, converted or not.
        rows: token numbers `[1, T]`, at least one row.
        last: of each row how many of its last tokens are predicted, the answer in a chat say; None: all but the first.

    Raises:
        ValueError: no rows, a row of another shape or too short, or models of different vocabularies.
    """
    found: list[Tensor] = []
    rows = list(rows)
    for tokens, count in zip(rows, [row.shape[-1] - 1 for row in rows] if last is None else last, strict=True):
        if tokens.dim() != 2 or tokens.shape[0] != 1 or not 1 <= count < tokens.shape[1]:
            raise ValueError(f"rows: expected [1, T] with T > {max(1, count)}, got {tuple(tokens.shape)}")
        theirs, ours = (one(tokens.to(one.device), use_cache=False).logits[0, -count - 1 : -1].to(model.device) for one in (reference, model))
        if ours.shape != theirs.shape:
            raise ValueError(f"reference: expected the model's vocabulary of {ours.shape[1]}, got {theirs.shape[1]}")
        found.append(torch.stack([_agreement(p.float(), q.float()) for p, q in zip(theirs.split(CHUNK), ours.split(CHUNK))]).sum(0) / count)
    if not found:
        raise ValueError("rows: expected at least one, got none")
    by_row = torch.stack(found).cpu()
    kl, top1 = by_row.mean(0).tolist()
    return Agreement(kl, top1, by_row[:, 0].tolist(), by_row[:, 1].tolist())


def _agreement(reference: Tensor, model: Tensor) -> Tensor:
    """Sums over tokens, from logits `[n, vocabulary]`: of KL(reference || model), and of equal most probable tokens."""
    p, q = reference.log_softmax(-1), model.log_softmax(-1)
    return torch.stack(((p.exp() * (p - q)).sum().double(), (p.argmax(-1) == q.argmax(-1)).sum()))
