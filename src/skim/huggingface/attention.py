"""The hooks and the attention function of a converted model.

decoder pre-hook: opens a `Forward` (the settings in force) and passes it down among the keyword arguments.
in front of an attention's forward: makes the index tensors, keeps index keys in the cache, hands both over.
attention function: selects, attends, aligns; or calls the attention that the model had before.
decoder hook: makes the index keys that nothing read, those of all layers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skim.huggingface import record
from skim.huggingface.cache import append_index_keys, holds_index_keys, indexed_layer, layer_of, takes_late_index_keys
from skim.huggingface.masks import PREFIX, is_decided_dense, is_visibility, sees_no_more, unpack_visibility
from skim.huggingface.state import Forward, HandOver, LayerInputs, State, Waiting, source_of
from skim.modules import IndexTensors, LightningIndexer
from skim.modules.indexer import cached_keys
from skim.modules.latents import unpack
from skim.ops import align, attend, attend_dense
from skim.ops.workspace import workspace
from skim.selection import Selection

# What families pass to the attention function that changes nothing in a sparse one: visibility already holds it, or it
# is bookkeeping. Anything else that isn't None would change the result, so it is refused by name.
HARMLESS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "is_causal",
    "layer_idx",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "sliding_window",
    "tokenizer",
    "use_cache",
}


def open_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of the decoder."""
    state: State = decoder.skim_state  # type: ignore[assignment]
    if getattr(decoder, "_is_replica", False):  # its attentions' bound forwards are those of the original
        raise ValueError("model: expected one that DistributedDataParallel wraps (torchrun), got a replica of nn.DataParallel's")
    now = decoder.config._attn_implementation  # type: ignore[union-attr]
    if now != PREFIX + state.original:
        raise ValueError(
            f"attn_implementation: expected {PREFIX + state.original!r}, which skim.convert set, got {now!r} since; "
            "call skim.revert(model) first, or skim.use(model, mode='dense') to read densely"
        )
    wanted = kwargs.get("output_attentions")
    if state.limit is not None and (decoder.config.output_attentions if wanted is None else wanted):  # type: ignore[union-attr]
        raise ValueError("output_attentions: expected False in sparse attention, which makes no matrix of weights; skim.use(model, mode='dense')")
    grad = torch.is_grad_enabled()
    tied = state.recording and grad and _trains(decoder)
    unaveraged = state.recording and not grad and DistributedDataParallel._active_ddp_module is not None
    # Not where a compiler fuses what makes them, nor where weights may be somewhere else by then (sharded over processes).
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    late = not (distributed or torch.compiler.is_compiling())
    settings = state.config, state.letters, state.mode, state.selector, state.recording, state.keeping, state.serial
    forward = Forward(*settings, tied, unaveraged, late)
    return args, {**kwargs, "skim": forward}


def close_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Hook of the decoder, behind its forward pass."""
    _make_waiting(kwargs["skim"])


def _trains(decoder: nn.Module) -> bool:
    """Whether anything but the indexers takes gradients in this decoder."""
    indexers = {id(p) for m in decoder.modules() if isinstance(m, LightningIndexer) for p in m.parameters()}
    return any(p.requires_grad and id(p) not in indexers for p in decoder.parameters())


def hand_over(module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What stands in front of `inner`, an attention module's own forward. (A hook would cost a call three times as much.)"""
    forward = kwargs.get("skim")
    if not isinstance(forward, Forward):
        state: State | None = getattr(module, "skim_state", None)  # type: ignore[assignment]
        if state is None or state.limit is None:  # reverted behind the back of somebody's wrapper, or dense
            return inner(*args, **kwargs)
        raise ValueError(f"{type(module).__name__}: its decoder doesn't pass keyword arguments on, so Skim can't reach it; skim.revert(model)")
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Cache):  # GPT-NeoX calls it layer_past
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
    hidden = args[0] if args else kwargs["hidden_states"]
    sparse = is_visibility(kwargs.get("attention_mask"))
    kwargs["skim"] = prepare(module, forward, cache, sparse, hidden, kwargs["position_embeddings"])
    return inner(*args, **kwargs)


