"""The quality table: each figure against one computed by hand."""

import math

import pytest
import torch
from tiny_model import converted, text
from transformers import DynamicCache

import skim
from skim.evaluation import PATTERNS, evaluate, perplexity


@pytest.fixture(scope="module")
def model():
    return converted()


def test_perplexity_is_the_exponential_of_transformers_own_loss(model):
    tokens = text(80)
    with torch.no_grad(), skim.use(model, mode="dense"):
        loss = model(tokens, labels=tokens).loss
        assert perplexity(model, tokens)[0] == pytest.approx(math.exp(loss), rel=1e-5)


def test_every_pattern_has_a_row_and_reads_within_the_budget(model):
    rows = {row.pattern: row for row in evaluate(model, text(96), 16)}
    assert tuple(rows) == PATTERNS
    assert rows["dense"].keys_per_query == (96 + 1) / 2 and rows["dense"].attention_mass == 1.0
    for name in PATTERNS[1:]:
        assert 0 < rows[name].attention_mass <= 1 and rows[name].keys_per_query <= 16
    assert rows["window"].keys_per_query == pytest.approx((sum(range(1, 17)) + 80 * 16) / 96)


def test_the_oracle_keeps_the_most_mass(model):
    rows = {row.pattern: row for row in evaluate(model, text(96), 16)}
    assert max(PATTERNS[1:], key=lambda name: rows[name].attention_mass) == "oracle"


def test_mass_is_the_share_of_the_dense_runs_head_mean_attention():
    model = converted()
    tokens, budget = text(64), 16
    (row,) = evaluate(model, tokens, budget, ["window"])
    skim.revert(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    kept = [float(p[0, :, t, t - budget + 1 : t + 1].mean(0).sum()) for p in attentions for t in range(0, 64, 4) if t >= budget]
    assert row.attention_mass == pytest.approx(sum(kept) / len(kept), rel=1e-5)


def test_a_text_within_the_budget_has_no_mass_to_lose(model):
    assert [row.attention_mass for row in evaluate(model, text(12), 16, ["dense", "dsa"])] == [None, None]


def test_the_model_is_left_as_it_was(model):
    with skim.use(model, mode="sparse", budget=9):
        before = model(text(40)).logits
        list(evaluate(model, text(40), 16))
        assert torch.equal(model(text(40)).logits, before)


def test_the_run_with_dsa_fills_the_cache_to_go_on_from(model):
    tokens, cache = text(48), DynamicCache(config=model.config)
    list(evaluate(model, tokens, 16, cache=cache))
    with skim.use(model, mode="sparse", budget=16), torch.no_grad():
        whole = model(torch.cat((tokens, text(1, seed=1)), 1)).logits[:, -1]
        went_on = model(text(1, seed=1), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(went_on, whole, rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_named(model):
    with pytest.raises(ValueError, match=r"patterns: expected some of .*got 'dsaa'"):
        list(evaluate(model, text(8), 4, ["dsaa"]))
    with pytest.raises(ValueError, match=r"tokens: expected \[1, T\]"):
        list(evaluate(model, text(1), 4))
