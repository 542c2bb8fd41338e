"""The baselines compute what Skim computes: otherwise comparing their times says nothing."""

import pytest
import torch

import skim
from skim.bench import baselines

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def attention_tensors(device: str, T: int, S: int, gradients: bool = False) -> list[torch.Tensor]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors = [torch.randn(2, length, heads, 64, device=device, dtype=dtype) for length, heads in ((T, 8), (S, 2), (S, 2), (T, 8))]
    return [x.requires_grad_(gradients) if i < 3 else x for i, x in enumerate(tensors)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("T", "S"), [(128, 128), (1, 200)])
def test_every_dense_attention_that_runs_is_dense_attention(device, T, S):
    q, k, v, _ = attention_tensors(device, T, S)
    wanted = skim.attend_dense(q, k, v)[0]
    ran = 0
    for attention in baselines.dense_attentions(q.device, prefill=T > 1).values():
        try:
            found = attention(q, k, v)
        except RuntimeError:
            continue
        ran += 1
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-5 if device == "cpu" else 2e-2)
    assert ran


@pytest.mark.parametrize("device", DEVICES)
def test_forward_and_backward_give_the_gradients(device):
    q, k, v, grad = attention_tensors(device, 64, 64, gradients=True)
    out, _ = skim.attend_dense(q, k, v)
    wanted = (out, *torch.autograd.grad(out, (q, k, v), grad))
    attention = baselines.dense_attentions(q.device)["sdpa flash"]
    for x, y in zip(baselines.forward_and_backward(attention)(q, k, v, grad), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=3e-2, atol=1e-5 if device == "cpu" else 5e-2)


def test_a_backend_without_a_kernel_for_the_call_says_so():
    q, k, v, _ = attention_tensors("cpu", 16, 16)
    with pytest.raises(RuntimeError, match="No (available kernel|viable backend)"):
        baselines.sdpa(q, k, v, "cudnn")


def test_top_k():
    assert baselines.top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [[1, 2]]
