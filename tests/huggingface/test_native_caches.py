"""Latents and index keys in caches: the eager model's tokens however they are made, and nothing that grows as T x S."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference_math import error
from tiny import MLA, build, generate, logits, tokens
from tiny_native import LAYOUTS, SHARED, SIZES, TOPK, random_native
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import skim
from skim.huggingface.latents import DynamicLatentLayer, StaticLatentLayer

LENGTH = 5 * TOPK
WIDTH = SIZES["kv_lora_rank"] + SIZES["qk_rope_head_dim"]
IDS = tokens(2, LENGTH)
MASK = torch.ones_like(IDS)
MASK[1, :7] = 0
every_family = pytest.mark.parametrize("family", LAYOUTS)

_pairs: dict[str, tuple[Any, Any]] = {}


def pair(family: str) -> tuple[Any, Any]:
    """An eager model and its converted twin; GLM's layers share selections."""
    if family not in _pairs:
        changes = {"num_hidden_layers": 4, "indexer_types": SHARED} if family == "glm_moe_dsa" else {}
        model = random_native(family, index_n_heads=16, **changes)
        _pairs[family] = model, skim.convert(copy.deepcopy(model))
    return _pairs[family]


def filled(model: Any, cache: Any, lengths: tuple[int, ...], mask: Tensor = MASK) -> Tensor:
    """Logits of IDS, read in pieces of these lengths."""
    found, at = [], 0
    for length in lengths:
        piece = slice(at, at + length)
        at += length
        with torch.no_grad():
            found.append(model(IDS[:, piece], attention_mask=mask[:, :at], past_key_values=cache).logits)
    assert at == LENGTH
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 16, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 3},
        {"num_beams": 2, "cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=repr,
)
@every_family
def test_generate_gives_the_eager_models_tokens(family, arguments):
    model, ours = pair(family)
    rows = 1 if "prompt_lookup_num_tokens" in arguments else 2
    inputs = {"ids": IDS[-rows:], "attention_mask": MASK[-rows:], "max_new_tokens": 12}
    usual = {"num_beams": arguments.get("num_beams", 1)}
    assert torch.equal(generate(ours, **inputs, **arguments), generate(model, **inputs, **usual))


