"""The alignment kernel against the reference: in Triton's interpreter (float32), or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from cases import attention_inputs, deterministic, index_inputs, random_indices, random_interval, selection_of
from reference_math import error
from torch import Tensor

import skim
from skim.ops.attend import union
from skim.selection import Selection

kernels = pytest.importorskip("skim.ops.align.triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, S = 2, 37, 70


def results(impl: str, q: Tensor, k: Tensor, index: tuple[Tensor, ...], **reads: object) -> list[Tensor]:
    """The loss and its gradients for q_index, k_index and weights; the reference in float64."""
    device = "cpu" if impl == "reference" else DEVICE

    def ours(x: object) -> object:
        if isinstance(x, Selection):
            return Selection(x.indices.to(device), x.counts.to(device))
        if isinstance(x, Tensor):
            return x.to(device, torch.float64 if impl == "reference" and x.is_floating_point() else x.dtype)
        return x

    leaves = [ours(x.detach()).requires_grad_() for x in index]
    loss = skim.align(ours(q), ours(k), *leaves, impl=impl, **{name: ours(x) for name, x in reads.items()})
    (loss * 2.0**12).backward()  # the loss scale that float16 needs
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
    return [loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


def check(q: Tensor, k: Tensor, index: tuple[Tensor, ...], bound: float = 3e-6, **reads: object) -> None:
    for name, found, wanted in zip(("loss", "dq", "dk", "dw"), results("triton", q, k, index, **reads), results("reference", q, k, index, **reads)):
        assert error(found, wanted) < bound, name


SHAPES = [(3, 3, 16, 4, 16), (6, 2, 24, 3, 48), (8, 2, 80, 1, 8), (17, 1, 8, 4, 20), (40, 1, 16, 64, 16)]


@pytest.mark.parametrize(("H", "G", "D", "J", "E"), SHAPES)
def test_intervals(H: int, G: int, D: int, J: int, E: int) -> None:
    start, end = random_interval(B, T, S)
    check(*attention_inputs(B, T, S, H=H, G=G, D=D)[:2], index_inputs(B, T, S, J=J, E=E), start=start, end=end)


@pytest.mark.parametrize(("H", "G", "D", "J", "E"), SHAPES)
def test_selections_with_holes_and_empty_rows(H: int, G: int, D: int, J: int, E: int) -> None:
    selection = Selection.from_indices(random_indices(B, T, 1, 13, S))
    check(*attention_inputs(B, T, S, H=H, G=G, D=D)[:2], index_inputs(B, T, S, J=J, E=E), selection=selection)


@pytest.mark.parametrize(("tiles", "parts"), [(1, 8), (4, 8), (4, 1)])
def test_intervals_some_tiles_at_a_time(tiles: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PARTS", parts)
    monkeypatch.setattr(kernels, "chunks", lambda rows, *sizes: (slice(i, min(i + tiles, rows)) for i in range(0, rows, tiles)))
    start, end = random_interval(B, T, S)
    check(*attention_inputs(B, T, S)[:2], index_inputs(B, T, S), start=start, end=end)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("H", "G", "D"), [(3, 3, 16), (9, 1, 24), (6, 2, 80)])
def test_queries_that_stay_on_the_chip(H: int, G: int, D: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper where they fit; elsewhere they are loaded for every block of keys."""
    plan = kernels._dense
    monkeypatch.setattr(kernels, "_dense", lambda *inputs: plan(*inputs)._replace(kept=kept))
    start, end = random_interval(B, T, S)
    check(*attention_inputs(B, T, S, H=H, G=G, D=D)[:2], index_inputs(B, T, S), start=start, end=end)


