"""Which implementation runs a call: what auto takes, and that a name given by the user runs or says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module, util

import pytest
import torch
from cases import attention_inputs, index_inputs, random_indices

from skim.ops import align, attend, attend_dense, codec, dispatch, index_scores, select
from skim.ops.dispatch import IMPLEMENTATIONS, OPERATORS, choice, implementation, run

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SOME = {"numba": ("select", "attend"), "hopper": ("score", "select", "attend")}  # the operators that have these; all have the reference and Triton
PACKAGE = {"hopper": "triton", "triton": "triton", "numba": "numba", "reference": "torch"}

if util.find_spec("triton"):  # before anything is pretended: kernels are interpreted or not as the environment says when they are defined
    for operator in OPERATORS:
        import_module(f"skim.ops.{operator}.triton")
    for operator in SOME["hopper"]:
        import_module(f"skim.ops.{operator}.hopper")


@pytest.fixture
def nothing_remembered() -> Iterator[None]:
    """What a device can run is asked once: forget it before and after."""
    dispatch._module.cache_clear()
    yield
    dispatch._module.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, nothing_remembered: None) -> Callable[[int, int], None]:
    """Pretends that there is an NVIDIA GPU of that compute capability."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that `package` is not installed."""
    find = util.find_spec
    monkeypatch.setattr(dispatch.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_the_reference_and_triton_and_some_have_more(operator: str, name: str, gpu) -> None:
    gpu(9, 0)
    pytest.importorskip(PACKAGE[name])
    device = CUDA if PACKAGE[name] == "triton" else CPU
    if operator not in SOME.get(name, OPERATORS):
        with pytest.raises(ValueError, match=f"impl: '{name}' cannot run {operator} on {device}: {operator} has no {name} implementation"):
            implementation(operator, name, device)
    else:
        assert implementation(operator, name, device) is import_module(f"skim.ops.{operator}.{name}")


# What auto takes.


def test_auto_on_a_cpu_is_numba_where_it_has_the_operator(monkeypatch, nothing_remembered) -> None:
    pytest.importorskip("numba")
    expected = {operator: "numba" if operator in SOME["numba"] else "reference" for operator in OPERATORS}
    assert {operator: choice(operator, CPU) for operator in OPERATORS} == expected
    dispatch._module.cache_clear()
    without("numba", monkeypatch)
    assert {choice(operator, CPU) for operator in OPERATORS} == {"reference"}


@pytest.mark.parametrize("interpreted", ("0", "1"))
def test_auto_never_takes_the_interpreter(interpreted: str, monkeypatch, nothing_remembered) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    assert all(choice(operator, CPU) != "triton" for operator in OPERATORS)


@pytest.mark.parametrize(("capability", "expected"), [("7.5", "reference"), ("8.0", "triton"), ("8.9", "triton"), ("12.0", "triton")])
def test_auto_on_a_gpu_is_triton_from_sm_80_on(capability: str, expected: str, gpu) -> None:
    pytest.importorskip("triton")
    gpu(*map(int, capability.split(".")))
    assert {choice(operator, CUDA) for operator in OPERATORS} == {expected}


@pytest.mark.parametrize(
    ("release", "expected"),
    [("3.6.0", "hopper"), ("3.7.1", "hopper"), ("3.9.1", "hopper"), ("3.5.1", "triton"), ("3.8.0", "triton"), ("3.10.0", "triton")],
)
def test_auto_on_sm_90_is_hopper_where_it_has_the_operator_and_knows_the_language(release: str, expected: str, gpu, monkeypatch) -> None:
    triton = pytest.importorskip("triton")
    gpu(9, 0)
    monkeypatch.setattr(triton, "__version__", release)
    assert {choice(operator, CUDA) for operator in SOME["hopper"]} == {expected}
    assert {choice(operator, CUDA) for operator in OPERATORS if operator not in SOME["hopper"]} == {"triton"}
    if expected == "triton":
        with pytest.raises(ValueError, match=f"impl: 'hopper' cannot run attend on cuda:0: Gluon kernels here need Triton .*, this is {release}"):
            implementation("attend", "hopper", CUDA)


def test_auto_on_a_gpu_without_triton_is_the_reference(monkeypatch, gpu) -> None:
    gpu(9, 0)
    without("triton", monkeypatch)
    assert {choice(operator, CUDA) for operator in OPERATORS} == {"reference"}


def test_auto_passes_over_what_an_implementation_refuses(gpu) -> None:
    pytest.importorskip("triton")
    gpu(8, 0)
    q, k, v = (x.double() for x in attention_inputs())
    exact = q, k, v, random_indices(2, 33, 1, 4, 50), 5, 0.1, None, 32
    assert implementation("attend", "auto", CUDA, "attend", exact).__name__.endswith("reference")
    assert implementation("attend", "auto", CUDA, "attend", (q.float(), *exact[1:])).__name__.endswith("triton")


def test_auto_on_a_cpu_leaves_the_backward_to_the_reference() -> None:
    q, k, v = attention_inputs(1, 9, 20)
    indices = random_indices(1, 9, 1, 4, 20)
    leaves = [[x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2)]
    for impl, inputs in zip(("auto", "reference"), leaves):
        attend(*inputs, indices=indices, impl=impl)[0].square().sum().backward()
    for ours, expected in zip(*leaves):
        torch.testing.assert_close(ours.grad, expected.grad)


# What a name takes.


def calls() -> dict[str, Callable[[str], object]]:
    q, k, v = attention_inputs(1, 9, 20)
    index = index_inputs(1, 9, 20)
    indices, quantised = random_indices(1, 9, 1, 4, 20), codec.quantise(index[1])
    return {
        "attend_dense": lambda impl: attend_dense(q, k, v, impl=impl),
        "attend": lambda impl: attend(q, k, v, indices=indices, impl=impl),
        "select": lambda impl: select(*index, 4, impl=impl),
        "index_scores": lambda impl: index_scores(*index, impl=impl),
        "align": lambda impl: align(q, k, *index, impl=impl),
        "quantise": lambda impl: codec.quantise(index[1], impl=impl),
        "dequantise": lambda impl: codec.dequantise(*quantised, impl=impl),
        "hadamard": lambda impl: codec.hadamard(index[1], impl=impl),
        "rotate": lambda impl: codec.rotate(index[0], index[0][:, :, 0, :2], index[0][:, :, 0, :2], layout="half", impl=impl),
        "index_keys": lambda impl: codec.index_keys(
            index[1][None], index[1][:, 0], index[1][:, 0], 1e-6, index[1][..., :2], index[1][..., :2], layout="half", impl=impl
        ),
    }


CALLS = calls()


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_name_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"impl: expected 'auto' or one of .*reference.*, got 'fastest'"):
        CALLS[name]("fastest")
    with pytest.raises(ValueError, match="operator: expected one of .*, got 'nothing'"):
        implementation("nothing", "auto", CPU)


