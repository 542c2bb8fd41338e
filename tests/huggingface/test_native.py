"""DeepSeek-V3.2 and GLM-5 after `skim.convert`, against transformers' own eager models."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from reference_math import error
from tiny import DSA, MLA, build, generate, logits, recorded, tokens
from tiny_native import LAYOUTS, SHARED, TOPK, differing, flatten_scores, random_native, read_by, replayed, seen, to_bf16
from torch import Tensor

import skim
from skim.huggingface import attention, mla

LENGTH = 5 * TOPK
every_family = pytest.mark.parametrize("family", LAYOUTS)
every_implementation = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def padded(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens of two rows, the second with up to three of padding on the left, and their mask."""
    ids = tokens(2, LENGTH, seed=seed)
    mask = torch.ones_like(ids)
    mask[1, : seed % 4] = 0
    return ids, mask


def visible(mask: Tensor) -> tuple[Tensor, Tensor]:
    """start, end of a left-padded causal forward."""
    start, end = (x.expand(2, -1) for x in skim.visible(LENGTH, LENGTH))
    return torch.minimum(torch.maximum(start, mask.argmax(-1, keepdim=True).int()), end), end


def converted(model: Any) -> Any:
    return skim.convert(copy.deepcopy(model))


def model_of(family: str, seed: int, **changes: Any) -> Any:
    """Every other GLM shares selections among layers; in every fourth model all scores are the same."""
    if family == "glm_moe_dsa" and seed % 2:
        changes.update(num_hidden_layers=4, indexer_types=SHARED)
    if seed % 8 == 3:
        changes["index_n_heads"] = 2  # a quarter of the scores is zero
    model = random_native(family, seed, **changes)
    if seed % 8 in (1, 6):
        flatten_scores(model, seed % 2)
    return model


def check_logits(family: str, seed: int) -> None:
    """Logits and selections in float32, given that eager reads what we read where scores tie."""
    model = model_of(family, seed)
    ours, (ids, mask) = converted(model), padded(seed)
    real = mask.bool()
    found = logits(ours, ids, attention_mask=mask)
    again, selections = recorded(ours, ids, attention_mask=mask)
    assert error(again[real], found[real]) < 1e-6
    expected, watched = replayed(model, selections, ids, attention_mask=mask)
    assert error(found[real], expected[real]) < 1e-4, seed
    can_see = seen(*visible(mask), LENGTH)
    assert len(watched) == sum(hasattr(layer.self_attn, "indexer") for layer in ours.model.layers)
    for number, theirs in watched.items():
        selections[number].check(LENGTH)
        read = read_by(selections[number].indices[:, :, 0], LENGTH)
        assert torch.equal(read.sum(-1), can_see.sum(-1).clamp(max=TOPK))
        assert differing(read, read_by(theirs.picks, LENGTH) & can_see, theirs.scores) == 0, (seed, number)


def check_bf16(family: str, seed: int) -> None:
    """Logits in bfloat16 are as near to float32 as eager's, and selections from the same inputs the same.

    Without experts: which of them a token goes to may turn on the last bit, in eager too.
    """
    model = to_bf16(model_of(family, seed, first_k_dense_replace=4))
    ours, (ids, mask) = converted(model), padded(seed)
    real = mask.bool()
    found, selections = recorded(ours, ids, attention_mask=mask)
    eager, watched = replayed(model, selections, ids, attention_mask=mask)
    exact, _ = replayed(copy.deepcopy(model).float(), selections, ids, attention_mask=mask)
    assert error(found[real], exact[real]) < 1.25 * error(eager[real], exact[real]), seed
    start, end = visible(mask)
    can_see = seen(start, end, LENGTH)
    for number, theirs in watched.items():
        indexer = ours.model.layers[number].self_attn.indexer
        hidden, latent, positions = theirs.inputs
        with torch.no_grad():
            selection = indexer.select(*indexer(hidden, positions, latent), TOPK, start=start, end=end)
        read = read_by(selection.indices[:, :, 0], LENGTH)
        assert differing(read, read_by(theirs.picks, LENGTH) & can_see, theirs.scores) == 0, (seed, number)


def check_tokens(family: str, seed: int) -> None:
    """Greedy tokens are eager's, of models whose scores don't tie."""
    model = random_native(family, seed, index_n_heads=16, **({"num_hidden_layers": 4, "indexer_types": SHARED} if family == "glm_moe_dsa" else {}))
    ids, mask = padded(seed)
    assert torch.equal(generate(converted(model), ids, attention_mask=mask), generate(model, ids, attention_mask=mask)), seed


