"""transformers' own DeepSeek-V3.2 and GLM-5 as an outside oracle: scores, selections and attention, many random models each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference_math import error
from tiny import tokens
from tiny_native import LAYOUTS, SIZES, TOPK, YARN, Scores, differing, random_native, read_by, seen
from torch import Tensor

import skim
from skim.modules import LightningIndexer

LENGTH, SEEDS = 40, 20
every_family = pytest.mark.parametrize("family", LAYOUTS)


@dataclass
class Layer:
    """What a native layer was given and what it made of it."""

    attention: Any
    inputs: tuple  # of its indexer: hidden states, query latent, position embeddings, mask
    scores: Tensor  # [B, T, S]
    picks: Tensor  # [B, T, TOPK], whatever they are where a row sees less
    query: Tensor  # [B, H, T, D], and keys and values alike, after expansion
    key: Tensor
    value: Tensor
    scale: float
    out: Tensor  # [B, T, H, V]
    latent: Tensor  # [B, T, kv_lora_rank]


def native(family: str, seed: int, **changes: Any) -> tuple[list[Layer], Tensor, Tensor]:
    """The layers of a random native model after one forward, and which keys each query may read: start, end."""
    model = random_native(family, seed, **changes)
    made: dict[int, dict[str, Any]] = {}
    source = sys.modules[type(model).__module__]
    plain = source.eager_attention_forward

    def watched(module, query, key, value, mask, scaling, **kwargs):
        out, weights = plain(module, query, key, value, mask, scaling=scaling, **kwargs)
        made[module.layer_idx].update(query=query, key=key, value=value, scale=scaling, out=out)
        return out, weights

    for layer in model.model.layers:
        attention, number = layer.self_attn, layer.self_attn.layer_idx
        made[number] = {"attention": attention}
        attention.kv_a_layernorm.register_forward_hook(lambda m, args, out, number=number: made[number].update(latent=out))
        if attention.indexer is not None:
            attention.indexer.register_forward_hook(lambda m, args, out, number=number: made[number].update(inputs=args[:4], picks=out))
    ids = tokens(2, LENGTH, seed=seed)
    padding = torch.ones_like(ids)
    padding[1, : seed % 4] = 0
    source.eager_attention_forward = watched
    try:
        with torch.no_grad():
            model(ids, attention_mask=padding, use_cache=False)
    finally:
        source.eager_attention_forward = plain
    start, end = (x.expand(2, -1).clone() for x in skim.visible(LENGTH, LENGTH))
    start[1].clamp_(min=seed % 4)
    layers = []
    for found in made.values():
        if "inputs" in found:
            with Scores() as scores:
                found["attention"].indexer(*found["inputs"], None)
            found["scores"] = scores.found[-1]
        layers.append(Layer(**{"inputs": (), "scores": None, "picks": None, **found}))
    return layers, torch.minimum(start, end), end


def ours(layer: Layer, layout: str, start: Tensor, end: Tensor) -> tuple[Tensor, skim.Selection]:
    """Our indexer with a native layer's weights: scores and selection."""
    theirs = layer.attention.indexer
    sizes = {"n_heads": theirs.n_heads, "head_dim": theirs.head_dim, "rope_dim": theirs.qk_rope_head_dim, "query_size": theirs.q_lora_rank}
    indexer = LightningIndexer(theirs.hidden_size, rope_layout=layout, **sizes)
    indexer.load_state_dict(theirs.state_dict())
    hidden, latent, positions, _ = layer.inputs
    with torch.no_grad():
        index = indexer(hidden, positions, latent)
        scores = skim.index_scores(*index, start=start, end=end)
        return scores, indexer.select(*index, TOPK, start=start, end=end)


@every_family
def test_index_scores_are_those_of_the_native_indexer(family):
    for seed in range(SEEDS):
        layers, start, end = native(family, seed)
        visible = seen(start, end, LENGTH)
        for layer in layers:
            scores, _ = ours(layer, LAYOUTS[family], start, end)
            assert torch.equal(scores.isfinite(), visible)
            assert float(scores[visible].std()) > 0.1, "scores that say something"
            assert error(scores[visible], layer.scores[visible]) < 1e-6, (seed, layer.attention.layer_idx)


@every_family
def test_selections_are_those_of_the_native_indexer(family):
    for seed in range(SEEDS):
        layers, start, end = native(family, seed)
        visible = seen(start, end, LENGTH)
        for layer in layers:
            _, selection = ours(layer, LAYOUTS[family], start, end)
            selection.check(LENGTH)
            found, theirs = read_by(selection.indices[:, :, 0], LENGTH), read_by(layer.picks, LENGTH) & visible
            assert torch.equal(found.sum(-1), visible.sum(-1).clamp(max=TOPK))
            assert differing(found, theirs, layer.scores) == 0, (seed, layer.attention.layer_idx)


