"""What one attention layer of DeepSeek-V3.2 costs at each position, dense and sparse, in time, money and memory.

    python benchmarks/economics.py --json benchmarks/results/h100-economics.json --plot benchmarks/results/h100-economics.png

The layer has its full size (hidden 7168, 128 heads, a latent of 512 + 64, 64 index heads of 128, K = 2048) and random
weights, as transformers initialises them. "attention" is what grows with the position: select and attend against dense
attention; "layer" adds all projections. Dense prefill reads keys and values expanded for each head, in the fastest of
PyTorch's kernels, those of earlier tokens kept; dense decoding reads all latents with `skim.attend_dense`. At position n
each query sees exactly n keys. Money is what this one of the model's 61 layers takes of 2 USD for an hour of the GPU.

Rows: D2 prefill, D3 decode of 32 rows, D4 against transformers' own layer, D5 a million tokens, D6 FP8 caches against bf16.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32RotaryEmbedding

import skim
from skim.bench.baselines import BACKENDS
from skim.bench.measure import Measured, measure
from skim.bench.roofs import Roofs, measured_roofs
from skim.bench.runner import machine, write_json
from skim.modules import LightningIndexer
from skim.modules.latents import absorb, emerge
from skim.modules.rope import frequencies
from skim.ops import codec
from skim.selection import Selection

USD_PER_HOUR = 2.0
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
SMALL = {  # the latent and the index head keep the sizes that the FP8 layouts are made for
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 16,
    "index_topk": 16,
}


@dataclass(frozen=True)
class Plan:
    """What is measured, and how large."""

    positions: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 98304, 131072)
    chunk: int = 4096  # tokens of a prefill step
    batch: int = 32  # rows that decode together
    whole: int = 8192  # tokens that transformers' layer reads at once
    million: int = 1 << 20
    sampled: tuple[int, ...] = (131072, 262144, 524288, 1 << 20)
    fp8_keys: int = 32768
    fp8_queries: int = 64
    seconds: float = 0.3  # of each measurement
    patience: float = 90.0  # seconds that the run over a million tokens may take


QUICK = Plan((32, 64, 128), 32, 2, 64, 256, (128, 256), 128, 8, 0.0)


class Index(NamedTuple):
    """What the indexer makes of hidden states, in FP8: queries `[B, T, J, E]` and keys `[B, T, E]` with scales, head weights."""

    q: tuple[Tensor, Tensor]
    k: tuple[Tensor, Tensor]
    weights: Tensor


@dataclass
class Cache:
    """Latents `[B, S, 1, 576]` and FP8 index keys `[B, S, 128]` with scales `[B, S]`, for S tokens."""

    latents: Tensor
    values: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, layer: Layer, batch: int, tokens: int) -> Cache:
        config, where = layer.config, {"device": layer.device}
        latents = torch.zeros(batch, tokens, 1, config.kv_lora_rank + config.qk_rope_head_dim, dtype=layer.dtype, **where)
        values = torch.zeros(batch, tokens, config.index_head_dim, dtype=torch.float8_e4m3fn, **where)
        return cls(latents, values, torch.zeros(batch, tokens, **where))

    @classmethod
    def filled(cls, layer: Layer, batch: int, tokens: int, chunk: int) -> Cache:
        """A cache of random tokens."""
        cache, step = cls.empty(layer, batch, tokens), max(1, chunk // batch)
        for at in range(0, tokens, step):
            hidden = layer.hidden(min(step, tokens - at), batch)
            table = layer.table(at, hidden.shape[1])
            k = layer.indexer(hidden, table, None, reads="dense").k
            cache.write(at, layer.latents(hidden, table), codec.quantise(k, spread=True))
        return cache

    def write(self, at: int, latents: Tensor, index_keys: tuple[Tensor, Tensor]) -> None:
        to = slice(at, at + latents.shape[1])
        self.latents[:, to], self.values[:, to], self.scale[:, to] = latents, *index_keys

    def upto(self, n: int) -> Cache:
        """A view of the first n tokens."""
        return Cache(self.latents[:, :n], self.values[:, :n], self.scale[:, :n])

    @property
    def mib(self) -> float:
        return (self.latents.nbytes + self.values.nbytes + self.scale.nbytes) / 2**20


class Layer:
    """transformers' attention layer with random weights, taken apart into the steps that dense and sparse reading share."""

    def __init__(self, config: DeepseekV32Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with device:
            self.attention = DeepseekV32Attention(config, 0).to(self.dtype).eval()
            self.rotary = DeepseekV32RotaryEmbedding(config)
        for parameter in self.attention.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=config.initializer_range)
        self.indexer = LightningIndexer(
            config.hidden_size,
            n_heads=config.index_n_heads,
            head_dim=config.index_head_dim,
            rope_dim=config.qk_rope_head_dim,
            query_size=config.q_lora_rank,
        )
        self.indexer.to(device, self.dtype).load_state_dict(self.attention.indexer.state_dict())
        self.scale: float = self.attention.scaling
        expansion = self.attention.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        self.into, self.out_of = expansion.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)

    def hidden(self, tokens: int, batch: int = 1) -> Tensor:
        return torch.randn(batch, tokens, self.config.hidden_size, dtype=self.dtype, device=self.device)

    def table(self, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin of `tokens` positions from `start` on."""
        positions = torch.arange(start, start + tokens, device=self.device)[None]
        return self.rotary(torch.empty(0, dtype=self.dtype, device=self.device), positions)

    def queries(self, hidden: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The query latent, queries `[B, T, H, 192]` before rotation, and their last 64 channels behind it."""
        own = self.attention
        latent = self._normed(own.q_a_proj(hidden), own.q_a_layernorm)
        q = own.q_b_proj(latent).unflatten(-1, (self.config.num_attention_heads, -1))
        return latent, q, self._rotated(q[..., self.config.qk_nope_head_dim :], table)

    def latents(self, hidden: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """`[B, T, 1, 576]`: what a cache holds of each token."""
        config = self.config
        latent, rope = self.attention.kv_a_proj_with_mqa(hidden)[:, :, None].split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        return torch.cat((self._normed(latent, self.attention.kv_a_layernorm), self._rotated(rope, table)), dim=-1)

    def index(self, hidden: Tensor, table: tuple[Tensor, Tensor], q_latent: Tensor) -> Index:
        q, k, weights = self.indexer(hidden, table, q_latent, reads="sparse")
        return Index(codec.quantise(q, spread=True), codec.quantise(k, spread=True), weights)

    def absorbed(self, q: Tensor, rope: Tensor) -> Tensor:
        """Queries `[B, T, H, 576]` that meet latents."""
        return absorb(q[..., : self.config.qk_nope_head_dim], rope, self.into)

    def whole(self, q: Tensor, rope: Tensor) -> Tensor:
        """Queries `[B, T, H, 192]` that meet keys of each head, in place."""
        q[..., self.config.qk_nope_head_dim :] = rope
        return q

    def expand(self, latents: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys `[1, S, H, 192]` and values `[1, S, H, 128]` of each head."""
        config = self.config
        latent, rope = latents[0, :, 0].split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        latent, nope = latent.expand(config.num_attention_heads, -1, -1), keys[0, ..., : config.qk_nope_head_dim]
        for weight, to in ((self.into, nope), (self.out_of, values[0])):
            torch.bmm(latent, weight.mT, out=to.transpose(0, 1))
        keys[0, ..., config.qk_nope_head_dim :] = rope[:, None]

    def output(self, read: Tensor) -> Tensor:
        """`[B, T, hidden]` of what the heads read of the latents, `[B, T, H, 512]`."""
        return self.attention.o_proj(emerge(read, self.out_of).flatten(2))

    def sparse(self, q: Tensor, index: Index, cache: Cache, start: Tensor, end: Tensor) -> Tensor:
        """What queries `[B, T, H, 576]` read of the latents that the indexer selects, `[B, T, H, 512]`."""
        selection = skim.select(index.q, (cache.values, cache.scale), index.weights, self.config.index_topk, start=start, end=end)
        assert isinstance(selection, Selection)
        return skim.attend(q, cache.latents, None, selection, v_channels=self.config.kv_lora_rank, scale=self.scale)[0]

    def step(self, hidden: Tensor, table: tuple[Tensor, Tensor], cache: Cache, at: int, start: Tensor, end: Tensor) -> Tensor:
        """The layer over the tokens `at` and after, which are cached and see the keys from `start` to `end`."""
        q_latent, q, rope = self.queries(hidden, table)
        index = self.index(hidden, table, q_latent)
        cache.write(at, self.latents(hidden, table), index.k)
        return self.output(self.sparse(self.absorbed(q, rope), index, cache.upto(at + hidden.shape[1]), start, end))

    def causal_step(self, hidden: Tensor, cache: Cache, at: int) -> Tensor:
        """The layer over the next tokens of a prompt `[1, T, hidden]`."""
        T = hidden.shape[1]
        end = torch.arange(at + 1, at + T + 1, dtype=torch.int32, device=self.device)[None]
        return self.step(hidden, self.table(at, T), cache, at, torch.zeros_like(end), end)

    def prefill(self, hidden: Tensor, chunk: int) -> Tensor:
        """The layer over a whole prompt `[1, T, hidden]`, by chunks."""
        T = hidden.shape[1]
        cache, out = Cache.empty(self, 1, T), torch.empty_like(hidden)
        for at in range(0, T, chunk):
            out[:, at : at + chunk] = self.causal_step(hidden[:, at : at + chunk], cache, at)
        return out

    @staticmethod
    def _normed(x: Tensor, norm: Any) -> Tensor:
        """x behind one of transformers' norms, in one kernel."""
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    @staticmethod
    def _rotated(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (frequencies(part, x.shape[-1]).expand(x.shape[0], -1, -1) for part in table)
        return codec.rotate(x, cos, sin, layout="interleaved")


class Runs(NamedTuple):
    """One way to read, alone and with all projections: `(operation, sets of inputs)` for `measure`."""

    attention: tuple[Callable[[Any], Tensor], list[Any]]
    layer: tuple[Callable[[Any], Tensor], list[Any]]


def sparse_runs(layer: Layer, cache: Cache, hiddens: list[Tensor]) -> Runs:
    """DSA of tokens that are the last of a cache and see all of it."""
    n, (B, T, _) = cache.latents.shape[1], hiddens[0].shape
    start, end, table = *everything(B, T, n, layer.device), layer.table(n - T, T)

    def prepared(hidden: Tensor) -> tuple[Tensor, Index]:
        q_latent, q, rope = layer.queries(hidden, table)
        return layer.absorbed(q, rope), layer.index(hidden, table, q_latent)

    return Runs(
        (lambda x: layer.sparse(*x, cache, start, end), [prepared(hidden) for hidden in hiddens]),
        (lambda hidden: layer.step(hidden, table, cache, n - T, start, end), hiddens),
    )


def dense_decode_runs(layer: Layer, cache: Cache, hiddens: list[Tensor]) -> Runs:
    """All keys, in the absorbed form."""
    n, (B, T, _) = cache.latents.shape[1], hiddens[0].shape
    start, end, table = *everything(B, T, n, layer.device), layer.table(n - T, T)

    def attention(q: Tensor) -> Tensor:
        rank = layer.config.kv_lora_rank
        return skim.attend_dense(q, cache.latents, None, start=start, end=end, v_channels=rank, scale=layer.scale)[0]

    def whole(hidden: Tensor) -> Tensor:
        _, q, rope = layer.queries(hidden, table)
        cache.latents[:, n - T :] = layer.latents(hidden, table)
        return layer.output(attention(layer.absorbed(q, rope)))

    return Runs((attention, [layer.absorbed(*layer.queries(hidden, table)[1:]) for hidden in hiddens]), (whole, hiddens))


def dense_prefill_runs(layer: Layer, cache: Cache, hiddens: list[Tensor], backend: SDPBackend) -> Runs:
    """All keys, expanded for each head; those of the tokens before are there already."""
    n, T = cache.latents.shape[1], hiddens[0].shape[1]
    table = layer.table(n - T, T)
    config = layer.config
    keys, values = (cache.latents.new_empty(1, n, config.num_attention_heads, C) for C in (config.qk_head_dim, config.v_head_dim))
    for at in range(0, n, T):
        layer.expand(*(x[:, at : at + T] for x in (cache.latents, keys, values)))

    def attention(q: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)), scale=layer.scale).transpose(1, 2)

    def whole(hidden: Tensor) -> Tensor:
        _, q, rope = layer.queries(hidden, table)
        layer.expand(layer.latents(hidden, table), keys[:, n - T :], values[:, n - T :])
        return layer.attention.o_proj(attention(layer.whole(q, rope)).flatten(2))

    return Runs((attention, [layer.whole(*layer.queries(hidden, table)[1:]) for hidden in hiddens]), (whole, hiddens))


def everything(B: int, T: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """start and end of queries that see all n keys."""
    end = torch.full((B, T), n, dtype=torch.int32, device=device)
    return torch.zeros_like(end), end


def fastest_backend(layer: Layer, plan: Plan) -> tuple[str, dict[str, float]]:
    """Which of PyTorch's kernels is the fastest for the expanded form, and the milliseconds of each that runs."""
    n = plan.positions[len(plan.positions) // 2]
    cache, hiddens = Cache.filled(layer, 1, n, plan.chunk), [layer.hidden(min(plan.chunk, n // 2))]
    times = {}
    for name, backend in backends(layer.device).items():
        try:
            run, inputs = dense_prefill_runs(layer, cache, hiddens, backend).attention
            times[name] = measure(run, inputs, layer.device, seconds=plan.seconds).ms
        except RuntimeError as error:
            print(f"dense prefill by {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return min(times, key=lambda name: times[name]), times


def backends(device: torch.device) -> dict[str, SDPBackend]:
    return BACKENDS if device.type == "cuda" else {"math": SDPBackend.MATH}


def prefill_rows(layer: Layer, plan: Plan) -> Iterator[dict[str, Any]]:
    name, times = fastest_backend(layer, plan)
    for n in plan.positions:
        T = min(plan.chunk, n // 2)
        cache, hiddens = Cache.filled(layer, 1, n, plan.chunk), [layer.hidden(T) for _ in range(2)]
        expanded_mib = n * layer.config.num_attention_heads * (layer.config.qk_head_dim + layer.config.v_head_dim) * cache.latents.itemsize / 2**20
        sparse, dense = sparse_runs(layer, cache, hiddens), dense_prefill_runs(layer, cache, hiddens, backends(layer.device)[name])
        for kind in Runs._fields:
            ours, theirs = (measure(*getattr(runs, kind), layer.device, seconds=plan.seconds) for runs in (sparse, dense))
            row = {"case": "D2", "kind": kind, "n": n, "mode": "eager", **compared(ours, theirs, T)}
            yield {**row, "baseline": f"sdpa {name}", "backends_ms": times, "cache_mib": cache.mib, "baseline_cache_mib": expanded_mib}


def decode_rows(layer: Layer, plan: Plan, roofs: Roofs) -> Iterator[dict[str, Any]]:
    graph = layer.device.type == "cuda"
    of_key = 2 * layer.config.num_attention_heads * (2 * layer.config.kv_lora_rank + layer.config.qk_rope_head_dim)  # operations of dense attention
    for n in plan.positions:
        cache, hiddens = Cache.filled(layer, plan.batch, n, plan.chunk), [layer.hidden(1, plan.batch) for _ in range(2)]
        sparse, dense = sparse_runs(layer, cache, hiddens), dense_decode_runs(layer, cache, hiddens)
        for kind in Runs._fields:
            ours, theirs = (measure(*getattr(runs, kind), layer.device, graph=graph, seconds=plan.seconds) for runs in (sparse, dense))
            row = {"case": "D3", "kind": kind, "n": n, "mode": "graph" if graph else "eager", **compared(ours, theirs, plan.batch)}
            row |= {"baseline": "skim.attend_dense", "cache_mib": cache.mib, "baseline_cache_mib": cache.latents.nbytes / 2**20}
            memory, compute = cache.latents.nbytes / roofs.copy, of_key * plan.batch * n / roofs.matmul  # seconds at least
            yield {**row, "baseline_memory_share": memory / theirs.ms * 1e3, "baseline_compute_share": compute / theirs.ms * 1e3}


def compared(ours: Measured, theirs: Measured, tokens: int) -> dict[str, Any]:
    """What a row says of two measurements of `tokens` tokens each."""
    return {
        "tokens": tokens,
        **asdict(ours),
        "usd_per_million_tokens": usd(ours.ms, tokens),
        "baseline_ms": theirs.ms,
        "baseline_peak_mib": theirs.peak_mib,
        "baseline_usd_per_million_tokens": usd(theirs.ms, tokens),
        "ratio": theirs.ms / ours.ms,
    }


def usd(ms: float, tokens: int) -> float:
    """Dollars of a million tokens, where `tokens` of them take `ms` milliseconds."""
    return ms / 1e3 / 3600 * USD_PER_HOUR / tokens * 1e6


def transformers_rows(layer: Layer, plan: Plan) -> Iterator[dict[str, Any]]:
    """A prompt at once through transformers' own layer, as long as it fits, and through ours by chunks."""
    T = plan.whole
    while plan.whole // 8 <= T:
        hidden, table = layer.hidden(T), layer.table(0, T)
        mask = torch.ones(T, T, dtype=torch.bool, device=layer.device).tril()[None, None]
        try:
            theirs = measure(lambda x, t=table, m=mask: layer.attention(x, t, m, position_ids=None)[0], [hidden], layer.device, seconds=plan.seconds)
        except torch.OutOfMemoryError as error:
            yield {"case": "D4", "kind": "layer", "n": T, "error": f"transformers: {str(error).splitlines()[0]}"}
            T //= 2
            release()
            continue
        ours = measure(lambda x: layer.prefill(x, plan.chunk), [hidden], layer.device, seconds=plan.seconds)
        row = {"case": "D4", "kind": "layer", "n": T, "mode": "eager", **compared(ours, theirs, T), "baseline": "transformers, sdpa"}
        yield {**row, "memory_ratio": theirs.peak_mib / ours.peak_mib if ours.peak_mib and theirs.peak_mib else None}
        return


def million_rows(layer: Layer, plan: Plan) -> Iterator[dict[str, Any]]:
    """Single chunks of a prompt of a million tokens at several positions, then the whole prompt if it takes no longer than `patience`."""
    cache = Cache.filled(layer, 1, plan.million, plan.chunk)
    slowest = 0.0
    for n in plan.sampled:
        at, hidden = n - plan.chunk, layer.hidden(plan.chunk)
        step = partial(layer.causal_step, cache=cache, at=at)
        took, memory = held(layer, partial(measure, step, [hidden], layer.device, seconds=plan.seconds))
        slowest = took.ms / 1e3
        money = usd(took.ms, plan.chunk)
        yield {"case": "D5", "kind": "chunk", "n": n, "tokens": plan.chunk, **asdict(took), "usd_per_million_tokens": money, **memory}
    expected = slowest * plan.million / plan.chunk / 2
    if expected > plan.patience:
        print(f"a million tokens would take some {expected:.0f} s: not run", file=sys.stderr)
        return

    def whole() -> float:
        finite, began = torch.ones((), dtype=torch.bool, device=layer.device), time.perf_counter()
        for at in range(0, plan.million, plan.chunk):
            finite &= layer.causal_step(layer.hidden(plan.chunk), cache, at).isfinite().all()
        if not bool(finite):  # waits for the device
            raise ValueError("a million tokens: the result holds NaN or infinity")
        return (time.perf_counter() - began) * 1e3

    ms, memory = held(layer, whole)
    money = usd(ms, plan.million)
    yield {"case": "D5", "kind": "whole", "n": plan.million, "tokens": plan.million, "ms": ms, "usd_per_million_tokens": money, **memory}


def held(layer: Layer, run: Callable[[], Any]) -> tuple[Any, dict[str, float | None]]:
    """What `run` returns, and the most memory that the process held meanwhile: in tensors, and reserved from the device."""
    if layer.device.type != "cuda":
        return run(), {"held_gb": None, "reserved_gb": None}
    release()
    torch.cuda.reset_peak_memory_stats(layer.device)
    result = run()
    most = torch.cuda.max_memory_allocated(layer.device), torch.cuda.max_memory_reserved(layer.device)
    return result, {"held_gb": most[0] / 1e9, "reserved_gb": most[1] / 1e9}


def fp8_rows(layer: Layer, plan: Plan) -> Iterator[dict[str, Any]]:
    """FP8 caches (656 and 132 bytes a token) against bf16 ones: what is selected, and what is read of the same selection."""
    n, T, rank, budget = plan.fp8_keys, plan.fp8_queries, layer.config.kv_lora_rank, layer.config.index_topk
    latents, keys = [], []
    for at in range(0, n, plan.chunk):
        hidden = layer.hidden(min(plan.chunk, n - at))
        table = layer.table(at, hidden.shape[1])
        latents.append(layer.latents(hidden, table).bfloat16())
        keys.append(codec.hadamard(layer.indexer(hidden, table, None, reads="dense").k.bfloat16()))
    bf16, k_index = torch.cat(latents, dim=1), torch.cat(keys, dim=1)
    hidden, table, (start, end) = layer.hidden(T), layer.table(n - T, T), everything(1, T, n, layer.device)
    q_latent, q, rope = layer.queries(hidden, table)
    q, index = layer.absorbed(q, rope).bfloat16(), layer.indexer(hidden, table, q_latent)
    q_index = codec.hadamard(index.q.bfloat16())

    def selected(q: Any, k: Any) -> Selection:
        found = skim.select(q, k, index.weights, budget, start=start, end=end)
        assert isinstance(found, Selection)
        return found

    def read(cached: Tensor, selection: Selection) -> Tensor:
        return skim.attend(q, cached, None, selection, v_channels=rank, scale=layer.scale)[0].double()

    plain = selected(q_index, k_index)
    expected = read(bf16, plain)
    scores = skim.index_scores(q_index, k_index, index.weights, start=start, end=end)[0]
    for scale_format in ("float32", "ue8m0"):
        q_fp8, k_fp8 = (codec.quantise(x, scale_format=scale_format) for x in (q_index, k_index))
        quantised = selected(q_fp8, codec.unpack(codec.pack(*k_fp8)))
        packed = through_bytes(bf16, rank, scale_format)
        beyond, overlap = differing(plain, quantised, scores, bound(q_index, q_fp8[1], k_index, k_fp8[1], index.weights))
        yield {
            "case": "D6",
            "kind": scale_format,
            "n": n,
            "tokens": T,
            "output_error": relative(read(packed, plain), expected),
            "output_error_own_selection": relative(read(packed, quantised), expected),
            "overlap": overlap,
            "beyond_bound": beyond,
        }


def through_bytes(latents: Tensor, rank: int, scale_format: str) -> Tensor:
    """bf16 latents `[B, S, 1, 576]` as 656 bytes a token give them back."""
    latent, rope = latents.split((rank, latents.shape[-1] - rank), dim=-1)
    values, scale = codec.quantise(latent.unflatten(-1, (-1, codec.LATENT_BLOCK)), scale_format=scale_format)
    values, scale, rope = codec.unpack_latent(codec.pack_latent(values.flatten(-2), scale, rope))
    return torch.cat((codec.dequantise(values.unflatten(-1, (-1, codec.LATENT_BLOCK)), scale).flatten(-2).to(rope.dtype), rope), dim=-1)


def bound(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor) -> Tensor:
    """`[T, S]`: how far FP8 may move a score at most, by half the distance of two e4m3 numbers at each of its factors."""

    def most(x: Tensor, scale: Tensor) -> Tensor:
        return scale[..., None] * torch.clamp((x / scale[..., None]).abs() * 2**-4, min=2**-10)

    q, k, weights = q[0].float(), k[0].float(), weights[0].abs() * (q.shape[-2] * q.shape[-1]) ** -0.5
    dq, dk = most(q, q_scale[0]), most(k, k_scale[0])
    of_query = ((a.abs() @ dk.T + b @ (k.abs() + dk).T, w) for a, b, w in zip(q, dq, weights))
    return torch.stack([w @ moved for moved, w in of_query])


def differing(one: Selection, other: Selection, scores: Tensor, moved: Tensor) -> tuple[int, float]:
    """How many keys only one selection has though FP8 can't have moved them past the k-th score; the share that both have."""
    a, b = (mask(selection, scores.shape[-1]) for selection in (one, other))
    kth = scores.masked_fill(~a, torch.inf).amin(-1, keepdim=True)
    beyond = (a ^ b) & ((scores - kth).abs() > moved + moved.amax(-1, keepdim=True))
    return int(beyond.sum()), float((a & b).sum() / a.sum())


def mask(selection: Selection, keys: int) -> Tensor:
    """bool `[T, keys]` of what the one row's queries read."""
    indices = selection.indices[0, :, 0].long()
    found = torch.zeros(indices.shape[0], keys + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(1, torch.where(indices < 0, keys, indices), True)[:, :keys]


def relative(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())


def run(device: torch.device, quick: bool) -> dict[str, Any]:
    """All rows, with what they depend on. A part that fails leaves a row with "error", and the others run."""
    plan = QUICK if quick else Plan()
    roofs = measured_roofs(device, quick)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        config = DeepseekV32Config(num_hidden_layers=1, rope_parameters=YARN, **(SMALL if quick else {}))
        config._attn_implementation = "sdpa"
        layer = Layer(config, device)
        parts = {
            "D2": prefill_rows(layer, plan),
            "D3": decode_rows(layer, plan, roofs),
            "D4": transformers_rows(layer, plan),
            "D5": million_rows(layer, plan),
            "D6": fp8_rows(layer, plan),
        }
        for case, part in parts.items():
            began = time.perf_counter()
            try:
                for row in part:
                    rows.append(row)
                    print(line(row), file=sys.stderr, flush=True)
            except Exception as error:
                traceback.print_exc()
                rows.append({"case": case, "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
            release()
            print(f"{case} took {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return {**machine(device), "quick": quick, "usd_per_gpu_hour": USD_PER_HOUR, "roofs": {device.type: asdict(roofs)}, "rows": rows}


def release() -> None:
    """Give back what failed or ended, so that the next measurement starts from nothing."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    head = f"{row['case']} {row['kind']} n={row['n']}"
    if "error" in row:
        return f"{head}: {row['error']}"
    told = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name not in ("n", "tokens", "repetitions")}
    return f"{head}: " + ", ".join(f"{name} {value:.4g}" for name, value in told.items())


def plot(result: dict[str, Any], path: Path) -> None:
    """Dollars of a million tokens against the position, prefill and decode, dense and DSA."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (case, name) in zip(figure.subplots(1, 2), (("D2", "prefill"), ("D3", "decode"))):
        for kind, style in (("layer", "-"), ("attention", "--")):
            rows = [row for row in result["rows"] if row["case"] == case and row.get("kind") == kind and "error" not in row]
            at = [row["n"] / 1024 for row in rows]
            axes.plot(at, [row["baseline_usd_per_million_tokens"] for row in rows], f"o{style}", color="black", label=f"dense, {kind}", markersize=3)
            axes.plot(at, [row["usd_per_million_tokens"] for row in rows], f"o{style}", color="C0", label=f"DSA, {kind}", markersize=3)
        axes.set(title=f"{name}, one of 61 layers", xlabel="position in thousands of tokens", ylabel="USD per million tokens", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"DeepSeek-V3.2's attention layer on {result['device']} at {USD_PER_HOUR:.0f} USD an hour")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--quick", action="store_true", help="sizes too small to mean anything: does it run?")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw dollars against the position")
    arguments = parser.parse_args()
    result = run(torch.device(arguments.device), arguments.quick)
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
