"""A converted model as an ordinary Hugging Face folder: `from_pretrained(folder, trust_remote_code=True)` reads sparsely.

The folder has a model type of its own (`skim_llama`), which transformers doesn't know, so nothing loads it densely: with
`trust_remote_code` the small file of code in it asks for Skim, without it AutoModel refuses.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from skim.config import Config
from skim.huggingface.convert import attach, use
from skim.huggingface.native_export import native_twin
from skim.huggingface.state import state_of

# Stands in config.json where an attention implementation may stand. transformers knows none of this name, so even a
# model class that is asked for by name (LlamaForCausalLM.from_pretrained) fails instead of reading densely.
MARK = "skim"
CODE = '''"""{model} with DeepSeek Sparse Attention, read by Skim."""

from transformers import {config}, {model}

try:
    from skim.huggingface.export import SparseConfig, SparseModel
except ImportError as error:
    raise ImportError("this model reads with DeepSeek Sparse Attention, which Skim brings: pip install 'skim-attention[hf]'") from error


class Skim{config}(SparseConfig, {config}):
    model_type = "skim_{family}"


class Skim{model}(SparseModel, {model}):
    config_class = Skim{config}
'''


def export(model: nn.Module, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write a converted model as a folder that any program loads with `from_pretrained(folder, trust_remote_code=True)`.

    It holds base and indexers, the settings in force (Config and mode), and a few lines of code that import Skim, which
    must be installed where the folder is loaded. Indexers are loaded in the model's dtype. A `deepseek_v3` becomes a
    `deepseek_v32`, which needs no such code: transformers reads it with the indexers by itself.

    Args:
        model: a converted causal language model of transformers itself (merge a LoRA first).
        folder: a new or an empty one; nothing is left of a write that is cut off.
        tokenizer: written along, if there is one.

    Raises:
        ValueError: the model was not converted, reads with a selector of the caller's, is quantised, or is no plain
            causal language model; or the folder has files.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder: expected a new or an empty one, got {str(folder)!r}, which has something in it")
    twin = _twin(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".exporting-") as temporary:
        written = Path(temporary) / "model"
        written.mkdir()  # unlike `temporary`, with the permissions that the user's folders have
        twin.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        os.replace(written, folder)
    return folder


def _twin(model: nn.Module) -> Any:
    """An exported class's model that shares `model`'s weights."""
    state = state_of(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a transformers model, got {type(model).__name__}; merge or unwrap it first")
    if state.selector is not None:
        raise ValueError("model: expected one that reads with its indexers, got one with a selector (skim.use), which can't be saved")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("model: expected plain weights, got quantised ones, which can't be exported")
    base = _base(type(model))
    if base.__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or not (type(model) is base or isinstance(model, SparseModel)):
        raise ValueError(f"model: expected a causal language model of transformers itself, got {type(model).__name__}")
    base_config = _base(type(model.config))
    if base_config.model_type == "deepseek_v3":
        return native_twin(model, state)
    config_class: Any = type(f"Skim{base_config.__name__}", (SparseConfig, base_config), {"model_type": f"skim_{base_config.model_type}"})
    model_class: Any = type(f"Skim{base.__name__}", (SparseModel, base), {"config_class": config_class})
    settings = model.config.to_dict()
    settings.pop("model_type")
    settings.update(skim_config=asdict(state.config), skim_mode=state.mode)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may be dense
        twin = model_class(config_class.from_dict(settings))
    own = twin.state_dict().keys()  # without indexers that the pattern in force leaves out
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if name in own or ".indexer." not in name}, assign=True)
    twin.generation_config = model.generation_config
    return twin


def _base(kind: type) -> Any:
    """transformers' own class that `kind` is, or is made of."""
    found = (c for c in kind.__mro__ if c.__module__.startswith("transformers.") and hasattr(transformers, c.__name__))
    return next(found, kind)


class SparseConfig:
    """What the config class of an exported model adds to its family's: `skim_config` and `skim_mode`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        marked = config_dict.get("attn_implementation") == MARK
        return super().from_dict({k: v for k, v in config_dict.items() if k != "attn_implementation" or not marked}, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()  # type: ignore[misc]
        # `transformers serve` looks this name up in transformers, where no class of a folder's own can be.
        return {**values, "attn_implementation": MARK, "architectures": ["AutoModelForCausalLM"]}


class SparseModel:
    """What the model class of an exported model adds to its family's: it is converted as soon as it is made."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        attach(model, Config.from_dict(config.skim_config))
        use(model, mode=config.skim_mode)
        if config.skim_mode == "dense":
            warnings.warn("This model was exported in dense mode and reads so; skim.use(model, mode='sparse')", stacklevel=2)

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # as for transformers' own classes, or it leaves out buffers that aren't saved (Falcon-H1)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As ever, with the settings in force and the file of code.

        Raises:
            ValueError: the model was reverted: what is left is dense, and this class loads no such thing.
        """
        model: Any = self
        state = state_of(model)
        base, base_config = _base(type(self)), _base(type(self.config))
        module = f"modeling_skim_{base_config.model_type}"
        self.config.skim_config, self.config.skim_mode = asdict(state.config), state.mode
        names = {"AutoConfig": base_config.__name__, "AutoModelForCausalLM": base.__name__}
        self.config.auto_map = {auto: f"{module}.Skim{name}" for auto, name in names.items()}
        if kwargs.get("is_main_process", True):
            directory = Path(save_directory)
            directory.mkdir(parents=True, exist_ok=True)
            code = CODE.format(family=base_config.model_type, model=base.__name__, config=base_config.__name__)
            (directory / f"{module}.py").write_text(code, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