@pytest.mark.parametrize("lengths", [(LENGTH,), (1,) * LENGTH, (3, 5, 1, 1, 17, 13), (TOPK, 1, 31), (39, 1)], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_family
def test_pieces_of_any_length_give_the_logits_of_the_whole(family, kind, lengths):
    model, ours = pair(family)
    cache = DynamicCache(config=ours.config) if kind == "dynamic" else StaticCache(config=ours.config, max_cache_len=LENGTH + 9)
    real = MASK.bool()
    assert error(filled(ours, cache, lengths)[real], logits(model, IDS, attention_mask=MASK)[real]) < 1e-4


@pytest.mark.parametrize("kind", ["dynamic", "static", "plain"])
@pytest.mark.parametrize("family", ["deepseek_v3", *LAYOUTS])
def test_a_cache_holds_one_latent_and_one_index_key_a_token(family, kind):
    if family == "deepseek_v3":
        ours = skim.convert(build(family, "eager", **{**MLA, "qk_rope_head_dim": 8}), skim.Config(budget=TOPK, index_n_heads=2, index_head_dim=16))
        skim.use(ours, mode="sparse")
    else:
        ours = pair(family)[1]
    caches = {"plain": DynamicCache, "dynamic": lambda: DynamicCache(config=ours.config), "static": lambda: StaticCache(ours.config, LENGTH + 9)}
    cache = caches[kind]()
    filled(ours, cache, (LENGTH - 1, 1))
    held = LENGTH + 9 if kind == "static" else LENGTH
    for number, layer in enumerate(cache.layers):
        assert type(layer) is (StaticLatentLayer if kind == "static" else DynamicLatentLayer)
        assert layer.keys.shape == (2, 1, held, WIDTH) and layer.values.numel() == 0
        if hasattr(ours.model.layers[number].self_attn, "indexer"):
            assert layer.index_keys.shape == (2, held, 16)
        else:
            assert layer.index_keys is None, "a layer that reuses a selection has no index keys"
    assert int(cache.get_seq_length()) == LENGTH


def test_a_new_token_copies_no_earlier_one():
    ours, cache = pair("deepseek_v32")[1], DynamicCache()
    filled(ours, cache, (LENGTH - 6, 1, 1, 1, 1, 1, 1))
    layer = cache.layers[0]
    before = layer.keys.data_ptr(), layer.index_keys.data_ptr()
    expected = layer.keys[:, :, :LENGTH].clone()
    generate(ours, torch.cat((IDS, IDS[:, :1]), dim=1), past_key_values=cache, max_new_tokens=2)
    assert (layer.keys.data_ptr(), layer.index_keys.data_ptr()) == before
    assert torch.equal(layer.keys[:, :, :LENGTH], expected)


class Waits(TorchDispatchMode):
    """How often Python asks for a tensor's value, which on a GPU waits for everything before it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"latent_dtype": "fp8", "score_dtype": "fp8"}], ids=["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_family
def test_no_layer_makes_a_decoding_step_wait_for_the_device(family, kind, settings):
    found = []
    for layers in (1, 3):
        shared = {"indexer_types": ["full", "shared", "full"][:layers]} if family == "glm_moe_dsa" else {}
        sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "first_k_dense_replace": layers, "num_hidden_layers": layers}
        ours = skim.convert(random_native(family, **sizes, **shared))
        skim.use(ours, **settings)
        cache = DynamicCache() if kind == "dynamic" else StaticCache(ours.config, LENGTH + 1)
        filled(ours, cache, (LENGTH,))
        with Waits() as waits, torch.no_grad():
            ours(IDS[:, -1:], past_key_values=cache)
        found.append(waits.count)
    assert found[0] == found[1]


def test_a_copied_cache_goes_its_own_way():
    ours, cache = pair("deepseek_v32")[1], DynamicCache()
    filled(ours, cache, (LENGTH - 2, 1, 1), torch.ones_like(MASK))
    other = copy.deepcopy(cache)
    with torch.no_grad():
        one = ours(IDS[:, :1], past_key_values=cache).logits
        ours(IDS[:, 1:2], past_key_values=other)
        two = ours(IDS[:, :3], past_key_values=cache).logits
    whole = logits(ours, torch.cat((IDS, IDS[:, :1], IDS[:, :3]), dim=1))
    assert error(torch.cat((one, two), dim=1), whole[:, LENGTH:]) < 1e-5


def test_cropped_reordered_and_repeated_caches_read_on():
    ours, cache = pair("glm_moe_dsa")[1], DynamicCache()
    filled(ours, cache, (LENGTH - 2, 1, 1), torch.ones_like(MASK))
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    with torch.no_grad():
        found = ours(IDS[:, :3], past_key_values=cache).logits
    assert error(found, logits(ours, torch.cat((IDS.flip(0)[:, :-4], IDS[:, :3]), dim=1))[:, -3:]) < 1e-5
    cache.reset()
    if cache.get_seq_length() == 0:  # transformers before 5.18 keeps the length, of zeros
        assert error(filled(ours, cache, (30, 10)), filled(ours, DynamicCache(), (30, 10))) < 1e-5


def test_modes_of_inference_can_alternate():
    ours, cache = pair("deepseek_v32")[1], DynamicCache()
    ids, found = torch.cat((IDS, IDS), dim=1), []
    for at, mode in enumerate([torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad] * 2):
        with mode():
            found.append(ours(ids[:, 8 * at : 8 * at + 8], past_key_values=cache).logits.detach().clone())
    assert error(torch.cat(found, dim=1), logits(ours, ids)) < 1e-5


def test_an_offloaded_layer_keeps_no_buffer_behind():
    cache = DynamicCache()
    filled(pair("deepseek_v32")[1], cache, (LENGTH - 1, 1))
    assert cache.layers[0].room.keys() == {"keys", "index_keys"}
    cache.layers[0].offload()
    assert not cache.layers[0].room


def test_gradients_flow_through_a_dynamic_cache():
    _, ours = pair("deepseek_v32")
    found = []
    for one in (copy.deepcopy(ours), copy.deepcopy(ours)):
        cache = DynamicCache() if not found else None
        pieces = IDS.split((20, 5, 5, 10), dim=1) if cache is not None else (IDS,)
        out = [one(piece, past_key_values=cache).logits for piece in pieces]
        torch.cat(out, dim=1).square().mean().backward()
        found.append(one.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad)
    assert error(found[0], found[1]) < 1e-5


def test_tokens_cached_by_the_model_itself_are_refused():
    model, ours = pair("deepseek_v32")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: layer 0 holds 40 tokens from before skim.convert"):
        ours(IDS[:, :1], past_key_values=cache)


def test_tokens_cached_while_every_key_was_read_have_no_index_keys():
    model = skim.convert(build("deepseek_v3", "eager", **MLA), skim.Config(budget=TOPK, index_n_heads=2, index_head_dim=16))
    cache = DynamicCache()
    filled(model, cache, (LENGTH,))
    assert cache.layers[0].index_keys is None
    skim.use(model, mode="sparse")
    with pytest.raises(ValueError, match="holds 40 tokens without index keys"):
        model(IDS[:, :1], past_key_values=cache)


def test_caches_that_hold_no_latents_are_refused_by_name():
    from transformers.cache_utils import DynamicSlidingWindowLayer

    ours = pair("deepseek_v32")[1]
    cache = DynamicCache()
    cache.layer_class_to_replicate = lambda: DynamicSlidingWindowLayer(sliding_window=4)
    with pytest.raises(ValueError, match="past_key_values: DynamicSlidingWindowLayer can't hold latents"):
        ours(IDS, past_key_values=cache)


class Largest(TorchDispatchMode):
    """The largest number of elements of a tensor that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.numel():  # no expanded view
                self.elements = max(self.elements, x.numel())
        return made


@every_family
def test_trap_15_16_nothing_grows_with_queries_times_keys(family):
    T = 1024
    model = random_native(family)
    ours = skim.convert(copy.deepcopy(model))
    skim.use(ours, workspace_mb=1)
    ids = tokens(1, T, seed=1)
    with Largest() as eager, torch.no_grad():
        model(ids, logits_to_keep=1)
    with Largest() as sparse, torch.no_grad():
        ours(ids, logits_to_keep=1)
    assert eager.elements >= 8 * T * T, "the native indexer's scores, of every head"
    assert sparse.elements <= T * T // 2
