"""MLA models (`deepseek_v3`, and `deepseek_v32` and `glm_moe_dsa` with indexers of their own): one forward of ours, bound to each attention.

A latent of 512 + 64 channels a token serves all heads, as key and (its first 512 channels) as value. Queries are brought
into its space and outputs back out of it, instead of every latent into every head's (the absorbed form; DeepSeek-V3.2-Exp
report, section 1). Where every row reads all its keys and the queries are many, the model's own attention runs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from skim.config import Config
from skim.huggingface import binding
from skim.huggingface.attention import autocast, expect_decided_dense, interval, original_attention, prepare, read, refuse
from skim.huggingface.latents import append_latents, prepare_latents
from skim.huggingface.masks import is_visibility
from skim.huggingface.state import Forward, HandOver, State
from skim.modules import IndexTensors, LightningIndexer
from skim.modules.latents import absorb, emerge, pack, unpack
from skim.ops import codec
from skim.ops.workspace import chunks, workspace

FAMILIES = ("deepseek_v3", "deepseek_v32", "glm_moe_dsa")
LAYOUTS = {"deepseek_v32": "half", "glm_moe_dsa": "interleaved"}  # of the families that have indexers
SHAPES = ("index_n_heads", "index_head_dim", "rope_dim", "rope_layout")
TRAINED_WITH = (*SHAPES, "budget", "pattern")
INDEXER_KINDS = {"full": "S", "shared": "R"}


def family(model_config: Any) -> str:
    """A model's family; one that Skim exported is its base's."""
    return str(model_config.model_type).removeprefix("skim_")


def expect_supported(model_config: Any) -> None:
    """Raise ValueError if an MLA model's settings leave Skim nothing to read with; by name."""
    name, implementation = family(model_config), model_config._attn_implementation
    if model_config.q_lora_rank is None:
        raise ValueError(f"q_lora_rank: expected a {name} with a query latent, which indexers read, got None")
    if name in LAYOUTS and implementation not in ("eager", "sdpa"):
        raise ValueError(f"attn_implementation: expected 'eager' or 'sdpa' of {name} (Skim brings its own sparse kernels), got {implementation!r}")


def expect_latents(model_config: Any, config: Config) -> None:
    """Raise ValueError if `config` asks for latents in a form that this model's don't have."""
    channels = getattr(model_config, "kv_lora_rank", None), getattr(model_config, "qk_rope_head_dim", None)
    if config.latent_dtype == "fp8" and channels != (codec.LATENT, codec.ROPE):
        raise ValueError(
            f"latent_dtype: expected 'bf16' of {family(model_config)}, got 'fp8', which holds latents of {codec.LATENT} + {codec.ROPE} channels"
        )


def native_config(model_config: Any) -> Config:
    """The Config of a model that has indexers."""
    types = getattr(model_config, "indexer_types", ["full"] * model_config.num_hidden_layers)
    interleaved = getattr(model_config, "indexer_rope_interleave", LAYOUTS[family(model_config)] == "interleaved")
    return Config(
        budget=model_config.index_topk,
        index_n_heads=model_config.index_n_heads,
        index_head_dim=model_config.index_head_dim,
        rope_dim=model_config.qk_rope_head_dim,
        rope_layout="interleaved" if interleaved else "half",
        pattern=tuple(INDEXER_KINDS[kind] for kind in types),
    )


def expect_agreement(model: nn.Module, config: Config, fields: tuple[str, ...] = TRAINED_WITH) -> None:
    """Raise ValueError if `config` contradicts indexers that the model has; by field."""
    model_config: Any = model.config.get_text_config() if hasattr(model, "config") else None  # type: ignore[union-attr, operator]
    if model_config is None or family(model_config) not in LAYOUTS:
        return
    own = native_config(model_config)
    for name in fields:
        expected, got = getattr(own, name), getattr(config, name)
        if name == "pattern":
            got = config.letters(len(own.pattern))
        if got != expected and not (name == "rope_dim" and got is None):
            raise ValueError(
                f"{name}: expected {expected!r}, which this {family(model_config)} was trained with, got {got!r}; "
                "convert it without a config and change what may change with skim.use"
            )


