"""Both stages of training on a GPU, in bf16: the indexers learn, the base stays, and a run that was cut off goes on bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from tiny_model import converted, text  # noqa: E402
from tiny_training import tokenizer, write_texts  # noqa: E402

import skim  # noqa: E402
import skim.training.stage  # noqa: E402
from skim.training import Recipe, loop, prepare, train  # noqa: E402

pytestmark = pytest.mark.gpu

LENGTH = 96


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return prepare(write_texts(folder / "texts"), tokenizer(), LENGTH, folder / "cache")


def on_gpu():
    return converted().to("cuda", torch.bfloat16)


def run(rows, out, stage="warmup", model=None, **changes):
    model = model or on_gpu()
    return model, train(model, rows, Recipe(stage, **{"steps": 20, "length": LENGTH, "precision": "bf16", **changes}), out=out, tokenizer=tokenizer())


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_warm_up_of_a_bf16_model_leaves_the_base(rows, tmp_path):
    before = weights(on_gpu())
    model, report = run(rows, tmp_path, steps=80)
    assert sum(report["kl"][-10:]) < 0.7 * sum(report["kl"][:10])
    for name, value in weights(model).items():
        assert value.device.type == "cuda" and value.dtype == torch.bfloat16
        assert torch.equal(value, before[name]) or ".indexer." in name
    assert report["tokens_per_second"] > 0 and report["peak_gib"] > 0


@pytest.mark.parametrize("changes", [{"loss": "lm"}, {"loss": "distill"}, {"loss": "distill", "lora": 4}, {"loss": "lm", "checkpointing": True}])
def test_the_sparse_stage_runs(rows, tmp_path, changes):
    model, _ = run(rows, tmp_path / "warm")
    model, report = run(rows, tmp_path / "sparse", "sparse", model, lr=1e-3, **changes)
    assert len(report["loss"]) == 20 and all(value == value for value in report["loss"])
    with torch.no_grad():
        assert bool(model(text(60).cuda() % 30).logits.isfinite().all())


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(rows, tmp_path, monkeypatch, stage):
    changes = {"steps": 8, "save_every": 3}
    whole = weights(run(rows, tmp_path / "whole", stage, **changes)[0])
    step, done = loop.Stage.step, []

    def cut(self, *args, **options):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return step(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Stage, "step", cut)
        run(rows, tmp_path / "cut", stage, **changes)
    model = on_gpu()
    train(model, rows, Recipe(stage, length=LENGTH, precision="bf16", **changes), out=tmp_path / "cut", tokenizer=tokenizer(), resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in weights(model).items())


CAPTURED = [
    ("warmup", {"variants": {"wide": {"index_head_dim": 32}}}, {}),
    ("sparse", {}, {"accumulate": 2}),
    ("sparse", {}, {"loss": "distill", "lora": 4}),
]


@pytest.mark.parametrize(("stage", "options", "changes"), CAPTURED)
def test_a_captured_step_gives_the_bits_of_one_that_is_not(rows, tmp_path, monkeypatch, recwarn, stage, options, changes):
    def trained(out):
        model, recipe = on_gpu(), Recipe(stage, steps=8, length=LENGTH, precision="bf16", **changes)
        return model, train(model, rows, recipe, out=out, tokenizer=tokenizer(), **options)

    model, report = trained(tmp_path / "captured")
    assert not [w for w in recwarn if "capture" in str(w.message)]

    def refuse(*_):
        raise RuntimeError("not now")

    monkeypatch.setattr(skim.training.stage, "Captured", refuse)
    other, told = trained(tmp_path / "not")
    assert report["kl"] == told["kl"] and report["loss"] == told["loss"]
    assert [v["kl"] for v in report["variants"].values()] == [v["kl"] for v in told["variants"].values()]
    theirs = weights(other)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(model).items())


def test_a_model_that_waits_for_the_gpu_is_trained_all_the_same(rows, tmp_path):
    model = on_gpu()
    model.model.layers[1].register_forward_pre_hook(lambda module, args: None if bool(args[0].isfinite().all()) else None)
    with pytest.warns(UserWarning, match="can't capture"):
        model, report = run(rows, tmp_path, model=model, steps=40)
    assert sum(report["kl"][-5:]) < sum(report["kl"][:5])
    assert bool(torch.rand(4, device="cuda").isfinite().all())  # random numbers, streams and the allocator work as before
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()


def test_an_adapter_of_the_warm_up_loads_into_a_fresh_model(rows, tmp_path):
    model, _ = run(rows, tmp_path)
    from tiny_model import sharp_llama

    loaded = skim.load(sharp_llama().to("cuda", torch.bfloat16), tmp_path / "adapter")
    ids = text(60).cuda()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
