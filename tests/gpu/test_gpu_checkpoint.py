"""Training states of accelerators: out, in, into other layouts, and while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline.checkpoint import TensorShard
from paceline.checkpoint.io.staging import Stager
from tests.ranks.test_checkpoint import in_the_background, load_and_go_on, save_and_go_on
from tests.support.engines import needs_deepspeed
from tests.support.ranks import run_on_ranks
from tests.support.state import assert_same_state
from tests.support.training import DDP, FSDP, SINGLE, ZERO, Layout

if TYPE_CHECKING:
    from pathlib import Path

ELEMENTS = 256 * 1024**2
gpu, gpus2 = pytest.mark.gpu, pytest.mark.gpus2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(SINGLE, SINGLE, marks=gpu),
        pytest.param(SINGLE, FSDP, marks=gpus2),
        pytest.param(FSDP, SINGLE, marks=gpus2),
        pytest.param(FSDP, FSDP, marks=gpus2),
        pytest.param(DDP, FSDP, marks=gpus2),
        pytest.param(ZERO[2], FSDP, marks=[gpus2, needs_deepspeed]),
        pytest.param(FSDP, ZERO[3], marks=[gpus2, needs_deepspeed]),
        pytest.param(ZERO[3], ZERO[1], marks=[gpus2, needs_deepspeed]),
    ],
    ids=str,
)
def test_a_checkpoint_is_loaded_by_another_layout(one: Layout, other: Layout, tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    state, losses, ids = run_on_ranks(one.ranks, save_and_go_on, one, folder, "cuda", device="cuda")[0]
    for got, went_on, saw, _ in run_on_ranks(other.ranks, load_and_go_on, other, folder, "cuda", device="cuda"):
        assert_same_state(got, state)
        assert saw == ids
        assert went_on == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(SINGLE, marks=gpu), pytest.param(FSDP, marks=gpus2), pytest.param(DDP, marks=gpus2)],
    ids=str,
)
def test_training_goes_on_while_a_state_is_written(layout: Layout, tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    for losses, again in run_on_ranks(layout.ranks, in_the_background, layout, folder, "cuda", device="cuda"):
        assert again == pytest.approx(losses, abs=1e-5)


def copy_and_overwrite(updated_by_step: bool, hold: bool) -> tuple[float, bool]:
    """Overwrite a tensor at once after its copy was begun; what the copy holds, and whether the host waited."""
    values: Any = torch.ones(ELEMENTS, device="cuda")
    stager = Stager()
    stager.stage(
        {"a": TensorShard.whole(values)}, updated_by_step={"a"} if updated_by_step else set()
    ).clear()  # memory is made and pinned
    stager.wait()
    torch.cuda.synchronize()
    staged = stager.stage({"a": TensorShard.whole(values)}, updated_by_step={"a"} if updated_by_step else set())
    assert stager.copied is not None
    waited = stager.copied.query()  # type: ignore[no-untyped-call]
    if hold:
        stager.hold_stream()
    values.zero_()
    stager.wait()
    least = float(staged["a"].values.min())
    stager.release()
    return least, waited


@pytest.mark.gpu
def test_a_step_waits_for_the_copies_on_the_device() -> None:
    assert run_on_ranks(1, copy_and_overwrite, True, True, device="cuda")[0] == (1.0, False)
    # Without the wait the copy catches the new values: the test can fail.
    assert run_on_ranks(1, copy_and_overwrite, True, False, device="cuda")[0] == (0.0, False)


@pytest.mark.gpu
def test_what_a_forward_changes_is_copied_before_it() -> None:
    assert run_on_ranks(1, copy_and_overwrite, False, False, device="cuda")[0] == (1.0, False)
