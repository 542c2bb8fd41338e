"""Whole models: time to the first token, tokens a second, and what Skim's hooks cost where nothing is sparse."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from skim.bench import baselines, selections
from skim.bench.registry import Setting
from skim.config import Config
from skim.huggingface import load_model, revert, use
from skim.huggingface.attention import by_indexer, everything
from skim.huggingface.convert import attach
from skim.huggingface.state import LayerInputs
from skim.modules import IndexTensors
from skim.selection import Selection

# Shapes with random weights: the architecture's name in transformers, and its configuration.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-4b": (
        "qwen3",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "max_position_embeddings": 262144,
        },
    ),
    "qwen3-tiny": (  # for tests
        "qwen3",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 512,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
        },
    ),
}
SHORT = 1024  # tokens at which the hooks' overhead is measured
NEW_TOKENS = 48  # of a decoding run; the first half compiles and captures
CHUNK = 8192  # tokens by which a static cache is filled
PREFILLS = 2
ROUNDS, SHORT_RUNS = 6, 5  # of the hooks' overhead


def config(quick: bool) -> Config:
    """How the model reads: K=2048, an indexer of 8 heads of 64 channels, FP8 scores."""
    return Config(budget=16) if quick else Config(budget=2048, index_n_heads=8, index_head_dim=64, score_dtype="fp8")


def build(name: str, device: torch.device) -> Any:
    """The model of a name in `SHAPES`, with random weights, or of a name that `skim.load_model` knows; not converted."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in SHAPES:
        return load_model(name, dtype=dtype, device=device)[0]
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, shape = SHAPES[name]
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape), dtype=dtype)
    return model.eval()


def prompt(model: Any, s: Setting) -> Tensor:
    """Embeddings `[1, n, hidden]` of random tokens."""
    table = model.get_input_embeddings().weight
    generator = torch.Generator(s.device).manual_seed(0)
    return table[torch.randint(0, table.shape[0], (1, s.n), generator=generator, device=s.device)].detach()


def selector(s: Setting, setting: Config) -> Callable[[LayerInputs, Tensor, Tensor], Selection]:
    """How the model selects: "random" by its own indexers, whose random weights make neighbours share little.

    "overlapping" makes each selection from other index tensors of the same shapes, whose neighbours share what those of
    trained indexers do; the model's own are made all the same.
    """
    if s.kind == "random":
        return by_indexer
    shape = setting.budget, setting.index_n_heads, setting.index_head_dim
    q, k, weights = selections.index_inputs("overlapping", s.n, s.n, *shape, dtype=s.dtype, device=s.device)
    cached: list[Tensor] = []

    def select(inputs: LayerInputs, start: Tensor, end: Tensor) -> Selection:
        assert inputs.indexer is not None
        if not cached:
            cached.append(inputs.indexer.cached(k))
        S = inputs.k.shape[1]
        rows = slice(S - inputs.q.shape[1], S)
        return by_indexer(replace(inputs, index=IndexTensors(q[:, rows], cached[0][:, :S], weights[:, rows])), start, end)

    return select


