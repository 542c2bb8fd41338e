"""Token selection: index scores and exact top-k in bounded memory."""

from typing import Optional, Union

import torch
from torch import Tensor

from skim.ops.checks import Quantised, expect_index_inputs, expect_interval, expect_shape, expect_tensor
from skim.ops.dispatch import call, run
from skim.ops.score.pages import expect_block_table, length
from skim.ops.select.adaptive import narrow
from skim.ops.workspace import accumulator, workspace
from skim.selection import Selection


def select(
    q_index: Union[Tensor, Quantised],
    k_index: Union[Tensor, Quantised],
    weights: Tensor,
    budget: int,
    *,
    start: Optional[Tensor] = None,
    end: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    mass: Optional[float] = None,
    min_budget: int = 1,
    with_scores: bool = False,
    workspace_mb: Optional[int] = None,
    impl: str = "auto",
) -> Union[Selection, tuple[Selection, Tensor]]:
    """The `budget` best visible keys of each query, exactly, in bounded memory.

    Order: score descending, then position descending: among equals the most recent token wins. -0.0 equals +0.0, NaN
    never wins. A row that sees no more than `budget` keys keeps them all. One implementation gives bitwise the same for any
    batch or chunk; on sm_90 "auto" takes another for FP8 keys of many heads where there are many queries, and not too many keys
    for `workspace_mb`, than where there are few.
    Nothing here has a gradient. Source: DeepSeek-V3.2-Exp report, section 1.

    With `mass` the budget is adaptive: of these keys a row keeps the fewest, in the same order, that hold this share of
    softmax(scores) over all that it sees: at most `budget`, at least `min_budget` and what is always kept. Rows that see
    no more than `budget` keys are narrowed too; those that see no more than `min_budget` keep them all. (The log-sum-exp
    is rounded: where a share lies within rounding of `mass`, another implementation, or on a GPU another number of queries,
    may keep a key more or less.)

    Args:
        q_index: `[B, T, J, E]` index queries, or `(float8_e4m3fn values, float32 scale [B, T, J])`. With five axes
            `[B, T, R, J, E]` (weights `[B, T, R, J]`) each query makes R selections over the same keys.
        k_index: `[B, S, E]` index keys, or `(float8_e4m3fn values, float32 scale [B, S])`, or both in uint8 `[B, S, E + 4]`
            (`codec.pack`). With `block_table` pages of a pool: `[P, page, E]`, `(values, scale [P, page])`, or uint8
            `[P, page * (E + 4)]` (`codec.pack_pages`). A GPU reads FP8 (from sm_89 on) and keys in the dtype of the queries where they
            lie, but for more than 16 queries only if E is a multiple of 16; elsewhere pages are copied together first.
        weights: `[B, T, J]` signed head weights.
        budget: K >= 1, keys kept for a query.
        start, end: int32 `[B, T]`, see `visible`; both None is causal.
        block_table: int32 `[B, N]`, the pages of each sequence in order, so that S = N * page. Entries of pages that no query
            sees may be anything. `start` and `end` must be given.
        keep_first, keep_recent: so many of the first and of the last visible keys are always kept; they count
            against the budget.
        mass: above 0 and at most 1; None keeps `budget` keys whatever their share.
        min_budget: 1 to `budget`; without `mass` it changes nothing.
        with_scores: also give the scores of the selected keys (`Selection.scores`) and the index lse.
        workspace_mb: scratch memory, MiB; None is 32 on a CPU, 512 elsewhere.
        impl: "auto" or the name of an implementation.

    Returns:
        A `Selection`; with `with_scores` the pair `(selection, lse)`, lse float32 `[B, T, R]`: the natural
        log-sum-exp of a row's scores over all its visible keys (-inf for a row that sees none).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a budget below 1,
            `keep_first + keep_recent` above the budget, or `mass` or `min_budget` out of range.
    """
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise ValueError(f"budget: expected an int >= 1, got {budget!r}")
    if keep_first < 0 or keep_recent < 0 or keep_first + keep_recent > budget:
        raise ValueError(f"keep_first, keep_recent: expected a sum of 0 to {budget} (the budget), got {keep_first} and {keep_recent}")
    if mass is not None and not (isinstance(mass, (int, float)) and not isinstance(mass, bool) and 0 < mass <= 1):
        raise ValueError(f"mass: expected None or a number above 0 and at most 1, got {mass!r}")
    if not isinstance(min_budget, int) or isinstance(min_budget, bool) or not 1 <= min_budget <= budget:
        raise ValueError(f"min_budget: expected an int from 1 to {budget} (the budget), got {min_budget!r}")
    values = q_index[0] if isinstance(q_index, tuple) else q_index
    R = 1
    if isinstance(values, Tensor) and values.dim() == 5:  # R selections of one query are R queries that see the same keys
        R = values.shape[2]
        expect_shape("weights", expect_tensor("weights", weights, "BTRJ"), tuple(values.shape[:-1]), "BTRJ")
        q_index = tuple(x.flatten(1, 2) for x in q_index) if isinstance(q_index, tuple) else q_index.flatten(1, 2)  # type: ignore[assignment]
        weights = weights.flatten(1, 2)
    q, k, weights, q_scale, k_scale = expect_index_inputs(q_index, k_index, weights, paged=block_table is not None)
    B, rows = q.shape[:2]
    T = rows // R
    block_table = expect_block_table(block_table, B, k, end)
    start, end = expect_interval(start, end, B, T, length(k, block_table), q.device)
    if R > 1:
        start, end = start.repeat_interleave(R, 1), end.repeat_interleave(R, 1)
    q, k, weights = q.detach(), k.detach(), weights.detach()
    mb = workspace(workspace_mb, q.device)
    adaptive = None if mass is None else float(mass), min_budget
    args = q, k, weights, q_scale, k_scale, start, end, budget, keep_first, keep_recent, with_scores, mb, impl, *adaptive, block_table
    indices, counts, scores, lse = call(_select, _run_select, *args)
    shape = (B, T, R, budget)
    if not with_scores:
        return Selection(indices.view(shape), counts.view(B, T, R))
    return Selection(indices.view(shape), counts.view(B, T, R), scores.view(shape)), lse.view(B, T, R)


