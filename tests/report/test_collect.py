"""What `collect` notes, against sums over every key made here."""

from dataclasses import replace

import pytest
import torch
from tiny_model import converted, text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import skim
from skim.huggingface import LayerInputs
from skim.huggingface.attention import by_indexer
from skim.huggingface.state import source_of, state_of
from skim.report import collect
from skim.report.collector import BEST, MISSED, PASSED, STRIDE, WANTED, contained

T, K = 90, 8


def seen(model, tokens) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """layer -> attention scores `[H, T, T]` and which keys are read, bool `[T, T]`, of layers with an indexer of their own."""
    found = {}

    def select(inputs: LayerInputs, start, end):
        selection = by_indexer(inputs, start, end)
        heads = inputs.q.shape[2] // inputs.k.shape[2]
        scores = torch.einsum("thd,shd->hts", inputs.q[0], inputs.k[0].repeat_interleave(heads, 1)) * inputs.scale
        read = torch.zeros(T, T + 1, dtype=torch.bool).scatter_(1, selection.indices[0, :, 0].long() % (T + 1), True)[:, :T]
        found[inputs.layer] = scores.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf), read
        return selection

    with torch.no_grad(), skim.use(model, mode="sparse", selector=select):
        model(tokens)
    return found


@pytest.fixture(scope="module")
def model():
    return converted(budget=K)


@pytest.fixture(scope="module")
def scored(model):
    return seen(model, text(T))


@pytest.mark.parametrize("dense", [False, True])
def test_weights_are_those_of_the_keys_read_among_themselves(model, scored, dense):
    found = collect(model, text(T), dense=dense)
    assert (found.budget, found.full, [layer.layer for layer in found.layers]) == (K, [], [0, 1])
    for layer in found.layers:
        scores, read = scored[layer.layer]
        p = scores.masked_fill(~read, -torch.inf).softmax(-1).mean(0)
        for t in range(T):
            keys = layer.keys[t][layer.keys[t] >= 0].long()
            assert (keys.diff() > 0).all() and torch.equal(layer.read[t, : len(keys)], read[t, keys])
            own = keys[read[t, keys]]
            assert len(own) == min(K, t + 1, BEST)  # the budget is less than what is named, so all that is read is
            torch.testing.assert_close(layer.weights[t, : len(keys)][read[t, keys]], p[t, own])
        assert torch.equal(layer.counts, read.sum(1).int())


def test_what_the_indexer_ranks_next_is_named(model, scored):
    found = collect(model, text(T))
    with skim.use(model, budget=K + PASSED):
        wider = seen_with_states_of(model, found)
    for layer in found.layers:
        unread = (layer.keys >= 0) & ~layer.read
        assert unread[K + PASSED :].sum(1).eq(PASSED).all() and not unread[:K].any()
        for t in range(T):
            assert set(layer.keys[t][unread[t]].tolist()) <= wider[layer.layer][t]
        assert layer.dense is None


def seen_with_states_of(model, found) -> dict[int, list[set[int]]]:
    """layer -> query -> the keys that the indexer ranks best at the budget in force, while the model reads with budget K."""
    best = {}

    def select(inputs: LayerInputs, start, end):
        best[inputs.layer] = [set(row.tolist()) for row in by_indexer(inputs, start, end).indices[0, :, 0]]
        return by_indexer(replace(inputs, config=replace(inputs.config, budget=found.budget)), start, end)

    with torch.no_grad(), skim.use(model, mode="sparse", selector=select):
        model(text(T))
    return best


def test_dense_attention_s_best_and_what_is_missed_of_them_are_named(model, scored):
    for layer in collect(model, text(T), dense=True).layers:
        scores, read = scored[layer.layer]
        p = scores.softmax(-1).mean(0)
        for t in range(T):
            named = set(layer.keys[t].tolist())
            assert set(p[t].topk(min(WANTED, t + 1)).indices.tolist()) <= named
            lost = p[t].masked_fill(read[t], 0.0)
            assert set(lost.topk(min(MISSED, int((lost > 0).sum()))).indices.tolist()) <= named
        real = layer.keys >= 0
        torch.testing.assert_close(layer.dense[real], p.gather(1, layer.keys.clamp(min=0).long())[real])


@pytest.mark.parametrize("dense", [False, True])
def test_kept_mass_of_dsa_window_and_oracle(model, scored, dense):
    for layer in collect(model, text(T), dense=dense).layers:
        scores, read = scored[layer.layer]
        p = scores.softmax(-1).mean(0)
        position = torch.arange(T)
        window = position[None] > position[:, None] - K
        expected = torch.stack([(p * read).sum(1), (p * window).sum(1), p.topk(K).values.sum(1)])
        torch.testing.assert_close(layer.kept, expected[:, :: 1 if dense else STRIDE])
        assert bool((layer.kept[2] >= layer.kept[0] - 1e-6).all())


