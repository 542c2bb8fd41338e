"""Warm-up: the base model frozen, the indexers learn its attention (dense alignment, DeepSeek-V3.2-Exp section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skim.huggingface import record, use
from skim.huggingface.state import converted_layers, state_of
from skim.training.recipe import schedule
from skim.training.stage import initialise, input_rms


@dataclass(frozen=True)
class Warmup:
    """The recipe.

    Attributes:
        steps: optimizer steps, one window each.
        lr: peak learning rate of AdamW (betas 0.9 and 0.95, no weight decay).
        lr_end: share of the peak that the cosine ends at.
        ramp: steps over which the rate rises linearly.
        seed: of the initial weights and of the order of the windows.
    """

    steps: int = 900
    lr: float = 1e-2
    lr_end: float = 0.1
    ramp: int = 20
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at a step, counted from 0."""
        return self.lr * schedule(step, self.steps, self.ramp, self.lr_end)


def warmup(model: Any, windows: Sequence[Any], recipe: Warmup | None = None, report: Callable[[int, float], None] | None = None) -> list[float]:
    """Train the indexers of a converted model on its own dense attention; the base gets no gradient and stays as it is.

    A layer's gradients are made in its forward, so neither T x T numbers nor the layers' activations are held. The
    indexers train in float32 whatever the model's dtype and go back to it at the end. Then the model reads sparsely.

    Args:
        model: a converted model.
        windows: token windows, each a sequence of T token numbers; drawn in a seeded order, again when all were seen.
        recipe: None is `Warmup()`.
        report: called with (step, loss) after each step; loss is the layers' mean KL.

    Returns:
        The loss of each step.

    Raises:
        ValueError: the model was not converted, has no layer with an indexer, or no window is given.
    """
    if len(windows) == 0:
        raise ValueError("windows: expected at least one window of tokens, got none")
    recipe = recipe or Warmup()
    state_of(model)
    indexers = [layer.indexer for layer in converted_layers(model).values() if hasattr(layer, "indexer")]
    if not indexers:
        raise ValueError("model: expected at least one layer with an indexer (pattern letter 'S'), got none")
    torch.manual_seed(recipe.seed)
    dtype, trainable = indexers[0].wk.weight.dtype, {name: p.requires_grad for name, p in model.named_parameters()}
    training = model.training
    model.eval().requires_grad_(False)
    order = _order(len(windows), recipe.seed)
    device = indexers[0].wk.weight.device
    use(model, mode="dense")
    initialise(input_rms(model, {"input_ids": _window(windows[next(order)], device)}))
    parameters = [p.requires_grad_() for indexer in indexers for p in indexer.float().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        with record(model) as r, torch.no_grad():
            model.base_model(_window(windows[next(order)], device), use_cache=False)
        (r.alignment / len(indexers)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(r.alignment.detach()) / len(indexers))
        if report is not None:
            report(step, losses[-1])
    for indexer in indexers:
        indexer.to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    model.train(training)
    use(model, mode="sparse")
    return losses


def _window(window: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(window, dtype=torch.long, device=device)[None]


def _order(count: int, seed: int) -> Iterator[int]:
    """Window numbers without end, every window once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
