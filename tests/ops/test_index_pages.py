"""Index keys read from the bytes of a cache, in rows or in pages: the same scores and selections as from keys in one piece."""

from __future__ import annotations

import struct

import pytest
import torch
from cases import index_inputs, normal, random_interval, triton
from torch import Tensor

from skim.ops import align, codec, index_scores, select
from skim.ops.checks import expect_index_inputs
from skim.ops.score import triton as kernels
from skim.ops.select import candidates as selecting

B, T, J, E = 2, 3, 4, 16
LENGTHS = (489, 340)  # tokens of the sequences
every_implementation = pytest.mark.parametrize("impl", ("reference", "numba", "triton"))


def by(impl: str, function, *args, **options):
    return triton(function, *args, **options) if impl == "triton" else function(*args, impl=impl, **options)


@pytest.fixture
def sampled(monkeypatch):
    """Rows of some hundred keys are sampled, as long ones are."""
    for name, value in (("SAMPLE", 64), ("CAPACITY", 32), ("ROOM", 0)):
        monkeypatch.setattr(selecting, name, value)
    assert selecting.sampling(9, max(LENGTHS), 32)[0] == 64


def interval() -> dict[str, Tensor]:
    """Any intervals within the sequences, whole ones among them."""
    start, end = random_interval(B, T, min(LENGTHS))
    length = torch.tensor(LENGTHS, dtype=torch.int32)
    start[:, 0], end[:, 0], end[:, 1] = 0, length, length
    return {"start": start, "end": end}


def scattered(keys: Tensor, page: int, fp8: bool) -> tuple[Tensor, Tensor]:
    """A pool in which the keys `[B, S, E]` of LENGTHS tokens lie in pages in no order, NaN elsewhere, and the block table, which ends in nonsense."""
    form = (page * (E + 4), torch.uint8, 0xFF) if fp8 else (page * E, keys.dtype, torch.nan)  # the bytes of NaN, as a value and as a scale
    pages = sum(-(-length // page) for length in LENGTHS) + 3
    pool = torch.full((pages, form[0]), form[2], dtype=form[1])
    table = torch.full((B, -(-max(LENGTHS) // page) + 1), 1_000_000, dtype=torch.int32)
    table[:, -1] = -7
    free = iter(torch.randperm(pages, generator=torch.Generator().manual_seed(1)).tolist())
    for b, length in enumerate(LENGTHS):
        values, scale = codec.quantise(keys[b])
        for i, first in enumerate(range(0, length, page)):
            table[b, i] = next(free)
            held, some = pool[table[b, i]], slice(first, min(first + page, length))
            count = some.stop - first
            if fp8:
                held[: count * E] = values[some].view(torch.uint8).flatten()
                held[page * E :][: count * 4] = scale[some].view(torch.uint8)
            else:
                held[: count * E] = keys[b, some].flatten()
    return pool if fp8 else pool.unflatten(1, (page, E)), table


def forms(fp8: bool, page: int) -> tuple[tuple, tuple, Tensor]:
    """Queries and weights, keys in one piece, the same in pages, and the block table."""
    q, keys, weights = index_inputs(B, T, max(LENGTHS), J, E)
    pool, table = scattered(keys, page, fp8)
    return (codec.quantise(q), codec.quantise(keys), weights) if fp8 else (q, keys, weights), pool, table


@pytest.mark.parametrize("impl", ("reference", "triton"))
@pytest.mark.parametrize("fp8, page", [(True, 16), (True, 64), (True, 7), (False, 16)])
def test_scores_of_pages_are_those_of_keys_in_one_piece(impl, fp8, page):
    (q, keys, weights), pool, table = forms(fp8, page)
    found = by(impl, index_scores, q, pool, weights, **interval(), block_table=table)
    wanted = by(impl, index_scores, q, keys, weights, **interval())
    S = wanted.shape[2]
    assert found.shape == (B, T, table.shape[1] * page)
    assert torch.equal(found[..., :S], wanted) and bool((found[..., S:] == -torch.inf).all())
    assert not bool(found.isnan().any()) and wanted[:, 0].isfinite().sum(1).tolist() == list(LENGTHS)


@every_implementation
@pytest.mark.parametrize("fp8, page", [(True, 16), (True, 7), (False, 64)])
def test_selections_from_pages_are_those_of_keys_in_one_piece(impl, fp8, page, sampled):
    (q, keys, weights), pool, table = forms(fp8, page)
    options = {**interval(), "keep_first": 1, "keep_recent": 2, "with_scores": True}
    found, lse = by(impl, select, q, pool, weights, 9, **options, block_table=table)
    wanted, wanted_lse = by(impl, select, q, keys, weights, 9, **options)
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.scores, wanted.scores)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-6, atol=1e-6)
    narrow = [by(impl, select, q, k, weights, 9, mass=0.02, **options, **more)[0] for k, more in ((pool, {"block_table": table}), (keys, {}))]
    assert torch.equal(narrow[0].indices, narrow[1].indices) and int(narrow[0].counts.min()) < 9


def test_rows_that_are_done_again_are_read_from_pages(monkeypatch, sampled):
    (q, keys, weights), pool, table = forms(True, 16)
    options = {**interval(), "with_scores": True}
    wanted, _ = triton(select, q, keys, weights, 9, **options)
    kernel = selecting.choose_kernel

    class Doubting:
        """Forgets what it chose, and flags every row."""

        def __getitem__(self, grid):
            def launch(*args, **constants):
                kernel[grid](*args, **constants)
                args[6].fill_(-1)
                args[10].fill_(1)

            return launch

    monkeypatch.setattr(selecting, "choose_kernel", Doubting())
    found, _ = triton(select, q, pool, weights, 9, **options, block_table=table)
    again, _ = triton(select, q, keys, weights, 9, **options)  # its tiles differ from those of the first time, and so may the last bits
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.scores, again.scores)


@every_implementation
@pytest.mark.parametrize("channels", [32, 6])  # a scale of 6 channels lies at no multiple of four bytes
def test_packed_rows_are_read_as_their_values_and_scales(impl, channels):
    q, keys, weights = index_inputs(B, T, 50, J, channels)
    rows = codec.pack(*codec.quantise(keys))
    assert rows.shape == (B, 50, channels + 4) and rows.dtype == torch.uint8
    for queries in (codec.quantise(q), q):
        found, wanted = (by(impl, select, queries, k, weights, 7, with_scores=True)[0] for k in (rows, codec.unpack(rows)))
        assert torch.equal(found.indices, wanted.indices) and torch.equal(found.scores, wanted.scores)


@pytest.mark.parametrize("impl", ("reference", "triton"))
@pytest.mark.parametrize("paged", (False, True))
def test_what_each_byte_means(impl, paged):
    """Two tokens of eight channels, written by hand: 1, 2 and -1 are 0x38, 0x40 and 0xB8."""
    one, two = bytes([0x38, 0x40, *[0] * 6]), bytes([0xB8, *[0] * 6, 0x38])
    scales = struct.pack("<f", 0.5), struct.pack("<f", 3.0)
    packed = one + two + scales[0] + scales[1] if paged else one + scales[0] + two + scales[1]
    keys = torch.tensor(list(packed), dtype=torch.uint8).view(1, *((-1,) if paged else (2, -1)))
    q = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 4]).view(1, 1, 1, 8)
    options = {"start": torch.zeros(1, 1, dtype=torch.int32), "end": torch.full((1, 1), 2, dtype=torch.int32)}
    table = {"block_table": torch.zeros(1, 1, dtype=torch.int32)} if paged else {}
    found = by(impl, index_scores, q, keys, torch.full((1, 1, 1), 8**0.5), **options, **table)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.5 * 3, 3.0 * 3]))


