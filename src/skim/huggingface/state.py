"""What a converted model carries: one State, shared by its decoder and its attention modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from skim.config import Config
from skim.modules import IndexTensors, LightningIndexer
from skim.selection import Selection

MODES = ("dense", "sparse")


@dataclass(frozen=True)
class LayerInputs:
    """What a selector sees of an attention layer.

    Attributes:
        layer: the layer's number in the model.
        q, k: `[B, T, H, D]` queries and `[B, S, G, D]` keys, rotated, from the cache where there is one.
        scale: factor of the attention's scores.
        config: the Config in force.
        indexer: the layer's own indexer, if it has one.
        index: index queries, cached index keys and head weights, if it has one.
    """

    layer: int
    q: Tensor
    k: Tensor
    scale: float
    config: Config
    indexer: LightningIndexer | None
    index: IndexTensors | None


Selector = Callable[[LayerInputs, Tensor, Tensor], "Selection | None"]
"""`(inputs, start, end) -> Selection`; None reads every visible key."""


@dataclass
class State:
    """How a converted model reads at present. Changed by `skim.use`, `skim.record` and `skim.load`."""

    config: Config
    letters: dict[int, str]  # attention layer -> F, S or R
    original: str  # the attention implementation that the model had
    mode: str = "dense"
    selector: Selector | None = None
    recording: bool = False
    keeping: bool = False  # the record asks for selections too
    serial: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """A copied model has its own settings, and a serial number of its own as soon as it records."""
        return replace(self, recording=False, keeping=False, serial=0)

    @property
    def limit(self) -> int | None:
        """Rows that see more keys than this are read by Skim's attention; None: no row is."""
        if self.recording or self.selector is not None:
            return 0
        return self.config.fewest if self.mode == "sparse" else None


Waiting = tuple[Any, int, LightningIndexer, Tensor, tuple[Tensor, Tensor]]
"""A layer whose new index keys are yet to be made: the cache, its number, indexer, hidden states and position embeddings."""


@dataclass
class Forward:
    """One forward pass: the settings in force when it began, so that a checkpointed layer run again in the backward
    pass does the same, and what later layers reuse: selections, and while recording the indexers behind them with
    their inputs.

    `tied`: the base model takes gradients too, so a layer's alignment loss is tied to its output; otherwise the
    indexer's gradients are made at once. `unaveraged`: DistributedDataParallel doesn't know of a backward pass to come.
    `late`: index keys that nothing reads in this pass may be made behind it. `waiting`: layers whose keys are, together.
    `room`: bytes of inputs that may wait yet.
    """

    config: Config
    letters: dict[int, str]
    mode: str
    selector: Selector | None
    recording: bool
    keeping: bool
    serial: int
    tied: bool
    unaveraged: bool
    late: bool
    selections: dict[tuple[int, int], Selection] = field(default_factory=dict)  # by layer and first query
    inputs: dict[int, tuple[LightningIndexer, tuple[Any, ...]]] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)
    room: int = 0


@dataclass
class HandOver:
    """What is handed to the attention function inside an attention module.

    `unquantised`: the new index keys before FP8, which the alignment loss is made of. `aligned`: it is made. `first`: the
    first query, where an MLA model reads with some of them after others.
    """

    forward: Forward
    index: IndexTensors | None
    unquantised: Tensor | None
    aligned: bool = False
    first: int = 0


def source_of(layer: int, letters: dict[int, str]) -> int:
    """The layer whose selection `layer` reads: itself, or for an R layer the last S layer before it."""
    return max(i for i, letter in letters.items() if i <= layer and letter == "S") if letters[layer] == "R" else layer


def state_of(model: nn.Module) -> State:
    """The State of a converted model.

    Raises:
        ValueError: the model was not converted.
    """
    for module in model.modules():
        state = getattr(module, "skim_state", None)
        if state is not None:
            return state
    raise ValueError("model: expected a model after skim.convert, got one that was not converted")


def decoder_of(model: nn.Module) -> Any:
    """The module of a converted model that runs the layers and makes their masks."""
    return next(m for m in model.modules() if getattr(m, "skim_decoder", False))


def converted_layers(model: nn.Module) -> dict[int, Any]:
    """The attention modules of a converted model by layer number."""
    return {int(m.layer_idx): m for m in model.modules() if hasattr(m, "skim_state") and not getattr(m, "skim_decoder", False)}  # type: ignore[arg-type]


def indexed_layers(model: nn.Module) -> dict[int, Any]:
    """The attention modules whose own indexer is in use, letter S, by layer number: what is trained, saved and exported."""
    letters = state_of(model).letters
    return {number: layer for number, layer in converted_layers(model).items() if letters[number] == "S"}


def publish(model: nn.Module) -> None:
    """Tell the mask function, which sees nothing but the model's config, what is in force."""
    decoder_of(model).config.skim_limit = state_of(model).limit
