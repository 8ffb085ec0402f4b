"""Every block that DeepSpeed documents in its JSON: a training with it is the same, or it is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paceline import Accelerator, DeepSpeedPlugin, DummyOptim
from paceline.errors import ConfigError, PrepareError
from tests.support.engines import needs_deepspeed
from tests.support.ranks import run_on_ranks

pytestmark = needs_deepspeed

STEPS = 3
HERE = "FOLDER"
MONITOR = {"enabled": True, "output_path": HERE, "job_name": "job"}

# What each asks for is on, wherever a CPU can do it.
COMMON: dict[str, dict[str, Any]] = {
    "activation_checkpointing": {
        "activation_checkpointing": {
            "partition_activations": False,
            "cpu_checkpointing": False,
            "contiguous_memory_optimization": False,
            "number_checkpoints": None,
            "synchronize_checkpoint_boundary": True,
            "profile": True,
        }
    },
    "flops_profiler": {"flops_profiler": {"enabled": True, "profile_step": 1, "output_file": f"{HERE}/flops.txt"}},
    "comms_logger": {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}},
    "csv_monitor": {"csv_monitor": MONITOR},
    "timers": {"wall_clock_breakdown": True, "timers": {"throughput": {"enabled": True}}, "steps_per_print": 1},
    "dumps": {"dump_state": True, "memory_breakdown": True, "log_level": "info"},
    "optimizer": {
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "zero_allow_untested_optimizer": True,
    },
}
RARE: dict[str, dict[str, Any]] = {
    "partitioned activations": {
        "activation_checkpointing": {
            "partition_activations": True,
            "contiguous_memory_optimization": True,
            "number_checkpoints": 2,
        }
    },
    "tensorboard": {"tensorboard": MONITOR},
    "monitors that are off": {"wandb": {"enabled": False}, "comet": {"enabled": False}},
    "aio": {"aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True}},
    "data_types": {"data_types": {"grad_accum_dtype": "fp32"}},
    "communication": {"communication_data_type": "fp32", "seq_parallel_communication_data_type": "fp32"},
    "gathering": {"disable_allgather": True, "use_data_before_expert_parallelism": True},
    "memory": {"disable_python_gc": True, "vocabulary_size": 1024},
    "untested": {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
    "compile": {"compile": {"deepcompile": False}},
    "precision that is off": {"bf16": {"enabled": False}, "fp16": {"enabled": False}},
    "batches": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1},
    "scales": {"prescale_gradients": False, "gradient_predivide_factor": 1.0, "gradient_allreduce_op": "mean"},
    "what was removed and is off": {
        "amp": {"enabled": False},
        "compression_training": {},
        "curriculum_learning": {"enabled": False},
        "eigenvalue": {"enabled": False},
        "elasticity": {"enabled": False},
        "progressive_layer_drop": {"enabled": False},
        "quantize_training": {"enabled": False},
        "sparse_gradients": False,
        "fp32_allreduce": False,
    },
    "what is not carried out and is off": {
        "autotuning": {"enabled": False},
        "checkpoint": {},
        "data_efficiency": {"enabled": False},
        "hybrid_engine": {"enabled": False},
        "pipeline": {},
        "torch_autocast": {"enabled": False},
        "weight_quantization": {},
    },
}
SCALED: dict[str, dict[str, Any]] = {
    "prescale": {"prescale_gradients": True},
    "predivide": {"gradient_predivide_factor": 4.0},
}
BLOCKS = COMMON | RARE | SCALED


class Net(nn.Module):
    """Two layers; under activation checkpointing the last is computed again by DeepSpeed's own function.

    Its input is an activation, as in a model of many blocks. DeepSpeed flattens what it partitions, in place, and
    autograd then refuses the gradient of an input that is a leaf.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.last = nn.Linear(8, 2)
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.checkpoints:
            import deepspeed

            out: Tensor = deepspeed.checkpointing.checkpoint(self.last, hidden)
        else:
            out = self.last(hidden)
        return out


def batches() -> Tensor:
    return torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(1))


def fresh() -> Net:
    torch.manual_seed(0)
    return Net()


