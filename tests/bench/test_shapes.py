"""Odd shapes beside tuned ones: what is compared, and by which operations."""

import pytest
import torch

from skim.bench import shapes
from skim.bench.registry import Heads, Setting, attention_stage, selected_pairs, visible_pairs
from skim.bench.runner import run
from skim.bench.shapes import SHAPES, Shape, operations


def test_every_operator_has_shapes_that_are_none_of_the_tuned():
    assert {operator for operator, _, _ in SHAPES.values()} == {"attend", "score", "select", "align"}
    for _, odd, near in SHAPES.values():
        assert odd.heads != near.heads and any(size & (size - 1) for size in (*odd.heads, odd.V, odd.K))


def test_operations_are_those_of_the_other_cases():
    heads, T, S = Heads(32, 2, 128, 8, 64), 5, 20
    shape = Shape(heads, 128, 7)
    assert operations("attend", shape, T, S) == attention_stage(heads, selected_pairs(T, S, 7), factor=3.5).flops
    assert operations("score", shape, T, S) == operations("select", shape, T, S) == 2 * 8 * 64 * visible_pairs(T, S)
    assert operations("align", shape, T, S) == (4 * 32 * 128 + 8 * 8 * 64) * visible_pairs(T, S)


def test_a_shape_is_compared_by_time_for_an_operation():
    said: list[str] = []
    rows = run(["shapes"], device="cpu", quick=True, report=said.append)["rows"]
    for row in rows:
        counts = [stage["count"] for stage in row["operations"].values()]
        assert row["per_operation"] == pytest.approx(row["ms"] / counts[0] / (row["baseline_ms"] / counts[1]))
    worst = max(row["per_operation"] for row in rows)
    assert said[-1] == f"shapes: at worst {worst:.2f} of a tuned shape's time for an operation"


def test_what_runs_has_the_shape_that_the_label_says():
    problem = shapes.odd_shapes(Setting(64, "attend 40/8 96/56, K=333", torch.device("cpu"), quick=True))
    (q, k, v), selection, grad = problem.inputs[0][0]
    assert (q.shape[2:], k.shape[2:], v.shape[2:], grad.shape[2:]) == ((40, 96), (8, 96), (8, 56), (40, 56))
    assert selection.indices.shape[3] == 32 and len({id(x) for x in problem.inputs}) == 3
