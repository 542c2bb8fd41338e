"""Adapters: saved and loaded bitwise, on their own base and no other, never half-written."""

from __future__ import annotations

import hashlib
import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, convert, logits, sparse, tokens

import skim
from skim.huggingface.state import converted_layers, state_of

IDS = tokens(2, 30)
CONFIG, WEIGHTS = "skim_config.json", "skim_model.safetensors"


@pytest.fixture
def trained():
    """A converted model whose indexers are none that convert would make."""
    model = sparse("llama", pattern="SRS", budget=7, keep_first=1)
    with torch.no_grad():
        for layer in converted_layers(model).values():
            if hasattr(layer, "indexer"):
                for parameter in layer.indexer.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def saved(trained, tmp_path):
    return skim.save(trained, tmp_path / "adapter")


def load_silently(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return skim.load(model, folder)


def test_saved_and_loaded_again_it_reads_the_same_bitwise(trained, saved):
    assert sorted(os.listdir(saved)) == [CONFIG, WEIGHTS]
    for base in (build("llama"), sparse("llama", pattern="SRS")):
        loaded = load_silently(base, saved)
        assert loaded is base
        assert state_of(loaded).mode == "sparse"
        assert state_of(loaded).config == state_of(trained).config
        assert torch.equal(logits(loaded, IDS), logits(trained, IDS))
        for name, value in trained.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_what_the_files_say(trained, saved):
    written = json.loads((saved / CONFIG).read_text())
    assert written["config"]["budget"] == 7 and written["config"]["pattern"] == ["S", "R", "S"]
    base = written["base"]
    assert base.keys() == {"id", "revision", "model_type", "hidden_size", "layers", "fingerprint"}
    assert (base["model_type"], base["hidden_size"], base["layers"]) == ("llama", 32, [0, 1, 2])
    assert len(base["fingerprint"]) == len(written["weights_sha256"]) == 64
    weights = load_file(saved / WEIGHTS)
    names = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
    assert weights.keys() == {f"layers.{layer}.self_attn.indexer.{name}" for layer in (0, 2) for name in names}
    assert skim.Config.from_dict(written["config"]) == state_of(trained).config


def test_the_base_is_named_with_its_revision(tmp_path):
    model = sparse("llama")
    model.config._name_or_path, model.config._commit_hash = "someone/a-model", "abc123"
    base = json.loads((skim.save(model, tmp_path) / CONFIG).read_text())["base"]
    assert (base["id"], base["revision"]) == ("someone/a-model", "abc123")


def test_saving_again_replaces_the_old_adapter(trained, saved):
    with torch.no_grad():
        converted_layers(trained)[0].indexer.wk.weight.add_(1.0)
    skim.save(trained, saved)
    assert sorted(os.listdir(saved)) == [CONFIG, WEIGHTS]
    assert torch.equal(logits(load_silently(build("llama"), saved), IDS), logits(trained, IDS))


def test_a_model_of_another_dtype_loads_the_same_adapter_without_a_warning(trained, saved):
    base = build("llama").to(torch.bfloat16)
    loaded = load_silently(base, saved)
    indexer = converted_layers(loaded)[0].indexer
    assert indexer.wk.weight.dtype == torch.bfloat16
    assert torch.equal(indexer.wk.weight, converted_layers(trained)[0].indexer.wk.weight.bfloat16())


def test_other_base_weights_warn_once_and_name_the_base(trained, tmp_path):
    trained.config._name_or_path = "someone/a-model"
    folder = skim.save(trained, tmp_path / "adapter")
    other = build("llama")
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        skim.load(other, folder)
        logits(other, IDS)
    assert len(caught) == 1
    assert "was trained on other base weights (someone/a-model)" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_training_the_indexers_or_a_lora_does_not_make_it_another_base(trained, saved):
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".indexer." in name:
                parameter.add_(1.0)
    load_silently(trained, saved)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    load_silently(adapted, saved)


MISFITS = {
    "another family": (lambda: build("qwen2"), "model_type: expected 'llama', which the adapter was made for, got 'qwen2'"),
    "another width": (lambda: build("llama", hidden_size=64), "hidden_size: expected 32, which the adapter was made for, got 64"),
    "fewer layers": (lambda: build("llama", num_hidden_layers=2), "layers: expected at least 3, which the adapter was made for, got 2"),
    "more layers": (lambda: build("llama", num_hidden_layers=4), "pattern: expected 4 letters"),
    "converted with more heads": (lambda: sparse("llama", pattern="SRS", index_n_heads=4), "index_n_heads: expected the adapter's 2, got 4"),
    "converted with wider heads": (lambda: sparse("llama", pattern="SRS", index_head_dim=32), "index_head_dim: expected the adapter's 16, got 32"),
    "converted with another layout": (lambda: sparse("llama", pattern="SRS", rope_layout="interleaved"), "rope_layout: expected the adapter's half"),
    "converted with other layers": (
        lambda: sparse("llama", pattern="S"),
        "skim_model.safetensors: expected the model's indexers, got 5 tensors missing",
    ),
    "converted with fewer layers": (lambda: sparse("llama", pattern="SRR"), "skim_model.safetensors: .*5 extra"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_by_name_and_changes_nothing(saved, what):
    make, message = MISFITS[what]
    model, before = make(), make().state_dict()
    with pytest.raises(ValueError, match=message):
        skim.load(model, saved)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_shape_are_refused_by_name_and_the_model_stays_unconverted(saved):
    weights = load_file(saved / WEIGHTS)
    weights["layers.2.self_attn.indexer.wk.weight"] = torch.zeros(16, 31)
    rewrite(saved, weights)
    model = build("llama")
    with pytest.raises(ValueError, match=r"layers.2.self_attn.indexer.wk.weight: expected \(16, 32\), got \(16, 31\)"):
        skim.load(model, saved)
    assert not any(hasattr(module, "skim_state") for module in model.modules())
    assert torch.equal(logits(model, IDS), logits(build("llama"), IDS))


def rewrite(folder, weights=None, **changes):
    """Write a saved adapter anew with other weights or other entries in its config, checksum and all."""
    written = json.loads((folder / CONFIG).read_text())
    if weights is not None:
        save_file(weights, folder / WEIGHTS)
        written["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / CONFIG).write_text(json.dumps({**written, **changes}))


def test_a_config_of_a_later_version_is_refused_by_name(saved):
    rewrite(saved, config={"budget": 7, "spirals": 3})
    with pytest.raises(ValueError, match=r"skim_config.json: expected fields of skim.Config, got unknown \['spirals'\]"):
        skim.load(build("llama"), saved)


class Killed(BaseException):
    """What a killed process looks like from inside: nothing catches it."""


def killed_at(monkeypatch, number):
    """Stop at the renaming with this number, before it is done."""
    calls, rename = [], os.replace

    def replace(*args):
        calls.append(args)
        if len(calls) == number + 1:
            raise Killed
        return rename(*args)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("number", [0, 1])
def test_a_first_save_that_is_cut_off_leaves_nothing_that_loads(trained, tmp_path, monkeypatch, number):
    killed_at(monkeypatch, number)
    with pytest.raises(Killed):
        skim.save(trained, tmp_path / "adapter")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="got no skim_config.json"):
        skim.load(build("llama"), tmp_path / "adapter")
    skim.save(trained, tmp_path / "adapter")
    assert torch.equal(logits(load_silently(build("llama"), tmp_path / "adapter"), IDS), logits(trained, IDS))


@pytest.mark.parametrize(("number", "survives"), [(0, True), (1, False)])
def test_a_later_save_that_is_cut_off_leaves_the_old_adapter_or_one_that_is_found_out(trained, saved, monkeypatch, number, survives):
    before = logits(trained, IDS)
    with torch.no_grad():
        for layer in (0, 2):
            converted_layers(trained)[layer].indexer.wk.weight.normal_()
    killed_at(monkeypatch, number)
    with pytest.raises(Killed):
        skim.save(trained, saved)
    monkeypatch.undo()
    if survives:
        assert torch.equal(logits(load_silently(build("llama"), saved), IDS), before)
    else:
        with pytest.raises(
            ValueError, match="skim_model.safetensors: its checksum is not the one in skim_config.json: a save or a copy of 'adapter' was cut off"
        ):
            skim.load(build("llama"), saved)
    skim.save(trained, saved)
    assert torch.equal(logits(load_silently(build("llama"), saved), IDS), logits(trained, IDS))


def test_a_save_that_dies_while_writing_leaves_the_old_adapter(trained, saved, monkeypatch):
    before = logits(trained, IDS)

    def die(*args, **kwargs):
        raise Killed

    monkeypatch.setattr("skim.huggingface.adapter.save_file", die)
    with pytest.raises(Killed):
        skim.save(trained, saved)
    assert sorted(os.listdir(saved)) == [CONFIG, WEIGHTS]
    assert torch.equal(logits(load_silently(build("llama"), saved), IDS), before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]), "its checksum is not the one"),
        (lambda folder: flip(folder / WEIGHTS), "its checksum is not the one"),
        (lambda folder: (folder / WEIGHTS).unlink(), "got no skim_model.safetensors"),
        (lambda folder: (folder / CONFIG).unlink(), "got no skim_config.json"),
        (
            lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text()[:40]),
            "skim_config.json: expected what skim.save writes in 'adapter'",
        ),
        (lambda folder: (folder / CONFIG).write_text("[]"), "skim_config.json: expected what skim.save writes"),
        (lambda folder: (folder / CONFIG).write_text('{"config": {}}'), "skim_config.json: expected what skim.save writes .*weights_sha256"),
    ],
    ids=["cut weights", "one bit", "no weights", "no config", "cut config", "another config", "half a config"],
)
def test_damage_is_found_and_named(saved, damage, message):
    damage(saved)
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        skim.load(model, saved)
    assert not any(hasattr(module, "skim_state") for module in model.modules())


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(ValueError, match=r"source: expected a folder, a shipped adapter \(.*\) or a hub id, got 'smolm2'"):
        skim.load(build("llama"), "smolm2")


