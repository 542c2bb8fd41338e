"""Training with the field's tools: several processes, mixed precision, LoRA, the Trainer; lengths on both sides of the budget."""

from __future__ import annotations

import distributed
import pytest
import torch
from tiny import attentions, build, convert, generate, gradients, largest_difference, logits, masked, masks, sparse, tokens
from torch import nn

import skim
from skim.huggingface.state import converted_layers

IDS = tokens(2, 30)


def test_two_processes_train_on_the_mean_of_their_gradients_and_select_the_same(tmp_path):
    torch.multiprocessing.spawn(distributed.run, (str(tmp_path),), nprocs=distributed.RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(distributed.RANKS)]
    for mode, form in distributed.CASES:
        singles = []
        for rank in range(distributed.RANKS):
            model = distributed.model_for(mode, form)
            distributed.step(model, distributed.IDS[2 * rank : 2 * rank + 2])
            singles.append(gradients(model))
        mean = {name: sum(single[name] for single in singles) / len(singles) for name in singles[0]}
        assert any(float(g.abs().max()) > 0 for name, g in mean.items() if ".indexer." in name)
        assert largest_difference(singles[0], singles[1]) > 1e-3
        for found in ranks:
            assert largest_difference(mean, found[mode, form]) < 1e-6
    here = distributed.step(distributed.model_for("sparse", "tied"), distributed.IDS).indices
    for found in ranks:
        assert torch.equal(found["selection"], here), "trap 9: processes that select apart drift apart"
        assert "DistributedDataParallel doesn't average" in found["no_grad"] and "freeze the base instead" in found["no_grad"]


@pytest.mark.parametrize("use_cache", [True, False])  # a cache happens to bring keys and values to one dtype
def test_trap_05_under_autocast_head_weights_stay_in_float32(use_cache):
    model, made = sparse("llama"), []
    model.model.layers[0].self_attn.indexer.register_forward_hook(lambda module, args, out: made.append(out))
    with torch.autocast("cpu", torch.bfloat16), skim.record(model) as r:
        out = model(IDS, labels=IDS, use_cache=use_cache)
    ((out.loss + r.alignment) * 8).backward()
    q, k, weights = made[0]
    assert (q.dtype, k.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert not torch.equal(weights, weights.bfloat16().float())
    found = gradients(model)
    assert all(g.isfinite().all() for g in found.values())
    plain = sparse("llama")
    with skim.record(plain) as reference:
        out = plain(IDS, labels=IDS)
        ((out.loss + reference.alignment) * 8).backward()
    assert abs(r.alignment.item() - reference.alignment.item()) < 0.05 * reference.alignment.item()
    for name, expected in gradients(plain).items():
        if ".indexer." in name:
            assert nn.functional.cosine_similarity(found[name].flatten(), expected.flatten(), dim=0) > 0.8, name


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_indexers_may_train_in_float32_under_a_bf16_base(mode):
    model = convert(build("llama").to(torch.bfloat16), mode=mode)
    for layer in converted_layers(model).values():
        layer.indexer.float()
    with skim.record(model) as r:
        out = model(IDS, labels=IDS)
        (out.loss + r.alignment).backward()
    for name, parameter in model.named_parameters():
        expected = torch.float32 if ".indexer." in name else torch.bfloat16
        assert parameter.dtype == parameter.grad.dtype == expected
        assert parameter.grad.isfinite().all()
    generate(model, IDS)


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("order", ["convert, then LoRA", "LoRA, then convert"])
def test_lora_on_all_linear_layers_leaves_indexers_alone_and_trains(order):
    if order == "convert, then LoRA":
        model = lora(sparse("llama"))
    else:
        model = convert(lora(build("llama")))
    for layer in converted_layers(model).values():
        assert not any("lora" in name for name, _ in layer.indexer.named_modules())
        assert type(layer.indexer.wk).__name__ == "Projection"
        assert "lora" in repr(layer.q_proj)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for ids in (IDS[:, :6], IDS, IDS[:, :9]):
        with skim.record(model) as r:
            out = model(ids, labels=ids)
            (out.loss + r.alignment).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_lora_with_checkpoints_gives_the_gradients_of_lora_without(reentrant):
    model = lora(sparse("llama")).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or ".indexer." in name)

    def step():
        with skim.record(model) as r:
            out = model(IDS, labels=IDS, use_cache=False)
        (out.loss + r.alignment).backward()
        return gradients(model)

    torch.manual_seed(0)
    expected = step()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert largest_difference(expected, step()) < 1e-7


def test_merged_lora_weights_read_as_the_adapted_ones():
    model = lora(sparse("llama")).eval()
    adapted = logits(model, IDS)
    merged = model.merge_and_unload()
    assert (logits(merged, IDS) - adapted).abs().max() < 1e-4
    skim.revert(merged)
    assert not any("indexer" in name for name in merged.state_dict())


@pytest.mark.parametrize("length", [5, 8, 9, 30])
def test_trap_18_lora_trains_on_lengths_on_both_sides_of_the_budget(length):
    """Without record: below the budget the dense attention runs, above it a selection, and no gradient asks for one."""
    model = lora(sparse("llama")).train()
    ids = IDS[:, :length]
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_trap_18_one_step_may_hold_lengths_on_both_sides_of_the_budget():
    model = sparse("llama")
    with skim.record(model) as r:
        for length in (5, 30, 8):
            out = model(IDS[:, :length], labels=IDS[:, :length])
            (out.loss + r.alignment).backward()
    found = gradients(model)
    assert all(g.isfinite().all() for g in found.values())
    assert all(float(g.abs().max()) > 0 for name, g in found.items() if ".indexer." in name)


def test_gradients_of_the_base_are_those_of_masked_eager_attention():
    model, untouched = sparse("llama"), build("llama", "eager")
    with skim.record(model, selections=True) as r:
        model(IDS, labels=IDS).loss.backward()
    found = gradients(model)
    with masked(untouched, masks(r.selections, 30)):
        untouched(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = gradients(untouched)
    assert largest_difference({name: found[name] for name in expected}, expected) < 1e-5


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, number):
        row = tokens(1, 30, seed=number)[0]
        return {"input_ids": row, "labels": row}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_trains_base_and_indexers_and_goes_on_from_its_checkpoint(tmp_path, checkpointing):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class Aligned(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **arguments):
            with skim.record(model) as r:
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **arguments)
            return (loss + r.alignment, outputs) if return_outputs else loss + r.alignment

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-2,
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    model = sparse("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Aligned(model, arguments, train_dataset=Texts()).train()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.dim() == 2)
    other = sparse("llama")
    arguments.max_steps = 3
    trainer = Aligned(other, arguments, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3
    assert attentions(other)[0].indexer.wk.weight.isfinite().all()
