"""What a query sees: start and end are transformers' own mask, whatever it is made of, or the mask is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_math import interval_mask
from tiny import build, convert, logits, recorded, sparse, tokens
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask, create_sliding_window_causal_mask

import skim
from skim.huggingface import masks

IDS = tokens(2, 30)
B = 2


def seen(implementation, make, **arguments):
    """bool [B, T, S] of a mask that transformers makes for the implementation, eager or ours."""
    config = arguments.pop("config")
    config._attn_implementation, config.skim_limit = implementation, 0
    mask = make(config=config, **arguments)
    if implementation == "eager":
        return mask[:, 0] == 0
    cache, T = arguments["past_key_values"], arguments["inputs_embeds"].shape[1]
    layer = 0 if cache is None or not any(cache.is_sliding) or make is create_causal_mask else cache.is_sliding.index(True)
    keys = T if cache is None else cache.get_mask_sizes(T, layer)[0]
    start, end = masks.unpack_visibility(mask)
    assert masks.is_visibility(mask)
    assert bool((start >= 0).all() and (start <= end).all() and (end <= keys).all())
    return interval_mask(start, end, keys)


masks.register("eager")


def cache_of(kind, config, past):
    """A cache that holds `past` tokens."""
    if kind == "none":
        return None
    cache = StaticCache(config=config, max_cache_len=past + 20) if kind == "static" else DynamicCache(config=config)
    if past:
        states = torch.zeros(B, 1, past, 4)
        cache.update(states, states, 0)
    return cache


@settings(max_examples=400)
@given(
    pattern=st.sampled_from(["full", "sliding", "chunked"]),
    kind=st.sampled_from(["none", "dynamic", "static"]),
    T=st.integers(1, 12),
    past=st.integers(0, 15),
    window=st.integers(1, 9),
    padding=st.sampled_from(["none", "left", "right", "all"]),
    amount=st.lists(st.integers(0, 40), min_size=B, max_size=B),
    packed=st.lists(st.integers(1, 5), max_size=4),
)
def test_start_and_end_are_transformers_own_mask(pattern, kind, T, past, window, padding, amount, packed):
    past = 0 if kind == "none" else past
    if pattern == "sliding":
        config, make = MistralConfig(num_hidden_layers=1, sliding_window=window), create_sliding_window_causal_mask
    elif pattern == "chunked":
        config, make = LlamaConfig(num_hidden_layers=1), create_chunked_causal_mask
        config.attention_chunk_size = window
    else:
        config, make = LlamaConfig(num_hidden_layers=1), create_causal_mask
    if kind == "static" and pattern == "sliding":
        kind = "dynamic"  # its layers can't hold index keys
    cache = cache_of(kind, config, past)
    mask = None
    if padding != "none":
        total = past + T
        count = torch.tensor(amount).clamp(max=total if padding == "all" else total - 1)
        position = torch.arange(total)
        hidden = position < count[:, None] if padding == "left" else position >= total - count[:, None]
        mask = torch.where(hidden, 0, 1)
    positions = None
    if packed and kind == "none" and mask is None:
        lengths = [*packed, T]
        positions = torch.cat([torch.arange(n) for n in lengths])[:T].expand(B, T)
    arguments = {
        "inputs_embeds": torch.zeros(B, T, 4),
        "attention_mask": mask,
        "past_key_values": cache,
        "position_ids": positions,
    }
    ours, theirs = (seen(i, make, config=config, **arguments) for i in ("skim_eager", "eager"))
    assert torch.equal(ours, theirs)


def padded(side: str, hidden: int = 7):
    """IDS with hidden tokens on one side, its 2-D mask, and where the real ones are."""
    pad, amount = torch.zeros(B, hidden, dtype=torch.long), IDS.shape[1]
    ids, mask = (torch.cat((pad, x) if side == "left" else (x, pad), dim=1) for x in (IDS, torch.ones_like(IDS)))
    real = slice(hidden, None) if side == "left" else slice(0, amount)
    return ids, mask, real


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss", "gpt_neox", "cohere", "falcon_h1"])
def test_padded_rows_are_read_as_if_unpadded(family, side):
    model = sparse(family)
    ids, mask, real = padded(side)
    found = logits(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    assert (found[:, real] - logits(model, IDS)).abs().max() < 1e-5
    assert found.isfinite().all()


def test_rows_of_different_lengths_and_a_row_of_nothing_but_padding():
    model = sparse("llama")
    ids = tokens(4, 30)
    mask = torch.ones_like(ids)
    mask[1, :9], mask[2, 25:], mask[3] = 0, 0, 0
    found = logits(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    assert found.isfinite().all()
    for row, real in ((0, slice(0, 30)), (1, slice(9, 30)), (2, slice(0, 25))):
        assert (found[row, real] - logits(model, ids[row : row + 1, real])[0]).abs().max() < 1e-5
    _, selections = recorded(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    assert int(selections[0].counts[3].sum()) == 0


def test_a_row_that_sees_nothing_has_finite_gradients():
    model = sparse("llama")
    mask = torch.ones_like(IDS)
    mask[1] = 0
    with skim.record(model) as r:
        out = model(IDS, attention_mask=mask, labels=IDS)
        (out.loss + r.alignment).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_that_leaves_no_more_than_the_budget_is_bitwise_dense(implementation):
    """What counts is what a row sees, not how many keys there are."""
    model, untouched = sparse("llama", implementation, budget=30), build("llama", implementation)
    ids, mask, _ = padded("left", hidden=20)
    arguments = {"attention_mask": mask, "position_ids": positions_of(mask)}
    assert torch.equal(logits(model, ids, **arguments), logits(untouched, ids, **arguments))
    with skim.use(model, budget=29):
        assert not torch.equal(logits(model, ids, **arguments), logits(untouched, ids, **arguments))


def test_a_dense_mask_is_known_again_whatever_its_kind():
    """None, a tensor that generate() hands on, or an object as flex attention's BlockMask."""

    class Blocks:
        pass

    for made in (None, torch.ones(1, 1, 3, 3), Blocks()):
        assert masks.is_decided_dense(masks._dense(lambda made=made, **_: made, {}))
    assert not masks.is_decided_dense(torch.ones(1, 1, 3, 3))
    assert not masks.is_decided_dense(Blocks())


