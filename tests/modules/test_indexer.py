"""LightningIndexer: its tensors are the equations' of DeepSeek-V3.2-Exp, whatever the dtype, and its selection is theirs."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_math import chosen, error, index_scores, interval_mask
from torch import nn

import skim
from skim.modules import LightningIndexer
from skim.modules.indexer import cached_keys
from skim.ops import codec

HIDDEN, J, E, ROPE = 24, 4, 16, 8
THETA = 10000.0


def made(dtype=torch.float32, **options):
    torch.manual_seed(3)
    indexer = LightningIndexer(HIDDEN, **{"n_heads": J, "head_dim": E, "rope_dim": ROPE, **options})
    with torch.no_grad():
        indexer.k_norm.weight.add_(0.3 * torch.randn(E))
        indexer.k_norm.bias.add_(0.3 * torch.randn(E))
    return indexer.to(dtype)


def inputs(B=2, T=20, width=HIDDEN, dtype=torch.float32, seed=0):
    """Hidden states with a mean and outliers, and a table of positions as a decoder hands it on."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(B, T, width, generator=generator) * 1.5 + 0.4).to(dtype)
    a = torch.arange(T).double()[:, None] * THETA ** (-torch.arange(0, ROPE, 2).double() / ROPE)
    a = torch.cat((a, a), -1)[None]
    return hidden, (a.cos().to(dtype), a.sin().to(dtype))