@pytest.mark.parametrize(
    ("hardware", "dtype", "H", "G", "D", "kept"),
    [
        (90, torch.bfloat16, 9, 3, 64, True),
        (90, torch.float32, 9, 3, 64, False),
        (90, torch.bfloat16, 32, 2, 128, False),
        (80, torch.bfloat16, 9, 3, 64, False),
    ],
)
def test_which_queries_stay_on_the_chip(
    hardware: int, dtype: torch.dtype, H: int, G: int, D: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "capability", lambda device: hardware)
    monkeypatch.setattr(kernels, "shared_memory", lambda device: 227 << 10)
    shapes = (1, 64, H, D), (1, 256, G, D), (1, 64, 4, 64)
    assert kernels._dense(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)).kept == kept


def test_large_weights_in_float16_stay_finite() -> None:
    q_index, k_index, weights = index_inputs(B, T, S, dtype=torch.float16)
    found = results("triton", *attention_inputs(B, T, S)[:2], (q_index, k_index, weights.float() * 100))
    wanted = results("reference", *attention_inputs(B, T, S)[:2], (q_index, k_index, weights.float() * 100))
    assert all(error(a, b) < 1e-2 for a, b in zip(found, wanted))


def test_intervals_that_reach_beyond_the_keys() -> None:
    start = torch.tensor([[0, -2, 4, 5, -3]], dtype=torch.int32)
    end = torch.tensor([[7, 9, 40, 7, -1]], dtype=torch.int32)
    check(*attention_inputs(1, 5, 5)[:2], index_inputs(1, 5, 5), start=start, end=end)


def test_sums_that_are_made_side_by_side_count_as_workspace() -> None:
    for keys, expected, left in ((2048, 8, 509), (1 << 17, 8, 288), (1 << 18, 5, 256), (1 << 20, 2, 256), (1 << 22, 1, 512)):
        parts, rest = kernels._sums(torch.empty(1, keys, 64, device="meta"), 512)
        assert (tuple(parts.shape), rest) == ((expected, 1, keys, 64), left)


def test_causal() -> None:
    check(*attention_inputs(B, T, S)[:2], index_inputs(B, T, S), scale=0.9)


def test_packed_sequences() -> None:
    start, end = skim.visible(T, T, cu_seqlens=torch.tensor([0, 5, 6, 30, T], dtype=torch.int32))
    check(*attention_inputs(1, T, T)[:2], index_inputs(1, T, T), start=start, end=end)


