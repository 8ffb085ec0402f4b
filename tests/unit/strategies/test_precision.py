"""Number formats: what is refused, where autocast acts, and that a failed forward leaves nothing open."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from paceline.config import AutocastKwargs
from paceline.errors import PrecisionError
from paceline.strategies.precision import autocast_forward, policy_for

CPU = torch.device("cpu")
LINEAR = nn.Linear(4, 4)
INPUT = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("mode", "dtype", "autocast", "scaling"),
    [
        ("no", torch.float32, False, False),
        ("bf16", torch.bfloat16, True, False),
        ("fp16", torch.float16, True, True),
    ],
)
def test_what_a_mode_means(mode: str, dtype: torch.dtype, autocast: bool, scaling: bool) -> None:
    policy = policy_for(mode, CPU)
    assert policy.mode == mode
    assert policy.compute_dtype == dtype
    assert (policy.uses_autocast, policy.needs_loss_scaling) == (autocast, scaling)
    with policy.context():
        assert LINEAR(INPUT).dtype == dtype
    assert LINEAR(INPUT).dtype == torch.float32


def test_a_device_that_cannot_says_what_it_can() -> None:
    with pytest.raises(PrecisionError) as error:
        policy_for("bf16", CPU, supported=["no", "fp16", "fp8"])
    assert error.value.requested == "bf16"
    assert error.value.supported == ("fp16", "fp8", "no")
    assert "mixed_precision='bf16'" in str(error.value)
    with pytest.raises(PrecisionError, match="Choose one of"):
        policy_for("fp32", CPU)


def test_fp8_says_what_it_needs_and_computes_the_rest_in_bf16() -> None:
    with pytest.raises(PrecisionError, match=r"compute capability 8\.9 or higher\. Choose one of bf16, no"):
        policy_for("fp8", CPU, supported=["no", "bf16"])
    policy = policy_for("fp8", CPU, supported=["no", "bf16", "fp8"])
    with policy.context():
        assert LINEAR(INPUT).dtype == torch.bfloat16
    assert not policy.needs_loss_scaling


def test_autocast_may_be_switched_off() -> None:
    policy = policy_for("bf16", CPU, AutocastKwargs(enabled=False))
    assert not policy.uses_autocast
    with policy.context():
        assert LINEAR(INPUT).dtype == torch.float32
    with policy.context(AutocastKwargs(enabled=True)):
        assert LINEAR(INPUT).dtype == torch.bfloat16


class Seen(nn.Module):
    """Notes the dtype of a product inside its forward; fails, or calls itself, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: torch.Tensor, depth: int = 0, fail: bool = False) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        self.dtypes.append(out.dtype)
        if depth:
            self(x, depth - 1, fail)
        elif fail:
            raise KeyError("inside")
        self.dtypes.append(self.linear(x).dtype)
        return out


def test_a_forward_runs_under_autocast_and_nothing_else_does() -> None:
    model = Seen()
    autocast_forward(model, policy_for("bf16", CPU))
    out = model(INPUT)
    assert model.dtypes == [torch.bfloat16] * 2
    assert out.dtype == torch.bfloat16, "outputs keep the dtype they have"
    assert LINEAR(INPUT).dtype == torch.float32
    assert "forward" not in vars(model)


def test_a_model_may_call_itself() -> None:
    model = Seen()
    autocast_forward(model, policy_for("bf16", CPU))
    model(INPUT, depth=2)
    assert model.dtypes == [torch.bfloat16] * 6
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("depth", [0, 2])
def test_a_failed_forward_leaves_no_autocast_behind(depth: int) -> None:
    model = Seen()
    autocast_forward(model, policy_for("bf16", CPU))
    for _ in range(2):
        with pytest.raises(KeyError, match="inside"):
            model(INPUT, depth=depth, fail=True)
        assert not torch.is_autocast_enabled("cpu")
        assert LINEAR(INPUT).dtype == torch.float32
    assert model(INPUT).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_without_autocast_a_model_is_left_alone() -> None:
    model = nn.Linear(4, 4)
    autocast_forward(model, policy_for("no", CPU))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_an_evaluation_under_no_grad_does_not_poison_training() -> None:
    """Autocast caches cast weights; made under no_grad, they must not be used by the next training forward."""
    model = nn.Linear(4, 4)
    autocast_forward(model, policy_for("bf16", CPU))
    with torch.no_grad():
        model(INPUT)
    model(INPUT).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32


def test_a_policy_can_be_pickled() -> None:
    policy = policy_for("bf16", CPU)
    assert pickle.loads(pickle.dumps(policy)) == policy
