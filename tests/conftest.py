"""What all tests share: no network, few threads, the same random numbers, and a word for what can't run here."""

import os

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = max(1, (os.cpu_count() or 1) // WORKERS)  # workers that share a core slow each other down many times over

# Set before torch and transformers are imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from importlib import import_module  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter; read when a kernel is defined

sys.path.insert(0, str(Path(__file__).parent))  # helpers that several folders of tests share
torch.set_num_threads(THREADS)

# A first example compiles or warms up, so time says nothing; in CI the same examples run every time.
settings.register_profile("skim", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("skim")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True, scope="session")
def interpreted_as_on_a_card() -> Iterator[None]:
    """Interpreted products are NumPy's, whose library sums in an order that depends on the block and the processor: round them from float64.

    Of NaN and a number a card takes the number as maximum and minimum; interpreters before Triton 3.8 took NaN.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or not find_spec("triton"):
        yield
        return
    builder = import_module("triton.runtime.interpreter").InterpreterBuilder
    product, float64 = builder.create_dot, import_module("triton.language").float64

    def rounded_once(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        found = product(self, a, b, type(d)(d.data.astype("float64"), float64), *options)
        return type(d)(found.data.astype(d.data.dtype), d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", rounded_once)
        patch.setattr(builder, "create_maxnumf", lambda self, a, b: self.binary_op(a, b, np.fmax))
        patch.setattr(builder, "create_minnumf", lambda self, a, b: self.binary_op(a, b, np.fmin))
        yield


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)
