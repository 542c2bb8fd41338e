"""The operators one by one, on random tensors; every claim in a comment is checked by an assertion.

    python examples/03_use_the_operators.py      # seconds on a CPU; on a GPU the same calls take the Triton kernels

Letters: B batch, T queries, S keys, H query heads, G key heads, D channels, J and E the indexer's heads and channels.
"""

import torch

import skim
from skim.ops import codec

B, S, H, G, D, J, E, K = 2, 200, 8, 2, 64, 4, 64, 32
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, device=device)


q, k, v = normal(B, S, H, D), normal(B, S, G, D), normal(B, S, G, D)
q_index, k_index, weights = normal(B, S, J, E), normal(B, S, E), normal(B, S, J)

print("1. select: the K best visible keys of each query, exactly; never S x S numbers in memory")
selection = skim.select(q_index, k_index, weights, K)
assert selection.indices.shape == (B, S, 1, K) and selection.indices.dtype == torch.int32
assert selection.counts[0, 5, 0] == 6  # query 5 sees 6 keys and keeps them all
selection.check(S)  # ascending, in range, -1 behind the last

print("2. attend: softmax over the selected keys only, with gradients")
q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
out, lse = skim.attend(q, k, v, selection)
out.square().mean().backward()
assert q.grad is not None and out.shape == (B, S, H, D) and lse.shape == (B, S, H)
dense, dense_lse = skim.attend_dense(q, k, v)
torch.testing.assert_close(out[:, :K], dense[:, :K], rtol=1e-3, atol=1e-3)  # the first K queries read all that they see

print("3. parts: two attends over disjoint keys, merged by their lse, are one attend over both")
indices = selection.indices
even, odd = (indices.masked_fill(indices % 2 != rest, -1) for rest in (0, 1))
(out_even, lse_even), (out_odd, lse_odd) = (skim.attend(q, k, v, indices=part) for part in (even, odd))
share = torch.sigmoid(lse_even - lse_odd)[..., None]
torch.testing.assert_close(share * out_even + (1 - share) * out_odd, out, rtol=1e-3, atol=1e-3)

print("4. visible: packed sequences, padding, chunks and decoding are other starts and ends, never a mask")
start, end = skim.visible(S, S, cu_seqlens=torch.tensor([0, 120, 200], device=device))  # two sequences in one row
packed = skim.select(q_index[:1], k_index[:1], weights[:1], K, start=start, end=end)
assert int(packed.indices[0, 130][packed.indices[0, 130] >= 0].min()) >= 120  # nobody reads another's sequence
start, end = (x.expand(B, -1).to(device) for x in skim.visible(S, 1))  # one new query at the end of S keys: decoding
step = skim.select(q_index[:, -1:], k_index, weights[:, -1:], K, start=start, end=end)
assert torch.equal(step.indices, selection.indices[:, -1:])  # the same bits as in the long run

print("5. align: the loss that teaches the indexer; its gradients reach the indexer only")
learner = [x.clone().requires_grad_() for x in (q_index, k_index, weights)]
warm_up = skim.align(q, k, *learner)  # over all visible keys
inside = skim.align(q, k, *learner, selection=selection, lse=lse)  # inside the selection, for the sparse stage
q.grad = None
(warm_up + inside).backward()
assert q.grad is None and all(x.grad is not None for x in learner)

print("6. FP8: index tensors quantised as DeepSeek's, after a rotation that spreads outliers")
eighth = skim.select(codec.quantise(codec.hadamard(q_index)), codec.quantise(codec.hadamard(k_index)), weights, K)
full = selection.counts[..., 0] == K
same = [len(set(a.tolist()) & set(b.tolist())) / K for a, b in zip(eighth.indices[full][:, 0], selection.indices[full][:, 0])]
print(f"   {sum(same) / len(same):.1%} of the keys are the same as without (random tensors, not a trained indexer)")

print("7. MLA: one latent head; the values are the first channels of the keys, one storage and one gradient")
latent_q, latent_k = normal(1, S, 16, 576), normal(1, S, 1, 576)
out, lse = skim.attend(latent_q, latent_k, v_channels=512, indices=selection.indices[:1], scale=192**-0.5)
assert out.shape == (1, S, 16, 512)
