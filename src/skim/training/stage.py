"""A model made ready for a stage of training: what is frozen, what the optimizer holds, what a step does."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skim.config import Config
from skim.huggingface import LayerInputs, record, use
from skim.huggingface.attention import by_indexer, everything
from skim.huggingface.state import converted_layers, decoder_of, indexed_layers, state_of
from skim.modules import IndexTensors, LightningIndexer
from skim.ops import attend, attend_dense
from skim.selection import Selection
from skim.training.data import IGNORED
from skim.training.graph import Captured, Tensors
from skim.training.recipe import Recipe, index_rate, schedule
from skim.training.variants import Variants

BETAS = (0.9, 0.95)
LOGITS_CHUNK = 1024  # tokens whose logits are float32 at a time
MASS_STRIDE = 4  # every fourth query is enough for a mean

Batch = dict[str, Tensor]
"""`input_ids`, `position_ids` and `labels`, `[B, T]` on the model's device."""


@dataclass
class Metrics:
    """What a step tells, detached and still on the device, so that nobody waits for it.

    Attributes:
        loss: the language model's loss, or its divergence from the dense model; None in the warm-up.
        kl: mean alignment loss of the layers; None where the indexers are frozen.
        layers: layer -> its alignment loss.
        variants: mean alignment loss of each further configuration.
    """

    loss: Tensor | None
    kl: Tensor | None
    layers: dict[int, Tensor]
    variants: dict[str, Tensor]


