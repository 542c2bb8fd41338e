"""`skim.record`: the alignment loss of a forward pass, with right gradients through checkpointing and torch.compile.

A layer's loss is tied to its attention output by an identity whose backward feeds the loss its coefficient, so it is
computed again wherever a checkpoint computes the layer again. The coefficient is the gradient that reaches
`Record.alignment`: that node is the youngest of the graph, so autograd runs it before any layer's.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from skim.huggingface.state import publish, state_of
from skim.selection import Selection

_records: weakref.WeakValueDictionary[int, Record] = weakref.WeakValueDictionary()
_serials = iter(range(1, 1 << 62))
_coefficient: list[Tensor | None] = [None]  # of the backward pass that runs
_awaited = [False]  # whether no layer has picked it up yet


class Record:
    """What `skim.record` gathers over the forward passes inside it; the last pass counts.

    Attributes:
        alignments: layer -> its share of the alignment loss, a detached float32 scalar: its loss over the number of
            layers that its indexer serves, so that an indexer is trained on the mean of them.
        selections: layer -> the Selection it read, if they were asked for.
    """

    def __init__(self) -> None:
        self.alignments: dict[int, Tensor] = {}
        self.selections: dict[int, Selection] = {}
        self._prepaid: dict[int, Tensor] = {}
        self._tied = False

    @property
    def alignment(self) -> Tensor:
        """Sum of the layers' shares, one mean loss an indexer, to be added to the model's own loss before `backward()`."""
        if not self.alignments:
            raise ValueError("alignment: expected a forward pass inside skim.record before, got none that read a recorded layer")
        device = next(iter(self.alignments.values())).device
        total = torch.stack([self._prepaid.get(layer, value).to(device) for layer, value in self.alignments.items()]).sum()
        return _Coefficient.apply(total.requires_grad_(), self._tied) if torch.is_grad_enabled() else total


class record:
    """Record the alignment loss of a converted model's forward passes.

    ```
    with skim.record(model) as r:
        out = model(**batch)
        (out.loss + r.alignment).backward()
    ```

    In dense mode over all visible keys (warm-up), in sparse mode inside the selection. Gradients reach the indexers
    only, scaled by whatever factor `r.alignment` gets. Where the base model takes no gradients (frozen, or under
    `no_grad`; under DistributedDataParallel frozen) a layer's indexer gradients are made at once and no activation is
    kept, and `r.alignment.backward()` alone is enough.

    Args:
        model: a converted model.
        selections: also keep each layer's Selection in `r.selections` (torch.compile breaks its graph there).

    Raises:
        ValueError: the model was not converted.
    """

    def __init__(self, model: nn.Module, *, selections: bool = False) -> None:
        self.model, self.state, self.keeping = model, state_of(model), selections
        self.record = Record()

    def __enter__(self) -> Record:
        _coefficient[0], _awaited[0] = None, False  # what a backward pass that failed has left
        self.state.serial = self.state.serial or next(_serials)
        self.before = self.state.recording, self.state.keeping, recorded(self.state.serial)
        _records[self.state.serial] = self.record
        self.state.recording, self.state.keeping = True, self.keeping
        publish(self.model)
        return self.record

    def __exit__(self, *_: object) -> None:
        self.state.recording, self.state.keeping, outer = self.before
        if self.state.recording and outer is not None:
            _records[self.state.serial] = outer
        publish(self.model)


def recorded(serial: int) -> Record | None:
    """The Record of the innermost `skim.record` of the model with this serial number."""
    return _records.get(serial)


class _Coefficient(torch.autograd.Function):
    """Identity; its backward lays down the gradient it gets, for the layers' identities to pick up."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, tied: bool) -> Tensor:
        ctx.tied = tied
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if not ctx.tied:
            return grads[0], None
        before, _coefficient[0], _awaited[0] = _coefficient[0], grads[0].detach(), True
        if before is not None and not torch.equal(before, grads[0]):
            raise ValueError("alignment: expected one factor for every record in a backward pass, got several; call backward() for each")
        torch.autograd.Variable._execution_engine.queue_callback(_forget)  # type: ignore[attr-defined]
        return grads[0], None


def _forget() -> None:
    awaited, _coefficient[0], _awaited[0] = _awaited[0], None, False
    if awaited:
        raise ValueError(
            "alignment: expected the model's own loss in the same backward pass, (out.loss + r.alignment).backward(), got r.alignment alone, "
            "which has no gradients there; to train indexers only, freeze the base or run it under torch.no_grad()"
        )


@torch.library.custom_op("skim::tie_alignment", mutates_args=())
def tie_alignment(out: Tensor, loss: Tensor, layer: int, serial: int) -> Tensor:
    """out, unchanged; in the backward pass `loss` receives the gradient of `Record.alignment`. Notes the loss down."""
    note(serial, layer, loss)
    return out.clone()


@tie_alignment.register_fake
def _(out, loss, layer, serial):  # type: ignore[no-untyped-def]
    return torch.empty_like(out)


@torch.library.custom_op("skim::alignment_coefficient", mutates_args=())
def _alignment_coefficient(grad: Tensor) -> Tensor:
    value, _awaited[0] = _coefficient[0], False
    return torch.zeros((), device=grad.device) if value is None else value.to(grad.device, torch.float32).clone()


@_alignment_coefficient.register_fake
def _(grad):  # type: ignore[no-untyped-def]
    return grad.new_empty((), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[1].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, _alignment_coefficient(grad).to(ctx.dtype), None, None


tie_alignment.register_autograd(_backward, setup_context=_setup)


def note(serial: int, layer: int, loss: Tensor, tied: bool = True) -> None:
    """Write a layer's loss down; `tied`: its gradients wait for the backward pass of the model's own loss."""
    found = recorded(serial)
    if found is not None:
        found.alignments[layer] = loss.detach().float().clone()
        found._prepaid.pop(layer, None)
        found._tied = tied


def keep(serial: int, layer: int, selection: Selection) -> None:
    """Keep the selection that a layer read."""
    found = recorded(serial)
    if found is not None:
        found.selections[layer] = selection


class _Prepaid(torch.autograd.Function):
    """A loss whose gradients for `parameters` are already known: all that is kept of a frozen layer's forward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], unaveraged: bool, *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.unaveraged = gradients, unaveraged
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.unaveraged:
            raise ValueError(
                "alignment: DistributedDataParallel doesn't average gradients of a forward under torch.no_grad(); freeze the base instead"
            )
        return (None, None, None, *(g * grads[0].to(g.dtype) for g in ctx.gradients))


def prepay(serial: int, layer: int, loss: Tensor, indexer: nn.Module, unaveraged: bool) -> None:
    """Make the indexer's gradients of `loss` now and keep only them, to be returned in the loop's own backward pass."""
    note(serial, layer, loss, tied=False)
    parameters = [p for p in indexer.parameters() if p.requires_grad]
    found = recorded(serial)
    if found is not None and parameters and loss.requires_grad:  # not under inference_mode
        gradients = torch.autograd.grad(loss, parameters)
        with torch.enable_grad():  # the base may run under no_grad
            found._prepaid[layer] = _Prepaid.apply(loss.detach(), gradients, unaveraged, *parameters)
