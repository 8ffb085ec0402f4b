"""The process-wide states."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline.compat.accelerate.parallelism_config import ParallelismConfig
from paceline.compat.accelerate.state import AcceleratorState, GradientState, PartialState, is_initialized
from paceline.compat.accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
    clear_environment,
    patch_environment,
)
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _no_states() -> Iterator[None]:
    _reset()
    yield
    _reset()


def test_all_instances_share_one_state() -> None:
    assert PartialState._shared_state == {}
    first = PartialState(cpu=True)
    assert first.initialized
    second = PartialState()
    second.process_index = 5
    assert first.process_index == 5
    assert PartialState._shared_state["process_index"] == 5
    PartialState._reset_state()
    assert PartialState._shared_state == {}
    with pytest.raises(AttributeError, match="_reset_state"):
        _ = first.device
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = first.nothing


def test_the_device_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    assert PartialState().device == torch.device("meta")


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="world"):
        PartialState(cpu=True, world_size=2)
    with pytest.raises(NotImplementedError, match="sagemaker"):
        PartialState(_use_sagemaker_dp=True)
    assert PartialState._shared_state == {}
    assert PartialState(cpu=True, timeout=timedelta(minutes=1), _use_sagemaker_dp=False).num_processes == 1


def test_the_accelerators_state_comes_of_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Accelerator"):
        AcceleratorState()
    assert not is_initialized()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    state = AcceleratorState(cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True)
    assert is_initialized()
    assert (state.mixed_precision, state.deepspeed_plugin, state.is_fsdp2) == ("bf16", None, False)
    assert getattr(state, "fsdp_plugin", None) is None
    assert AcceleratorState(mixed_precision="bf16").process_index == 0
    with pytest.raises(ValueError, match="fp16"):
        AcceleratorState(mixed_precision="fp16")
    AcceleratorState._reset_state()
    assert not is_initialized()
    assert PartialState._shared_state != {}


def test_deepspeed_keeps_the_precision_and_one_plugin_is_active() -> None:
    first, second = DeepSpeedPlugin(zero_stage=2), DeepSpeedPlugin(zero_stage=3)
    plugins = {"first": first, "second": second}
    state = AcceleratorState("bf16", cpu=True, deepspeed_plugin=plugins, _from_accelerator=True)
    assert state.distributed_type == "DEEPSPEED"
    assert state.mixed_precision == "bf16"
    assert id(state.deepspeed_plugin) == id(first)
    state.select_deepspeed_plugin("second")
    assert id(state.deepspeed_plugin) == id(second)
    assert state.get_deepspeed_plugin("first").selected is False
    with pytest.raises(NotImplementedError):
        first.selected = True
    with pytest.raises(ValueError, match="select_deepspeed_plugin"):
        first.select()


def _fsdp(version: int) -> tuple[Any, ...]:
    _reset()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
    state = AcceleratorState("bf16", cpu=True, fsdp_plugin=plugin, _from_accelerator=True)
    answer = (state.distributed_type, state.is_fsdp2, plugin.mixed_precision_policy.param_dtype, state.num_processes)
    same = state.fsdp_plugin is plugin and PartialState().distributed_type is DistributedType.FSDP
    _reset()
    return *answer, same


def test_fsdp_shards_on_the_cpu_too() -> None:
    expected = (DistributedType.FSDP, True, torch.bfloat16, 2, True)
    assert run_on_ranks(2, _fsdp, 2) == [expected, expected]
    assert run_on_ranks(2, _fsdp, 1)[0][:2] == (DistributedType.FSDP, False)


def _trains_with_one_rank(asks: bool) -> tuple[Any, ...]:
    from torch.distributed.tensor import DTensor

    from paceline.compat.accelerate import Accelerator

    _reset()
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if asks else {}
    with patch_environment(**variables):
        accelerator = Accelerator(mixed_precision="bf16")
        model = torch.nn.Linear(4, 4)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        found = accelerator.distributed_type, isinstance(next(model.parameters()), DTensor), accelerator.is_fsdp2
    accelerator.end_training()
    _reset()
    return found


def test_a_single_rank_on_a_cpu_shards_where_the_launcher_asks_for_it() -> None:
    assert run_on_ranks(1, _trains_with_one_rank, True) == [(DistributedType.FSDP, True, True)]
    assert run_on_ranks(1, _trains_with_one_rank, False) == [(DistributedType.NO, False, False)]


def _mesh() -> tuple[Any, ...]:
    config = ParallelismConfig(dp_shard_size=2)
    mesh = config.get_device_mesh("cpu")
    assert mesh is not None
    with pytest.raises(ValueError, match="cuda"):
        config.get_device_mesh("cuda")
    return mesh.mesh_dim_names, mesh["dp"].size(), mesh["dp_shard_cp"].size(), config.get_device_mesh() is mesh


def test_the_mesh_has_the_parts_that_programs_ask_for() -> None:
    assert run_on_ranks(2, _mesh) == [(("dp_shard",), 2, 2, True)] * 2
    assert ParallelismConfig().get_device_mesh("cpu") is None
    with pytest.raises(ValueError, match="device_type"):
        ParallelismConfig().get_device_mesh()


def test_a_loader_that_is_gone_is_not_active() -> None:
    class Loader:
        end_of_dataloader, remainder = True, 2

    state, loader = GradientState(), Loader()
    state._add_dataloader(loader)
    assert (state.in_dataloader, state.end_of_dataloader, state.remainder) == (True, True, 2)
    del loader
    assert (state.in_dataloader, state.end_of_dataloader, state.remainder) == (False, False, -1)


def test_variables_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("TWIN_KEPT", "1")
    with clear_environment():
        assert "TWIN_KEPT" not in os.environ
        os.environ["TWIN_NEW"] = "1"
    assert "TWIN_NEW" not in os.environ
    assert os.environ["TWIN_KEPT"] == "1"
