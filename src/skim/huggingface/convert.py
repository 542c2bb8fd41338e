"""Give a Hugging Face decoder DSA, and take it away again."""

from __future__ import annotations

import inspect
import sys
import warnings
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from skim.config import Config
from skim.huggingface import attention, binding, masks, mla
from skim.huggingface.state import MODES, LayerInputs, Selector, State, converted_layers, decoder_of, publish, source_of, state_of
from skim.modules import LightningIndexer
from skim.selection import Selection

KEYWORDS = ("hidden_states", "position_embeddings", "attention_mask")  # of an attention, which Skim reads on their way
# Families whose attention changes the mask that it gets, so that Skim's start and end would be lost in it.
OWN_MASKS = {"doge": "makes a mask of its own from the values"}


def convert(model: nn.Module, config: Config | None = None) -> Any:
    """Give `model` DSA, in place: an untrained lightning indexer in each attention layer that the pattern marks "S".

    The model stays dense until its indexers are trained or loaded (one warning says so), or until
    `skim.use(model, mode="sparse")`. Layers with a sliding window are left as they are where other layers have none.

    DeepSeek-V3.2 (`deepseek_v32`) and GLM-5 (`glm_moe_dsa`) have trained indexers: they keep them, need no config and read
    sparsely at once. Their "dense" mode reads every key, which they never did.

    Args:
        model: a transformers decoder (`AutoModelForCausalLM` or its base model).
        config: how to read; None is `skim.Config()`, or what the model says where it has indexers.

    Returns:
        The same model.

    Raises:
        ValueError: the model is converted already, its family asks for something that Skim can't give, or the config
            contradicts indexers that the model has; by name.
    """
    if config is not None:
        mla.expect_agreement(model, config)
    attach(model, config)
    if state_of(model).mode == "dense":
        warnings.warn(
            "This model's indexers are untrained, so it stays dense. Train them (skim.record), load trained ones (skim.load), "
            "or see what untrained ones do with skim.use(model, mode='sparse').",
            stacklevel=2,
        )
    return model


def attach(model: nn.Module, config: Config | None) -> None:
    """`convert` without its warning."""
    if any(hasattr(m, "skim_state") for m in model.modules()):
        raise ValueError("model: expected one that was not converted, got a converted one; skim.revert(model) first")
    decoder = _decoder(model)
    layers = _attention_layers(decoder)
    _expect_in_memory(layers)
    family = mla.family(decoder.config)
    native, latent = family in mla.LAYOUTS, family in mla.FAMILIES
    if config is None:
        config = mla.native_config(decoder.config) if native else Config()
    mla.expect_agreement(decoder, config, mla.SHAPES)
    mla.expect_latents(decoder.config, config)
    letters = _letters(config, layers)
    indexers = {
        number: mla.native_indexer(layers[number], config) if native else make_indexer(layers[number], decoder, config)
        for number, letter in letters.items()
        if letter == "S"
    }
    rope_dim = next((indexer.rope_dim for indexer in indexers.values()), config.rope_dim)
    config = replace(config, pattern=tuple(letters.values()), rope_dim=rope_dim)
    original = decoder.config._attn_implementation
    state = State(config, letters, original, mode="sparse" if native else "dense")
    for number, layer in layers.items():
        layer.skim_state = state
        if latent:
            mla.bind(layer, indexers.get(number))
            continue
        if number in indexers:
            layer.indexer = indexers[number]
        binding.bind(layer, attention.hand_over)
    decoder.skim_state, decoder.skim_decoder = state, True
    decoder.skim_hook = decoder.register_forward_pre_hook(attention.open_forward, with_kwargs=True)
    decoder.skim_last_hook = decoder.register_forward_hook(attention.close_forward, with_kwargs=True)
    masks.register(original)
    decoder.config._attn_implementation = attention.register(original)
    decoder.config.to_dict = partial(_saved, decoder.config)
    publish(model)


def _saved(config: Any) -> dict[str, Any]:
    """`config.to_dict` of a converted model: config.json says nothing of what is in force here."""
    values: dict[str, Any] = type(config).to_dict(config)
    for name in ("skim_limit", "to_dict"):
        values.pop(name, None)
    return values