def native_indexer(layer: Any, config: Config) -> LightningIndexer:
    """Our indexer with the very parameters of a layer's own.

    Raises:
        ValueError: the layer has none, or its parameters aren't plain ones.
    """
    own = layer.indexer
    if own is None:
        raise ValueError(f"pattern: expected 'S' only where there is an indexer, got it in layer {layer.layer_idx} without")
    for name, part in own.named_children():
        if type(part) not in (nn.Linear, nn.LayerNorm):
            raise ValueError(
                f"model: expected plain weights in its indexers, got {type(part).__name__} as {name} of layer {layer.layer_idx}; "
                "convert before peft, and load with skim.load_model, which dequantises"
            )
    with torch.device("meta"):
        indexer = LightningIndexer(
            own.hidden_size,
            n_heads=own.n_heads,
            head_dim=own.head_dim,
            rope_dim=own.qk_rope_head_dim,
            rope_layout=config.rope_layout,
            query_size=own.q_lora_rank,
            score_dtype=config.score_dtype,
            scale_format=config.scale_format,
        )
    _hand_parameters(own, indexer)
    return indexer.train(layer.training)


def _hand_parameters(giver: nn.Module, taker: nn.Module) -> None:
    for name, parameter in giver.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(taker.get_submodule(owner), last, parameter)


def bind(layer: Any, indexer: LightningIndexer | None) -> None:
    """Let an attention module run our forward, with `indexer` as its submodule of that name."""
    if hasattr(layer, "indexer"):
        layer.skim_own_indexer = (layer.indexer,)  # in a tuple it is no submodule, so its parameters aren't named twice
        del layer.indexer
    if indexer is not None:
        layer.indexer = indexer
    binding.bind(layer, forward)


def release(layer: Any) -> None:
    """Undo `bind`."""
    binding.release(layer, forward)
    indexer = layer.__dict__["_modules"].pop("indexer", None)
    if hasattr(layer, "skim_own_indexer"):
        (layer.indexer,) = layer.skim_own_indexer
        del layer.skim_own_indexer
        if indexer is not None:
            _hand_parameters(indexer, layer.indexer)