def prepare(
    module: nn.Module, forward: Forward, cache: Cache | None, sparse: bool, hidden: Tensor, position_embeddings: Any, q_latent: Tensor | None = None
) -> HandOver:
    """What an attention module reads with: its index tensors, with every index key that the cache holds."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    indexer: Any = module._modules.get("indexer")  # as an attribute it takes ten times as long to find
    selects = forward.mode == "sparse" or forward.selector is not None
    keeps_keys = cache is not None and (selects or holds_index_keys(cache, layer))
    if indexer is None or not (sparse or keeps_keys):
        return HandOver(forward, None, None)
    if forward.late and not sparse and _waits(forward, cache, layer, indexer, hidden, position_embeddings):
        return HandOver(forward, None, None)
    inputs = hidden.detach(), position_embeddings, None if q_latent is None else q_latent.detach()
    unquantised = None
    if forward.recording:
        with torch.enable_grad():
            index = indexer(*inputs)
            unquantised = index.k
            index = index._replace(k=indexer.cached(index.k))
        if _served(layer, forward.letters) > 1:
            forward.inputs[layer] = indexer, inputs
    else:
        with torch.no_grad():
            index = indexer(*inputs, reads="sparse" if sparse else "dense")
    if keeps_keys:
        index = index._replace(k=append_index_keys(cache, layer, index.k.detach()))
    return HandOver(forward, index, unquantised)


def _waits(forward: Forward, cache: Any, layer: int, indexer: LightningIndexer, hidden: Tensor, position_embeddings: Any) -> bool:
    """Whether a layer's new index keys, which nothing reads now, are made later, in one go with other layers'; if so it is noted.

    Layer by layer their few small kernels would take longer to launch than to run.
    """
    if not takes_late_index_keys(cache, layer_of(cache, layer)):
        return False
    if not forward.waiting:  # what the first layer's cache refuses is said before anything is written
        indexed_layer(cache, layer, indexer.score_dtype == "fp8")
        forward.room = workspace(forward.config.workspace_mb, hidden.device) << 19  # inputs are copied once, so half the workspace is theirs
    forward.waiting.append((cache, layer, indexer, hidden, position_embeddings))
    forward.room -= hidden.nbytes
    if forward.room < 0:
        _make_waiting(forward)
    return True


def _make_waiting(forward: Forward) -> None:
    """The index keys that layers wait for, into the cache."""
    groups: dict[Any, list[Waiting]] = {}
    for waiting in forward.waiting:  # layers on other devices have a table of positions there
        *_, hidden, (cos, _) = waiting
        groups.setdefault((id(cos), hidden.shape), []).append(waiting)
    for (_, shape), group in groups.items():
        caches, layers, indexers, hiddens, (position_embeddings, *_) = zip(*group)
        for cache, layer, keys in zip(caches, layers, cached_keys(indexers, hiddens, position_embeddings)):
            indexed_layer(cache, layer, keys.dtype == torch.uint8, shape[1]).append_index_keys(keys)
    forward.waiting.clear()


def register(original: str) -> str:
    """Register the attention function that stands before `original`'s; the name of the implementation."""
    name = PREFIX + original
    ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, original))
    return name


