"""The cases of `skim bench`: inputs, the operation, what it is compared with, and what it has to do at least.

Letters as in the manual: B batch, T queries, S keys, H query heads, G key heads, D channels, J and E the indexer's
heads and channels, K budget; n is the length of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from skim.bench import baselines, selections
from skim.bench.roofs import Stage
from skim.bench.selections import KINDS, IndexInputs
from skim.ops import align, attend, attend_dense, codec, dispatch, index_scores, select
from skim.selection import Selection

SETS = 3  # of differing inputs, taken in turn


@dataclass(frozen=True)
class Setting:
    """What a case is built for.

    Attributes:
        n: the length.
        kind: of the selections, one of `KINDS`, or "-" where a case has none.
        device: where it runs.
        quick: sizes that any machine manages at once, for tests.
    """

    n: int
    kind: str
    device: torch.device
    quick: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def size(self, full: int, quick: int) -> int:
        return min(quick, self.n) if self.quick else full

    def draw(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=self.dtype)

    def index(self, T: int, budget: int, heads: int, channels: int, seed: int, batch: int = 1) -> IndexInputs:
        kind = "random" if self.kind == "-" else self.kind
        return selections.index_inputs(kind, T, self.n, budget, heads, channels, batch=batch, dtype=self.dtype, device=self.device, seed=seed)


@dataclass
class Problem:
    """A case at one setting.

    Attributes:
        inputs: sets of inputs that differ.
        run: the operation, of one of them.
        stages: what it has to do at least.
        baselines: what it is compared with, of the same inputs.
        dense: what dense attention has to do, if that is what it is compared with.
        tuned: what the baseline has to do, if it is the same operator at another shape: they are compared by time for an operation.
    """

    inputs: list[Any]
    run: Callable[[Any], Any]
    stages: list[Stage]
    baselines: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    dense: Stage | None = None
    tuned: Stage | None = None


@dataclass(frozen=True)
class Case:
    """One entry of the registry.

    Attributes:
        id: K1 to K12 are those of the scoreboard.
        what: what is measured, in one sentence.
        build: makes the problem of a setting.
        lengths: n on the device that the case is for.
        quick: n for tests, and where a case for GPUs runs on a CPU.
        kinds: of selections.
        device: "cuda" or "cpu".
        graphs: whether it is also measured as CUDA graphs.
        threads: of a CPU.
        seconds: about how long a figure's repetitions last.
    """

    id: str
    what: str
    build: Callable[[Setting], Problem]
    lengths: tuple[int, ...]
    quick: int
    kinds: tuple[str, ...]
    device: str = "cuda"
    graphs: bool = False
    threads: int | None = None
    seconds: float = 1.0


CASES: dict[str, Case] = {}


def case(
    id: str, lengths: tuple[int, ...], quick: int = 128, kinds: tuple[str, ...] = KINDS, **choices: Any
) -> Callable[[Callable[[Setting], Problem]], Callable[[Setting], Problem]]:
    """Registers a function that builds a problem; its docstring says what is measured."""

    def register(build: Callable[[Setting], Problem]) -> Callable[[Setting], Problem]:
        CASES[id] = Case(id, " ".join((build.__doc__ or "").split()), build, lengths, quick, kinds, **choices)
        return build

    return register


class Heads(NamedTuple):
    """H query heads, G key and value heads of D channels; J index heads of E channels."""

    H: int
    G: int
    D: int
    J: int
    E: int


WIDE = Heads(32, 2, 128, 8, 64)  # two key heads: what a tensor-parallel rank of a large model holds
COMMON = Heads(32, 8, 128, 4, 64)  # Llama 3, Qwen 3
SMOLLM2 = Heads(9, 3, 64, 4, 64)


class Attention(NamedTuple):
    """What an attention layer with an indexer has at hand, and the gradient that comes back to it."""

    q: Tensor
    k: Tensor
    v: Tensor
    indexer: IndexInputs
    grad: Tensor


def attention_inputs(s: Setting, heads: Heads, budget: int, *, gradients: bool = False, T: int | None = None, batch: int = 1) -> list[Attention]:
    T = s.n if T is None else T
    sets = []
    for seed in range(SETS):
        q, grad = (s.draw(batch, T, heads.H, heads.D, seed=10 * seed + i) for i in (0, 1))
        k, v = (s.draw(batch, s.n, heads.G, heads.D, seed=10 * seed + i) for i in (2, 3))
        index = s.index(T, budget, heads.J, heads.E, seed, batch)
        if gradients:
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            index = IndexInputs(*(x.requires_grad_() for x in index))
        sets.append(Attention(q, k, v, index, grad))
    return sets


def selected_pairs(T: int, S: int, budget: int) -> int:
    """Sum over the last T of S positions of min(K, position + 1)."""
    full = min(T, max(0, S - budget + 1))  # rows that see K keys or more
    first = S - T + 1
    return full * budget + sum(range(first, first + T - full))


def visible_pairs(T: int, S: int) -> int:
    return selected_pairs(T, S, S)


def attention_stage(heads: Heads, pairs: int, name: str = "attention", each: str = "min(K, t)", factor: float = 1.0, element: int = 2) -> Stage:
    """Two matrix products of D channels for each head and pair, `factor` times; a pair reads a key and a value of each key head."""
    flops = 4 * factor * heads.H * heads.D * pairs
    formula = f"{4 * factor:g} H D sum_t {each}"
    return Stage(name, formula, flops=flops, gathered=0 if name == "dense" else 2 * element * heads.G * heads.D * pairs)


def indexer_stage(heads: Heads, pairs: int, fp8: bool) -> Stage:
    flops = 2 * heads.J * heads.E * pairs
    return Stage("indexer", "2 J E sum_t t", **({"fp8_flops": flops} if fp8 else {"flops": flops}))


def select_fp8(index: IndexInputs, budget: int) -> Selection:
    """Selection by FP8 scores, as a converted model makes it: rotated, quantised, scored, selected."""
    q, k = (codec.quantise(codec.hadamard(x.detach())) for x in (index.q, index.k))
    found = select(q, k, index.weights, budget)
    assert isinstance(found, Selection)
    return found


def _of_qkv(f: baselines.Attention) -> Callable[[Any], Tensor]:
    return lambda x: f(x.q, x.k, x.v)


def dense_forward(s: Setting) -> dict[str, Callable[[Any], Any]]:
    """Baselines of the forward pass, of inputs that have q, k and v."""
    return {name: _of_qkv(f) for name, f in baselines.dense_attentions(s.device).items()}


def dense_backward(s: Setting) -> dict[str, Callable[[Any], Any]]:
    """Baselines of forward and backward, of inputs that have q, k, v and the output's gradient."""

    def of(attention: baselines.Attention) -> Callable[[Any], Any]:
        step = baselines.forward_and_backward(attention)
        return lambda x: step(x.q, x.k, x.v, x.grad)

    return {name: of(attention) for name, attention in baselines.dense_attentions(s.device).items()}


