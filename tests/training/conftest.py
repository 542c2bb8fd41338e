"""The tests of training: transformers keeps quiet, small tensors run on one thread."""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

transformers.logging.disable_progress_bar()
os.environ["ACCELERATE_USE_CPU"] = "true"  # what is compared bit for bit lies on the CPU; tests/gpu trains on a GPU


@pytest.fixture(autouse=True)
def quiet_and_small() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # transformers 5.23 renames what has to do with checkpointing; 5.17 and peft know the old names only
        warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6.*")
        yield
    torch.set_num_threads(threads)
