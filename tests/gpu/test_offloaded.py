"""An offloaded cache: keys, values and index keys wait in main memory, and the tokens are those of a cache that stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "huggingface"))

from tiny import build, convert, generate, tokens  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import skim  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture
def model():
    return convert(build("llama").to("cuda"))


@pytest.mark.parametrize("score_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_an_offloaded_cache_gives_the_tokens_of_a_dynamic_one(model, arguments, score_dtype):
    ids = tokens(2, 30).to("cuda")
    with skim.use(model, score_dtype=score_dtype):
        expected = generate(model, ids, max_new_tokens=16, **arguments)
        assert torch.equal(generate(model, ids, max_new_tokens=16, cache_implementation="offloaded", **arguments), expected)


def test_an_offloaded_static_cache_is_refused_by_name(model):
    with pytest.raises(ValueError, match="an offloaded static cache can't hold index keys; use cache_implementation='offloaded'"):
        generate(model, tokens(2, 30).to("cuda"), cache_implementation="offloaded_static")


def test_index_keys_wait_where_keys_wait(model):
    cache = DynamicCache(config=model.config, offloading=True)
    with torch.no_grad():
        model(tokens(2, 30).to("cuda"), past_key_values=cache, use_cache=True)
    torch.cuda.synchronize()
    for layer in cache.layers:
        assert layer.index_keys.shape[1] == layer.keys.shape[2] == 30
        assert layer.index_keys.device == layer.keys.device
    assert "cpu" in {layer.index_keys.device.type for layer in cache.layers}