class Stage:
    """A converted model in training. `close` or `finish` gives it back as it was.

    Args:
        model: a converted model on its device.
        recipe: resolved.
        accelerator: accelerate's.
        first: a batch that the inputs of the indexers are measured on.
        variants: further configurations that the warm-up trains, by name.

    Raises:
        ValueError: the model was not converted or has no indexer.
    """

    def __init__(self, model: Any, recipe: Recipe, accelerator: Any, first: Batch, variants: dict[str, Config] | None = None) -> None:
        state_of(model)
        self.model, self.recipe, self.accelerator = model, recipe, accelerator
        layers = indexed_layers(model).values()
        if not layers:
            raise ValueError("model: expected at least one layer with an indexer (pattern letter 'S'), got none")
        self.warm = recipe.stage == "warmup"
        self.indexers: list[LightningIndexer] = [layer.indexer for layer in layers]
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.training, self.mode = model.training, state_of(model).mode
        self.run: Any = None
        self.variants: Variants | None = None
        # Checkpoints note the state of random numbers down on the host, and processes wait for each other there.
        self.capturable = accelerator.device.type == "cuda" and accelerator.num_processes == 1 and not recipe.checkpointing
        self.captured: Captured | None = None
        self.compiled = False
        try:
            torch.manual_seed(recipe.seed)
            self.rms = input_rms(model, first)
            if self.warm:
                initialise(self.rms)
            self.variants = Variants(model, variants, recipe.seed, self.rms) if variants else None
            self.teacher = self._teacher() if recipe.loss == "distill" and recipe.lora is None else None
            self._freeze()
            self.run = accelerator.prepare_model(decoder_of(model) if self.warm else self.model)
            self.optimizer = self._optimizer()
            if self.capturable:
                for group in self.optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = torch.zeros_like(parameter)
        except BaseException:  # out of memory, say
            self.close()
            raise

    def _teacher(self) -> Any:
        """A frozen copy of the model that reads densely."""
        teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        use(teacher, selector=everything)
        return teacher

    def _freeze(self) -> None:
        recipe, model = self.recipe, self.model
        use(model, mode="dense" if self.warm else "sparse")
        if recipe.lora is not None:
            peft = _peft()
            config = peft.LoraConfig(r=recipe.lora, lora_alpha=2 * recipe.lora, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = model = peft.get_peft_model(model, config)
        elif self.warm:
            model.requires_grad_(False)
        elif recipe.precision == "bf16":  # small steps are lost on bf16 weights; autocast computes in bf16
            for parameter in model.parameters():  # not model.float(): buffers stay what they are
                parameter.data = parameter.data.float()
        for layer in converted_layers(model).values():
            if hasattr(layer, "indexer"):  # those that the pattern in force leaves out learn nothing
                layer.indexer.requires_grad_(False)
        for indexer in self.indexers:
            indexer.float().requires_grad_(self.warm or recipe.train_indexer)
        model.train(not self.warm)
        if recipe.checkpointing and not self.warm:  # the warm-up keeps no activations
            _checkpointing(model, True)

    def _optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        index = [(name, p) for indexer in self.indexers for name, p in indexer.named_parameters() if p.requires_grad]
        own = {id(p) for _, p in index}
        self.index = [p for _, p in index]
        self.others = {name: list(self.variants.parameters(name).items()) for name in self.variants.indexers} if self.variants else {}
        self.base = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        assert recipe.index_lr is not None
        width = self.indexers[0].wk.weight.shape[1]
        matrices = index_rate(recipe.index_lr, median(self.rms.values()), width)
        groups: list[dict[str, Any]] = [{"params": self.base, "peak": recipe.lr}]
        for named in (index, *self.others.values()):
            groups.append({"params": [p for name, p in named if "k_norm" not in name], "peak": matrices})
            groups.append({"params": [p for name, p in named if "k_norm" in name], "peak": recipe.index_lr})
        fused = self.accelerator.device.type == "cuda" or None  # the indexers are many small tensors
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS, weight_decay=0.0, fused=fused)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return own | {f"{variant}.{name}": p for variant, named in self.others.items() for name, p in named}

    def step(self, number: int, batches: list[Batch]) -> Metrics:
        """One step of the optimizer on the mean of some batches."""
        recipe = self.recipe
        # Random numbers depend on nothing but these, so a run that goes on needs no state of theirs.
        torch.manual_seed((recipe.seed * 1_000_003 + number) * 1_009 + self.accelerator.process_index)
        tokens = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]).sum().float()
        if not self.warm:
            tokens = self.accelerator.reduce(tokens, "mean").clamp(min=1 / self.accelerator.num_processes)
        found = list[Tensors]()
        for i, batch in enumerate(batches):
            with contextlib.nullcontext() if i == len(batches) - 1 else self.accelerator.no_sync(self.run):
                found.append(self._share({**batch, "tokens": tokens}, len(batches)))
        others = [[p for _, p in named] for named in self.others.values()]
        if self.accelerator.num_processes > 1:
            for parameter in itertools.chain(*others):
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        if recipe.clip:
            for parameters in (self.base, self.index, *others):
                if parameters:
                    nn.utils.clip_grad_norm_(parameters, recipe.clip)
        assert recipe.steps is not None
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(number, recipe.steps, recipe.ramp, recipe.lr_end)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.capturable)
        self.compiled = True
        total = {name: self.accelerator.reduce(torch.stack([of[name] for of in found]).sum(0), "mean") for name in found[0]}
        loss, shares = total.pop("loss", None), total.pop("layers", None)
        if shares is None:
            return Metrics(loss, None, {}, {})
        variants = {name: total[f"variant {name}"] for name in self.others}
        return Metrics(loss, shares.sum() / len(self.indexers), dict(zip(self.aligned, shares)), variants)

    def _share(self, inputs: Tensors, batches: int) -> Tensors:
        """`_loss`, which is captured once its kernels are compiled."""
        work = partial(self._loss, batches=batches)
        if self.capturable and self.captured is None and self.compiled:
            try:
                self.captured = Captured(work, inputs)
            except RuntimeError as error:  # a mixture of experts asks on the host who goes where, say
                self.capturable = False
                warnings.warn(f"CUDA can't capture a training step of {type(self.model).__name__}, so it takes longer: {error}", stacklevel=2)
        return work(inputs) if self.captured is None else self.captured(inputs)

    def _loss(self, batch: Tensors, batches: int) -> Tensors:
        """Run a batch forwards and backwards.

        Args:
            batch: a Batch and `tokens`, how many labels of the step count.
            batches: of the step.

        Returns:
            What the batch adds to the step's `loss` (not in the warm-up), to the alignment losses of the `layers` in
            `aligned`, and to the mean alignment loss of each `variant NAME`.
        """
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        teacher = self._teacher_logits(inputs)
        aligning = self.warm or self.recipe.train_indexer
        selector = state_of(self.model).selector or by_indexer
        reading: Any = record(self.model) if aligning else use(self.model, selector=selector)  # neither lets a mask be made
        share = 1 / (len(self.indexers) * batches)
        with self._autocast(), reading as r, self.variants.learning(share) if self.variants else contextlib.nullcontext():
            out = self.run(**inputs, use_cache=False)
        alignment = r.alignment * share if aligning else 0.0
        loss = None if self.warm else token_loss(out.logits, batch["labels"], teacher) / batch["tokens"]
        self.accelerator.backward(alignment if loss is None else loss + alignment)
        found = {} if loss is None else {"loss": loss.detach()}
        if aligning:
            self.aligned = tuple(r.alignments)
            found["layers"] = torch.stack(list(r.alignments.values())) / batches
        return found | {f"variant {name}": self.variants.take_loss(name) / batches for name in self.others if self.variants}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16, also under a bf16 base: the indexers' weights are float32."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    @torch.no_grad()
    def _teacher_logits(self, inputs: Batch) -> Tensor | None:
        if self.recipe.loss != "distill":
            return None
        with self._autocast():
            if self.teacher is not None:
                return self.teacher(**inputs, use_cache=False).logits
            self.model.eval()
            with self.model.disable_adapter(), use(self.model, selector=everything):
                logits = self.model(**inputs, use_cache=False).logits
            self.model.train()
            return logits

    @torch.no_grad()
    def kept_mass(self, batch: Batch) -> float | None:
        """Share of the dense attention that the selections keep, over the queries that see more than the budget."""
        training = self.model.training
        self.model.eval()
        state = state_of(self.model)
        mass = _Mass(state.config.budget, state.letters)
        with self._autocast(), use(self.model, selector=mass):
            decoder_of(self.model)(**{name: batch[name] for name in ("input_ids", "position_ids")}, use_cache=False)
        self.model.train(training)
        return mass.mean()

    def settle(self) -> None:
        """Bring the trained weights to the dtypes that they had before."""
        self.captured = None
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            dtype = self.dtypes.get(name if self.recipe.lora is None else name.removeprefix("base_model.model."))
            if dtype is not None:
                parameter.data = parameter.data.to(dtype)
        if self.variants:
            self.variants.settle(self.indexers[0].wk.weight.dtype)

    def close(self) -> Any:
        """Give the model back without LoRA adapters, its settings as they were; the weights stay as they are."""
        self.settle()
        return self._restore(self.model.unload() if hasattr(self.model, "unload") else self.model, self.mode)

    def finish(self) -> Any:
        """Give the trained model back, in sparse mode; LoRA adapters become part of its weights."""
        self.settle()
        return self._restore(self.model.merge_and_unload() if hasattr(self.model, "merge_and_unload") else self.model, "sparse")

    def _restore(self, model: Any, mode: str) -> Any:
        self.model, self.run = model, None
        self.accelerator.free_memory()  # it holds on to what it prepared; under DistributedDataParallel that would go on averaging
        if self.recipe.checkpointing and not self.warm:
            _checkpointing(model, False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad[name])
        model.train(self.training)
        use(model, mode=mode)
        return model


