"""The loop: both stages, what they leave in their folder, and that a run which was killed goes on as if it hadn't been."""

import copy
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import socket
import time
import warnings
from dataclasses import replace
from pathlib import Path

import accelerate
import processes
import pytest
import torch
from rich.console import Console
from tiny_model import converted, sharp_llama, text
from tiny_training import chat_tokenizer, tokenizer, write_texts

import skim
from skim.huggingface import attention, masks
from skim.huggingface.state import converted_layers, state_of
from skim.training import Recipe, checkpoint, loop, prepare, train
from skim.training.stage import Stage
from skim.training.variants import configurations

LENGTH = 96


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return prepare(write_texts(folder / "texts"), tokenizer(), LENGTH, folder / "cache")


@pytest.fixture(scope="module")
def context():
    """Processes that find everything imported already."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["processes"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    return made


def recipe(stage="warmup", **changes):
    return Recipe(stage, **{"steps": 4, "length": LENGTH, **changes})


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_warm_up_leaves_the_base_and_a_folder_to_load(rows, tmp_path):
    model = converted()
    before = state(model)
    report = train(model, rows, recipe(steps=80), out=tmp_path)
    assert sum(report["kl"][-10:]) < 0.7 * sum(report["kl"][:10])
    after = state(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if ".indexer." in name} and "bit for bit" in report["audit"]
    assert state_of(model).mode == "sparse"
    loaded = skim.load(sharp_llama(), tmp_path / "adapter")
    assert same(state(loaded), after)
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(json.dumps(report))
    masses = list(report["kept_mass"].values())
    assert len(masses) == 20 and masses[-1] > masses[0]
    assert report["probe"]["peak_gib"] > 0 and report["probe"]["hours"] > 0


def test_the_audit_finds_what_the_warm_up_may_not_do(rows, tmp_path, monkeypatch):
    step = Stage.step

    def meddle(self, *args):
        with torch.no_grad():
            self.model.lm_head.weight[0, 0] += 1e-3
        return step(self, *args)

    monkeypatch.setattr(Stage, "step", meddle)
    with pytest.raises(RuntimeError, match="expected the base bit for bit as it was"):
        train(converted(), rows, recipe(), out=tmp_path)


@pytest.mark.parametrize("loss", ["lm", "distill"])
@pytest.mark.parametrize("lora", [None, 4])
def test_the_sparse_stage_trains_and_saves_all_of_the_base_or_lora(rows, tmp_path, loss, lora):
    from transformers import AutoModelForCausalLM

    model, base = converted(), state(sharp_llama())
    before = state(model)
    report = train(model, rows, recipe("sparse", loss=loss, lora=lora, lr=1e-3), out=tmp_path, tokenizer=tokenizer())
    assert len(report["loss"]) == len(report["kl"]) == 4
    after = state(model)
    assert after.keys() == before.keys() and not any("lora" in name for name in after)
    same_weights = [name for name in after if torch.equal(after[name], before[name]) and "rotary" not in name]
    untouched = {"model.embed_tokens.weight", "lm_head.weight"} | {n for n in after if "norm" in n and "indexer" not in n}
    assert set(same_weights) == (untouched if lora else set())
    with torch.no_grad():
        expected = model(text(64)).logits
    if lora:
        peft = pytest.importorskip("peft")
        loaded = peft.PeftModel.from_pretrained(sharp_llama(), tmp_path / "lora").merge_and_unload()
        assert not (tmp_path / "model").exists()
        fresh = skim.load(sharp_llama(), tmp_path / "adapter")
        assert same({n: v for n, v in state(fresh).items() if n in base}, base)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert (tmp_path / "model" / "tokenizer.json").is_file() and "skim" not in (tmp_path / "model" / "config.json").read_text()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # merged weights are other weights
        assert (skim.load(loaded, tmp_path / "adapter")(text(64)).logits - expected).abs().max() < 1e-5


def test_distillation_keeps_closer_to_the_dense_model_than_it_was(rows, tmp_path):
    model = converted()
    train(model, rows, recipe(steps=40), out=tmp_path / "warm")
    start = copy.deepcopy(model)
    report = train(model, rows, recipe("sparse", steps=60, loss="distill", lr=3e-4, batch=2), out=tmp_path / "sparse")
    batch = [rows[i] for i in range(len(rows))]
    ids, positions = (torch.stack([row[name] for row in batch]) for name in ("input_ids", "position_ids"))

    def divergence(student):
        with torch.no_grad():
            ours, theirs = (m(ids, position_ids=positions).logits.log_softmax(-1) for m in (student, sharp_llama()))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    assert divergence(model) < 0.8 * divergence(start)
    assert sum(report["loss"][-10:]) < sum(report["loss"][:10])


def test_a_frozen_indexer_stays(rows, tmp_path):
    model = converted()
    before = state(model)
    report = train(model, rows, recipe("sparse", train_indexer=False), out=tmp_path)
    after = state(model)
    assert all(torch.equal(after[name], before[name]) == (".indexer." in name) for name in after if "rotary" not in name)
    assert report["kl"] == [] and "verdict" not in report


@pytest.mark.parametrize("changes", [{"checkpointing": True}, {"batch": 1, "accumulate": 4}, {"batch": 4, "accumulate": 1, "checkpointing": True}])
@pytest.mark.parametrize("loss", ["lm", "distill"])
def test_checkpointing_and_accumulation_change_nothing(rows, tmp_path, changes, loss):
    chats = tmp_path / "chats.jsonl"  # rows with unequal numbers of labels
    chats.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": "ab" * (i + 9)}, {"role": "assistant", "content": "cd" * (40 - i)}]}) + "\n"
            for i in range(12)
        )
    )
    data = prepare([chats, *[str(p) for p in rows.folder.parent.parent.glob("texts/*.txt")]], chat_tokenizer(), LENGTH, tmp_path / "cache")
    found = []
    for i, more in enumerate(({"batch": 2, "accumulate": 2}, {"batch": 2, "accumulate": 2, **changes})):
        model = converted()
        report = train(model, data, recipe("sparse", loss=loss, lr=1e-4, **more), out=tmp_path / str(i))
        found.append((report["loss"], report["kl"], state(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4) and found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    for name, value in found[0][2].items():
        assert (value - found[1][2][name]).abs().max() < 2e-5, name


def test_bf16_models_train_in_float32_and_go_back(rows, tmp_path):
    for stage in ("warmup", "sparse"):
        model = converted().to(torch.bfloat16)
        buffers = {name: b.dtype for name, b in model.named_buffers()}
        report = train(model, rows, recipe(stage, precision="bf16"), out=tmp_path / stage)
        assert all(value == value for value in report["kl"])
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert {name: b.dtype for name, b in model.named_buffers()} == buffers


def test_under_a_bf16_base_index_products_are_bf16_and_head_weights_float32(rows, tmp_path, monkeypatch):
    found, losses = set(), []
    align = attention.align

    def watched(q, k, q_index, k_index, weights, **options):
        found.add((q.dtype, q_index.dtype, k_index.dtype, weights.dtype))
        return align(q, k, q_index, k_index, weights, **options)

    monkeypatch.setattr(attention, "align", watched)
    for base, precision in ((torch.bfloat16, "bf16"), (torch.float32, "bf16"), (torch.float32, "fp32")):
        found.clear()
        report = train(converted().to(base), rows, recipe(steps=20, precision=precision), out=tmp_path / f"{base}-{precision}")
        losses.append(report["kl"])
        narrow = torch.bfloat16 if precision == "bf16" else torch.float32
        assert found == {(narrow, narrow, narrow, torch.float32)}
    for curve in losses[:2]:
        assert curve == pytest.approx(losses[2], rel=0.03)


@pytest.mark.parametrize(
    "changes", [{"loss": "distill"}, {"loss": "distill", "lora": 2}, {"train_indexer": False}, {"loss": "distill", "checkpointing": True}]
)
def test_no_stage_makes_a_mask_of_every_pair_of_tokens(rows, tmp_path, monkeypatch, changes):
    def fails(*_):
        raise AssertionError("a mask")

    monkeypatch.setattr(masks, "_dense", fails)
    assert any((rows[i]["position_ids"] == 0).sum() > 1 for i in range(len(rows))), "documents lie together in a row"
    train(converted(budget=90), rows, recipe(), out=tmp_path / "warm")
    train(converted(budget=90), rows, recipe("sparse", **changes), out=tmp_path / "sparse")


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_under_another_pattern_it_is_as_if_the_model_had_been_converted_with_it(rows, tmp_path, stage):
    other = converted()
    first, second = (state(layer.indexer) for layer in converted_layers(other).values())
    own = converted(pattern="SR")
    converted_layers(own)[0].indexer.load_state_dict(first)
    skim.use(other, pattern="SR")
    found = []
    for name, model in (("other", other), ("own", own)):
        report = train(model, rows, recipe(stage, steps=3), out=tmp_path / name)
        found.append((report["kl"], report["loss"], report["kept_mass"], report["kl_by_layer"], report["input_rms"]))
    assert stage == "sparse" or same(state(converted_layers(other)[1].indexer), second)
    assert found[0] == found[1]
    adapters = [(tmp_path / name / "adapter" / "skim_model.safetensors").read_bytes() for name in ("other", "own")]
    assert adapters[0] == adapters[1]


VARIANTS = {"small": {"index_n_heads": 2, "index_head_dim": 8}, "turned": {"rope_dim": 4, "rope_layout": "interleaved"}}


@pytest.mark.parametrize(("pattern", "changes"), [("S", {}), ("SR", {"accumulate": 2, "clip": 0.1})])
def test_several_configurations_are_trained_in_one_pass_as_each_would_be_alone(rows, tmp_path, pattern, changes):
    together = train(converted(pattern=pattern), rows, recipe(steps=12, **changes), out=tmp_path / "together", variants=VARIANTS)
    for name, fields in ({"own": {}} | VARIANTS).items():
        alone = train(converted(pattern=pattern, **fields), rows, recipe(steps=12, **changes), out=tmp_path / name)
        found = together if name == "own" else together["variants"][name]
        assert found["kl"] == pytest.approx(alone["kl"], rel=1e-5) and found["config"] == alone["config"]
        folder = tmp_path / "together" / ("adapter" if name == "own" else f"variants/{name}")
        one, other = (state(skim.load(sharp_llama(), path)) for path in (folder, tmp_path / name / "adapter"))
        assert one.keys() == other.keys() and max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-5


def test_a_capture_that_fails_leaves_nothing_in_the_losses(rows, monkeypatch):
    def stage():
        chosen = recipe().resolved(chat=False, accelerated=False)
        batch = {name: value[None] for name, value in rows[0].items()}
        model = converted()
        return Stage(model, chosen, accelerate.Accelerator(), batch, configurations(state_of(model).config, VARIANTS)), batch

    def fails(work, inputs):  # in the last layer: what was recorded before is never computed
        def raises(*_):
            raise RuntimeError("not now")

        hook = list(converted_layers(other.model).values())[-1].register_forward_pre_hook(raises)
        try:
            work(inputs)
        finally:
            hook.remove()
            other.optimizer.zero_grad(set_to_none=True)

    (own, batch), (other, _) = stage(), stage()
    expected = own.step(0, [batch])
    monkeypatch.setattr(skim.training.stage, "Captured", fails)
    other.capturable = other.compiled = True
    with pytest.warns(UserWarning, match="can't capture a training step of LlamaForCausalLM, so it takes longer: not now"):
        found = other.step(0, [batch])
    assert found.variants == expected.variants and found.kl == expected.kl
    assert not other.capturable and same(own.trained(), other.trained())


def test_what_a_variant_may_not_be_is_named(rows, tmp_path):
    for variants, message in (
        ({"a/b": {}}, "variants: expected names of letters, digits, '-', '_' and '.', got 'a/b'"),
        ({"a": {"budget": 3}}, "variants: expected fields among index_n_heads, .*, got 'budget' in 'a'"),
        ({"a": {"index_n_heads": 0}}, "index_n_heads: expected"),
        ({"a": {"rope_dim": 6}}, "rope_dim: expected a divisor of the 8 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            train(converted(), rows, recipe(), out=tmp_path / "out", variants=variants)
    with pytest.raises(ValueError, match="variants: expected none in the sparse stage"):
        train(converted(), rows, recipe("sparse"), out=tmp_path / "out", variants=VARIANTS)
    assert not (tmp_path / "out").exists()


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("stage", "lora", "variants"), [("warmup", None, {}), ("warmup", None, VARIANTS), ("sparse", None, {}), ("sparse", 2, {})])
def test_a_run_that_goes_on_is_bitwise_the_run_that_never_stopped(rows, tmp_path, monkeypatch, stage, lora, variants):
    chosen = recipe(stage, steps=9, save_every=2, lora=lora)
    whole = converted()
    expected = train(whole, rows, chosen, out=tmp_path / "whole", variants=variants)
    step = Stage.step

    def stops(self, number, *args):
        if number == 7:
            raise Stopped
        return step(self, number, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "step", stops)
        with pytest.raises(Stopped):
            train(converted(), rows, chosen, out=tmp_path / "parts", variants=variants)
    assert [folder.name for folder in checkpoint.steps(tmp_path / "parts")] == ["step-00000004", "step-00000006"]
    torch.manual_seed(99)  # what came before doesn't matter
    again = converted()
    found = train(again, rows, replace(chosen, save_every=3), out=tmp_path / "parts", resume=True, variants=variants)
    assert (found["loss"], found["kl"], found["kept_mass"]) == (expected["loss"], expected["kl"], expected["kept_mass"])
    assert same(state(whole), state(again)) and found["variants"] == expected["variants"]
    for name in variants:
        one, other = (tmp_path / folder / "variants" / name / "skim_model.safetensors" for folder in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()
    assert [folder.name for folder in checkpoint.steps(tmp_path / "parts")] == ["step-00000006", "step-00000009"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kills"), [("warmup", 10), ("sparse", 10)])
def test_kill_9_at_random_moments_costs_time_and_nothing_else(rows, tmp_path, context, stage, kills):

    def start(out):
        process = context.Process(target=processes.alone, args=(stage, str(rows.folder), str(out)))
        process.start()
        return process

    began = time.monotonic()
    start(tmp_path / "first").join(120)
    start(tmp_path / "whole").join(120)
    seconds = (time.monotonic() - began) / 2
    out, moments = tmp_path / "parts", random.Random(stage)
    for _ in range(kills):
        process = start(out)
        process.join(moments.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, 9)
            process.join()
        for folder in checkpoint.steps(out):
            assert checkpoint.load(folder)["run"]["step"] == int(folder.name[5:])
        if (out / "adapter").exists():
            skim.load(sharp_llama(), out / "adapter")
    process = start(out)
    process.join(120)
    assert process.exitcode == 0
    expected, found = (json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "whole", out))
    assert (found["loss"], found["kl"]) == (expected["loss"], expected["kl"])
    for part in ("adapter/skim_model.safetensors", "adapter/skim_config.json", *(["model/model.safetensors"] if stage == "sparse" else [])):
        assert (out / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()
    assert not list(out.glob("**/.writing-*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_two_processes_do_what_one_does_with_twice_the_rows(rows, tmp_path, context, stage):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chosen = recipe(stage, steps=3, accumulate=2, **({"loss": "distill", "lr": 1e-4, "checkpointing": True} if stage == "sparse" else {}))
    variants = VARIANTS if stage == "warmup" else {}
    started = [
        context.Process(target=processes.together, args=(rank, 2, port, chosen, variants, str(rows.folder), str(tmp_path))) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
        assert process.exitcode == 0
    model = converted()
    report = train(model, rows, replace(chosen, batch=2), out=tmp_path / "alone", variants=variants)
    for rank in range(2):
        loss, kl, others, weights = torch.load(tmp_path / f"{rank}.pt")
        assert {name: pytest.approx(found["kl"], rel=1e-4) for name, found in report["variants"].items()} == others
        assert loss == pytest.approx(report["loss"], rel=1e-4) and kl == pytest.approx(report["kl"], rel=1e-4)
        for name, value in state(model).items():
            assert (value - weights[name]).abs().max() < 1e-4, name


def test_the_probe_leaves_nothing_behind(rows, tmp_path):
    for stage, changes in (("warmup", {}), ("sparse", {}), ("sparse", {"lora": 2, "checkpointing": True})):
        model = converted().train()
        before, needs = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
        report = train(model, rows, recipe(stage, **changes), out=tmp_path / "out", dry_run=True)
        assert report["probe"]["hours"] > 0 and not (tmp_path / "out").exists()
        assert same(state(model), before) and model.training and state_of(model).mode == "dense"
        assert {name: p.requires_grad for name, p in model.named_parameters()} == needs
        assert all(p.grad is None for p in model.parameters())
        assert not model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("changes", "fits", "flags"),
    [
        ({"batch": 4}, lambda r: r.batch == 1, "--batch 1 --accumulate 4"),
        ({}, lambda r: r.checkpointing, "--checkpointing"),
        ({}, lambda r: r.lora, "--checkpointing --lora 16"),
        ({"lora": 4}, lambda r: r.length == 24, "--checkpointing --length 24"),
        ({}, lambda r: False, None),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_setting_that_does(rows, tmp_path, monkeypatch, changes, fits, flags):
    step = Stage.step

    def limited(self, *args):
        if not fits(self.recipe):
            raise torch.OutOfMemoryError("no more")
        return step(self, *args)

    monkeypatch.setattr(Stage, "step", limited)
    monkeypatch.setattr(loop, "LEAST_LENGTH", 24)
    model = converted()
    before = state(model)
    expected = f"it fits with {flags} " if flags else "and so does every smaller setting"
    with pytest.raises(ValueError, match=f"memory: this run needs more than the memory of .*{expected}"):
        train(model, rows, recipe("sparse", **changes), out=tmp_path)
    assert same(state(model), before) and not any("lora" in name for name, _ in model.named_modules())


def test_what_the_kept_mass_takes_has_to_fit_too(rows, tmp_path, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(Stage, "kept_mass", fails)
    with pytest.raises(ValueError, match="every smaller setting"):
        train(converted(), rows, recipe(), out=tmp_path, dry_run=True)


def test_a_stage_that_runs_out_of_memory_while_it_is_made_leaves_the_model(rows, tmp_path, monkeypatch):
    def fails(self):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(Stage, "_optimizer", fails)
    model = converted()
    before, needs = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="and so does every smaller setting"):
        train(model, rows, recipe("sparse"), out=tmp_path)
    assert same(state(model), before) and {name: p.requires_grad for name, p in model.named_parameters()} == needs


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (torch.OutOfMemoryError("no more"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_whatever_finds_no_memory_is_refused_and_nothing_else(rows, tmp_path, monkeypatch, error, refused):
    def fails(*_):
        raise error

    monkeypatch.setattr(Stage, "step", fails)
    with pytest.raises(ValueError if refused else RuntimeError, match="every smaller setting" if refused else "mat1 and mat2"):
        train(converted(), rows, recipe(), out=tmp_path)


def test_a_stage_that_is_over_leaves_nothing_prepared(rows):
    accelerator = accelerate.Accelerator()
    batch = {name: value[None] for name, value in rows[0].items()}
    stage = Stage(converted(), recipe().resolved(chat=False, accelerated=False), accelerator, batch)
    assert accelerator._models
    stage.close()
    assert not accelerator._models and stage.run is None


def test_data_no_longer_than_the_budget_is_an_error_and_little_of_it_a_warning(rows, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"data: expected queries that see more than the budget of 96 keys, got none; .*--length.*--budget"):
        train(converted(budget=96), rows, recipe(), out=tmp_path)
    console = Console(record=True, file=io.StringIO(), width=200)
    train(converted(budget=80), rows, recipe(), out=tmp_path, dry_run=True, console=console)
    assert "Less than 25%" in console.export_text()


def test_runs_do_not_mix(rows, tmp_path, monkeypatch):
    train(converted(), rows, recipe(), out=tmp_path)
    with pytest.raises(ValueError, match="out: expected a new folder, or --resume"):
        train(converted(), rows, recipe(), out=tmp_path)
    with pytest.raises(ValueError, match=r"recipe.seed: expected 0, with which the run in .* began, got 1"):
        train(converted(), rows, recipe(seed=1), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"config.budget: expected 16, .* got 8"):
        train(converted(budget=8), rows, recipe(), out=tmp_path, resume=True)
    other = converted()
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=r"base.fingerprint: expected '\w+', with which the run in .* began, got '\w+'"):
        train(other, rows, recipe(), out=tmp_path, resume=True)
    texts = prepare(write_texts(tmp_path / "texts", documents=4), tokenizer(), LENGTH, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data.key: expected '\w+', .* got '\w+'"):
        train(converted(), texts, recipe(), out=tmp_path, resume=True)
    with monkeypatch.context() as patched:
        surroundings = loop._surroundings
        patched.setattr(loop, "_surroundings", lambda accelerator: surroundings(accelerator) | {"processes": 4})
        with pytest.raises(ValueError, match="processes: expected 1, .* got 4"):
            train(converted(), rows, recipe(), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"data: expected rows of recipe.length \(48\), got 96"):
        train(converted(), rows, recipe(length=48), out=tmp_path / "other")
    with pytest.raises(ValueError, match="at least one layer with an indexer"):
        train(converted(pattern="F"), rows, recipe(), out=tmp_path / "other")


def test_a_tracker_gets_the_numbers(rows, tmp_path):
    from accelerate.tracking import GeneralTracker

    class Notes(GeneralTracker):
        name, requires_logging_directory, tracker = "notes", False, None
        logged: list = []

        def store_init_configuration(self, values):
            self.logged.append(values)

        def log(self, values, step=None, **_):
            self.logged.append((step, sorted(values)))

    notes = Notes()
    with pytest.MonkeyPatch.context() as patched:
        import accelerate

        accelerator = accelerate.Accelerator
        patched.setattr(accelerate, "Accelerator", lambda log_with, **more: accelerator(log_with=notes, **more))
        train(converted(), rows, recipe("sparse", tracker="notes"), out=tmp_path)
    assert Notes.logged[0]["steps"] == 4
    assert Notes.logged[1:] == [(i, ["kept mass", "kl", "loss", "lr", "tokens/s"]) for i in range(1, 5)]


def test_indexers_that_serve_other_layers_are_trained(rows, tmp_path):
    model = converted(pattern="SR")
    report = train(model, rows, recipe(steps=60), out=tmp_path)
    assert sum(report["kl"][-10:]) < 0.8 * sum(report["kl"][:10])
    assert set(report["kl_by_layer"]) == {"0", "1"} and len([x for x in converted_layers(model).values() if hasattr(x, "indexer")]) == 1
    assert Path(tmp_path / "adapter" / "skim_model.safetensors").is_file() and report["kept_mass"]


def test_sums_on_a_gpu_are_made_in_one_order_while_training() -> None:
    with loop._repeatable(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    with loop._repeatable(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