def packed(*lengths):
    parts = [tokens(1, n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return parts, torch.cat(parts, dim=1), positions, bounds


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "cohere", "smollm3"])
def test_trap_21_positions_that_begin_again_separate_packed_texts(family):
    model = sparse(family)
    parts, ids, positions, _ = packed(13, 30, 5)
    found = logits(model, ids, position_ids=positions)
    assert (found - torch.cat([logits(model, part) for part in parts], dim=1)).abs().max() < 1e-5


def test_trap_21_cumulative_lengths_separate_packed_texts():
    model = sparse("llama")
    parts, ids, positions, bounds = packed(13, 30, 5)
    expected = torch.cat([logits(model, part) for part in parts], dim=1)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 30, "max_length_k": 30}
    # An all-ones mask and no word of positions in it: only the lengths say where a text ends.
    found = logits(model, ids, attention_mask=torch.ones_like(ids), position_ids=positions, **lengths)
    assert (found - expected).abs().max() < 1e-5
    assert (logits(model, ids, attention_mask=torch.ones_like(ids), position_ids=positions) - expected).abs().max() > 1e-2
    with pytest.raises(ValueError, match="cu_seq_lens_k: expected a batch of one packed row, got 2 rows"):
        logits(model, ids.expand(2, -1), attention_mask=torch.ones(2, 48), position_ids=positions, **lengths)


