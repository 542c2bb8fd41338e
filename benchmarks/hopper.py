"""Times Skim's operators on an H100 beside what hand-written CUDA reached there.

    python benchmarks/hopper.py --json benchmarks/results/h100-hopper.json
    python benchmarks/hopper.py --only H1 H2

Nothing is timed before it was compared with another implementation; relative errors are printed. The peers' rates are
those of an H100 whose bf16 8192^3 product ran at 716 TFLOPS, scaled by the rate of the same product in this run. Results
are written after each part. Rows: what score.py knows as H1 to H9; "dense" is what decoding over all keys reaches, "causal"
what a prompt's first queries do, whose selections have holes at their ends.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import skim
from skim.bench.measure import measure
from skim.bench.runner import machine, write_json
from skim.bench.selections import selection
from skim.ops.codec import LATENT_BLOCK, pack_latent, quantise

MATMUL = 716e12  # operations a second where the peers were measured
T, K, D, V = 4096, 2048, 576, 512
CAUSAL = sum(min(t + 1, K) for t in range(T))  # pairs of queries and keys from the first token on
NEAR, MIDDLE, FAR = 8192, 32768, 131072
DECODING = 128  # rows that decode together
PEERS = {  # the best of each: operations a second, or seconds
    "H1": {NEAR: 597e12, MIDDLE: 546e12, FAR: 491e12},
    "H2": {NEAR: 591e12, MIDDLE: 531e12, FAR: 392e12},
    "H3": {16: 148e12, 32: 295e12},
    "H4": {1: 397e12, 2: 411e12},
    "H5": {1: 0.128e-3},
    "H6": {NEAR: 1003e12, MIDDLE: 1003e12, FAR: 992e12},
    "H7": {MIDDLE: 0.407e-3, FAR: 1.56e-3},
    "H8": {FAR: 10.3e-3},
    "H9": {NEAR: 30.2e-3},
}
DEVICE = torch.device("cuda")
Row = dict[str, Any]
SCALE = D**-0.5


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def random_rows(rows: int, keys: int, budget: int) -> Tensor:
    """int32 `[rows, budget]`: different keys in a random order."""
    return torch.rand(rows, keys, device=DEVICE).topk(budget).indices.to(torch.int32)


def causal_rows(rows: int, budget: int) -> Tensor:
    """int32 `[rows, budget]`: as many random keys of those up to its own as a row may have, -1 behind."""
    position = torch.arange(rows, device=DEVICE)
    value, index = torch.rand(rows, rows, device=DEVICE).masked_fill_(position > position[:, None], -1.0).topk(budget)
    return index.to(torch.int32).masked_fill(value < 0, -1)


def error(found: Tensor, wanted: Tensor) -> float:
    finite = wanted.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return math.inf
    return float((found[finite].double() - wanted[finite]).norm() / wanted[finite].norm())


def latents(heads: int, keys: int, channels: int, queries: int = T) -> tuple[Tensor, Tensor]:
    return draw(1, queries, heads, channels), draw(1, keys, 1, channels)


def run_shipped(q: Tensor, k: Tensor, indices: Tensor, sink: Tensor | None = None, impl: str = "hopper") -> tuple[Tensor, Tensor]:
    return skim.attend(q, k, indices=indices[None, :, None], v_channels=V, scale=SCALE, sink=sink, impl=impl)


def checked(name: str, run: Callable[..., tuple[Tensor, Tensor]], heads: int, channels: int, sink: Tensor | None = None) -> None:
    """Compare with the reference in float64: -1 anywhere, empty rows, NaN in keys that nobody reads; three times, bitwise the same."""
    queries, keys, budget = 320, 3000, 500
    q, k = latents(heads, keys + 100, channels, queries)
    k[:, keys:] = math.nan
    indices = random_rows(queries, keys, budget)
    indices[torch.rand(indices.shape, device=DEVICE) < 0.2] = -1
    indices[::5] = -1
    more = () if sink is None else (sink,)
    found = [run(q, k, indices, *more) for _ in range(3)]
    clean = k.nan_to_num(0.0).double()
    wanted = run_shipped(q.double(), clean, indices, None if sink is None else sink.double(), impl="reference")
    errors = [error(x, y) for x, y in zip(found[0], wanted)]
    same = all(torch.equal(x, y) for again in found[1:] for x, y in zip(found[0], again))
    print(f"  {name}, {heads} heads, {channels} channels: out {errors[0]:.1e}, lse {errors[1]:.1e}{'' if same else ', NOT REPEATABLE'}", flush=True)
    if not same or errors[0] > 4e-3 or errors[1] > 1e-5:
        raise ValueError(f"{name}: expected the reference's results within 4e-3 and 1e-5, got {errors}")


def matmul_rate() -> float:
    """Operations a second of a bf16 8192^3 product."""
    pairs = [(draw(8192, 8192), draw(8192, 8192)) for _ in range(3)]
    return 2 * 8192**3 / measure(lambda x: x[0] @ x[1], pairs, DEVICE, seconds=0.3).ms * 1e3


def row(
    case: str,
    n: int,
    run: Callable[[Any], Any],
    inputs: Sequence[Any],
    peer: float | None,
    flops: float | None = None,
    graph: bool = False,
    **more: Any,
) -> Row:
    """A timed row for n keys. peer: seconds, where the product ran at MATMUL."""
    ms = measure(run, inputs, DEVICE, graph=graph, seconds=0.25).ms
    return {"case": case, "kind": "-", "n": n, **more, "ms": ms, "tflops": flops and flops / ms / 1e9, "peer": peer}


def attention_flops(heads: int, pairs: float = T * K) -> float:
    return 2 * pairs * heads * (D + V)


def prefill(id_: str, heads: int) -> Iterator[Row]:
    checked("shipped", run_shipped, heads, D, draw(heads, dtype=torch.float32))
    checked("shipped", run_shipped, heads, V)
    for keys in (NEAR, MIDDLE, FAR):
        q, k = latents(heads, keys, D)
        rows = [random_rows(T, keys, K) for _ in range(4)]
        for order, sets in (("random", rows), ("ascending", [x.sort(-1).values for x in rows])):
            flops = attention_flops(heads)
            yield row(id_, keys, lambda x: run_shipped(q, k, x), sets, flops / PEERS[id_][keys], flops, kind=order, heads=heads)  # noqa: B023
    q, k = latents(heads, NEAR, D)
    yield row(
        id_,
        NEAR,
        lambda x: run_shipped(q, k, x),
        [causal_rows(T, K) for _ in range(3)],
        None,
        attention_flops(heads, CAUSAL),
        kind="causal",
        heads=heads,
    )


def few_heads() -> Iterator[Row]:
    for heads in (16, 32):
        checked("shipped", run_shipped, heads, D, draw(heads, dtype=torch.float32))
        q, k = latents(heads, NEAR, D)
        for kind in ("random", "overlapping"):
            if kind == "random":
                sets = [random_rows(T, NEAR, K) for _ in range(3)]
            else:
                sets = [selection(kind, T, NEAR, K, device=DEVICE, seed=seed).indices[0, :, 0].contiguous() for seed in range(3)]
            for impl in ("hopper", "triton"):
                run = lambda x: run_shipped(q, k, x, impl=impl)  # noqa: B023, E731
                flops = attention_flops(heads)
                yield row("H3", NEAR, run, sets, flops / PEERS["H3"][heads], flops, kind=kind, heads=heads, impl=impl)


def cached_latents(rows: int, keys: int) -> dict[str, Tensor]:
    """Latents of that many sequences in bf16 and in 656 bytes. Four are drawn; the others hold the same numbers elsewhere."""
    drawn = draw(4, keys, 1, D)
    values, scale = quantise(drawn[..., :V].unflatten(-1, (-1, LATENT_BLOCK)))
    packed = pack_latent(values.flatten(-2), scale, drawn[..., V:])
    return {"bf16": drawn.repeat(rows // 4, 1, 1, 1), "fp8": packed.repeat(rows // 4, 1, 1, 1)}


def agreed(name: str, runs: dict[str, Callable[[], tuple[Tensor, Tensor]]]) -> None:
    """Compare what two implementations make of the same inputs."""
    (out, lse), (other, other_lse) = (run() for run in runs.values())
    errors = error(out, other.double()), error(lse, other_lse.double())
    print(f"  {name}, {' against '.join(runs)}: out {errors[0]:.1e}, lse {errors[1]:.1e}", flush=True)
    if errors[0] > 6e-3 or errors[1] > 1e-5:
        raise ValueError(f"{name}: expected results within 6e-3 and 1e-5 of each other, got {errors}")


def decoding(id_: str, heads: int) -> Iterator[Row]:
    """Few queries of each of many sequences, from caches in FP8 and in bf16."""
    caches = cached_latents(DECODING, MIDDLE)
    for queries, peer in PEERS[id_].items():
        flops = attention_flops(heads, DECODING * queries * K)
        q = draw(DECODING, queries, heads, D)
        sets = [random_rows(DECODING * queries, MIDDLE, K).view(DECODING, queries, 1, K) for _ in range(3)]
        for form, k in caches.items():
            runs = {impl: partial(skim.attend, q, k, v_channels=V, scale=SCALE, impl=impl) for impl in ("hopper", "triton")}
            agreed(f"{id_} {form}", {impl: partial(run, indices=sets[0]) for impl, run in runs.items()})
            for impl, run in runs.items():
                seconds = peer if id_ == "H5" else flops / peer
                more = {"kind": form, "heads": heads, "queries": queries, "impl": impl}
                yield row(id_, MIDDLE, lambda x: run(indices=x), sets, seconds, flops, graph=True, **more)  # noqa: B023


def dense_decoding() -> Iterator[Row]:
    """One query of each of 32 sequences over all of 128k keys."""
    rows, heads = 32, 128
    end = torch.full((rows, 1), FAR, dtype=torch.int32, device=DEVICE)
    sets = [draw(rows, 1, heads, D) for _ in range(2)]
    for form, k in cached_latents(rows, FAR).items():
        options = {"start": torch.zeros_like(end), "end": end, "v_channels": V, "scale": SCALE}
        runs = {impl: partial(skim.attend_dense, k=k, impl=impl, **options) for impl in ("hopper", "triton")}
        agreed(f"dense {form}", {impl: partial(run, sets[0]) for impl, run in runs.items()})
        for impl, run in runs.items():
            found = row("dense", FAR, lambda x: run(x), sets, None, attention_flops(heads, rows * FAR), graph=True, kind=form, heads=heads, impl=impl)  # noqa: B023
            yield {**found, "tb_per_s": k.nbytes / found["ms"] / 1e9}


def index_tensors(queries: int, keys: int) -> tuple[Any, Any, Tensor]:
    return quantise(draw(1, queries, 64, 128)), quantise(draw(1, keys, 128)), draw(1, queries, 64, dtype=torch.float32)


def scores() -> Iterator[Row]:
    small = index_tensors(40, 3000)
    found, wanted = (skim.ops.index_scores(*small, impl=impl) for impl in ("auto", "reference"))
    print(f"  index scores: {error(found, wanted.double()):.1e}", flush=True)
    for keys in (NEAR, MIDDLE, FAR):
        inputs = [index_tensors(T, keys) for _ in range(3)]
        start, end = (x.to(DEVICE) for x in skim.visible(keys, T))  # the peer is given intervals, too
        flops = 2.0 * T * (keys - (T - 1) / 2) * 64 * 128
        yield row("H6", keys, lambda x: skim.ops.index_scores(*x, start=start, end=end), inputs, flops / PEERS["H6"][keys], flops)  # noqa: B023


def top_k() -> Iterator[Row]:
    select = import_module("skim.ops.select.triton")
    for keys in (MIDDLE, FAR):
        inputs = [draw(T, keys, dtype=torch.float32) for _ in range(2)]
        interval = torch.zeros(T, dtype=torch.int32, device=DEVICE), torch.full((T,), keys, dtype=torch.int32, device=DEVICE)
        found = select.top_k(inputs[0], *interval, K)[0]
        same = torch.equal(found[:64].long(), inputs[0][:64].topk(K).indices.sort(-1).values)
        print(f"  top-k of {keys >> 10}k: {'the same keys as' if same else 'OTHER KEYS than'} torch.topk", flush=True)
        yield row("H7", keys, lambda x: select.top_k(x, *interval, K), inputs, PEERS["H7"][keys])  # noqa: B023


def selecting() -> Iterator[Row]:
    inputs = [index_tensors(T, FAR) for _ in range(2)]
    yield row("H8", FAR, lambda x: skim.select(*x, K), inputs, PEERS["H8"][FAR])


def training() -> Iterator[Row]:
    q, k = latents(128, NEAR, D)
    sets = []
    for _ in range(3):
        leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
        out, lse = skim.attend(*leaves, indices=causal_rows(T, K)[None, :, None], v_channels=V, scale=SCALE)
        sets.append((out, leaves, torch.randn_like(out)))
    flops = 2.0 * CAUSAL * 128 * (3 * D + 2 * V)
    yield row("H9", NEAR, lambda x: torch.autograd.grad(x[0], x[1], x[2], retain_graph=True), sets, PEERS["H9"][NEAR], flops)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "H1": lambda: prefill("H1", 128),
    "H2": lambda: prefill("H2", 64),
    "H3": few_heads,
    "H4": lambda: decoding("H4", 128),
    "H5": lambda: decoding("H5", 16),
    "dense": dense_decoding,
    "H6": scores,
    "H7": top_k,
    "H8": selecting,
    "H9": training,
}


def shown(row: Row, rate: float) -> str:
    parts = [f"{row['case']} {', '.join(str(row[key]) for key in ('kind', 'n', 'heads', 'queries', 'impl') if key in row)}: {row['ms']:.3f} ms"]
    if row["tflops"]:
        parts.append(f"{row['tflops']:.0f} TFLOPS")
    if "tb_per_s" in row:
        parts.append(f"{row['tb_per_s']:.2f} TB/s of keys")
    if row["ratio"]:
        parts.append(f"{row['ratio']:.3f} of the peer's rate at {rate / 1e12:.0f} TFLOPS")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write results here")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("expected an NVIDIA GPU of sm_90")
    torch.manual_seed(0)
    rates: dict[str, list[float]] = {}
    rows: list[Row] = []
    about = {**machine(DEVICE), "quick": False, "peers": f"one H100, bf16 8192^3 at {MATMUL / 1e12:.0f} TFLOPS"}
    for part in args.only:
        rate = matmul_rate()
        for found in PARTS[part]():
            peer = found.pop("peer")
            found["ratio"] = peer and peer * MATMUL / rate / (found["ms"] / 1e3)
            rows.append(found)
            print(shown(found, rate), flush=True)
        rates[part] = [rate / 1e12, matmul_rate() / 1e12]
        if args.json:
            write_json(args.json, {**about, "matmul_tflops": rates, "rows": rows})
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