def test_kernels_read_packed_bytes_where_they_lie():
    """No copy of the keys is made on the way to the kernels."""
    q, keys, weights = index_inputs(1, 2, 64, J, 32)
    values, scale = codec.quantise(keys)
    for packed, paged in ((codec.pack(values, scale), False), (codec.pack_pages(values, scale, 16)[0], True)):
        table = torch.zeros(1, 4, dtype=torch.int32) if paged else None
        some_q, k, _, _, k_scale = expect_index_inputs(q, packed, weights, paged=paged)
        _, held = kernels.operands(some_q, k, k_scale, table)
        assert held.k.dtype == torch.float8_e4m3fn and held.scale is not None and held.scale.dtype == torch.float32
        assert all(x.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr() for x in (held.k, held.scale))


def test_rows_of_132_bytes_are_read_in_words():
    """A stride that is no multiple of sixteen is handed on as a multiple of four, so that loads are not byte by byte."""
    rows = codec.pack(*codec.quantise(normal(1, 9, 128)))
    _, k, _, _, k_scale = expect_index_inputs(normal(1, 1, 4, 128), rows, normal(1, 1, 4))
    keys = kernels.operands(normal(1, 1, 4, 128), k, k_scale, None)[1]
    assert keys.constants["UNIT"] == 4 and keys.strides == (9 * 33, 33, 9 * 33, 33)
    in_one_piece = kernels.operands(normal(1, 1, 4, 128), normal(1, 9, 128), None, None)[1]
    assert in_one_piece.constants["UNIT"] == 1 and in_one_piece.strides == (9 * 128, 128, 0, 0)