def test_an_adaptive_budget_is_compared_with_as_many_keys():
    model = converted(budget=32, mass=0.6)
    scored = seen(model, text(T))
    for layer in collect(model, text(T), dense=True).layers:
        scores, read = scored[layer.layer]
        p, counts = scores.softmax(-1).mean(0), read.sum(1)
        assert torch.equal(layer.counts, counts.int()) and len(counts[40:].unique()) > 3
        for t in range(40, T):
            expected = p[t, read[t]].sum(), p[t, t + 1 - counts[t] : t + 1].sum(), p[t].topk(int(counts[t])).values.sum()
            torch.testing.assert_close(layer.kept[:, t], torch.stack(expected))


def test_the_map_counts_every_key_read(model, scored, monkeypatch):
    monkeypatch.setattr("skim.report.collector.CELLS", 23)  # cells of 4 x 4, the last of 2 x 2
    for layer in collect(model, text(T)).layers:
        read = scored[layer.layer][1].float()
        padded = torch.nn.functional.pad(read, (0, 2, 0, 2)).view(23, 4, 23, 4).sum((1, 3))
        visible = torch.nn.functional.pad(torch.ones(T, T).tril(), (0, 2, 0, 2)).view(23, 4, 23, 4).sum((1, 3))
        torch.testing.assert_close(layer.cells, padded / visible.clamp(min=1))


def test_agreement_between_layers_and_neighbouring_queries(model, scored):
    found = collect(model, text(T))
    a, b = (scored[i][1][K:].float() for i in (0, 1))
    torch.testing.assert_close(found.agreement[0, 1], ((a * b).sum(1) / K).mean())
    assert found.agreement.diagonal().tolist() == [1, 1] and found.chance == pytest.approx(sum(K / (t + 1) for t in range(K, T)) / (T - K))
    for layer in found.layers:
        read = scored[layer.layer][1].float()
        assert layer.neighbours == pytest.approx(float(((read[K:] * read[K - 1 : -1]).sum(1) / K).mean()))


def test_reading_is_what_the_model_does_anyway(model):
    """One pass, the same selections; and nothing of it is left behind."""
    with torch.no_grad(), skim.use(model, mode="sparse"), skim.record(model, selections=True) as r:
        before = model(text(T)).logits
    found = collect(model, text(T))
    for layer in found.layers:
        rows = r.selections[layer.layer].indices[0, :, 0]
        assert torch.equal(layer.read.sum(1), (rows >= 0).sum(1))
        assert bool(contained(layer.keys.masked_fill(~layer.read, -1).sort(1).values, rows).any(1).all())
    with torch.no_grad(), skim.use(model, mode="sparse"):
        assert torch.equal(model(text(T)).logits, before)
    assert state_of(model).selector is None


def test_layers_that_reuse_a_selection_have_weights_of_their_own_and_full_ones_are_named():
    model = converted(budget=K, pattern="SR")
    first, second = collect(model, text(T)).layers
    assert torch.equal(first.counts, second.counts) and first.neighbours == second.neighbours
    assert not torch.equal(first.weights, second.weights)
    assert state_of(model).letters == {0: "S", 1: "R"} and source_of(1, state_of(model).letters) == 0
    found = collect(converted(budget=K, pattern="FS"), text(T))
    assert (found.full, [layer.layer for layer in found.layers]) == ([0], [1])


def test_a_text_that_fits_the_budget_is_read_whole():
    found = collect(converted(budget=64), text(20), dense=True)
    assert found.agreement.isnan().all()
    for layer in found.layers:
        assert layer.neighbours is None and bool(layer.read[layer.keys >= 0].all())
        torch.testing.assert_close(layer.kept, torch.ones(3, 20))


def test_keys_in_common_of_padded_rows():
    a, b = torch.tensor([[1, 4, 7, -1], [0, 2, -1, -1]]).int(), torch.tensor([[0, 4, 7, 9], [3, -1, -1, -1]]).int()
    assert contained(a, b).tolist() == [[False, True, True, False], [False] * 4]


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            self.numbers = max(self.numbers, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


def test_no_tensor_has_a_number_for_every_query_and_key(monkeypatch):
    monkeypatch.setattr("skim.report.collector.CELLS", 64)
    long = 1024
    with Largest() as largest:
        collect(converted(budget=8, workspace_mb=1), text(long), dense=True)
    assert long * 64 <= largest.numbers < long * long / 4


def test_errors_name_the_argument(model):
    with pytest.raises(ValueError, match=r"tokens: expected \[1, T\] with T >= 2, got \(2, 5\)"):
        collect(model, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="model: expected a layer that selects"):
        collect(converted(budget=K, pattern="F"), text(T))
