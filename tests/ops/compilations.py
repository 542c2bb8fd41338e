"""Compiles every kernel for a GPU that is not here, as the operators would launch it, and prints what came out as JSON.

    python tests/ops/compilations.py CAPABILITY OPERATOR...
        (attend, latent, latent_backward, hopper, hopper_union, hopper_backward, hopper_score, hopper_select, score, select, align,
        align_float32, codec)

Kernels must not be interpreted here, so this is a program of its own: TRITON_INTERPRET may not be set.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from itertools import product
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, os.path.dirname(__file__))
from compiled import compiling  # noqa: E402

from skim.ops.checks import expect_index_inputs  # noqa: E402

MODES = ("rows", "union", "dense")  # of skim.ops.attend.triton
FIELDS = ("registers", "spilled", "shared", "warps", "products", "handed_over", "overwritten", "fused_sums", "sums_of_products")
Call = tuple[str, Callable[[], object]]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def attention(shape: tuple[int, int, int, int], T: int, processors: int) -> Iterator[Call]:
    """Forward and backward, over selections and intervals; with few processors neighbours share unions, with many a walk is split."""
    kernels = import_module("skim.ops.attend.triton")
    (H, G, D, V), S, K = shape, 4096, 512
    q, out, lse = empty(1, T, H, D), empty(1, T, H, V), empty(1, T, H, dtype=torch.float32)
    k, v = empty(1, S, G, D), None if G == 1 else empty(1, S, G, V)
    for name, keys in (("attend", (zeros(1, T, 1, K),)), ("attend_dense", (zeros(1, T), zeros(1, T)))):
        pretend = mock.patch.object(kernels, "processors", lambda device: processors)
        yield name, pretend(partial(getattr(kernels, name), q, k, v, *keys, V, 0.1, None, 64))
        backward = f"{name}_backward"
        yield backward, pretend(partial(getattr(kernels, backward), out, lse, q, k, v, *keys, None, out, lse, V, 0.1, 64))


def attend(capability: int) -> Iterator[Call]:
    others = () if capability == 89 else ((32, 8, 128, 128), (16, 16, 128, 128))  # sm_89 has the limits of sm_120, which compiles all
    for shape in ((32, 2, 128, 128), (9, 3, 64, 64), *others):
        yield from named(shape, attention(shape, 64, 1))
    shape = 32, 2, 128, 128
    yield from named(shape, ((f"{name}, decode", call) for name, call in attention(shape, 1, 132) if "backward" not in name))
    if capability == 90:
        repeatable = ((f"{name}, deterministic", deterministic(call)) for name, call in attention(shape, 64, 1) if name == "attend_backward")
        yield from named(shape, repeatable)


def latent(capability: int) -> Iterator[Call]:
    """MLA: the values are the first channels of the keys."""
    shape = 128, 1, 576, 512
    if capability != 89:
        yield from named(shape, attention(shape, 64, 1))
        yield from named(shape, ((f"{name}, decode", call) for name, call in attention(shape, 1, 132) if "backward" not in name))
    kernels = import_module("skim.ops.attend.triton")
    for H, (T, processors, suffix) in product((16,) if capability == 89 else (128, 16), ((64, 1, ""), (1, 132, ", decode"))):
        q, k = empty(1, T, H, 576), empty(1, 4096, 1, 656, dtype=torch.uint8)
        for name, reads in (("attend", (zeros(1, T, 1, 512),)), ("attend_dense", (zeros(1, T), zeros(1, T)))):
            call = partial(getattr(kernels, name), q, k, None, *reads, 512, 0.1, None, 64)
            pretend = mock.patch.object(kernels, "processors", lambda device, n=processors: n)
            yield f"{H}/1 656 {name}{suffix}", pretend(call)


def latent_backward(capability: int) -> Iterator[Call]:
    """Gradients of MLA over selections."""
    kernels = import_module("skim.ops.attend.triton")
    for H, D in ((128, 576), (64, 512)):
        q, k, out, lse = empty(1, 64, H, D), empty(1, 4096, 1, D), empty(1, 64, H, 512), empty(1, 64, H, dtype=torch.float32)
        yield f"{H}/1 {D} attend_backward", partial(kernels.attend_backward, out, lse, q, k, None, zeros(1, 64, 1, 512), None, out, lse, 512, 0.1, 64)


def hopper(capability: int) -> Iterator[Call]:
    """MLA in Gluon: a query's heads fill the rows of a program, or neighbours share a union; 656 channels are the bytes of packed latents."""
    kernels = import_module("skim.ops.attend.hopper")
    for H, D, T in ((128, 576, 264), (64, 512, 264), (100, 576, 264), (16, 576, 264), (128, 576, 1), (128, 656, 264), (16, 656, 264), (16, 656, 1)):
        sink = empty(H, dtype=torch.float32) if H == 16 else None
        k = empty(1, 4096, 1, D, dtype=torch.uint8 if D == 656 else torch.bfloat16)
        for name, reads in (("attend", (zeros(1, T, 1, 512),)), ("attend_dense", (zeros(1, T), zeros(1, T)))):
            call = partial(getattr(kernels, name), empty(1, T, H, min(D, 576)), k, None, *reads, 512, 0.1, sink, 64)
            yield f"{H}/1 {D} {name}{', decode' if T == 1 else ''}", mock.patch.object(kernels, "processors", lambda device: 132)(call)


