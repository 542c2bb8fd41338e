"""Loops that are not ours: the Trainer of the example does what a loop by hand does; selections are read again."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from tiny_model import converted, text

import skim

ROWS = [text(48, seed) for seed in range(4)]


def model():
    made = converted()
    skim.use(made, mode="sparse")
    return made.train()


def by_hand(trained, rows):
    """The weights after one step of gradient descent on the mean of the rows' losses."""
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for row in rows:
        with skim.record(trained) as r:
            out = trained(row, labels=row, use_cache=False)
            ((out.loss + r.alignment) / len(rows)).backward()
    optimizer.step()
    return {name: p.detach().clone() for name, p in trained.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_the_trainer_of_the_example_takes_the_step_of_a_loop_by_hand(tmp_path, accumulate, checkpointing):
    from transformers import TrainingArguments

    example = Path(__file__).parent.parent.parent / "examples" / "trainer.py"
    aligned = runpy.run_path(str(example))["AlignedTrainer"]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=checkpointing,
    )
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    data = [{"input_ids": row[0], "labels": row[0]} for row in ROWS]
    aligned(trained, arguments, train_dataset=data, optimizers=(optimizer, constant)).train()
    expected = by_hand(model(), ROWS)
    for name, parameter in trained.named_parameters():
        assert (parameter - expected[name]).abs().max() < 1e-5, name


def test_selections_are_read_again_under_other_weights():
    one = model().eval()
    with skim.record(one, selections=True) as r, torch.no_grad():
        expected = one(ROWS[0]).logits
    other = copy.deepcopy(one)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    with skim.use(one, replay=r.selections), torch.no_grad():
        assert torch.equal(one(ROWS[0]).logits, expected)
    with skim.record(other, selections=True) as own, torch.no_grad():
        other(ROWS[0])
    assert any(not torch.equal(own.selections[i].indices, r.selections[i].indices) for i in r.selections)
    with skim.use(other, replay=r.selections), skim.record(other, selections=True) as again:
        out = other(ROWS[0], labels=ROWS[0], use_cache=False)
        (out.loss + again.alignment).backward()
    assert all(torch.equal(again.selections[i].indices, r.selections[i].indices) for i in r.selections)
    assert all(float(p.grad.abs().max()) > 0 for p in other.parameters())


def test_a_replay_that_does_not_fit_is_named():
    one = model().eval()
    with skim.record(one, selections=True) as r, torch.no_grad():
        one(ROWS[0])
    with skim.use(one, replay={0: r.selections[0]}), pytest.raises(ValueError, match=r"replay: expected a selection for layer 1, got them for \[0\]"):
        one(ROWS[0])
    with (
        skim.use(one, replay=r.selections),
        pytest.raises(ValueError, match=r"replay: expected selections of \(1, 30\) queries, got \(1, 48\) in layer 0"),
    ):
        one(ROWS[0][:, :30])
    with pytest.raises(ValueError, match="replay: expected no selector beside it"):
        skim.use(one, replay=r.selections, selector=lambda *_: None)
