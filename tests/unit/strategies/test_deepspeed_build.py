"""What is said before DeepSpeed compiles an operation of its own."""

from __future__ import annotations

import pytest
import torch

from paceline import DeepSpeedPlugin
from paceline.errors import PrepareError
from paceline.strategies.deepspeed.build import check_disk, early_settings, engine_settings


def test_an_architecture_that_deepspeed_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    with pytest.raises(PrepareError, match=r"TORCH_CUDA_ARCH_LIST='8\.0;9\.0' for this run"):
        check_disk({"zero_optimization": {"offload_param": {"device": "nvme"}}})


@pytest.mark.parametrize(("device", "told"), [("cpu", 0.0), ("nvme", 0.5)])
def test_the_engine_clips_only_what_is_out_of_reach(device: str, told: float) -> None:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"offload_optimizer": {"device": device}},
    }
    assert engine_settings(settings, 3, 2, builds_optimizer=False)["gradient_clipping"] == told


def test_a_model_is_built_as_the_configuration_says() -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu"}}
    described = {"zero_optimization": {**zero, "offload_optimizer": {"device": "cpu"}}}
    told = early_settings(DeepSpeedPlugin(hf_ds_config=described, zero_stage=3), "bf16")
    assert told["bf16"] == {"enabled": True}
    assert told["zero_optimization"] == {
        "stage": 3,
        "zero_hpz_partition_size": 2,
        "offload_param": {"device": "cpu"},
    }
