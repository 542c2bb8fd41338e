"""The lightning indexer: a few small heads that score every earlier token for each query token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skim.modules.rope import frequencies, rotate
from skim.ops import codec, select
from skim.ops.workspace import accumulator
from skim.selection import Selection

NORM_EPS = 1e-6  # DeepSeek's, also where the model's own norms differ (spec section 1.2)


class IndexTensors(NamedTuple):
    """What an indexer makes of a layer's input: q `[B, T, J, E]`, k `[B, T, E]`, weights `[B, T, J]` in float32."""

    q: Tensor
    k: Tensor
    weights: Tensor


class Projection(nn.Module):
    """A matrix without bias. Not an `nn.Linear`, so that tools which adapt or quantise every linear layer leave it alone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class LightningIndexer(nn.Module):
    """Index queries, keys and head weights of a layer (DeepSeek-V3.2-Exp report, section 1; parameter names as there).

    Args:
        hidden_size: channels of the attention's input, which keys and head weights are made from.
        n_heads: J, index heads.
        head_dim: E, channels of a head; the key has one head, shared by all J.
        rope_dim: how many of the first channels are rotated.
        rope_layout: "half" (DeepSeek-V3.2) or "interleaved" (GLM-5).
        query_size: channels of the query latent in MLA models; None makes queries from the attention's input too.
        score_dtype: "bf16" scores in the dtype of the input, "fp8" in e4m3 after a Hadamard rotation.
        scale_format: of FP8 scores: "float32" scales, or "ue8m0" for powers of two.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        n_heads: int,
        head_dim: int,
        rope_dim: int,
        rope_layout: str = "half",
        query_size: int | None = None,
        score_dtype: str = "bf16",
        scale_format: str = "float32",
    ) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.rope_dim = n_heads, head_dim, rope_dim
        self.rope_layout, self.score_dtype, self.scale_format = rope_layout, score_dtype, scale_format
        self.wq_b = Projection(query_size or hidden_size, n_heads * head_dim)
        self.wk = Projection(hidden_size, head_dim)
        self.k_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)
        self.weights_proj = Projection(hidden_size, n_heads)
        self.repeated_table = False
        self.reset_parameters()

    def reset_parameters(self, input_rms: float = 1.0) -> None:
        """Fresh weights under which q, k and weights have unit variance if the inputs' root mean square is `input_rms`.

        Scores then spread by about one, however wide the model: neither flat nor saturated at the start.
        """
        for projection in (self.wq_b, self.wk, self.weights_proj):
            nn.init.normal_(projection.weight, std=1.0 / (input_rms * projection.weight.shape[1] ** 0.5))
        self.k_norm.reset_parameters()

    def forward(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], q_latent: Tensor | None = None, keys_only: bool = False
    ) -> IndexTensors:
        """Index tensors of `hidden` `[B, T, hidden_size]`.

        Args:
            hidden: the attention's input, behind its layer norm.
            position_embeddings: cos and sin `[B, T, n]`, the model's own.
            q_latent: `[B, T, query_size]` normalised query latent of an MLA model.
            keys_only: nothing is selected now, so q and weights stay empty, `[B, 0, ...]`.
        """
        B, T, _ = hidden.shape
        cos, sin = (frequencies(table, self.rope_dim, self.repeated_table).expand(B, -1, -1) for table in position_embeddings)
        # The weights are float32 while they train under a bf16 model; autocast casts by itself.
        own = hidden.dtype if torch.is_autocast_enabled(hidden.device.type) else self.wk.weight.dtype
        k = self.wk(hidden.to(own))
        wide, norm, dtype = accumulator(hidden.dtype), self.k_norm, k.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            k = F.layer_norm(k.to(wide), (self.head_dim,), norm.weight.to(wide), norm.bias.to(wide), norm.eps).to(dtype)
        k = rotate(k, cos, sin, self.rope_layout)
        if keys_only:
            return IndexTensors(k.new_empty(B, 0, self.n_heads, self.head_dim), k, hidden.new_empty(B, 0, self.n_heads, dtype=wide))
        q = self.wq_b((hidden if q_latent is None else q_latent).to(own)).view(B, T, self.n_heads, self.head_dim)
        with torch.autocast(hidden.device.type, enabled=False):
            # Small signed numbers that are summed over the heads: bf16 here costs recall (spec section 1.2).
            weights = F.linear(hidden.to(wide), self.weights_proj.weight.to(wide))
        return IndexTensors(rotate(q, cos, sin, self.rope_layout), k, weights)

    def cached(self, k: Tensor) -> Tensor:
        """What a cache holds of the index keys `[B, T, E]`: themselves, or `[B, T, E + 4]` bytes of FP8 (`codec.pack`)."""
        return codec.pack(*self.quantised(k)) if self.score_dtype == "fp8" else k

    def quantised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[..., E]` in FP8 as it is scored: e4m3 values and scales, after a Hadamard rotation."""
        return codec.quantise(codec.hadamard(x), scale_format=self.scale_format)

    def select(
        self,
        q: Tensor,
        cached: Tensor,
        weights: Tensor,
        budget: int,
        *,
        start: Tensor,
        end: Tensor,
        keep_first: int = 0,
        keep_recent: int = 0,
        mass: float | None = None,
        min_budget: int = 1,
        workspace_mb: int | None = None,
    ) -> Selection:
        """`skim.select` over `cached` keys `[B, S, ...]`, with the queries brought to the same precision."""
        queries: Tensor | tuple[Tensor, Tensor] = q
        keys: Tensor | tuple[Tensor, Tensor] = cached
        if self.score_dtype == "fp8":
            queries, keys = self.quantised(q), codec.unpack(cached)
        options: dict[str, Any] = {"keep_first": keep_first, "keep_recent": keep_recent, "mass": mass, "min_budget": min_budget}
        selection = select(queries, keys, weights, budget, start=start, end=end, workspace_mb=workspace_mb, **options)
        assert isinstance(selection, Selection)
        return selection
