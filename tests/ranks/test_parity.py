"""N ranks with b samples each equal one rank with N·b, under every strategy."""

from __future__ import annotations

import pytest
import torch

from tests.support.engines import needs_deepspeed, slowly, with_deepspeed
from tests.support.ranks import run_on_ranks
from tests.support.training import (
    DDP,
    FOUR_RANKS,
    FSDP,
    FSDP_OFFLOADED,
    SINGLE,
    TWO_RANKS,
    ZERO,
    ZERO_FOUR,
    ZERO_OFFLOADED,
    ZERO_PARAMETERS_OFFLOADED,
    Layout,
    Trained,
    assert_close,
    train,
    train_plainly,
)


@pytest.fixture(scope="module")
def plain() -> Trained:
    return train_plainly()


# One layout of each kind that has code of its own; the rest, and each without accumulation, are in the slow tests.
COMMON = [SINGLE, DDP, FSDP, FSDP_OFFLOADED, *with_deepspeed([ZERO[2], ZERO[3]])]
RARE = [
    *[layout for layout in (*TWO_RANKS, *FOUR_RANKS) if layout not in COMMON],
    *with_deepspeed([ZERO[0], ZERO[1], *ZERO_OFFLOADED, ZERO_PARAMETERS_OFFLOADED, *ZERO_FOUR], every_stage=True),
]
STRATEGIES = [
    SINGLE,
    DDP,
    FSDP,
    *with_deepspeed([ZERO[2]]),
    *slowly(with_deepspeed([ZERO[0], ZERO[1], ZERO[3]], every_stage=True)),
]


@pytest.mark.parametrize("accumulation", [*slowly([1]), 4])
@pytest.mark.parametrize("layout", [*COMMON, *slowly(RARE)], ids=str)
def test_every_layout_equals_plain_pytorch(plain: Trained, layout: Layout, accumulation: int) -> None:
    for trained in run_on_ranks(layout.ranks, train, layout, accumulation):
        assert_close(trained.losses, plain.losses, 1e-5)
        assert_close(trained.norms, plain.norms, 1e-5)


@pytest.mark.parametrize("layout", STRATEGIES, ids=str)
def test_a_wrong_scale_is_noticed(plain: Trained, layout: Layout) -> None:
    trained = run_on_ranks(layout.ranks, train, layout, 4, "no", "cpu", 1.01)[0]
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(trained.norms, plain.norms, 1e-5)


@pytest.mark.parametrize("layout", STRATEGIES, ids=str)
def test_weights_are_the_same_under_their_own_names(plain: Trained, layout: Layout) -> None:
    weights = run_on_ranks(layout.ranks, train, layout)[0].weights
    assert weights.keys() == plain.weights.keys()
    for name, value in weights.items():
        assert torch.allclose(value, plain.weights[name], atol=2e-5), name
    assert torch.equal(weights["head.weight"], weights["tokens.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", [SINGLE, DDP, FSDP], ids=str)
def test_low_precision_stays_near_fp32(plain: Trained, layout: Layout, precision: str) -> None:
    trained = run_on_ranks(layout.ranks, train, layout, 1, precision)[0]
    assert_close(trained.losses, plain.losses, {"bf16": 0.05, "fp16": 0.01}[precision])
    assert all(value.dtype == torch.float32 for value in trained.weights.values())
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(trained.losses, plain.losses, 1e-6)  # it was really computed in low precision


@needs_deepspeed
@pytest.mark.parametrize("layout", ZERO, ids=str)
def test_zero_in_bf16_stays_near_fp32(plain: Trained, layout: Layout) -> None:
    trained = run_on_ranks(layout.ranks, train, layout, 1, "bf16")[0]
    assert_close(trained.losses, plain.losses, 0.05)
    assert all(value.dtype == torch.float32 for value in trained.weights.values())
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(trained.losses, plain.losses, 1e-6)
