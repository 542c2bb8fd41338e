"""Rotary position embedding of index heads: both layouts, from the model's own table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skim.modules.rope import frequencies, rotate

THETA = 10000.0


def angles(channels: int, positions: Tensor) -> Tensor:
    """[T, channels / 2] in float64: position times THETA^(-2i / channels)."""
    return positions.double()[:, None] * THETA ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def table(channels: int, positions: Tensor, repeated: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin [1, T, channels] as a decoder hands them to its layers."""
    a = angles(channels, positions)
    a = a.repeat_interleave(2, -1) if repeated else torch.cat((a, a), -1)
    return a.cos()[None], a.sin()[None]


def turned(x: Tensor, a: Tensor, layout: str) -> Tensor:
    """x [T, channels] turned by a [T, channels / 2], as complex numbers."""
    half = x.shape[-1] // 2
    real, imaginary = (x[:, :half], x[:, half:]) if layout == "half" else (x[:, 0::2], x[:, 1::2])
    y = torch.complex(real, imaginary) * torch.polar(torch.ones_like(a), a)
    return torch.cat((y.real, y.imag), -1) if layout == "half" else torch.stack((y.real, y.imag), -1).flatten(1)


def test_a_quarter_turn_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]).view(1, 1, 5)
    cos, sin = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    assert rotate(x, cos, sin, "half").flatten().tolist() == [-3.0, -4.0, 1.0, 2.0, 9.0]
    assert rotate(x, cos, sin, "interleaved").flatten().tolist() == [-2.0, 1.0, -4.0, 3.0, 9.0]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("heads", [None, 3])
def test_the_first_channels_are_turned_as_complex_numbers(layout, heads):
    positions, shape = torch.tensor([0, 1, 5, 1000]), (1, 4, 10) if heads is None else (1, 4, heads, 10)
    x = torch.randn(*shape, dtype=torch.float64)
    cos, sin = (t[..., :3] for t in table(6, positions))
    y = rotate(x, cos, sin, layout)
    assert torch.equal(y[..., 6:], x[..., 6:]), "trap 3: the rotated channels are the first ones, the others stay"
    for head in range(heads or 1):
        source, found = (t[0] if heads is None else t[0, :, head] for t in (x, y))
        assert torch.allclose(found[:, :6], turned(source[:, :6], angles(6, positions), layout))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_dot_products_depend_on_the_distance_alone(layout):
    q, k = torch.randn(2, 8, dtype=torch.float64)
    dots = []
    for first in (0, 17, 400):
        cos, sin = (t[..., :4] for t in table(8, torch.tensor([first, first + 5])))
        y = rotate(torch.stack((k, q))[None], cos, sin, layout)[0]
        dots.append(float(y[0] @ y[1]))
    assert max(dots) - min(dots) < 1e-9


def test_the_layouts_differ_by_an_order_of_the_channels_and_by_nothing_else():
    positions = torch.arange(6)
    cos, sin = (t[..., :4] for t in table(8, positions))
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # half to interleaved
    assert torch.allclose(rotate(x[..., order], cos, sin, "interleaved"), rotate(x, cos, sin, "half")[..., order])
    assert not torch.allclose(rotate(x, cos, sin, "interleaved"), rotate(x, cos, sin, "half"))


@given(half=st.integers(1, 8), times=st.integers(1, 6), repeated=st.booleans())
def test_a_narrower_table_of_the_same_base_is_inside_the_models_own(half, times, repeated):
    """base^(-2i / rope_dim) is every (n / rope_dim)-th of base^(-2i / n)."""
    rope_dim, positions = 2 * half, torch.arange(5)
    for own, expected in zip(table(rope_dim * times, positions, repeated), (angles(rope_dim, positions).cos(), angles(rope_dim, positions).sin())):
        assert torch.allclose(frequencies(own, rope_dim, repeated)[0], expected, atol=1e-12)


def test_a_width_that_does_not_divide_the_table_is_refused():
    with pytest.raises(ValueError, match="rope_dim: expected a divisor of the 16 channels that the model rotates, got 6"):
        frequencies(torch.zeros(1, 1, 16), 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_that_of_the_input_and_sums_are_those_of_the_table(dtype):
    cos, sin = (t[..., :4].float() for t in table(8, torch.arange(50)))
    x = torch.randn(1, 50, 8).to(dtype)
    y = rotate(x, cos, sin, "half")
    assert y.dtype == dtype
    assert torch.equal(y, rotate(x.float(), cos, sin, "half").to(dtype))
