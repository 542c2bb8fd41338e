"""convert, use, revert: modes, patterns, selectors, copies, dtypes; nothing ever reads densely without a word."""

from __future__ import annotations

import copy
import io
import logging
import warnings

import pytest
import torch
import transformers
from tiny import attentions, build, convert, generate, logits, masked, masks, recorded, sparse, tokens
from transformers import AutoModelForCausalLM

import skim
from skim.huggingface.state import converted_layers, state_of

IDS = tokens(2, 30)


def letters(model):
    return "".join(state_of(model).letters.values())


def test_converting_says_once_that_the_model_stays_dense():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build("llama")
        assert skim.convert(model) is model
        logits(model, IDS)
    assert [str(w.message)[:56] for w in caught] == ["This model's indexers are untrained, so it stays dense. "]
    assert caught[0].filename == __file__


def test_converting_twice_is_refused():
    model = sparse("llama")
    before = logits(model, IDS)
    with pytest.raises(ValueError, match=r"got a converted one; skim.revert\(model\) first"):
        skim.convert(model)
    assert torch.equal(logits(model, IDS), before)


def test_reverting_leaves_nothing_behind():
    model, untouched = sparse("llama"), build("llama")
    assert skim.revert(model) is model
    assert model.config.to_dict() == untouched.config.to_dict()
    assert model.config._attn_implementation == "sdpa"
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
    for module, twin in zip(model.modules(), untouched.modules()):
        assert vars(module).keys() == vars(twin).keys()
        assert not module._forward_pre_hooks and not module._forward_hooks
    for verb in (skim.revert, skim.use, skim.record):
        with pytest.raises(ValueError, match="model: expected a model after skim.convert, got one that was not converted"):
            verb(model)
    assert letters(convert(model)) == "SSS", "it can be converted again"


@pytest.mark.parametrize("place", ["forward", "_old_forward"])  # the second is accelerate's, behind its hooks
def test_what_an_attention_ran_before_runs_behind_ours_and_comes_back(place):
    model, calls = build("llama"), []
    for layer in attentions(model).values():
        own = layer.forward
        if place == "_old_forward":
            layer.forward = lambda *args, layer=layer, **kwargs: layer._old_forward(*args, **kwargs)
        setattr(layer, place, lambda *args, own=own, **kwargs: calls.append("ran") or own(*args, **kwargs))
    before = [vars(layer)[place] for layer in attentions(model).values()]
    expected = logits(convert(model, budget=30), IDS)
    assert len(calls) == 3
    skim.revert(model)
    assert [vars(layer)[place] for layer in attentions(model).values()] == before
    assert torch.equal(logits(model, IDS), expected) and len(calls) == 6


def test_a_wrapper_that_somebody_put_around_our_forward_outlives_revert():
    model = build("llama")
    expected = logits(model, IDS)
    convert(model, budget=30)
    for layer in attentions(model).values():
        ours = layer.forward
        layer.forward = lambda *args, ours=ours, **kwargs: ours(*args, **kwargs)
    assert torch.equal(logits(skim.revert(model), IDS), expected)


def test_a_replica_of_data_parallel_is_refused_by_name():
    model = convert(build("llama"))
    replica = model.model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="expected one that DistributedDataParallel wraps"):
        replica(IDS)


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ("S", 4, "SSSS"),
        ("FSRRR", 7, "FSRRRFS"),
        ("SR", 5, "SRSRS"),
        ("SSF", 4, "SSFS"),
        (["F", "S", "R", "R"], 4, "FSRR"),
        (("S", "F", "F", "R"), 4, "SFFR"),
    ],
)
def test_a_pattern_is_one_letter_a_layer_repeated_or_a_list(pattern, layers, expected):
    model = sparse("llama", layers=layers, pattern=pattern)
    assert letters(model) == expected
    assert state_of(model).config.pattern == tuple(expected)
    assert [number for number, layer in attentions(model).items() if hasattr(layer, "indexer")] == [i for i, x in enumerate(expected) if x == "S"]
    out, selections = recorded(model, IDS)
    source = None
    for number, letter in enumerate(expected):
        source = number if letter == "S" else source
        if letter == "R":
            assert selections[number] is selections[source], "not an equal selection but the very same one"
        else:
            assert (number in selections) == (letter == "S")
    untouched = build("llama", "eager", num_hidden_layers=layers)
    with masked(untouched, masks(selections, 30)):
        assert (out - logits(untouched, IDS)).abs().max() < 1e-4


