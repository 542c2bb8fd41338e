"""torch.compile of converted MLA models, in one graph: forward, recorded step, decoding from a static cache."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_math import error
from tiny import generate, gradients, logits, tokens
from tiny_native import LAYOUTS, random_native
from transformers import CompileConfig, StaticCache

import skim

IDS = tokens(2, 30)
every_family = pytest.mark.parametrize("family", LAYOUTS)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pair(family):
    """An eager model without experts, whose own code breaks graphs, and its converted twin; GLM's second layer shares."""
    shared = {"indexer_types": ["full", "shared"]} if family == "glm_moe_dsa" else {}
    model = random_native(family, index_n_heads=16, first_k_dense_replace=2, **shared)
    return model, skim.convert(copy.deepcopy(model))


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@every_family
def test_a_forward_is_one_graph(family):
    model, ours = pair(family)
    assert error(logits(compiled(ours), IDS), logits(model, IDS)) < 1e-4


@every_family
def test_a_recorded_step_is_one_graph_and_has_the_same_gradients(family):
    _, ours = pair(family)
    found = []
    for run in (ours, compiled(ours)):
        with skim.record(ours) as r:
            out = run(IDS, labels=IDS, use_cache=False)
        (out.loss + r.alignment).backward()
        found.append(gradients(ours))
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).abs().max()) < 1e-6, name


@every_family
def test_decoding_from_a_static_cache_is_one_graph_that_writes_in_place(family):
    model, ours = pair(family)
    expected = generate(model, IDS, max_new_tokens=6)
    cache = StaticCache(config=ours.config, max_cache_len=64)
    with torch.no_grad():
        found = [ours(IDS, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)]
        held = cache.layers[0].keys, cache.layers[0].index_keys
        fast = compiled(ours)
        for t in range(30, 35):
            position = torch.full((2, 1), t)
            found.append(fast(found[-1], past_key_values=cache, position_ids=position, use_cache=True).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat((IDS, *found), dim=1), expected)
    assert cache.layers[0].keys is held[0] and cache.layers[0].index_keys is held[1]


def test_generate_may_compile_its_decoding_steps():
    model, ours = pair("deepseek_v32")
    options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    assert torch.equal(generate(ours, IDS, cache_implementation="static", compile_config=options), generate(model, IDS))
