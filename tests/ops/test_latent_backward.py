"""The gradients of attention over latents by Triton's kernels: in its interpreter, or on a GPU of sm_90 where there is one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cases import KERNELS, deterministic, normal, random_indices
from test_compiled import SHARED, found
from torch import Tensor

import skim

kernels = pytest.importorskip("skim.ops.attend.triton", reason="Triton is not installed")
latent = pytest.importorskip("skim.ops.attend.latent_backward")
Results = dict[str, Tensor]
EXACT = KERNELS == "cpu"  # the interpreter multiplies float32
DTYPE, TOLERANCE = (torch.float32, 1e-5) if EXACT else (torch.bfloat16, 1e-2)
pytestmark = pytest.mark.skipif(not EXACT and torch.cuda.get_device_capability() != (9, 0), reason="these kernels are for sm_90")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries of calls that these kernels serve; float32 as well, which the interpreter multiplies exactly."""
    calls: list[Tensor] = []
    gradients, serves = latent.gradients, latent.serves

    def counted(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        calls.append(q)
        return gradients(q, *args)

    monkeypatch.setattr(latent, "gluon", lambda device: False)
    monkeypatch.setattr(latent, "gradients", counted)
    monkeypatch.setattr(latent, "serves", lambda q, *args: serves(q.to(torch.float16), *args))
    return calls


def results(impl: str, q: Tensor, k: Tensor, indices: Tensor, sink: Tensor | None = None, workspace_mb: int | None = None) -> Results:
    """The gradients of q, k and sink through out and lse; the reference in float64."""
    device, dtype = ("cpu", torch.float64) if impl == "reference" else (KERNELS, q.dtype)
    leaves = {name: x.to(device, dtype, copy=True).requires_grad_() for name, x in (("q", q), ("k", k), ("sink", sink)) if x is not None}
    reads = {"indices": indices.to(device), "v_channels": 512, "impl": impl, "workspace_mb": workspace_mb}
    out, lse = skim.attend(leaves["q"], leaves["k"], sink=leaves.get("sink"), **reads)
    seen = lse.isfinite()
    loss = (out * normal(*out.shape, seed=5).to(out)).sum() + (lse[seen] * normal(*lse.shape, seed=6).to(lse)[seen]).sum()
    return {name: x.detach().cpu().double() for name, x in zip(leaves, torch.autograd.grad(loss, list(leaves.values())))}


def check(found: Results, wanted: Results, tolerance: float = TOLERANCE) -> None:
    for name, x in wanted.items():
        assert found[name].isfinite().all(), name
        assert float((found[name] - x).norm() / x.norm()) < tolerance, name


def latents(T: int, S: int, H: int = 64, D: int = 576, B: int = 1) -> tuple[Tensor, Tensor]:
    return normal(B, T, H, D, seed=1, dtype=DTYPE), normal(B, S, 1, D, seed=2, dtype=DTYPE)


@pytest.mark.parametrize(("H", "D"), [(64, 576), (128, 576), (192, 512)])
def test_gradients_are_those_of_the_reference(H: int, D: int, served: list[Tensor]) -> None:
    q, k = latents(3, 200, H, D)
    indices, sink = random_indices(1, 3, 1, 150, 200, holes=False), normal(H, seed=3)
    check(results("triton", q, k, indices, sink), results("reference", q, k, indices, sink))
    assert len(served) == 1


def test_rows_of_any_length_with_holes_and_without_keys(served: list[Tensor]) -> None:
    """Two rows of the batch; blocks of 128 keys that are full, cut short, empty in the middle and behind the last key."""
    q, k = latents(3, 300, B=2)
    indices = random_indices(2, 3, 1, 290, 300, holes=False)
    indices[0, 0, 0, 128:256] = -1
    indices[0, 1, 0, 1:] = -1
    indices[0, 2] = -1
    indices[1, 0, 0, ::2] = -1
    indices[1, 1, 0, 129:] = -1
    found = results("triton", q, k, indices)
    check(found, results("reference", q, k, indices))
    assert found["q"][0, 2].count_nonzero() == 0
    assert len(served) == 1


def test_unread_keys_and_queries_that_read_nothing_may_hold_nan(served: list[Tensor]) -> None:
    q, k = latents(3, 150)
    indices = random_indices(1, 3, 1, 60, 100, holes=False)
    indices[0, 1] = -1
    indices[0, 2, 0, ::3] = -1
    clean = results("triton", q, k, indices)
    q[:, 1], k[:, 100:] = math.nan, math.nan
    check(results("triton", q, k, indices), clean)
    assert len(served) == 2


def test_chunks_stay_in_the_workspace(served: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = latents(19, 80)
    indices = random_indices(1, 19, 1, 70, 80, holes=False)
    wanted = results("reference", q, k, indices)
    sizes: list[tuple[int, ...]] = []
    new_empty = Tensor.new_empty

    def noted(x: Tensor, *size: int, **options: object) -> Tensor:
        sizes.append(size)
        return new_empty(x, *size, **options)

    monkeypatch.setattr(Tensor, "new_empty", noted)
    check(results("triton", q, k, indices, workspace_mb=1), wanted)
    held = [math.prod(size) * q.element_size() for size in sizes if len(size) == 4 and size[0] == 2]
    assert 0 < max(held) <= 1 << 20


def test_strided_inputs(served: list[Tensor]) -> None:
    q, k = latents(3, 100, 64)
    indices = random_indices(1, 3, 1, 70, 100, holes=False)
    strided = torch.cat((q, q), 1).transpose(1, 2).contiguous().transpose(1, 2)[:, :3], torch.cat((k, k), 3)[..., :576]
    check(results("triton", *strided, indices), results("triton", q, k, indices))
    assert len(served) == 2


def test_float16() -> None:
    q, k = (x.to(torch.float16) for x in latents(2, 100))
    indices = random_indices(1, 2, 1, 70, 100, holes=False)
    check(results("triton", q, k, indices), results("reference", q, k, indices), 4e-3)


@pytest.mark.parametrize("why", ["heads", "channels", "float32", "deterministic"])
def test_what_these_kernels_do_not_serve_goes_the_other_way(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    H, D, dtype = 16 if why == "heads" else 64, 528 if why == "channels" else 576, torch.float32 if why == "float32" else torch.float16
    q, k = (x.to(dtype) for x in latents(1, 40, H, D))
    indices = random_indices(1, 1, 1, 20, 40, holes=False)
    monkeypatch.delattr(latent, "gradients")
    if why == "deterministic":
        with deterministic():
            found = results("triton", q, k, indices)
    else:
        found = results("triton", q, k, indices)
    check(found, results("reference", q, k, indices), 4e-3)


@pytest.mark.slow
def test_compiled_kernels_fill_the_matrix_units_and_spill_nothing(tmp_path: Path) -> None:
    kernels = {f"{row['call']} {row['kernel']}": row for row in found(90, ("latent_backward",), tmp_path) if row["products"]}
    assert len(kernels) == 6
    for name, row in kernels.items():
        assert row["matrix_unit"] == "wgmma", name
        assert row["spilled"] == 0, name
        assert row["shared"] <= (SHARED[90] << 10) // (2 if "of_keys" in name else 1), name  # two programs share a processor
        assert row["registers"] <= (128 if "of_keys" in name else 255), name