CHECKS = {"float32": check_logits, "bfloat16": check_bf16, "tokens": check_tokens}
every_check = pytest.mark.parametrize("check", CHECKS)


@every_check
@every_family
def test_logits_selections_and_tokens_are_those_of_the_eager_model(family, check):
    for seed in range(4):
        CHECKS[check](family, seed)


@pytest.mark.slow
@every_check
@every_family
def test_logits_selections_and_tokens_of_many_models(family, check):
    for seed in range(4, 54):
        CHECKS[check](family, seed)


@every_implementation
@every_family
def test_convert_needs_no_config_reads_sparsely_and_warns_of_nothing(family, implementation):
    model = random_native(family, implementation=implementation)
    ids = tokens(2, LENGTH)
    expected = logits(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert skim.convert(model) is model
    assert error(logits(model, ids), expected) < 1e-4
    _, selections = recorded(model, ids)
    assert {number: s.budget for number, s in selections.items()} == {0: TOPK, 1: TOPK}


@every_implementation
@every_family
def test_revert_gives_the_untouched_model_back(family, implementation):
    changes = {"num_hidden_layers": 4, "indexer_types": SHARED} if family == "glm_moe_dsa" else {}
    model = random_native(family, implementation=implementation, **changes)
    ids = tokens(2, LENGTH)
    expected, before = logits(model, ids), copy.deepcopy(model.config.to_dict())
    parameters, modules = dict(model.named_parameters()), [(name, type(m)) for name, m in model.named_modules()]
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    ours = skim.convert(model)
    assert {name: id(p) for name, p in ours.named_parameters()} == {name: id(p) for name, p in parameters.items()}, "the model's own weights"
    skim.revert(model)
    assert torch.equal(logits(model, ids), expected)
    assert model.config.to_dict() == before
    assert [(name, type(m)) for name, m in model.named_modules()] == modules
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}


def test_weights_that_came_after_convert_stay_after_revert():
    model = skim.convert(random_native("deepseek_v32"))
    model.model.layers[0].self_attn.indexer.wk.weight = torch.nn.Parameter(torch.ones(16, 32))
    assert bool((skim.revert(model).model.layers[0].self_attn.indexer.wk.weight == 1).all())


@pytest.mark.parametrize(
    ("field", "value"),
    [("budget", 4), ("index_n_heads", 4), ("index_head_dim", 32), ("rope_dim", 4), ("rope_layout", "interleaved"), ("pattern", "SR")],
)
def test_a_config_that_contradicts_the_model_is_refused_by_field(field, value):
    model = random_native("deepseek_v32")
    own = {"budget": TOPK, "index_n_heads": 8, "index_head_dim": 16, "rope_dim": 8, "rope_layout": "half", "pattern": "S"}
    with pytest.raises(ValueError, match=f"^{field}: expected .* got "):
        skim.convert(model, skim.Config(**{**own, field: value}))
    assert "skim_state" not in vars(model.model), "nothing is left of it"
    skim.convert(model, skim.Config(**own, keep_recent=2))
    assert recorded(model, tokens(1, LENGTH))[1][0].indices[0, -1, 0, -2:].tolist() == [LENGTH - 2, LENGTH - 1]


@every_family
def test_budgets_and_modes_can_be_changed_afterwards(family):
    model = random_native(family)
    ids, ours = tokens(2, LENGTH), converted(model)
    wide = copy.deepcopy(model)
    for module in wide.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 2 * TOPK
    with skim.use(ours, budget=2 * TOPK):
        assert error(logits(ours, ids), logits(wide, ids)) < 1e-4
        for module in wide.modules():
            if hasattr(module, "index_topk"):
                module.index_topk = LENGTH
        skim.use(ours, mode="dense")
        assert torch.equal(logits(ours, ids), logits(wide, ids))
    assert error(logits(ours, ids), logits(model, ids)) < 1e-4


