"""skim.export: an ordinary folder that loads sparsely or not at all, bitwise what it was made from."""

from __future__ import annotations

import json
import os
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import build, convert, generate, logits, sparse, tokens
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import skim
from skim.huggingface.state import converted_layers, state_of

IDS = tokens(2, 30)


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory):
    """transformers copies a folder's code before it runs it: not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def load(folder, **arguments):
    """What a user who installed Skim does; nothing warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)


# Falcon-H1 has buffers that aren't saved, Cohere a table of another layout, Qwen3-MoE weights that transformers renames.
@pytest.mark.parametrize("family", ["llama", "qwen3", "falcon_h1", "cohere", "qwen3_moe"])
def test_it_reads_bitwise_the_same_when_it_is_loaded_and_saved_and_loaded_again(family, tmp_path):
    model = sparse(family, budget=7, keep_first=1, pattern="FSS" if family == "llama" else "S")
    assert not torch.equal(logits(model, IDS), logits(build(family), IDS))
    first = skim.export(model, tmp_path / "first")
    loaded = load(first)
    loaded.save_pretrained(tmp_path / "second")
    for again in (loaded, load(tmp_path / "second")):
        assert state_of(again).mode == "sparse" and state_of(again).config == state_of(model).config
        assert torch.equal(logits(again, IDS), logits(model, IDS))
        assert torch.equal(generate(again, IDS), generate(model, IDS))
    assert sorted(os.listdir(first)) == sorted(os.listdir(tmp_path / "second"))
    for file in os.listdir(first):
        assert (first / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_tied_embeddings_and_bf16_stay_what_they_are(tmp_path):
    build("qwen3", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = convert(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))
    loaded = load(skim.export(model, tmp_path / "tied"))
    assert loaded.dtype == torch.bfloat16 and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_the_model_that_is_exported_stays_as_it_was(tmp_path):
    model = sparse("llama")
    before, names, config = logits(model, IDS), set(model.state_dict()), model.config.to_dict()
    skim.export(model, tmp_path / "out")
    assert torch.equal(logits(model, IDS), before) and set(model.state_dict()) == names and model.config.to_dict() == config
    assert type(model) is LlamaForCausalLM and model.lm_head.weight.device.type == "cpu"


def test_what_the_folder_says(tmp_path):
    folder = skim.export(sparse("llama", budget=9), tmp_path / "out")
    assert sorted(os.listdir(folder)) == ["config.json", "generation_config.json", "model.safetensors", "modeling_skim_llama.py"]
    written = json.loads((folder / "config.json").read_text())
    assert written["model_type"] == "skim_llama" and written["architectures"] == ["AutoModelForCausalLM"]
    assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_skim_llama.SkimLlamaForCausalLM"
    assert written["skim_config"]["budget"] == 9 and written["skim_mode"] == "sparse" and "skim_limit" not in written
    assert "model.layers.0.self_attn.indexer.wq_b.weight" in load_file(folder / "model.safetensors")


def test_without_trust_remote_code_nothing_loads_it(tmp_path):
    folder = skim.export(sparse("llama"), tmp_path / "out")
    for anything in (AutoModelForCausalLM, AutoConfig):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            anything.from_pretrained(folder, trust_remote_code=False)
    with pytest.raises(ValueError, match='attn_implementation="skim"` is not supported'):
        LlamaForCausalLM.from_pretrained(folder)
    load(folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):  # nor once it was trusted
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_where_skim_is_missing_the_error_names_the_package(tmp_path, monkeypatch):
    folder = skim.export(sparse("llama"), tmp_path / "elsewhere")
    monkeypatch.setitem(sys.modules, "skim.huggingface.export", None)
    with pytest.raises(ImportError, match=r"pip install 'skim-attention\[hf\]'"):
        load(folder)


def test_settings_in_force_are_what_is_saved(tmp_path):
    loaded = load(skim.export(sparse("llama", budget=9), tmp_path / "first"))
    skim.use(loaded, budget=5, pattern="FSS", mode="dense")
    loaded.save_pretrained(tmp_path / "second")
    with pytest.warns(UserWarning, match="exported in dense mode"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True)
    state = state_of(again)
    assert (state.config.budget, state.config.pattern, state.mode) == (5, ("F", "S", "S"), "dense")
    skim.use(loaded, mode="sparse"), skim.use(again, mode="sparse")
    assert torch.equal(logits(again, IDS), logits(loaded, IDS))


def test_indexers_that_the_pattern_in_force_leaves_out_are_not_exported(tmp_path):
    model = sparse("llama", budget=7)
    with skim.use(model, pattern="FSR"):
        folder, expected = skim.export(model, tmp_path / "narrow"), logits(model, IDS)
    assert {name.split(".")[2] for name in load_file(folder / "model.safetensors") if ".indexer." in name} == {"1"}
    assert torch.equal(logits(load(folder), IDS), expected)


def test_a_loaded_one_is_a_converted_model(tmp_path):
    model = sparse("llama")
    loaded = load(skim.export(model, tmp_path / "out"), attn_implementation="eager")
    assert state_of(loaded).original == "eager"
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS))
    with torch.no_grad():
        converted_layers(model)[1].indexer.wk.weight.mul_(-1)
    skim.load(loaded, skim.save(model, tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS))
    skim.export(loaded, tmp_path / "again")
    skim.revert(loaded)
    with pytest.raises(ValueError, match="was not converted"):
        loaded.save_pretrained(tmp_path / "reverted")


def test_trainer_trains_it_and_its_checkpoint_loads(tmp_path):
    model = load(skim.export(sparse("llama"), tmp_path / "out"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [{"input_ids": row, "labels": row} for row in IDS]
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "run"), **options), train_dataset=data)
    assert trainer.train().training_loss > 0
    assert all(torch.equal(p, before[name]) == ("indexer" in name) for name, p in model.named_parameters())  # no record, no alignment
    trainer.save_model(str(tmp_path / "trained"))
    model.eval()
    assert torch.equal(logits(load(tmp_path / "trained"), IDS), logits(model, IDS))


def test_it_generates_as_transformers_serve_asks_it_to(tmp_path):
    """`serve` hands the tokenizer to `generate`, which passes it on down to the attention."""
    model = sparse("llama", budget=7)
    loaded = load(skim.export(model, tmp_path / "out"))
    with torch.no_grad():
        served = loaded.generate(IDS, max_new_tokens=4, do_sample=False, tokenizer=object())
        assert torch.equal(served, model.generate(IDS, max_new_tokens=4, do_sample=False))


def test_what_cannot_be_exported_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="was not converted"):
        skim.export(build("llama"), out)
    with pytest.raises(ValueError, match="merge or unwrap it first"):
        skim.export(torch.nn.Sequential(sparse("llama")), out)
    with pytest.raises(ValueError, match="got LlamaModel"):
        skim.export(sparse("llama").model, out)
    model = sparse("llama")
    with skim.use(model, selector=lambda *_: None), pytest.raises(ValueError, match="one with a selector"):
        skim.export(model, out)

    class Own(LlamaForCausalLM):
        pass

    with pytest.raises(ValueError, match="got Own"):
        skim.export(convert(Own(build("llama").config)), out)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="folder: expected a new or an empty one"):
        skim.export(model, full)
    monkeypatch.setattr(transformers.GenerationConfig, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        skim.export(model, out)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
