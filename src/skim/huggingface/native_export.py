"""A `deepseek_v3` with indexers as what DeepSeek made of theirs: a `deepseek_v32`, which transformers and servers read sparsely by themselves."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from skim.huggingface.state import State


def native_twin(model: Any, state: State) -> Any:
    """transformers' own `DeepseekV32ForCausalLM` that shares the weights of a converted `deepseek_v3`.

    It says which keys are read, and not in which precision they are scored (`score_dtype`): that, every program decides.

    Raises:
        ValueError: something that a `deepseek_v32` can't say; by name.
    """
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    _expect_expressible(model.config, state)
    known = {field.name for field in fields(DeepseekV32Config)} - {"architectures", "transformers_version"}
    own = {name: value for name, value in model.config.to_dict().items() if name in known}
    index = {"index_topk": state.config.budget, "index_n_heads": state.config.index_n_heads, "index_head_dim": state.config.index_head_dim}
    config = DeepseekV32Config(**{**own, **index})
    with torch.device("meta"):
        twin = DeepseekV32ForCausalLM(config)
    weights = {name: value.to(model.dtype) if ".indexer." in name else value for name, value in model.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    twin.generation_config = model.generation_config
    del config.layer_types  # every layer is sparse, which each release of transformers writes by a name of its own
    return twin


def _expect_expressible(model_config: Any, state: State) -> None:
    if model_config.q_lora_rank is None:
        raise ValueError("q_lora_rank: expected a model with a query latent, which the indexers of a deepseek_v32 read, got None")
    config, letters = state.config, "".join(sorted(set(state.letters.values())))
    for name, got, expected in (
        ("mode", state.mode, "sparse"),
        ("pattern", letters, "S"),
        ("mass", config.mass, None),
        ("keep_first", config.keep_first, 0),
        ("keep_recent", config.keep_recent, 0),
        ("rope_layout", config.rope_layout, "half"),
        ("rope_dim", config.rope_dim, model_config.qk_rope_head_dim),
        ("rope_interleave", model_config.rope_interleave, True),
    ):
        if got != expected:
            raise ValueError(f"{name}: expected {expected!r}, all that a deepseek_v32 has, got {got!r}")
