"""flash-attn-4 behind torch's attention: exact numbers, torch's kernels for all else, and nothing left behind."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from paceline import Accelerator
from paceline.nn.flash_attention import FlashAttention, unusable_reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

pytestmark = pytest.mark.gpu
if torch.cuda.is_available() and (_reason := unusable_reason(torch.device("cuda"))):
    pytest.skip(_reason, allow_module_level=True)


@pytest.fixture
def kernels() -> Iterator[FlashAttention]:
    found = FlashAttention()
    yield found
    found.release()


def tensors(heads: int, key_heads: int, queries: int, keys: int, width: int) -> list[Tensor]:
    torch.manual_seed(heads + queries)
    found = []
    for count, length in ((heads, queries), (key_heads, keys), (key_heads, keys), (heads, queries)):
        # As models make them: heads are a view of the width of the hidden state.
        one = torch.randn(2, length, count, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        found.append(one)
    return found


def attend(inputs: list[Tensor], *, causal: bool, compiled: bool = False, **settings: Any) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    query, key, value = (one.detach().requires_grad_() for one in inputs[:3])
    grouped = query.shape[1] != key.shape[1]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped, **settings)

    output = (torch.compile(attention) if compiled else attention)(query, key, value)
    torch.autograd.backward(output, inputs[3].to(output.dtype))
    return [output.detach(), *(one.grad for one in (query, key, value))]  # type: ignore[list-item]


def gaps(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]


def exactly(inputs: list[Tensor], *, causal: bool) -> list[Tensor]:
    return attend([one.double() for one in inputs], causal=causal)


SHAPES = {
    "heads of 64": (16, 16, 2048, 2048, 64),
    "heads of 128": (8, 8, 2048, 2048, 128),
    "grouped heads": (16, 4, 2048, 2048, 64),
    "an odd length": (16, 16, 2111, 2111, 64),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_numbers_are_those_of_attention(shape: str, causal: bool, kernels: FlashAttention) -> None:
    inputs = tensors(*SHAPES[shape])
    found = attend(inputs, causal=causal)
    kernels.release()
    plain = attend(inputs, causal=causal)
    exact = exactly(inputs, causal=causal)
    # Other kernels have computed it: to the last bit, the results differ.
    assert not torch.equal(found[0], plain[0])
    for ours, torchs in zip(gaps(found, exact), gaps(plain, exact), strict=True):
        assert ours < max(1.3 * torchs, 4e-3), (ours, torchs)


def test_compiled_code_calls_them(kernels: FlashAttention) -> None:
    inputs = tensors(*SHAPES["heads of 64"])
    eager, compiled = attend(inputs, causal=True), attend(inputs, causal=True, compiled=True)
    kernels.release()
    torchs = attend(inputs, causal=True, compiled=True)
    torch.testing.assert_close(eager[0], compiled[0], rtol=0, atol=0)
    assert not torch.equal(torchs[0], compiled[0])


@pytest.mark.parametrize("case", ["more keys than queries", "dropout", "few", "a mask"])
def test_all_else_stays_with_torch(case: str, kernels: FlashAttention) -> None:
    keys = 4096 if case == "more keys than queries" else 2048
    inputs = tensors(16, 16, 128 if case == "few" else 2048, 128 if case == "few" else keys, 64)
    settings: dict[str, Any] = {"dropout": {"dropout_p": 0.2}, "a mask": {"attn_mask": torch.ones(2048, 2048).bool()}}
    kwargs = {name: one.cuda() if hasattr(one, "cuda") else one for name, one in settings.get(case, {}).items()}
    torch.manual_seed(0)
    found = attend(inputs, causal=case != "a mask", **kwargs)
    kernels.release()
    torch.manual_seed(0)
    expected = attend(inputs, causal=case != "a mask", **kwargs)
    assert torch.equal(found[0], expected[0])


def test_a_package_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    inputs = tensors(*SHAPES["heads of 64"])
    expected = attend(inputs, causal=True)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", ModuleType("of another version"))
    kernels = FlashAttention()
    found = attend(inputs, causal=True)
    kernels.release()
    assert torch.equal(found[0], expected[0])
    assert "flash-attn-4 is no longer used: AttributeError" in caplog.text


def test_a_run_uses_them_until_its_memory_is_freed() -> None:
    inputs = tensors(*SHAPES["heads of 64"])
    before = attend(inputs, causal=True)
    accelerator = Accelerator(mixed_precision="bf16")
    model = accelerator.prepare(torch.nn.Linear(4, 4))
    assert "attention_kernels: auto" in accelerator.describe()
    during = attend(inputs, causal=True)
    accelerator.free_memory(model)
    after = attend(inputs, causal=True)
    assert not torch.equal(before[0], during[0])
    assert torch.equal(before[0], after[0])
    forbidden = Accelerator(mixed_precision="bf16", attention_kernels="torch")
    forbidden.prepare(torch.nn.Linear(4, 4))
    assert "attention_kernels: auto" not in forbidden.describe()
    assert torch.equal(before[0], attend(inputs, causal=True)[0])