def test_selections_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(union, "chunks", lambda rows, *sizes: (slice(i, i + 1) for i in range(rows)))
    selection = Selection.from_indices(random_indices(B, T, 1, 13, S))
    check(*attention_inputs(B, T, S)[:2], index_inputs(B, T, S), selection=selection)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_given_lse(sparse: bool) -> None:
    q, k, v = attention_inputs(B, T, S)
    start, end = random_interval(B, T, S)
    selection = Selection.from_indices(random_indices(B, T, 1, 13, S)) if sparse else None
    lse = (skim.attend(q, k, v, selection) if sparse else skim.attend_dense(q, k, v, start=start, end=end))[1]
    check(q, k, index_inputs(B, T, S), start=start, end=end, selection=selection, lse=lse.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("sparse", [False, True])
def test_no_row_that_sees_anything_is_a_loss_of_zero(sparse: bool) -> None:
    nothing = torch.zeros(B, T, dtype=torch.int32)
    selection = Selection.from_indices(torch.full((B, T, 1, 4), -1)) if sparse else None
    found = results("triton", *attention_inputs(B, T, S)[:2], index_inputs(B, T, S), start=nothing, end=nothing, selection=selection)
    assert all(bool((x == 0).all()) for x in found)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_poison_that_no_query_sees_reaches_nothing(sparse: bool, bad: float) -> None:
    start, end = torch.tensor([[1, 1, 3, 20, 22, 22]], dtype=torch.int32), torch.tensor([[4, 10, 3, 25, 30, 22]], dtype=torch.int32)
    selection = selection_of((start, end), 30) if sparse else None
    unread, unseeing = torch.tensor([0, *range(10, 20)]), torch.tensor([2, 5])

    def poisoned(value: float) -> list[Tensor]:
        q, k, q_index, k_index, weights = (x.clone() for x in (*attention_inputs(1, 6, 30)[:2], *index_inputs(1, 6, 30)))
        for keys in (k, k_index):
            keys[:, unread] = value
        for queries in (q, q_index, weights):
            queries[:, unseeing] = value
        return results("triton", q, k, (q_index, k_index, weights), start=start, end=end, selection=selection)

    with deterministic():
        for clean, dirty in zip(poisoned(0.0), poisoned(bad)):
            assert torch.equal(clean, dirty)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("deterministically", [False, True])
def test_a_seen_nan_is_not_lost(sparse: bool, deterministically: bool) -> None:
    q, k, _ = attention_inputs(1, 6, 30)
    selection = Selection.from_indices(random_indices(1, 6, 1, 13, 30)) if sparse else None
    seen = 2 if selection is None else int(selection.indices.max())
    for poison in range(2):
        keys = [k.clone(), index_inputs(1, 6, 30)[1]]
        keys[poison][:, seen] = torch.nan
        q_index, _, weights = index_inputs(1, 6, 30)
        torch.use_deterministic_algorithms(deterministically)
        try:
            loss, _, dk, _ = results("triton", q, keys[0], (q_index, keys[1], weights), selection=selection)
        finally:
            torch.use_deterministic_algorithms(False)
        assert bool(loss.isnan()) and bool(dk.isnan().any())


@pytest.mark.parametrize("sparse", [False, True])
def test_deterministic_sums_are_the_same_in_any_order(sparse: bool) -> None:
    q, k, _ = attention_inputs(B, T, S)
    selection = Selection.from_indices(random_indices(B, T, 1, 13, S)) if sparse else None
    with deterministic():
        check(q, k, index_inputs(B, T, S), selection=selection)
        once, again = (results("triton", q, k, index_inputs(B, T, S), selection=selection) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_strides_and_dtypes_are_free() -> None:
    q, k, q_index, k_index, weights = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*attention_inputs(B, T, S)[:2], *index_inputs(B, T, S))
    )
    check(q, k, (q_index, k_index, weights))
    start, end = (x[:1].expand(B, T) for x in random_interval(B, T, S))
    check(q, k, (q_index.bfloat16(), k_index, weights.half()), bound=3e-3, start=start, end=end)


def test_no_queries_and_no_keys() -> None:
    for t, s in ((0, 5), (3, 0)):
        found = results("triton", *attention_inputs(1, t, s)[:2], index_inputs(1, t, s))
        assert all(bool((x == 0).all()) for x in found)


def test_what_it_refuses() -> None:
    q, k, _ = attention_inputs(1, 3, 9)
    index = index_inputs(1, 3, 9)
    for inputs, message in (((q.double(), k.double(), *index), "float64"), ((q, k, *index_inputs(1, 3, 9, J=512, E=64)), "too large")):
        with pytest.raises(ValueError, match=message):
            skim.align(*(x.to(DEVICE) for x in inputs), impl="triton")
    assert "group" in kernels.refusal("align", (q, k, *index, None, None, None, None, 1.0, "ranks", 32))


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("H", "G", "D", "J", "E"), [(9, 3, 64, 4, 64), (32, 2, 128, 8, 64), (16, 16, 128, 4, 128), (64, 1, 576, 64, 128)])
@pytest.mark.parametrize("dtype, index_dtype", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2])
def test_dtypes_on_a_gpu(dtype: torch.dtype, index_dtype: torch.dtype, H: int, G: int, D: int, J: int, E: int, sparse: bool) -> None:
    q, k, _ = attention_inputs(1, 150, 300, H=H, G=G, D=D, dtype=dtype)
    selection = Selection.from_indices(random_indices(1, 150, 1, 100, 300)) if sparse else None
    bound = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 1e-5}[index_dtype]
    check(q, k, index_inputs(1, 150, 300, J=J, E=E, dtype=index_dtype), bound, selection=selection)