def test_packed_texts_that_each_fit_the_budget_are_bitwise_dense():
    model, untouched = sparse("llama", budget=30), build("llama")
    _, ids, positions, _ = packed(13, 30, 5)
    assert torch.equal(logits(model, ids, position_ids=positions), logits(untouched, ids, position_ids=positions))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_four_axes_are_refused_by_name(dtype):
    model = sparse("llama")
    mask = torch.ones(B, 1, 30, 30, dtype=torch.bool).tril()
    mask = mask if dtype == torch.bool else torch.where(mask, 0.0, -torch.inf)
    with pytest.raises(ValueError, match=r"attention_mask: expected a 2-D mask or none, got Tensor \(2, 1, 30, 30\)"):
        logits(model, IDS, attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask"), skim.record(model):
        logits(model, IDS, attention_mask=mask)
    skim.use(model, mode="dense")
    assert torch.equal(logits(model, IDS, attention_mask=mask), logits(build("llama"), IDS, attention_mask=mask))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_dense_mask_that_went_to_another_device_is_known_by_what_it_shows(family, implementation):
    """Where accelerate spreads a model, layers get copies of the mask, without the mark that their decoder made it."""
    model, padding = sparse(family, implementation), torch.ones_like(IDS)
    padding[:, :22] = 0  # rows of 30 tokens that see no more than the budget of 8
    arguments = {"attention_mask": padding, "use_cache": False}
    expected = logits(model, IDS, **arguments)

    def move(module, args, kwargs):
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()}

    model.model.layers[1].register_forward_pre_hook(move, with_kwargs=True)
    assert torch.equal(logits(model, IDS, **arguments), expected)


def test_holes_in_a_mask_are_refused_by_name():
    model = sparse("llama")
    mask = torch.ones_like(IDS)
    mask[1, 10] = 0
    with pytest.raises(ValueError, match="attention_mask: expected no hidden token between visible ones .*got holes"):
        logits(model, IDS, attention_mask=mask)


def test_a_model_that_reads_in_both_directions_is_refused_by_name():
    model = build("llama")
    model.config.is_causal = False
    convert(model)
    with pytest.raises(ValueError, match="llama lets a token read later ones"):
        logits(model, IDS)


def overlay(batch, head, query, key):
    return key % 2 == 0


@pytest.mark.parametrize("argument", ["or_mask_function", "and_mask_function"])
def test_an_overlay_of_the_familys_own_is_refused_by_name(argument):
    config = LlamaConfig(num_hidden_layers=1)
    with pytest.raises(ValueError, match="attention_mask: llama adds a mask of its own to the causal one"):
        seen(
            "skim_eager",
            create_causal_mask,
            config=config,
            inputs_embeds=torch.zeros(B, 9, 4),
            attention_mask=None,
            past_key_values=None,
            **{argument: overlay},
        )


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="transformers has blocks in text masks since 5.18")
def test_blocks_that_read_themselves_in_both_directions_are_refused_by_name():
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, -1]] * B)
    with pytest.raises(ValueError, match="llama lets a token read later ones"):
        seen(
            "skim_eager",
            create_causal_mask,
            config=LlamaConfig(num_hidden_layers=1),
            inputs_embeds=torch.zeros(B, 7, 4),
            attention_mask=None,
            past_key_values=None,
            block_sequence_ids=blocks,
        )


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("mistral", 1), ("gemma3_text", 2)])
def test_visibility_is_made_once_a_forward_for_each_kind_of_layer(family, kinds, monkeypatch):
    model, calls, made = sparse(family), [], masks._visibility
    monkeypatch.setattr(masks, "_visibility", lambda *a, **k: calls.append(1) or made(*a, **k))
    logits(model, IDS)
    assert len(calls) == kinds
    skim.use(model, mode="dense")
    logits(model, IDS)
    assert len(calls) == kinds, "a dense forward makes none"


def test_no_mask_of_queries_times_keys_is_ever_made(monkeypatch):
    """Start and end are two numbers a query."""
    model, shapes, made = sparse("llama"), [], masks._visibility

    def watch(*args, **kwargs):
        mask = made(*args, **kwargs)
        shapes.append(tuple(mask.shape))
        return mask

    monkeypatch.setattr(masks, "_visibility", watch)
    logits(model, IDS)
    assert shapes == [(B, 1, 30, 2)]
