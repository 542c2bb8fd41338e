"""The attention kernels against the reference: in Triton's interpreter (float32), or on a GPU where there is one."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import attention_inputs, deterministic, normal, random_indices, random_interval
from torch import Tensor

import skim
from skim.ops.attend import union
from skim.selection import Selection

kernels = pytest.importorskip("skim.ops.attend.triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gradients(impl: str, leaves: list[Tensor], sink: Tensor | None, seed: int = 5, **reads: object) -> list[Tensor]:
    """out, lse and the gradients of q, k, (v) and sink through both; the reference in float64."""
    dtype = torch.float64 if impl == "reference" else torch.float32
    device = "cpu" if impl == "reference" else DEVICE
    inputs = [x.to(device, dtype).requires_grad_() for x in leaves]
    last = None if sink is None else sink.to(device, dtype).requires_grad_()
    reads = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in reads.items()}
    function = skim.attend if "indices" in reads else skim.attend_dense
    out, lse = function(*inputs, sink=last, impl=impl, **reads)
    seen = lse.isfinite()
    loss = (out * normal(*out.shape, seed=seed).to(out)).sum() + (lse[seen] * normal(*lse.shape, seed=seed + 1).to(lse)[seen]).sum()
    grads = torch.autograd.grad(loss, inputs + ([] if last is None else [last]))
    return [x.detach().cpu().double() for x in (out, lse, *grads)]


def check(leaves: list[Tensor], sink: Tensor | None = None, tolerance: float = 1e-5, **reads: object) -> None:
    wanted = gradients("reference", leaves, sink, **reads)
    found = gradients("triton", leaves, sink, **reads)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv or dsink", "dsink"), found, wanted):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), name
        scale = b[finite].norm() + 1e-30
        assert float((a[finite] - b[finite]).norm() / scale) < tolerance, name


def neighbouring(B: int, T: int, R: int, K: int, S: int, seed: int = 0) -> Tensor:
    """int32 [B, T, R, K]: rows of 16 neighbours share most of what they select; -1 behind, in no order."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(B, -(-T // 16), R, S, generator=generator).repeat_interleave(16, 1)[:, :T] + 0.1 * torch.rand(B, T, R, S, generator=generator)
    return scores.topk(min(K, S), -1).indices.to(torch.int32)


