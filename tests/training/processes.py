"""Training runs in processes of their own, killed or several together; a module so that a process can import it."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import accelerate  # noqa: E402, F401  (so that processes that are forked need not)
import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_model import converted  # noqa: E402

from skim.training import Recipe, Rows, train  # noqa: E402

transformers.logging.disable_progress_bar()
RECIPES = {
    "warmup": Recipe(steps=40, length=96, save_every=3),
    "sparse": Recipe("sparse", steps=30, length=96, save_every=2, loss="distill", lr=1e-3, accumulate=2),
}


def alone(stage: str, cache: str, out: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return train(converted(), Rows(cache, 96), RECIPES[stage], out=out, resume=True)


def together(rank: int, ranks: int, port: int, recipe: Recipe, variants: dict[str, Any], cache: str, out: str) -> None:
    """One of several processes, as a launcher starts it; process r leaves its indexers and the report in r.pt."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = converted()
    report = train(model, Rows(cache, 96), recipe, out=Path(out) / "run", variants=variants)
    torch.save(
        (report["loss"], report["kl"], {name: found["kl"] for name, found in report["variants"].items()}, model.state_dict()),
        Path(out) / f"{rank}.pt",
    )
    torch.distributed.destroy_process_group()