def test_trap_20_layers_that_share_a_selection_have_no_indexer_weights():
    model = sparse("llama", layers=5, pattern="FSRRR")
    assert {name.split(".")[2] for name in model.state_dict() if "indexer" in name} == {"1"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("RS", "pattern: expected an 'S' before the first 'R'"),
        ("FR", "pattern: expected an 'S' before the first 'R'"),
        (["S", "S"], "pattern: expected 3 letters, one an attention layer"),
        (["R", "S", "S"], "pattern: expected an 'S' before the first 'R'"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused_and_leaves_the_model_alone(pattern, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        skim.convert(model, skim.Config(pattern=pattern))
    assert torch.equal(logits(model, IDS), logits(build("llama"), IDS))
    assert letters(convert(model)) == "SSS"


@pytest.mark.parametrize("pattern", [("S", "R", "S"), ("F", "S", "R")])
def test_a_selection_is_shared_only_between_layers_that_see_the_same_keys(pattern):
    hybrid = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    model = build("gemma3_text", **hybrid)
    with pytest.raises(ValueError, match="pattern: expected 'R' only where the sliding window is that of the 'S' layer before"):
        skim.convert(model, skim.Config(pattern=pattern))
    model = convert(build("gemma3_text", **hybrid), pattern=("S", "S", "F"))
    with pytest.raises(ValueError, match="got it in layer 2"):
        skim.use(model, pattern=("S", "S", "R"))
    assert letters(model) == "SSF"


def test_a_sliding_layer_selects_inside_its_window():
    model = convert(build("gemma3_text"), pattern="S")
    assert letters(model) == "FSS", "a plain S leaves sliding layers of a hybrid alone"
    model = convert(build("gemma3_text"), pattern=("S", "S", "F"))
    _, selections = recorded(model, IDS)
    read = masks(selections, 30)[0]
    distance = torch.arange(30)[:, None] - torch.arange(30)
    assert not bool(read[:, (distance >= 12) | (distance < 0)].any())


def test_use_lasts_until_the_end_of_its_block():
    model = sparse("llama")
    before = logits(model, IDS)
    with skim.use(model, budget=4):
        inside = logits(model, IDS)
        with skim.use(model, mode="dense"):
            assert torch.equal(logits(model, IDS), logits(build("llama"), IDS))
        assert torch.equal(logits(model, IDS), inside)
    assert not torch.equal(inside, before)
    assert torch.equal(logits(model, IDS), before)
    with pytest.raises(RuntimeError, match="on purpose"), skim.use(model, budget=4):
        raise RuntimeError("on purpose")
    assert torch.equal(logits(model, IDS), before)


def test_use_without_a_block_lasts():
    model = sparse("llama")
    skim.use(model, budget=4)
    assert state_of(model).config.budget == 4
    _, selections = recorded(model, IDS)
    assert int(selections[0].counts.max()) == 4


def test_one_set_of_indexers_serves_every_budget():
    """A larger budget reads what a smaller one reads and more."""
    model = sparse("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read = {}
    for budget in (2, 8, 20):
        with skim.use(model, budget=budget):
            read[budget] = masks(recorded(model, IDS)[1], 30)[0]
    assert not bool((read[2] & ~read[8]).any()) and not bool((read[8] & ~read[20]).any())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"budgt": 4}, TypeError, "budgt: expected one of budget, keep_first"),
        ({"index_n_heads": 4}, TypeError, "index_n_heads: expected one of budget"),
        ({"rope_dim": 4}, TypeError, "rope_dim: expected one of budget"),
        ({"mode": "spares"}, ValueError, "mode: expected one of .*'dense', 'sparse'.*got 'spares'"),
        ({"budget": 0}, ValueError, "budget: expected an int >= 1, got 0"),
        ({"keep_first": 9}, ValueError, "keep_first"),
        ({"score_dtype": "int4"}, ValueError, "score_dtype: expected 'bf16' or 'fp8'"),
        ({"pattern": "SS"}, ValueError, r"pattern: expected 'S' only where there is an indexer, got it in layers \[1, 2\]"),
        ({"pattern": "RFF"}, ValueError, "pattern: expected an 'S' before the first 'R'"),
        ({"workspace_mb": 0}, ValueError, "workspace_mb"),
    ],
)
def test_what_use_cannot_change_is_refused_and_changes_nothing(changes, kind, message):
    model = sparse("llama", pattern="SRF")
    before = copy.copy(state_of(model))
    with pytest.raises(kind, match=message):
        skim.use(model, **changes)
    assert state_of(model) == before