@every_implementation
@every_family
def test_rows_that_keep_all_their_keys_read_with_the_models_own_attention(family, implementation):
    """Bitwise, where there are enough queries that it costs no more; in the absorbed form otherwise, over the same keys."""
    model = random_native(family, implementation=implementation, index_topk=64, kv_lora_rank=16, v_head_dim=8, qk_nope_head_dim=8)
    ours = converted(model)
    assert torch.equal(logits(ours, tokens(2, 40)), logits(model, tokens(2, 40)))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :5] = 0
    real = mask.bool()
    assert torch.equal(logits(ours, tokens(2, 40), attention_mask=mask)[real], logits(model, tokens(2, 40), attention_mask=mask)[real])
    short = tokens(2, 15)  # 16 * 16 / (32 - 16) = 16 queries
    found, expected = logits(ours, short), logits(model, short)
    assert 0 < error(found, expected) < 1e-5


def test_glm_shares_selections_by_list_pattern_or_frequency():
    sparse, shared = "S", "R"
    for fields, letters in [
        ({"indexer_types": ["full", "shared", "full", "shared"]}, (sparse, shared, sparse, shared)),
        ({"indexer_types": None, "index_topk_pattern": "FSSF"}, (sparse, shared, shared, sparse)),
        ({"indexer_types": None, "index_topk_freq": 2, "index_skip_topk_offset": 2}, (sparse, sparse, shared, sparse)),
        ({"indexer_types": None, "index_topk_freq": 4, "index_skip_topk_offset": 1}, (sparse, shared, shared, shared)),
    ]:
        model = random_native("glm_moe_dsa", num_hidden_layers=4, index_n_heads=16, **fields)
        ids, ours = tokens(2, LENGTH), converted(model)
        assert error(logits(ours, ids), logits(model, ids)) < 1e-4
        assert torch.equal(generate(ours, ids), generate(model, ids))
        _, selections = recorded(ours, ids)
        assert [hasattr(layer.self_attn, "indexer") for layer in ours.model.layers] == [letter == sparse for letter in letters]
        reused = [selections[number] is selections[number - 1] for number in (1, 2, 3)]
        assert reused == [letter == shared for letter in letters[1:]]


def test_trap_20_a_first_layer_that_shares_is_refused():
    model = random_native("glm_moe_dsa", indexer_types=["shared", "full"])
    with pytest.raises(ValueError, match="pattern: expected an 'S' before the first 'R'"):
        skim.convert(model)


def test_trap_01_the_layouts_of_indexer_and_attention_are_not_mixed_up():
    """Either layout in the other family is told apart, as soon as there are more keys than the budget."""
    for family, layout in LAYOUTS.items():
        model, ids = random_native(family, index_n_heads=16), tokens(2, LENGTH)
        ours = converted(model)
        expected = logits(model, ids)
        assert {layer.self_attn.indexer.rope_layout for layer in ours.model.layers} == {layout}
        for layer in ours.model.layers:
            layer.self_attn.indexer.rope_layout = {"half": "interleaved", "interleaved": "half"}[layout]
        found = logits(ours, ids)
        assert error(found[:, :TOPK], expected[:, :TOPK]) < 1e-5 and error(found, expected) > 1e-2


def test_the_published_key_of_the_layout_is_honoured():
    model = random_native("glm_moe_dsa", indexer_rope_interleave=False)
    assert skim.convert(model).model.layers[0].self_attn.indexer.rope_layout == "half"


def test_trap_17_index_keys_are_cached_while_every_key_is_read():
    """A prompt as short as the budget, then tokens beyond it."""
    model = random_native("deepseek_v32", index_n_heads=16)
    ids = tokens(2, TOPK - 2)
    assert torch.equal(generate(converted(model), ids, max_new_tokens=20), generate(model, ids, max_new_tokens=20))


def test_attention_that_is_asked_for_its_weights_is_refused():
    model = converted(random_native("deepseek_v32"))
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens(1, LENGTH), output_attentions=True)
    skim.use(model, mode="dense")
    assert model(tokens(1, LENGTH), output_attentions=True).attentions[0].shape == (1, 4, LENGTH, LENGTH)


def test_other_attention_implementations_are_refused_by_name():
    model = random_native("deepseek_v32")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation: expected 'eager' or 'sdpa'"):
        skim.convert(model)


def test_a_converted_model_can_be_copied_and_pickled():
    ids, ours = tokens(1, LENGTH), converted(random_native("glm_moe_dsa"))
    expected = logits(ours, ids)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(logits(other, ids), expected)
        layer = other.model.layers[0].self_attn
        layer.o_proj.weight.data.zero_()
        assert not torch.equal(logits(other, ids), expected), "its forward is its own"
        skim.revert(other)
    assert torch.equal(logits(ours, ids), expected)


