"""Checkpoints and folders that are whole or not there, whenever the process is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

KEPT = 2
FILE = "state.pt"


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` (and the place of what had it) when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        (temporary / folder.name).mkdir()
        yield temporary / folder.name
        for file in (temporary / folder.name).rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        remove(folder)
        (temporary / folder.name).rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder; killed in between, it is gone by its name."""
    if folder.exists():
        grave = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
        folder.rename(grave / folder.name)
        shutil.rmtree(grave)


def write_json(file: Path, value: Any) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".writing-") as temporary:
        written = Path(temporary) / file.name
        written.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(written, file)


def clean(folder: Path) -> None:
    """Delete what a process that was killed has left half written."""
    for left in (*folder.glob(".writing-*"), *folder.glob("checkpoints/.writing-*")):
        shutil.rmtree(left, ignore_errors=True)


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of a step below `folder`, and delete all but the last `KEPT`."""
    with new_folder(folder / "checkpoints" / f"step-{step:08d}") as written:
        torch.save(state, written / FILE)
    for old in steps(folder)[:-KEPT]:
        remove(old)


def steps(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


def load(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / FILE, map_location="cpu", weights_only=True)