def forward(
    layer: Any,
    own: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Any = None,
    past_key_values: Cache | None = None,
    *,
    skim: Forward | None = None,
    prev_topk_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """What stands in place of `own`, an attention module's forward; GLM's also gives a third value, its selection, which ours has no use for."""
    if not isinstance(skim, Forward):
        raise ValueError(f"{type(layer).__name__}: expected a call by its decoder, which says how to read, got one from elsewhere")
    q_latent, nope, rope, latents = _project(layer, hidden_states, position_embeddings)
    sparse, weights = is_visibility(attention_mask), None
    if past_key_values is not None:
        prepare_latents(past_key_values, layer.layer_idx)
    handed = prepare(layer, skim, past_key_values, sparse, hidden_states, position_embeddings, q_latent)
    if past_key_values is not None:
        latents = append_latents(past_key_values, layer.layer_idx, _cached(latents, skim.config))
    if sparse:
        out = _absorbed(layer, handed, nope, rope, latents, attention_mask, kwargs)
    else:
        out, weights = _expanded(layer, nope, rope, latents, attention_mask, kwargs)
    out = layer.o_proj(out.reshape(*hidden_states.shape[:2], -1))
    return (out, weights, None) if hasattr(layer, "skip_topk") else (out, weights)


def _project(layer: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The query latent `[B, T, q]`, queries without and with rotation `[B, T, H, ·]`, and latents `[B, T, r + p]`."""
    source = sys.modules[type(layer).__module__]
    rotate = source.apply_rotary_pos_emb_interleave if getattr(layer.config, "rope_interleave", True) else source.apply_rotary_pos_emb
    q_latent = layer.q_a_layernorm(layer.q_a_proj(hidden))
    query = layer.q_b_proj(q_latent).view(*hidden.shape[:2], -1, layer.qk_head_dim)
    nope, rope = query.split((layer.qk_nope_head_dim, layer.qk_rope_head_dim), dim=-1)
    latent, key_rope = layer.kv_a_proj_with_mqa(hidden).split((layer.kv_lora_rank, layer.qk_rope_head_dim), dim=-1)
    rope, key_rope = rotate(rope, key_rope[:, :, None], *position_embeddings, unsqueeze_dim=2)
    latents = torch.cat((layer.kv_a_layernorm(latent), key_rope[:, :, 0]), dim=-1)
    return q_latent, nope, rope, autocast(latents)


def _cached(latents: Tensor, config: Config) -> Tensor:
    """What a cache holds of new latents."""
    if config.latent_dtype == "bf16":
        return latents
    if latents.requires_grad:
        raise ValueError("latent_dtype: expected no gradients with 'fp8', which has none, got some; use_cache=False, or torch.no_grad()")
    return pack(latents, config.scale_format)


def _absorbed(layer: Any, handed: HandOver, nope: Tensor, rope: Tensor, latents: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Output `[B, T, H, V]` of Skim's attention, one key head of latents for all heads."""
    dropout = layer.attention_dropout if layer.training else 0.0
    refuse(layer, {**kwargs, "dropout": dropout})
    into, out_of = _expansion(layer, nope).split((layer.qk_nope_head_dim, layer.v_head_dim), dim=1)
    start, end = interval(mask, kwargs)

    def output(rows: slice, handed: HandOver) -> Tensor:
        q = autocast(absorb(nope[:, rows], rope[:, rows], into))
        visible = start[:, rows], end[:, rows]
        out = read(layer, handed, q, latents[:, :, None], None, visible, scale=layer.scaling, v_channels=layer.kv_lora_rank)
        return emerge(out, out_of)

    pieces = _pieces(layer, handed.forward, nope)
    if len(pieces) == 1:
        return output(slice(None), handed)
    return torch.cat([output(rows, _part(handed, rows)) for rows in pieces], dim=1)


def _pieces(layer: Any, forward: Forward, nope: Tensor) -> list[slice]:
    """Which queries are absorbed at a time: in its space a query and its output are several times as wide as they are outside.

    All of them where the whole of it is kept for gradients, or handed to a selector.
    """
    B, T, H, _ = nope.shape
    if torch.is_grad_enabled() or forward.recording or forward.selector is not None:
        return [slice(0, T)]
    wide = B * H * (2 * layer.kv_lora_rank + layer.qk_rope_head_dim) * nope.element_size()
    scratch = workspace(forward.config.workspace_mb, nope.device)
    if T * wide <= scratch << 20:
        return [slice(0, T)]
    return list(chunks(T, wide, scratch))


def _part(handed: HandOver, rows: slice) -> HandOver:
    """What some of the queries read with."""
    index = handed.index
    if index is not None:
        index = IndexTensors(index.q[:, rows], index.k, index.weights[:, rows])
    return replace(handed, index=index, first=rows.start)


def _expansion(layer: Any, like: Tensor) -> Tensor:
    """The matrix `[H, n + v, r]` that makes a latent into each head's key and value, for queries like `like`."""
    project = layer.kv_b_proj
    if type(project) is nn.Linear:
        weight = project.weight
    else:  # quantised, or with an adapter on it: what it makes of each channel
        weight = project(torch.eye(layer.kv_lora_rank, dtype=like.dtype, device=like.device)).T
    return weight.view(-1, layer.qk_nope_head_dim + layer.v_head_dim, layer.kv_lora_rank)


def _expanded(layer: Any, nope: Tensor, rope: Tensor, latents: Tensor, mask: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Output `[B, T, H, V]` and weights of the attention that the model had, over every visible key."""
    state: State = layer.skim_state
    expect_decided_dense(state, mask, latents.shape[1])
    query = torch.cat((nope.transpose(1, 2), rope.transpose(1, 2)), dim=-1)
    latents = unpack(latents, query.dtype)
    key, value = layer.expand_kv(*latents[:, None].split((layer.kv_lora_rank, layer.qk_rope_head_dim), dim=-1))
    dropout = layer.attention_dropout if layer.training else 0.0
    attention = original_attention(state.original, layer)
    return attention(layer, query, key, value, mask, dropout=dropout, scaling=layer.scaling, **kwargs)
