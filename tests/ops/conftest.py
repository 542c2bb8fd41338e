"""The tests of the operators import their oracles and inputs by name, wherever pytest was started."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from skim.ops import dispatch

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small: a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["reference", "numba"])
def both_on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """What auto takes on a CPU: each in turn, so that the oracle is tested as well as what users get."""
    if request.param == "numba":
        pytest.importorskip("numba")
        yield
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "IMPLEMENTATIONS", ("reference",))
            yield


@pytest.fixture
def flagged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each launch of the selection's last kernel does again."""
    kernels = pytest.importorskip("skim.ops.select.candidates")
    found, kernel = [], kernels.exhaustive_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                found.append(int((args[7] != 0).sum()))
                kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(kernels, "exhaustive_kernel", Counted())
    return found
