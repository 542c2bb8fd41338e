"""Each family of decoders: dense bitwise, sparse equal to its own eager attention under the recorded selections, or refused by name."""

from __future__ import annotations

import pytest
import torch
from reference_math import index_scores, interval_mask
from tiny import FAMILIES, MLA, MOE, attentions, build, convert, generate, logits, masked, masks, recorded, sparse, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import skim
from skim.huggingface.state import converted_layers, state_of

every_family = pytest.mark.parametrize("family", FAMILIES)
IDS = tokens()


@every_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_converted_model_is_dense_bitwise_until_it_is_told_otherwise(family, implementation):
    model = build(family, implementation)
    before = logits(model, IDS)
    convert(model, mode="dense")
    assert torch.equal(logits(model, IDS), before)
    with skim.use(model, mode="sparse", budget=IDS.shape[1]):  # every row keeps all that it sees
        assert torch.equal(logits(model, IDS), before)
    with skim.use(model, mode="sparse", budget=8):
        assert not torch.equal(logits(model, IDS), before)
    skim.revert(model)
    assert torch.equal(logits(model, IDS), before)
    assert model.config._attn_implementation == build(family, implementation).config._attn_implementation


@every_family
def test_sparse_logits_are_those_of_eager_attention_under_the_recorded_selections(family):
    model = sparse(family)
    out, selections = recorded(model, IDS)
    letters = state_of(model).letters
    assert "".join(letters.values()) == FAMILIES[family][1]
    assert sorted(selections) == [layer for layer, letter in letters.items() if letter == "S"]
    for selection in selections.values():
        selection.check(IDS.shape[1])
        assert int(selection.counts.max()) == 8
    assert (out - logits(model, IDS)).abs().max() < 1e-5, "recording changes nothing"
    untouched = build(family, "eager")
    with masked(untouched, masks(selections, IDS.shape[1])):
        expected = logits(untouched, IDS)
    assert (out - expected).abs().max() < 1e-4
    assert (expected - logits(untouched, IDS)).abs().max() > 1e-2, "the selection matters"


@every_family
def test_a_selection_is_the_best_of_the_index_scores_of_the_layers_own_input(family):
    model = sparse(family)
    inputs = {}
    for number, module in attentions(model).items():
        if hasattr(module, "indexer"):

            def keep(module, args, kwargs, number=number):
                inputs[number] = (args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"], kwargs["attention_mask"])

            module.register_forward_pre_hook(keep, with_kwargs=True)
    _, selections = recorded(model, IDS)
    assert inputs.keys() == selections.keys()
    for number, (hidden, position_embeddings, visibility) in inputs.items():
        with torch.no_grad():
            layer = converted_layers(model)[number]
            latent = layer.q_a_layernorm(layer.q_a_proj(hidden)) if family == "deepseek_v3" else None
            q, k, weights = layer.indexer(hidden, position_embeddings, latent)
        visible = interval_mask(visibility[:, 0, :, 0], visibility[:, 0, :, 1], IDS.shape[1])
        scores = index_scores(q, k, weights, visible)
        chosen = masks({0: selections[number]}, IDS.shape[1])[0]
        assert not bool((chosen & ~visible).any())
        assert torch.equal(chosen.sum(-1), visible.sum(-1).clamp(max=8))
        worst_kept = scores.masked_fill(~chosen, torch.inf).amin(-1)
        best_left = scores.masked_fill(chosen, -torch.inf).amax(-1)
        assert bool((worst_kept >= best_left - 1e-5).all())


@every_family
def test_generation_with_a_cache_is_generation_without(family):
    model = sparse(family)
    assert torch.equal(generate(model, IDS), generate(model, IDS, use_cache=False))


@every_family
def test_indexers_are_named_as_in_deepseeks_checkpoints_and_survive_a_state_dict(family):
    model = sparse(family)
    names = {"wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"}
    plain = set(build(family).state_dict())
    added = set(model.state_dict()) - plain
    assert plain <= set(model.state_dict())
    parts = {name.rpartition(".indexer.")[::2] for name in added}
    assert {tail for _, tail in parts} == names
    assert len({layer for layer, _ in parts}) == FAMILIES[family][1].count("S")
    if family == "llama":
        assert "model.layers.0.self_attn.indexer.wq_b.weight" in added
    other = sparse(family)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, IDS), logits(model, IDS))


