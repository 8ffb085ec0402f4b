"""DeepSpeed itself loads the universal layout that `convert` writes, at every stage and from every source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from paceline.checkpoint.foreign import open_foreign
from paceline.checkpoint.foreign.writers import WRITERS
from tests.data.foreign.make import Net, _expected_of_engine, groups_of, loss_of
from tests.support.engines import needs_deepspeed
from tests.support.ranks import run_on_ranks

RECORDED = Path(__file__).parents[1] / "data" / "foreign"


def load(folder: str, stage: int) -> tuple[dict[str, Tensor], int, float]:
    """What an engine holds after loading, and the loss of its next step."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": True},
    }
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    engine.load_checkpoint(folder, load_lr_scheduler_states=False)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
            found.update(_expected_of_engine(engine, name, parameter, shape))
    loss = loss_of(engine, 3)
    engine.backward(loss)
    engine.step()
    return found, engine.global_steps, float(loss.detach())


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("source", ["accelerate_fsdp", "deepspeed_3"])
def test_deepspeed_loads_it(source: str, stage: int, tmp_path: Path) -> None:
    WRITERS["deepspeed"](open_foreign(RECORDED / source), tmp_path, lambda _: None)
    expected = load_file(RECORDED / source / "expected.safetensors")
    for found, steps, loss in run_on_ranks(2, load, str(tmp_path), stage):
        assert len(found) == 3 * 9
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
        assert steps == 4
        assert loss < 5.0
