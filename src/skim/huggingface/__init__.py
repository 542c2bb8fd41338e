"""DSA in Hugging Face models."""

from skim.huggingface.adapter import load, save
from skim.huggingface.convert import convert, revert, use
from skim.huggingface.export import export
from skim.huggingface.models import load_model
from skim.huggingface.record import Record, record
from skim.huggingface.state import LayerInputs

__all__ = ["LayerInputs", "Record", "convert", "export", "load", "load_model", "record", "revert", "save", "use"]