def test_first_and_recent_tokens_are_always_read():
    model = sparse("llama")
    with skim.use(model, keep_first=3, keep_recent=2):
        _, selections = recorded(model, IDS)
    for read in masks(selections, 30).values():
        for t in range(8, 30):
            assert bool(read[:, t, [0, 1, 2, t - 1, t]].all())
            assert bool((read[:, t].sum(-1) == 8).all())


def test_the_workspace_changes_nothing_but_rounding():
    model = sparse("llama")
    with skim.use(model, workspace_mb=1):
        assert (logits(model, IDS) - logits(build("llama"), IDS)).abs().max() > 1e-2
        assert (logits(model, IDS) - logits(sparse("llama"), IDS)).abs().max() < 1e-5


def test_a_selector_reads_in_place_of_the_indexers_and_sees_the_layer():
    model, seen = sparse("llama", pattern="SSF"), []

    def window(inputs, start, end):
        seen.append(inputs)
        position = torch.arange(inputs.k.shape[1])
        read = (position < end[..., None]) & (position >= torch.maximum(start, end - 5)[..., None])
        return skim.Selection.from_mask(read[:, :, None], 5)

    with skim.use(model, mode="dense", selector=window):
        found = logits(model, IDS)
        assert [inputs.layer for inputs in seen] == [0, 1]
        assert seen[0].q.shape == (2, 30, 4, 8) and seen[0].k.shape == (2, 30, 2, 8)
        assert seen[0].index.k.shape == (2, 30, 16) and seen[0].index.weights.dtype == torch.float32
        assert seen[0].indexer is converted_layers(model)[0].indexer
        assert seen[0].config.budget == 8 and seen[0].scale == 8**-0.5
        assert torch.equal(generate(model, IDS), generate(model, IDS, use_cache=False))
    untouched = build("llama", "eager")
    distance = torch.arange(30)[:, None] - torch.arange(30)
    read = ((distance >= 0) & (distance < 5)).expand(2, -1, -1)
    with masked(untouched, {0: read, 1: read}):
        assert (found - logits(untouched, IDS)).abs().max() < 1e-4
    assert torch.equal(logits(model, IDS), logits(sparse("llama", pattern="SSF"), IDS)), "the selector is gone"


def test_a_selector_sees_the_index_keys_of_the_whole_cache():
    """In dense mode too, so that what it selects with doesn't depend on how the text came in."""
    model = convert(build("llama"), mode="dense")
    with skim.use(model, selector=lambda inputs, start, end: inputs.indexer.select(*inputs.index, 8, start=start, end=end)):
        found = generate(model, IDS)
    assert torch.equal(found, generate(sparse("llama"), IDS))


def test_a_selector_that_gives_nothing_reads_every_visible_key():
    model = sparse("llama")
    with skim.use(model, selector=lambda inputs, start, end: None):
        assert (logits(model, IDS) - logits(build("llama"), IDS)).abs().max() < 1e-5


def test_a_copy_has_settings_and_indexers_of_its_own():
    model = sparse("llama", budget=8)
    before = logits(model, IDS)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, IDS), before)
    skim.use(other, mode="dense")
    assert torch.equal(logits(other, IDS), logits(build("llama"), IDS))
    assert torch.equal(logits(model, IDS), before)
    skim.use(model, budget=4)
    skim.use(other, mode="sparse")
    assert torch.equal(logits(other, IDS), before)
    with torch.no_grad():
        converted_layers(other)[0].indexer.wk.weight.zero_()
    with skim.use(model, budget=8):
        assert torch.equal(logits(model, IDS), before)
    skim.revert(other)
    assert torch.equal(logits(other, IDS), logits(build("llama"), IDS))
    with skim.use(model, budget=8):
        assert torch.equal(logits(model, IDS), before)


