"""Recipes, schedules and verdicts."""

import math

import pytest
import torch
from tiny_model import converted, text

import skim
from skim.training import Recipe, stage
from skim.training.recipe import index_rate, schedule
from skim.training.stage import IGNORED, initialise, input_rms, token_loss
from skim.training.verdict import fifths, verdict


def test_defaults_depend_on_stage_model_and_device():
    warm = Recipe().resolved(chat=True, accelerated=True)
    assert (warm.steps, warm.index_lr, warm.clip, warm.loss, warm.precision) == (1800, 1e-2, 0.0, None, "bf16")
    sparse = Recipe("sparse").resolved(chat=True, accelerated=False)
    assert (sparse.steps, sparse.lr, sparse.index_lr, sparse.clip, sparse.loss, sparse.precision) == (400, 2e-5, 1e-3, 1.0, "distill", "fp32")
    assert Recipe("sparse", lora=8).resolved(chat=False, accelerated=True).lr == 2e-4
    assert Recipe("sparse").resolved(chat=False, accelerated=True).loss == "lm"
    assert Recipe("sparse", lr=1.0, loss="lm", clip=0.0, steps=3).resolved(chat=True, accelerated=True).lr == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "dense"}, r"stage: expected one of \('warmup', 'sparse'\), got 'dense'"),
        ({"steps": 0}, "steps: expected None or an int >= 1, got 0"),
        ({"length": 1.5}, "length: expected an int >= 1, got 1.5"),
        ({"batch": True}, "batch: expected an int >= 1, got True"),
        ({"index_lr": math.inf}, "index_lr: expected None or a number > 0, got inf"),
        ({"lr_end": 2}, "lr_end: expected a number from 0 to 1, got 2"),
        ({"clip": -1}, "clip: expected None or a number >= 0, got -1"),
        ({"precision": "fp16"}, "precision: expected None, 'bf16' or 'fp32', got 'fp16'"),
        ({"loss": "lm"}, "loss: expected None in the warm-up"),
        ({"lora": 4}, "lora: expected None in the warm-up"),
        ({"train_indexer": False}, "train_indexer: expected True in the warm-up"),
        ({"checkpointing": 1}, "checkpointing: expected True or False, got 1"),
    ],
)
def test_what_a_recipe_may_not_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_the_rate_rises_and_falls_as_a_cosine():
    rates = [schedule(step, 100, 10, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=0.01)


def test_index_queries_begin_and_move_alike_whatever_the_width_and_the_scale_of_the_inputs():
    """One step of Adam on inputs that have a direction in common changes a projection as much, whatever their scale and width."""
    moved = []
    for width, rms in ((64, 1.0), (256, 1.0), (64, 0.1), (256, 3.0)):
        torch.manual_seed(0)
        x = torch.randn(512, 1) * torch.randn(width).sign() * rms
        weight = torch.nn.Parameter(torch.randn(16, width) / (rms * width**0.5))
        before = (x @ weight.T).detach()
        assert 0.5 < before.std() < 2
        optimizer = torch.optim.Adam([weight], lr=index_rate(1e-4, rms, width))
        (x @ weight.T).square().sum().backward()
        optimizer.step()
        moved.append(float(((x @ weight.T).detach() - before).abs().mean()))
    assert max(moved) < 1.05 * min(moved)


def test_fresh_indexers_have_scores_of_order_one():
    model = converted()
    rms = input_rms(model, {"input_ids": text(96)})
    assert len(rms) == 2
    initialise(rms)
    made = []
    for layer in rms:
        layer.indexer.register_forward_hook(lambda module, args, out: made.append(out))
    with skim.use(model, mode="sparse"):
        model(text(96))
    for index in made:
        assert 0.5 < float(index.q.std()) < 2 and 0.5 < float(index.weights.std()) < 2


def test_losses_count_the_labels_alone_and_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 9, 7, requires_grad=True), torch.randn(2, 9, 7)
    labels = torch.randint(0, 7, (2, 9))
    labels[0, :4] = IGNORED
    counted = labels[:, 1:] != IGNORED
    ours = logits[:, :-1].log_softmax(-1)
    lm = -ours.gather(2, labels[:, 1:, None].clamp(min=0))[..., 0][counted].sum()
    theirs = teacher[:, :-1].log_softmax(-1)
    distill = (theirs.exp() * (theirs - ours)).sum(-1)[counted].sum()
    for expected, more in ((lm, ()), (distill, (teacher,))):
        (grad,) = torch.autograd.grad(expected, logits, retain_graph=True)
        for chunk in (1, 3, 8, 100):
            monkeypatch.setattr(stage, "LOGITS_CHUNK", chunk)
            found = token_loss(logits, labels, *more)
            assert float((found - expected).detach().abs()) < 1e-5
            assert (torch.autograd.grad(found, logits)[0] - grad).abs().max() < 1e-6


def falling(start, end, count=100):
    return [end + (start - end) * 0.85**i for i in range(count)]


@pytest.mark.parametrize(
    ("curve", "warmup", "expected"),
    [
        (falling(4.0, 0.1), True, "converged"),
        ([4.0 / (i + 1) ** 0.7 for i in range(100)], True, "train longer"),
        ([4.4 - 0.01 * i for i in range(100)], True, "raise lr"),
        ([4.0] * 10 + [0.1] * 60 + [0.3] * 30, True, "lower lr"),
        ([0.06] * 100, False, "converged"),
        ([0.06 + 0.001 * i for i in range(100)], False, "lower lr"),
        ([0.1, math.nan, 0.1], False, "lower lr"),
        ([0.1] * 9, False, "too short to tell"),
    ],
)
def test_the_curve_says_what_to_do(curve, warmup, expected):
    assert verdict(curve, warmup) == expected


def test_fifths_take_every_step_once():
    assert fifths(list(range(10))) == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert len(fifths([1.0])) == 5
