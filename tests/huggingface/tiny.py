"""Small random models of many families, and what their converted twins are compared with."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import skim

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # so that generation never stops before its time
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, **MOE}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, **GROUPS}
DSA = {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 16, **MLA}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# What each family is made of beside CONFIG, and the letters that a plain "S" gives its attention layers.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "afmoe": ({"head_dim": 16, "sliding_window": 12, "num_hidden_layers": 4, "num_experts": 4, "num_dense_layers": 1, **GROUPS}, "FFFS"),
    "apertus": ({}, "SSS"),
    "arcee": ({}, "SSS"),
    "bamba": ({"attn_layer_indices": [1], **MAMBA}, "S"),
    "cohere": ({}, "SSS"),  # the frequency table repeats each frequency side by side
    "cohere2": ({"sliding_window": 12, "num_hidden_layers": 4}, "FFFS"),
    "deepseek_v3": (MLA, "SSS"),  # latents for keys and values
    "diffllama": ({}, "SSS"),  # calls its attention twice in a layer
    "dots1": ({"head_dim": 16, **GROUPS}, "SSS"),
    "ernie4_5": ({"head_dim": 16}, "SSS"),
    "exaone4": ({"sliding_window": 12, "num_hidden_layers": 4}, "FFFS"),
    "falcon_h1": ({"head_dim": 16, "mamba_d_ssm": 64, "mamba_chunk_size": 16, **MAMBA}, "SSS"),
    "gemma": ({"head_dim": 16}, "SSS"),
    "gemma3_text": ({"head_dim": 16, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "FSS"),
    "glm4": ({"head_dim": 16}, "SSS"),
    "glm4_moe": ({"head_dim": 16, **GROUPS}, "SSS"),
    "gpt_neox": (PARTIAL, "SSS"),  # biases, hidden states by position, a cache of another name
    "gpt_oss": ({"head_dim": 16, "num_local_experts": 4, "sliding_window": 12, **MOE}, "FSF"),  # sinks
    "granite": ({"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0}, "SSS"),
    "granitemoehybrid": (
        {"layer_types": ["linear_attention", "full_attention", "full_attention"], "position_embedding_type": "rope", "num_local_experts": 0, **MAMBA},
        "SS",
    ),
    "helium": ({"head_dim": 8}, "SSS"),
    "hunyuan_v1_dense": ({"head_dim": 16}, "SSS"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "full_attention"]}, "SS"),
    "llama": ({"attention_bias": True, "rope_parameters": LLAMA3}, "SSS"),
    "mimo_v2_flash": ({"head_dim": 16, "v_head_dim": 8, "n_routed_experts": 4, "sliding_window": 12, **MOE}, "SFF"),  # narrow values
    "minimax": ({"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, "SS"),  # linear attention between
    "ministral": ({"sliding_window": 24, "head_dim": 16}, "SSS"),
    "mistral": ({"sliding_window": 24}, "SSS"),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "SSS"),
    "modernbert-decoder": ({"local_attention": 12}, "SFF"),
    "nanochat": ({}, "SSS"),
    "olmo2": ({}, "SSS"),
    "olmo3": ({"sliding_window": 12, "num_hidden_layers": 4}, "FFFS"),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, "SSS"),
    "persimmon": ({}, "SSS"),
    "phi": ({}, "SSS"),  # attention and mlp side by side
    "phi3": (PARTIAL, "SSS"),
    "qwen2": ({}, "SSS"),
    "qwen3": ({"head_dim": 16}, "SSS"),  # norms on queries and keys
    "qwen3_moe": ({"num_experts": 4, "head_dim": 16, **MOE}, "SSS"),
    "qwen3_next": (
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            **MOE,
        },
        "S",
    ),
    "seed_oss": ({"head_dim": 16}, "SSS"),
    "smollm3": ({"no_rope_layer_interval": 2}, "SSS"),  # layers without rotation
    "starcoder2": ({}, "SSS"),
}
EAGER_ONLY = ("gpt_oss", "mimo_v2_flash")  # transformers has no sdpa for them


def build(family: str, implementation: str = "sdpa", **changes: Any) -> Any:
    """A random model of a family in evaluation mode, its weights large enough that tokens differ in attention."""
    implementation = "eager" if family in EAGER_ONLY else implementation
    key = repr((family, implementation, changes))
    if key not in _built:
        parts = FAMILIES[family][0] if family in FAMILIES else {}
        config = AutoConfig.for_model(family, **{**CONFIG, **parts, **changes})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        _built[key] = model
    return copy.deepcopy(_built[key])


_built: dict[str, Any] = {}


def convert(model: nn.Module, mode: str = "sparse", **config: Any) -> Any:
    """`model` converted, in sparse mode, with small indexers, always the same ones: budget 8 unless told."""
    config = {"budget": 8, "index_n_heads": 2, "index_head_dim": 16, **config}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        skim.convert(model, skim.Config(**config))
    skim.use(model, mode=mode)
    return model


def sparse(family: str = "llama", implementation: str = "sdpa", *, layers: int | None = None, **config: Any) -> Any:
    """A converted random model in sparse mode."""
    return convert(build(family, implementation, **({} if layers is None else {"num_hidden_layers": layers})), **config)


def tokens(rows: int = 2, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **{"use_cache": False, **arguments}).logits


def recorded(model: nn.Module, ids: Tensor, **arguments: Any) -> tuple[Tensor, dict[int, skim.Selection]]:
    """Logits of a forward pass and the selection that each layer read."""
    with skim.record(model, selections=True) as r:
        out = logits(model, ids, **arguments)
    return out, r.selections


def generate(model: nn.Module, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model.generate(ids, **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **arguments})


def attentions(model: nn.Module) -> dict[int, nn.Module]:
    """The softmax attention modules of a model, converted or not, by layer number."""
    found = {}
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("Attention") and "Lightning" not in name and isinstance(getattr(module, "layer_idx", None), int):
            found[module.layer_idx] = module
    return found


def masks(selections: dict[int, skim.Selection], keys: int) -> dict[int, Tensor]:
    """bool [B, T, keys] of what each layer's selection reads."""
    found = {}
    for layer, selection in selections.items():
        indices = selection.indices[:, :, 0].long()
        mask = torch.zeros(*indices.shape[:2], keys + 1, dtype=torch.bool)
        found[layer] = mask.scatter_(2, torch.where(indices < 0, keys, indices), True)[..., :keys]
    return found


@contextlib.contextmanager
def masked(model: nn.Module, read: dict[int, Tensor]) -> Iterator[None]:
    """A model that was never converted, with eager attention, whose layers read what `read` [B, T, S] says and nothing else."""
    modules = attentions(model)

    def hook(number: int) -> Any:
        mask = torch.where(read[number][:, None], 0.0, torch.finfo(torch.float32).min)

        def put(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            assert "attention_mask" in kwargs
            return args, {**kwargs, "attention_mask": mask}

        return put

    handles = [modules[number].register_forward_pre_hook(hook(number), with_kwargs=True) for number in read]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients by name (None counts as zero), which are then forgotten."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