def _checkpointing(model: Any, on: bool) -> None:
    verb = "enable" if on else "disable"
    change = getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}")  # the name before 5.23
    change(*([{"use_reentrant": False}] if on else []))


def audit(stage: Stage, digest: str) -> None:
    """That a warm-up left the base alone.

    Raises:
        RuntimeError: a weight of the base changed, has a gradient or is known to the optimizer; by name.
    """
    held = {id(p) for group in stage.optimizer.param_groups for p in group["params"]} | {id(p) for p in stage.optimizer.state}
    for name, parameter in _base(stage.model):
        if parameter.grad is not None or parameter.requires_grad or id(parameter) in held:
            raise RuntimeError(f"{name}: expected a frozen weight without gradient or optimizer state after the warm-up")
    if base_digest(stage.model) != digest:
        raise RuntimeError("model: expected the base bit for bit as it was before the warm-up, got other weights")


def base_digest(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers that are saved and belong to no indexer; others (rotary tables) may follow the length."""
    digest = hashlib.sha256()
    for name, value in _base(model):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _base(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    for named in (model.named_parameters(), model.named_buffers()):
        yield from ((name, value) for name, value in named if ".indexer." not in name and name in saved)


def token_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Tensor:
    """Sum over the labels that count of the cross-entropy, or of KL(teacher ‖ model).

    Args:
        logits: `[B, T, vocabulary]`; those at t speak of the label at t + 1.
        labels: int64 `[B, T]`, -100 where nothing counts.
        teacher: logits `[B, T, vocabulary]` to keep to.
    """
    total = torch.zeros((), device=logits.device)
    for begin in range(0, labels.shape[1] - 1, LOGITS_CHUNK):
        end = min(begin + LOGITS_CHUNK, labels.shape[1] - 1)
        part = None if teacher is None else teacher[:, begin:end]
        # A chunk is made float32 again in the backward pass, instead of keeping all of them.
        rows = logits[:, begin:end], labels[:, begin + 1 : end + 1], part
        total = total + checkpoint(_part_loss, *rows, use_reentrant=False, preserve_rng_state=False)
    return total


def _part_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        if teacher is None:
            return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        ours, theirs = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).masked_fill(labels == IGNORED, 0.0).sum()


@torch.no_grad()
def input_rms(model: Any, batch: Batch) -> dict[nn.Module, float]:
    """Attention layer with an indexer in use -> root mean square of what it is fed."""
    rms: dict[nn.Module, Tensor] = {}

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rms[module] = hidden.float().square().mean().sqrt()

    hooks = [layer.register_forward_pre_hook(measure, with_kwargs=True) for layer in indexed_layers(model).values()]
    training = model.training
    model.eval()
    with use(model, selector=everything):
        decoder_of(model)(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return {layer: float(value) for layer, value in rms.items()}


def initialise(rms: dict[nn.Module, float]) -> None:
    """Fresh indexers, each scaled to what its layer's attention is fed."""
    for layer, value in rms.items():
        layer.indexer.reset_parameters(value)  # type: ignore[union-attr, operator]


class _Mass:
    """A selector that reads everything and notes how much of the attention's mass the indexers would keep."""

    def __init__(self, budget: int, letters: dict[int, str]) -> None:
        self.budget, self.letters, self.kept = budget, letters, list[Tensor]()
        self.last: Selection | None = None

    def __call__(self, inputs: LayerInputs, start: Tensor, end: Tensor) -> None:
        rows = slice(None, None, MASS_STRIDE)
        q, start, end = inputs.q[:, rows].contiguous(), start[:, rows].contiguous(), end[:, rows].contiguous()
        long = end - start > self.budget
        if not bool(long.any()):
            return
        index = inputs.index
        if index is not None and self.letters[inputs.layer] == "S":  # an R layer reads what the last S layer selected
            part = IndexTensors(index.q[:, rows].contiguous(), index.k, index.weights[:, rows].contiguous())
            self.last = by_indexer(LayerInputs(inputs.layer, q, inputs.k, inputs.scale, inputs.config, inputs.indexer, part), start, end)
        assert self.last is not None
        options: dict[str, Any] = {"scale": inputs.scale, "workspace_mb": inputs.config.workspace_mb, "v_channels": q.shape[-1]}
        kept = attend(q, inputs.k, selection=self.last, **options)[1] - attend_dense(q, inputs.k, start=start, end=end, **options)[1]
        self.kept.append(kept.exp().mean(-1)[long].mean())

    def mean(self) -> float | None:
        return float(torch.stack(self.kept).mean()) if self.kept else None


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("peft is needed for LoRA: pip install 'skim-attention[train]'") from error
    return peft
