"""Training MLA models: what their indexers learn from, what eager's gradients are, and a dense one made sparse."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from reference_math import alignment, error, index_scores, interval_mask
from tiny import CONFIG, MLA, build, gradients, largest_difference, tokens
from tiny_native import LAYOUTS, SHARED, random_native, read_by
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import skim
from skim.huggingface import mla
from skim.huggingface.state import converted_layers, source_of, state_of

LENGTH = 40
IDS = tokens(2, LENGTH)
FAMILIES = ("deepseek_v3", *LAYOUTS)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_mode = pytest.mark.parametrize("mode", ["dense", "sparse"])


def model_of(family: str, implementation: str = "eager", **changes: Any) -> Any:
    if family == "deepseek_v3":
        return build(family, implementation, **{**MLA, **changes})
    shared = {"num_hidden_layers": 4, "indexer_types": SHARED} if family == "glm_moe_dsa" else {}
    return random_native(family, implementation=implementation, index_n_heads=16, **{**shared, **changes})


def converted(model: Any, mode: str = "sparse", **config: Any) -> Any:
    """A converted copy; a budget of 8 for deepseek_v3, whose indexers are new."""
    model, native = copy.deepcopy(model), model.config.model_type in LAYOUTS
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skim.convert(model, None if native else skim.Config(budget=8, index_n_heads=2, index_head_dim=16))
    skim.use(model, mode=mode, **config)
    return model


def step(model: Any, ids: Tensor = IDS) -> tuple[Any, dict[str, Tensor]]:
    with skim.record(model, selections=True) as r:
        out = model(ids, labels=ids, use_cache=False)
    (out.loss + r.alignment).backward()
    return r, gradients(model)


def base(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g for name, g in found.items() if ".indexer." not in name}


@pytest.mark.parametrize("record", [True, False], ids=["recording", "without"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_family
def test_gradients_of_the_model_are_eagers_where_every_key_is_read(family, implementation, record):
    native = {} if family == "deepseek_v3" else {"index_topk": LENGTH}
    model = model_of(family, implementation, **native)
    ours = converted(model, budget=LENGTH)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = gradients(model)
    if record:
        _, found = step(ours)
        assert any(float(g.abs().max()) > 0 for name, g in found.items() if ".indexer." in name)
    else:
        ours(IDS, labels=IDS, use_cache=False).loss.backward()
        found = gradients(ours)
        assert all(float(g.abs().max()) == 0 for name, g in found.items() if ".indexer." in name)
    assert any(".experts." in name for name in expected)
    for name, gradient in base(expected).items():
        assert error(found[name], gradient) < 1e-4, name


@pytest.mark.parametrize("family", LAYOUTS)
def test_gradients_of_the_model_are_eagers_inside_the_selection_too(family):
    model = model_of(family)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    expected, (_, found) = gradients(model), step(converted(model))
    for name, gradient in base(expected).items():
        assert error(found[name], gradient) < 1e-3, name


@every_mode
@every_family
def test_alignments_and_their_gradients_are_those_of_the_loops(family, mode, monkeypatch):
    """In float64, from the queries and latents that each attention gets, and the inputs of the indexer that it reads by."""
    ids = IDS[:, :14]
    model = converted(model_of(family, first_k_dense_replace=4).double(), mode=mode)  # experts know no float64
    layers, seen, inputs = converted_layers(model), {}, {}

    def spy(layer: Any, handed: Any, q: Tensor, k: Tensor, v: None, visible: Any, **options: Any) -> Tensor:
        seen[layer.layer_idx] = q, k, interval_mask(*visible, 14), options["scale"]
        return read(layer, handed, q, k, v, visible, **options)

    read = mla.read
    monkeypatch.setattr(mla, "read", spy)
    for number, layer in layers.items():
        if hasattr(layer, "indexer"):
            layer.indexer.register_forward_pre_hook(lambda m, args, number=number: inputs.update({number: args}))
    r, found = step(model, ids)
    assert r.alignments.keys() == layers.keys() == seen.keys()
    letters = state_of(model).letters
    sources = {number: source_of(number, letters) for number in layers}
    indexers = {number: copy.deepcopy(layers[number].indexer) for number in inputs}
    for number, (q, k, visible, scale) in seen.items():
        source = sources[number]
        scores = index_scores(*indexers[source](*inputs[source]), visible)
        keys = read_by(r.selections[number].indices[:, :, 0], 14) if mode == "sparse" else visible
        assert k.shape == (2, 14, 1, model.config.kv_lora_rank + model.config.qk_rope_head_dim)
        expected = alignment(q, k, scores, keys, scale) / list(sources.values()).count(source)
        expected.backward()
        assert abs(float(r.alignments[number]) - float(expected.detach())) < 1e-5
    for number, indexer in indexers.items():
        for name, parameter in indexer.named_parameters():
            assert error(found[f"model.layers.{number}.self_attn.indexer.{name}"], parameter.grad) < 1e-6, name


@every_mode
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@every_family
def test_checkpoints_give_the_gradients_of_no_checkpoint(family, reentrant, mode):
    model = converted(model_of(family), mode=mode).train()
    plain, expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, found = step(model)
    assert torch.equal(again.alignment, plain.alignment)
    assert largest_difference(expected, found) < 1e-6


@every_mode
@pytest.mark.parametrize("form", ["frozen", "no_grad"])
@every_family
def test_warm_up_gives_the_indexers_the_gradients_of_the_tied_form(family, form, mode):
    model = converted(model_of(family), mode=mode)
    _, expected = step(model)
    if form == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".indexer." in name)
    with torch.set_grad_enabled(form == "frozen"), skim.record(model) as r:
        model(IDS, use_cache=False)
    r.alignment.backward()
    found = gradients(model)
    for name, gradient in found.items():
        assert error(gradient, expected[name] if ".indexer." in name else torch.zeros_like(gradient)) < 1e-5, name


@every_family
def test_autocast_trains_with_finite_gradients_close_to_those_in_float32(family):
    model = converted(model_of(family, first_k_dense_replace=4))
    plain, expected = step(model)
    with torch.autocast("cpu", torch.bfloat16), skim.record(model) as r:
        out = model(IDS, labels=IDS, use_cache=False)
    (out.loss + r.alignment).backward()
    assert abs(r.alignment.item() - plain.alignment.item()) < 0.05 * plain.alignment.item()
    for name, gradient in gradients(model).items():
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.8, name


def test_a_small_mla_model_goes_from_dense_to_sparse_and_its_losses_fall():
    """Dense, then warm-up of the new indexers, then everything, on a few texts that repeat themselves."""
    torch.manual_seed(0)
    config = DeepseekV3Config(**{**CONFIG, **MLA, "num_hidden_layers": 2, "kv_lora_rank": 24, "q_lora_rank": 24})
    model = DeepseekV3ForCausalLM(config).train()

    def text(seed: int) -> Tensor:
        return tokens(4, 24, seed % 3).repeat(1, 2)

    def train(model: Any, steps: int, lr: float, record: bool = True) -> list[tuple[float, float]]:
        """The model's loss and the alignment of each step; what takes no gradients stays as it is."""
        optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr), []
        for seed in range(steps):
            ids = text(seed)
            with skim.record(model) if record else contextlib.nullcontext() as r:
                out = model(ids, labels=ids, use_cache=False)
            loss = out.loss if r is None else out.loss + r.alignment
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append((out.loss.item(), 0.0 if r is None else r.alignment.item()))
        return losses

    train(model, 30, 3e-3, record=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skim.convert(model, skim.Config(budget=12, index_n_heads=4, index_head_dim=16))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." in name)
    warm_up = train(model, 30, 1e-2)
    assert warm_up[-3][1] < 0.5 * warm_up[0][1], "the indexers learn what the dense attention reads"
    skim.use(model, mode="sparse")
    model.requires_grad_(True)
    sparse = train(model, 40, 3e-3)
    assert sparse[-1][0] < 0.8 * sparse[0][0], "of the same text"
    assert sparse[-1][1] < 0.5 * warm_up[0][1]
