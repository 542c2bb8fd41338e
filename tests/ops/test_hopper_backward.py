"""The Gluon kernels of the gradients over latents against the reference: simulated on a CPU, or on an sm_90 GPU where there is one."""

from __future__ import annotations

import math

import pytest
import torch
from cases import deterministic, normal, random_indices
from test_latent_backward import check, results
from torch import Tensor

kernels = pytest.importorskip("skim.ops.attend.hopper_backward", reason="Triton is not installed, or has no Gluon")

from simulated import Simulated  # noqa: E402

from skim.ops.attend import latent_backward as latent  # noqa: E402

REAL = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if REAL else "cpu"
HALVES = {torch.float16: 2e-3, torch.bfloat16: 1e-2} if REAL else {torch.float16: 2e-3}  # Triton's interpreter gets bfloat16 wrong


@pytest.fixture(autouse=True)
def simulated_without_a_card(monkeypatch: pytest.MonkeyPatch):
    if not REAL:
        monkeypatch.setattr(latent, "gluon", lambda device: True)
        monkeypatch.setattr(kernels, "processors", lambda device: 2)
        for name in ("scores_128", "of_keys_128"):
            monkeypatch.setattr(kernels, name, Simulated(getattr(kernels, name)))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched."""
    found: list[str] = []

    def counted(name: str) -> None:
        launch = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args: (found.append(name), launch(*args)))

    counted("launch_scores")
    counted("launch_of_keys")
    return found


def latents(T: int, S: int, H: int = 128, D: int = 576, B: int = 1, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    return normal(B, T, H, D, seed=1, dtype=dtype), normal(B, S, 1, D, seed=2, dtype=dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("H", "D"), [(128, 576), (256, 512)])
def test_gradients_are_those_of_the_reference(H: int, D: int, dtype: torch.dtype, launches: list[str]) -> None:
    q, k = latents(5, 300, H, D, dtype=dtype)
    indices, sink = random_indices(1, 5, 1, 290, 300, holes=False), normal(H, seed=3)
    check(results("triton", q, k, indices, sink), results("reference", q, k, indices, sink), HALVES[dtype])
    assert launches == ["launch_scores", "launch_of_keys"]


def test_rows_of_any_length_with_holes_and_without_keys(launches: list[str]) -> None:
    """Two rows of the batch; blocks of 128 keys that are full, cut short, empty in the middle and behind the last key."""
    q, k = latents(4, 300, B=2)
    indices = random_indices(2, 4, 1, 290, 300, holes=False)
    indices[0, 0, 0, 128:256] = -1
    indices[0, 1, 0, 1:] = -1
    indices[0, 2] = -1
    indices[1, 0, 0, ::2] = -1
    indices[1, 1, 0, 129:] = -1
    indices[1, 3, 0, :200] = -1
    found = results("triton", q, k, indices)
    check(found, results("reference", q, k, indices), HALVES[q.dtype])
    assert found["q"][0, 2].count_nonzero() == 0
    assert launches


def test_unread_keys_and_queries_that_read_nothing_may_hold_nan(launches: list[str]) -> None:
    q, k = latents(3, 200)
    indices = random_indices(1, 3, 1, 140, 150, holes=False)
    indices[0, 1] = -1
    indices[0, 2, 0, ::3] = -1
    clean = results("triton", q, k, indices)
    q[:, 1], k[:, 150:] = math.nan, math.nan
    found = results("triton", q, k, indices)
    check(found, clean, 1e-4)  # sums of the keys' gradients, in another order, are rounded to halves
    assert torch.equal(found["q"], clean["q"])
    assert len(launches) == 4


def test_chunks(launches: list[str]) -> None:
    q, k = latents(20, 80)  # 64 KiB a query
    indices = random_indices(1, 20, 1, 70, 80, holes=False)
    check(results("triton", q, k, indices, workspace_mb=1), results("reference", q, k, indices), HALVES[q.dtype])
    assert launches == ["launch_scores", "launch_of_keys"] * 2


def test_strided_inputs_are_those_in_a_row(launches: list[str]) -> None:
    (q, k), grad = latents(3, 200, B=2), normal(2, 3, 128, 512, seed=4, dtype=torch.float16)
    full, shift = normal(2, 3, 128, seed=5) + 11, normal(2, 3, 128, seed=6)
    indices = random_indices(2, 3, 1, 150, 200, holes=False).to(torch.int32)
    q, k, grad, full, shift, indices = (x.to(DEVICE) for x in (q, k, grad, full, shift, indices))
    wanted = latent.gradients(q, k, grad, full, shift, indices, 0.05, 64)
    q, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, grad))
    k = torch.cat((k, k[..., :16]), -1)[..., :576]
    for a, b in zip(latent.gradients(q, k, grad, full, shift, indices, 0.05, 64), wanted):
        check({"": a.cpu().double()}, {"": b.cpu().double()}, 1e-5)
    assert len(launches) == 4


def test_what_they_leave_to_the_other_kernels(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k), grad = latents(1, 40), normal(1, 1, 128, 512, seed=4, dtype=torch.float16)
    assert kernels.serves(q, k, grad)
    assert not kernels.serves(q[:, :, :64], k, grad[:, :, :64])
    moved = torch.empty(grad.numel() + 1, dtype=grad.dtype)[1:].view_as(grad)  # which the copy engine can't fetch
    odd = torch.cat((k, k[..., :8]), -1)[..., :576]  # rows of which Triton doesn't know how they lie
    assert not kernels.serves(q, k, moved) and not kernels.serves(q, odd, grad)
    indices = random_indices(1, 1, 1, 20, 40, holes=False)
    wanted = results("reference", q, k, indices)
    with deterministic():
        check(results("triton", q, k, indices), wanted, HALVES[q.dtype])
    monkeypatch.setattr(latent, "gluon", lambda device: False)
    check(results("triton", q, k, indices), wanted, HALVES[q.dtype])
    assert not launches
