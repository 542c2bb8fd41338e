"""A layer's figures as few bytes, which `page.js` reads back: seven sections, deflated together, in base64.

Before them stand their lengths, each as four bytes, lowest first.

counts: how many keys are named, one byte a query.
gaps: of each query its keys' distances, nearest first, as differences from one to the next, LEB128.
marks: one byte a named key: the code of its weight, with the highest bit set if it was not read.
dense: one byte a named key: the code of its dense attention, less that of its weight if it was read, modulo 256; empty if
    that was not collected.
kept: one byte for each pattern and looked-at query: 250ths of dense attention's mass.
cells: one byte a cell of the map on and below the diagonal, row by row: 63rds of the square root of the share that is read.
reads: how many keys each query read, LEB128.

The code of a weight w is -4 log2 w, rounded; 127 means less than every other code, or nothing.
"""

from __future__ import annotations

import base64
import zlib

import numpy as np
import torch
from torch import Tensor

from skim.report.collector import LayerRead

NOTHING = 127
STEPS = 4  # codes for a factor of two


def encode(layer: LayerRead, query: Tensor) -> str:
    """One layer in base64; `query` int `[T]` is where each query stands among the keys."""
    keys, order = layer.keys.numpy()[:, ::-1], (slice(None), slice(None, None, -1))
    named = keys >= 0
    distance = np.where(named, query.numpy()[:, None] - keys, 0)
    before = np.zeros_like(distance)
    before[:, 1:] = distance[:, :-1]  # padding stands before the nearest key and has distance 0
    codes, read = _codes(layer.weights).numpy()[order], layer.read.numpy()[order]
    # The two codes of a read key are much alike, so their difference packs better. Bytes wrap around.
    dense = b"" if layer.dense is None else (_codes(layer.dense).numpy()[order] - np.where(read, codes, 0).astype(np.uint8))[named].tobytes()
    lower = np.tril_indices(layer.cells.shape[0])
    sections = (
        named.sum(1).astype(np.uint8).tobytes(),
        _leb128((distance - before)[named]),
        np.where(read, codes, codes | 128)[named].tobytes(),
        dense,
        (layer.kept.clamp(0, 1) * 250).round().to(torch.uint8).numpy().tobytes(),
        (layer.cells.clamp(0, 1).sqrt() * 63).ceil().to(torch.uint8).numpy()[lower].tobytes(),
        _leb128(layer.counts.numpy()),
    )
    lengths = np.array([len(section) for section in sections], dtype="<u4").tobytes()
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = deflater.compress(lengths + b"".join(sections)) + deflater.flush()
    return base64.b64encode(packed).decode("ascii")


def _codes(weights: Tensor) -> Tensor:
    return (-STEPS * weights.log2()).round().clamp(0, NOTHING).to(torch.uint8)


def _leb128(values: np.ndarray) -> bytes:
    """Each value >= 0 in as few bytes as hold it, seven bits in each, lowest first; the highest bit says that more follow."""
    values = values.astype(np.uint64)
    shifts = np.arange(0, 35, 7, dtype=np.uint64)
    parts = values[:, None] >> shifts
    present = parts > 0
    present[:, 0] = True
    more = np.zeros_like(present)
    more[:, :-1] = present[:, 1:]
    return (parts & np.uint64(127) | more.astype(np.uint64) << np.uint64(7)).astype(np.uint8)[present].tobytes()
