"""What kernels written in Gluon share: names that Triton changed, layouts, and how attention ends a row."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

LOG2E = gl.constexpr(1.4426950408889634)
LINES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
TILES = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, 128 a row

# Triton renamed them after 3.6.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # a box, by the copy engine


@gluon.jit
def lse_and_factor(largest, total, SINK, head, ok, HAS_SINK: gl.constexpr):
    """Of rows whose largest score, in base 2, and sum of exponentials are given: the lse, and the factor of the sum of their values.

    A row that reads nothing has -inf and 0. A sink takes its share of the factor and none of the lse.
    """
    empty = total == 0
    lse = gl.where(empty, float("-inf"), (largest + gl.log2(total)) / LOG2E)
    factor = gl.where(empty, 0.0, 1 / total)
    if HAS_SINK:
        sink = gl.load(SINK + head, mask=ok, other=0.0).to(gl.float32)
        factor = gl.where(empty, 0.0, factor / (1 + gl.exp2((sink - lse) * LOG2E)))
    return lse, factor