def revert(model: nn.Module) -> Any:
    """Undo `convert`: hooks, indexers and settings go, the model is what it was.

    Raises:
        ValueError: the model was not converted.
    """
    state, decoder = state_of(model), decoder_of(model)
    decoder.config._attn_implementation = state.original
    del decoder.config.skim_limit, decoder.config.to_dict
    for layer in converted_layers(model).values():
        del layer.skim_state
        if mla.family(decoder.config) in mla.FAMILIES:
            mla.release(layer)
            continue
        binding.release(layer, attention.hand_over)
        if hasattr(layer, "indexer"):
            del layer.indexer
    decoder.skim_hook.remove()
    decoder.skim_last_hook.remove()
    for name in ("skim_state", "skim_hook", "skim_last_hook", "skim_decoder"):
        delattr(decoder, name)
    return model


class use:
    """Change how a converted model reads: at once, and until the end of a `with` block if it opens one.

    ```
    with skim.use(model, budget=256):
        model.generate(...)
    skim.use(model, mode="dense")
    ```

    Args:
        model: a converted model.
        mode: "dense" reads as the model did before, "sparse" with its indexers.
        selector: `(LayerInputs, start, end) -> Selection` in place of the indexers; None for a call reads every key.
        replay: layer -> Selection to read again, as `skim.record(model, selections=True)` kept them: the same keys under
            other weights, as reinforcement learning needs them.
        changes: fields of `skim.Config` that need no other weights: budget, mass, min_budget, pattern, keep_first,
            keep_recent, score_dtype, latent_dtype, scale_format, workspace_mb.

    Raises:
        ValueError: the model was not converted, or a value out of range.
        TypeError: an unknown field, or one that only `convert` can set.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: str | None = None,
        selector: Selector | None = None,
        replay: dict[int, Selection] | None = None,
        **changes: Any,
    ) -> None:
        self.model, self.state = model, state_of(model)
        fixed = {"index_n_heads", "index_head_dim", "rope_dim", "rope_layout"}
        allowed = sorted({f.name for f in fields(Config)} - fixed)
        wrong = sorted(set(changes) - set(allowed))
        if wrong:
            raise TypeError(f"{wrong[0]}: expected one of {', '.join(allowed)}, mode, selector or replay")
        if replay is not None:
            if selector is not None:
                raise ValueError("replay: expected no selector beside it, got both")
            selector = _replayed(dict(replay))
        if mode is not None and mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        self.before = self.state.config, self.state.letters, self.state.mode, self.state.selector
        config = replace(self.state.config, **changes)
        letters = dict(zip(self.state.letters, config.letters(len(self.state.letters))))
        layers = converted_layers(model)
        bare = [i for i, letter in letters.items() if letter == "S" and not hasattr(layers[i], "indexer")]
        if bare:
            raise ValueError(f"pattern: expected 'S' only where there is an indexer, got it in layers {bare} without")
        _checked(letters, layers)
        mla.expect_latents(decoder_of(model).config, config)
        self._set(replace(config, pattern=tuple(letters.values())), letters, mode or self.state.mode, selector or self.state.selector)

    def _set(self, config: Config, letters: dict[int, str], mode: str, selector: Selector | None) -> None:
        self.state.config, self.state.letters, self.state.mode, self.state.selector = config, letters, mode, selector
        for layer in converted_layers(self.model).values():
            if hasattr(layer, "indexer"):
                layer.indexer.score_dtype, layer.indexer.scale_format = config.score_dtype, config.scale_format
        publish(self.model)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: object) -> None:
        self._set(*self.before)


def _replayed(selections: dict[int, Selection]) -> Selector:
    """The selector that gives each layer what it read before."""

    def select(inputs: LayerInputs, start: torch.Tensor, end: torch.Tensor) -> Selection:
        selection = selections.get(inputs.layer)
        if selection is None:
            raise ValueError(f"replay: expected a selection for layer {inputs.layer}, got them for {sorted(selections)}")
        if selection.indices.shape[:2] != start.shape:
            raise ValueError(
                f"replay: expected selections of {tuple(start.shape)} queries, got {tuple(selection.indices.shape[:2])} in layer {inputs.layer}"
            )
        return selection

    return select


def _family(model: nn.Module) -> str:
    """The name that transformers gives the model's family, for messages."""
    return str(model.config.get_text_config().model_type)  # type: ignore[union-attr, operator]