def measure_model(name: str, s: Setting, parts: tuple[str, ...], report: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Rows of the parts "prefill" (time to the first token through `generate`), "hooks" and "decode", of DSA and dense.

    Dense prefill is the faster of PyTorch's own choice of attention and cuDNN's where it runs; dense decoding the
    faster of transformers' attention and Skim's `attend_dense`, both with a static cache and compiled.
    """
    model = build(name, s.device)
    setting = config(s.quick)
    embeds = prompt(model, s)
    with torch.no_grad():
        if "hooks" in parts:
            yield _hooks(model, s, setting, embeds[:, : min(SHORT, s.n)], report)
        if "prefill" in parts:
            yield _prefill(model, s, setting, embeds, report)
        if "decode" in parts:
            yield _decode(model, s, setting, embeds, report)


@contextmanager
def converted(model: Any, setting: Config) -> Iterator[None]:
    """`model` with untrained indexers, in use."""
    attach(model, setting)
    try:
        with use(model, mode="sparse"):
            yield
    finally:
        revert(model)


def first_token_seconds(model: Any, embeds: Tensor, repetitions: int) -> float:
    """Median time of `generate` with one new token, in seconds."""
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    times = []
    for _ in range(repetitions):
        _synchronise(embeds.device)
        began = time.perf_counter()
        model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
        _synchronise(embeds.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _hooks(model: Any, s: Setting, setting: Config, embeds: Tensor, report: Callable[[str], Any]) -> dict[str, Any]:
    """Prefill of a short prompt, within the budget, so that the dense attention runs: with hooks and indexers, and without, in turns.

    The overhead is that of the median round: the host, which both are bound by, drifts by more than the hooks cost.
    """
    report(f"hooks at {embeds.shape[1]} tokens")
    within = replace(setting, budget=max(setting.budget, embeds.shape[1] + 1))
    rounds, runs = (1, 2) if s.quick else (ROUNDS, SHORT_RUNS)

    def median() -> float:
        first_token_seconds(model, embeds, min(3, runs))  # transformers looks at a model anew once its attention has changed
        return first_token_seconds(model, embeds, runs)

    dense, hooked = [median()], list[float]()
    for _ in range(rounds):
        with converted(model, within):
            hooked.append(median())
        dense.append(median())
    overhead = statistics.median(2 * own / (before + after) - 1 for own, before, after in zip(hooked, dense, dense[1:]))
    ms, dense_ms = (statistics.median(times) * 1e3 for times in (hooked, dense))
    return {"part": "hooks", "n": embeds.shape[1], "ms": ms, "baseline": "dense", "baseline_ms": dense_ms, "overhead": overhead}


def _prefill(model: Any, s: Setting, setting: Config, embeds: Tensor, report: Callable[[str], Any]) -> dict[str, Any]:
    times: dict[str, float] = {}
    short = embeds[:, : max(1, s.n // 8)]
    runs = 1 if s.quick else PREFILLS
    report(f"first token of {s.n} tokens, DSA")
    select = selector(s, setting)
    with converted(model, setting), use(model, selector=select):
        first_token_seconds(model, short, 1)
        sparse = first_token_seconds(model, embeds, runs)
        peak = _peak_mib(lambda: first_token_seconds(model, embeds, 1), s.device)
        unions = _unions(model, embeds, select)
    for name, context in _dense_choices(s.device).items():
        report(f"first token of {s.n} tokens, dense ({name})")
        with context():
            first_token_seconds(model, short, 1)
            times[name] = first_token_seconds(model, embeds, runs)
    dense_peak = _peak_mib(lambda: first_token_seconds(model, embeds, 1), s.device)
    best = min(times, key=lambda name: times[name])
    return {
        "part": "prefill",
        "n": s.n,
        "ms": sparse * 1e3,
        "peak_mib": peak,
        "unions_of_8": unions,
        "baselines": {name: {"ms": t * 1e3} for name, t in times.items()},
        "baseline": best,
        "baseline_ms": times[best] * 1e3,
        "baseline_peak_mib": dense_peak,
        "ratio": times[best] / sparse,
    }


def _decode(model: Any, s: Setting, setting: Config, embeds: Tensor, report: Callable[[str], Any]) -> dict[str, Any]:
    """Milliseconds of a token behind n others. One cache, filled by the sparse model, serves every run."""
    from transformers import StaticCache

    new = 6 if s.quick else NEW_TOKENS
    cache = StaticCache(config=model.config, max_cache_len=s.n + new + 1)
    times: dict[str, float] = {}
    with converted(model, setting):
        report(f"filling a static cache with {s.n} tokens")
        for chunk in embeds.split(CHUNK, dim=1):
            model(inputs_embeds=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        report("decoding, DSA")
        sparse = _token_seconds(model, cache, s, new)
        report("decoding, dense by skim.attend_dense")
        with use(model, selector=everything):
            times["skim.attend_dense"] = _token_seconds(model, cache, s, new)
    report("decoding, dense by transformers")
    times["transformers"] = _token_seconds(model, cache, s, new)
    best = min(times, key=lambda name: times[name])
    return {
        "part": "decode",
        "n": s.n,
        "mode": "graph" if s.device.type == "cuda" else "eager",
        "ms": sparse * 1e3,
        "tokens_per_second": 1 / sparse,
        "baselines": {name: {"ms": t * 1e3, "tokens_per_second": 1 / t} for name, t in times.items()},
        "baseline": best,
        "baseline_ms": times[best] * 1e3,
        "ratio": times[best] / sparse,
    }


class _Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _token_seconds(model: Any, cache: Any, s: Setting, new: int) -> float:
    """Time of a token in `generate` over a static cache of n tokens, which transformers compiles; the first half warms up."""
    torch.compiler.reset()
    for layer in cache.layers:
        layer.cumulative_length.fill_(s.n)
    ids = torch.zeros(1, s.n + 1, dtype=torch.long, device=s.device)
    clock = _Clock()
    options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=clock, **options)
    half = len(clock.times) // 2
    return (clock.times[-1] - clock.times[half]) / (len(clock.times) - 1 - half)


def _dense_choices(device: torch.device) -> dict[str, Callable[[], Any]]:
    """PyTorch's own choice among its attention kernels; on a GPU also cuDNN's before the others."""

    @contextmanager
    def own() -> Iterator[None]:
        yield

    if device.type != "cuda":
        return {"sdpa": own}
    first = list(baselines.BACKENDS.values())
    return {"sdpa": own, "sdpa, cudnn first": lambda: sdpa_kernel(first, set_priority=True)}


def _unions(model: Any, embeds: Tensor, select: Callable[[LayerInputs, Tensor, Tensor], Selection]) -> float:
    """|union of the selections of 8 neighbouring queries| / K, the mean of the layers, over the last 512 queries."""
    found: list[float] = []

    def watched(inputs: Any, start: Tensor, end: Tensor) -> Any:
        selection = select(inputs, start, end)
        last = selections.Selection(selection.indices[:1, -512:], selection.counts[:1, -512:])
        found.append(selections.unions(last, 8))
        return selection

    with use(model, selector=watched):
        model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1)
    return statistics.mean(found)


def _peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory that `run` holds beyond the model's and the prompt's."""
    if device.type != "cuda":
        return None
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
