"""Skim: DeepSeek Sparse Attention for PyTorch and Hugging Face models."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from skim.config import Config
from skim.ops import align, attend, attend_dense, index_scores, select, visible
from skim.selection import Selection

if TYPE_CHECKING:
    from skim.huggingface import convert, export, load, load_model, record, revert, save, use

try:
    __version__ = metadata.version("skim-attention")
except metadata.PackageNotFoundError:  # a source tree on the path that isn't installed
    __version__ = "0+source"
_NEEDS_TRANSFORMERS = ("convert", "export", "load", "load_model", "record", "revert", "save", "use")

__all__ = [
    "Config",
    "Selection",
    "align",
    "attend",
    "attend_dense",
    "convert",
    "export",
    "index_scores",
    "load",
    "load_model",
    "record",
    "revert",
    "save",
    "select",
    "use",
    "visible",
]


def __getattr__(name: str) -> Any:
    """The verbs of Hugging Face models are imported when first used, so that the operators need no transformers."""
    if name in _NEEDS_TRANSFORMERS:
        try:
            return getattr(import_module("skim.huggingface"), name)
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith("skim"):
                raise
            raise ImportError(f"skim.{name} needs {error.name}: pip install 'skim-attention[hf]'") from error
    raise AttributeError(f"module 'skim' has no attribute {name!r}")