def _decoder(model: nn.Module) -> Any:
    """The module that runs the layers and makes their masks.

    Raises:
        ValueError: a family that doesn't speak transformers' attention and mask interfaces, or a native DSA or MLA model.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model: expected a transformers model, got {type(model).__name__}")
    family = _family(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: {family} is an encoder-decoder; Skim reads decoders without an encoder")
    if family in OWN_MASKS:
        raise ValueError(f"model: {family} {OWN_MASKS[family]}, which Skim doesn't support")
    decoder = _runs_layers(model)
    source = sys.modules[type(decoder).__module__]
    if not any(hasattr(source, name) for name in ("create_causal_mask", "create_sliding_window_causal_mask", "create_masks_for_generate")):
        raise ValueError(f"model: {family} makes its own masks instead of transformers' (create_causal_mask), so Skim can't see what is visible")
    if mla.family(decoder.config) in mla.FAMILIES:
        mla.expect_supported(decoder.config)
    elif getattr(decoder.config, "kv_lora_rank", None) is not None:
        raise ValueError(f"model: {family} has latent attention (MLA), which Skim converts in {', '.join(mla.FAMILIES)} only")
    for name in ("attn_logit_softcapping", "num_kv_shared_layers"):
        if getattr(decoder.config, name, None):
            raise ValueError(f"model: {family} sets {name}, which Skim doesn't support")
    if not _takes_keywords(type(decoder)):
        raise ValueError(f"model: {family} doesn't pass keyword arguments down to its attention, so Skim can't reach it")
    if str(decoder.config._attn_implementation).startswith(masks.PREFIX):
        raise ValueError("model: expected a config of its own, got one that it shares with a converted model; build it from copy.deepcopy(config)")
    return decoder


def _runs_layers(model: Any) -> Any:
    """The decoder inside `model`: transformers' own answer, or where that has no layers the first module with layers and a rotary embedding."""
    candidates = [model.get_decoder() if hasattr(model, "get_decoder") else model, getattr(model, "base_model", model)]
    candidates += [m for m in model.modules() if hasattr(m, "rotary_emb")]
    return next((m for m in candidates if hasattr(m, "layers") or hasattr(m, "h")), candidates[1])


def _attention_layers(decoder: Any) -> dict[int, Any]:
    """The attention modules by layer number: the innermost modules that take a layer's input and position embeddings.

    Raises:
        ValueError: the family has none that Skim can stand in for; by name.
    """
    family = _family(decoder)
    speaking = [m for m in decoder.modules() if _speaks(m)]
    inner = [m for m in speaking if not any(child is not m and _speaks(child) for child in m.modules())]
    if not inner:
        raise ValueError(f"model: {family} hands its attention layers no rotary position embeddings, which an indexer needs")
    attending = [m for m in inner if _calls_interface(m)]  # linear attention may take the same arguments
    if not attending:
        raise ValueError(f"model: {family}: {type(inner[0]).__name__} doesn't call transformers' attention interface, so Skim can't stand in for it")
    if mla.family(decoder.config) in mla.LAYOUTS:
        return {int(m.layer_idx): m for m in attending}  # type: ignore[arg-type]
    own = next((m for m in attending if hasattr(m, "indexer") or any(type(child).__name__.endswith("Indexer") for child in m.modules())), None)
    if own is not None:
        raise ValueError(f"model: {family} has a sparse attention of its own ({type(own).__name__}), which Skim doesn't convert yet")
    layers = {int(m.layer_idx): m for m in attending}  # type: ignore[arg-type]
    if len(layers) != len(attending):
        raise ValueError(f"model: {family}: expected one attention module a layer, got {len(attending)} in {len(layers)} layers")
    return dict(sorted(layers.items()))


def _expect_in_memory(layers: dict[int, Any]) -> None:
    """Raise ValueError if accelerate keeps an attention's weights elsewhere between calls: a new indexer has no place there."""
    for number, layer in layers.items():
        for module in layer.modules():
            if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False)):
                raise ValueError(f"model: expected attention weights on a device, got those of layer {number} offloaded by its device_map")


def _speaks(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "layer_idx", None), int):
        return False
    return _takes_keywords(type(module)) and set(KEYWORDS) <= set(inspect.signature(type(module).forward).parameters)


def _takes_keywords(kind: type[nn.Module]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(kind.forward).parameters.values())


