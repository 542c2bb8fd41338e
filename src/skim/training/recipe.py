"""Recipe: every choice of a training run in one dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

STAGES = ("warmup", "sparse")
LORA_RANK = 16  # where full fine-tuning doesn't fit
# Median over SmolLM2-135M's layers of the root mean square of the indexers' inputs, times their width: there the rates
# below were measured.
MEASURED_RMS_TIMES_WIDTH = 0.345 * 576


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained. None stands for a default that depends on the stage, the model or the device.

    Attributes:
        stage: "warmup" trains the indexers on the dense attention of a frozen model, "sparse" goes on with the
            selection on.
        steps: optimizer steps; 1800 in the warm-up, 400 in the sparse stage.
        length: tokens of a row.
        batch: rows of a forward pass on each device.
        accumulate: forward passes of a step.
        lr: peak rate of the base model; 2e-5, or 2e-4 with LoRA.
        index_lr: peak rate of the indexers, for inputs as large and wide as those of SmolLM2-135M (see `index_rate`);
            1e-2 in the warm-up, 1e-3 in the sparse stage.
        lr_end: share of the peak that the cosine ends at.
        ramp: steps over which the rates rise linearly.
        clip: largest gradient norm, of the base and of the indexers apart; 0 doesn't clip. 0 in the warm-up, 1.0 in the
            sparse stage.
        loss: of the sparse stage: "lm" predicts the text, "distill" keeps to the dense model before training; distill
            for models with a chat template, lm for others.
        lora: rank of LoRA adapters of all linear layers of the base; None trains all of it.
        train_indexer: whether the sparse stage trains the indexers too.
        checkpointing: compute activations again in the backward pass instead of keeping them.
        precision: "bf16" or "fp32"; bf16 on accelerators, fp32 on a CPU.
        seed: of fresh weights, of dropout and of the order of the rows.
        save_every: steps between checkpoints; the last two are kept.
        tracker: name of an accelerate tracker ("tensorboard", "wandb", ...).
    """

    stage: str = "warmup"
    steps: int | None = None
    length: int = 8192
    batch: int = 1
    accumulate: int = 1
    lr: float | None = None
    index_lr: float | None = None
    lr_end: float = 0.1
    ramp: int = 20
    clip: float | None = None
    loss: str | None = None
    lora: int | None = None
    train_indexer: bool = True
    checkpointing: bool = False
    precision: str | None = None
    seed: int = 0
    save_every: int = 100
    tracker: str | None = None

    def __post_init__(self) -> None:
        self._expect("stage", self.stage in STAGES, f"one of {STAGES}")
        for name in ("length", "batch", "accumulate", "save_every"):
            self._expect(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, "an int >= 1")
        for name in ("steps", "lora"):
            value = getattr(self, name)
            self._expect(name, value is None or (_is_int(value) and value >= 1), "None or an int >= 1")
        for name in ("ramp", "seed"):
            self._expect(name, _is_int(getattr(self, name)) and getattr(self, name) >= 0, "an int >= 0")
        for name in ("lr", "index_lr"):
            value = getattr(self, name)
            self._expect(name, value is None or (_is_number(value) and 0 < value < math.inf), "None or a number > 0")
        self._expect("lr_end", _is_number(self.lr_end) and 0 <= self.lr_end <= 1, "a number from 0 to 1")
        self._expect("clip", self.clip is None or (_is_number(self.clip) and 0 <= self.clip < math.inf), "None or a number >= 0")
        self._expect("loss", self.loss in (None, "lm", "distill"), "None, 'lm' or 'distill'")
        self._expect("precision", self.precision in (None, "bf16", "fp32"), "None, 'bf16' or 'fp32'")
        for name in ("train_indexer", "checkpointing"):
            self._expect(name, isinstance(getattr(self, name), bool), "True or False")
        if self.stage == "warmup":  # the base is frozen there
            for name in ("loss", "lr", "lora"):
                self._expect(name, getattr(self, name) is None, "None in the warm-up, which trains the indexers alone")
            self._expect("train_indexer", self.train_indexer, "True in the warm-up")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def resolved(self, *, chat: bool, accelerated: bool) -> Recipe:
        """The recipe with every None replaced that stands for a default.

        Args:
            chat: whether the model has a chat template.
            accelerated: whether it runs on anything but a CPU.
        """
        warm = self.stage == "warmup"
        defaults: dict[str, Any] = {
            "steps": 1800 if warm else 400,
            "index_lr": 1e-2 if warm else 1e-3,
            "clip": 0.0 if warm else 1.0,
            "precision": "bf16" if accelerated else "fp32",
        }
        if not warm:
            defaults |= {"lr": 2e-5 if self.lora is None else 2e-4, "loss": "distill" if chat else "lm"}
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


def schedule(step: int, steps: int, ramp: int, end: float) -> float:
    """Share of the peak rate at a step, counted from 0: a linear ramp, then a cosine down to `end`."""
    if step < ramp:
        return (step + 1) / ramp
    progress = (step - ramp) / max(1, steps - ramp)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


def index_rate(peak: float, input_rms: float, width: int) -> float:
    """The peak rate of an indexer's matrices under inputs `[T, width]` of that root mean square.

    A step of Adam moves every weight by about the rate, so what a projection gives moves by rate * RMS * width. That
    product is kept at what it is where the rates were measured.
    """
    return peak * MEASURED_RMS_TIMES_WIDTH / (input_rms * width)


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