def original_attention(original: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that a module had before."""
    return sys.modules[type(module).__module__].eager_attention_forward if original == "eager" else ALL_ATTENTION_FUNCTIONS[original]


def _attention(
    original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, skim: HandOver | None = None, **kwargs: Any
) -> Any:
    """query `[B, H, T, D]`, key and value `[B, G, S, ·]` as transformers hands them; `(out [B, T, H, V], None)`."""
    if not is_visibility(attention_mask):
        if attention_mask is not None and hasattr(module, "skim_state"):
            expect_decided_dense(module.skim_state, attention_mask, key.shape[2])  # type: ignore[arg-type]
        return original_attention(original, module)(module, query, key, value, attention_mask, **kwargs)
    if skim is None or not hasattr(module, "skim_state"):
        raise ValueError(f"{type(module).__name__}: reads with Skim's visibility but was not converted (cross-attention, say)")
    scale = kwargs.pop("scaling", None) or query.shape[-1] ** -0.5
    sink = kwargs.pop("s_aux", None)
    refuse(module, kwargs)
    q, k, v = (autocast(x).transpose(1, 2) for x in (query, key, value))
    return read(module, skim, q, k, v, interval(attention_mask, kwargs), scale=scale, sink=sink), None


def expect_decided_dense(state: State, attention_mask: Any, keys: int) -> None:
    """Raise ValueError if a row may see more keys than it is to read, by a mask that says no more about it."""
    limit = state.limit
    if limit is not None and keys > limit and not is_decided_dense(attention_mask) and not sees_no_more(attention_mask, limit):
        raise ValueError(
            f"attention_mask: expected a 2-D mask or none, got {type(attention_mask).__name__} {tuple(attention_mask.shape)}; "
            "Skim reads intervals of keys and can't tell them from a mask prepared elsewhere"
        )


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, as PyTorch's attention takes it: rotated queries and keys are float32 there, values are not."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def interval(attention_mask: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """start, end `[B, T]` of a sparse forward's mask and of what an attention is called with."""
    start, end = unpack_visibility(attention_mask)
    return _packed(start, end, kwargs.get("cu_seq_lens_k")), end


def refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.pop("dropout", 0.0):
        raise ValueError(f"attention_dropout: expected 0 in sparse attention, got {type(module).__name__} with dropout in training")
    if kwargs.get("is_causal") is False:
        raise ValueError(f"is_causal: expected causal attention, got False from {type(module).__name__}")
    strange = sorted(name for name, value in kwargs.items() if name not in HARMLESS and value is not None)
    if strange:
        raise ValueError(f"{type(module).__name__}: asks for {', '.join(strange)} in its attention, which Skim doesn't support; skim.revert(model)")


def _packed(start: Tensor, end: Tensor, cu_seq_lens: Tensor | None) -> Tensor:
    """start, moved up to the beginning of the packed sequence that a query is part of."""
    if cu_seq_lens is None:
        return start
    if start.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_k: expected a batch of one packed row, got {start.shape[0]} rows")
    bounds = cu_seq_lens.to(torch.int32)
    sequence = torch.searchsorted(bounds, (end - 1).contiguous(), right=True) - 1
    return torch.maximum(start, bounds[sequence.clamp(min=0)])


def read(module: nn.Module, skim: HandOver, q: Tensor, k: Tensor, v: Tensor | None, visible: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """Attention output `[B, T, H, V]` by the rules of this forward pass, tied to its alignment loss while recording.

    Keys may be FP8 rows of an MLA model's cache. `options` are the operators': scale, and sink or v_channels.
    """
    forward, (start, end) = skim.forward, visible
    if forward.selector is not None or forward.recording or q.requires_grad:
        k = unpack(k, q.dtype)
    options["workspace_mb"] = forward.config.workspace_mb
    selection = _selection(module, skim, q, k, visible, options["scale"])
    if selection is None:
        out, lse = attend_dense(q, k, v, start=start, end=end, **options)
    else:
        out, lse = attend(q, k, v, selection, **options)
    return _aligned(module, skim, q, k, visible, selection, out, lse, options["scale"]) if forward.recording else out


def _selection(module: nn.Module, skim: HandOver, q: Tensor, k: Tensor, visible: tuple[Tensor, Tensor], scale: float) -> Selection | None:
    """What an attention module's queries read: its own choice, or that of the layer whose selection it reuses; None is every visible key."""
    forward, layer, indexer = skim.forward, int(module.layer_idx), getattr(module, "indexer", None)  # type: ignore[arg-type]
    keeps_all = forward.selector is None and not forward.recording and k.shape[1] <= forward.config.fewest
    selects = forward.mode == "sparse" or forward.selector is not None
    if forward.letters.get(layer, "F") == "F" or keeps_all or not selects:
        return None
    place = source_of(layer, forward.letters), skim.first
    if place in forward.selections:
        return _here(forward.selections[place], q.device)
    index = _index(skim, k)
    if index is not None and index.k.shape[1] < k.shape[1]:
        raise ValueError(f"past_key_values: expected a transformers Cache, got {index.k.shape[1]} index keys beside {k.shape[1]} keys")
    select = forward.selector or by_indexer
    selection = select(LayerInputs(layer, q, k, scale, forward.config, indexer, index), *visible)
    if selection is not None and "R" in forward.letters.values():
        forward.selections[place] = selection
    return selection


def _index(skim: HandOver, k: Tensor) -> IndexTensors | None:
    """The index tensors for keys k: a sliding cache gives up keys that the index cache still has."""
    index = skim.index
    if index is None or index.k.shape[1] <= k.shape[1]:
        return index
    return IndexTensors(index.q, index.k[:, -k.shape[1] :], index.weights)


def _aligned(
    module: nn.Module,
    skim: HandOver,
    q: Tensor,
    k: Tensor,
    visible: tuple[Tensor, Tensor],
    selection: Selection | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """out, with the alignment loss of the indexer that this layer reads by."""
    forward, layer, indexer = skim.forward, int(module.layer_idx), getattr(module, "indexer", None)  # type: ignore[arg-type]
    letter = forward.letters.get(layer, "F")
    if forward.keeping and selection is not None:
        record.keep(forward.serial, layer, selection)
    if letter == "F" or skim.aligned:
        return out
    source, index, unquantised = source_of(layer, forward.letters), _index(skim, k), skim.unquantised
    if letter == "R" and source in forward.inputs:
        # Made again from the inputs instead of handed on, so that each layer's loss has a graph of its own.
        indexer, inputs = forward.inputs[source]
        with torch.enable_grad():
            index = indexer(*inputs)
        unquantised = index.k
    if indexer is None or index is None or unquantised is None:
        return out
    if unquantised.shape[1] != k.shape[1]:
        raise ValueError("past_key_values: expected a forward pass from the first token inside skim.record, got one that continues a cache")
    index = IndexTensors(index.q, unquantised, index.weights)
    start, end = visible
    with torch.enable_grad():
        loss = align(q, k, *index, start=start, end=end, selection=selection, lse=lse, scale=scale, workspace_mb=forward.config.workspace_mb)
        loss = loss / _served(source, forward.letters)
    skim.aligned = True  # some attentions are called twice in a layer (DiffLlama); it is aligned once
    if not forward.tied:
        record.prepay(forward.serial, layer, loss, indexer, forward.unaveraged)
    elif torch.is_grad_enabled():
        return record.tie_alignment(out, loss, layer, forward.serial)
    else:  # the first pass of a reentrant checkpoint
        record.note(forward.serial, layer, loss)
    return out


def _here(selection: Selection, device: torch.device) -> Selection:
    """A selection on the device of the layer that reuses it, which may not be its source's."""
    if selection.indices.device == device:
        return selection
    return Selection(selection.indices.to(device), selection.counts.to(device))


def _served(source: int, letters: dict[int, str]) -> int:
    """How many layers read with the indexer of layer `source`, itself included."""
    return sum(letter != "F" and source_of(layer, letters) == source for layer, letter in letters.items())


def by_indexer(inputs: LayerInputs, start: Tensor, end: Tensor) -> Selection:
    """The selector of a trained model: its own indexer."""
    indexer, index, config = inputs.indexer, inputs.index, inputs.config
    if not isinstance(indexer, LightningIndexer) or index is None:
        raise ValueError(f"pattern: layer {inputs.layer} is to select but has no indexer")
    return indexer.select(
        index.q,
        index.k,
        index.weights,
        config.budget,
        start=start,
        end=end,
        keep_first=config.keep_first,
        keep_recent=config.keep_recent,
        mass=config.mass,
        min_budget=config.min_budget,
        workspace_mb=config.workspace_mb,
    )


def everything(inputs: LayerInputs, start: Tensor, end: Tensor) -> None:
    """The selector that reads every visible key: dense attention without a mask, whose T x T entries packed rows would need."""
