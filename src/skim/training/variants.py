"""Further configurations of indexers, trained in the warm-up on the forward passes of the model's own."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from skim.config import Config
from skim.huggingface import LayerInputs, use
from skim.huggingface.convert import make_indexer
from skim.huggingface.state import decoder_of, indexed_layers, source_of, state_of
from skim.modules import LightningIndexer
from skim.ops import align, attend_dense

FIELDS = ("index_n_heads", "index_head_dim", "rope_dim", "rope_layout")
VALUES = 16  # channels of an attention that only its lse is wanted of


def configurations(config: Config, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Config]:
    """`config` with the changes of each variant; a `rope_dim` that isn't given follows the head's size.

    Raises:
        ValueError: a name that can't be a folder's, or a field that doesn't belong to indexers alone.
    """
    for name, changes in variants.items():
        if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or not name[0].isalnum():
            raise ValueError(f"variants: expected names of letters, digits, '-', '_' and '.', got {name!r}")
        wrong = sorted(set(changes) - set(FIELDS))
        if wrong:
            raise ValueError(f"variants: expected fields among {', '.join(FIELDS)}, got {wrong[0]!r} in {name!r}")
    return {name: replace(config, **{"rope_dim": None, **changes}) for name, changes in variants.items()}


class Variants:
    """Indexers of several configurations beside a model's own.

    It is a selector that reads every key: on the way each layer's attention teaches the variants' indexers, one after
    the other, so that only parameters and their gradients are held.

    Args:
        model: a converted model.
        configs: name -> Config, with the model's pattern.
        seed: of fresh weights, the same for each variant.
        rms: attention layer -> root mean square of what it is fed.

    Raises:
        ValueError: a model with latent attention, whose query latents only its own indexers get.
    """

    def __init__(self, model: nn.Module, configs: dict[str, Config], seed: int, rms: dict[nn.Module, float]) -> None:
        if getattr(decoder_of(model).config, "kv_lora_rank", None) is not None:
            raise ValueError("variants: expected a model with keys and values for each head, got one with latent attention (MLA)")
        self.model, self.letters = model, state_of(model).letters
        self.served = Counter(source_of(layer, self.letters) for layer, letter in self.letters.items() if letter != "F")
        self.indexers: dict[str, dict[int, LightningIndexer]] = {}
        self.configs: dict[str, Config] = {}
        for name, config in configs.items():
            made = {number: make_indexer(layer, decoder_of(model), config) for number, layer in indexed_layers(model).items()}
            torch.manual_seed(seed)
            for number, layer in indexed_layers(model).items():
                made[number].reset_parameters(rms[layer])
                made[number].float().requires_grad_()
            self.indexers[name] = made
            self.configs[name] = replace(config, rope_dim=next(iter(made.values())).rope_dim)
        self.losses: dict[str, list[Tensor]] = {}

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """A variant's parameters by name."""
        return {f"{number}.{key}": p for number, indexer in self.indexers[name].items() for key, p in indexer.named_parameters()}

    @contextlib.contextmanager
    def learning(self, factor: float) -> Iterator[None]:
        """Within this the model's forward passes add to the variants' gradients, each loss times `factor`, and to `losses`, empty before."""
        self.factor, self.losses = factor, {name: [] for name in self.indexers}  # a capture that failed may have left some
        hooks = [layer.register_forward_pre_hook(self._see, with_kwargs=True) for layer in indexed_layers(self.model).values()]
        try:
            with use(self.model, selector=self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.inputs = hidden.detach(), kwargs["position_embeddings"]

    def __call__(self, inputs: LayerInputs, start: Tensor, end: Tensor) -> None:
        options: dict[str, Any] = {"start": start, "end": end, "scale": inputs.scale, "workspace_mb": inputs.config.workspace_mb}
        q, k = inputs.q.detach(), inputs.k.detach()
        _, lse = attend_dense(q, k, v_channels=min(VALUES, q.shape[-1]), **options)
        source = source_of(inputs.layer, self.letters)
        for name, indexers in self.indexers.items():
            with torch.enable_grad():
                index = indexers[source](*self.inputs)
                loss = align(q, k, index.q, index.k, index.weights, lse=lse, **options) / self.served[source]
                (loss * self.factor).backward()  # type: ignore[no-untyped-call]
            self.losses[name].append(loss.detach())

    def take_loss(self, name: str) -> Tensor:
        """Mean loss of a variant's indexers over the forward passes of the last `learning`."""
        losses = self.losses.pop(name)
        layers = sum(self.served.values())
        return torch.stack(losses).sum() * layers / (len(losses) * len(self.indexers[name]))

    def settle(self, dtype: torch.dtype) -> None:
        """Bring the indexers to that dtype; they learn no more."""
        for indexers in self.indexers.values():
            for indexer in indexers.values():
                indexer.requires_grad_(False).to(dtype)

    @contextlib.contextmanager
    def installed(self, name: str) -> Iterator[None]:
        """Within this the model has a variant's indexers and Config in place of its own."""
        state, layers = state_of(self.model), indexed_layers(self.model)
        own, config = {number: layer.indexer for number, layer in layers.items()}, state.config
        self._install(self.indexers[name], self.configs[name])
        try:
            yield
        finally:
            self._install(own, config)

    def _install(self, indexers: dict[int, LightningIndexer], config: Config) -> None:
        for number, layer in indexed_layers(self.model).items():
            layer.indexer = indexers[number]
        state_of(self.model).config = config
