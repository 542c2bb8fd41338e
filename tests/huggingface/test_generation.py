"""Every way to generate with a converted model: the tokens are those of a model that reads its whole text again at each step."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import build, convert, generate, logits, sparse, tokens
from torch import Tensor, nn
from transformers import DynamicCache

import skim

IDS = tokens(2, 30)


def step_by_step(model: nn.Module, ids: Tensor, new: int = 8) -> Tensor:
    """Greedy tokens, the whole text read again for each."""
    for _ in range(new):
        ids = torch.cat((ids, logits(model, ids)[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.fixture
def model():
    return sparse("llama")


# Families whose caches differ: plain, sliding, hybrid, hybrid with sinks, of another name, linear attention, state-space beside attention.
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss", "gpt_neox", "qwen3_next", "falcon_h1"])
def test_greedy_tokens_are_those_of_reading_everything_again(family):
    model = sparse(family)
    expected = step_by_step(model, IDS)
    assert torch.equal(generate(model, IDS), expected)
    assert not torch.equal(expected, step_by_step(build(family), IDS)), "sparse reading says something else"


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_shared_selections_and_full_layers_generate_too(family):
    model = sparse(family, pattern="FSR")
    assert torch.equal(generate(model, IDS), step_by_step(model, IDS))


def test_sampling_with_a_cache_draws_what_sampling_without_draws(model):
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        drawn.append(generate(model, IDS, use_cache=use_cache, do_sample=True, top_k=20, temperature=0.9))
    assert torch.equal(*drawn)


def test_several_sequences_for_each_prompt(model):
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        drawn.append(generate(model, IDS, use_cache=use_cache, do_sample=True, num_return_sequences=3))
    assert torch.equal(*drawn)
    assert len({tuple(row) for row in drawn[0].tolist()}) == 6


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "falcon_h1"])
def test_beams_with_a_cache_are_beams_without(family):
    model = sparse(family)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    found = generate(model, IDS, **beams)
    assert torch.equal(found, generate(model, IDS, use_cache=False, **beams))
    assert found.shape == (4, 38)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("assistant", ["dense", "sparse"])
def test_an_assistant_changes_no_token(family, assistant):
    """Several tokens are checked at once and the cache is cut back where they were wrong, index keys too."""
    model = sparse(family)
    helper = build(family) if assistant == "dense" else sparse(family, budget=4)
    row = IDS[:1]
    assert torch.equal(generate(model, row, assistant_model=helper, max_new_tokens=12), step_by_step(model, row, 12))


def test_prompt_lookup_changes_no_token(model):
    row = IDS[:1, :10].repeat(1, 3)  # something to look up
    assert torch.equal(generate(model, row, prompt_lookup_num_tokens=4, max_new_tokens=12), step_by_step(model, row, 12))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_prefix_is_read_once_and_continued_twice(family):
    model = sparse(family)
    prefix, ends = IDS[:1, :20], (tokens(1, 6, seed=1), tokens(1, 9, seed=2))
    cache = DynamicCache(config=model.config)
    logits(model, prefix, past_key_values=cache, use_cache=True)
    for end in ends:
        whole = torch.cat((prefix, end), dim=1)
        assert torch.equal(generate(model, whole, past_key_values=copy.deepcopy(cache)), step_by_step(model, whole))
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox"])
def test_a_prefill_in_chunks_is_the_prefill_at_once(family):
    model = sparse(family)
    whole = logits(model, IDS)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, IDS[:, a:b], past_key_values=cache, use_cache=True) for a, b in ((0, 5), (5, 17), (17, 18), (18, 30))]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5
    assert torch.equal(generate(model, IDS, prefill_chunk_size=7), step_by_step(model, IDS))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_left_padded_prompts_generate_as_if_alone(family):
    model = sparse(family)
    short = IDS[:1, 12:]
    batch = torch.cat((torch.nn.functional.pad(short, (12, 0)), IDS[1:]))
    mask = (batch != 0).long()
    found = generate(model, batch, attention_mask=mask)
    assert torch.equal(found[:1, 12:], step_by_step(model, short))
    assert torch.equal(found[1:], step_by_step(model, IDS[1:]))
    assert torch.equal(found, generate(model, batch, attention_mask=mask, use_cache=False))
    assert torch.equal(found, generate(model, batch, attention_mask=mask, num_beams=1, prefill_chunk_size=7))


def test_a_prompt_shorter_than_the_budget_grows_beyond_it():
    """Trap 17: while everything fits the budget nothing is scored, but the index keys are written all the same."""
    model, short = sparse("llama"), IDS[:, :4]
    assert torch.equal(generate(model, short, max_new_tokens=16), step_by_step(model, short, 16))
    assert not torch.equal(generate(model, short, max_new_tokens=16), generate(build("llama"), short, max_new_tokens=16))


def test_fp8_index_keys_in_the_cache_give_the_same_tokens_as_reading_again():
    model = sparse("llama", score_dtype="fp8")
    assert torch.equal(generate(model, IDS), step_by_step(model, IDS))


def test_first_and_recent_tokens_are_kept_while_generating():
    model = sparse("llama", keep_first=2, keep_recent=3)
    assert torch.equal(generate(model, IDS), step_by_step(model, IDS))


def test_budget_and_pattern_may_change_between_the_steps_of_one_cache():
    model = sparse("llama")
    cache = DynamicCache(config=model.config)
    logits(model, IDS[:, :20], past_key_values=cache, use_cache=True)
    with skim.use(model, budget=5, pattern="SRF"):
        here = logits(model, IDS[:, 20:25], past_key_values=cache, use_cache=True)
    # What earlier tokens wrote into the cache was read at the other budget, so the whole is rebuilt the same way.
    again = DynamicCache(config=model.config)
    logits(model, IDS[:, :20], past_key_values=again, use_cache=True)
    with skim.use(model, budget=5, pattern="SRF"):
        one_by_one = [logits(model, IDS[:, t : t + 1], past_key_values=again, use_cache=True) for t in range(20, 25)]
    assert (torch.cat(one_by_one, dim=1) - here).abs().max() < 1e-5
    after = [logits(model, IDS[:, 25:], past_key_values=c, use_cache=True) for c in (cache, again)]
    assert (after[0] - after[1]).abs().max() < 1e-5


def test_a_converted_model_generates_beside_its_unconverted_self():
    dense, model = build("llama"), sparse("llama")
    one = generate(model, IDS)
    assert torch.equal(generate(dense, IDS), step_by_step(dense, IDS))
    assert torch.equal(generate(model, IDS), one)


def test_generation_in_dense_mode_is_the_models_own():
    model = convert(build("llama"), mode="dense")
    assert torch.equal(generate(model, IDS), generate(build("llama"), IDS))
    assert torch.equal(generate(model, IDS, num_beams=3), generate(build("llama"), IDS, num_beams=3))