def wanted() -> dict[str, Tensor]:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in batches():
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def placed(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: placed(inner, folder) for key, inner in value.items()}
    return value.replace(HERE, folder) if isinstance(value, str) else value


def trained(block: dict[str, Any], zero: dict[str, Any], folder: str) -> dict[str, Tensor]:
    settings = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 4, **placed(block, folder)}
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    model: Any = fresh()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if "optimizer" in block:
        optimizer = DummyOptim(model.parameters(), lr=0.1)
    model.checkpoints = "activation_checkpointing" in block
    model, optimizer = accelerator.prepare(model, optimizer)
    for x in batches():
        accelerator.backward(model(x[accelerator.process_index :: 2].clone()).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    found = accelerator.get_state_dict(model)
    accelerator.free_memory()
    _forget()
    return {name: value for name, value in found.items() if torch.is_tensor(value)}


def _forget() -> None:
    """What DeepSpeed keeps for the whole process."""
    import deepspeed
    from deepspeed.runtime.activation_checkpointing import checkpointing

    checkpointing.reset()
    for name in ("CPU_CHECKPOINT", "PARTITION_ACTIVATIONS", "CONTIGUOUS_CHECKPOINTING", "SYNCHRONIZE", "PROFILE_TIME"):
        setattr(checkpointing, name, False)
    if deepspeed.comm.comm.comms_logger is not None:
        deepspeed.comm.comm.comms_logger.enabled = False


def check(name: str, zero: dict[str, Any], folder: Path) -> None:
    for found in run_on_ranks(2, trained, BLOCKS[name], zero, str(folder))[:1]:
        for key, value in wanted().items():
            assert torch.allclose(found[key], value, atol=1e-5), key


@pytest.mark.parametrize("name", COMMON)
def test_a_common_block_trains_alike(name: str, tmp_path: Path) -> None:
    check(name, {"stage": 2}, tmp_path)
    if name == "csv_monitor":
        assert list(tmp_path.rglob("*.csv")), "the monitor writes"
    if name == "flops_profiler":
        assert (tmp_path / "flops.txt").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", COMMON | RARE)
def test_every_block_trains_alike_at_every_stage(name: str, stage: int, tmp_path: Path) -> None:
    if name == "tensorboard":
        pytest.importorskip("tensorboard", reason="pip install tensorboard")
    check(name, {"stage": stage}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 1}, *({"stage": n, "reduce_scatter": False} for n in (2, 3))])
@pytest.mark.parametrize("name", SCALED)
def test_scales_change_no_mean(name: str, zero: dict[str, Any], tmp_path: Path) -> None:
    check(name, zero, tmp_path)


def refused(block: dict[str, Any], stage: int) -> str:
    with pytest.raises(ConfigError) as error:
        trained(block, {"stage": stage}, "")
    return str(error.value)


@pytest.mark.parametrize(
    ("block", "stage", "words"),
    [
        ({"prescale_gradients": True}, 2, ("prescale_gradients: true", "by reduce-scatter", "remove the key, or")),
        ({"gradient_predivide_factor": 2.0}, 3, ("gradient_predivide_factor: 2.0", "by reduce-scatter", "remove")),
        (
            {"optimizer": {"type": "AdamW", "torch_adam": True}},
            2,
            ("optimizer.torch_adam: is not read here", "it is read in optimizer.params", "move it there"),
        ),
    ],
)
def test_what_cannot_go_together_is_said_before_the_engine_is_built(
    block: dict[str, Any], stage: int, words: tuple[str, ...]
) -> None:
    for message in run_on_ranks(2, refused, block, stage):
        assert all(part in message for part in words)


def moved_to_the_host() -> str:
    with pytest.raises(PrepareError) as error:
        trained({"activation_checkpointing": {"cpu_checkpointing": True}}, {"stage": 2}, "")
    return str(error.value)


def test_activations_cannot_be_moved_from_the_cpu_to_the_cpu() -> None:
    for message in run_on_ranks(2, moved_to_the_host):
        assert "activation_checkpointing.cpu_checkpointing is true" in message
        assert "Remove cpu_checkpointing" in message