@pytest.mark.parametrize("T, channels", [(16, 36), (17, 48)])
def test_channels_are_padded_to_whole_16_bytes_where_many_queries_read_them(T, channels):
    """Other rows would be loaded byte by byte, by each tile of queries again; zeros change no bit of a score."""
    q, keys, weights = index_inputs(1, T, 64, J, 36)
    pool, table = codec.pack_pages(*codec.quantise(keys), 16)[0], torch.arange(4, dtype=torch.int32)[None]
    for queries in (q, codec.quantise(q)):
        some_q, k, _, _, k_scale = expect_index_inputs(queries, pool, weights, paged=True)
        some_q, held = kernels.operands(some_q, k, k_scale, table)
        assert some_q.shape[3] == held.k.shape[2] == channels and (held.block_table is None) == (T > 16)
    interval = {"start": torch.zeros(1, T, dtype=torch.int32), "end": torch.full((1, T), 64, dtype=torch.int32)}
    found = triton(index_scores, q, pool, weights, **interval, block_table=table)
    torch.testing.assert_close(found, index_scores(q, pool, weights, **interval, block_table=table, impl="reference"))
    first = {name: x[:, :1] for name, x in interval.items()}
    assert torch.equal(found[:, :1], triton(index_scores, q[:, :1], pool, weights[:, :1], **first, block_table=table))


def test_cards_without_fp8_get_keys_in_one_piece_and_wider(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "capability", lambda device: 80)
    (q, keys, _), pool, table = forms(True, 16)
    table = table.clamp(0, len(pool) - 1)
    _, k, _, _, k_scale = expect_index_inputs(q, pool, normal(B, T, J), paged=True)
    queries, held = kernels.operands(q[0], k, k_scale, table)
    assert queries.dtype == held.k.dtype == torch.bfloat16 and held.block_table is None
    for b, length in enumerate(LENGTHS):
        assert torch.equal(held.k[b, :length].float(), keys[0][b, :length].float()) and torch.equal(held.scale[b, :length], keys[1][b, :length])


def test_a_pool_of_more_bytes_than_31_bits_count():
    q, keys, weights = index_inputs(1, 1, 32, J, 32)
    values, scale = codec.quantise(keys)
    packed = codec.pack_pages(values, scale, 16)[0]
    memory = torch.empty((1 << 31) + 32 * 16 * 36, dtype=torch.uint8)  # of which only what is written is ever there
    pool = memory.as_strided((3, 16 * 36), ((1 << 30) + 16, 1))
    pool[2], pool[0] = packed[0], packed[1]
    interval = {"start": torch.zeros(1, 1, dtype=torch.int32), "end": torch.full((1, 1), 32, dtype=torch.int32)}
    found = triton(index_scores, q, pool, weights, **interval, block_table=torch.tensor([[2, 0]], dtype=torch.int32))
    assert torch.equal(found, triton(index_scores, q, (values, scale), weights, **interval))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(block_table=torch.zeros(B, 3)), TypeError, r"block_table: expected int32, got torch.float32"),
        (dict(block_table=torch.zeros(B + 1, 3, dtype=torch.int32)), ValueError, r"block_table: expected \[B, N\] = \(2, 3\), got \(3, 3\)"),
        (dict(block_table=torch.zeros(3, dtype=torch.int32)), ValueError, r"block_table: expected \[B, N\], got shape \(3,\)"),
        (dict(block_table=torch.zeros(B, 3, dtype=torch.int32, device="meta")), ValueError, r"block_table: expected device cpu, got meta"),
        (dict(start=None, end=None), ValueError, r"start, end: expected both with block_table"),
        (dict(k_index=torch.zeros(0, 16 * 20, dtype=torch.uint8)), ValueError, r"k_index: expected one page or more with block_table, got none"),
        (dict(k_index=torch.zeros(5, 70, dtype=torch.uint8)), ValueError, r"k_index: expected \[P, page \* \(E \+ 4\)\] = \(5, 60\), got \(5, 70\)"),
        (dict(k_index=normal(5, 16, 8)), ValueError, r"k_index: expected \[P, page, E\] = \(5, 16, 16\), got \(5, 16, 8\)"),
        (dict(k_index=torch.zeros(B, 9, 20, dtype=torch.uint8)), ValueError, r"k_index: expected \[P, page \* \(E \+ 4\)\], got shape \(2, 9, 20\)"),
        (
            dict(k_index=torch.zeros(B, 9, 32, dtype=torch.uint8), block_table=None, start=None, end=None),
            ValueError,
            r"k_index: expected \[B, S, E \+ 4\] = \(2, 9, 20\), got \(2, 9, 32\)",
        ),
    ],
)
@pytest.mark.parametrize("function", (index_scores, select))
def test_what_does_not_fit_is_named(function, change, error, message):
    (q, _, weights), pool, table = forms(True, 16)
    options = {"k_index": pool, "block_table": table, **interval(), **change}
    budget = (4,) if function is select else ()
    with pytest.raises(error, match=message):
        function(q, options.pop("k_index"), weights, *budget, **options)


def test_packed_keys_have_no_gradient():
    (q, _, weights), pool, table = forms(False, 16)
    scores = index_scores(q.requires_grad_(), pool, weights, **interval(), block_table=table)
    with pytest.raises(NotImplementedError, match="nor have pages"):
        scores.nan_to_num(neginf=0.0).sum().backward()
    rows = codec.pack(*codec.quantise(normal(B, 8, E)))
    with pytest.raises((TypeError, ValueError)):
        align(normal(B, T, 2, 8), normal(B, 8, 1, 8), normal(B, T, J, E), rows, normal(B, T, J))
