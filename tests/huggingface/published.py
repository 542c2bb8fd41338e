"""Small checkpoints in the layout that DeepSeek and Z.ai publish (spec section 6): names, dtypes, blocks of 128, shards, config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS, EXPERTS, BLOCK = 3, 4, 128
# The real sizes where the layout depends on them (a latent of 512 + 64 channels, 128 of an index head), small elsewhere.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 192,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "index_n_heads": 16,  # with few, many scores are exactly zero, and ties are broken by another rule than topk's
    "index_head_dim": 128,
    "index_topk": 8,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "use_cache": True,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v32": {
        "architectures": ["DeepseekV32ForCausalLM"],
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "torch_dtype": "bfloat16",
        "quantization_config": {**FP8, "scale_fmt": "ue8m0"},
    },
    "glm_moe_dsa": {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "qk_head_dim": 256,
        "head_dim": 64,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "indexer_rope_interleave": True,
        "rope_interleave": True,
        "indexer_types": ["full", "full", "shared"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
        "dtype": "bfloat16",
        "quantization_config": FP8,
    },
}


def publish(folder: Path, family: str = "deepseek_v32", *, quantised: bool = True, shards: int = 4) -> dict[str, Tensor]:
    """Write a random checkpoint; what is in the files comes back by name.

    As in the real ones a weight and its scale may lie in different shards, and layer `LAYERS` is for multi-token prediction.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": family, **SIZES, **FAMILIES[family]}
    if not quantised:
        del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, shape in names(config).items():
        value = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1) + (name.endswith("norm.weight"))
        if quantised and in_fp8(name):
            power_of_two = config["quantization_config"].get("scale_fmt") == "ue8m0"
            tensors[name], tensors[name + "_scale_inv"] = in_blocks(value, power_of_two)
        else:
            plain = name.endswith(("layernorm.weight", "e_score_correction_bias")) or "k_norm" in name
            tensors[name] = value.to(torch.float32 if plain else torch.bfloat16)
    write(folder, tensors, shards)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], shards: int = 4) -> None:
    """Shards with their index; every so manieth tensor by name goes into the same one."""
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:06d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def names(config: dict[str, Any]) -> dict[str, list[int]]:
    """Every name and shape, as spec section 6 lists them, that of the multi-token prediction layer included."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, v, q_rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"], config["q_lora_rank"]
    found = {"model.embed_tokens.weight": [97, hidden], "model.norm.weight": [hidden], "lm_head.weight": [97, hidden]}
    for layer in range(LAYERS + 1):
        at = f"model.layers.{layer}"
        parts = {
            "self_attn.q_a_proj.weight": [q_rank, hidden],
            "self_attn.q_a_layernorm.weight": [q_rank],
            "self_attn.q_b_proj.weight": [heads * (nope + rope), q_rank],
            "self_attn.kv_a_proj_with_mqa.weight": [rank + rope, hidden],
            "self_attn.kv_a_layernorm.weight": [rank],
            "self_attn.kv_b_proj.weight": [heads * (nope + v), rank],
            "self_attn.o_proj.weight": [hidden, heads * v],
            "input_layernorm.weight": [hidden],
            "post_attention_layernorm.weight": [hidden],
        }
        if config.get("indexer_types", ["full"] * LAYERS)[min(layer, LAYERS - 1)] == "full":
            parts |= {
                "self_attn.indexer.wq_b.weight": [config["index_n_heads"] * 128, q_rank],
                "self_attn.indexer.wk.weight": [128, hidden],
                "self_attn.indexer.k_norm.weight": [128],
                "self_attn.indexer.k_norm.bias": [128],
                "self_attn.indexer.weights_proj.weight": [config["index_n_heads"], hidden],
            }
        if layer == 0:
            mlps = {"mlp": config["intermediate_size"]}
        else:
            mlps = dict.fromkeys(("mlp.shared_experts", *(f"mlp.experts.{i}" for i in range(EXPERTS))), config["moe_intermediate_size"])
            parts |= {"mlp.gate.weight": [EXPERTS, hidden], "mlp.gate.e_score_correction_bias": [EXPERTS]}
        for mlp, inner in mlps.items():
            parts |= {
                f"{mlp}.gate_proj.weight": [inner, hidden],
                f"{mlp}.up_proj.weight": [inner, hidden],
                f"{mlp}.down_proj.weight": [hidden, inner],
            }
        if layer == LAYERS:
            parts |= {"embed_tokens.weight": [97, hidden], "shared_head.head.weight": [97, hidden], "eh_proj.weight": [hidden, 2 * hidden]}
            parts |= {f"{norm}.weight": [hidden] for norm in ("enorm", "hnorm", "shared_head.norm")}
        found |= {f"{at}.{name}": shape for name, shape in parts.items()}
    return found


def in_fp8(name: str) -> bool:
    return name.endswith(("_proj.weight", "mqa.weight", "wq_b.weight", "wk.weight")) and not name.endswith(("weights_proj.weight", "eh_proj.weight"))


def blocks(shape: torch.Size) -> list[tuple[int, int, slice, slice]]:
    rows, columns = ([slice(i, min(i + BLOCK, size)) for i in range(0, size, BLOCK)] for size in shape)
    return [(i, j, r, c) for i, r in enumerate(rows) for j, c in enumerate(columns)]


def in_blocks(weight: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """FP8 values and a scale for each block, block by block."""
    values, scale = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
    for i, j, r, c in blocks(weight.shape):
        scale[i, j] = weight[r, c].abs().amax() / 448
        if power_of_two:
            scale[i, j] = scale[i, j].log2().ceil().exp2()
        values[r, c] = (weight[r, c] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the files mean, in float64, dequantised block by block."""
    found = {name: x.double() for name, x in tensors.items() if not name.endswith("_scale_inv")}
    for name in found:
        if name + "_scale_inv" in tensors:
            for i, j, r, c in blocks(found[name].shape):
                found[name][r, c] *= float(tensors[name + "_scale_inv"][i, j])
    return found


def model(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a published folder's config with the weights put in by hand."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    for layer in made.model.layers:  # transformers leaves them at 1e-6
        for norm in (layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm):
            norm.variance_epsilon = config.rms_norm_eps
    weights = plain(tensors)
    with torch.no_grad():
        for name, parameter in made.state_dict().items():
            layer, experts, part = name.partition("mlp.experts.")
            if experts:
                kinds = ["down_proj"] if part == "down_proj" else ["gate_proj", "up_proj"]
                rows = [torch.cat([weights[f"{layer}{experts}{i}.{kind}.weight"] for kind in kinds]) for i in range(EXPERTS)]
                parameter.copy_(torch.stack(rows))
            else:
                parameter.copy_(weights[name])
    return made
