"""The loss without logits on an accelerator: bf16 under autocast, and fp32 sums of 16-bit products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from paceline.nn import linear_cross_entropy
from paceline.nn.linear_cross_entropy import _adds_wider
from paceline.nn.softmax_kernel import has_kernel, losses_and_gradients

pytestmark = pytest.mark.gpu


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(3000, 256, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(5003, 256, device="cuda").mul_(0.1).requires_grad_()
    targets = torch.randint(5003, (3000,), device="cuda")
    targets[::7] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"softcap": 20.0}])
@pytest.mark.parametrize("chunk", [256, 999, 3000])
def test_bf16_is_as_exact_as_the_dense_loss(chunk: int, settings: dict[str, Any]) -> None:
    hidden, weight, targets = tensors(torch.bfloat16)
    exact_hidden, exact_weight = (one.detach().double().requires_grad_() for one in (hidden, weight))
    exact = linear_cross_entropy(exact_hidden, exact_weight, targets, **settings)
    exact.backward()  # type: ignore[no-untyped-call]
    with torch.autocast("cuda", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk, **settings)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=2e-4)
    for found, wanted in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert found is not None
        assert wanted is not None
        assert float((found.double() - wanted).norm() / wanted.norm()) < 8e-3


def test_the_plain_loss_is_that_of_torch() -> None:
    hidden, weight, targets = tensors(torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=700)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, weight), targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"z_loss": 1e-2}])
@pytest.mark.parametrize("classes", [3, 8192, 20_001])
def test_the_kernel_computes_what_torch_does(dtype: torch.dtype, settings: dict[str, Any], classes: int) -> None:
    device = torch.device("cuda", 0)
    assert has_kernel(device, dtype)
    torch.manual_seed(1)
    logits = (3 * torch.randn(50, classes, device=device)).to(dtype)
    targets = torch.randint(classes, (50,), device=device)
    targets[::4] = -100
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, targets, reduction="none", label_smoothing=settings.get("label_smoothing", 0.0))
    losses = losses + settings.get("z_loss", 0.0) * wide.logsumexp(-1).square() * targets.ne(-100)
    losses.sum().backward()
    both = {"label_smoothing": 0.0, "z_loss": 0.0} | settings
    before = logits.clone()
    alone = losses_and_gradients(logits, targets, ignore_index=-100, needs_gradient=False, **both)
    assert torch.equal(logits, before)
    found = losses_and_gradients(logits, targets, ignore_index=-100, needs_gradient=True, **both)
    assert torch.equal(found, alone)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    assert wide.grad is not None
    counted = targets.ne(-100)
    bound = 5e-3 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits[counted].double(), wide.grad[counted], rtol=bound, atol=bound / 10)


def test_cublas_adds_16_bit_products_to_fp32() -> None:
    assert _adds_wider(torch.device("cuda", 0), torch.bfloat16)


# "a prototype feature"
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_waits_for_nothing() -> None:
    hidden, weight, targets = tensors(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        linear_cross_entropy(hidden, weight, targets).backward()  # type: ignore[no-untyped-call]
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear_cross_entropy(hidden, weight, targets, chunk_tokens=512).backward()  # type: ignore[no-untyped-call]
        finally:
            torch.cuda.set_sync_debug_mode("default")