@pytest.mark.parametrize("family", ["deepseek_v3", *LAYOUTS])
def test_a_matrix_with_an_adapter_on_it_is_read_with_the_adapter(family):
    peft = pytest.importorskip("peft")
    model = build(family, "eager", **(MLA if family == "deepseek_v3" else {**DSA, "index_n_heads": 16, "indexer_types": ["full"] * 3}))
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["kv_b_proj", "q_b_proj"], init_lora_weights=False))
    ids = tokens(2, LENGTH)
    expected = logits(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skim.convert(model)
    with skim.use(model, mode="sparse", budget=LENGTH - 1 if family == "deepseek_v3" else TOPK):
        found = logits(model, ids)[:, :-1]
    assert error(found, expected[:, :-1]) < 1e-4


@every_family
def test_indexers_with_an_adapter_on_them_or_quantised_are_refused_by_name(family):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(random_native(family), peft.LoraConfig(r=2, target_modules=["wk"]))
    with pytest.raises(ValueError, match="model: expected plain weights in its indexers, got Linear as wk of layer 0; .*skim.load_model"):
        skim.convert(model)
    assert not any(hasattr(m, "skim_state") for m in model.modules())


@pytest.mark.parametrize("family", ["llama", *LAYOUTS])
def test_attention_weights_that_are_offloaded_are_refused_by_name(family):
    accelerate = pytest.importorskip("accelerate")
    model = build(family) if family == "llama" else random_native(family)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="model: expected attention weights on a device, got those of layer 0 offloaded by its device_map"):
        skim.convert(model)


def test_only_experts_may_be_offloaded():
    accelerate = pytest.importorskip("accelerate")
    model = random_native("deepseek_v32", index_n_heads=16)
    expected = logits(model, tokens(2, LENGTH))
    for layer in model.model.layers:
        accelerate.cpu_offload(layer.mlp, execution_device=torch.device("cpu"))
    assert error(logits(skim.convert(model), tokens(2, LENGTH)), expected) < 1e-4


@pytest.mark.parametrize("latent_dtype", ["bf16", "fp8"])
@every_family
def test_queries_are_absorbed_within_the_workspace(family, latent_dtype, monkeypatch):
    """Piece by piece, which changes nothing; a layer that reuses a selection reads each piece's."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "index_n_heads": 16}
    shared = {"num_hidden_layers": 4, "indexer_types": SHARED} if family == "glm_moe_dsa" else {}
    ours, ids, pieces = converted(random_native(family, **sizes, **shared)), tokens(2, 5 * LENGTH), []
    skim.use(ours, latent_dtype=latent_dtype)
    expected = logits(ours, ids, use_cache=True)
    whole = mla.read
    monkeypatch.setattr(mla, "read", lambda layer, handed, q, *args, **options: pieces.append(q) or whole(layer, handed, q, *args, **options))
    with skim.use(ours, workspace_mb=1):
        found = logits(ours, ids, use_cache=True)
    assert error(found, expected) < 1e-6
    assert sum(q.shape[1] for q in pieces) == ids.shape[1] * len(ours.model.layers) and len(pieces) > 2 * len(ours.model.layers)
    assert max(q.nbytes for q in pieces) < 1 << 20


def test_a_selection_follows_the_layer_that_reuses_it():
    """To another device, where a model is spread over several."""
    selection = skim.Selection(torch.zeros(1, 1, 1, 4, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32))
    assert attention._here(selection, torch.device("cpu")) is selection
    moved = attention._here(selection, torch.device("meta"))
    assert {moved.indices.device.type, moved.counts.device.type} == {"meta"}


def test_a_hook_of_accelerate_stays_in_front_of_our_forward():
    hooks = pytest.importorskip("accelerate.hooks")
    model = random_native("deepseek_v32", index_n_heads=16)
    ids, calls = tokens(2, LENGTH), []
    expected = logits(model, ids)

    class Counting(hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module.layer_idx)
            return args, kwargs

    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.self_attn, Counting())
    skim.convert(model)
    assert error(logits(model, ids), expected) < 1e-4 and calls == [0, 1]
    skim.revert(model)
    assert torch.equal(logits(model, ids), expected) and calls == [0, 1, 0, 1]
    for layer in model.model.layers:
        hooks.remove_hook_from_module(layer.self_attn)
    assert torch.equal(logits(model, ids), expected)
