"""What each of two processes does for test_training.py; a module of its own so that they can import it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import build, convert, gradients, tokens
from torch.nn.parallel import DistributedDataParallel

import skim

RANKS = 2
IDS = tokens(2 * RANKS, 30)
CASES = [(mode, form) for mode in ("dense", "sparse") for form in ("tied", "frozen")]


def model_for(mode: str, form: str) -> Any:
    model = convert(build("llama"), mode=mode, pattern="SRS").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(form != "frozen" or ".indexer." in name)
    return model


def step(model: Any, ids: torch.Tensor) -> skim.Selection:
    """One step of the loop in skim.record's docstring; the first layer's selection."""
    with skim.record(model, selections=True) as r:
        out = model(ids, labels=ids, use_cache=False)
        (out.loss + r.alignment).backward()
    return r.selections.get(0)


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=120))
    found: dict[Any, Any] = {}
    for mode, form in CASES:
        model = model_for(mode, form)
        step(DistributedDataParallel(model), IDS[2 * rank : 2 * rank + 2])
        found[mode, form] = gradients(model)
    model = model_for("sparse", "tied")
    found["selection"] = step(DistributedDataParallel(model), IDS).indices
    with skim.record(model) as r:
        with torch.no_grad():
            DistributedDataParallel(model)(IDS, use_cache=False)
        try:
            r.alignment.backward()
        except ValueError as error:
            found["no_grad"] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