def equations(indexer, hidden, layout="half", q_latent=None):
    """q, k and weights in float64 from the equations (spec section 1), sharing nothing with the module but its weights."""
    w = {name: value.double() for name, value in indexer.state_dict().items()}
    hidden = hidden.double()
    B, T, _ = hidden.shape
    a = torch.arange(T).double()[:, None] * THETA ** (-torch.arange(0, ROPE, 2).double() / ROPE)

    def rope(x):  # [B, T, n, E]: the first ROPE channels
        turned = torch.empty_like(x)
        turned[..., ROPE:] = x[..., ROPE:]
        for i in range(ROPE // 2):
            one, other = (i, i + ROPE // 2) if layout == "half" else (2 * i, 2 * i + 1)
            c, s = a[:, i].cos()[None, :, None], a[:, i].sin()[None, :, None]
            turned[..., one] = x[..., one] * c - x[..., other] * s
            turned[..., other] = x[..., other] * c + x[..., one] * s
        return turned

    source = hidden if q_latent is None else q_latent.double()
    q = rope((source @ w["wq_b.weight"].T).view(B, T, J, E))
    k = hidden @ w["wk.weight"].T
    k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    k = rope((k * w["k_norm.weight"] + w["k_norm.bias"])[:, :, None])[:, :, 0]
    return q, k, hidden @ w["weights_proj.weight"].T


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("latent", [False, True], ids=["from the attention's input", "from a query latent"])
def test_its_tensors_are_the_equations(layout, latent):
    indexer = made(rope_layout=layout, query_size=12 if latent else None)
    hidden, positions = inputs()
    q_latent = inputs(width=12, seed=1)[0] if latent else None
    for found, expected in zip(indexer(hidden, positions, q_latent), equations(indexer, hidden, layout, q_latent)):
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert error(found, expected) < 1e-6


def test_parameters_are_named_and_shaped_as_in_deepseeks_checkpoints():
    shapes = {name: tuple(p.shape) for name, p in made(query_size=12).named_parameters()}
    assert shapes == {
        "wq_b.weight": (J * E, 12),
        "wk.weight": (E, HIDDEN),
        "k_norm.weight": (E,),
        "k_norm.bias": (E,),
        "weights_proj.weight": (J, HIDDEN),
    }


def test_nothing_in_it_is_a_linear_layer_that_other_tools_would_adapt():
    assert not any(isinstance(module, nn.Linear) for module in made().modules())


def test_trap_01_the_two_layouts_select_differently_once_there_are_more_keys_than_the_budget():
    hidden, positions = inputs(T=40)
    start, end = skim.visible(40, 40)
    picks = {}
    for layout in ("half", "interleaved"):
        indexer = made(rope_layout=layout)
        q, k, weights = indexer(hidden, positions)
        picks[layout] = [indexer.select(q, k, weights, budget, start=start, end=end).indices for budget in (40, 8)]
    assert torch.equal(picks["half"][0], picks["interleaved"][0]), "a budget that holds everything hides the difference"
    assert not torch.equal(picks["half"][1], picks["interleaved"][1])


def test_trap_03_the_first_channels_are_rotated_and_the_last_are_not():
    indexer, (hidden, positions) = made(), inputs()
    still = tuple(torch.ones_like(t) if i == 0 else torch.zeros_like(t) for i, t in enumerate(positions))
    for moved, unmoved in zip(indexer(hidden, positions)[:2], indexer(hidden, still)[:2]):
        assert torch.equal(moved[..., ROPE:], unmoved[..., ROPE:])
        assert not torch.equal(moved[..., :ROPE], unmoved[..., :ROPE])


def test_trap_04_keys_pass_a_layer_norm_with_mean_bias_and_its_own_epsilon():
    indexer = made()
    assert isinstance(indexer.k_norm, nn.LayerNorm) and indexer.k_norm.eps == 1e-6 and indexer.k_norm.bias is not None
    hidden, positions = inputs()
    quiet = hidden * 1e-3  # so that the epsilon tells
    _, k, _ = indexer(quiet, positions)
    assert error(k, equations(indexer, quiet)[1]) < 1e-5
    wrong = copy.deepcopy(indexer)
    wrong.k_norm.eps = 1e-5
    assert error(wrong(quiet, positions)[1], equations(indexer, quiet)[1]) > 1e-3
    rms = nn.functional.rms_norm(quiet @ indexer.wk.weight.T, (E,), indexer.k_norm.weight, 1e-6)
    assert error(rms, equations(indexer, quiet)[1]) > 1e-1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trap_05_head_weights_are_made_in_float32_whatever_the_dtype(dtype):
    indexer, (hidden, positions) = made(dtype), inputs(dtype=dtype)
    q, k, weights = indexer(hidden, positions)
    assert (q.dtype, k.dtype, weights.dtype) == (dtype, dtype, torch.float32)
    assert error(weights, equations(indexer, hidden)[2]) < 1e-6, "the product of rounded numbers, itself not rounded"
    assert error(nn.functional.linear(hidden, indexer.weights_proj.weight), equations(indexer, hidden)[2]) > 1e-4


def test_trap_05_head_weights_are_made_in_float32_under_autocast():
    indexer, (hidden, positions) = made(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        q, k, weights = indexer(hidden, positions)
    assert (q.dtype, k.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert error(weights, equations(indexer, hidden)[2]) < 1e-6
    assert error(k, equations(indexer, hidden)[1]) < 2e-2


def test_float64_stays_float64():
    indexer, (hidden, positions) = made(torch.float64), inputs(dtype=torch.float64)
    for found, expected in zip(indexer(hidden, positions), equations(indexer, hidden)):
        assert found.dtype == torch.float64
        assert error(found, expected) < 1e-12


def test_a_float32_indexer_reads_the_bf16_input_of_its_model():
    indexer, (hidden, positions) = made(), inputs(dtype=torch.bfloat16)
    found = indexer(hidden, positions)
    assert {t.dtype for t in found} == {torch.float32}
    assert error(found.weights, equations(indexer, hidden)[2]) < 1e-6


def test_trap_06_the_scores_are_of_the_positive_part_of_each_head():
    indexer, (hidden, positions) = made(), inputs()
    q, k, weights = indexer(hidden, positions)
    start, end = skim.visible(20, 20)
    seen = interval_mask(start, end, 20).expand(2, -1, -1)
    scores = skim.index_scores(q, k, weights, start=start, end=end)
    assert error(scores, index_scores(q, k, weights, seen)) < 1e-6
    linear = torch.einsum("btje,bse,btj->bts", q, k, weights) * (J * E) ** -0.5
    assert (linear - scores)[seen].abs().max() > 0.1


def test_trap_08_early_rows_end_in_minus_one():
    indexer, (hidden, positions) = made(), inputs()
    start, end = skim.visible(20, 20)
    selection = indexer.select(*indexer(hidden, positions), 8, start=start, end=end)
    selection.check(20)
    assert selection.counts[0, :, 0].tolist() == [min(t + 1, 8) for t in range(20)]
    assert selection.indices[0, 2, 0].tolist() == [0, 1, 2, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("score_dtype", ["bf16", "fp8"])
def test_trap_09_rows_and_chunks_select_what_the_whole_selects(score_dtype):
    indexer, (hidden, positions) = made(score_dtype=score_dtype), inputs(T=40)
    q, k, weights = indexer(hidden, positions)
    cached = indexer.cached(k)
    start, end = (x.expand(2, -1).contiguous() for x in skim.visible(40, 40))
    whole = indexer.select(q, cached, weights, 8, start=start, end=end).indices
    for _ in range(3):
        assert torch.equal(indexer.select(q, cached, weights, 8, start=start, end=end).indices, whole)
    for row in range(2):
        one = slice(row, row + 1)
        for a, b in ((0, 1), (7, 23), (39, 40)):
            part = indexer.select(q[one, a:b], cached[one, :b], weights[one, a:b], 8, start=start[one, a:b], end=end[one, a:b])
            assert torch.equal(part.indices, whole[one, a:b])


@pytest.mark.parametrize("score_dtype", ["bf16", "fp8"])
def test_the_selection_is_the_best_of_the_scores(score_dtype):
    indexer, (hidden, positions) = made(score_dtype=score_dtype), inputs()
    q, k, weights = indexer(hidden, positions)
    start, end = (x.expand(2, -1).contiguous() for x in skim.visible(20, 20))
    options = {"keep_first": 1, "keep_recent": 2}
    found = indexer.select(q, indexer.cached(k), weights, 6, start=start, end=end, workspace_mb=1, **options)
    if score_dtype == "fp8":
        q, k = (codec.dequantise(*codec.quantise(codec.hadamard(x))) for x in (q, k))
    scores = index_scores(q, k, weights, interval_mask(start, end, 20)).detach()
    for b in range(2):
        for t in range(20):
            row = chosen(scores[b, t], 0, t + 1, 6, **options)
            assert found.indices[b, t, 0, : len(row)].tolist() == row


def test_a_cache_of_fp8_index_keys_holds_a_byte_a_channel_and_a_scale():
    indexer, (hidden, positions) = made(score_dtype="fp8"), inputs()
    _, k, _ = indexer(hidden, positions)
    cached = indexer.cached(k)
    assert cached.shape == (2, 20, E + 4) and cached.dtype == torch.uint8
    values, scale = codec.unpack(cached)
    assert error(codec.hadamard(codec.dequantise(values, scale)), k) < 0.05
    assert made().cached(k) is k


@pytest.mark.parametrize("score_dtype", ["bf16", "fp8"])
def test_tensors_to_read_with_are_those_to_train_with(score_dtype):
    indexer, (hidden, positions) = made(score_dtype=score_dtype), inputs()
    q, k, weights = indexer(hidden, positions)
    read = indexer(hidden, positions, reads="sparse")
    dense = indexer(hidden, positions, reads="dense")
    assert torch.equal(read.k, dense.k) and read.k.dtype == indexer.cached(k).dtype
    assert dense.q.shape == (2, 0, J, E) and dense.weights.shape == (2, 0, J)
    keys = codec.hadamard(codec.dequantise(*codec.unpack(read.k))) if score_dtype == "fp8" else read.k
    assert error(keys, k) < (0.05 if score_dtype == "fp8" else 1e-6)
    assert error(read.q, q) < 1e-6 and error(read.weights, weights) < 1e-6
    assert not read.k.requires_grad and k.requires_grad


@pytest.mark.parametrize("score_dtype", ["bf16", "fp8"])
def test_keys_of_many_layers_are_those_of_each(score_dtype):
    indexers = [made(score_dtype=score_dtype, rope_layout="interleaved") for _ in range(3)]
    with torch.no_grad():
        for i, indexer in enumerate(indexers):
            for parameter in indexer.parameters():
                parameter.mul_(i + 1).add_(0.1 * i)
    hidden = [inputs(seed=i)[0] for i in range(3)]
    positions = inputs()[1]
    together = cached_keys(indexers, hidden, positions)
    for indexer, x, keys in zip(indexers, hidden, together):
        own = indexer(x, positions).k
        found = codec.hadamard(codec.dequantise(*codec.unpack(keys))) if score_dtype == "fp8" else keys
        assert error(found, own) < (0.05 if score_dtype == "fp8" else 1e-6)


def test_keys_to_read_with_are_cast_as_those_to_train_with():
    hidden, positions = inputs(dtype=torch.bfloat16)
    assert made()(hidden, positions, reads="dense").k.dtype == torch.float32, "a float32 indexer under a bf16 model"
    with torch.autocast("cpu", torch.bfloat16):
        trained, read = made()(inputs()[0], inputs()[1]), made()(inputs()[0], inputs()[1], reads="sparse")
    assert [x.dtype for x in read] == [x.dtype for x in trained] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(error(found, wanted) < 1e-2 for found, wanted in zip(read, trained))


def test_trap_10_fp8_and_bf16_select_nearly_the_same():
    """Not bitwise: training in one and serving in the other moves a few selected keys in a hundred."""
    T, budget = 512, 64
    torch.manual_seed(0)
    indexer = LightningIndexer(64, n_heads=8, head_dim=64, rope_dim=ROPE)
    hidden, positions = inputs(B=1, T=T, width=64)
    q, k, weights = indexer(hidden, positions)
    start, end = skim.visible(T, T)
    picks = []
    for score_dtype in ("bf16", "fp8"):
        indexer.score_dtype = score_dtype
        indices = indexer.select(q, indexer.cached(k), weights, budget, start=start, end=end).indices[0, budget:, 0]
        picks.append(torch.zeros(T - budget, T, dtype=torch.bool).scatter_(1, indices.long(), True))
    shared = float((picks[0] & picks[1]).sum() / picks[0].sum())
    assert 0.95 < shared < 1.0


def test_gradients_reach_every_parameter():
    indexer, (hidden, positions) = made(torch.float64), inputs(dtype=torch.float64)
    skim.index_scores(*indexer(hidden, positions)).clamp(min=-1e9).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in indexer.parameters())


def test_gradcheck():
    indexer, (hidden, positions) = made(torch.float64), inputs(B=1, T=4, dtype=torch.float64)
    names = [name for name, _ in indexer.named_parameters()]
    seen = interval_mask(*skim.visible(4, 4), 4)

    def scores(*parameters):
        index = torch.func.functional_call(indexer, dict(zip(names, parameters)), (hidden, positions))
        return skim.index_scores(*index)[seen]

    assert torch.autograd.gradcheck(scores, tuple(p.detach().clone().requires_grad_() for p in indexer.parameters()))


def test_fresh_scores_spread_by_about_one_however_wide_the_model():
    for width, rms in ((64, 1.0), (512, 1.0), (256, 5.0)):
        torch.manual_seed(0)
        indexer = LightningIndexer(width, n_heads=8, head_dim=64, rope_dim=ROPE)
        indexer.reset_parameters(rms)
        hidden, positions = inputs(B=1, T=64, width=width)
        hidden = nn.functional.rms_norm(hidden, (width,)) * rms
        for tensor in indexer(hidden, positions):
            assert 0.8 < float(tensor.std()) < 1.2
        scores = skim.index_scores(*indexer(hidden, positions))
        assert 0.2 < float(scores[scores.isfinite()].std()) < 2.0


def test_rows_of_positions_may_be_each_rows_own_or_everyones():
    indexer, (hidden, (cos, sin)) = made(), inputs()
    one, each = indexer(hidden, (cos, sin)), indexer(hidden, (cos.expand(2, -1, -1), sin.expand(2, -1, -1)))
    assert all(torch.equal(a, b) for a, b in zip(one, each))
