"""Rotary position embedding of the first channels of a head, in the two layouts that indexers use."""

from __future__ import annotations

from torch import Tensor

from skim.ops.codec.reference import rotate

__all__ = ["frequencies", "rotate"]


def frequencies(table: Tensor, rope_dim: int, repeated: bool = False) -> Tensor:
    """cos or sin for `rope_dim` channels out of a model's own table: `[B, T, rope_dim / 2]`.

    A model that rotates `n` channels has frequencies `base^(-2i / n)`; every (n / rope_dim)-th of them is the table that
    the same base gives for rope_dim channels. So base, scaling and positions stay the model's own.

    Args:
        table: `[B, T, n]` cos or sin as a Hugging Face decoder hands it to its layers.
        rope_dim: even number of channels to rotate, a divisor of n.
        repeated: the table repeats each frequency side by side (Cohere), where others repeat the whole table.

    Raises:
        ValueError: `rope_dim` doesn't divide the table's width.
    """
    n = table.shape[-1]
    if n % rope_dim:
        raise ValueError(f"rope_dim: expected a divisor of the {n} channels that the model rotates, got {rope_dim}")
    step = n // rope_dim
    return table[..., :: 2 * step] if repeated else table[..., : n // 2 : step]
