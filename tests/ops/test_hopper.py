"""The Gluon kernels against the reference: simulated on a CPU, or on an sm_90 GPU where there is one; and what they refuse."""

from __future__ import annotations

import pytest
import torch
from cases import normal, random_indices, random_interval
from torch import Tensor

import skim

kernels = pytest.importorskip("skim.ops.attend.hopper", reason="Triton is not installed, or has no Gluon")

from simulated import Simulated  # noqa: E402

from skim.ops import codec, dispatch  # noqa: E402
from skim.ops.attend import packed  # noqa: E402

REAL = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if REAL else "cpu"
T = 320 if REAL else 7  # on a card as many programs as it wants


@pytest.fixture(autouse=True)
def simulated_without_a_card(monkeypatch: pytest.MonkeyPatch):
    if not REAL:
        dispatch._module.cache_clear()
        monkeypatch.setattr(dispatch, "_without_hopper", lambda device_type, index: None)
        monkeypatch.setattr(kernels, "forward", Simulated(kernels.forward))
    yield
    dispatch._module.cache_clear()


def latents(B: int, H: int, D: int, S: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return normal(B, T, H, D, seed=1).to(DEVICE, dtype), normal(B, S, 1, D, seed=2).to(DEVICE, dtype)


def attend(q: Tensor, k: Tensor, indices: Tensor, impl: str = "hopper", **options: object) -> tuple[Tensor, Tensor]:
    return skim.attend(q, k, indices=indices.to(q.device), v_channels=512, scale=0.05, impl=impl, **options)


def check(q: Tensor, k: Tensor, indices: Tensor, sink: Tensor | None = None, **options: Tensor) -> None:
    """out and lse within bf16's rounding of the reference in float64."""
    found = attend(q, k, indices, sink=sink, **options)
    last = None if sink is None else sink.cpu().double()
    wanted = attend(q.cpu().double(), precise(k), indices, "reference", sink=last, **{name: x.cpu() for name, x in options.items()})
    compare(q, found, wanted)


def precise(k: Tensor) -> Tensor:
    """Latents in float64, packed ones as bfloat16 holds them."""
    return (packed.unpack(k.cpu(), torch.bfloat16) if packed.is_packed(k) else k.cpu()).double()


def compare(q: Tensor, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert found[0].dtype == q.dtype and found[1].dtype == torch.float32
    for a, b, tolerance in zip(found, wanted, (3e-3, 1e-6)):
        a, finite = a.cpu().double(), b.isfinite()
        assert torch.equal(a.isfinite(), finite) and torch.equal(a[~finite], b[~finite])
        assert float((a[finite] - b[finite]).norm()) <= tolerance * float(b[finite].norm())


def check_dense(q: Tensor, k: Tensor, start: Tensor, end: Tensor, sink: Tensor | None = None) -> None:
    options = {"v_channels": 512, "scale": 0.05}
    found = skim.attend_dense(q, k, start=start.to(q.device), end=end.to(q.device), sink=sink, impl="hopper", **options)
    last = None if sink is None else sink.cpu().double()
    compare(q, found, skim.attend_dense(q.cpu().double(), precise(k), start=start, end=end, sink=last, impl="reference", **options))


def rows_of(k: Tensor) -> Tensor:
    """uint8 `[..., 656]` of latents `[..., 576]`."""
    values, scale = codec.quantise(k[..., :512].unflatten(-1, (4, 128)))
    return codec.pack_latent(values.flatten(-2), scale, k[..., 512:].bfloat16())


@pytest.mark.parametrize(("H", "D"), [(128, 576), (128, 512), (100, 576), (64, 576), (32, 576), (17, 512), (4, 576)])
def test_any_number_of_heads(H: int, D: int) -> None:
    check(*latents(2, H, D, 300), random_indices(2, T, 1, 150, 300))


@pytest.mark.parametrize("K", (1, 63, 64, 65, 129, 300))
def test_any_budget(K: int) -> None:
    check(*latents(1, 64, 576, 310), random_indices(1, T, 1, K, 310, holes=K > 1))


@pytest.mark.parametrize("H", (64, 16))
@pytest.mark.parametrize("value", (0.0, 3.0, -torch.inf, torch.inf))
def test_sinks(H: int, value: float) -> None:
    sink = normal(H, seed=4).to(DEVICE) + value
    check(*latents(1, H, 576, 300), random_indices(1, T, 1, 100, 300), sink)


def test_counts() -> None:
    q, k = latents(1, 64, 576, 300)
    counts = torch.randint(0, 101, (1, T, 1), dtype=torch.int32)
    check(q, k, random_indices(1, T, 1, 100, 300, holes=False), counts=counts.to(DEVICE))


@pytest.mark.parametrize("processors", (1, 3, 12))
@pytest.mark.parametrize(("B", "H"), [(1, 64), (1, 128), (4, 16)])
@pytest.mark.parametrize("K", (5, 130))
def test_a_program_serves_task_after_task_whatever_the_number_of_programs(B: int, H: int, K: int, processors: int, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "processors", lambda device: processors)
    check(*latents(B, H, 576, 200), random_indices(B, T, 1, K, 200))


def test_tiles_with_nothing_to_read_between_others() -> None:
    indices = random_indices(3, T, 1, 70, 100, holes=False)
    indices[0, :4] = indices[1] = -1
    indices[2, 4:6] = -1
    check(*latents(3, 16, 576, 100), indices)


def test_heads_far_apart() -> None:
    far = (2**31 // 63 // 16 + 1) * 16  # from the first to the last more than 32 bits hold; pages that nobody touches cost nothing
    q, k = latents(1, 64, 576, 100)
    apart = torch.empty(64 * far, dtype=q.dtype, device=DEVICE).as_strided((1, T, 64, 576), (0, 576, far, 1)).copy_(q)
    indices = random_indices(1, T, 1, 70, 100)
    for a, b in zip(attend(q, k, indices), attend(apart, k, indices)):
        assert torch.equal(a, b)


@pytest.fixture(params=[18, 50], ids="{} processors".format)
def idle_processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that the queries don't fill, so that their walks are split."""
    monkeypatch.setattr(kernels, "processors", lambda device: request.param)
    merge = kernels.merge

    def rounded(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None) -> None:
        wide = out.float()
        merge(parts, part_lse, wide, lse, sink)
        out.copy_(wide)

    if not REAL:
        monkeypatch.setattr(kernels, "merge", rounded)  # Triton's interpreter cuts bfloat16 off where a card rounds


@pytest.mark.usefixtures("idle_processors")
@pytest.mark.parametrize(("H", "D"), [(128, 576), (16, 576), (70, 512)])
@pytest.mark.parametrize("packs", (False, True), ids=("bf16", "packed"))
def test_decoding_splits_selections(H: int, D: int, packs: bool) -> None:
    q, k = latents(2, H, D, 400)
    q = q[:, :1]
    if packs and D == 576:
        k = rows_of(k)
    indices = random_indices(2, 2, 1, 330, 400)[:, 1:]
    assert kernels._plan(q, 330, 32).TILE == 1 and kernels._plan(q, 330, 32).SPLITS > 1
    check(q, k, indices, normal(H, seed=4).to(DEVICE))
    check(q, k, torch.full_like(indices, -1))


@pytest.mark.usefixtures("idle_processors")
@pytest.mark.parametrize("packs", (False, True), ids=("bf16", "packed"))
def test_decoding_splits_intervals(packs: bool) -> None:
    q, k = latents(3, 50, 576, 400)
    q, k = q[:, :2], rows_of(k) if packs else k
    start, end = torch.tensor([[0, 3], [390, 70], [5, 0]]).int(), torch.tensor([[400, 260], [399, 71], [5, 400]]).int()
    assert kernels._plan(q, 400, 32).SPLITS > 1
    check_dense(q, k, start, end, normal(50, seed=4).to(DEVICE))


@pytest.mark.parametrize("H", (64, 16))
@pytest.mark.parametrize("packs", (False, True), ids=("bf16", "packed"))
def test_intervals(H: int, packs: bool) -> None:
    q, k = latents(2, H, 576, 200)
    check_dense(q, rows_of(k) if packs else k, *random_interval(2, T, 200))
    start = torch.full((2, T), -3, dtype=torch.int32)  # bounds beyond the keys are those of the keys
    check_dense(q, k, start, torch.arange(200 - T, 200 + T, 2, dtype=torch.int32).clamp(min=0).expand(2, T))


@pytest.mark.parametrize(
    ("queries", "heads", "walk", "splits"),
    [
        ((128, 1), 128, 2048, 1),
        ((128, 2), 128, 2048, 1),
        ((128, 1), 16, 2048, 1),
        ((32, 1), 128, 2048, 2),
        ((32, 1), 128, 131072, 2),
        ((1, 2000), 64, 131072, 1),
    ],
)
def test_walks_are_split_where_that_fills_the_card(queries: tuple[int, int], heads: int, walk: int, splits: int, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    *_, parts = kernels._plan(torch.empty(*queries, heads, 576, device="meta"), walk, 512)
    assert parts == splits


def test_parts_of_walks_fit_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    plans = [kernels._plan(torch.empty(1, 64, 64, 576, device="meta"), 1 << 20, mb).SPLITS for mb in (8, 16, 64)]
    assert plans[0] == 1 and plans[-1] > 1 and all(splits * 64 * 64 * 512 * 4 <= mb << 20 for splits, mb in zip(plans, (8, 16, 64)))


def test_keys_outside_of_intervals_may_hold_nan() -> None:
    q, k = latents(1, 64, 576, 200)
    k[:, :30], k[:, 150:] = torch.nan, torch.nan
    start, end = torch.full((1, T), 30, dtype=torch.int32), torch.full((1, T), 150, dtype=torch.int32)
    found = skim.attend_dense(q, k, start=start.to(DEVICE), end=end.to(DEVICE), v_channels=512, impl="hopper")
    assert all(bool(x.isfinite().all()) for x in found)


@pytest.mark.parametrize("H", (64, 16))
@pytest.mark.parametrize("K", (5, 64, 130))
def test_packed_latents(H: int, K: int) -> None:
    q, k = latents(2, H, 576, 200)
    check(q, rows_of(k), random_indices(2, T, 1, K, 200))


def test_trap_every_code_of_packed_latents() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    k = torch.zeros(1, 5, 1, 656, dtype=torch.uint8)
    k[:, :2, :, :512] = codes.masked_fill(codes & 0x7F == 0x7F, 0).repeat(2)
    k[0, 2, 0, 5], k[0, 3, 0, 500] = 0x7F, 0xFF  # the two codes that are no numbers
    k[0, :4, 0, 512:528] = torch.tensor([[1.0, 2.0**-100, 2.0**100, 0.0], [1e-4, 3.0, 300.0, 1e30], [1.0] * 4, [1.0] * 4]).view(torch.uint8)
    each = torch.tensor([0, 1, 2, 3, -1]).view(1, 5, 1, 1)  # a query that reads one key gives its values back
    out, _ = attend(torch.zeros(1, 5, 64, 576, dtype=torch.bfloat16, device=DEVICE), k.to(DEVICE), each)
    for head in range(64):
        assert torch.equal(out[0, :2, head].cpu(), packed.unpack(k, torch.bfloat16)[0, :2, 0, :512])
    assert bool(out[0, 2, :, 5].isnan().all()) and bool(out[0, 3, :, 500].isnan().all()) and bool((out[0, 4] == 0).all())


def test_a_pool_of_packed_latents_with_nan_in_slots_that_nobody_reads() -> None:
    q, k = latents(2, 64, 576, 200)
    indices = random_indices(2, T, 1, 100, 200)
    pool = torch.full((640, 1, 656), 0x7F, dtype=torch.uint8, device=DEVICE)  # NaN in values, scales and rotated channels
    slots = torch.randperm(640)[:400].view(2, 200)
    read = torch.zeros(2, 200, dtype=torch.bool)
    for b in range(2):
        read[b, indices[b][indices[b] >= 0].long()] = True
    pool[slots[read].to(DEVICE)] = rows_of(k)[read.to(DEVICE)]
    of_pool = slots.gather(1, indices.clamp(min=0).flatten(1).long()).view(indices.shape).int().masked_fill(indices < 0, -1)
    for a, b in zip(attend(q, rows_of(k), indices), attend(q, pool.expand(2, -1, -1, -1), of_pool)):
        assert torch.equal(a, b)


def test_float16() -> None:
    check(*latents(1, 64, 576, 300, torch.float16), random_indices(1, T, 1, 100, 300))


def test_strided_inputs() -> None:
    q = normal(1, 64, T, 592, seed=1).to(DEVICE, torch.bfloat16)[..., 16:].transpose(1, 2)
    k = normal(2, 300, 1, 1024, seed=2).to(DEVICE, torch.bfloat16)[1:, :, :, :576]
    check(q, k, random_indices(1, T, 1, 100, 300))


@pytest.mark.parametrize("H", (64, 16))
def test_unread_keys_may_hold_nan(H: int) -> None:
    q, k = latents(1, H, 576, 300)
    indices = random_indices(1, T, 1, 100, 289)
    indices = torch.where(indices >= 0, indices + 1, -1)  # the first key, which stands in for none, is not read either
    clean = attend(q, k, indices)
    read = torch.zeros(300, dtype=torch.bool)
    read[indices[indices >= 0].long()] = True
    k[:, ~read.to(DEVICE)] = torch.nan
    for a, b in zip(clean, attend(q, k, indices)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("H", (64, 16))
def test_indices_beyond_the_keys_are_none(H: int) -> None:
    q, k = latents(1, H, 576, 300)
    indices = random_indices(1, T, 1, 100, 300)
    beyond = torch.where(indices < 0, 300, indices)
    for a, b in zip(attend(q, k, indices), attend(q, k, beyond)):
        assert torch.equal(a, b)


def test_nothing_selected_gives_zero_and_minus_infinity() -> None:
    q, k = latents(1, 16, 576, 30)
    k[:] = torch.nan
    out, lse = attend(q, k, torch.full((1, T, 1, 70), -1, dtype=torch.int32))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_very_low_scores() -> None:
    q, k = latents(1, 64, 576, 300)
    k[..., :] = -1000 * q[:, :1, :1]  # every score of the first query's first head is about -2 million
    check(q, k, random_indices(1, T, 1, 100, 300))


def test_gradients_come_from_another_implementation() -> None:
    q, k = (x.requires_grad_() for x in latents(1, 64, 576, 100))
    indices = random_indices(1, T, 1, 30, 100).to(DEVICE)
    out, lse = skim.attend(q, k, indices=indices, v_channels=512, impl="auto" if REAL else "hopper")
    if REAL:
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.float().sum() + lse[lse.isfinite()].sum(), (q, k)))
    with pytest.raises(ValueError, match=r"impl: 'hopper' cannot run attend \(attend_backward\) on .*: hopper has forwards only"):
        skim.attend(q, k, indices=indices, v_channels=512, impl="hopper")[0].sum().backward()


def refusal(q: Tensor, k: Tensor, *, v: Tensor | None = None, V: int = 512, scale: float = 0.1) -> str | None:
    return kernels.refusal("attend", (q, k, v, None, V, scale, None, 32))


def test_what_it_takes_and_what_it_refuses() -> None:
    q, k = latents(1, 64, 576, 30)
    assert refusal(q, k) is None
    assert "float32" in refusal(q.float(), k.float())
    for inputs in ({"V": 448}, {"v": k, "V": 576}):
        assert "latents" in refusal(q, k, **inputs)
    assert "latents" in refusal(q, k.expand(-1, -1, 2, -1))
    assert "latents" in refusal(q[..., :320], k[..., :320])
    assert "scale is not positive" in refusal(q, k, scale=-1.0)
    assert "rows of k don't begin" in refusal(q, torch.zeros(1, 30, 1, 580, dtype=q.dtype, device=q.device)[..., :576])
    assert "rows of q don't begin" in refusal(torch.zeros(1, T, 64, 592, dtype=q.dtype, device=q.device)[..., 1:577], k)
    rows = rows_of(k)
    assert refusal(q, rows) is None
    assert "the queries are float16" in refusal(q.half(), rows)
    assert "rows of k don't begin at multiples of 16 bytes" in refusal(q, torch.zeros(1, 30, 1, 661, dtype=torch.uint8, device=q.device)[..., 3:659])
    assert kernels.refusal("attend_dense", (q, k, None, None, None, 512, 0.1, None, 32)) is None
    assert kernels.refusal("attend_backward", ()) == "hopper has forwards only"
