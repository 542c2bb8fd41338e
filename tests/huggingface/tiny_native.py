"""Small random DeepSeek-V3.2 and GLM-5 models, and what their converted twins are compared with."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import CONFIG, GROUPS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

import skim

TOPK = 8
NEAR = 1e-5
LAYOUTS = {"deepseek_v32": "half", "glm_moe_dsa": "interleaved"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}
SIZES = {
    **CONFIG,
    **GROUPS,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "index_topk": TOPK,
    "index_n_heads": 8,
    "index_head_dim": 16,
}
SHARED = ["full", "shared", "full", "shared"]


class Scores(TorchFunctionMode):
    """Keeps what `topk` is called on: the scores that a native indexer doesn't give away."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.topk:
            self.found.append(args[0])
        return function(*args, **(kwargs or {}))


def random_native(family: str, seed: int = 0, implementation: str = "eager", **changes: Any) -> Any:
    """A random model in evaluation mode whose attention and indexers have something to say; YaRN in DeepSeek-V3.2."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {"rope_parameters": YARN} if family == "deepseek_v32" else {"indexer_types": ["full"] * 2}
    config = AutoConfig.for_model(family, **{**SIZES, **parts, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=2.0 * parameter.shape[-1] ** -0.5)
            elif "k_norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def flatten_scores(model: Any, kind: int) -> None:
    """Weights under which many keys score exactly the same: all of them (kind 0), or whole groups of them."""
    with torch.no_grad():
        for layer in model.model.layers:
            indexer = getattr(layer.self_attn, "indexer", None)
            if indexer is not None and kind == 0:
                indexer.weights_proj.weight.zero_()
            elif indexer is not None:
                indexer.wk.weight.zero_()  # every key is the norm's bias, turned by its position
                indexer.k_norm.bias[: indexer.qk_rope_head_dim] = 0.0


def to_bf16(model: Any) -> Any:
    """The model in bfloat16 as it is published: the head weights stay in float32."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("weights_proj"):
            module.float()
    return model


def seen(start: Tensor, end: Tensor, keys: int) -> Tensor:
    """bool [B, T, keys] of visible keys."""
    position = torch.arange(keys)
    return (position >= start[..., None]) & (position < end[..., None])


def read_by(picks: Tensor, keys: int) -> Tensor:
    """bool [B, T, keys] of indices [B, T, K], -1 for none."""
    mask = torch.zeros(*picks.shape[:2], keys + 1, dtype=torch.bool)
    return mask.scatter_(2, torch.where(picks < 0, keys, picks).long(), True)[..., :keys]


def differing(one: Tensor, other: Tensor, scores: Tensor) -> int:
    """How many keys only one of two masks reads although their scores don't lie within NEAR of the k-th."""
    kth = scores.masked_fill(~one, torch.inf).amin(-1, keepdim=True)
    return int(((one ^ other) & ((scores - kth).abs() > NEAR)).sum())


@dataclass
class Watched:
    """A native indexer in an eager forward: what it was given, its scores and picks."""

    inputs: tuple = ()
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    picks: Tensor = field(default_factory=lambda: torch.empty(0))


def replayed(model: nn.Module, selections: dict[int, skim.Selection], ids: Tensor, **arguments: Any) -> tuple[Tensor, dict[int, Watched]]:
    """Logits of an eager forward whose layers read `selections`, and what their own indexers would have picked."""
    watched: dict[int, Watched] = {}
    handles = []

    def hook(number: int) -> Any:
        def replace(indexer: nn.Module, args: tuple, picks: Tensor) -> Tensor:
            watched[number] = Watched(inputs=args[:3], picks=picks)
            indices = selections[number].indices[:, :, 0]
            return torch.where(indices < 0, indices[..., :1].clamp(min=0), indices)  # the first key again where there is no more

        return replace

    for layer in model.model.layers:
        indexer = layer.self_attn.indexer
        if indexer is not None:
            handles.append(indexer.register_forward_hook(hook(layer.self_attn.layer_idx)))
    with torch.no_grad(), Scores() as scores:
        found = model(ids, **{"use_cache": False, **arguments}).logits
    for handle in handles:
        handle.remove()
    of_indexers = [x for x in scores.found if x.dim() == 3 and x.shape[:2] == ids.shape]  # routers pick their experts with it too
    for one, values in zip(watched.values(), of_indexers):
        one.scores = values
    return found, watched