def forward_problem(s: Setting, heads: Heads, budget: int, *, fp8: bool = True) -> Problem:
    """Select and attend against dense attention."""

    def run(x: Attention) -> Any:
        selection = select_fp8(x.indexer, budget) if fp8 else select(x.indexer.q, x.indexer.k, x.indexer.weights, budget)
        assert isinstance(selection, Selection)
        return attend(x.q, x.k, x.v, selection)

    n, element = s.n, s.dtype.itemsize
    stages = [indexer_stage(heads, visible_pairs(n, n), fp8), attention_stage(heads, selected_pairs(n, n, budget), element=element)]
    dense = attention_stage(heads, visible_pairs(n, n), "dense", "t")
    return Problem(attention_inputs(s, heads, budget), run, stages, dense_forward(s), dense)


def training_problem(s: Setting, heads: Heads, budget: int) -> Problem:
    """Select, attend, sparse alignment, and the backward of all, against dense attention's forward and backward."""

    def run(x: Attention) -> Any:
        selection = select_fp8(x.indexer, budget)
        out, lse = attend(x.q, x.k, x.v, selection)
        loss = align(x.q, x.k, *x.indexer, selection=selection, lse=lse)
        leaves = x.q, x.k, x.v, *x.indexer
        return (out.detach(), loss.detach(), *torch.autograd.grad((out, loss), leaves, (x.grad, torch.ones_like(loss))))

    n, pairs = s.n, selected_pairs(s.n, s.n, budget)
    aligned = Stage("alignment", "(2 H D + 6 J E) sum_t min(K, t)", flops=(2 * heads.H * heads.D + 6 * heads.J * heads.E) * pairs)
    stages = [indexer_stage(heads, visible_pairs(n, n), True), attention_stage(heads, pairs, factor=3.5, element=s.dtype.itemsize), aligned]
    dense = attention_stage(heads, visible_pairs(n, n), "dense", "t", factor=3.5)
    return Problem(attention_inputs(s, heads, budget, gradients=True), run, stages, dense_backward(s), dense)


