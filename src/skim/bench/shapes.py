"""Shapes that nobody tuned, each beside the nearest that was: the contracts allow any, and none may cost much more for its operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skim.bench import selections
from skim.bench.registry import COMMON, SMOLLM2, WIDE, Heads, Problem, Setting, case, selected_pairs, visible_pairs
from skim.bench.roofs import Stage
from skim.ops import align, attend, index_scores, select
from skim.selection import Selection


class Shape(NamedTuple):
    """An operator's heads (see `Heads`), V value channels and a budget K."""

    heads: Heads
    V: int
    K: int


def tuned(heads: Heads, K: int) -> Shape:
    return Shape(heads, heads.D, K)


# label: operator, the odd shape, the tuned one
SHAPES: dict[str, tuple[str, Shape, Shape]] = {
    "attend 17/1 80, K=300": ("attend", Shape(Heads(17, 1, 80, 4, 64), 80, 300), tuned(WIDE, 256)),
    "attend 12/12 48, K=1000": ("attend", Shape(Heads(12, 12, 48, 4, 64), 48, 1000), tuned(SMOLLM2, 1024)),
    "attend 40/8 96/56, K=333": ("attend", Shape(Heads(40, 8, 96, 4, 64), 56, 333), tuned(COMMON, 256)),
    "score 3x48": ("score", Shape(Heads(1, 1, 16, 3, 48), 16, 1), tuned(SMOLLM2, 1)),
    "score 17x100": ("score", Shape(Heads(1, 1, 16, 17, 100), 16, 1), tuned(WIDE, 1)),
    "select 3x48, K=100": ("select", Shape(Heads(1, 1, 16, 3, 48), 16, 100), tuned(SMOLLM2, 128)),
    "select 17x100, K=1111": ("select", Shape(Heads(1, 1, 16, 17, 100), 16, 1111), tuned(WIDE, 1024)),
    "align 17/1 80, 3x48": ("align", Shape(Heads(17, 1, 80, 3, 48), 80, 1), tuned(SMOLLM2, 1)),
    "align 20/4 96, 5x40": ("align", Shape(Heads(20, 4, 96, 5, 40), 96, 1), tuned(WIDE, 1)),
}


class Inputs(NamedTuple):
    """What an operator takes, and the gradient that comes back to it."""

    tensors: tuple[Tensor, ...]
    selection: Selection | None = None
    grad: Tensor | None = None


def attended(s: Setting, T: int, shape: Shape, seed: int) -> Inputs:
    (H, G, D, _, _), V, K = shape
    q, k, v = (s.draw(1, *size, seed=10 * seed + i).requires_grad_() for i, size in enumerate(((T, H, D), (s.n, G, D), (s.n, G, V))))
    return Inputs((q, k, v), selections.selection("overlapping", T, s.n, min(K, s.n // 2), device=s.device, seed=seed), s.draw(1, T, H, V, seed=seed))


def attend_step(x: Inputs, shape: Shape) -> Any:
    q, k, v = x.tensors
    out, _ = attend(q, k, v, x.selection)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), x.grad))


def indexed(s: Setting, T: int, shape: Shape, seed: int) -> Inputs:
    J, E = shape.heads.J, shape.heads.E
    return Inputs((s.draw(1, T, J, E, seed=10 * seed + 3), s.draw(1, s.n, E, seed=10 * seed + 4), s.draw(1, T, J, seed=10 * seed + 5)))


def aligned(s: Setting, T: int, shape: Shape, seed: int) -> Inputs:
    (q, k, _), index = attended(s, T, shape, seed).tensors, indexed(s, T, shape, seed).tensors
    return Inputs((q.detach(), k.detach(), *(x.requires_grad_() for x in index)))


def select_step(x: Inputs, shape: Shape) -> Any:
    q, k, weights = x.tensors
    return select(q, k, weights, min(shape.K, k.shape[1] // 2))


def score_step(x: Inputs, shape: Shape) -> Any:
    q, k, weights = x.tensors
    return index_scores(q, k, weights)


def align_step(x: Inputs, shape: Shape) -> Any:
    q, k, *index = x.tensors
    loss = align(q, k, *index)
    return (loss.detach(), *torch.autograd.grad(loss, index))


FORMULAS = {"attend": "7 H (D + V) sum_t min(K, t)", "align": "(4 H D + 8 J E) sum_t t", "score": "2 J E sum_t t", "select": "2 J E sum_t t"}


def operations(operator: str, shape: Shape, T: int, S: int) -> float:
    """Of the matrix products that a result needs: `attend` forward and backward; `align` with one pass for the teacher's lse."""
    (H, _, D, J, E), V, K = shape
    seen = visible_pairs(T, S)
    if operator == "attend":
        return 7 * H * (D + V) * selected_pairs(T, S, min(K, S // 2))
    return (4 * H * D + 8 * J * E if operator == "align" else 2 * J * E) * seen


STEPS: dict[str, tuple[Callable[[Setting, int, Shape, int], Inputs], Callable[[Inputs, Shape], Any]]] = {
    "attend": (attended, attend_step),
    "score": (indexed, score_step),
    "select": (indexed, select_step),
    "align": (aligned, align_step),
}


@case("shapes", (16384,), kinds=tuple(SHAPES), seconds=0.2)
def odd_shapes(s: Setting) -> Problem:
    """Odd heads, channels and budgets beside the nearest tuned ones, by time for a useful operation: 4096 queries over n keys."""
    operator, odd, near = SHAPES[s.kind]
    T = s.size(4096, s.n // 4)
    make, step = STEPS[operator]
    inputs = [(make(s, T, odd, seed), make(s, T, near, seed)) for seed in range(3)]
    stage, other = (Stage(name, FORMULAS[operator], flops=operations(operator, shape, T, s.n)) for name, shape in ((operator, odd), ("tuned", near)))
    return Problem(inputs, lambda x: step(x[0], odd), [stage], {"tuned shape": lambda x: step(x[1], near)}, tuned=other)
