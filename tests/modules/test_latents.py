"""Latents as caches hold them: DeepSeek-V3.2's 656 bytes a token, and what FP8 costs (Gaussian inputs)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import skim
from skim.modules import LightningIndexer, latents
from skim.ops import codec

every_format = pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every_format
def test_a_row_is_512_values_4_scales_and_64_rotated_channels_byte_by_byte(scale_format):
    x = gaussian(3, 576)
    rows = latents.pack(x, scale_format)
    assert rows.dtype == torch.uint8 and rows.shape == (3, 656) and latents.ROW == 656
    for i in range(3):
        for block in range(4):
            values = x[i, 128 * block : 128 * block + 128]
            scale = rows[i, 512 + 4 * block : 516 + 4 * block].clone().view(torch.float32)
            exact = values.abs().max() / torch.tensor(448.0)
            assert scale == (exact if scale_format == "float32" else 2.0 ** torch.ceil(torch.log2(exact)))
            assert torch.equal(rows[i, 128 * block : 128 * block + 128].clone().view(torch.float8_e4m3fn), (values / scale).to(torch.float8_e4m3fn))
        assert torch.equal(rows[i, 528:].clone().view(torch.bfloat16), x[i, 512:].bfloat16())


@every_format
def test_unpacked_rows_are_as_near_as_three_bits_of_mantissa(scale_format):
    x = gaussian(2, 50, 576).bfloat16()
    found = latents.unpack(latents.pack(x, scale_format), torch.bfloat16)
    assert found.dtype == torch.bfloat16 and torch.equal(found[..., 512:], x[..., 512:])
    error = (found[..., :512].float() - x[..., :512].float()).abs()
    block = x[..., :512].float().unflatten(-1, (4, 128)).abs().amax(-1, keepdim=True).expand(2, 50, 4, 128).flatten(-2)
    assert bool((error <= x[..., :512].float().abs() * 2**-4 * 1.01 + block * 2**-16).all())
    assert torch.equal(latents.unpack(x, torch.float32), x), "what isn't FP8 stays as it is"


@every_format
@pytest.mark.parametrize(("size", "most"), [(0.1, 3e-2), (1.0, 5e-2)], ids=["flat attention", "sharp attention"])
def test_attention_over_fp8_latents_is_within_a_few_percent(size, most, scale_format):
    """D6: 576 channels, 512 keys read of 4096. A value is rounded by 2.6 % (three bits); scores are too, which counts where they are large."""
    latent = size * gaussian(1, 4096, 576)
    q = size * gaussian(1, 8, 4, 576, seed=1)
    indices = torch.stack([torch.randperm(4096, generator=torch.Generator().manual_seed(i))[:512] for i in range(8)]).view(1, 8, 1, 512)
    selection = skim.Selection.from_indices(indices)
    held = latents.unpack(latents.pack(latent, scale_format), torch.float32)
    exact, _ = skim.attend(q, latent[:, :, None], selection=selection, v_channels=512, scale=192**-0.5)
    found, _ = skim.attend(q, held[:, :, None], selection=selection, v_channels=512, scale=192**-0.5)
    assert float((found - exact).norm() / exact.norm()) <= most


@every_format
def test_fp8_index_keys_select_what_others_do_but_for_keys_near_the_last(scale_format):
    """D6: every differing key lies within the FP8 error bound of the k-th score, and 96 % are the same (64 heads of 128 channels)."""
    T, S, K = 16, 4096, 512
    indexer = LightningIndexer(32, n_heads=64, head_dim=128, rope_dim=64, score_dtype="fp8", scale_format=scale_format)
    q, k, weights = gaussian(1, T, 64, 128), gaussian(1, S, 128, seed=1), gaussian(1, T, 64, seed=2)
    bounds = {name: x.expand(1, T) for name, x in zip(("start", "end"), skim.visible(S, T))}
    held = indexer.cached(k)
    assert held.dtype == torch.uint8 and held.shape == (1, S, 132)
    found = indexer.select(q, held, weights, K, **bounds)
    exact = skim.select(q, k, weights, K, **bounds)
    scores = skim.index_scores(q, k, weights, **bounds)[0]
    turned_q, turned_k = codec.hadamard(q)[0], codec.hadamard(k)[0]
    per_head = torch.einsum("tje,se->tjs", turned_q.abs(), turned_k.abs()) * (2**-3 + 2**-8) * 1.01
    bound = torch.einsum("tj,tjs->ts", weights[0].abs(), per_head) * (64 * 128) ** -0.5
    common = 0
    for t in range(T):
        ours, theirs = (set(s.indices[0, t, 0].tolist()) for s in (found, exact))
        common += len(ours & theirs)
        kth = scores[t][list(theirs)].min()
        for s in ours ^ theirs:
            assert abs(scores[t, s] - kth) <= 2 * bound[t].max()
    assert common >= 0.96 * T * K


@pytest.mark.parametrize(("B", "T"), [(1, 7), (3, 5), (4, 1)])
def test_products_with_latents_are_the_same_written_in_place_and_with_gradients(B, T):
    H, n, p, r, v = 3, 8, 4, 16, 12
    q, read, expansion = torch.randn(B, T + 2, H, n + p)[:, 2:], torch.randn(B, T, H, r), torch.randn(H, n + v, r)
    into, out_of = expansion.split((n, v), dim=1)
    absorbed, emerged = latents.absorb(q[..., :n], q[..., n:], into), latents.emerge(read, out_of)
    torch.testing.assert_close(absorbed, torch.cat((torch.einsum("bthn,hnr->bthr", q[..., :n], into), q[..., n:]), dim=-1))
    torch.testing.assert_close(emerged, torch.einsum("bthr,hvr->bthv", read, out_of))
    with torch.no_grad():
        in_place = latents.absorb(q[..., :n], q[..., n:], into), latents.emerge(read, out_of)
    assert all(x.is_contiguous() for x in in_place)
    torch.testing.assert_close(in_place, (absorbed, emerged))
    assert latents.absorb(q[..., :n], q[..., n:], into.requires_grad_()).requires_grad
