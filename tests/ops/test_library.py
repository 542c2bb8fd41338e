"""What torch.library promises of the operators: schemas, fake tensors, autograd, torch.compile."""

import pytest
import torch
from cases import attention_inputs, index_inputs, normal, random_indices, random_interval
from torch._subclasses.fake_tensor import FakeTensorMode

from skim.ops import align, attend, attend_dense, codec, index_scores, select

B, T, S, K = 2, 6, 9, 4
REST = (5, 0.4, 1, "auto")  # v_channels, scale, workspace_mb, impl


def grad(*tensors: torch.Tensor) -> list:
    return [x.detach().clone().requires_grad_() for x in tensors]


def calls() -> dict[str, tuple]:
    """Arguments of every operator of the library, by name."""
    q, k, v = attention_inputs(B, T, S)
    index = index_inputs(B, T, S)
    q8, k8 = codec.quantise(index[0]), codec.quantise(index[1])
    interval, sink = random_interval(B, T, S), normal(6)
    indices = random_indices(B, T, 1, K, S)
    mla = attention_inputs(B, T, S, G=1)[:2]
    out, lse = attend(q, k, v, indices=indices, sink=sink)
    dense_out, dense_lse = attend_dense(q, k, v, start=interval[0], end=interval[1])
    options = (3, 0, 1, False, 1, "auto")
    angles, keys, norm = (normal(B, T, 2), normal(B, T, 2, seed=1)), normal(3, B, T, 8), (normal(3, 8), normal(3, 8, seed=1))
    pool = codec.quantise(normal(4, 3, 16))
    pages, table = (pool[0], index[2], q8[1], pool[1]), torch.tensor([[2, 0, 3], [1, 2, 0]], dtype=torch.int32)
    return {
        "index_scores": (*grad(*index), None, None, *interval, 1, "auto"),
        "index_scores/fp8": (q8[0], k8[0], index[2], q8[1], k8[1], *interval, 1, "auto"),
        "index_scores/fp8 pages": (q8[0], *pages, *interval, 1, "auto", table),
        "index_scores_backward": (normal(B, T, S), *index, *interval, 1, "auto"),
        "select": (*index, None, None, *interval, *options),
        "select/scores": (*index, None, None, *interval, 3, 1, 1, True, 1, "auto"),
        "select/mass": (*index, None, None, *interval, 3, 1, 1, True, 1, "auto", 0.5, 2),
        "select/fp8": (q8[0], k8[0], index[2], q8[1], k8[1], *interval, *options),
        "select/fp8 pages": (q8[0], *pages, *interval, *options, None, 1, table),
        "attend": (*grad(q, k, v), indices, *grad(sink), *REST),
        "attend/mla": (*grad(*mla), None, indices, None, *REST),
        "attend_backward": (out, lse, q, k, v, indices, sink, out, lse, *REST),
        "attend_backward/mla": (out, lse, *mla, None, indices, None, out, lse, *REST),
        "attend_dense": (*grad(q, k, v), *interval, *grad(sink), *REST),
        "attend_dense/mla": (*grad(*mla), None, *interval, None, *REST),
        "attend_dense_backward": (dense_out, dense_lse, q, k, v, *interval, None, dense_out, dense_lse, *REST),
        "attend_dense_backward/mla": (dense_out, dense_lse, *mla, None, *interval, sink, dense_out, dense_lse, *REST),
        "quantise/fp8": (index[1], "ue8m0", "auto"),
        "dequantise/fp8": (*k8, "auto"),
        "quantise/fp8 spread": (normal(3, 8), "float32", "auto", True),
        "hadamard": (*grad(normal(3, 8)), "auto"),
        "rotate": (index[0], *angles, "half", "auto"),
        "index_keys": (keys, *norm, 1e-6, *angles, "interleaved", None, "auto"),
        "index_keys/fp8": (keys, *norm, 1e-6, *angles, "half", "float32", "auto"),
        "align": (q, k, *grad(*index), *interval, None, None, 0.4, None, 1, "auto"),
        "align/sparse": (q, k, *grad(*index), *interval, indices[:, :, 0], lse, 0.4, None, 1, "auto"),
    }


