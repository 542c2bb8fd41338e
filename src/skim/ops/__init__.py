"""Pure functions on tensors, one room per operator."""

from skim.ops.align import align
from skim.ops.attend import attend, attend_dense
from skim.ops.score import index_scores
from skim.ops.select import select
from skim.ops.visibility import visible

__all__ = ["align", "attend", "attend_dense", "index_scores", "select", "visible"]