@pytest.fixture
def one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs fill the card, so that queries share unions."""
    monkeypatch.setattr(kernels, "processors", lambda device: 1)


@pytest.mark.usefixtures("one_processor")
@pytest.mark.parametrize(
    ("H", "G", "R", "D", "V"),
    [(4, 2, 1, 16, 16), (3, 3, 3, 32, 16), (17, 1, 1, 16, 8), (9, 3, 1, 24, 16), (6, 2, 2, 80, 48), (2, 1, 1, 8, 5), (40, 1, 1, 16, 16)],
)
def test_shared_selections(H: int, G: int, R: int, D: int, V: int) -> None:
    leaves = list(attention_inputs(B=2, T=35, S=50, H=H, G=G, D=D, V=V))
    check(leaves, indices=neighbouring(2, 35, R, 13, 50))


@pytest.mark.usefixtures("one_processor")
def test_selections_that_share_nothing_take_the_other_kernel_and_give_the_same() -> None:
    leaves = list(attention_inputs(B=2, T=35, S=300, H=4, G=2, D=16, V=16))
    indices = random_indices(2, 35, 1, 13, 300)
    sizes = torch.cat([counts.flatten() for *_, counts in union.unions(indices.contiguous().to(DEVICE), 300, 16, 1)])
    assert sizes.min() <= kernels.LARGEST_UNION * 16 * 13 < sizes.max()  # both kernels have work
    check(leaves, indices=indices)


@pytest.mark.parametrize("most", (None, 200))
def test_unions_of_more_keys_than_are_marked_at_a_time(most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(union, "MARKS", 4096)
    S, tile, K = 9000, 4, 70
    indices = random_indices(1, 10, 2, K, S, holes=True)
    indices[0, 4:8, 1] = -1
    for part, *found in union.unions(indices.to(DEVICE), S, tile, 1, most):
        for n, r in product(range(part.start, part.stop), range(2)):
            readers: dict[int, int] = {}
            for i, row in enumerate(indices[0, tile * n : tile * n + tile, r].tolist()):
                readers |= {key: readers.get(key, 0) | 1 << i for key in row if key >= 0}
            keys, bits, count = (x[n - part.start, r].tolist() for x in found)
            wanted = sorted(readers.items())[:most]
            assert list(zip(keys, bits))[: min(count, len(keys))] == wanted
            assert count == len(readers) or most is not None and most < count <= len(readers)


@pytest.mark.usefixtures("one_processor")
def test_holes_and_empty_rows() -> None:
    check(list(attention_inputs(T=33, S=50, H=6, G=2, D=16, V=16)), sink=normal(6, seed=9), indices=random_indices(2, 33, 1, 20, 50))


@pytest.mark.parametrize("sink", (None, normal(6, seed=9)))
def test_one_query_a_program_with_splits(sink: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "processors", lambda device: 64)
    monkeypatch.setattr(kernels, "_splits", lambda programs, walk, block_k, device: 3)
    check(list(attention_inputs(T=3, S=200, H=6, G=2, D=16, V=16)), sink=sink, indices=random_indices(2, 3, 1, 150, 200, holes=True))


@pytest.mark.parametrize("sink", (None, normal(6, seed=9)))
def test_values_inside_keys(sink: Tensor | None) -> None:
    q, k, _ = attention_inputs(T=9, S=40, H=6, G=1, D=40, V=32)
    for V in (32, 20):  # the first power of two is read once, others again
        check([q, k], sink=sink, indices=random_indices(2, 9, 1, 20, 40), v_channels=V, v=None)
        check([q, k], sink=sink, v_channels=V, v=None)


@pytest.mark.parametrize(("H", "G", "D", "V"), [(4, 2, 16, 16), (9, 3, 24, 8), (17, 1, 16, 16), (40, 2, 16, 16)])
def test_intervals(H: int, G: int, D: int, V: int) -> None:
    start, end = random_interval(2, 35, 50)
    check(list(attention_inputs(T=35, S=50, H=H, G=G, D=D, V=V)), sink=normal(H, seed=3), start=start, end=end)


def test_intervals_that_reach_beyond_the_keys() -> None:
    start = torch.tensor([[0, -2, 4, 5, -3]], dtype=torch.int32)
    end = torch.tensor([[7, 9, 40, 7, -1]], dtype=torch.int32)
    check(list(attention_inputs(1, 5, 5)), start=start, end=end)


def test_causal_and_split_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    check(list(attention_inputs(T=35, S=50, H=4, G=2, D=16, V=16)))
    monkeypatch.setattr(kernels, "_splits", lambda programs, walk, block_k, device: 3)
    check(list(attention_inputs(T=2, S=300, H=4, G=2, D=16, V=16)), sink=normal(4, seed=3))


@pytest.mark.usefixtures("one_processor")
def test_unread_keys_may_hold_nan() -> None:
    q, k, v = attention_inputs(B=1, T=20, S=50, H=4, G=2, D=16, V=16)
    indices = neighbouring(1, 20, 1, 13, 40)
    clean = gradients("triton", [q, k, v], None, indices=indices)
    k, v = k.clone(), v.clone()
    k[:, 40:], v[:, 40:] = torch.nan, torch.nan
    for a, b in zip(clean, gradients("triton", [q, k, v], None, indices=indices)):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("one_processor")
def test_what_a_padded_query_holds_stays_with_it() -> None:
    q, k, v = attention_inputs(B=1, T=20, S=50, H=4, G=2, D=16, V=16)
    indices = neighbouring(1, 20, 1, 13, 50)
    indices[:, 7] = -1
    clean = gradients("triton", [q, k, v], None, indices=indices)
    q = q.clone()
    q[:, 7] = torch.nan
    for a, b in zip(clean, gradients("triton", [q, k, v], None, indices=indices)):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("one_processor")
def test_deterministic_sums_are_the_same_in_any_order() -> None:
    leaves = list(attention_inputs(B=2, T=35, S=50, H=4, G=2, D=16, V=16))
    with deterministic():
        check(leaves, sink=normal(4, seed=3), indices=neighbouring(2, 35, 1, 13, 50))


@pytest.mark.usefixtures("one_processor")
def test_strided_inputs() -> None:
    q, k, v = attention_inputs(B=2, T=20, S=50, H=4, G=2, D=16, V=16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    indices = neighbouring(2, 20, 1, 13, 50)
    for a, b in zip(gradients("triton", [q, k, v], None, indices=indices), gradients("triton", strided, None, indices=indices)):
        assert torch.equal(a, b)


def test_no_keys_no_queries() -> None:
    q, k, v = (x.to(DEVICE) for x in attention_inputs(B=1, T=3, S=5, H=4, G=2, D=16, V=16))
    out, lse = skim.attend(q, k[:, :0], v[:, :0], indices=torch.full((1, 3, 1, 4), -1, dtype=torch.int32, device=DEVICE), impl="triton")
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert skim.attend_dense(q[:, :0], k, v, impl="triton")[0].shape == (1, 0, 4, 16)


def test_float64_is_refused_by_name() -> None:
    q, k, v = (x.to(DEVICE) for x in attention_inputs(dtype=torch.float64))
    selection = Selection.from_indices(random_indices(2, 33, 1, 4, 50).to(DEVICE))
    with pytest.raises(ValueError, match="float64"):
        skim.attend(q, k, v, selection, impl="triton")


@pytest.mark.usefixtures("one_processor")
def test_deterministic_sums_where_values_lie_inside_keys() -> None:
    q, k, _ = attention_inputs(T=9, S=40, H=6, G=1, D=16, V=16)
    with deterministic():
        check([q, k], indices=random_indices(2, 9, 1, 20, 40), v_channels=16, v=None)
        check([torch.zeros_like(q), k], indices=random_indices(2, 9, 1, 20, 40), v_channels=16, v=None)


def test_keys_that_no_query_reads_may_hold_nan_beside_others() -> None:
    q, k, v = attention_inputs(B=1, T=35, S=50, H=4, G=2, D=16, V=16)
    start, end = torch.full((1, 35), 3, dtype=torch.int32), torch.full((1, 35), 38, dtype=torch.int32)
    clean = gradients("triton", [q, k, v], None, start=start, end=end)
    k, v = k.clone(), v.clone()
    for x in (k, v):
        x[:, :3], x[:, 38:] = torch.nan, torch.nan
    for a, b in zip(clean, gradients("triton", [q, k, v], None, start=start, end=end)):
        assert torch.equal(a, b)


def test_an_empty_row_gives_zero_whatever_its_neighbours_read() -> None:
    q, k, v = (x.to(DEVICE) for x in attention_inputs(B=1, T=8, S=20, H=4, G=2, D=16, V=16))
    v[:, 5] = torch.nan
    start, end = torch.zeros(1, 8, dtype=torch.int32, device=DEVICE), torch.full((1, 8), 10, dtype=torch.int32, device=DEVICE)
    end[:, 3] = 0
    out, _ = skim.attend_dense(q, k, v, start=start, end=end, impl="triton")
    assert (out[:, 3] == 0).all() and out[:, 2].isnan().any()


def test_a_sink_that_takes_everything_leaves_finite_gradients() -> None:
    leaves = list(attention_inputs(B=1, T=9, S=30, H=4, G=2, D=16, V=16))
    found = gradients("triton", leaves, torch.full((4,), 200.0), indices=random_indices(1, 9, 1, 10, 30, holes=False))
    assert all(x.isfinite().all() for x in found)


def test_a_strided_sink_is_read_as_it_is() -> None:
    leaves, sink = list(attention_inputs(B=1, T=9, S=30, H=4, G=2, D=16, V=16)), normal(8, seed=3)
    indices = random_indices(1, 9, 1, 10, 30, holes=False)
    inputs, sink = [x.to(DEVICE) for x in leaves], sink.to(DEVICE)[::2]
    a, b = (skim.attend(*inputs, indices=indices.to(DEVICE), sink=x, impl="triton")[0] for x in (sink, sink.contiguous()))
    assert torch.equal(a, b)
