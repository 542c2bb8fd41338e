"""The lightning indexer: a few small heads that score every earlier token for each query token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skim.modules.rope import frequencies, rotate
from skim.ops import codec, select
from skim.ops.codec.reference import layer_norm
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
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], q_latent: Tensor | None = None, reads: str | None = None
    ) -> IndexTensors:
        """Index tensors of `hidden` `[B, T, hidden_size]`.

        Args:
            hidden: the attention's input, behind its layer norm.
            position_embeddings: cos and sin `[B, T, n]`, the model's own.
            q_latent: `[B, T, query_size]` normalised query latent of an MLA model.
            reads: None makes what training needs. To read with, k is as a cache holds it (`cached`) and has no gradients: "sparse" makes
                all three; "dense" selects nothing, so q and weights stay empty, `[B, 0, ...]`.
        """
        B, T, _ = hidden.shape
        if reads is not None:
            k = cached_keys([self], [hidden], position_embeddings)[0]
            if reads == "dense":
                return IndexTensors(hidden.new_empty(B, 0, self.n_heads, self.head_dim), k, hidden.new_empty(B, 0, self.n_heads))
        cos, sin = self._angles(position_embeddings, B)
        own = _own(hidden, self.wk.weight)
        q = self.wq_b((hidden if q_latent is None else q_latent).to(own)).view(B, T, self.n_heads, self.head_dim)
        with torch.autocast(hidden.device.type, enabled=False):
            weights = _in_float32(hidden, self.weights_proj.weight)
        if reads is not None:
            return IndexTensors(codec.rotate(q, cos, sin, layout=self.rope_layout), k, weights)
        k, norm = self.wk(hidden.to(own)), self.k_norm
        with torch.autocast(hidden.device.type, enabled=False):
            k = layer_norm(k, norm.weight, norm.bias, norm.eps)
        return IndexTensors(rotate(q, cos, sin, self.rope_layout), rotate(k, cos, sin, self.rope_layout), weights)

    def key_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight of the key's projection, weight and bias of its norm; looked up the short way, for all layers' are asked for at once."""
        try:
            wk, norm = self._modules["wk"]._parameters, self._modules["k_norm"]._parameters  # type: ignore[union-attr]
            return wk["weight"], norm["weight"], norm["bias"]  # type: ignore[return-value]
        except KeyError:  # somebody wrapped them
            return self.wk.weight, self.k_norm.weight, self.k_norm.bias

    def _angles(self, position_embeddings: tuple[Tensor, Tensor], B: int) -> tuple[Tensor, Tensor]:
        """cos and sin `[B, T, rope_dim / 2]` of the channels that are rotated."""
        cos, sin = (frequencies(table, self.rope_dim, self.repeated_table).expand(B, -1, -1) for table in position_embeddings)
        return cos, sin

    def cached(self, k: Tensor) -> Tensor:
        """What a cache holds of the index keys `[B, T, E]`: themselves, or `[B, T, E + 4]` bytes of FP8 (`codec.pack`)."""
        return codec.pack(*self.quantised(k)) if self.score_dtype == "fp8" else k

    def quantised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[..., E]` in FP8 as it is scored: e4m3 values and scales, after a Hadamard rotation."""
        return codec.quantise(x, scale_format=self.scale_format, spread=True)

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
        queries = self.quantised(q) if self.score_dtype == "fp8" else q
        options: dict[str, Any] = {"keep_first": keep_first, "keep_recent": keep_recent, "mass": mass, "min_budget": min_budget}
        selection = select(queries, cached, weights, budget, start=start, end=end, workspace_mb=workspace_mb, **options)
        assert isinstance(selection, Selection)
        return selection


@torch.no_grad()
def cached_keys(indexers: Sequence[LightningIndexer], hidden: Sequence[Tensor], position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """What caches hold of the index keys of L layers, `[L, B, T, ...]`: the same for any L, in as many operations.

    Args:
        indexers: of the layers, all of one shape, dtype and device.
        hidden: the layers' inputs, `[B, T, hidden_size]` each.
        position_embeddings: cos and sin `[B, T, n]`, the same for all.
    """
    one, (B, T, _), x = indexers[0], hidden[0].shape, _stacked(hidden)
    weight, norm_weight, norm_bias = (_stacked(parameters) for parameters in zip(*[indexer.key_parameters() for indexer in indexers]))
    projected = torch.bmm(x.to(_own(x, weight)).flatten(1, 2), weight.mT).unflatten(1, (B, T))
    return codec.index_keys(
        projected,
        norm_weight,
        norm_bias,
        one.k_norm.eps,
        *one._angles(position_embeddings, B),
        layout=one.rope_layout,
        scale_format=one.scale_format if one.score_dtype == "fp8" else None,
    )


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors along a new first axis, without a copy of a single one."""
    return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0][None]


def _own(x: Tensor, weight: Tensor) -> torch.dtype:
    """What x is cast to for a product: weights are float32 while they train under a bf16 model; autocast casts by itself."""
    return x.dtype if torch.is_autocast_enabled(x.device.type) else weight.dtype


def _in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """x `[B, T, C]` times weight `[J, C]`, in float32 at least.

    Small signed numbers that are summed over the heads: bf16 here costs recall (spec section 1.2).
    """
    wide = accumulator(x.dtype)
    if x.is_cuda and x.dtype == weight.dtype != wide and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return torch.mm(x.flatten(0, 1), weight.T, out_dtype=wide).unflatten(0, x.shape[:2])  # the same without copies
    return F.linear(x.to(wide), weight.to(wide))