@pytest.mark.parametrize("name", CALLS)
def test_the_reference_always_runs(name: str) -> None:
    CALLS[name]("reference")


@pytest.mark.parametrize("name", CALLS)
def test_triton_by_name_needs_a_gpu_or_the_interpreter(name: str, monkeypatch, nothing_remembered) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl: 'triton' cannot run .* on cpu: Triton kernels run on NVIDIA GPUs .*, not on cpu"):
        CALLS[name]("triton")


@pytest.mark.parametrize("name", CALLS)
def test_a_name_without_its_package_says_what_to_install(name: str, monkeypatch, nothing_remembered) -> None:
    without("triton", monkeypatch)
    with pytest.raises(ValueError, match=r"cannot run .* on cpu: Triton is not installed: pip install 'skim-attention\[gpu\]'"):
        CALLS[name]("triton")
    without("numba", monkeypatch)
    with pytest.raises(ValueError, match=r"cannot run .* on cpu: numba is not installed: pip install 'skim-attention\[cpu\]'"):
        CALLS[name]("numba")


def test_names_on_the_wrong_device(gpu) -> None:
    pytest.importorskip("triton")
    gpu(7, 5)
    with pytest.raises(ValueError, match="impl: 'triton' cannot run attend on cuda:0: .* need an NVIDIA GPU of sm_80 or newer, this is sm_75"):
        implementation("attend", "triton", CUDA)
    with pytest.raises(ValueError, match="impl: 'hopper' cannot run attend on cuda:0: Gluon kernels here need an NVIDIA GPU of sm_90, this is sm_75"):
        implementation("attend", "hopper", CUDA)
    with pytest.raises(ValueError, match="impl: 'hopper' cannot run attend on cpu: Gluon kernels run on NVIDIA GPUs, not on cpu"):
        implementation("attend", "hopper", CPU)
    with pytest.raises(ValueError, match="impl: 'numba' cannot run attend on cuda:0: numba kernels run on the CPU, not on cuda"):
        implementation("attend", "numba", CUDA)


def test_names_and_what_they_refuse(gpu) -> None:
    gpu(9, 0)
    q, k, v = (x.double() for x in attention_inputs(1, 9, 20))
    reads = random_indices(1, 9, 1, 4, 20), 5, 0.1, None, 32
    if util.find_spec("triton"):
        with pytest.raises(ValueError, match=r"impl: 'triton' cannot run attend \(attend\) on cuda:0: .*float64"):
            implementation("attend", "triton", CUDA, "attend", (q, k, v, *reads))
    pytest.importorskip("numba")
    with pytest.raises(ValueError, match=r"impl: 'numba' cannot run attend \(attend\) on cpu: .*float64"):
        attend(q, k, v, indices=reads[0], impl="numba")
    ours = [x.float().requires_grad_() for x in (q, k, v)]
    out, _ = attend(*ours, indices=reads[0], impl="numba")
    with pytest.raises(ValueError, match=r"impl: 'numba' cannot run attend \(attend_backward\) on cpu: numba has the forward of attend only"):
        out.sum().backward()


# CUDA graphs.


@pytest.mark.parametrize(("capability", "impl"), [((9, 0), "reference"), ((7, 5), "auto")])
def test_the_reference_cannot_be_captured_into_a_cuda_graph(capability, impl: str, monkeypatch, gpu) -> None:
    gpu(*capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="attend: its reference implementation .* can't be captured into a CUDA graph"):
        run("attend", "attend", impl, CUDA, *attention_inputs(), random_indices(2, 33, 1, 4, 50), 5, 0.1, None, 32)


def test_tensors_that_stand_for_others_go_through_the_library_operator() -> None:
    q, k, w = torch.randn(2, 1, 5, 2, 8), torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 2)
    mapped = torch.vmap(lambda *x: index_scores(*x))(q, k, w)
    assert torch.equal(mapped, torch.stack([index_scores(*x) for x in zip(q, k, w)]))
    bounds = {name: torch.zeros(1, 5, dtype=torch.int32, device="meta") for name in ("start", "end")}
    assert index_scores(*(x[0].to("meta") for x in (q, k, w)), **bounds).shape == (1, 5, 5)
