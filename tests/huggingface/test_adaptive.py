"""An adaptive budget inside a model: how it is set, saved, and when the model's own attention runs."""

import pytest
import torch
from tiny_model import converted, text

import skim


@pytest.fixture
def model():
    return skim.use(converted(), mode="sparse", budget=32).model


def kept(model, tokens) -> dict[int, skim.Selection]:
    with skim.record(model, selections=True) as record, torch.no_grad():
        model(tokens)
    return record.selections


def test_it_narrows_the_fixed_budget(model):
    fixed = kept(model, text(80))
    with skim.use(model, mass=0.6, min_budget=3):
        narrow = kept(model, text(80))
    for layer, selection in narrow.items():
        selection.check(80)
        assert selection.budget == 32 and int(selection.counts.sum()) < int(fixed[layer].counts.sum())
        assert bool((selection.counts[0, 3:] >= 3).all())
    assert all(torch.equal(fixed[layer].indices, again.indices) for layer, again in kept(model, text(80)).items())


def test_the_models_own_attention_runs_where_no_row_sees_more_than_the_least(model):
    tokens = text(20)
    with torch.no_grad():
        sparse = model(tokens).logits  # 20 keys are within the budget
        with skim.use(model, mode="dense"):
            dense = model(tokens).logits
        with skim.use(model, mass=0.3, min_budget=20):
            same = model(tokens).logits
        with skim.use(model, mass=0.3, min_budget=19):
            narrowed = model(tokens).logits
    assert torch.equal(sparse, dense) and torch.equal(same, dense) and not torch.equal(narrowed, dense)


def test_generation_reads_what_one_pass_reads(model):
    tokens = text(40)
    with skim.use(model, mass=0.6, min_budget=2), torch.no_grad():
        written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, pad_token_id=0)
        again = model(written).logits[0, 39:-1].argmax(-1)
    assert torch.equal(written[0, 40:], again)


def test_it_is_saved_with_the_adapter_and_an_older_file_has_none(model, tmp_path):
    import json

    skim.use(model, mass=0.75, min_budget=4)
    skim.save(model, tmp_path)
    loaded = skim.load(skim.revert(converted()), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(text(60)).logits, model(text(60)).logits)
    file = tmp_path / "skim_config.json"
    described = json.loads(file.read_text())
    assert (described["config"].pop("mass"), described["config"].pop("min_budget")) == (0.75, 4)
    file.write_text(json.dumps(described))
    older = skim.load(skim.revert(converted()), tmp_path)
    with skim.use(model, mass=None, min_budget=1), torch.no_grad():
        assert torch.equal(older(text(60)).logits, model(text(60)).logits)


def test_what_it_cannot_be_is_refused_and_changes_nothing(model):
    for changes, message in (({"mass": 0}, "mass: expected"), ({"min_budget": 33}, r"min_budget: expected an int from 1 to budget \(32\), got 33")):
        with pytest.raises(ValueError, match=message):
            skim.use(model, **changes)
    assert kept(model, text(40))[0].counts.max() == 32
