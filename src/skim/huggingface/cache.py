"""Index keys in Hugging Face caches: a cache layer is upgraded in place to a twin that holds them beside keys and values."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as remember
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer


@remember
def indexed(layer_class: Any) -> Any:
    """The class of `layer_class`'s twin, whose index keys `[B, S, C]` follow everything done to the layer's keys.

    A plain subclass: an instance can only change to a class of the same layout.
    """

    class Indexed(layer_class):  # type: ignore[misc]
        index_keys: Tensor | None = None

        def append_index_keys(self, new: Tensor) -> Tensor:
            if isinstance(self, StaticLayer):
                return self._write_index_keys(new)
            self.index_keys = new if self.index_keys is None else torch.cat((self.index_keys.to(new.device), new), dim=1)
            return self.index_keys

        def _write_index_keys(self, new: Tensor) -> Tensor:
            if self.index_keys is None:
                self.index_keys = new.new_zeros(new.shape[0], self.max_cache_len, new.shape[2])
                if not torch.compiler.is_compiling():
                    torch._dynamo.mark_static_address(self.index_keys)
            position = torch.arange(new.shape[1], device=new.device) + self.cumulative_length.to(new.device)
            self.index_keys.index_copy_(1, position, new)
            return self.index_keys

        def _change(self, change: Callable[[Tensor], Tensor]) -> None:
            if self.index_keys is not None:
                self.index_keys = change(self.index_keys)

        def offload(self) -> None:
            super().offload()
            self._change(lambda keys: keys.to("cpu", non_blocking=True))

        def prefetch(self) -> None:
            if self.index_keys is None or torch.device(self.device).type != "cuda":
                super().prefetch()
                self._change(lambda keys: keys.to(self.device, non_blocking=True))
                return
            # It has a stream of its own, while `offload` may still be copying on the default one, which will read what comes back.
            default = torch.cuda.default_stream(self.device)
            torch.cuda.current_stream(self.device).wait_stream(default)
            super().prefetch()
            self.index_keys = self.index_keys.to(self.device, non_blocking=True)
            for fetched in (self.keys, self.values, self.index_keys):
                fetched.record_stream(default)

        def reset(self) -> None:
            super().reset()
            self._change(Tensor.zero_)
            if self.keys is None:  # transformers before 5.18 keeps them, zeroed
                self.index_keys = None

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._change(lambda keys: keys.index_select(0, beam_idx.to(keys.device)))

        def crop(self, tokens_to_remove: int) -> None:
            super().crop(tokens_to_remove)
            # To what is left, not by as many: layers that an interrupted pass had reached have no index keys of its tokens.
            self._change(lambda keys: keys[:, : self.get_seq_length()])

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._change(lambda keys: keys.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._change(lambda keys: keys[indices])

        def __reduce_ex__(self, protocol: Any) -> Any:
            # Pickle finds a class by its name, and no module has this one.
            return (_unpickled, (layer_class,), self.__dict__) if type(self) is Indexed else super().__reduce_ex__(protocol)

    Indexed.__name__ = Indexed.__qualname__ = f"Indexed{layer_class.__name__}"
    return Indexed


def _unpickled(layer_class: Any) -> Any:
    twin = indexed(layer_class)
    return twin.__new__(twin)


def holds_index_keys(cache: Cache, layer: int) -> bool:
    return layer < len(cache.layers) and getattr(cache.layers[layer], "index_keys", None) is not None


def layer_of(cache: Cache, layer: int) -> Any:
    """The layer of a cache, made if the cache makes them as they come.

    Raises:
        ValueError: no transformers cache.
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values: expected a transformers Cache, got {type(cache).__name__}")
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer]


def indexed_layer(cache: Cache, layer: int, fp8: bool, new: int = 0) -> Any:
    """The layer of a cache, made one that holds index keys too, in FP8 or not; before the layer's own update, or behind that of `new` tokens.

    Raises:
        ValueError: the cache already holds tokens whose index keys were never made, or index keys in another form, or is
            of a kind that can't hold any.
    """
    target = layer_of(cache, layer)
    if not hasattr(target, "index_keys"):
        target.__class__ = _twin(type(target), cache.offloading)  # type: ignore[arg-type]
    if target.index_keys is None and target.is_initialized and int(target.get_seq_length()) > new:
        raise ValueError(
            f"past_key_values: layer {layer} holds {int(target.get_seq_length())} tokens without index keys "
            "(a cache that was filled in dense mode or before skim.convert); fill it again in sparse mode"
        )
    if target.index_keys is not None and (target.index_keys.dtype == torch.uint8) != fp8:
        raise ValueError(f"past_key_values: layer {layer} holds index keys of another score_dtype; fill the cache again")
    return target


@remember  # a cache's layers are of one or two classes
def _twin(layer_class: type, offloading: bool) -> Any:
    """`indexed(layer_class)`, if there can be one."""
    if not issubclass(layer_class, CacheLayerMixin) or issubclass(layer_class, StaticSlidingWindowLayer):
        raise ValueError(f"past_key_values: {layer_class.__name__} can't hold index keys; use a dynamic cache")
    if offloading and issubclass(layer_class, StaticLayer):  # torch.compile dies over our wait for its copies
        raise ValueError("past_key_values: an offloaded static cache can't hold index keys; use cache_implementation='offloaded'")
    return indexed(layer_class)


def takes_late_index_keys(cache: Cache, target: Any) -> bool:
    """Whether a layer's new index keys may follow its own update: not behind what a static layer counts, or to what was offloaded."""
    return not cache.offloading and not isinstance(target, StaticLayer)


def append_index_keys(cache: Cache, layer: int, new: Tensor) -> Tensor:
    """Append a layer's new index keys `[B, T, C]` before its own update; everything held, `[B, S, C]`.

    Raises:
        ValueError: as `indexed_layer`.
    """
    target = indexed_layer(cache, layer, new.dtype == torch.uint8)
    if cache.offloading:  # Cache.update waits for its copies later than this
        torch.cuda.current_stream(new.device).wait_stream(cache.prefetch_stream)
    held: Tensor = target.append_index_keys(new)
    return held
