"""Index keys in every kind of cache follow its keys and values; a cache that can't hold them, or doesn't, is refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from tiny import FAMILIES, build, convert, generate, logits, recorded, sparse, tokens
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

import skim
from skim.huggingface import attention
from skim.huggingface.cache import append_index_keys, holds_index_keys
from skim.huggingface.state import indexed_layers
from skim.modules.indexer import cached_keys

IDS = tokens(2, 30)


def prefilled(model, ids=IDS, cache=None, **arguments):
    """A cache that holds `ids`, and the logits."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return cache, logits(model, ids, past_key_values=cache, use_cache=True, **arguments)


def in_step(layer):
    """Whether index keys and keys of a layer hold the same tokens: each index key carries its key's first channel."""
    return torch.equal(layer.index_keys[..., 0], layer.keys[:, 0, :, 0])


@pytest.fixture
def layer():
    """A layer of 3 rows and 6 tokens whose index keys repeat its keys."""
    cache = DynamicCache()
    keys = torch.randn(3, 2, 6, 4)
    append_index_keys(cache, 0, keys[:, 0])
    cache.update(keys, keys.clone(), 0)
    assert in_step(cache.layers[0])
    return cache.layers[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-2),
        lambda layer: layer.crop(0),
        lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0])),
        lambda layer: layer.batch_repeat_interleave(3),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        lambda layer: (layer.offload(), layer.prefetch()),
        lambda layer: (layer.crop(-1), layer.reorder_cache(torch.tensor([1, 0, 2])), layer.crop(-1)),
    ],
    ids=["crop", "crop nothing", "reorder", "repeat", "select", "offload and prefetch", "one after the other"],
)
def test_index_keys_follow_everything_that_is_done_to_a_layer(layer, change):
    change(layer)
    assert in_step(layer)
    assert layer.index_keys.shape[1] == layer.keys.shape[2] > 0


@pytest.mark.skipif(transformers.__version__ >= "5.18", reason="transformers takes the length to keep only before 5.18")
@pytest.mark.parametrize("keep", [4, 6, 9])
def test_older_crops_to_a_length_crop_index_keys_too(layer, keep):
    layer.crop(keep)
    assert in_step(layer)


def test_a_layer_that_was_reset_starts_anew_or_is_zeroed_like_its_keys(layer):
    layer.reset()
    if layer.keys is None:
        assert layer.index_keys is None
    else:  # transformers before 5.18
        assert in_step(layer) and not bool(layer.index_keys.any())


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="transformers before 5.18 goes on behind the zeroes of a reset")
def test_a_cache_that_was_reset_gives_what_a_fresh_one_gives():
    model = sparse("llama")
    cache, first = prefilled(model)
    cache.reset()
    _, second = prefilled(model, cache=cache)
    assert torch.equal(first, second)


def test_the_twin_of_a_layer_is_still_that_layer():
    model = sparse("mistral")
    cache, _ = prefilled(model)
    assert isinstance(cache.layers[0], DynamicSlidingWindowLayer)
    assert type(cache.layers[0]).__name__ == "IndexedDynamicSlidingWindowLayer"
    assert type(cache.layers[0]) is type(cache.layers[1])


@pytest.mark.parametrize("made", [lambda model: DynamicCache(), lambda model: DynamicCache(config=model.config), lambda model: None])
def test_however_a_dynamic_cache_is_made(made):
    model = sparse("llama")
    with torch.no_grad():
        out = model(IDS, past_key_values=made(model), use_cache=True)
        step = model(IDS[:, :1], past_key_values=out.past_key_values).logits
    assert (step - logits(model, torch.cat((IDS, IDS[:, :1]), dim=1))[:, -1:]).abs().max() < 1e-5
    assert all(holds_index_keys(out.past_key_values, number) for number in range(3))


