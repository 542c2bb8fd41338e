"""Latents and index keys in pages: read as if they lay one behind the other, in the bytes that serving engines hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import skim
from skim.modules import LightningIndexer, latents
from skim.modules.paged import PagedLatents
from skim.ops import codec

PAGE, PAGES, LENGTH, K = 16, 20, 70, 12
BLOCKS = torch.tensor([[7, 2, 19, 0, 11], [3, 18, 4, 5, 10]], dtype=torch.int32)  # in no order, of rows in turn
every_format = pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
every_form = pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(fp8: bool, scale_format: str = "float32", pieces: tuple[int, ...] = (LENGTH,)) -> tuple[PagedLatents, Tensor, Tensor]:
    """Pages of two sequences, written in pieces, their latents and index keys."""
    form = "fp8" if fp8 else "bf16"
    indexer = LightningIndexer(32, n_heads=8, head_dim=128, rope_dim=64, score_dtype=form, scale_format=scale_format)
    pages = PagedLatents(indexer, PAGES, 576, page=PAGE, dtype=torch.float32, latent_dtype=form)
    latent, keys, first = gaussian(2, LENGTH, 576), gaussian(2, LENGTH, 128, seed=1), 0
    for length in pieces:
        part = slice(first, first + length)
        pages.write(BLOCKS, first, latent[:, part], keys[:, part])
        first += length
    return pages, latent, keys


@every_format
def test_fp8_pages_are_those_of_the_codec_byte_by_byte(scale_format):
    pages, latent, keys = filled(True, scale_format)
    assert pages.latents.shape == (PAGES, PAGE, 656) and pages.index_keys.shape == (PAGES, PAGE * 132)
    expected = codec.pack_pages(*codec.quantise(codec.hadamard(keys), scale_format=scale_format), page=PAGE)
    rows = latents.pack(latent, scale_format)
    for b in range(2):
        for n, block in enumerate(BLOCKS[b].tolist()):
            assert torch.equal(pages.index_keys[block], expected[b, n])
            held = rows[b, PAGE * n : PAGE * n + PAGE]
            assert torch.equal(pages.latents[block, : len(held)], held)
    others = [block for block in range(PAGES) if block not in BLOCKS.flatten().tolist()]
    assert not bool(pages.latents[others].any()) and not bool(pages.index_keys[others].any())


@every_form
def test_pieces_of_any_length_fill_the_same_pages(fp8):
    whole, pieces = filled(fp8)[0], filled(fp8, pieces=(1, 15, 17, 30, 6, 1))[0]
    assert torch.equal(whole.latents, pieces.latents) and torch.equal(whole.index_keys, pieces.index_keys)


@every_form
def test_selections_and_attention_are_those_over_contiguous_keys(fp8):
    pages, latent, keys = filled(fp8)
    q_index, weights, q = gaussian(2, 5, 8, 128, seed=2), gaussian(2, 5, 8, seed=3), gaussian(2, 5, 4, 576, seed=4)
    start = torch.tensor([[0] * 5, [60, 66, 9, 9, 9]], dtype=torch.int32)  # the last rows of sequences, and one that sees little
    end = torch.arange(66, 71, dtype=torch.int32).expand(2, 5).contiguous()
    found = pages.select(BLOCKS, q_index, weights, K, start=start, end=end)
    expected = pages.indexer.select(q_index, pages.indexer.cached(keys), weights, K, start=start, end=end)
    assert torch.equal(found.indices, expected.indices) and int(found.counts.min()) < K
    held = latents.unpack(latents.pack(latent, "float32"), torch.float32) if fp8 else latent
    impl = "reference" if fp8 else "auto"  # where FP8 is read on a CPU
    exact = skim.attend(q, held[:, :, None], selection=expected, scale=192**-0.5, v_channels=512, impl=impl)
    for one, other in zip(pages.attend(BLOCKS, q, found, scale=192**-0.5, v_channels=512), exact):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_latents_in_fp8_are_read_where_they_lie_by_many_queries_too():
    pages, latent, _ = filled(True)
    start, end = (x.expand(2, -1) for x in skim.visible(LENGTH, LENGTH))
    q, index = gaussian(2, LENGTH, 4, 576), (gaussian(2, LENGTH, 8, 128, seed=1), gaussian(2, LENGTH, 8, seed=2))
    selection = pages.select(BLOCKS, *index, K, start=start, end=end)
    held = latents.unpack(latents.pack(latent, "float32"), torch.float32)
    exact = skim.attend(q, held[:, :, None], selection=selection, scale=0.1, v_channels=512, impl="reference")
    for one, other in zip(pages.attend(BLOCKS, q, selection, scale=0.1, v_channels=512), exact):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_trap_14_pages_of_others_are_never_read():
    """Logical and physical positions mixed up would read them."""
    pages, _, _ = filled(False)
    others = [block for block in range(PAGES) if block not in BLOCKS.flatten().tolist()]
    pages.latents[others], pages.index_keys[others] = float("nan"), float("nan")
    q, (start, end) = gaussian(2, LENGTH, 4, 576), (x.expand(2, LENGTH) for x in skim.visible(LENGTH, LENGTH))
    selection = pages.select(BLOCKS, gaussian(2, LENGTH, 8, 128), gaussian(2, LENGTH, 8), K, start=start, end=end)
    out, lse = pages.attend(BLOCKS, q, selection, scale=0.1, v_channels=512)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
