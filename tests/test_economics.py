"""benchmarks/economics.py: what it compares computes the same, and a run says everything."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from reference_math import error

pytest.importorskip("transformers")
FILE = Path(__file__).parent.parent / "benchmarks" / "economics.py"
if not FILE.exists():
    pytest.skip("benchmarks are in the repository only", allow_module_level=True)
spec = importlib.util.spec_from_file_location("economics", FILE)
economics = importlib.util.module_from_spec(spec)
sys.modules["economics"] = economics
spec.loader.exec_module(economics)

CPU = torch.device("cpu")
N = 64


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def small(**changes):
    config = economics.DeepseekV32Config(num_hidden_layers=1, rope_parameters=economics.YARN, **{**economics.SMALL, **changes})
    config._attn_implementation = "eager"
    return economics.Layer(config, CPU)


def transformers_output(layer, hidden):
    T = hidden.shape[1]
    mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
    return layer.attention(hidden, layer.table(0, T), mask, position_ids=None)[0]


@pytest.mark.parametrize("chunk", [N, 24])
def test_prefill_is_transformers_layer_where_the_budget_keeps_every_key(chunk):
    layer = small(index_topk=N)
    hidden = layer.hidden(N)
    assert error(layer.prefill(hidden, chunk), transformers_output(layer, hidden)) < 1e-5


def test_prefill_reads_what_transformers_layer_selects_but_for_what_fp8_moves():
    layer = small()
    hidden = layer.hidden(N)
    found, expected = layer.prefill(hidden, 24), transformers_output(layer, hidden)
    same = (found - expected).norm(dim=-1) < 1e-4 * expected.norm(dim=-1)
    assert bool(same[:, :16].all()) and 0.25 < float(same[:, 16:].float().mean()) < 1, "rows whose selection is the same"
    layer.indexer.rope_layout = "interleaved"
    found = layer.prefill(hidden, 24)
    wrong = (found - expected).norm(dim=-1) < 1e-4 * expected.norm(dim=-1)
    assert float(wrong[:, 16:].float().mean()) < 0.1


@pytest.mark.parametrize("batch", [1, 3])
def test_dense_and_sparse_runs_compute_the_same_where_the_budget_keeps_every_key(batch):
    layer = small(index_topk=N)
    T = 1 if batch > 1 else 8
    hidden = layer.hidden(T, batch)
    caches = [economics.Cache.filled(layer, batch, N, 16)]
    caches += [economics.Cache(*(x.clone() for x in (caches[0].latents, caches[0].values, caches[0].scale)))]
    sparse = economics.sparse_runs(layer, caches[0], [hidden])
    if batch > 1:
        dense = economics.dense_decode_runs(layer, caches[1], [hidden])
    else:
        dense = economics.dense_prefill_runs(layer, caches[1], [hidden], torch.nn.attention.SDPBackend.MATH)
    for runs in (sparse, dense):
        assert runs.layer[0](hidden).shape == hidden.shape
    assert error(sparse.layer[0](hidden), dense.layer[0](hidden)) < 1e-5
    (run_sparse, (x,)), (run_dense, (y,)) = sparse.attention, dense.attention
    read = run_sparse(x)
    if batch == 1:
        read = torch.einsum("bthr,hvr->bthv", read, layer.out_of)
    assert error(read, run_dense(y)) < 1e-5


def test_money_is_the_time_of_a_million_tokens_at_two_dollars_an_hour():
    assert economics.usd(3600e3, 10**6) == 2.0
    assert economics.usd(36.0, 4096) == pytest.approx(36e-3 / 4096 * 1e6 / 3600 * 2)


def test_the_fp8_bound_holds_and_what_lies_beyond_it_is_counted():
    from skim.ops import codec

    q, k, weights = torch.randn(1, 4, 8, 128), torch.randn(1, 200, 128), torch.randn(1, 4, 8)
    q_fp8, k_fp8 = codec.quantise(q), codec.quantise(k)
    start, end = economics.everything(1, 4, 200, CPU)
    scores, moved = (economics.skim.index_scores(a, b, weights, start=start, end=end)[0] for a, b in ((q, k), (q_fp8, k_fp8)))
    most = economics.bound(q, q_fp8[1], k, k_fp8[1], weights)
    assert bool(((scores - moved).abs() <= most).all()) and float(most.mean()) < 10 * float(scores.std()), "a bound that says something"
    one, other = (economics.skim.select(a, b, weights, 20, start=start, end=end) for a, b in ((q, k), (q_fp8, k_fp8)))
    beyond, overlap = economics.differing(one, other, scores, most)
    assert beyond == 0 and 0.7 < overlap < 1
    assert economics.differing(one, other, scores, torch.zeros_like(most))[0] > 0
    assert economics.differing(one, one, scores, most) == (0, 1.0)


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_latents_through_656_bytes_keep_their_rotated_channels(scale_format):
    latents = torch.randn(1, 30, 1, 576).bfloat16()
    back = economics.through_bytes(latents, 512, scale_format)
    assert torch.equal(back[..., 512:], latents[..., 512:])
    assert 1e-2 < error(back[..., :512], latents[..., :512]) < 3e-2


def test_a_quick_run_has_every_row_and_what_it_depends_on(tmp_path, monkeypatch):
    out, drawn = tmp_path / "result.json", tmp_path / "plot.png"
    command = ["economics.py", "--device", "cpu", "--quick", "--json", str(out), "--plot", str(drawn)]
    monkeypatch.setattr(sys, "argv", command)
    pytest.importorskip("matplotlib")
    economics.main()
    result = json.loads(out.read_text())
    assert result["quick"] is True and result["usd_per_gpu_hour"] == 2.0 and result["command"].startswith("economics.py --device cpu")
    assert {"device", "driver", "versions", "commit", "roofs"} <= set(result)
    rows = result["rows"]
    assert not [row for row in rows if "error" in row]
    found = [(row["case"], row["kind"], row["n"]) for row in rows]
    for case in ("D2", "D3"):
        assert {(case, kind, n) for kind in ("attention", "layer") for n in economics.QUICK.positions} <= set(found)
    assert {("D4", "layer", 64), ("D5", "chunk", 256), ("D5", "whole", 256), ("D6", "ue8m0", 128)} <= set(found)
    assert drawn.stat().st_size > 1000 and sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "result.json"]


def test_a_part_that_fails_leaves_its_error_and_the_others_run(monkeypatch, capsys):
    def fails(layer, plan):
        raise RuntimeError("no such kernel")
        yield

    for name in ("prefill_rows", "transformers_rows", "million_rows"):
        monkeypatch.setattr(economics, name, lambda layer, plan: iter(()))
    monkeypatch.setattr(economics, "decode_rows", lambda layer, plan, roofs: fails(layer, plan))
    rows = economics.run(CPU, quick=True)["rows"]
    assert rows[0] == {"case": "D3", "error": "RuntimeError: no such kernel"}
    assert [row["case"] for row in rows] == ["D3", "D6", "D6"] and "no such kernel" in capsys.readouterr().err
