"""Traps of spec section 7 that show in a whole model; those of one part are beside its other tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import build, convert, generate, logits, masks, recorded, sparse, tokens
from torch.profiler import ProfilerActivity, profile

import skim
from skim.huggingface.state import converted_layers

IDS = tokens(2, 40)
TESTS = Path(__file__).parent.parent
# What concerns the modules and Hugging Face models; section 7's other numbers are the operators' or of kernels to come.
NUMBERS = (1, 3, 4, 5, 6, 8, 9, 10, 15, 17, 18, 19, 20, 21)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_trap_that_concerns_these_parts_has_a_test_named_for_it(number):
    files = [*TESTS.joinpath("modules").glob("test_*.py"), *TESTS.joinpath("huggingface").glob("test_*.py")]
    named = [file.name for file in files if re.search(rf"def test_trap_{number:02d}_", file.read_text(encoding="utf-8"))]
    assert named


def test_trap_01_both_layouts_work_and_differ_once_the_text_is_longer_than_the_budget():
    half, interleaved = (sparse("llama", rope_layout=layout) for layout in ("half", "interleaved"))
    interleaved.load_state_dict(half.state_dict())
    assert not torch.equal(logits(half, IDS), logits(interleaved, IDS))
    assert torch.equal(logits(half, IDS[:, :8]), logits(interleaved, IDS[:, :8])), "a short text hides it"
    for model in (half, interleaved):
        assert torch.equal(generate(model, IDS), generate(model, IDS, use_cache=False))


def test_trap_01_a_table_that_repeats_each_frequency_is_read_as_one():
    """Cohere's cos and sin hold each frequency twice side by side; read as others hold them, half the frequencies are wrong."""
    model = sparse("cohere")
    before = logits(model, IDS)
    for layer in converted_layers(model).values():
        layer.indexer.repeated_table = False
    assert not torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trap_05_a_model_of_half_precision_weighs_its_heads_in_float32(dtype):
    model, made = convert(build("llama").to(dtype)), []
    converted_layers(model)[1].indexer.register_forward_hook(lambda module, args, out: made.append((args[0], out)))
    logits(model, IDS)
    hidden, (q, k, weights) = made[0]
    assert (hidden.dtype, q.dtype, k.dtype, weights.dtype) == (dtype, dtype, dtype, torch.float32)
    expected = hidden.double() @ converted_layers(model)[1].indexer.weights_proj.weight.double().T
    assert (weights - expected).abs().max() < 1e-5


def test_trap_09_the_same_text_is_read_the_same_way_every_time_and_in_any_batch():
    model = sparse("llama")
    whole, selections = recorded(model, IDS)
    for _ in range(3):
        again, others = recorded(model, IDS)
        assert torch.equal(again, whole)
        assert all(torch.equal(others[i].indices, selections[i].indices) for i in selections)
    for row in range(2):
        _, alone = recorded(model, IDS[row : row + 1])
        for number in selections:
            assert torch.equal(alone[number].indices, selections[number].indices[row : row + 1])


def test_trap_09_an_indexer_with_nothing_to_say_is_a_sliding_window():
    """All its scores are equal, and among equals the most recent token wins."""
    model = sparse("llama")
    with torch.no_grad():
        for layer in converted_layers(model).values():
            layer.indexer.weights_proj.weight.zero_()
    _, selections = recorded(model, IDS)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    for read in masks(selections, 40).values():
        assert torch.equal(read, ((distance >= 0) & (distance < 8)).expand(2, -1, -1))


def test_trap_10_fp8_reads_nearly_what_bf16_reads():
    ids = tokens(1, 256)
    model = convert(build("llama"), budget=32, index_n_heads=4, index_head_dim=32)
    read = [masks(recorded(model, ids)[1], 256)[0]]
    with skim.use(model, score_dtype="fp8"):
        read.append(masks(recorded(model, ids)[1], 256)[0])
    shared = float((read[0] & read[1])[:, 32:].sum() / read[0][:, 32:].sum())
    assert 0.95 < shared < 1.0


def peak(call) -> float:
    """MiB that live at most at a time beside what lived before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    live = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]"):
        live += size
        most = max(most, live)
    return most / 2**20


@pytest.mark.parametrize("what", ["forward", "training step", "warm-up step"])
def test_trap_15_no_step_of_a_model_holds_as_many_numbers_as_queries_times_keys(what):
    length = 2048  # squared, in float32: 16 MiB
    ids = tokens(1, length)
    model = convert(build("llama", num_hidden_layers=1), budget=16, workspace_mb=1)

    def step():
        if what == "forward":
            model.model(ids, use_cache=False)
        else:
            with skim.use(model, mode="sparse" if what == "training step" else "dense"), skim.record(model) as r:
                with torch.set_grad_enabled(what == "training step"):
                    out = model.model(ids, use_cache=False).last_hidden_state
                (r.alignment + (out.square().mean() if what == "training step" else 0.0)).backward()

    with torch.set_grad_enabled(what != "forward"):
        assert peak(step) < 8, "activations of the model included"