def late(monkeypatch, waits: bool) -> list[int]:
    """Lets layers wait with the index keys that nothing reads, or not; the numbers of layers whose keys are made together."""
    numbers: list[int] = []

    def counted(indexers, *inputs):
        numbers.append(len(indexers))
        return cached_keys(indexers, *inputs)

    monkeypatch.setattr(attention, "cached_keys", counted)
    monkeypatch.setattr(attention, "takes_late_index_keys", lambda *_: waits)
    return numbers


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"minimax"}))  # it takes no cache but one of its own
def test_within_the_budget_all_layers_make_their_index_keys_at_once(family, monkeypatch):
    model = sparse(family, budget=34)
    ids, held = tokens(2, 35), []
    for waits in (True, False):
        with monkeypatch.context() as patch:
            numbers = late(patch, waits)
            cache, _ = prefilled(model, ids[:, :16])
            prefilled(model, ids[:, 16:32], cache)
            layers = len(indexed_layers(model))
            assert numbers == ([layers, layers] if waits else [])
            prefilled(model, ids[:, 32:], cache)
            held.append([layer.index_keys for layer in cache.layers if getattr(layer, "index_keys", None) is not None])
    assert len(held[0]) == layers and all(keys.shape[1] == 35 for keys in held[0])
    torch.testing.assert_close(*held, rtol=1e-4, atol=1e-5)


