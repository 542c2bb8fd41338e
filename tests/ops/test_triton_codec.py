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


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("E", [1, 64, 128])
def test_spread_and_quantised_in_one_pass_are_the_bytes_of_two(E, dtype, scale_format):
    x = rows_of_many_sizes((37, E), dtype)
    wanted = codec.quantise(codec.hadamard(x, impl="reference"), scale_format=scale_format, impl="reference")
    values, scale = (y.cpu() for y in codec.quantise(x.to(DEVICE), scale_format=scale_format, spread=True, impl="triton"))
    assert torch.equal(scale, wanted[1]) and torch.equal(values.view(torch.uint8), wanted[0].view(torch.uint8))


# [B, T, J, E], rotated channels, whether all rows of the batch share their positions
TURNS = [((2, 5, 3, 16), 8, True), ((2, 33, 1, 48), 48, False), ((1, 1, 8, 64), 2, False), ((3, 2, 2, 12), 6, True), ((1, 0, 4, 16), 8, False)]


def angles(B: int, T: int, rope_dim: int, shared: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[B, T, rope_dim / 2]` as views of a wider table: every other frequency."""
    table = normal(1 if shared else B, T, rope_dim, seed=1) * 9
    return tuple(x[..., ::2].expand(B, -1, -1).to(dtype) for x in (table.cos(), table.sin()))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize(("shape", "rope_dim", "shared"), TURNS)
def test_rotated_queries_are_bitwise_the_references(shape, rope_dim, shared, dtypes, layout):
    x, (cos, sin) = normal(*shape, dtype=dtypes[0]), angles(*shape[:2], rope_dim, shared, dtypes[1])
    found = codec.rotate(x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), layout=layout, impl="triton")
    assert torch.equal(found.cpu(), codec.rotate(x, cos, sin, layout=layout, impl="reference"))


@pytest.mark.parametrize("part", [lambda x: x[..., 8:24], lambda x: x[:, ::2, :, 8:24], lambda x: x.transpose(1, 2)[..., :16], lambda x: x[..., ::2]])
def test_queries_are_rotated_where_they_lie(part):
    x = part(normal(2, 6, 4, 32))
    cos, sin = angles(*x.shape[:2], 16, False, torch.float32)
    found = codec.rotate(x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), layout="half", impl="triton")
    assert found.is_contiguous() and torch.equal(found.cpu(), codec.rotate(x, cos, sin, layout="half", impl="reference"))


def test_rotated_queries_in_bfloat16_are_the_references_within_the_interpreters_rounding():
    x, (cos, sin) = normal(2, 9, 4, 64, dtype=torch.bfloat16), angles(2, 9, 32, True, torch.bfloat16)
    found = codec.rotate(x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), layout="half", impl="triton").cpu()
    wanted = codec.rotate(x, cos, sin, layout="half", impl="reference")
    if DEVICE == "cpu":  # it cuts off where a GPU rounds
        torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-6)
    else:
        assert torch.equal(found, wanted)


def projected(L: int, B: int, T: int, E: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What key projections give, of many sizes and with a mean, and the weights and biases of L norms."""
    sizes = torch.logspace(-3, 3, L * B * T).view(L, B, T, 1)
    x = (normal(L, B, T, E) + 0.5) * sizes
    return x.to(dtype), (1 + 0.3 * normal(L, E, seed=1)).to(dtype), (0.3 * normal(L, E, seed=2)).to(dtype)


def both_keys(x, weight, bias, cos, sin, layout, scale_format) -> list[torch.Tensor]:
    """Index keys of the reference and of the kernel."""
    options = {"layout": layout, "scale_format": scale_format}
    args = [y.to(DEVICE) for y in (x, weight, bias, cos, sin)]
    return [
        codec.index_keys(x, weight, bias, 1e-6, cos, sin, impl="reference", **options),
        codec.index_keys(*args[:3], 1e-6, *args[3:], impl="triton", **options).cpu(),
    ]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2, 5, 16), (1, 1, 70, 64), (2, 3, 1, 48)])
def test_index_keys_are_the_references_within_a_rounding_of_the_norm(shape, dtype, layout):
    wanted, found = both_keys(*projected(*shape, dtype), *angles(*shape[1:3], shape[3] // 2, False, dtype), layout, None)
    assert found.dtype == dtype and found.shape == shape
    torch.testing.assert_close(found, wanted, rtol=2e-3 if dtype == torch.float16 else 2e-6, atol=4e-3 if dtype == torch.float16 else 4e-6)


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rows_of_index_keys_are_those_of_keys_that_were_spread_and_quantised(layout, scale_format):
    """Of the kernel's own unquantised keys, bit for bit: only the norm may differ from the reference's."""
    inputs = *projected(3, 2, 23, 64, torch.float16), *angles(2, 23, 32, True, torch.float16)
    wanted, found = both_keys(*inputs, layout, scale_format)
    plain = both_keys(*inputs, layout, None)[1]
    assert torch.equal(found, codec.pack(*codec.quantise(codec.hadamard(plain), scale_format=scale_format)))
    assert found.shape == wanted.shape == (3, 2, 23, 68) and found.dtype == torch.uint8
    read, expected = (codec.dequantise(*codec.unpack(rows)) for rows in (found, wanted))
    assert float((read - expected).norm() / expected.norm()) < 1e-2


def test_an_index_key_does_not_depend_on_the_keys_beside_it():
    x, weight, bias = projected(2, 1, 130, 64, torch.float32)
    cos, sin = angles(1, 130, 32, False, torch.float32)
    whole = both_keys(x, weight, bias, cos, sin, "half", "float32")[1]
    for first, last in ((0, 1), (1, 66), (129, 130)):
        part = slice(first, last)
        one = both_keys(x[1:, :, part], weight[1:], bias[1:], cos[:, part], sin[:, part], "half", "float32")[1]
        assert torch.equal(one, whole[1:, :, part])


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match=r"impl: 'triton' cannot run codec \(quantise\).*float64"):
        codec.quantise(normal(2, 8, dtype=torch.float64).to(DEVICE), impl="triton")
