"""DeepGEMM's index scores, against what its documentation says of them, written out in float64."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import normal
from torch import Tensor

from skim.compat import deep_gemm
from skim.compat.deep_gemm import fp8_mqa_logits, fp8_paged_mqa_logits, get_num_sms, get_paged_mqa_logits_metadata
from skim.ops.codec import pack_pages, quantise

J, E = 32, 128


def logits_of(q: Tensor, values: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """`[T, S]` of queries `[T, J, E]`."""
    dots = torch.einsum("tje,se->tjs", q.double(), values.double()).relu()
    return torch.einsum("tjs,tj,s->ts", dots, weights.double(), scale.double())


def close(found: Tensor, wanted: Tensor, seen: Tensor) -> None:
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert torch.equal(found == -torch.inf, ~seen)
    assert float((found[seen].double() - wanted[seen]).norm()) <= 1e-6 * float(wanted[seen].norm())


def inputs(T: int, S: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    return quantise(normal(T, J, E, seed=1))[0], quantise(normal(S, E, seed=2)), normal(T, J, seed=3)


def test_contiguous_keys() -> None:
    q, kv, weights = inputs(20, 300)
    start = torch.arange(20, dtype=torch.int32) * 3
    end = (start + torch.arange(20, dtype=torch.int32) * 13).clamp(max=300)
    key = torch.arange(300)
    wanted = logits_of(q, *kv, weights)
    close(fp8_mqa_logits(q, kv, weights, start, end), wanted, (key >= start[:, None]) & (key < end[:, None]))


def test_contiguous_keys_in_rows_that_begin_where_a_query_begins_to_see() -> None:
    q, kv, weights = inputs(20, 300)
    start = torch.arange(20, dtype=torch.int32) * 3
    end = (start + torch.arange(20, dtype=torch.int32) * 13).clamp(max=300)
    offset = torch.arange(250)
    wanted = logits_of(q, *kv, weights).gather(1, (start[:, None].long() + offset).clamp(max=299))
    found = fp8_mqa_logits(q, kv, weights, start, end, False, 250)
    close(found, wanted, offset < (end - start)[:, None])
    with pytest.raises(ValueError, match="clean_logits: expected False with max_seqlen_k"):
        fp8_mqa_logits(q, kv, weights, start, end, max_seqlen_k=250)


@pytest.mark.parametrize("page", (64, 32))
@pytest.mark.parametrize("own", (False, True))
def test_paged_keys(page: int, own: bool) -> None:
    B, T, most = 3, 2, 200
    lengths = torch.tensor([200, 65, 1], dtype=torch.int32)
    ends = torch.tensor([[190, 200], [65, 20], [1, 0]], dtype=torch.int32) if own else torch.stack((lengths - 1, lengths), 1)
    table = torch.full((B, 8), -5, dtype=torch.int32)  # behind a sequence: anything
    pool = torch.full((30, page * (E + 4)), 0xFF, dtype=torch.uint8)  # a free page: NaN
    free = iter(torch.randperm(30).tolist())
    q, weights = quantise(normal(B, T, J, E, seed=1))[0], normal(B * T, J, seed=3)
    wanted = torch.zeros(B * T, most, dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        values, scale = quantise(normal(length, E, seed=10 + b))
        for i, content in enumerate(pack_pages(values, scale, page)):
            table[b, i] = next(free)
            pool[table[b, i]] = content
        wanted[b * T : b * T + T, :length] = logits_of(q[b], values, scale, weights[b * T : b * T + T])
    cache = pool.view(30, page, 1, E + 4)
    context = ends if own else lengths
    found = fp8_paged_mqa_logits(q, cache, weights, context, table, get_paged_mqa_logits_metadata(context, page, get_num_sms()), most)
    close(found, wanted, torch.arange(most) < ends.flatten()[:, None])


def test_paged_rows_are_as_long_as_was_asked() -> None:
    values, scale = quantise(normal(40, E, seed=2))
    cache = pack_pages(values, scale).view(1, 64, 1, E + 4)
    q, weights = quantise(normal(1, 1, J, E, seed=1))[0], normal(1, J, seed=3)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    rows = [fp8_paged_mqa_logits(q, cache, weights, lengths, table, None, most) for most in (40, 300)]
    assert rows[1].shape == (1, 300) and torch.equal(rows[1][:, :40], rows[0]) and (rows[1][:, 40:] == -torch.inf).all()


def test_what_is_refused() -> None:
    q, table, lengths = quantise(normal(1, 1, J, E))[0], torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"kv_cache: expected uint8 \[num_blocks, block_kv, 1, 132\], got"):
        fp8_paged_mqa_logits(q, torch.zeros(1, 64, 1, 128, dtype=torch.uint8), normal(1, J), lengths, table, None, 64)
    with pytest.raises(ValueError, match="indices: expected None, got Tensor"):
        cache = torch.zeros(1, 64, 1, 132, dtype=torch.uint8)
        fp8_paged_mqa_logits(q, cache, normal(1, J), lengths, table, None, 64, indices=lengths)


def test_the_arguments_are_deep_gemms_in_its_order() -> None:
    names = {
        "fp8_mqa_logits": "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits max_seqlen_k",
        "fp8_paged_mqa_logits": "q kv_cache weights context_lens block_table schedule_meta max_context_len clean_logits indices",
        "get_paged_mqa_logits_metadata": "context_lens block_kv num_sms indices",
    }
    for function, wanted in names.items():
        parameters = inspect.signature(getattr(deep_gemm, function)).parameters.values()
        assert " ".join(x.name for x in parameters if x.kind is not inspect.Parameter.KEYWORD_ONLY) == wanted
    assert get_paged_mqa_logits_metadata(torch.ones(2, 1, dtype=torch.int32), 64, 132).shape == (133, 2)
