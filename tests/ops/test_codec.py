import struct

import numpy as np
import pytest
import torch
from cases import normal
from reference_math import error

from skim.ops import codec

CODES = torch.arange(256, dtype=torch.uint8)
FINITE = CODES[(CODES & 127) != 127]  # e4m3fn has two NaN codes and no infinities


def test_by_hand():
    values, scale = codec.quantise(torch.tensor([[896.0, -448.0, 2.0, 0.0]]))
    assert scale.tolist() == [2.0] and values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert values.float().tolist() == [[448.0, -224.0, 1.0, 0.0]]
    assert codec.dequantise(values, scale).tolist() == [[896.0, -448.0, 2.0, 0.0]]


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("factor", [2.0**-20, 1.0, 32.0])
def test_every_finite_code_comes_back(factor, scale_format):
    x = FINITE.view(torch.float8_e4m3fn).float() * factor  # holds 448, so the scale is the factor
    values, scale = codec.quantise(x, scale_format=scale_format)
    assert scale.item() == factor
    assert torch.equal(values.view(torch.uint8), FINITE)
    assert torch.equal(codec.dequantise(values, scale), x)


def test_all_256_codes_go_through_the_bytes():
    values, scale = codec.unpack(codec.pack(CODES.view(torch.float8_e4m3fn), torch.tensor(0.5)))
    assert torch.equal(values.view(torch.uint8), CODES) and scale.item() == 0.5


def test_every_code_is_dequantised_as_e4m3():
    x = codec.dequantise(CODES.view(torch.float8_e4m3fn), torch.tensor(1.0))

    def e4m3(code: int) -> float:
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
        return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))

    finite = (CODES & 127) != 127
    assert x[finite].tolist() == [e4m3(code) for code in CODES[finite].tolist()]
    assert bool(x[~finite].isnan().all())


def test_trap_11_the_clamp_is_on_the_amax():
    values, scale = codec.quantise(torch.zeros(2, 8))
    assert torch.equal(scale, torch.full((2,), 1e-4) / 448) and bool((values.float() == 0).all())
    _, scale = codec.quantise(torch.tensor([1e-5, 0.0]))
    assert scale.item() == pytest.approx(1e-4 / 448)
    _, scale = codec.quantise(torch.tensor([2e-4, 0.0]))
    assert scale.item() == pytest.approx(2e-4 / 448)


def test_trap_11_ue8m0_scales_are_powers_of_two_rounded_up():
    x = normal(500, 16) * torch.logspace(-6, 6, 500)[:, None]
    _, plain = codec.quantise(x)
    values, scale = codec.quantise(x, scale_format="ue8m0")
    assert bool((torch.frexp(scale).mantissa == 0.5).all())
    assert bool((scale >= plain).all()) and bool((scale < 2 * plain).all())
    assert bool((values.float().abs() <= 448).all())


def test_ue8m0_keeps_what_is_a_power_of_two_already():
    exponents = torch.arange(-20, 20)
    x = 448 * 2.0 ** exponents[:, None].float()
    _, scale = codec.quantise(x, scale_format="ue8m0")
    assert torch.equal(scale, 2.0 ** exponents.float())
    _, above = codec.quantise(torch.nextafter(x, torch.tensor(torch.inf)), scale_format="ue8m0")
    assert bool((above >= scale).all())


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_that_of_three_mantissa_bits(dtype, scale_format):
    x = normal(3, 7, 128, dtype=dtype)
    values, scale = codec.quantise(x, scale_format=scale_format)
    assert values.shape == (3, 7, 128) and scale.shape == (3, 7)
    back = codec.dequantise(values, scale)
    assert back.dtype == torch.float32 and error(back, x) < 0.04
    assert bool(((back - x.float()).abs() <= x.float().abs() / 16 + scale[..., None] * 2.0**-9).all())


def test_strides_are_free():
    x = normal(4, 6, 32)
    for got, wanted in zip(codec.quantise(x.transpose(0, 1)), codec.quantise(x), strict=True):
        assert torch.equal(got.float(), wanted.transpose(0, 1).float())
    assert torch.equal(codec.hadamard(x.transpose(0, 1)), codec.hadamard(x).transpose(0, 1))
    values, scale = codec.quantise(x)
    assert torch.equal(codec.pack(values.transpose(0, 1), scale.transpose(0, 1)), codec.pack(values, scale).transpose(0, 1))


def test_hadamard_by_hand():
    assert codec.hadamard(torch.eye(2)).mul(2**0.5).round().tolist() == [[1, 1], [1, -1]]
    natural = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]  # Sylvester's order
    assert codec.hadamard(torch.eye(4)).mul(2).tolist() == natural


