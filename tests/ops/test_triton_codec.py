"""The codec's kernels: bit for bit the reference, on a GPU or in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter must be chosen before Triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from cases import normal  # noqa: E402

from skim.ops import codec  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(300, 128), (3, 5, 64), (7, 48), (2, 1), (1, 512), (0, 64)]
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def rows_of_many_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    sizes = torch.logspace(-6, 2 if dtype == torch.float16 else 6, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return (normal(*shape) * sizes).to(dtype)


def expect_equal_to_reference(x: torch.Tensor, scale_format: str) -> None:
    wanted, wanted_scale = codec.quantise(x, scale_format=scale_format, impl="reference")  # on the CPU
    values, scale = codec.quantise(x.to(DEVICE), scale_format=scale_format, impl="triton")
    assert torch.equal(scale.cpu(), wanted_scale)
    assert torch.equal(values.cpu().view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_bitwise_the_references(shape, dtype, scale_format):
    expect_equal_to_reference(rows_of_many_sizes(shape, dtype), scale_format)


def test_every_boundary_between_two_codes_rounds_as_in_the_reference():
    finite = CODES.float()[:127]
    middles = (finite[1:] + finite[:-1]) / 2
    around = torch.cat((finite, middles, torch.nextafter(middles, torch.tensor(0.0)), torch.nextafter(middles, torch.tensor(torch.inf))))
    for x in (around, -around):
        expect_equal_to_reference(torch.cat((x, torch.tensor([448.0])))[None], "float32")  # 448: the scale is one


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_powers_of_two_and_their_neighbours_have_the_scale_of_the_reference(scale_format):
    powers = 448 * 2.0 ** torch.arange(-20, 20, dtype=torch.float32)
    x = torch.cat((powers, torch.nextafter(powers, torch.tensor(0.0)), torch.nextafter(powers, torch.tensor(torch.inf))))
    expect_equal_to_reference(x[:, None].repeat(1, 4), scale_format)


def test_all_256_codes_are_dequantised_as_in_the_reference():
    values, scale = CODES.repeat(3, 1), torch.tensor([1.0, 0.3, 2.0**-30])
    wanted, found = codec.dequantise(values, scale), codec.dequantise(values.to(DEVICE), scale.to(DEVICE), impl="triton").cpu()
    finite = CODES.float().isfinite()
    assert torch.equal(found[:, finite].view(torch.int32), wanted[:, finite].view(torch.int32))  # -0.0 too
    assert bool(found[:, ~finite].isnan().all())


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_poisons_its_own_row_only(bad, scale_format):
    x = normal(3, 64)
    x[1, 5] = bad
    results = [codec.quantise(y, scale_format=scale_format, impl=impl) for y, impl in ((x, "reference"), (x.to(DEVICE), "triton"))]
    (wanted, wanted_scale), (values, scale) = results
    assert torch.equal(scale.cpu()[[0, 2]], wanted_scale[[0, 2]]) and not bool(scale[1].isfinite()) and not bool(wanted_scale[1].isfinite())
    assert bool(values.cpu().float()[1, 5].isnan()) and bool(wanted.float()[1, 5].isnan())
    assert bool(values.float()[[0, 2]].isfinite().all())


@pytest.mark.parametrize("E", [1, 2, 32, 64, 128, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rotation_is_bitwise_the_references(E, dtype):
    x = normal(9, 3, E, dtype=dtype)
    wanted, found = codec.hadamard(x), codec.hadamard(x.to(DEVICE), impl="triton").cpu()
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, wanted)


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match=r"impl: 'triton' cannot run codec \(quantise\).*float64"):
        codec.quantise(normal(2, 8, dtype=torch.float64).to(DEVICE), impl="triton")