REFUSED = {
    "gemma2": ({"head_dim": 16}, "gemma2 sets attn_logit_softcapping"),
    "vaultgemma": ({"head_dim": 16}, "vaultgemma sets attn_logit_softcapping"),
    "gemma3n_text": (
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        "gemma3n_text sets num_kv_shared_layers",
    ),
    "deepseek_v2": (MLA, r"deepseek_v2 has latent attention \(MLA\), which Skim converts in deepseek_v3"),
    "deepseek_v3": ({**MLA, "q_lora_rank": None}, "q_lora_rank: expected a deepseek_v3 with a query latent, which indexers read, got None"),
    "gpt2": ({}, "gpt2 hands its attention layers no rotary position embeddings"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, "opt hands its attention layers no rotary position embeddings"),
    "bloom": ({}, "bloom hands its attention layers no rotary position embeddings"),
    "gptj": ({"rotary_dim": 4}, "gptj hands its attention layers no rotary position embeddings"),  # rotates inside
    "jamba": ({"num_experts": 2, "mamba_d_state": 4}, "jamba hands its attention layers no rotary position embeddings"),
    "falcon": ({"new_decoder_architecture": True}, "falcon: FalconAttention doesn't call transformers' attention interface"),
    "doge": ({}, "doge makes a mask of its own"),
    "mamba": ({"state_size": 4}, "mamba makes its own masks"),
    "llama4_text": ({"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32}, "llama4_text has complex rotary position embeddings"),
    "minimax_m3_vl_text": (
        {"head_dim": 16, "num_local_experts": 4, "index_n_heads": 2, "index_head_dim": 16, **MOE},
        "minimax_m3_vl_text has a sparse attention of its own",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_skim_cannot_give_is_refused_by_name_and_leaves_the_model_alone(family):
    parts, reason = REFUSED[family]
    model = build(family, "eager", **parts)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        skim.convert(model)
    assert set(model.state_dict()) == names
    assert not model.config._attn_implementation.startswith("skim")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_encoder_decoders_are_refused_by_name():
    config = AutoConfig.for_model("t5", vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="t5 is an encoder-decoder"):
        skim.convert(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
def test_families_whose_layers_drop_keyword_arguments_never_read_densely_in_sparse_mode(family):
    model = sparse(family)
    with pytest.raises(ValueError, match=r"doesn't pass keyword arguments on.*skim.revert"):
        logits(model, IDS)
    with pytest.raises(ValueError, match="doesn't pass keyword arguments on"), skim.record(model):
        logits(model, IDS)
    skim.use(model, mode="dense")
    assert torch.equal(logits(model, IDS), logits(build(family), IDS))


def test_something_that_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match="expected a transformers model, got Linear"):
        skim.convert(torch.nn.Linear(2, 2))


def test_a_config_that_two_models_share_is_refused_for_the_second():
    """Converting marks the config, so a second model that holds the very same object would be half converted."""
    config = build("llama").config
    one, two = (type(build("llama"))(config).eval() for _ in range(2))
    convert(one)
    with pytest.raises(ValueError, match=r"expected a config of its own.*copy.deepcopy"):
        skim.convert(two)


def test_attention_dropout_in_training_is_refused_in_sparse_mode():
    model = convert(build("llama", attention_dropout=0.1))
    logits(model, IDS)
    model.train()
    with pytest.raises(ValueError, match="attention_dropout: expected 0 in sparse attention, got LlamaAttention"):
        logits(model, IDS)


def test_what_an_attention_asks_for_beyond_skims_means_is_refused_by_name():
    model = sparse("llama")
    with pytest.raises(ValueError, match="LlamaAttention: asks for softcap in its attention"):
        logits(model, IDS, softcap=30.0)


def test_attention_weights_are_refused_in_sparse_mode_and_given_in_dense_mode():
    model = sparse("llama", "eager")
    with pytest.raises(ValueError, match="output_attentions: expected False in sparse attention"):
        logits(model, IDS, output_attentions=True)
    skim.use(model, mode="dense")
    with torch.no_grad():
        assert len(model(IDS, output_attentions=True).attentions) == 3
    asking = build("llama", "eager")
    asking.config.output_attentions = True
    convert(asking)
    with pytest.raises(ValueError, match="output_attentions"):
        logits(asking, IDS)


def test_cohere_repeats_each_frequency_and_its_indexer_knows():
    def repeated(model):
        return {layer.indexer.repeated_table for layer in converted_layers(model).values()}

    assert repeated(sparse("cohere")) == {True}
    assert repeated(sparse("llama")) == {False}


def test_linear_attention_layers_are_left_untouched():
    model = sparse("qwen3_next")
    assert list(converted_layers(model)) == [3]
    assert not any("indexer" in name for name, _ in model.model.layers[0].named_modules())


def test_layers_of_one_family_may_differ_in_what_they_see():
    model = convert(build("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=12))
    assert "".join(state_of(model).letters.values()) == "SFF"
    out, selections = recorded(model, IDS)
    untouched = build("qwen2", "eager", use_sliding_window=True, max_window_layers=1, sliding_window=12)
    with masked(untouched, masks(selections, IDS.shape[1])):
        assert (out - logits(untouched, IDS)).abs().max() < 1e-4
    assert torch.equal(generate(model, IDS), generate(model, IDS, use_cache=False))


@pytest.mark.parametrize("length", [1, 2, 8, 9])
def test_the_shortest_texts(length):
    ids = IDS[:, :length]
    model, untouched = sparse("llama"), logits(build("llama"), ids)
    assert torch.equal(logits(model, ids), untouched) == (length <= 8)
    with skim.record(model) as r:
        assert (logits(model, ids)[:, :8] - untouched[:, :8]).abs().max() < 1e-5
    assert float(r.alignment) == 0.0 if length == 1 else float(r.alignment) > 0.0


def test_a_model_that_torch_compile_wrapped_converts_too():
    wrapped = torch.compile(build("llama"), backend="eager")
    assert torch.equal(logits(convert(wrapped), IDS), logits(sparse("llama"), IDS))


def test_a_base_model_without_a_head_converts_too():
    model = AutoModelForCausalLM.from_config(build("llama").config).eval()
    before = logits(model, IDS)
    convert(model.model)
    moved = logits(model, IDS)
    assert not torch.equal(moved, before)
    assert torch.equal(generate(model, IDS), generate(model, IDS, use_cache=False))
    skim.revert(model)
    assert torch.equal(logits(model, IDS), before)