# ---- the scoreboard -------------------------------------------------------------------------------------------------


@case("K1", (4096, 8192, 16384, 32768, 65536, 131072))
def whole_attention(s: Setting) -> Problem:
    """Whole DSA attention forward: FP8 scores (J=8, E=64), selection of K=2048, attention of 32/2 heads of 128; against dense SDPA."""
    return forward_problem(s, WIDE, s.size(2048, s.n // 4))


@case("K2", (8192, 32768, 131072))
def whole_training(s: Setting) -> Problem:
    """Forward and backward of K1 with the sparse alignment loss; against dense SDPA's forward and backward."""
    return training_problem(s, WIDE, s.size(2048, s.n // 4))


@case("K3", (131072,), quick=512, kinds=("random",), graphs=True)
def decoding(s: Setting) -> Problem:
    """Decode: one query of each of 32 rows over n keys, FP8 scores, K=2048, 32/2 heads of 128; against SDPA and our own attention over all keys."""
    B, budget, heads = s.size(32, 2), s.size(2048, s.n // 4), WIDE

    class Step(NamedTuple):
        q: Tensor
        k: Tensor
        v: Tensor
        q_index: Tensor
        cached: tuple[Tensor, Tensor]
        weights: Tensor

    inputs = []
    for x in attention_inputs(s, heads, budget, T=1, batch=B):
        inputs.append(Step(x.q, x.k, x.v, x.indexer.q, codec.quantise(codec.hadamard(x.indexer.k)), x.indexer.weights))

    def run(x: Step) -> Any:
        selection = select(codec.quantise(codec.hadamard(x.q_index)), x.cached, x.weights, budget)
        assert isinstance(selection, Selection)
        return attend(x.q, x.k, x.v, selection)

    index_bytes = B * s.n * (heads.E + codec.SCALE_BYTES)
    scoring = Stage("indexer", "2 J E n", fp8_flops=2 * heads.J * heads.E * B * s.n, moved=index_bytes)
    compared = {name: _of_qkv(f) for name, f in baselines.dense_attentions(s.device, prefill=False).items()}
    compared["skim.attend_dense"] = _of_qkv(lambda q, k, v: attend_dense(q, k, v)[0])
    stages = [scoring, attention_stage(heads, B * budget, each="K", element=s.dtype.itemsize)]
    return Problem(inputs, run, stages, compared, attention_stage(heads, B * s.n, "dense", "n"))


class Selected(NamedTuple):
    """Attention with its selection at hand."""

    q: Tensor
    k: Tensor
    v: Tensor
    selection: Selection
    grad: Tensor


def selected_inputs(s: Setting, heads: Heads, budget: int, *, gradients: bool = False) -> list[Selected]:
    sets = []
    for seed in range(SETS):
        q, grad = (s.draw(1, s.n, heads.H, heads.D, seed=10 * seed + i) for i in (0, 1))
        k, v = (s.draw(1, s.n, heads.G, heads.D, seed=10 * seed + i) for i in (2, 3))
        if gradients:
            q, k, v = (x.requires_grad_() for x in (q, k, v))
        sets.append(Selected(q, k, v, selections.selection(s.kind, s.n, s.n, budget, device=s.device, seed=seed), grad))
    return sets


def attend_problem(s: Setting, heads: Heads, budget: int) -> Problem:
    stages = [attention_stage(heads, selected_pairs(s.n, s.n, budget), element=s.dtype.itemsize)]
    dense = attention_stage(heads, visible_pairs(s.n, s.n), "dense", "t")
    return Problem(selected_inputs(s, heads, budget), lambda x: attend(x.q, x.k, x.v, x.selection), stages, dense_forward(s), dense)


@case("K4", (131072,))
def attention_alone(s: Setting) -> Problem:
    """`attend` forward alone, unions of neighbouring selections included: 32/2 heads of 128, K=2048; against dense SDPA."""
    return attend_problem(s, WIDE, s.size(2048, s.n // 4))


class Scored(NamedTuple):
    """FP8 index tensors with their causal interval."""

    q: tuple[Tensor, Tensor]
    k: tuple[Tensor, Tensor]
    weights: Tensor


@case("K5", (8192, 32768, 131072), kinds=("-",))
def fp8_scores(s: Setting) -> Problem:
    """FP8 index scores of 4096 queries over n keys, J=64, E=128; against DeepGEMM if installed."""
    T, J, E = s.size(4096, s.n // 4), s.size(64, 4), s.size(128, 32)
    inputs = []
    for seed in range(SETS):
        index = s.index(T, 1, J, E, seed)
        inputs.append(Scored(codec.quantise(index.q), codec.quantise(index.k), index.weights))
    end = torch.arange(s.n - T + 1, s.n + 1, dtype=torch.int32, device=s.device)
    start = torch.zeros_like(end)

    def compare(f: Callable[..., Tensor]) -> Callable[[Scored], Tensor]:
        return lambda x: f(x.q[0][0], x.k[0][0], x.k[1][0], (x.weights * x.q[1] * (J * E) ** -0.5)[0], start, end)

    pairs = visible_pairs(T, s.n)
    stage = Stage("indexer", "2 J E sum_t t", fp8_flops=2 * J * E * pairs, moved=4 * T * s.n)
    compared = {name: compare(f) for name, f in baselines.index_kernels().items()}
    return Problem(inputs, lambda x: index_scores(x.q, x.k, x.weights), [stage], compared)


@case("K6", (8192, 32768, 131072), kinds=("-",))
def selection_alone(s: Setting) -> Problem:
    """Top-2048 of 4096 rows of n float32 scores, indices ascending, recent ones first among equals; against torch.topk, which promises neither."""
    rows, budget = s.size(4096, 64), s.size(2048, s.n // 4)
    inputs = [s.draw(rows, s.n, seed=seed).float() for seed in range(SETS)]
    start = torch.zeros(rows, dtype=torch.int32, device=s.device)
    end = torch.full_like(start, s.n)
    if dispatch.choice("select", s.device) in ("hopper", "triton"):
        top_k = import_module("skim.ops.select.triton").top_k

        def run(scores: Tensor) -> Any:
            return top_k(scores, start, end, budget)

    else:
        top = import_module("skim.ops.select.reference").top

        def run(scores: Tensor) -> Any:
            return Selection.from_mask(top(scores, start, end, budget, 0, 0, 0)[None, :, None], budget)

    stage = Stage("selection", "none", moved=4 * rows * s.n + 4 * rows * budget)
    return Problem(inputs, run, [stage], {"torch.topk": lambda scores: baselines.top_k(scores, budget)})


@case("K7", (8192, 32768), kinds=("-",))
def dense_alignment(s: Setting) -> Problem:
    """Dense alignment loss and its gradients from the attention's lse, 9/3 heads of 64, J=4, E=64; against dense SDPA's forward and backward."""
    heads = SMOLLM2

    class Taught(NamedTuple):
        q: Tensor
        k: Tensor
        v: Tensor
        indexer: IndexInputs
        grad: Tensor
        lse: Tensor

    inputs = [Taught(*x, attend_dense(x.q, x.k, x.v)[1].detach()) for x in attention_inputs(s, heads, 1, gradients=True)]

    def run(x: Taught) -> Any:
        loss = align(x.q, x.k, *x.indexer, lse=x.lse)
        return (loss.detach(), *torch.autograd.grad(loss, tuple(x.indexer)))

    pairs = visible_pairs(s.n, s.n)
    each = 2 * heads.H * heads.D + 6 * heads.J * heads.E  # scores of both, and two more products for the indexer's gradients
    stage = Stage("alignment", "(2 H D + 6 J E) sum_t t", flops=each * pairs)
    return Problem(inputs, run, [stage], dense_backward(s), attention_stage(heads, pairs, "dense", "t", factor=3.5))


@case("K8", (131072,))
def training_memory(s: Setting) -> Problem:
    """Memory of K2: what one layer's training step holds beyond inputs and results, its selection included."""
    problem = training_problem(s, WIDE, s.size(2048, s.n // 4))
    problem.inputs = problem.inputs[:1]
    problem.baselines = {}
    return problem


@case("K8-layers", (65536,), quick=64, kinds=("random",))
def checkpointed_layers(s: Setting) -> Problem:
    """Memory of 32 checkpointed layers of select and attend, forward and backward, beyond inputs and layer outputs."""
    layers, budget = s.size(32, 4), s.size(2048, s.n // 4)

    def layer(hidden: Tensor, x: Attention) -> Tensor:
        out, _ = attend(hidden, x.k, x.v, select_fp8(x.indexer, budget))
        return hidden + out

    def run(x: Attention) -> Any:
        outputs = [x.q]
        for _ in range(layers):
            outputs.append(checkpoint(layer, outputs[-1], x, use_reentrant=False))
        gradients = torch.autograd.grad(outputs[-1], (x.q, x.k, x.v), x.grad)
        return (*(out.detach() for out in outputs[1:]), *gradients)

    pairs = selected_pairs(s.n, s.n, budget)
    attended = attention_stage(WIDE, pairs, factor=4.5 * layers, element=s.dtype.itemsize)  # forward twice
    stages = [indexer_stage(WIDE, 2 * layers * visible_pairs(s.n, s.n), True), attended]
    return Problem(attention_inputs(s, WIDE, budget, gradients=True)[:1], run, stages)


@case("K8-million", (1 << 20,), quick=1024)
def million_keys(s: Setting) -> Problem:
    """Selection of K=2048 among a million keys by FP8 scores (J=8, E=64), for the last 8192 queries."""
    T, budget = s.size(8192, s.n // 8), s.size(2048, s.n // 4)
    inputs = [s.index(T, budget, 8, 64, seed) for seed in range(SETS)]
    return Problem(inputs, lambda x: select_fp8(x, budget), [indexer_stage(WIDE, visible_pairs(T, s.n), True)])


@case("K9", (8192, 32768), device="cpu", threads=2)
def on_a_cpu(s: Setting) -> Problem:
    """Select and attend on two CPU cores: 9/3 heads of 64, J=4, E=64, K=512, float32; against SDPA."""
    return forward_problem(s, SMOLLM2, s.size(512, s.n // 4), fp8=False)


@case("K12", (100_000, 150_000))
def examples(s: Setting) -> Problem:
    """Two examples, n=100k with K=1000 and n=150k with K=3000: operations, time and memory of K1's attention, DSA and dense."""
    return forward_problem(s, WIDE, s.size({100_000: 1000, 150_000: 3000}.get(s.n, 1000), s.n // 4))


# ---- every operator by itself ---------------------------------------------------------------------------------------


@case("attend-forward", (8192, 32768, 131072))
def attend_forward(s: Setting) -> Problem:
    """`attend` forward, 32/8 heads of 128, K=2048; against dense SDPA."""
    return attend_problem(s, COMMON, s.size(2048, s.n // 4))


@case("attend-backward", (8192, 32768))
def attend_backward(s: Setting) -> Problem:
    """`attend` forward and backward, 32/8 heads of 128, K=2048; against dense SDPA's."""
    budget = s.size(2048, s.n // 4)

    def run(x: Selected) -> Any:
        out, _ = attend(x.q, x.k, x.v, x.selection)
        return (out.detach(), *torch.autograd.grad(out, (x.q, x.k, x.v), x.grad))

    stages = [attention_stage(COMMON, selected_pairs(s.n, s.n, budget), factor=3.5, element=s.dtype.itemsize)]
    dense = attention_stage(COMMON, visible_pairs(s.n, s.n), "dense", "t", factor=3.5)
    return Problem(selected_inputs(s, COMMON, budget, gradients=True), run, stages, dense_backward(s), dense)


@case("attend-dense", (8192, 32768), kinds=("-",))
def dense_with_lse(s: Setting) -> Problem:
    """`attend_dense` forward, 32/8 heads of 128; against dense SDPA, which gives no lse."""
    stage = attention_stage(COMMON, visible_pairs(s.n, s.n), "dense", "t")
    return Problem(attention_inputs(s, COMMON, 1), lambda x: attend_dense(x.q, x.k, x.v), [stage], dense_forward(s), stage)


@case("attend-latent", (8192, 32768, 131072))
def attend_latent(s: Setting) -> Problem:
    """`attend` forward in DeepSeek's latent space: the last 4096 queries, 128 heads, 576/512 channels, K=2048; against FlashMLA if installed."""
    T, H, D, V, budget = s.size(4096, s.n // 4), s.size(128, 4), s.size(576, 48), s.size(512, 32), s.size(2048, s.n // 4)
    inputs = []
    for seed in range(SETS):
        found = selections.selection(s.kind, T, s.n, budget, device=s.device, seed=seed)
        inputs.append((s.draw(1, T, H, D, seed=10 * seed), s.draw(1, s.n, 1, D, seed=10 * seed + 1), found))
    pairs = selected_pairs(T, s.n, budget)
    stage = Stage("attention", "2 H (D + V) sum_t min(K, t)", flops=2 * H * (D + V) * pairs, gathered=D * s.dtype.itemsize * pairs)

    def compare(f: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda x: f(x[0][0], x[1][0], x[2].indices[0], D**-0.5)

    compared = {name: compare(f) for name, f in baselines.latent_kernels().items()}
    return Problem(inputs, lambda x: attend(x[0], x[1], None, x[2], v_channels=V), [stage], compared)


@case("select", (8192, 32768, 131072))
def select_bf16(s: Setting) -> Problem:
    """`select` by bf16 scores, J=4, E=64, K=512."""
    budget = s.size(512, s.n // 4)
    inputs = [s.index(s.n, budget, 4, 64, seed) for seed in range(SETS)]
    return Problem(inputs, lambda x: select(x.q, x.k, x.weights, budget), [indexer_stage(COMMON, visible_pairs(s.n, s.n), False)])


@case("select-cached", (131072,), kinds=("decode rows", "decode pages", "prefill rows", "prefill pages"))
def select_cached(s: Setting) -> Problem:
    """`select` from the bytes of an FP8 cache, J=64, E=128, K=2048: 8 queries in 8 texts or 4096 in one; against unpacking all keys first."""
    step, form = s.kind.split()
    B, T = (s.size(8, 2), 1) if step == "decode" else (1, s.size(4096, s.n // 4))
    J, E, budget, page = s.size(64, 4), s.size(128, 32), s.size(2048, s.n // 4), s.size(64, 16)
    end = torch.arange(s.n - T + 1, s.n + 1, dtype=torch.int32, device=s.device).expand(B, T).contiguous()
    start = torch.zeros_like(end)
    table = torch.arange(B * s.n // page, dtype=torch.int32, device=s.device).flip(0).view(B, -1)

    class Step(NamedTuple):
        q: tuple[Tensor, Tensor]
        packed: Tensor
        weights: Tensor

    def draw(seed: int) -> Step:
        q, keys = codec.quantise(s.draw(B, T, J, E, seed=10 * seed)), codec.quantise(s.draw(B, s.n, E, seed=10 * seed + 1))
        packed = codec.pack(*keys) if form == "rows" else codec.pack_pages(*keys, page).flatten(0, 1)
        return Step(q, packed, s.draw(B, T, J, seed=10 * seed + 2))

    def unpacked(x: Step) -> Any:
        keys = codec.unpack(x.packed) if form == "rows" else codec.unpack_pages(x.packed[table.long()], page)
        return select(x.q, keys, x.weights, budget, start=start, end=end)

    def run(x: Step) -> Any:
        return select(x.q, x.packed, x.weights, budget, start=start, end=end, block_table=None if form == "rows" else table)

    pairs = B * visible_pairs(T, s.n)
    stage = Stage("indexer", "2 J E sum_t t", fp8_flops=2 * J * E * pairs, moved=B * s.n * (E + codec.SCALE_BYTES))
    return Problem([draw(seed) for seed in range(SETS)], run, [stage], {"unpacked first": unpacked})


@case("index-scores", (8192, 32768), kinds=("-",))
def scores_bf16(s: Setting) -> Problem:
    """`index_scores` of 4096 queries over n keys by bf16, J=4, E=64."""
    T = s.size(4096, s.n // 4)
    pairs = visible_pairs(T, s.n)
    stage = Stage("indexer", "2 J E sum_t t", flops=2 * 4 * 64 * pairs, moved=4 * T * s.n)
    return Problem([s.index(T, 1, 4, 64, seed) for seed in range(SETS)], lambda x: index_scores(*x), [stage])


@case("quantise", (131072,), kinds=("-",))
def quantise(s: Setting) -> Problem:
    """`codec.quantise` of n tokens of 8 index heads of 64 channels."""
    inputs = [s.draw(1, s.n, 8, 64, seed=seed) for seed in range(SETS)]
    stage = Stage("quantisation", "none", moved=inputs[0].numel() * (s.dtype.itemsize + 1) + s.n * 8 * 4)
    return Problem(inputs, codec.quantise, [stage])