@pytest.mark.parametrize("E", [1, 2, 64, 128])
def test_hadamard_is_orthonormal_and_its_own_inverse(E):
    matrix = codec.hadamard(torch.eye(E))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(E))
    x, y = normal(5, E), normal(5, E, seed=1)
    torch.testing.assert_close(codec.hadamard(codec.hadamard(x)), x)
    torch.testing.assert_close((codec.hadamard(x) * codec.hadamard(y)).sum(-1), (x * y).sum(-1), atol=1e-5, rtol=1e-5)


def test_hadamard_keeps_the_dtype_and_has_a_gradient():
    x = normal(3, 16, dtype=torch.bfloat16).requires_grad_()
    rotated = codec.hadamard(x)
    assert rotated.dtype == torch.bfloat16
    rotated.backward(rotated.detach())
    assert error(x.grad, x) < 0.01


def test_hadamard_spreads_an_outlying_channel_evenly():
    x = torch.zeros(64)
    x[5] = 8.0
    assert codec.hadamard(x).abs().tolist() == [1.0] * 64


def test_the_bytes_of_a_token_are_its_values_then_a_little_endian_float32():
    values, scale = codec.quantise(normal(2, 3, 128))
    packed = codec.pack(values, scale)
    assert packed.shape == (2, 3, 132) and packed.dtype == torch.uint8
    row = bytes(packed[1, 2].tolist())
    assert row[:128] == bytes(values[1, 2].view(torch.uint8).tolist())
    assert struct.unpack("<f", row[128:])[0] == scale[1, 2].item()
    for got, wanted in zip(codec.unpack(packed), (values, scale), strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got.float(), wanted.float())


def test_slices_of_a_packed_cache_unpack():
    values, scale = codec.quantise(normal(4, 9, 32))
    cache = torch.zeros(4, 20, 36, dtype=torch.uint8)
    cache[:, 5:14] = codec.pack(values, scale)
    got, got_scale = codec.unpack(cache[:, 5:14])
    assert torch.equal(got.float(), values.float()) and torch.equal(got_scale, scale)


def test_the_bytes_of_a_page_are_all_values_then_all_scales():
    values, scale = codec.quantise(normal(2, 70, 128))
    pages = codec.pack_pages(values, scale)
    assert pages.shape == (2, 2, 64 * 132) and pages.dtype == torch.uint8
    by_hand = np.zeros((2, 2, 64 * 132), np.uint8)
    for b, t in np.ndindex(2, 70):
        page, slot = divmod(t, 64)
        by_hand[b, page, slot * 128 : slot * 128 + 128] = values[b, t].view(torch.uint8).numpy()
        by_hand[b, page, 64 * 128 + slot * 4 : 64 * 128 + slot * 4 + 4] = np.frombuffer(struct.pack("<f", scale[b, t].item()), np.uint8)
    assert np.array_equal(pages.numpy(), by_hand)
    got, got_scale = codec.unpack_pages(pages)
    assert torch.equal(got[:, :70].float(), values.float()) and torch.equal(got_scale[:, :70], scale)
    assert got.shape == (2, 128, 128) and not bool(got[:, 70:].float().any()) and not bool(got_scale[:, 70:].any())


def test_pages_have_any_size_and_hold_any_number_of_channels():
    values, scale = codec.quantise(normal(6, 32))
    pages = codec.pack_pages(values, scale, page=2)
    assert pages.shape == (3, 72)
    got, got_scale = codec.unpack_pages(pages, page=2)
    assert torch.equal(got.float(), values.float()) and torch.equal(got_scale, scale)


def test_the_bytes_of_a_latent_token():
    values, scale = codec.quantise(normal(2, 3, 4, 128))
    values, rope = values.flatten(2), normal(2, 3, 64, dtype=torch.bfloat16)
    packed = codec.pack_latent(values, scale, rope)
    assert packed.shape == (2, 3, 656) and packed.dtype == torch.uint8
    row = packed[1, 2].numpy().tobytes()
    assert row[:512] == values[1, 2].view(torch.uint8).numpy().tobytes()
    assert struct.unpack("<4f", row[512:528]) == tuple(scale[1, 2].tolist())
    upper_halves = np.frombuffer(row[528:], "<u2").astype(np.uint32) << 16  # a bfloat16 is the upper half of a float32
    assert upper_halves.view(np.float32).tolist() == rope[1, 2].tolist()
    for got, wanted in zip(codec.unpack_latent(packed), (values, scale, rope), strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got.float(), wanted.float())
    with pytest.raises(ValueError, match=r"rope: expected torch.bfloat16 \[..., 64\], got torch.float32"):
        codec.pack_latent(values, scale, rope.float())


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"scale_format: expected 'float32' or 'ue8m0', got 'e8m0'"):
        codec.quantise(torch.zeros(2), scale_format="e8m0")
    with pytest.raises(ValueError, match=r"x: expected a last axis of a power of two, got 12"):
        codec.hadamard(torch.zeros(3, 12))
    with pytest.raises(ValueError, match=r"impl: expected 'auto' or one of .* for 'codec', got 'nothing'"):
        codec.quantise(torch.zeros(2), impl="nothing")
