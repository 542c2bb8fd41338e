"""FlashMLA's calls, against what its documentation says of them, written out in float64."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import normal, random_indices
from torch import Tensor

from skim.compat import flash_mla
from skim.compat.flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from skim.ops.codec import dequantise, pack_latent, quantise

SCALE = 0.06


def softmax_over(q: Tensor, keys: Tensor, real: Tensor, v_channels: int, sink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """out, max_logits, lse of queries `[n, H, D]` over keys of their own `[n, K, D]`, in float64."""
    scores = (q.double() @ keys.double().nan_to_num().transpose(1, 2) * SCALE).masked_fill(~real[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num()
    if sink is not None:
        weights = weights / (1 + (sink.double() - lse.clamp(min=-1e30)).exp())[..., None]
    return weights @ keys.double().nan_to_num()[..., :v_channels], scores.amax(-1), lse.masked_fill(lse == -torch.inf, torch.inf)


def close(found: Tensor, wanted: Tensor, tolerance: float = 4e-3) -> None:
    finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), finite) and torch.equal(found[~finite].double(), wanted[~finite])
    assert float((found[finite].double() - wanted[finite]).norm()) <= tolerance * float(wanted[finite].norm())


def prefill_inputs(T: int = 12, S: int = 60, H: int = 8, K: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    q, kv = normal(T, H, 576, seed=1, dtype=torch.bfloat16), normal(S, 1, 576, seed=2, dtype=torch.bfloat16)
    indices = random_indices(1, T, 1, K, S)[0]
    indices[3, :, ::4] = S + 5  # no token either
    return q, kv, indices


@pytest.mark.parametrize("sink", (None, normal(8, seed=4), torch.full((8,), torch.inf), torch.full((8,), -torch.inf)))
@pytest.mark.parametrize("lengths", (False, True))
def test_sparse_prefill(sink: Tensor | None, lengths: bool) -> None:
    q, kv, indices = prefill_inputs()
    topk_length = torch.randint(0, 31, (12,), dtype=torch.int32) if lengths else None
    real = (indices >= 0) & (indices < 60)
    if topk_length is not None:
        real &= torch.arange(30) < topk_length[:, None, None]
    wanted = softmax_over(q, kv[indices.long().where(real, 0)[:, 0], 0], real[:, 0], 512, sink)
    found = flash_mla_sparse_fwd(q, kv, indices, SCALE, attn_sink=sink, topk_length=topk_length)
    assert [x.shape for x in found] == [(12, 8, 512), (12, 8), (12, 8)] and found[0].dtype == q.dtype
    for a, b, tolerance in zip(found, wanted, (4e-3, 1e-6, 1e-6)):
        close(a, b, tolerance)
    assert (found[2] == torch.inf).any() and (found[0][::5] == 0).all()  # rows that read nothing
    assert flash_mla_sparse_fwd(q, kv, indices, SCALE, with_max_logits=False)[1] is None


def test_sparse_prefill_does_not_care_for_order_or_unread_tokens() -> None:
    q, kv, indices = prefill_inputs()
    found = flash_mla_sparse_fwd(q, kv, indices, SCALE)
    kv = torch.cat((kv, torch.full((3, 1, 576), torch.nan, dtype=kv.dtype)))  # so 65 is still no token
    for a, b in zip(found, flash_mla_sparse_fwd(q, kv, indices.flip(-1), SCALE)):
        close(a, b.double(), 4e-3)


def cache_of(tokens: Tensor, page: int) -> Tensor:
    """FP8 pages `[blocks, page, 1, 656]` of tokens `[S, 576]`, with a gap of a row between pages, and NaN in rows nobody wrote."""
    values, scale = quantise(tokens[:, :512].unflatten(-1, (4, 128)), scale_format="ue8m0")
    rows = pack_latent(values.flatten(1), scale, tokens[:, 512:])
    blocks = -(-len(rows) // page)
    pages = torch.full((blocks, page + 1, 656), 0x7F, dtype=torch.uint8)
    for s, row in enumerate(rows):
        pages[s // page, s % page] = row
    return pages[:, :page, None].view(torch.float8_e4m3fn)


def read_back(tokens: Tensor) -> Tensor:
    values, scale = quantise(tokens[:, :512].unflatten(-1, (4, 128)), scale_format="ue8m0")
    return torch.cat((dequantise(values, scale).flatten(1).to(torch.bfloat16), tokens[:, 512:]), dim=-1)


@pytest.mark.parametrize("extra", (False, True))
@pytest.mark.parametrize("lengths", (False, True))
def test_sparse_decoding_from_the_fp8_cache(extra: bool, lengths: bool) -> None:
    B, T, H, K, S = 3, 2, 8, 40, 150
    q, tokens = normal(B, T, H, 576, seed=1, dtype=torch.bfloat16), normal(S, 576, seed=2, dtype=torch.bfloat16)
    cache, sink = cache_of(tokens, 64), normal(H, seed=3)
    indices = random_indices(B, T, 1, K, S)[:, :, 0]
    length = torch.tensor([40, 13, 0], dtype=torch.int32) if lengths else None
    real = indices >= 0
    if length is not None:
        real &= torch.arange(K) < length[:, None, None]
    keys, more = read_back(tokens)[indices.long().clamp(min=0)].flatten(0, 1), {}
    if extra:
        other = normal(70, 576, seed=5, dtype=torch.bfloat16)
        near = random_indices(B, T, 1, 20, 70, seed=6)[:, :, 0]
        more = {"extra_k_cache": cache_of(other, 32), "extra_indices_in_kvcache": near}
        more["extra_topk_length"] = torch.tensor([20, 7, 3], dtype=torch.int32)
        keys = torch.cat((keys, read_back(other)[near.long().clamp(min=0)].flatten(0, 1)), 1)
        real = torch.cat((real, (near >= 0) & (torch.arange(20) < more["extra_topk_length"][:, None, None])), 2)
    wanted = softmax_over(q.flatten(0, 1), keys, real.flatten(0, 1), 512, sink)
    meta, splits = get_mla_metadata(None, T * H, 1, H, True, K)
    found = flash_mla_with_kvcache(
        q, cache, None, None, 512, meta, splits, SCALE, False, True, indices, attn_sink=sink, topk_length=length, **more
    )  # fmt: skip
    assert found[0].shape == (B, T, H, 512) and found[1].shape == (B, H, T) and found[0].dtype == q.dtype
    close(found[0].flatten(0, 1), wanted[0])
    close(found[1].transpose(1, 2).flatten(0, 1), wanted[2], 1e-6)
    assert not lengths or extra or (found[1][2] == torch.inf).all()


def test_sparse_decoding_from_a_16_bit_cache() -> None:
    q, cache = normal(2, 1, 8, 576, seed=1, dtype=torch.bfloat16), normal(5, 16, 1, 576, seed=2, dtype=torch.bfloat16)
    indices = random_indices(2, 1, 1, 30, 80)[:, :, 0]
    wanted = softmax_over(q[:, 0], cache.flatten(0, 2)[indices[:, 0].long().clamp(min=0)], indices[:, 0] >= 0, 512)
    out, lse = flash_mla_with_kvcache(q, cache, None, None, 512, get_mla_metadata()[0], softmax_scale=SCALE, indices=indices)
    close(out[:, 0], wanted[0])
    close(lse[..., 0], wanted[2], 1e-6)


@pytest.mark.parametrize("causal", (False, True))
def test_dense_decoding(causal: bool) -> None:
    B, T, page = 3, 2, 16
    q, cache = normal(B, T, 8, 576, seed=1, dtype=torch.bfloat16), normal(9, page, 1, 576, seed=2, dtype=torch.bfloat16)
    lengths, table = torch.tensor([40, 17, 0], dtype=torch.int32), torch.tensor([[7, 2, 4], [8, 0, -1], [99, -1, -1]], dtype=torch.int32)
    keys = torch.stack([cache[row].flatten(0, 2) for row in table.clamp(0, 8).long()])
    end = lengths[:, None] - (torch.tensor([1, 0]) if causal else 0) * torch.ones(1, T, dtype=torch.int32)
    real = torch.arange(3 * page) < end[..., None]
    wanted = softmax_over(q.flatten(0, 1), keys.repeat_interleave(T, 0), real.flatten(0, 1), 512)
    out, lse = flash_mla_with_kvcache(q, cache, table, lengths, 512, *get_mla_metadata(), SCALE, causal)
    close(out.flatten(0, 1), wanted[0])
    close(lse.transpose(1, 2).flatten(0, 1), wanted[2], 1e-6)


def test_the_default_scale_is_that_of_the_queries_channels() -> None:
    q, cache = normal(1, 1, 4, 576, seed=1, dtype=torch.bfloat16), normal(2, 16, 1, 576, seed=2, dtype=torch.bfloat16)
    rest = torch.tensor([[0, 1]]), torch.tensor([30]), 512, *get_mla_metadata()
    assert torch.equal(flash_mla_with_kvcache(q, cache, *rest)[0], flash_mla_with_kvcache(q, cache, *rest, softmax_scale=576**-0.5)[0])


def test_arguments_that_do_not_go_together() -> None:
    q, cache = normal(1, 1, 4, 576, dtype=torch.bfloat16), normal(2, 16, 1, 576, dtype=torch.bfloat16)
    indices, meta = torch.zeros(1, 1, 4, dtype=torch.int32), get_mla_metadata()[0]
    with pytest.raises(ValueError, match="block_table, cache_seqlens: expected both"):
        flash_mla_with_kvcache(q, cache, None, None, 512, meta)
    with pytest.raises(ValueError, match="indices: expected them with an FP8 cache"):
        flash_mla_with_kvcache(q, cache, None, None, 512, meta, is_fp8_kvcache=True)
    with pytest.raises(ValueError, match="causal: expected False with indices"):
        flash_mla_with_kvcache(q, cache, None, None, 512, meta, causal=True, indices=indices)
    with pytest.raises(ValueError, match=r"k_cache: expected \[num_blocks, page_block_size, 1, 656\], got"):
        flash_mla_with_kvcache(q, cache, None, None, 512, meta, is_fp8_kvcache=True, indices=indices)
    with pytest.raises(ValueError, match="extra_k_cache, extra_indices_in_kvcache: expected both or none"):
        flash_mla_with_kvcache(q, cache, None, None, 512, meta, indices=indices, extra_k_cache=cache)


def test_the_arguments_are_flash_mlas_in_its_order() -> None:
    names = {
        "flash_mla_sparse_fwd": "q kv indices sm_scale d_v attn_sink topk_length",
        "flash_mla_with_kvcache": "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits softmax_scale causal "
        "is_fp8_kvcache indices attn_sink extra_k_cache extra_indices_in_kvcache topk_length extra_topk_length",
    }
    for function, wanted in names.items():
        parameters = inspect.signature(getattr(flash_mla, function)).parameters.values()
        assert " ".join(x.name for x in parameters if x.kind is not inspect.Parameter.KEYWORD_ONLY) == wanted
