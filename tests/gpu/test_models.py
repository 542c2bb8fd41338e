"""A converted model on a GPU: the same tokens with every cache, the dense model's logits within the budget."""

import pytest
import torch
from tiny_model import converted, sharp_llama, text

import skim

pytestmark = pytest.mark.gpu


def test_within_the_budget_logits_are_bitwise_the_dense_models():
    wanted = sharp_llama().cuda()(text(60).cuda()).logits
    model = converted(budget=60).cuda()
    with skim.use(model, mode="sparse"):
        assert torch.equal(model(text(60).cuda()).logits, wanted)


@pytest.mark.parametrize("cache", ("dynamic", "static", "offloaded"))
def test_generation_gives_the_same_tokens_with_every_cache(cache):
    model = converted().cuda()
    skim.use(model, mode="sparse")
    tokens = text(50).cuda()
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(model.generate(tokens, cache_implementation=cache, **options), wanted)  # static: compiled by transformers


def test_recorded_gradients_equal_the_cpus():
    results = []
    for device in ("cpu", "cuda"):
        model = converted().to(device)
        tokens = text(50).to(device)
        with skim.use(model, mode="sparse"), skim.record(model) as r:
            (model(tokens, labels=tokens).loss + r.alignment).backward()
        results.append({name: p.grad.cpu() for name, p in model.named_parameters()})
    for name, wanted in results[0].items():
        torch.testing.assert_close(results[1][name], wanted, rtol=1e-3, atol=1e-5)
