"""Checkpoints as DeepSeek and Z.ai publish them: every tensor lands where it belongs, or is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import published
import pytest
import torch
from published import publish, write
from reference_math import error
from tiny import logits, tokens
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

import skim
from skim.huggingface import checkpoints

IDS = tokens(2, 40)
every_family = pytest.mark.parametrize("family", published.FAMILIES)


def read(folder: Path, dtype: torch.dtype = torch.float32):
    with pytest.warns(UserWarning, match=r"no place for model\.layers\.3 \(multi-token prediction\) of the checkpoint"):
        return checkpoints.read_checkpoint(folder, AutoConfig.from_pretrained(folder), dtype=dtype, device="cpu")


@every_family
@pytest.mark.parametrize("quantised", [True, False])
def test_it_is_the_model_of_the_same_weights_dequantised_by_hand(family, quantised, tmp_path):
    tensors = publish(tmp_path, family, quantised=quantised)
    model, expected = read(tmp_path), published.model(tmp_path, tensors)
    there = expected.state_dict()
    assert model.state_dict().keys() == there.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, there[name]), name
    assert error(logits(model, IDS), logits(expected, IDS)) < 1e-5
    assert float(logits(model, IDS).std()) > 0.1, "logits that say something"


@every_family
def test_in_bf16_what_must_stay_in_float32_does(family, tmp_path):
    tensors = publish(tmp_path, family)
    model, expected = read(tmp_path, torch.bfloat16), published.model(tmp_path, tensors)
    there = expected.state_dict()
    for name, value in model.state_dict().items():
        wide = "weights_proj" in name or "e_score_correction_bias" in name
        assert value.dtype == (torch.float32 if wide else torch.bfloat16)
        assert torch.equal(value, there[name].to(value.dtype)), name


@every_family
def test_trap_04_latents_are_normalised_with_the_eps_of_the_config(family, tmp_path):
    publish(tmp_path, family)
    model = read(tmp_path)
    norms = [m for name, m in model.named_modules() if name.endswith("norm") and "indexer" not in name]
    assert len(norms) == 4 * published.LAYERS + 1
    assert {norm.variance_epsilon for norm in norms} == {1e-5 if family == "glm_moe_dsa" else 1e-6}
    assert {layer.self_attn.indexer.k_norm.eps for layer in skim.convert(model).model.layers[:2]} == {1e-6}, "not the model's"


@every_family
def test_a_copy_that_is_saved_promises_no_multi_token_prediction(family, tmp_path):
    publish(tmp_path / "published", family)
    assert AutoConfig.from_pretrained(tmp_path / "published").num_nextn_predict_layers == 1
    skim.convert(read(tmp_path / "published")).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_load_model_reads_them_and_nothing_marks_the_model_as_quantised(tmp_path, monkeypatch):
    tensors = publish(tmp_path / "published")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: "words")
    with pytest.warns(UserWarning, match="multi-token prediction"):
        model, words = skim.load_model(tmp_path / "published", dtype=torch.float32)
    assert words == "words" and not model.training
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert error(logits(model, IDS), logits(published.model(tmp_path / "published", tensors), IDS)) < 1e-5


@every_family
def test_converted_it_reads_what_transformers_reads(family, tmp_path):
    tensors = publish(tmp_path, family)
    model = skim.convert(read(tmp_path))
    assert IDS.shape[1] > 4 * model.config.index_topk
    assert error(logits(model, IDS), logits(published.model(tmp_path, tensors), IDS)) < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.0.self_attn.indexer.wk.weight",
        "model.layers.1.self_attn.indexer.k_norm.bias",
        "model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
    ],
)
def test_a_missing_or_misshapen_tensor_names_itself(name, tmp_path):
    tensors = publish(tmp_path)
    shape = list(tensors[name].shape)
    write(tmp_path, {other: value for other, value in tensors.items() if other != name})
    with pytest.raises(ValueError, match=re.escape(f"{name}: expected {shape}, got no such tensor in the checkpoint")):
        checkpoints.read_checkpoint(tmp_path, AutoConfig.from_pretrained(tmp_path), dtype=torch.float32, device="cpu")
    write(tmp_path, {**tensors, name: tensors[name][:-1].clone()})
    with pytest.raises(ValueError, match=re.escape(f"{name}: expected {shape}, got {[shape[0] - 1, *shape[1:]]} in the checkpoint")):
        checkpoints.read_checkpoint(tmp_path, AutoConfig.from_pretrained(tmp_path), dtype=torch.float32, device="cpu")


def test_load_model_gives_the_tensors_name_too(tmp_path, monkeypatch):
    tensors = publish(tmp_path)
    write(tmp_path, {name: value for name, value in tensors.items() if name != "lm_head.weight"})
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: "words")
    with pytest.raises(ValueError, match=r"^lm_head\.weight: expected \[97, 256\], got no such tensor"):
        skim.load_model(tmp_path)


def test_a_tensor_of_another_name_is_named_and_left_out(tmp_path):
    tensors = publish(tmp_path)
    write(tmp_path, {**tensors, "model.layers.0.self_attn.gate.weight": torch.ones(2)})
    with pytest.warns(UserWarning, match=r"no place for model\.layers\.0\.self_attn\.gate\.weight, model\.layers\.3 \(multi-token prediction\)"):
        checkpoints.read_checkpoint(tmp_path, AutoConfig.from_pretrained(tmp_path), dtype=torch.float32, device="cpu")


def test_a_shard_that_is_missing_or_cut_off_is_named(tmp_path):
    publish(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{shard.name}: expected a whole safetensors file, got"):
        checkpoints.read_checkpoint(tmp_path, config, dtype=torch.float32, device="cpu")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: expected in .*, got no such file"):
        checkpoints.read_checkpoint(tmp_path, AutoConfig.from_pretrained(tmp_path), dtype=torch.float32, device="cpu")


def test_another_quantisation_is_refused(tmp_path):
    publish(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"]["quant_method"] = "awq"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="quantization_config: expected fp8 of e4m3 with a weight_block_size, got .*awq"):
        checkpoints.read_checkpoint(tmp_path, AutoConfig.from_pretrained(tmp_path), dtype=torch.float32, device="cpu")


def test_it_takes_the_memory_of_the_model_and_of_one_tensor_with_its_scales(tmp_path):
    tensors = publish(tmp_path, shards=20)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.warns(UserWarning), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = checkpoints.read_checkpoint(tmp_path, config, dtype=torch.float32, device="cpu")
    live = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    own = sum(p.nbytes for p in model.parameters())
    largest = max(x.numel() for x in tensors.values()) * 4
    mapped = 2 * max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))  # the profiler counts files that are open
    assert own <= peak < own + mapped + 2.1 * largest, (own, peak, mapped, largest)
    assert mapped + 2.1 * largest < own / 3


def test_a_scale_is_multiplied_and_the_last_blocks_may_be_cut():
    values = torch.ones(576, 200).to(torch.float8_e4m3fn)
    scale = torch.arange(10.0).view(5, 2)
    found = checkpoints.dequantise(values, scale, (128, 128))
    assert found.dtype == torch.float32 and found[0, 0] == 0 and found[0, 128] == 1 and found[127, 199] == 1
    assert found[128, 0] == 2 and found[511, 127] == 6 and bool((found[512:, 128:] == 9).all())