def test_a_hub_id_that_cannot_be_fetched_says_so():
    with pytest.raises(ValueError, match="source: 'nobody/nothing-at-all' is no folder, and fetching it as a hub id failed"):
        skim.load(build("llama"), "nobody/nothing-at-all")


def test_only_a_converted_model_can_be_saved(tmp_path):
    with pytest.raises(ValueError, match="model: expected a model after skim.convert"):
        skim.save(build("llama"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_hybrid_keeps_the_letters_of_its_layers(tmp_path):
    model = sparse("gemma3_text")
    loaded = load_silently(build("gemma3_text"), skim.save(model, tmp_path))
    assert list(state_of(loaded).letters.values()) == ["F", "S", "S"]
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_under_another_pattern_an_adapter_holds_the_indexers_in_use(trained, saved, tmp_path):
    with skim.use(trained, pattern="FFS"):
        folder = skim.save(trained, tmp_path / "narrow")
        expected = logits(trained, IDS)
        assert not torch.equal(expected, logits(load_silently(build("llama"), saved), IDS))
        load_silently(trained, saved)  # the other indexers find their weights too
    assert {name.split(".")[1] for name in load_file(folder / WEIGHTS)} == {"2"}
    loaded = load_silently(build("llama"), folder)
    assert torch.equal(logits(loaded, IDS), expected)
    assert [hasattr(layer, "indexer") for layer in converted_layers(loaded).values()] == [False, False, True]
    with pytest.raises(ValueError, match="expected the model's indexers, got 5 tensors missing"):
        skim.load(trained, folder)


def test_layers_keep_their_numbers_where_only_some_have_attention(tmp_path):
    model = sparse("qwen3_next")
    folder = skim.save(model, tmp_path)
    assert all(name.startswith("layers.3.") for name in load_file(folder / WEIGHTS))
    assert torch.equal(logits(load_silently(build("qwen3_next"), folder), IDS), logits(model, IDS))


def test_an_adapter_trained_in_dense_mode_loads_sparse(tmp_path):
    model = convert(build("llama"), mode="dense")
    loaded = load_silently(build("llama"), skim.save(model, tmp_path))
    assert state_of(loaded).mode == "sparse"
    skim.use(model, mode="sparse")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