def _calls_interface(module: nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


def _letters(config: Config, layers: dict[int, Any]) -> dict[int, str]:
    """The pattern over the attention layers; a plain "S" leaves sliding-window layers of a hybrid as they are."""
    letters = config.letters(len(layers))
    sliding = [_window(layer) is not None for layer in layers.values()]
    if config.pattern == "S" and any(sliding) and not all(sliding):
        letters = tuple("F" if window else "S" for window in sliding)
    return _checked(dict(zip(layers, letters)), layers)


def _checked(letters: dict[int, str], layers: dict[int, Any]) -> dict[int, str]:
    """letters, if every "R" layer sees the keys that its source selects from."""
    for number in letters:
        source = source_of(number, letters)
        if _window(layers[number]) != _window(layers[source]):
            raise ValueError(f"pattern: expected 'R' only where the sliding window is that of the 'S' layer before, got it in layer {number}")
    return letters


def _window(layer: Any) -> Any:
    """What keeps a layer from seeing every earlier key: its window, or its kind; None if nothing does."""
    kinds = getattr(layer.config, "layer_types", None)
    if kinds is None:
        return getattr(layer, "sliding_window", None)
    kind = kinds[layer.layer_idx]  # some families (EXAONE 4) give the window's size to every layer
    return kind if "sliding" in kind or "chunked" in kind else None


def make_indexer(layer: Any, decoder: Any, config: Config) -> LightningIndexer:
    projection = next(p for p in layer.parameters() if p.dim() == 2 and p.is_floating_point())
    table = _table(layer, decoder)
    rotated = table.shape[-1]
    most = min(rotated, config.index_head_dim // 2)
    if config.rope_dim is None and most < 2:
        raise ValueError(f"index_head_dim: expected 4 or more, of which half are rotated, or a rope_dim beside it, got {config.index_head_dim}")
    rope_dim = config.rope_dim or next(n for n in range(most - most % 2, 0, -2) if rotated % n == 0)
    if rotated % rope_dim:
        raise ValueError(f"rope_dim: expected a divisor of the {rotated} channels that the model rotates, got {rope_dim}")
    indexer = LightningIndexer(
        decoder.config.hidden_size,
        n_heads=config.index_n_heads,
        head_dim=config.index_head_dim,
        rope_dim=rope_dim,
        rope_layout=config.rope_layout,
        query_size=getattr(layer, "q_lora_rank", None),  # MLA's query latent
        score_dtype=config.score_dtype,
        scale_format=config.scale_format,
    )
    indexer.repeated_table = _repeats_frequencies(table)
    indexer.train(layer.training)
    return indexer.to(device=projection.device, dtype=projection.dtype)


def _table(layer: Any, decoder: Any) -> torch.Tensor:
    """cos of the decoder's own rotary module at position 1, as `layer` gets it."""
    family, rotary = decoder.config.model_type, getattr(decoder, "rotary_emb", None)
    none = ValueError(f"model: {family} hands layer {layer.layer_idx} no rotary position embeddings, which an indexer needs")
    if rotary is None:
        raise none
    where = next(decoder.parameters())
    if where.is_meta:  # from_pretrained makes an exported model without storage
        with torch.device("cpu"):
            rotary, where = type(rotary)(decoder.config), torch.empty(0)
    probe = torch.zeros(1, 1, 1, device=where.device)
    position = torch.ones(1, 1, dtype=torch.long, device=where.device)
    by_type = "layer_type" in inspect.signature(type(rotary).forward).parameters
    kind = decoder.config.layer_types[layer.layer_idx] if by_type else None
    if by_type and not hasattr(rotary, f"{kind}_inv_freq"):
        raise none
    with torch.no_grad():
        table = rotary(probe, position_ids=position, **({"layer_type": kind} if by_type else {}))
    if not isinstance(table, tuple) or torch.is_complex(table[0]):
        raise ValueError(f"model: {family} has complex rotary position embeddings where Skim needs cos and sin")
    return table[0]


def _repeats_frequencies(table: torch.Tensor) -> bool:
    """Whether the table has each frequency twice side by side (Cohere) and not the whole table twice."""
    if table.shape[-1] < 4:
        return False
    return bool((table[..., 0] == table[..., 1]).all() and not (table[..., 0] == table[..., table.shape[-1] // 2]).all())
