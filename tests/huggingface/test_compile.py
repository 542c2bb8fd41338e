"""torch.compile of a converted model, in one graph: forward, training, decoding from a static cache."""

from __future__ import annotations

import pytest
import torch
from tiny import build, convert, generate, gradients, largest_difference, logits, sparse, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, StaticCache

import skim

IDS = tokens(2, 30)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, **options):
    return torch.compile(model, fullgraph=True, **{"backend": "aot_eager", **options})


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox", "gpt_oss"])
def test_a_forward_is_one_graph(family, mode):
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family in ("gemma3_text", "gpt_oss") else {}
    model = convert(build(family, num_hidden_layers=2 if kinds else 1, **kinds), mode=mode)
    assert (logits(compiled(model), IDS) - logits(model, IDS)).abs().max() < 1e-5


def test_fp8_scores_are_part_of_the_graph():
    model = sparse("llama", layers=1, score_dtype="fp8")
    assert (logits(compiled(model), IDS) - logits(model, IDS)).abs().max() < 1e-5


def test_one_graph_serves_every_length_above_the_budget():
    model = sparse("llama", layers=1, keep_first=1, keep_recent=1)
    counter = CompileCounterWithBackend("eager")
    fast = compiled(model, dynamic=True, backend=counter)
    batches = []
    for length in (30, 21, 13, 17):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, :3] = 0
        batches.append((IDS[:, :length].contiguous(), {"attention_mask": mask}))
    expected = [logits(model, ids, **arguments) for ids, arguments in batches]
    graphs = []
    for (ids, arguments), reference in zip(batches, expected):
        assert (logits(fast, ids, **arguments) - reference).abs().max() < 1e-5
        graphs.append(counter.frame_count)
    assert graphs[1:] == [graphs[1]] * 3, "a second graph is torch's own doing: it makes one for models without Skim too"


def test_settings_that_change_are_seen_by_the_compiled_model():
    model = sparse("llama", layers=2)
    fast = compiled(model)
    for changes in ({"budget": 4}, {"mode": "dense"}, {"pattern": "SR"}):
        with skim.use(model, **changes):
            assert (logits(fast, IDS) - logits(model, IDS)).abs().max() < 1e-5


def step(model, run, ids=IDS, factor=0.5):
    with skim.record(model) as r:
        out = run(ids, labels=ids, use_cache=False)
        ((out.loss + r.alignment) * factor).backward()
    return r, gradients(model)


@pytest.mark.parametrize(("mode", "pattern", "checkpointed"), [("dense", "S", False), ("sparse", "SR", False), ("sparse", "S", True)])
def test_a_recorded_step_is_one_graph_and_has_the_same_gradients(mode, pattern, checkpointed):
    model = convert(build("llama", num_hidden_layers=2), mode=mode, pattern=pattern).train()
    plain, expected = step(model, model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fast = compiled(model)
    for factor in (0.5, 1.0):  # the second step runs the graph of the first
        r, found = step(model, fast, factor=factor)
        assert abs(r.alignment.item() - plain.alignment.item()) < 1e-5
        assert largest_difference({name: g * factor / 0.5 for name, g in expected.items()}, found) < 1e-5
    with skim.record(model):
        fast(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(float(g.abs().max()) == 0 for name, g in gradients(model).items() if ".indexer." in name)


def test_shared_selections_in_checkpointed_layers_break_the_graph_and_are_right():
    """A checkpoint in a graph may change nothing outside itself, and the next layer's selection is outside."""
    model = sparse("llama", layers=2, pattern="SR").train()
    _, expected = step(model, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = step(model, torch.compile(model, backend="eager"))
    assert largest_difference(expected, found) < 1e-5


def test_warm_up_under_compile_has_the_same_gradients():
    """Gradients that are made in the forward break the graph."""
    model = convert(build("llama", num_hidden_layers=1), mode="dense")

    def warm(run):
        with skim.record(model) as r:
            with torch.no_grad():
                run(IDS, use_cache=False)
            r.alignment.backward()
        return gradients(model)

    expected = warm(model)
    assert largest_difference(expected, warm(torch.compile(model, backend="eager"))) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_decoding_from_a_static_cache_is_one_graph(family):
    model = convert(build(family, num_hidden_layers=2), pattern="SR")
    expected = generate(model, IDS, max_new_tokens=6)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        token = model(IDS, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        held, found = cache.layers[0].index_keys, [token]
        fast = compiled(model)
        for t in range(30, 35):
            position = torch.full((2, 1), t)
            found.append(fast(found[-1], past_key_values=cache, position_ids=position, use_cache=True).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat((IDS, *found), dim=1), expected)
    assert cache.layers[0].index_keys is held, "written in place, so that the graph's memory stays the same"


def test_generate_may_compile_its_decoding_steps():
    model = sparse("llama", layers=1)
    options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    found = generate(model, IDS, cache_implementation="static", compile_config=options)
    assert torch.equal(found, generate(model, IDS))


@pytest.mark.slow
def test_the_default_backend_compiles_a_recorded_step():
    model = sparse("llama", layers=1).train()
    _, expected = step(model, model)
    try:
        _, found = step(model, compiled(model, backend="inductor"))
    except torch._inductor.exc.InductorError as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip("inductor finds no C++ compiler here")
    assert largest_difference(expected, found) < 1e-5
