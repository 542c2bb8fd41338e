"""A tiny Llama whose attention has something to find: sharp queries and keys, random weights."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import skim
from skim.huggingface.convert import attach

VOCABULARY = 61


def sharp_llama(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return model


def converted(**choices: Any) -> Any:
    model = sharp_llama()
    attach(model, skim.Config(**{"budget": 16, "index_n_heads": 4, "index_head_dim": 16, **choices}))
    return model


def text(length: int, seed: int = 0) -> torch.Tensor:
    """`[1, length]` tokens."""
    return torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))
