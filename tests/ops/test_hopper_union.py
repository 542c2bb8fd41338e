"""The Gluon kernel over unions of neighbouring selections against the reference: simulated on a CPU, or on an sm_90 GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from cases import normal, random_indices
from torch import Tensor

import skim

kernels = pytest.importorskip("skim.ops.attend.hopper_union", reason="Triton is not installed, or has no Gluon")

from simulated import Simulated  # noqa: E402

from skim.ops.attend import triton as plans  # noqa: E402

REAL = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if REAL else "cpu"


@pytest.fixture(autouse=True)
def simulated_without_a_card(monkeypatch: pytest.MonkeyPatch):
    """Small inputs fill the card, so that queries share unions, however large."""
    monkeypatch.setattr(plans, "processors", lambda device: 1)
    monkeypatch.setattr(plans, "LARGEST_UNION", 1.0)
    if not REAL:
        monkeypatch.setattr(plans, "gluon", lambda device: True)
        monkeypatch.setattr(kernels, "processors", lambda device: 2)
        monkeypatch.setattr(kernels, "forward_unions", Simulated(kernels.forward_unions))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tiles of each launch of the kernel."""
    found: list[int] = []
    launch = kernels.launch

    def counted(*args: object) -> None:
        found.append(args[-1].shape[0])
        launch(*args)

    monkeypatch.setattr(kernels, "launch", counted)
    return found


def inputs(B: int, T: int, S: int, H: int, G: int, D: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(normal(*shape, D, seed=i).to(DEVICE, dtype) for i, shape in enumerate(((B, T, H), (B, S, G), (B, S, G))))


def check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sink: Tensor | None = None, scale: float = 0.1) -> None:
    """out and lse within bf16's rounding of the reference in float64."""
    found = skim.attend(q, k, v, indices=indices.to(DEVICE), scale=scale, sink=sink, impl="triton")
    last = None if sink is None else sink.cpu().double()
    wanted = skim.attend(*(x.cpu().double() for x in (q, k, v)), indices=indices, scale=scale, sink=last, impl="reference")
    assert found[0].dtype == q.dtype and found[1].dtype == torch.float32
    for a, b, tolerance in zip(found, wanted, (3e-3, 1e-6)):
        a, finite = a.cpu().double(), b.isfinite()
        assert torch.equal(a.isfinite(), finite) and torch.equal(a[~finite], b[~finite])
        assert float((a[finite] - b[finite]).norm()) <= tolerance * float(b[finite].norm())


@pytest.mark.parametrize(("H", "G", "R", "D"), [(32, 2, 1, 128), (8, 2, 2, 128), (9, 3, 1, 64), (64, 1, 1, 128), (3, 1, 1, 64)])
def test_any_number_of_heads(H: int, G: int, R: int, D: int, launches: list[int]) -> None:
    check(*inputs(1, 35, 300, H, G, D), random_indices(1, 35, R, 80, 300))
    assert launches


@pytest.mark.parametrize("K", [1, 127, 128, 129, 200])
def test_any_number_of_keys(K: int, launches: list[int]) -> None:
    check(*inputs(1, 24, 300, 32, 2, 128), random_indices(1, 24, 1, K, 300))
    assert launches


def test_a_sink_and_float16(launches: list[int]) -> None:
    check(*inputs(1, 17, 200, 32, 2, 128, torch.float16), random_indices(1, 17, 1, 60, 200), sink=normal(32, seed=5).to(DEVICE))
    assert launches


def test_tiles_that_read_nothing_and_tiles_left_to_the_other_kernel(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    indices = random_indices(1, 64, 1, 32, 300)
    indices[:, 8:16] = -1
    indices[:, 16:32] = indices[:, 16:17]
    monkeypatch.setattr(plans, "LARGEST_UNION", 0.5)
    check(*inputs(1, 64, 300, 32, 2, 64, torch.float16), indices)  # of which Triton's interpreter makes no mistakes
    assert launches


def test_unread_keys_may_hold_nan() -> None:
    q, k, v = inputs(1, 16, 200, 32, 2, 128)
    indices = random_indices(1, 16, 1, 50, 100)
    clean = skim.attend(q, k, v, indices=indices.to(DEVICE), impl="triton")
    k[:, 100:], v[:, 100:] = float("nan"), float("nan")
    for a, b in zip(clean, skim.attend(q, k, v, indices=indices.to(DEVICE), impl="triton")):
        assert torch.equal(a, b)


def test_strided_inputs(launches: list[int]) -> None:
    q, k, v = inputs(2, 16, 200, 32, 2, 128)
    q, k, v = (torch.cat((x, x), -1)[..., 128:].transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    check(q, k, v, random_indices(2, 16, 1, 50, 200))
    assert launches


@pytest.mark.parametrize("D", [64, 128])
def test_what_it_leaves_to_the_other_kernel(D: int) -> None:
    q, k, v = inputs(1, 16, 50, 32, 2, D)
    assert kernels.serves(q, k, v, D, 8)
    assert not kernels.serves(q, k, v[..., :32], 32, 8)
    assert not kernels.serves(q, k, None, D, 8)
    assert not kernels.serves(q.float(), k.float(), v.float(), D, 8)
    assert not kernels.serves(q, k[..., 1:], v, D, 8)
    wide, alone = inputs(1, 16, 50, 32, 2, D + 8)[1][..., :D], torch.as_strided(k, k.shape, (8, *k.stride()[1:]))
    assert not any(kernels.serves(q, x, v, D, 8) for x in (wide, alone))  # rows of which Triton doesn't know how they lie
    assert kernels.serves(q, inputs(1, 16, 50, 32, 2, D + 16)[1][..., :D], v, D, 8)
    assert not kernels.serves(q[:, :, :4], k, v, D, 32)  # two heads in rows for four