CALLS = calls()


def operator(name: str):
    return getattr(torch.ops.skim, name.split("/")[0]).default


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(operator(name), CALLS[name], test_utils=tests[1:] if "fp8" in name else tests)  # the first multiplies its inputs


def test_every_operator_of_the_library_is_checked():
    elsewhere = {"name", "tie_alignment", "alignment_coefficient"}  # the last two are huggingface's: tests/huggingface/test_record.py
    assert {name.split("/")[0] for name in CALLS} == {name for name in dir(torch.ops.skim) if not name.startswith("_")} - elsewhere


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [name for name in CALLS if "fp8" not in name])
def test_fake_tensors_have_the_dtypes_and_strides_of_real_ones(name, dtype):
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def cast(place: int, x: object) -> object:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        is_lse = x.shape == (B, T, 6)
        return x.detach().to(lse_dtype if is_lse or (name == "index_scores_backward" and place == 0) else dtype)

    args = [cast(place, x) for place, x in enumerate(CALLS[name])]
    real = operator(name)(*args)
    with FakeTensorMode() as mode:
        fake = operator(name)(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
    for got, wanted in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (fake, real)), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert all(n < 2 or a == b for n, a, b in zip(got.shape, got.stride(), wanted.stride(), strict=True))


def test_compile_select_attend_align_and_backward_in_one_graph():
    def step(q, k, v, sink, q_index, k_index, weights, start, end):
        selection, index_lse = select(q_index, k_index, weights, K, start=start, end=end, keep_first=1, with_scores=True)
        out, lse = attend(q, k, v, selection, sink=sink)
        dense, _ = attend_dense(q, k, v, start=start, end=end)
        alignment = align(q, k, q_index, k_index, weights, selection=selection, lse=lse)
        drawn = index_scores(q_index, k_index, weights, start=start, end=end).exp().sum()
        return out.square().sum() + dense.sum() + lse.exp().sum() + alignment + drawn, selection.indices, index_lse

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for queries, keys in ((6, 9), (7, 12)):
        args = *attention_inputs(B, queries, keys), normal(6), *index_inputs(B, queries, keys)
        interval = random_interval(B, queries, keys)
        results = []
        for run in (step, compiled):
            ours = grad(*args)
            loss, indices, lse = run(*ours, *interval)
            loss.backward()
            results.append((loss, indices, lse, *(x.grad for x in ours)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_compile_makes_the_default_visibility_inside_the_graph():
    def step(q, k, v, q_index, k_index, weights):
        return attend(q, k, v, select(q_index, k_index, weights, K))[0] + attend_dense(q, k, v)[0]

    args = *attention_inputs(B, T, S), *index_inputs(B, T, S)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args))


def test_a_checkpointed_layer_has_the_same_gradients():
    def layer(q, k, v, q_index, k_index, weights):
        selection = select(q_index, k_index, weights, K)
        out, lse = attend(q, k, v, selection)
        return out.sum() + align(q, k, q_index, k_index, weights, selection=selection, lse=lse)

    args = *attention_inputs(B, T, S), *index_inputs(B, T, S)
    results = []
    for reentrant in (None, False, True):
        ours = grad(*args)
        loss = layer(*ours) if reentrant is None else torch.utils.checkpoint.checkpoint(layer, *ours, use_reentrant=reentrant)
        loss.backward()
        results.append([x.grad for x in ours])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_under_no_grad_and_inference_mode_nothing_is_kept():
    q, k, v = grad(*attention_inputs(B, T, S))
    with torch.no_grad():
        assert not attend_dense(q, k, v)[0].requires_grad
    with torch.inference_mode():
        selection = select(*index_inputs(B, T, S), K)
        assert attend(q, k, v, selection)[0].is_inference()
