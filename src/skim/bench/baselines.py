"""What Skim is compared with. The same functions serve the tests, so that the two can't drift apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """PyTorch's attention by one of `BACKENDS`: q `[B, T, H, D]`, k and v `[B, S, G, D]`; causal where T = S, else over all keys.

    Raises:
        RuntimeError: this backend has no kernel for the call.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal, repeats = q.shape[2] == k.shape[2], q.shape[1] // k.shape[1]
    with sdpa_kernel(BACKENDS[backend]):
        try:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no kernel that shares keys among heads
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def dense_attentions(device: torch.device, *, prefill: bool = True) -> dict[str, Attention]:
    """Dense attention as a user of this device has it: each of PyTorch's backends, and flash-linear-attention's if installed.

    Not every one runs every call; one that doesn't raises a RuntimeError.
    """
    names = BACKENDS if device.type == "cuda" else ("flash",)
    found: dict[str, Attention] = {f"sdpa {name}": partial(sdpa, backend=name) for name in names}
    if device.type == "cuda" and prefill and util.find_spec("fla"):
        found["fla"] = _fla
    return found


def top_k(scores: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` best of each row, in PyTorch's order."""
    return scores.topk(budget).indices


def forward_and_backward(attention: Attention) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """`(q, k, v, gradient of the output) -> (output, gradients of q, k and v)`."""

    def step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        out = attention(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))

    return step


def index_kernels() -> dict[str, Callable[..., Tensor]]:
    """FP8 index scores of DeepGEMM if installed: `(q, k, k_scale, weights, start, end) -> scores [T, S]`.

    The scale of the queries and the factor J^-1/2 E^-1/2 belong into the weights.
    """
    if not util.find_spec("deep_gemm"):
        return {}
    import deep_gemm

    return {"DeepGEMM": lambda q, k, k_scale, weights, start, end: deep_gemm.fp8_mqa_logits(q, (k, k_scale), weights, start, end)}


def latent_kernels() -> dict[str, Callable[..., Any]]:
    """Sparse latent attention of FlashMLA if installed: `(q [T, H, 576], keys [S, 1, 576], indices [T, 1, K], scale) -> (out, ...)`."""
    if not util.find_spec("flash_mla"):
        return {}
    import flash_mla

    return {"FlashMLA": lambda q, keys, indices, scale: flash_mla.flash_mla_sparse_fwd(q, keys, indices, scale)}


def _fla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.attn import parallel_attn

    return parallel_attn(q, k, v)