def test_no_layer_waits_where_its_weights_may_be_gone_by_then(monkeypatch):
    numbers = late(monkeypatch, True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    cache, _ = prefilled(sparse("llama", budget=30))
    assert numbers == [] and all(layer.index_keys.shape[1] == 30 for layer in cache.layers)


def test_what_waiting_layers_hold_is_bounded(monkeypatch):
    ids = tokens(16, 200)  # 400 KiB of hidden states a layer
    for workspace_mb, expected in ((1, [2, 1]), (64, [3])):
        numbers = late(monkeypatch, True)
        cache, _ = prefilled(sparse("llama", budget=256, workspace_mb=workspace_mb), ids)
        assert numbers == expected
        assert all(layer.index_keys.shape[1] == 200 for layer in cache.layers)


def test_layers_without_an_indexer_have_no_index_keys():
    model = sparse("llama", pattern="SRF")
    cache, _ = prefilled(model)
    assert [holds_index_keys(cache, number) for number in range(3)] == [True, False, False]


def test_a_copied_cache_goes_its_own_way():
    model = sparse("llama")
    cache, _ = prefilled(model)
    other = copy.deepcopy(cache)
    prefilled(model, IDS[:, :5], other)
    assert cache.layers[0].index_keys.shape[1] == 30
    assert other.layers[0].index_keys.shape[1] == other.layers[0].keys.shape[2] == 35


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_cache_that_was_written_to_a_file_goes_on_where_it_was(family):
    model = sparse(family)
    cache, _ = prefilled(model)
    restored = pickle.loads(pickle.dumps(cache))
    assert [type(layer) for layer in restored.layers] == [type(layer) for layer in cache.layers]
    assert torch.equal(prefilled(model, IDS[:, :5], restored)[1], prefilled(model, IDS[:, :5], cache)[1])


def test_what_an_interrupted_pass_left_can_be_cut_off_again():
    """Keys are there of the layers that it had reached, the index keys of none."""
    model = sparse("llama", budget=25)
    cache, first = prefilled(model, IDS[:, :20])

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prefilled(model, IDS[:, 20:24], cache)
    handle.remove()
    for layer in cache.layers[:2]:
        layer.crop(-4)
    assert in_shape(cache, 20)
    _, rest = prefilled(model, IDS[:, 20:], cache)
    assert (torch.cat((first, rest), dim=1) - logits(model, IDS)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral"])
def test_a_cache_that_was_filled_densely_is_refused_by_name(family):
    model = sparse(family)
    with skim.use(model, mode="dense"):
        cache, _ = prefilled(model)
    with pytest.raises(ValueError, match="past_key_values: layer 0 holds 30 tokens without index keys .*dense mode"):
        prefilled(model, IDS[:, :3], cache)


def test_a_cache_filled_before_convert_is_refused_by_name():
    model = build("llama")
    cache, _ = prefilled(model)
    convert(model)
    with pytest.raises(ValueError, match="before skim.convert"):
        generate(model, torch.cat((IDS, IDS), dim=1), past_key_values=cache)


def test_a_sparse_cache_goes_on_through_dense_mode_and_back():
    """Dense steps write index keys into a cache that has some, so that sparse ones can follow."""
    model = sparse("llama")
    cache, _ = prefilled(model, IDS[:, :10])
    with skim.use(model, mode="dense"):
        prefilled(model, IDS[:, 10:20], cache)
    _, there = prefilled(model, IDS[:, 20:], cache)
    assert in_shape(cache, 30)
    assert there.isfinite().all()
    # Reading the middle with a budget of everything is the same thing done without leaving sparse mode.
    other, _ = prefilled(model, IDS[:, :10])
    with skim.use(model, budget=1000):
        prefilled(model, IDS[:, 10:20], other)
    _, expected = prefilled(model, IDS[:, 20:], other)
    assert torch.equal(there, expected)


def in_shape(cache, tokens_held):
    return all(layer.index_keys.shape[1] == layer.keys.shape[2] == tokens_held for layer in cache.layers)


def test_trap_17_index_keys_are_written_while_scoring_is_skipped():
    model = sparse("llama", budget=25)
    cache, _ = prefilled(model, IDS[:, :20])  # no more than the budget: nothing is scored, the dense attention runs
    assert in_shape(cache, 20)
    _, rest = prefilled(model, IDS[:, 20:], cache)
    assert (rest - logits(model, IDS)[:, 20:]).abs().max() < 1e-5
    assert not torch.allclose(rest, logits(build("llama"), IDS)[:, 20:])


@pytest.mark.parametrize("budget", [8, 100])
def test_index_keys_of_another_score_dtype_are_refused_by_name_before_anything_is_written(budget):
    model = sparse("llama", budget=budget)
    cache, _ = prefilled(model)
    with skim.use(model, score_dtype="fp8"), pytest.raises(ValueError, match="layer 0 holds index keys of another score_dtype"):
        prefilled(model, IDS[:, :2], cache)
    assert in_shape(cache, 30)


def test_fp8_index_keys_take_a_byte_a_channel_and_four_for_the_scale():
    model = sparse("llama", score_dtype="fp8")
    cache, _ = prefilled(model)
    assert cache.layers[0].index_keys.shape == (2, 30, 16 + 4)
    assert cache.layers[0].index_keys.dtype == torch.uint8


class LooksLikeACache:
    """Does all that a cache does and is none."""

    def __init__(self):
        self.inner = DynamicCache()

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_what_only_looks_like_a_cache_is_refused_as_soon_as_index_keys_are_missing():
    model = sparse("llama")
    cache, _ = prefilled(model, cache=LooksLikeACache())
    with pytest.raises(ValueError, match="past_key_values: expected a transformers Cache, got 1 index keys beside 31 keys"):
        prefilled(model, IDS[:, :1], cache)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon_h1", "gpt_neox", "qwen3_next"])
def test_a_static_cache_gives_the_tokens_of_a_dynamic_one(family):
    model = sparse(family)
    if family == "gemma3_text":
        assert [letter for letter in model.model.skim_state.letters.values()] == ["F", "S", "S"]
    assert torch.equal(generate(model, IDS, cache_implementation="static"), generate(model, IDS))


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("score_dtype", ["bf16", "fp8"])
def test_a_static_cache_of_left_padded_rows(score_dtype, arguments):
    model = sparse("llama", score_dtype=score_dtype)
    mask = torch.ones_like(IDS)
    mask[0, :12] = 0
    arguments = {"attention_mask": mask, **arguments}
    assert torch.equal(generate(model, IDS, cache_implementation="static", **arguments), generate(model, IDS, **arguments))


def test_layers_of_a_cache_may_be_of_several_kinds():
    model = sparse("llama", budget=64)
    mixed = Cache(layers=[DynamicLayer(), StaticLayer(64), DynamicLayer()])
    _, whole = prefilled(model, IDS, mixed)  # within the budget: keys are made behind the layers' own updates, where those allow it
    dynamic, wanted = prefilled(model)
    assert torch.equal(whole, wanted)
    for found, other in zip(mixed.layers, dynamic.layers):
        assert torch.equal(found.index_keys[:, : IDS.shape[1]], other.index_keys)


def test_a_static_cache_reads_nothing_behind_what_was_written():
    model = sparse("llama")
    static = StaticCache(config=model.config, max_cache_len=64)
    _, first = prefilled(model, IDS[:, :20], static)
    for layer in static.layers:
        assert layer.index_keys.shape == (2, 64, 16)
        layer.index_keys[:, 20:] = torch.nan
        layer.keys[:, :, 20:], layer.values[:, :, 20:] = torch.nan, torch.nan
    _, rest = prefilled(model, IDS[:, 20:], static)
    whole = logits(model, IDS)
    assert (torch.cat((first, rest), dim=1) - whole).abs().max() < 1e-5


def test_a_static_cache_that_was_reset_starts_anew():
    model = sparse("llama")
    static = StaticCache(config=model.config, max_cache_len=40)
    _, first = prefilled(model, cache=static)
    held = static.layers[0].index_keys
    static.reset()
    assert static.layers[0].index_keys is held, "the memory that a compiled graph knows stays in use"
    assert not bool(held.any())
    _, second = prefilled(model, cache=static)
    assert torch.equal(first, second)


def test_a_budget_that_holds_everything_is_bitwise_dense_in_a_static_cache_too():
    model = sparse("llama", budget=30)
    _, ours = prefilled(model, cache=StaticCache(config=model.config, max_cache_len=64))
    dense = build("llama")
    _, theirs = prefilled(dense, cache=StaticCache(config=dense.config, max_cache_len=64))
    assert torch.equal(ours, theirs)


def test_a_static_sliding_cache_is_refused_by_name():
    model = sparse("mistral")
    with pytest.raises(ValueError, match="StaticSlidingWindowLayer can't hold index keys; use a dynamic cache"):
        generate(model, IDS, cache_implementation="static")


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="transformers has FP8 caches since 5.18")
def test_a_quantised_cache_keeps_index_keys_as_they_are():
    model = sparse("llama")
    cache, _ = prefilled(model, cache=QuantizedCache("fp8", config=model.config))
    plain, _ = prefilled(model)
    assert torch.equal(cache.layers[0].index_keys, plain.layers[0].index_keys)
    quantised = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8", "config": model.config}}
    assert generate(model, IDS, **quantised).shape == (2, 38)
    assert generate(model, IDS, num_beams=2, **quantised).shape == (2, 38)
    with skim.use(model, budget=1000):
        assert torch.equal(generate(model, IDS, **quantised), generate(build("llama"), IDS, **quantised))


def test_offloading_moves_index_keys_to_the_cpu_and_back_to_the_layers_device():
    """A real offloaded run needs two devices: tests/gpu/test_offloaded.py. Here the second one is `meta`."""
    cache = DynamicCache()
    keys = torch.randn(1, 2, 6, 4)
    append_index_keys(cache, 0, keys[:, 0])
    cache.update(keys, keys, 0)
    layer = cache.layers[0]
    layer.offload()
    assert layer.index_keys.device == layer.keys.device == torch.device("cpu")
    layer.device = torch.device("meta")
    layer.prefetch()
    assert layer.index_keys.device == layer.keys.device == torch.device("meta")


def test_a_layer_that_was_never_written_to_can_be_moved_and_cut():
    layer = DynamicLayer()
    cache = DynamicCache()
    cache.layers.append(layer)
    model = sparse("llama")
    prefilled(model, cache=cache)
    empty = type(cache.layers[0])()
    empty.offload()
    empty.reset()
    assert empty.index_keys is None


def test_a_sliding_window_forgets_keys_and_the_selection_stays_inside_it():
    model = sparse("mistral")
    cache, _ = prefilled(model)
    step = tokens(2, 1, seed=3)
    with skim.record(model, selections=True) as r, pytest.raises(ValueError, match="expected a forward pass from the first token inside skim.record"):
        prefilled(model, step, cache)
    _, whole = recorded(model, torch.cat((IDS, step), dim=1))
    # Positions count from the oldest key that the window still holds: 31 tokens less a window of 24.
    assert torch.equal(r.selections[0].indices + 7, whole[0].indices[:, -1:])
