"""skim.export of a deepseek_v3 with indexers: a deepseek_v32 that plain transformers reads with the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from reference_math import error
from tiny import MLA, build, convert, generate, logits, tokens
from transformers import AutoModelForCausalLM, DeepseekV32ForCausalLM

import skim

IDS = tokens(2, 40)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}
SIXTEEN = {"index_n_heads": 16}  # with few heads many scores are zero, and topk breaks ties in another way


def dense(**changes):
    return build("deepseek_v3", **{**MLA, **changes})


def exported(model, folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(skim.export(model, folder), trust_remote_code=False, **arguments)


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": YARN, "attention_bias": True, "rms_norm_eps": 1e-5}])
def test_where_the_budget_keeps_every_key_it_reads_as_the_dense_model_did(changes, tmp_path):
    base = dense(**changes)
    native = exported(convert(dense(**changes), budget=IDS.shape[1], **SIXTEEN), tmp_path / "out")
    assert type(native) is DeepseekV32ForCausalLM
    assert error(logits(native, IDS), logits(base, IDS)) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": YARN, "attention_bias": True, "rms_norm_eps": 1e-5}])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_sparse_it_reads_what_the_converted_model_reads(changes, implementation, tmp_path):
    model = convert(dense(**changes), **SIXTEEN)
    native = exported(model, tmp_path / "out", attn_implementation=implementation)
    assert error(logits(model, IDS), logits(dense(**changes), IDS)) > 1e-2, "it isn't dense"
    assert error(logits(native, IDS), logits(model, IDS)) < 1e-5
    assert torch.equal(generate(native, IDS), generate(model, IDS))


def test_what_the_folder_says_and_what_it_leaves_to_each_release(tmp_path):
    folder = skim.export(convert(dense(), budget=9, **SIXTEEN), tmp_path / "out")
    written = json.loads((folder / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("deepseek_v32", ["DeepseekV32ForCausalLM"])
    assert (written["index_topk"], written["index_n_heads"], written["index_head_dim"]) == (9, 16, 16)
    assert not {"layer_types", "auto_map", "rope_interleave"} & set(written) and not any(name.startswith("skim") for name in written)
    assert not list(folder.glob("*.py"))


def test_bf16_models_and_indexers_that_train_in_float32_are_saved_in_bf16(tmp_path):
    model = convert(dense().bfloat16(), **SIXTEEN)
    for module in model.modules():
        if hasattr(module, "indexer"):
            module.indexer.float()
    native = exported(model, tmp_path / "out", dtype="auto")
    assert {p.dtype for name, p in native.named_parameters()} == {torch.bfloat16}


def test_it_can_be_converted_again(tmp_path):
    model = convert(dense(), **SIXTEEN)
    again = skim.convert(exported(model, tmp_path / "out"))
    assert error(logits(again, IDS), logits(model, IDS)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "FSS"}, "pattern: expected 'S', all that a deepseek_v32 has, got 'FS'"),
        ({"keep_first": 1}, "keep_first: expected 0, all that a deepseek_v32 has, got 1"),
        ({"keep_recent": 2}, "keep_recent: expected 0"),
        ({"rope_layout": "interleaved"}, "rope_layout: expected 'half'"),
        ({"rope_dim": 4}, "rope_dim: expected 8, all that a deepseek_v32 has, got 4"),
        ({"mode": "dense"}, "mode: expected 'sparse'"),
    ],
)
def test_what_a_deepseek_v32_cannot_say_is_refused_by_name(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        skim.export(convert(dense(), **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attention_that_is_not_interleaved_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="rope_interleave: expected True, all that a deepseek_v32 has, got False"):
        skim.export(convert(dense(rope_interleave=False)), tmp_path / "out")


def test_without_a_query_latent_it_is_refused_by_name(tmp_path):
    model = convert(dense())
    model.config.q_lora_rank = None
    with pytest.raises(ValueError, match="q_lora_rank: expected a model with a query latent, which the indexers of a deepseek_v32 read, got None"):
        skim.export(model, tmp_path / "out")
