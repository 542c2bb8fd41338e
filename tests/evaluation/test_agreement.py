"""How near two models are: against distributions computed by hand, and where nothing or everything differs."""

import sys

import pytest
import torch
from tiny_model import converted, sharp_llama, text

import skim
from skim.evaluation import agreement, paired_t

ROWS = [text(40), text(25, seed=1), text(60, seed=2)]


@pytest.fixture(scope="module")
def model():
    return converted()


def test_a_model_agrees_with_itself(model):
    found = agreement(model, sharp_llama(), ROWS)
    assert found.kl == pytest.approx(0, abs=1e-6) and found.top1 == 1 and len(found.kl_by_row) == 3


def test_it_is_the_divergence_of_the_next_tokens_distributions(model):
    with skim.use(model, mode="sparse", budget=4):
        found = agreement(model, sharp_llama(), ROWS, last=[39, 10, 1])
        for row, last, kl, top1 in zip(ROWS, (39, 10, 1), found.kl_by_row, found.top1_by_row, strict=True):
            with torch.no_grad():
                p, q = (one(row).logits[0, -last - 1 : -1].double().softmax(-1) for one in (sharp_llama(), model))
            assert kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
            assert top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.kl > 1e-3 and found.top1 < 1 and found.kl == pytest.approx(sum(found.kl_by_row) / 3)


def test_long_rows_are_worked_off_in_parts(model, monkeypatch):
    with skim.use(model, mode="sparse", budget=4):
        whole = agreement(model, sharp_llama(), ROWS)
        monkeypatch.setattr(sys.modules[agreement.__module__], "CHUNK", 7)
        parts = agreement(model, sharp_llama(), ROWS)
    assert parts.kl_by_row == pytest.approx(whole.kl_by_row, rel=1e-5) and parts.top1_by_row == pytest.approx(whole.top1_by_row)


def test_two_models_are_paired_by_row(model):
    found = []
    for budget in (4, 16):
        with skim.use(model, mode="sparse", budget=budget):
            found.append(agreement(model, sharp_llama(), ROWS))
    assert paired_t(found[0].kl_by_row, found[1].kl_by_row).mean == pytest.approx(found[0].kl - found[1].kl)


def test_wrong_rows_are_named(model):
    with pytest.raises(ValueError, match="rows: expected at least one, got none"):
        agreement(model, model, [])
    with pytest.raises(ValueError, match=r"rows: expected \[1, T\] with T > 1, got \(1, 1\)"):
        agreement(model, model, [text(1)])
    with pytest.raises(ValueError, match=r"rows: expected \[1, T\] with T > 40, got \(1, 40\)"):
        agreement(model, model, [text(40)], last=[40])
    other = sharp_llama()
    other.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(ValueError, match="reference: expected the model's vocabulary of 61, got 70"):
        agreement(model, other, [text(40)])