def _run_select(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Optional[Tensor],
    k_scale: Optional[Tensor],
    start: Tensor,
    end: Tensor,
    budget: int,
    keep_first: int,
    keep_recent: int,
    with_scores: bool,
    workspace_mb: int,
    impl: str,
    mass: Optional[float] = None,
    min_budget: int = 1,
    block_table: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scored = with_scores or mass is not None
    args = q, k, weights, q_scale, k_scale, start, end, budget, keep_first, keep_recent, scored, workspace_mb, block_table
    selected = run("select", "select", impl, q.device, *args)
    if mass is None:
        return selected
    start, end = start.clamp(min=0), end.clamp(max=length(k, block_table))
    indices, counts, scores, lse = narrow(selected, start, end, mass, min_budget, (keep_first, keep_recent), workspace_mb)
    return (indices, counts, scores, lse) if with_scores else (indices, counts, scores.new_empty(0), lse.new_empty(0))


_select = torch.library.custom_op("skim::select", mutates_args=())(_run_select)


@_select.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, weights, q_scale, k_scale, start, end, budget, keep_first, keep_recent, with_scores, workspace_mb, impl, mass=None, min_budget=1,
    block_table=None,
):  # fmt: skip
    B, T = q.shape[:2]
    indices = q.new_empty(B, T, budget, dtype=torch.int32)
    counts = q.new_empty(B, T, dtype=torch.int32)
    dtype = accumulator(q.dtype)
    if with_scores:
        return indices, counts, q.new_empty(B, T, budget, dtype=dtype), q.new_empty(B, T, dtype=dtype)
    return indices, counts, q.new_empty(0, dtype=dtype), q.new_empty(0, dtype=dtype)
