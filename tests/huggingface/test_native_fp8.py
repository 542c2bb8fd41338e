"""MLA models whose caches are in FP8: 656 bytes a latent, 132 an index key of 128 channels, in every kind of cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference_math import error
from tiny import generate, gradients, logits, tokens
from tiny_native import LAYOUTS, TOPK, random_native
from torch import Tensor
from transformers import DynamicCache, StaticCache

import skim
from skim.ops import codec

LENGTH = 5 * TOPK
IDS = tokens(2, LENGTH)
SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "index_head_dim": 128, "first_k_dense_replace": 4}
FP8 = {"latent_dtype": "fp8", "score_dtype": "fp8"}
every_family = pytest.mark.parametrize("family", LAYOUTS)
every_format = pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])

_pairs: dict[str, tuple[Any, Any]] = {}


def pair(family: str) -> tuple[Any, Any]:
    """An eager model of the real latents' channels, and its converted twin."""
    if family not in _pairs:
        model = random_native(family, index_n_heads=16, **SIZES)
        _pairs[family] = model, skim.convert(copy.deepcopy(model))
    return _pairs[family]


@every_format
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_family
def test_caches_hold_656_and_132_bytes_a_token(family, kind, scale_format):
    _, ours = pair(family)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(ours.config, LENGTH)
    with skim.use(ours, scale_format=scale_format, **FP8):
        logits(ours, IDS, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, LENGTH, 656) and layer.index_keys.shape == (2, LENGTH, 132)
        assert layer.keys.dtype == layer.index_keys.dtype == torch.uint8
        scales = torch.cat([x.clone().view(torch.float32).flatten() for x in (layer.keys[..., 512:528], layer.index_keys[..., 128:])])
        mantissas = torch.frexp(scales).mantissa
        assert bool((mantissas == 0.5).all()) == (scale_format == "ue8m0"), "powers of two"


@every_family
def test_what_is_read_does_not_depend_on_the_kind_of_cache_or_the_pieces(family):
    _, ours = pair(family)
    with skim.use(ours, **FP8):
        expected = generate(ours, IDS)
        for arguments in ({"cache_implementation": "static"}, {"prefill_chunk_size": 7}, {"prefill_chunk_size": 1}):
            assert torch.equal(generate(ours, IDS, **arguments), expected)


@every_format
@every_family
def test_logits_are_those_of_an_eager_model_whose_latents_are_rounded(family, scale_format):
    """Where every key is read, so that no selection turns: with few queries, from the latents; with many, by the model's own attention."""
    model, ours = pair(family)
    eager = copy.deepcopy(model)

    def rounded(module: Any, args: Any, latent: Tensor) -> Tensor:
        values, scale = codec.quantise(latent.unflatten(-1, (4, 128)), scale_format=scale_format)
        return codec.dequantise(values, scale).flatten(-2)

    for module in eager.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = LENGTH
        if hasattr(module, "kv_a_layernorm"):
            module.kv_a_layernorm.register_forward_hook(rounded)
    expected = logits(eager, IDS)
    for settings in ({"budget": LENGTH}, {"mode": "dense"}):
        with skim.use(ours, scale_format=scale_format, **settings, **FP8):
            found = logits(ours, IDS, past_key_values=DynamicCache(), use_cache=True)
            assert error(found, expected) < 2e-2, "rotated channels are rounded to bfloat16, too"


def test_trap_10_gradients_do_not_get_lost_in_an_fp8_cache():
    _, ours = pair("deepseek_v32")
    with skim.use(ours, latent_dtype="fp8"):
        with pytest.raises(ValueError, match="latent_dtype: expected no gradients"):
            ours(IDS, past_key_values=DynamicCache())
        with skim.record(ours) as r:
            out = ours(IDS, labels=IDS, use_cache=False)
        (out.loss + r.alignment).backward()
        assert all(bool(g.isfinite().all()) for g in gradients(ours).values())


def test_fp8_latents_of_other_channels_are_refused_by_name():
    small = skim.convert(random_native("deepseek_v32"))
    with pytest.raises(ValueError, match="latent_dtype: expected 'bf16' of deepseek_v32, got 'fp8', which holds latents of 512 . 64 channels"):
        skim.use(small, latent_dtype="fp8")
    assert skim.use(small).state.config.latent_dtype == "bf16"


def test_a_cache_of_another_latent_dtype_is_refused():
    _, ours = pair("deepseek_v32")
    cache = DynamicCache()
    logits(ours, IDS, past_key_values=cache, use_cache=True)
    with skim.use(ours, latent_dtype="fp8"), pytest.raises(ValueError, match="holds latents of torch.float32, got torch.uint8"):
        logits(ours, IDS[:, :1], past_key_values=cache, use_cache=True)
