"""Latents of MLA models in Hugging Face caches: one row a token for all heads, beside its index key.

A layer of transformers' own cache is exchanged for one of these before it holds anything. Latents are its keys
`[B, 1, S, C]`, its values have no channels, so that everything else done to a cache is done to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, StaticIndexedLayer, StaticLayer

from skim.huggingface.cache import indexed, layer_of

ROOM = 4  # a buffer that is full gets a quarter more, so that a token is copied some four times in all, however long the text


class DynamicLatentLayer(indexed(DynamicLayer)):  # type: ignore[misc]
    """Latents and index keys in buffers with room to grow: a new token doesn't copy all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None
        self.index_keys: Tensor | None
        self.room: dict[str, tuple[Tensor, Tensor]] = {}  # name -> buffer, and the part of it that is in use

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._grown("keys", self.keys, key_states, 2)
        self.values = self.keys[..., :0]
        return self.keys, self.values

    def append_index_keys(self, new: Tensor) -> Tensor:
        self.index_keys = self._grown("index_keys", self.index_keys, new, 1)
        return self.index_keys

    def _grown(self, name: str, held: Tensor | None, new: Tensor, axis: int) -> Tensor:
        """held and, behind it along `axis`, new."""
        if held is None or held.numel() == 0:
            return new
        if torch.compiler.is_compiling() or torch.is_grad_enabled():  # what is written in place has no gradient
            return torch.cat((held.to(new.device), new), dim=axis)
        length, added = held.shape[axis], new.shape[axis]
        buffer, used = self.room.get(name, (held, None))
        # Anything else that is held now came from somewhere else: reordered beams, a crop, another device.
        fits = used is held and buffer.shape[axis] >= length + added
        if not fits or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            shape = list(new.shape)
            shape[axis] = length + added + (length + added) // ROOM
            buffer = new.new_empty(shape)
            buffer.narrow(axis, 0, length).copy_(held)
        buffer.narrow(axis, length, added).copy_(new)
        whole = buffer.narrow(axis, 0, length + added)
        self.room[name] = buffer, whole
        return whole

    def offload(self) -> None:
        super().offload()
        self.room.clear()

    def reset(self) -> None:
        super().reset()
        self.room.clear()


class StaticLatentLayer(indexed(StaticLayer)):  # type: ignore[misc]
    """Latents and index keys in buffers of the cache's length."""


LAYERS: dict[type, type] = {DynamicLayer: DynamicLatentLayer, DynamicIndexedLayer: DynamicLatentLayer}
STATIC_LAYERS: dict[type, type] = {StaticLayer: StaticLatentLayer, StaticIndexedLayer: StaticLatentLayer}


def prepare_latents(cache: Cache, layer: int) -> None:
    """Make a layer of a cache one that holds latents.

    Raises:
        ValueError: it holds tokens already, or is of a kind that can't hold latents.
    """
    target = layer_of(cache, layer)
    if isinstance(target, (DynamicLatentLayer, StaticLatentLayer)):
        return
    if type(target) not in (*LAYERS, *STATIC_LAYERS):
        raise ValueError(f"past_key_values: {type(target).__name__} can't hold latents; use a dynamic or a static cache")
    if target.is_initialized and int(target.get_seq_length()) > 0:
        raise ValueError(f"past_key_values: layer {layer} holds {int(target.get_seq_length())} tokens from before skim.convert; fill the cache again")
    if type(target) in LAYERS:
        cache.layers[layer] = DynamicLatentLayer()
    elif cache.offloading:  # torch.compile dies over our wait for its copies
        raise ValueError("past_key_values: an offloaded static cache can't hold latents; use cache_implementation='offloaded'")
    else:
        cache.layers[layer] = StaticLatentLayer(target.max_cache_len)


def append_latents(cache: Cache, layer: int, new: Tensor) -> Tensor:
    """Append a layer's new latents `[B, T, C]`; everything held, `[B, S, C]`.

    Raises:
        ValueError: it holds latents in another form.
    """
    held = cache.layers[layer].keys
    if held is not None and held.numel() and held.dtype != new.dtype:
        raise ValueError(f"past_key_values: layer {layer} holds latents of {held.dtype}, got {new.dtype}; fill the cache again")
    keys, _ = cache.update(new[:, None], new[:, None, :, :0], layer)
    return keys[:, 0]
