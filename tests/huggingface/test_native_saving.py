"""Native DSA models on disk: saved whole they are ordinary checkpoints, their indexers alone are an adapter, exports read sparsely."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_math import error
from tiny import MLA, build, convert, logits, recorded, tokens
from tiny_native import LAYOUTS, SHARED, TOPK, random_native
from transformers import AutoModelForCausalLM

import skim

IDS = tokens(2, 5 * TOPK)
every_family = pytest.mark.parametrize("family", LAYOUTS)


def native(family, **changes):
    shared = {"num_hidden_layers": 4, "indexer_types": SHARED} if family == "glm_moe_dsa" else {}
    return random_native(family, **{"index_n_heads": 16, **shared, **changes})


@every_family
def test_a_converted_model_saved_whole_is_its_familys_checkpoint(family, tmp_path):
    model = native(family)
    expected = logits(model, IDS)
    skim.convert(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert loaded.config.model_type == family
    assert torch.equal(logits(loaded, IDS), expected)
    assert error(logits(skim.convert(loaded), IDS), expected) < 1e-4


@pytest.mark.parametrize("family", ["deepseek_v3", *LAYOUTS])
def test_its_config_says_nothing_of_the_conversion(family, tmp_path):
    model = build(family, "eager", **MLA) if family == "deepseek_v3" else native(family)
    model.save_pretrained(tmp_path / "before")
    expected = model.config.to_dict()
    skim.use(convert(model) if family == "deepseek_v3" else skim.convert(model), budget=5, mode="sparse")
    other = copy.deepcopy(model)
    skim.use(other, budget=3)
    for one, name in ((model, "one"), (other, "other")):
        assert one.config.to_dict() == expected
        one.config.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "config.json").read_bytes() == (tmp_path / "before" / "config.json").read_bytes()
    assert (model.config.skim_limit, other.config.skim_limit) == (5, 3)
    assert skim.revert(model).config.to_dict() == expected and not {"skim_limit", "to_dict"} & set(vars(model.config))


@every_family
def test_indexers_saved_alone_are_loaded_into_another_copy_with_the_settings(family, tmp_path):
    trained, other = skim.convert(native(family)), native(family)
    with torch.no_grad():
        for layer in trained.model.layers:
            if hasattr(layer.self_attn, "indexer"):
                layer.self_attn.indexer.wk.weight.normal_()
    skim.use(trained, budget=5, keep_recent=2)
    skim.save(trained, tmp_path)
    skim.load(other, tmp_path)
    assert torch.equal(logits(other, IDS), logits(trained, IDS))
    assert recorded(other, IDS)[1][0].budget == 5
    with pytest.raises(ValueError, match="index_n_heads: expected 8, .*got 16"):
        skim.load(native(family, index_n_heads=8), tmp_path)


@every_family
def test_an_exported_native_model_reads_by_the_settings_that_it_had(family, tmp_path):
    model = skim.use(skim.convert(native(family)), budget=5).model
    expected = logits(model, IDS)
    skim.export(model, tmp_path / "exported")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True, attn_implementation="eager").eval()
    assert error(logits(loaded, IDS), expected) < 1e-5
    assert recorded(loaded, IDS)[1][0].budget == 5