def test_a_model_that_was_pickled_is_still_converted():
    model = sparse("llama")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(logits(other, IDS), logits(model, IDS))
    skim.revert(other)
    assert torch.equal(logits(other, IDS), logits(build("llama"), IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_any_dtype_reads_sparsely_whether_cast_before_or_after(dtype):
    after = sparse("llama").to(dtype)
    before = convert(build("llama").to(dtype))
    before.load_state_dict(after.state_dict())
    assert {p.dtype for p in before.parameters()} == {p.dtype for p in after.parameters()} == {dtype}
    found = logits(after, IDS)
    assert found.dtype == dtype and found.isfinite().all()
    assert torch.equal(found, logits(before, IDS))
    _, selections = recorded(after, IDS)
    _, wide = recorded(sparse("llama"), IDS)
    shared = (masks(selections, 30)[0] & masks(wide, 30)[0]).sum() / masks(wide, 30)[0].sum()
    assert shared > 0.97
    assert generate(after, IDS).shape == (2, 38)


def test_a_state_dict_goes_round():
    model, other = sparse("llama"), sparse("llama", budget=5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    with skim.use(other, budget=8):
        assert torch.equal(logits(other, IDS), logits(model, IDS))


@pytest.mark.parametrize("new", ["eager", "sdpa"])
def test_another_attention_implementation_after_convert_is_refused_and_names_the_way_out(new):
    model = sparse("llama")
    model.set_attn_implementation(new)
    with pytest.raises(
        ValueError, match=rf"attn_implementation: expected 'skim_sdpa', .*got '{new}'.*skim.revert\(model\).*skim.use\(model, mode='dense'\)"
    ):
        logits(model, IDS)
    with pytest.raises(ValueError, match="attn_implementation"):
        generate(model, IDS)
    skim.revert(model)
    assert torch.equal(logits(model, IDS), logits(build("llama"), IDS))


def test_a_converted_model_that_is_saved_as_a_whole_says_so_when_it_is_loaded(tmp_path, caplog):
    """from_pretrained knows no indexers and reads densely; its report names every one of them."""
    model = sparse("llama", pattern="SRF")
    model.save_pretrained(tmp_path)
    transformers.logging.set_verbosity_warning()  # its default
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        library.removeHandler(caplog.handler)
    told = "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    for name in ("wq_b", "wk", "k_norm", "weights_proj"):
        assert f"self_attn.indexer.{name}" in told
    assert "UNEXPECTED" in told
    assert torch.equal(logits(loaded, IDS), logits(build("llama"), IDS))
    convert(loaded, pattern="SRF").load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_a_reverted_model_saves_like_one_that_was_never_converted(tmp_path):
    skim.revert(sparse("llama")).save_pretrained(tmp_path / "reverted")
    build("llama").save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "reverted" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_indexers_are_made_in_the_dtype_and_mode_of_their_layer():
    model = build("llama").to(torch.bfloat16)
    model.train()
    model.model.layers[1].self_attn.eval()
    layers = converted_layers(convert(model))
    assert [layer.indexer.training for layer in layers.values()] == [True, False, True]
    assert layers[0].indexer.wk.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("rope_dim", "expected"), [(None, 8), (2, 2), (4, 4), (8, 8)])
def test_the_rotated_channels_are_as_many_as_asked_for(rope_dim, expected):
    layers = converted_layers(sparse("llama", rope_dim=rope_dim))
    assert {layer.indexer.rope_dim for layer in layers.values()} == {expected}


def test_rotated_channels_that_the_models_table_cannot_give_are_refused():
    with pytest.raises(ValueError, match="rope_dim: expected a divisor of the 8 channels that the model rotates, got 6"):
        skim.convert(build("llama"), skim.Config(index_head_dim=16, rope_dim=6))


@pytest.mark.parametrize("size", [1, 3])
def test_an_index_head_of_which_no_half_can_be_rotated_is_refused_by_name(size):
    with pytest.raises(ValueError, match=f"index_head_dim: expected 4 or more, .* got {size}"):
        skim.convert(build("llama"), skim.Config(index_head_dim=size))