@every_family
def test_attention_over_expanded_keys_is_the_native_attention(family):
    for seed in range(SEEDS):
        layers, start, end = native(family, seed)
        rows = end > start
        for layer in layers:
            _, selection = ours(layer, LAYOUTS[family], start, end)
            same = (read_by(selection.indices[:, :, 0], LENGTH) == (read_by(layer.picks, LENGTH) & seen(start, end, LENGTH))).all(-1) & rows
            assert same.sum() > 0.95 * rows.sum(), "rows with near ties aside"
            q, k, v = (x.transpose(1, 2) for x in (layer.query, layer.key, layer.value))
            out, _ = skim.attend(q, k, v, selection, scale=layer.scale)
            assert error(out[same], layer.out[same]) < 1e-5


@every_family
def test_attention_over_absorbed_latents_is_the_native_attention(family):
    """One key head of 16 + 8 channels whose first 16 are the values: the storage that kernels read."""
    nope, rank = SIZES["qk_nope_head_dim"], SIZES["kv_lora_rank"]
    for seed in range(5):
        layers, start, end = native(family, seed)
        for layer in layers:
            _, selection = ours(layer, LAYOUTS[family], start, end)
            same = (read_by(selection.indices[:, :, 0], LENGTH) == (read_by(layer.picks, LENGTH) & seen(start, end, LENGTH))).all(-1) & (end > start)
            expand = layer.attention.kv_b_proj.weight.detach().view(SIZES["num_attention_heads"], -1, rank)
            q = layer.query.transpose(1, 2)
            absorbed = torch.cat((torch.einsum("bthn,hnr->bthr", q[..., :nope], expand[:, :nope]), q[..., nope:]), dim=-1)
            rotated = layer.key[:, 0, :, nope:]  # one for all heads
            keys = torch.cat((layer.latent.view(2, LENGTH, rank), rotated), dim=-1)[:, :, None]
            out, _ = skim.attend(absorbed, keys, None, selection, v_channels=rank, scale=layer.scale)
            out = torch.einsum("bthr,hvr->bthv", out, expand[:, nope:])
            assert error(out[same], layer.out[same]) < 1e-5


@every_family
def test_trap_01_the_other_rope_layout_is_told_apart(family):
    wrong = {"half": "interleaved", "interleaved": "half"}[LAYOUTS[family]]
    for seed in range(SEEDS):
        layers, start, end = native(family, seed)
        visible = seen(start, end, LENGTH)
        for layer in layers:
            scores, selection = ours(layer, wrong, start, end)
            assert error(scores[visible], layer.scores[visible]) > 1e-2
            assert differing(read_by(selection.indices[:, :, 0], LENGTH), read_by(layer.picks, LENGTH) & visible, layer.scores) > 10


def test_trap_07_the_softmax_scale_is_the_models_own_with_yarn():
    layers, start, end = native("deepseek_v32", 0)
    layer = layers[0]
    mscale = 0.1 * torch.tensor(YARN["factor"]).log().item() + 1.0
    assert abs(layer.scale - 20**-0.5 * mscale**2) < 1e-6
    _, selection = ours(layer, "half", start, end)
    q, k, v = (x.transpose(1, 2) for x in (layer.query, layer.key, layer.value))
    rows = end > start
    assert error(skim.attend(q, k, v, selection)[0][rows], layer.out[rows]) > 1e-2


def test_trap_08_the_native_indexer_picks_the_future_in_early_rows_and_ours_does_not():
    layers, start, end = native("deepseek_v32", 0)
    layer = layers[0]
    _, selection = ours(layer, "half", start, end)
    assert bool((layer.picks[0, 0] > 0).any()), "topk returns something for every slot"
    assert selection.indices[0, 0, 0].tolist() == [0] + [-1] * (TOPK - 1)


def test_glm_layers_that_share_a_selection_read_what_their_source_selected():
    """Our pattern letter R: one selection, and the attention of the layer that reuses it."""
    layers, start, end = native("glm_moe_dsa", 0, indexer_types=["full", "shared"])
    assert layers[1].picks is None and layers[1].attention.indexer is None
    _, selection = ours(layers[0], "interleaved", start, end)
    same = (read_by(selection.indices[:, :, 0], LENGTH) == (read_by(layers[0].picks, LENGTH) & seen(start, end, LENGTH))).all(-1) & (end > start)
    q, k, v = (x.transpose(1, 2) for x in (layers[1].query, layers[1].key, layers[1].value))
    out, _ = skim.attend(q, k, v, selection, scale=layers[1].scale)
    assert error(out[same], layers[1].out[same]) < 1e-5
