"""Every documented error names the argument, what was expected and what came."""

import pytest
import torch
from cases import attention_inputs, index_inputs, random_indices
from torch import Tensor

from skim.ops import align, attend, attend_dense, codec, index_scores, select
from skim.selection import Selection

B, T, S = 2, 5, 9
Q, K, V = attention_inputs(B, T, S)  # H = 6, G = 2, D = 8, V = 5
Q_INDEX, K_INDEX, WEIGHTS = index_inputs(B, T, S)  # J = 4, E = 16
INDICES = random_indices(B, T, 1, 3, S)
SELECTION = Selection.from_indices(INDICES)
START, END = torch.zeros(B, T, dtype=torch.int32), torch.full((B, T), S, dtype=torch.int32)


def raises(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def on_meta(x: Tensor) -> Tensor:
    return x.to("meta")


BAD_INTERVALS = [
    (dict(start=START), ValueError, r"start, end: expected both or none, got only start"),
    (dict(end=END), ValueError, r"start, end: expected both or none, got only end"),
    (dict(start=START.long(), end=END), TypeError, r"start: expected int32, got torch.int64"),
    (dict(start=START, end=END.float()), TypeError, r"end: expected int32, got torch.float32"),
    (dict(start=START, end=END[:, :3]), ValueError, r"end: expected \[B, T\] = \(2, 5\), got \(2, 3\)"),
    (dict(start=START[0], end=END), ValueError, r"start: expected \[B, T\], got shape \(5,\)"),
    (dict(start=3, end=END), TypeError, r"start: expected a tensor \[B, T\], got int"),
    (dict(start=on_meta(START), end=END), ValueError, r"start: expected device cpu, got meta"),
]


@pytest.mark.parametrize("arguments, error, message", BAD_INTERVALS)
def test_bad_intervals(arguments, error, message):
    for call in (
        lambda: index_scores(Q_INDEX, K_INDEX, WEIGHTS, **arguments),
        lambda: select(Q_INDEX, K_INDEX, WEIGHTS, 3, **arguments),
        lambda: attend_dense(Q, K, V, **arguments),
        lambda: align(Q, K, Q_INDEX, K_INDEX, WEIGHTS, **arguments),
    ):
        raises(call, error, message)


BAD_INDEX_INPUTS = [
    ((None, K_INDEX, WEIGHTS), TypeError, r"q_index: expected a tensor \[B, T, J, E\], got NoneType"),
    ((Q_INDEX[0], K_INDEX, WEIGHTS), ValueError, r"q_index: expected \[B, T, J, E\], got shape \(5, 4, 16\)"),
    ((Q_INDEX, K_INDEX[..., :8], WEIGHTS), ValueError, r"k_index: expected \[B, S, E\] = \(2, 9, 16\), got \(2, 9, 8\)"),
    ((Q_INDEX, K_INDEX[:1], WEIGHTS), ValueError, r"k_index: expected \[B, S, E\] = \(2, 9, 16\), got \(1, 9, 16\)"),
    ((Q_INDEX, K_INDEX[:, :, None], WEIGHTS), ValueError, r"k_index: expected \[B, S, E\], got shape \(2, 9, 1, 16\)"),
    ((Q_INDEX, K_INDEX, WEIGHTS[..., :3]), ValueError, r"weights: expected \[B, T, J\] = \(2, 5, 4\), got \(2, 5, 3\)"),
    ((Q_INDEX, K_INDEX, WEIGHTS.long()), TypeError, r"weights: expected a floating-point dtype of 16 bits or more, got torch.int64"),
    ((Q_INDEX.int(), K_INDEX, WEIGHTS), TypeError, r"q_index: expected a floating-point dtype of 16 bits or more, got torch.int32"),
    ((Q_INDEX, K_INDEX.to(torch.float8_e4m3fn), WEIGHTS), TypeError, r"k_index: expected a floating-point dtype .* got torch.float8_e4m3fn"),
    ((on_meta(Q_INDEX), K_INDEX, WEIGHTS), ValueError, r"q_index: expected device cpu, got meta"),
    ((Q_INDEX, on_meta(K_INDEX), WEIGHTS), ValueError, r"k_index: expected device cpu, got meta"),
]


@pytest.mark.parametrize("inputs, error, message", BAD_INDEX_INPUTS)
def test_bad_index_tensors(inputs, error, message):
    raises(lambda: index_scores(*inputs), error, message)
    raises(lambda: select(*inputs, 3), error, message)
    raises(lambda: align(Q, K, *inputs), error, message)


BAD_FP8 = [
    ((Q_INDEX, torch.ones(B, T, 4)), TypeError, r"q_index: expected \(float8_e4m3fn values, scale\), got torch.float32 values"),
    ((codec.quantise(Q_INDEX)[0], torch.ones(B, T)), ValueError, r"q_index scale: expected \[B, T, J\], got shape \(2, 5\)"),
    ((codec.quantise(Q_INDEX)[0], torch.ones(B, T, 3)), ValueError, r"q_index scale: expected \[B, T, J\] = \(2, 5, 4\), got \(2, 5, 3\)"),
    ((codec.quantise(Q_INDEX)[0], 0.5), TypeError, r"q_index scale: expected a tensor \[B, T, J\], got float"),
    ((codec.quantise(Q_INDEX)[0],), TypeError, r"q_index: expected a tensor or a pair \(values, scale\), got a tuple of 1"),
    ((codec.quantise(Q_INDEX)[0], torch.ones(B, T, 4, dtype=torch.int32)), TypeError, r"q_index scale: expected a floating-point dtype"),
    ((codec.quantise(Q_INDEX)[0], torch.ones(B, T, 4, device="meta")), ValueError, r"q_index scale: expected device cpu, got meta"),
]


@pytest.mark.parametrize("q_index, error, message", BAD_FP8)
def test_bad_fp8_pairs(q_index, error, message):
    raises(lambda: index_scores(q_index, K_INDEX, WEIGHTS), error, message)
    raises(lambda: select(q_index, K_INDEX, WEIGHTS, 3), error, message)


BAD_SELECT = [
    (dict(budget=0), r"budget: expected an int >= 1, got 0"),
    (dict(budget=2.0), r"budget: expected an int >= 1, got 2.0"),
    (dict(budget=True), r"budget: expected an int >= 1, got True"),
    (dict(budget=3, keep_first=2, keep_recent=2), r"keep_first, keep_recent: expected a sum of 0 to 3 \(the budget\), got 2 and 2"),
    (dict(budget=3, keep_first=-1), r"keep_first, keep_recent: expected a sum of 0 to 3 \(the budget\), got -1 and 0"),
    (dict(budget=3, workspace_mb=0), r"workspace_mb: expected MiB >= 1, got 0"),
]


@pytest.mark.parametrize("arguments, message", BAD_SELECT)
def test_bad_budgets(arguments, message):
    raises(lambda: select(Q_INDEX, K_INDEX, WEIGHTS, **arguments), ValueError, message)


def test_weights_of_R_selections_need_R():
    five_axes = Q_INDEX[:, :, None].expand(-1, -1, 3, -1, -1)
    raises(lambda: select(five_axes, K_INDEX, WEIGHTS, 3), ValueError, r"weights: expected \[B, T, R, J\], got shape \(2, 5, 4\)")
    raises(
        lambda: select(five_axes, K_INDEX, WEIGHTS[:, :, None].expand(-1, -1, 2, -1), 3),
        ValueError,
        r"weights: expected \[B, T, R, J\] = \(2, 5, 3, 4\), got \(2, 5, 2, 4\)",
    )


BAD_ATTENTION = [
    (dict(q=None), TypeError, r"q: expected a tensor \[B, T, H, D\], got NoneType"),
    (dict(q=Q[0]), ValueError, r"q: expected \[B, T, H, D\], got shape \(5, 6, 8\)"),
    (dict(q=Q.int()), TypeError, r"q: expected a floating-point dtype of 16 bits or more, got torch.int32"),
    (dict(q=Q[:, :, :5]), ValueError, r"q: expected a number of heads that the 2 key heads divide, got 5"),
    (dict(k=K[..., :4]), ValueError, r"k: expected \[B, S, G, D\] = \(2, 9, 2, 8\), got \(2, 9, 2, 4\)"),
    (dict(k=K[:1]), ValueError, r"k: expected \[B, S, G, D\] = \(2, 9, 2, 8\), got \(1, 9, 2, 8\)"),
    (dict(k=K.double()), TypeError, r"k: expected the dtype of q, torch.float32, got torch.float64"),
    (dict(k=on_meta(K)), ValueError, r"k: expected device cpu, got meta"),
]
BAD_VALUES = [
    (dict(v=V[:, :4]), ValueError, r"v: expected \[B, S, G, V\] = \(2, 9, 2, 5\), got \(2, 4, 2, 5\)"),
    (dict(v=V.bfloat16()), TypeError, r"v: expected the dtype of q, torch.float32, got torch.bfloat16"),
    (dict(v=on_meta(V)), ValueError, r"v: expected device cpu, got meta"),
    (dict(v=V[..., 0]), ValueError, r"v: expected \[B, S, G, V\], got shape \(2, 9, 2\)"),
    (dict(v=None), ValueError, r"v_channels: expected 1 to 8 where v is None .*, got None"),
    (dict(v=None, v_channels=9), ValueError, r"v_channels: expected 1 to 8 where v is None .*, got 9"),
    (dict(v=None, v_channels=0), ValueError, r"v_channels: expected 1 to 8 where v is None .*, got 0"),
    (dict(v_channels=5), ValueError, r"v_channels: expected None where v is given, got 5"),
    (dict(sink=torch.zeros(5)), ValueError, r"sink: expected \[H\] = \(6,\), got \(5,\)"),
    (dict(sink=1.0), TypeError, r"sink: expected a tensor \[H\], got float"),
    (dict(sink=torch.zeros(6, device="meta")), ValueError, r"sink: expected device cpu, got meta"),
    (dict(workspace_mb=0), ValueError, r"workspace_mb: expected MiB >= 1, got 0"),
]


@pytest.mark.parametrize("arguments, error, message", BAD_ATTENTION + BAD_VALUES)
def test_bad_attention_tensors(arguments, error, message):
    inputs = {"q": Q, "k": K, "v": V, **arguments}
    raises(lambda: attend(**inputs, selection=SELECTION), error, message)
    raises(lambda: attend_dense(**inputs), error, message)


@pytest.mark.parametrize("arguments, error, message", BAD_ATTENTION)
def test_bad_teachers(arguments, error, message):
    raises(lambda: align(**{"q": Q, "k": K, **arguments}, q_index=Q_INDEX, k_index=K_INDEX, weights=WEIGHTS), error, message)


BAD_SELECTIONS = [
    (dict(), ValueError, r"selection, indices: expected exactly one of them"),
    (dict(selection=SELECTION, indices=INDICES), ValueError, r"selection, indices: expected exactly one of them"),
    (dict(selection=INDICES), TypeError, r"selection: expected a Selection .*, got Tensor"),
    (dict(selection=SELECTION, counts=SELECTION.counts), ValueError, r"counts: expected None where a selection is given"),
    (dict(indices=INDICES[:, :, 0]), ValueError, r"indices: expected \[B, T, R, K\], got shape \(2, 5, 3\)"),
    (dict(indices=[[0]]), TypeError, r"indices: expected a tensor \[B, T, R, K\], got list"),
    (dict(indices=INDICES[:1]), ValueError, r"indices: expected \[B, T, R, K\] = \[2, 5, a divisor of 2, K\], got \(1, 5, 1, 3\)"),
    (dict(indices=INDICES.expand(-1, -1, 3, -1)), ValueError, r"indices: expected .* a divisor of 2, K\], got \(2, 5, 3, 3\)"),
    (dict(indices=INDICES[:, :, :0]), ValueError, r"indices: expected .* a divisor of 2, K\], got \(2, 5, 0, 3\)"),
    (dict(indices=INDICES.float()), TypeError, r"indices: expected int32 or int64, got torch.float32"),
    (dict(indices=on_meta(INDICES)), ValueError, r"indices: expected device cpu, got meta"),
    (dict(indices=INDICES, counts=SELECTION.counts[..., 0]), ValueError, r"counts: expected \[B, T, R\], got shape \(2, 5\)"),
    (dict(indices=INDICES, counts=SELECTION.counts[:1]), ValueError, r"counts: expected \[B, T, R\] = \(2, 5, 1\), got \(1, 5, 1\)"),
    (dict(indices=INDICES, counts=SELECTION.counts.float()), TypeError, r"counts: expected int32 or int64, got torch.float32"),
    (dict(indices=INDICES, counts=on_meta(SELECTION.counts)), ValueError, r"counts: expected device cpu, got meta"),
]


@pytest.mark.parametrize("arguments, error, message", BAD_SELECTIONS)
def test_bad_selections(arguments, error, message):
    raises(lambda: attend(Q, K, V, **arguments), error, message)


def test_an_index_behind_the_last_key_raises():
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        attend(Q, K, V, indices=torch.full((B, T, 1, 2), S))


BAD_ALIGN = [
    (dict(q_index=Q_INDEX[:, :4], weights=WEIGHTS[:, :4]), ValueError, r"q_index: expected \[B, T, J, E\] = \(2, 5, 4, 16\), got \(2, 4, 4, 16\)"),
    (dict(k_index=K_INDEX[:, :8]), ValueError, r"k_index: expected \[B, S, E\] = \(2, 9, 16\), got \(2, 8, 16\)"),
    (dict(q_index=codec.quantise(Q_INDEX)), TypeError, r"q_index, k_index: expected unquantised tensors .*, got FP8"),
    (dict(k_index=codec.quantise(K_INDEX)), TypeError, r"q_index, k_index: expected unquantised tensors .*, got FP8"),
    (dict(selection=INDICES), TypeError, r"selection: expected a Selection .*, got Tensor"),
    (
        dict(selection=Selection.from_indices(INDICES.expand(-1, -1, 2, -1))),
        ValueError,
        r"selection: expected indices \[B, T, 1, K\] = \[2, 5, 1, K\], got \(2, 5, 2, 3\)",
    ),
    (dict(selection=Selection(on_meta(INDICES), on_meta(SELECTION.counts))), ValueError, r"selection: expected device cpu, got meta"),
    (dict(lse=torch.zeros(B, T, 5)), ValueError, r"lse: expected \[B, T, H\] = \(2, 5, 6\), got \(2, 5, 5\)"),
    (dict(lse=torch.zeros(B, T)), ValueError, r"lse: expected \[B, T, H\], got shape \(2, 5\)"),
    (dict(lse=0.0), TypeError, r"lse: expected a tensor \[B, T, H\], got float"),
    (dict(lse=torch.zeros(B, T, 6, device="meta")), ValueError, r"lse: expected device cpu, got meta"),
    (dict(workspace_mb=0), ValueError, r"workspace_mb: expected MiB >= 1, got 0"),
]


@pytest.mark.parametrize("arguments, error, message", BAD_ALIGN)
def test_bad_alignments(arguments, error, message):
    raises(lambda: align(Q, K, **{"q_index": Q_INDEX, "k_index": K_INDEX, "weights": WEIGHTS, **arguments}), error, message)