def hopper_union(capability: int) -> Iterator[Call]:
    """Heads of key heads in Gluon: neighbours share a union."""
    kernels = import_module("skim.ops.attend.hopper_union")
    for H, G, D in ((32, 2, 128), (32, 8, 128), (9, 3, 64)):
        heads = 1 << (H // G - 1).bit_length()
        tile, T = min(128 // heads, 32), 256
        q, k, sink = empty(1, T, H, D), empty(1, 4096, G, D), empty(H, dtype=torch.float32) if G == 8 else None
        reads = zeros(T // tile, 1, 2048), zeros(T // tile, 1, 2048), zeros(T // tile, 1)
        if G == 2:
            k = empty(1, 4096, G, D + 16)[..., :D]
        call = partial(kernels.launch, q, k, k, sink, q, empty(1, T, H, dtype=torch.float32), 0.1, tile, 0, 2048, *reads)
        yield f"{H}/{G} {D} attend", mock.patch.object(kernels, "processors", lambda device: 132)(call)


def hopper_backward(capability: int) -> Iterator[Call]:
    """Gradients of MLA over selections, in Gluon where they have kernels."""
    kernels, others = import_module("skim.ops.attend.hopper_backward"), import_module("skim.ops.attend.latent_backward")
    for H, D in ((128, 576), (256, 512)):
        q, k, grad, full = empty(1, 64, H, D), empty(1, 4096, 1, D), empty(1, 64, H, 512), empty(1, 64, H, dtype=torch.float32)
        call = partial(others.gradients, q, k, grad, full, full, zeros(1, 64, 1, 512), 0.1, 64)
        for module, name, value in ((others, "gluon", True), (kernels, "processors", 132)):
            call = mock.patch.object(module, name, lambda device, value=value: value)(call)
        yield f"{H}/1 {D} attend_backward", call


def hopper_score(capability: int) -> Iterator[Call]:
    """FP8 index scores in Gluon: all heads of 4 to 16 queries fill the columns of a program."""
    kernels = import_module("skim.ops.score.hopper")
    T, S = 264, 4096
    for J, E in ((64, 128), (64, 64), (32, 128), (17, 64), (8, 128)):
        q, k = empty(1, T, J, E, dtype=torch.float8_e4m3fn), empty(1, S, E, dtype=torch.float8_e4m3fn)
        scales = empty(1, T, J, dtype=torch.float32), empty(1, S, dtype=torch.float32)
        call = partial(kernels.index_scores, q, k, empty(1, T, J), *scales, zeros(1, T), zeros(1, T), 64)
        yield f"{J}x{E} index_scores", mock.patch.object(kernels, "processors", lambda device: 132)(call)


def hopper_select(capability: int) -> Iterator[Call]:
    """Candidates of FP8 index scores in Gluon: of rows that are sampled and of others, with keys that are kept, with scores."""
    kernels = import_module("skim.ops.select.hopper_candidates")
    T, S, budget = 264, 16384, 2048
    most = (64, 128)
    for (J, E), sampled, keep, with_scores in ((most, True, 0, False), (most, True, 3, True), (most, False, 3, True), ((32, 128), True, 0, False)):
        q, k = empty(T, J, E, dtype=torch.float8_e4m3fn), empty(S, E, dtype=torch.float8_e4m3fn)
        weights, scales, points = empty(T, J, dtype=torch.float32), empty(S, dtype=torch.float32), empty(T, dtype=torch.float32)
        options = budget, keep, keep, with_scores, S, 132
        finder = kernels.Candidates(q, weights, weights, k, scales, zeros(T), zeros(T), (points,) if sampled else (), *options)
        found = points, zeros(T), empty(1, dtype=torch.int64), zeros(1), points, points
        name = f"{J}x{E} candidates{'' if sampled else ', all'}{', some kept, with scores' if keep else ''}"
        yield name, partial(finder.find, *found, 2192)


def named(shape: tuple[int, int, int, int], calls: Iterable[Call]) -> Iterator[Call]:
    return ((f"{shape[0]}/{shape[1]} {shape[2]} {name}", call) for name, call in calls)


def deterministic(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        torch.use_deterministic_algorithms(True)
        call()
        torch.use_deterministic_algorithms(False)

    return run


def indexers(capability: int, T: int, S: int) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    """q, k, weights and scales of the indexers: FP8 where the matrix units have it."""
    for J, E, dtype in ((4, 64, torch.bfloat16), (64, 128, torch.bfloat16), (8, 64, torch.float8_e4m3fn), (64, 128, torch.float8_e4m3fn)):
        eight = dtype == torch.float8_e4m3fn
        if eight and J == 8 and capability < 89 or not eight and J == 64 and capability != 90:
            continue
        scales = (empty(1, T, J, dtype=torch.float32), empty(1, S, dtype=torch.float32)) if eight else (None, None)
        yield f"{J}x{E} {'fp8' if eight else 'bf16'}", (empty(1, T, J, E, dtype=dtype), empty(1, S, E, dtype=dtype), empty(1, T, J), *scales)


def cached(T: int) -> Iterator[tuple[str, tuple[Tensor | None, ...], Tensor | None]]:
    """FP8 keys in the bytes of a cache, 64 heads of 128 channels: in rows of 132 bytes, and in pages, with their block table."""
    q, weights, scale = empty(1, T, 64, 128, dtype=torch.float8_e4m3fn), empty(1, T, 64), empty(1, T, 64, dtype=torch.float32)
    for name, shape, table in (("rows", (1, 4096, 132), None), ("pages", (64, 64 * 132), zeros(1, 64))):
        _, k, _, _, k_scale = expect_index_inputs((q, scale), empty(*shape, dtype=torch.uint8), weights, paged=table is not None)
        yield f"64x128 fp8 {name}", (q, k, weights, scale, k_scale), table


def score(capability: int) -> Iterator[Call]:
    kernels = import_module("skim.ops.score.triton")
    T, S = 64, 4096
    interval = zeros(1, T), zeros(1, T)
    for name, inputs in indexers(capability, T, S):
        yield f"{name} index_scores", partial(kernels.index_scores, *inputs, *interval, 64)
        if name == "4x64 bf16":
            grad = empty(1, T, S, dtype=torch.float32)
            yield f"{name} index_scores_backward", partial(kernels.index_scores_backward, grad, *inputs[:3], *interval, 64)
    for name, inputs, table in cached(T):
        yield f"{name} index_scores", partial(kernels.index_scores, *inputs, *interval, 64, table)


def select(capability: int) -> Iterator[Call]:
    kernels = import_module("skim.ops.select.triton")
    T, S = 1024, 131072
    interval = zeros(1, T), zeros(1, T)
    for name, inputs in indexers(capability, T, S):
        yield f"{name} select of 2048", partial(kernels.select, *inputs, *interval, 2048, 0, 0, False, 512)
        if name == "4x64 bf16" and capability == 90:
            for budget in (2048, 8192):
                yield f"{name} select of {budget} with scores", partial(kernels.select, *inputs, *interval, budget, 1, 1, True, 512)
    for name, inputs, table in cached(T):
        yield f"{name} select of 64", partial(kernels.select, *inputs, *interval, 64, 0, 0, False, 512, table)
    for name, inputs in indexers(capability, 1, S):
        yield f"{name} select of 2048, one query", partial(kernels.select, *inputs, zeros(1, 1), zeros(1, 1), 2048, 4, 1, True, 512)
    for rows in (1, 256, T):  # in parts, split over programs, and one program each
        yield f"top_k of 2048, {rows} rows", partial(kernels.top_k, empty(rows, S, dtype=torch.float32), zeros(rows), zeros(rows), 2048)
    if capability == 90:
        hopper = import_module("skim.ops.select.hopper")
        keys = empty(1, S, 128, dtype=torch.float8_e4m3fn), empty(1, S, dtype=torch.float32)
        yield "sampled keys", partial(hopper._sample, *keys, *interval, 4096, 32)


def align(capability: int) -> Iterator[Call]:
    if capability == 89:  # as sm_120
        return
    kernels = import_module("skim.ops.align.triton")
    T, S = 64, 256
    for H, G, D, J, E in ((9, 3, 64, 4, 64), (32, 2, 128, 8, 64)):
        inputs = empty(1, T, H, D), empty(1, S, G, D), empty(1, T, J, E), empty(1, S, E), empty(1, T, J), zeros(1, T), zeros(1, T)
        lse = torch.zeros(1, T, H)
        for name, indices in (("dense", None), ("sparse", zeros(1, T, 64))):
            yield f"{H}/{G} {D} {J}x{E} align {name}", partial(kernels.align, *inputs, indices, lse, 0.1, None, 64)


def align_float32(capability: int) -> Iterator[Call]:
    kernels = import_module("skim.ops.align.triton")
    inputs = (empty(*shape, dtype=torch.float32) for shape in ((1, 40, 9, 64), (1, 80, 3, 64), (1, 40, 4, 32), (1, 80, 32), (1, 40, 4)))
    given = *inputs, zeros(1, 40), zeros(1, 40)
    for name, indices in (("dense", None), ("sparse", zeros(1, 40, 10))):
        yield f"align {name}", partial(kernels.align, *given, indices, torch.zeros(1, 40, 9), 0.1, None, 64)


def codec(capability: int) -> Iterator[Call]:
    kernels = import_module("skim.ops.codec.triton")
    x = empty(4096, 128)
    yield "quantise", partial(kernels.quantise, x, "ue8m0")
    yield "dequantise", partial(kernels.dequantise, x.to(torch.float8_e4m3fn), empty(4096, dtype=torch.float32))
    yield "hadamard", partial(kernels.hadamard, x)
    yield "quantise spread", partial(kernels.quantise, x, "float32", True)
    keys, angles = empty(36, 1, 1024, 64), (empty(1, 1024, 16), empty(1, 1024, 16))
    yield "rotate", partial(kernels.rotate, empty(1, 1024, 8, 64), *angles, "half")
    for name, scale_format in (("bf16", None), ("fp8", "float32")):
        yield f"index_keys {name}", partial(kernels.index_keys, keys, empty(36, 64), empty(36, 64), 1e-6, *angles, "half", scale_format)


def main(capability: int, operators: list[str]) -> None:
    torch.set_num_threads(1)
    rows = []
    for name, call in (pair for operator in operators for pair in globals()[operator](capability)):
        with compiling(capability) as found:
            call()
        for kernel in found:
            mode = MODES[kernel.constants["MODE"]] if "MODE" in kernel.constants else None
            row = {"call": name, "kernel": kernel.name if mode is None else f"{kernel.name} {mode}", "matrix_unit": kernel.matrix_unit}
            rows.append(row | {field: getattr(kernel, field) for field in FIELDS})
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
