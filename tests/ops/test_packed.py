"""Attention over latents in 656 bytes: bit for bit what the codec makes of them, then what attention makes of those."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from cases import KERNELS, moved_to, normal, random_indices, random_interval
from torch import Tensor

import skim
from skim.ops import codec
from skim.ops.attend import packed

SCALE = 0.05


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def rows_of(latents: Tensor, scale_format: str = "float32") -> Tensor:
    """uint8 `[..., 656]` of latents `[..., 576]`."""
    values, scale = codec.quantise(latents[..., :512].unflatten(-1, (4, 128)), scale_format=scale_format)
    return codec.pack_latent(values.flatten(-2), scale, latents[..., 512:].bfloat16())


def read_back(rows: Tensor) -> Tensor:
    values, scale, rope = codec.unpack_latent(rows)
    return torch.cat((codec.dequantise(values.unflatten(-1, (4, 128)), scale).flatten(-2), rope.float()), dim=-1)


def found(impl: str, q: Tensor, k: Tensor, **reads: object) -> tuple[Tensor, Tensor]:
    device = KERNELS if impl == "triton" else "cpu"
    reads = {name: moved_to(device, x) for name, x in reads.items()}
    function = skim.attend if "indices" in reads or "selection" in reads else skim.attend_dense
    return moved_to("cpu", function(q.to(device), k.to(device), v_channels=512, scale=SCALE, impl=impl, **reads))


def check(impl: str, q: Tensor, k: Tensor, tolerance: float = 1e-5, keys: Tensor | None = None, **reads: object) -> None:
    """As the reference over unpacked latents in float64."""
    keys = read_back(k) if keys is None else keys
    wanted = found("reference", q.double(), keys.double(), **{name: x.double() if name == "sink" else x for name, x in reads.items()})
    for a, b in zip(found(impl, q, k, **reads), wanted):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite) and torch.equal(a[~finite].double(), b[~finite])
        assert float((a[finite] - b[finite]).norm()) <= tolerance * float(b[finite].norm())


@pytest.mark.parametrize("scale_format", ("float32", "ue8m0"))
@pytest.mark.parametrize("H", (3, 40))
def test_selected_latents(impl: str, H: int, scale_format: str) -> None:
    k = rows_of(normal(2, 90, 1, 576, seed=1), scale_format)
    check(impl, normal(2, 6, H, 576), k, sink=normal(H, seed=3), indices=random_indices(2, 6, 1, 40, 90))


def test_latents_of_an_interval(impl: str) -> None:
    start, end = random_interval(2, 6, 90)
    check(impl, normal(2, 6, 3, 576), rows_of(normal(2, 90, 1, 576, seed=1)), start=start, end=end)


def test_neighbours_that_share_a_union_and_split_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("skim.ops.attend.triton")
    k, q = rows_of(normal(1, 90, 1, 576, seed=1)), normal(1, 7, 4, 576)
    shared = random_indices(1, 1, 1, 40, 90, seed=4, holes=False).expand(1, 7, 1, 40).contiguous()
    monkeypatch.setattr(kernels, "processors", lambda device: 1)
    check("triton", q, k, indices=shared)
    monkeypatch.setattr(kernels, "processors", lambda device: 64)
    monkeypatch.setattr(kernels, "_splits", lambda *sizes: 3)
    check("triton", q, k, sink=normal(4, seed=3), indices=random_indices(1, 7, 1, 80, 90))


def every_code() -> Tensor:
    """Rows `[1, 5, 1, 656]`: all codes that are numbers with large and small scales, two rows; the two codes that are none; zeros."""
    codes = torch.arange(256, dtype=torch.uint8)
    k = torch.zeros(1, 5, 1, 656, dtype=torch.uint8)
    k[:, :2, :, :512] = codes.masked_fill(codes & 0x7F == 0x7F, 0).repeat(2)
    k[0, 2, 0, 5], k[0, 3, 0, 500] = 0x7F, 0xFF
    scales = torch.tensor([[1.0, 2.0**-100, 2.0**100, 0.0], [1e-4, 3.0, 300.0, 1e30], [1.0] * 4, [1.0] * 4])
    k[0, :4, 0, 512:528] = scales.view(torch.uint8)
    return k


ONE_EACH = torch.tensor([0, 1, 2, 3, -1]).view(1, 5, 1, 1)  # a query that reads one key gives its values back


@pytest.mark.parametrize("first", (0, 1000), ids=("instructions", "bit moves"))
def test_trap_every_code_that_is_a_number(impl: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if impl == "triton" and KERNELS == "cpu":
        monkeypatch.setattr(import_module("skim.ops.attend.triton"), "E4M3", first)
    k = every_code()
    out, _ = found(impl, torch.zeros(1, 5, 2, 576), k, indices=ONE_EACH)
    for head in range(2):
        assert torch.equal(out[0, :2, head], read_back(k)[0, :2, 0, :512])


def test_trap_codes_that_are_no_number(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if impl == "triton" and KERNELS == "cpu":
        monkeypatch.setattr(import_module("skim.ops.attend.triton"), "E4M3", 1000)  # Triton's interpreter takes them for numbers, no card does
    out, _ = found(impl, torch.zeros(1, 5, 2, 576), every_code(), indices=ONE_EACH)
    assert bool(out[0, :2].isfinite().all()) and bool(out[0, 2:4].isnan().all()) and bool((out[0, 4] == 0).all())


def test_a_pool_of_scrambled_pages_with_nan_in_slots_that_nobody_reads(impl: str) -> None:
    page, blocks = 16, torch.tensor([[7, 2, 0], [3, 8, 4]])
    latents = normal(2, 3 * page, 576, seed=1)
    pool = torch.full((9, page, 656), 0x7F, dtype=torch.uint8)  # NaN in values, scales and rotated channels
    pool[blocks] = rows_of(latents).unflatten(1, (3, page))
    indices = random_indices(2, 4, 1, 20, 40)
    unread = torch.ones(2, 3 * page, dtype=torch.bool)
    for b in range(2):
        unread[b, indices[b][indices[b] >= 0].long()] = False
        block, place = blocks[b][unread[b].nonzero()[:, 0] // page], unread[b].nonzero()[:, 0] % page
        pool[block, place] = 0x7F
    position = indices.clamp(min=0).flatten(1).long()
    slots = (blocks.gather(1, position // page) * page + position % page).view(indices.shape).int().masked_fill(indices < 0, -1)
    q, shared = normal(2, 4, 3, 576), pool.flatten(0, 1).expand(2, -1, -1)[:, :, None]
    wanted = found("reference", q, read_back(rows_of(latents))[:, :, None], indices=indices)
    for a, b in zip(found(impl, q, shared, indices=slots), wanted):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite) and torch.allclose(a[finite], b[finite], rtol=1e-4, atol=1e-5)


def test_rows_may_lie_apart_at_any_byte(impl: str) -> None:
    k = rows_of(normal(2, 50, 1, 576, seed=1))
    q, indices = normal(2, 3, 4, 576), random_indices(2, 3, 1, 20, 50)
    for first, width in ((16, 688), (3, 661)):
        apart = torch.full((2, 50, 1, width), 0x7F, dtype=torch.uint8)[..., first : first + 656].copy_(k)
        for a, b in zip(found(impl, q, apart, indices=indices), found(impl, q, k, indices=indices)):
            assert torch.equal(a, b)


def test_nothing_to_read(impl: str) -> None:
    k = torch.full((1, 5, 1, 656), 0x7F, dtype=torch.uint8)
    for keys in (k, k[:, :0]):
        out, lse = found(impl, normal(1, 2, 3, 576), keys, indices=torch.full((1, 2, 1, 4), -1, dtype=torch.int32))
        assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_latents_are_rounded_to_the_dtype_of_the_queries(dtype: torch.dtype) -> None:
    k, q, indices = rows_of(normal(1, 60, 1, 576, seed=1)), normal(1, 3, 4, 576, dtype=dtype), random_indices(1, 3, 1, 30, 60)
    expected = found("reference", q, read_back(k).to(dtype), indices=indices)
    for a, b in zip(found("reference", q, k, indices=indices), expected):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_what_packed_latents_refuse() -> None:
    q, k = normal(1, 3, 4, 576), rows_of(normal(1, 20, 1, 576, seed=1))
    reads = {"indices": torch.zeros(1, 3, 1, 1, dtype=torch.int32), "v_channels": 512}
    with pytest.raises(ValueError, match=r"k: expected latents in the dtype of q where gradients flow, got packed ones"):
        skim.attend(q.requires_grad_(), k, **reads)
    with torch.no_grad():
        assert skim.attend(q, k, **reads)[0].shape == (1, 3, 4, 512)
    q = q.detach()
    with pytest.raises(ValueError, match=r"k: expected \[B, S, G, C\] = \(1, 20, 1, 656\), got \(1, 20, 1, 640\)"):
        skim.attend(q, k[..., :640], **reads)
    with pytest.raises(ValueError, match=r"q: expected \[B, T, H, D\] = \(1, 3, 4, 576\), got \(1, 3, 4, 512\)"):
        skim.attend_dense(q[..., :512], k, v_channels=512)
    with pytest.raises(ValueError, match=r"v, v_channels: expected None and 512 with packed latents, got None and 576"):
        skim.attend(q, k, indices=reads["indices"], v_channels=576)
    with pytest.raises(ValueError, match="numba reads no packed latents"):
        skim.attend(q, k, **reads, impl="numba")


def test_compilers_see_one_operator() -> None:
    k, q, indices = rows_of(normal(1, 60, 1, 576, seed=1)), normal(1, 3, 4, 576), random_indices(1, 3, 1, 30, 60)
    operator = torch.ops.skim.attend.default
    torch.library.opcheck(operator, (q, k, None, indices, None, 512, SCALE, 32, "reference"))
    compiled = torch.compile(lambda *x: skim.attend(x[0], x[1], indices=x[2], v_channels=512, scale=SCALE), fullgraph=True, backend="eager")
    for a, b in zip(compiled(q, k, indices), found("reference", q, k, indices=indices)):
        assert torch.equal(a, b)


def test_parts_are_views_of_the_codecs_bytes() -> None:
    rows = rows_of(normal(2, 5, 576))
    for view, copy in zip(packed.parts(rows), codec.unpack_latent(rows)):
        assert torch.equal(view.view(copy.dtype), copy) and view.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    assert torch.equal(packed.unpack(rows, torch.float32), read_back(rows))
