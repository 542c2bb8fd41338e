"""Warm-up: the base stays bit for bit, the indexers learn what it attends to."""

import pytest
import torch
from tiny_model import converted, text

import skim
from skim.evaluation import evaluate
from skim.training import Warmup, warmup


def windows(count=8, length=96):
    return [text(length, seed)[0] for seed in range(count)]


def test_the_indexers_learn_and_the_base_stays_bitwise():
    model = converted()
    base = {name: p.clone() for name, p in model.named_parameters() if ".indexer." not in name}
    losses = warmup(model, windows(), Warmup(steps=120))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    for name, p in model.named_parameters():
        if name in base:
            assert torch.equal(p, base[name]) and p.grad is None and p.requires_grad


def test_a_trained_indexer_keeps_more_mass_than_any_rule():
    model = converted()
    warmup(model, windows(), Warmup(steps=150))
    rows = {row.pattern: row.attention_mass for row in evaluate(model, text(96, seed=99), 16)}
    assert rows["dsa"] > max(rows[name] for name in ("window", "sinks", "blocks", "random"))


def test_the_model_reads_sparsely_afterwards():
    model = converted()
    dense = model(text(64)).logits
    warmup(model, windows(2), Warmup(steps=2))
    assert not torch.equal(model(text(64)).logits, dense)


def test_the_same_seed_gives_the_same_indexers():
    first, second = converted(), converted()
    assert warmup(first, windows(3), Warmup(steps=5, seed=3)) == warmup(second, windows(3), Warmup(steps=5, seed=3))
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)


def test_bf16_models_train_their_indexers_in_float32_and_keep_their_dtype():
    model = converted().to(torch.bfloat16)
    losses = warmup(model, windows(4), Warmup(steps=30))
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_frozen_parameters_stay_frozen_and_training_mode_returns():
    model = converted().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    warmup(model, windows(2), Warmup(steps=1))
    assert model.training and not model.model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad


def test_the_rate_rises_and_falls_as_a_cosine():
    recipe = Warmup(steps=100, lr=1.0, ramp=10)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=0.01)


def test_no_window_and_no_conversion_are_refused():
    model = converted()
    with pytest.raises(ValueError, match="windows: expected at least one"):
        warmup(model, [])
    skim.revert(model)
    with pytest.raises(ValueError, match="after skim.convert"):
        warmup(model, windows(1), Warmup(steps=1))


def test_a_model_without_indexers_is_refused():
    with pytest.raises(ValueError, match="at least one layer with an indexer"):
        warmup(converted(pattern="F"), windows(1), Warmup(steps=1))
