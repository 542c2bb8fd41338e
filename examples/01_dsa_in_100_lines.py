"""DeepSeek Sparse Attention in plain PyTorch: the idea, and nothing that makes it fast.

An attention layer exists already, dense. A lightning indexer, much smaller, is taught to find what that attention reads;
then attention reads only the `BUDGET` keys that the indexer scores best. At the end the library computes the same.

    python examples/01_dsa_in_100_lines.py        # needs only torch and skim
"""

import torch
from torch import nn

import skim

TOKENS, WORDS, WIDTH, HEADS, CHANNELS = 256, 32, 32, 2, 16  # of the text and of the layer
INDEX_HEADS, INDEX_CHANNELS, BUDGET = 4, 16, 32  # of DSA


def index_scores(q, k, w):
    """q [T, J, E], k [S, E], w [T, J] -> I [T, S]: sum over the heads of w ReLU(q . k); a query sees no later key."""
    T, J, E = q.shape
    matches = torch.einsum("tje,se->tjs", q, k).relu()
    scores = torch.einsum("tj,tjs->ts", w, matches) * (J * E) ** -0.5
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)


def select(scores, budget):
    """scores [T, S] -> bool [T, S]: the `budget` best visible keys of each query; among equals the most recent."""
    best = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :budget]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.shape[1] - 1 - best, True)
    return mask & (scores > -torch.inf)


def attention(q, k, mask):
    """q, k [T, H, D], mask [T, S] -> [H, T, S]: softmax over the keys in the mask."""
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def alignment(p, scores):
    """Mean KL(p || softmax(I)), p [T, S] the attention averaged over the heads: it pulls the scores towards log p."""
    visible = scores > -torch.inf
    log_p, log_index = p.clamp(min=1e-10).log(), scores.log_softmax(-1).masked_fill(~visible, 0.0)
    return (p * (log_p - log_index)).masked_fill(~visible, 0.0).sum(-1).mean()


class Indexer(nn.Module):
    """Makes index queries, keys (one head for all) and head weights from the layer's input."""

    def __init__(self):
        super().__init__()
        self.wq = nn.Linear(WIDTH, INDEX_HEADS * INDEX_CHANNELS, bias=False)
        self.wk = nn.Linear(WIDTH, INDEX_CHANNELS, bias=False)
        self.k_norm = nn.LayerNorm(INDEX_CHANNELS)
        self.weights = nn.Linear(WIDTH, INDEX_HEADS, bias=False)

    def forward(self, x):
        return self.wq(x).view(-1, INDEX_HEADS, INDEX_CHANNELS), self.k_norm(self.wk(x)), self.weights(x)


def layer(x, weights):
    """What has to be read sparsely: x [T, WIDTH] -> q, k, v [T, H, D]."""
    return ((x @ weight).view(-1, HEADS, CHANNELS) for weight in weights)


def text(vocabulary):
    """Hidden states [T, WIDTH] of a text: random words, each a little different in its place."""
    return vocabulary[torch.randint(WORDS, (TOKENS,))] + 0.3 * torch.randn(TOKENS, WIDTH)


torch.manual_seed(0)
vocabulary = torch.randn(WORDS, WIDTH)
weights = torch.randn(3, WIDTH, HEADS * CHANNELS) * WIDTH**-0.5
weights[0] *= 4  # large queries: heads so sharp that each attends to few tokens
indexer, causal = Indexer(), torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
optimizer = torch.optim.AdamW(indexer.parameters(), lr=2e-2, weight_decay=0.0)
for step in range(300):  # the warm-up: the layer is frozen and dense, only the indexer learns
    x = text(vocabulary)
    q, k, v = layer(x, weights)
    loss = alignment(attention(q, k, causal).mean(0), index_scores(*indexer(x)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: KL {loss.item():.2f}")

x = text(vocabulary)  # which neither has seen
with torch.no_grad():
    (q, k, v), index = layer(x, weights), indexer(x)
    p, scores = attention(q, k, causal).mean(0), index_scores(*index)
    mask = select(scores, BUDGET)
    out = torch.einsum("hts,shd->thd", attention(q, k, mask), v)
    true_best, window = select(p.masked_fill(~causal, -torch.inf), BUDGET), causal.triu(1 - BUDGET)
    for name, kept in (("DSA", mask), ("the true best", true_best), ("a window", window)):
        print(f"{name} keeps {(p * kept)[BUDGET:].sum(-1).mean():.0%} of the attention with {BUDGET} of up to {TOKENS} keys")

    selection = skim.select(*(part[None] for part in index), BUDGET)  # the library: a batch axis in front, no T x S numbers
    theirs, lse = skim.attend(q[None], k[None], v[None], selection)
assert torch.equal(skim.Selection.from_mask(mask[None, :, None], BUDGET).indices, selection.indices)
torch.testing.assert_close(theirs[0], out, rtol=1e-4, atol=1e-5)
print("skim.select and skim.attend give the same.")
