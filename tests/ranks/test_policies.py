"""Boundaries that the script sets, meshes, several settings of DeepSpeed and foreign shardings, on two real ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from paceline import Accelerator, DeepSpeedPlugin, GradientAccumulationPlugin
from paceline.errors import ConfigError, PrepareError
from tests.support.engines import make, needs_deepspeed, with_deepspeed
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from pathlib import Path

STRATEGIES = ["ddp", "fsdp", *with_deepspeed(["zero2", "zero3"])]
STEPS = 3


def net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def micro_batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank + 1)
    return [torch.randn(3, 4, generator=generator) for _ in range(2 * STEPS)]


def optimizer_of(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def whole(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    return accelerator.get_state_dict(model)


def alone() -> dict[str, torch.Tensor]:
    """The weights after the same steps on one process, each over all micro-batches."""
    model = net()
    optimizer = optimizer_of(model)
    parts = [micro_batches(rank) for rank in range(2)]
    for step in range(STEPS):
        losses = [model(part[2 * step + i]).pow(2).mean() / 4 for part in parts for i in range(2)]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-5)


def driven(strategy: str) -> dict[str, torch.Tensor]:
    """A loop that decides itself where a window ends, and divides the loss itself."""
    accelerator = make(strategy)
    model: Any = net()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    for index, batch in enumerate(micro_batches(accelerator.process_index)):
        ends = index % 2 == 1
        accelerator.sync_gradients = ends
        # DeepSpeed's engine needs no_sync neither to accumulate nor to end its window.
        quiet = strategy.startswith("zero") or ends
        with nullcontext() if quiet else accelerator.no_sync(model):
            accelerator.backward(model(batch).pow(2).mean() / 2)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.num_steps == STEPS
    return whole(accelerator, model)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_script_ends_windows(strategy: str) -> None:
    assert_equal(run_on_ranks(2, driven, strategy)[0], alone())


def each_batch(strategy: str) -> dict[str, torch.Tensor]:
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    accelerator = make(strategy, gradient_accumulation_plugin=plugin)
    model: Any = net()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    for batch in micro_batches(accelerator.process_index):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
    return whole(accelerator, model)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_exchanged_in_each_micro_batch(strategy: str) -> None:
    assert_equal(run_on_ranks(2, each_batch, strategy)[0], alone())


def triggered(strategy: str) -> dict[str, torch.Tensor]:
    accelerator = make(strategy)
    model: Any = net()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    batches = micro_batches(accelerator.process_index)
    for step in range(STEPS):
        losses = []
        with accelerator.no_sync(model):
            losses = [model(batch).pow(2).mean() for batch in batches[2 * step : 2 * step + 2]]
            for loss in losses[:-1]:
                accelerator.backward(loss / 2)
        with accelerator.trigger_sync_in_backward(model):
            accelerator.backward(losses[-1] / 2)
        optimizer.step()
        optimizer.zero_grad()
    return whole(accelerator, model)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_backward_exchanges_what_its_forwards_did_not_announce(strategy: str) -> None:
    assert_equal(run_on_ranks(2, triggered, strategy)[0], alone())


# Meshes and plugins


def meshes() -> tuple[object, object]:
    mesh = make("fsdp").torch_device_mesh
    assert mesh is not None
    return mesh.mesh_dim_names, make("ddp").torch_device_mesh


def test_the_mesh_is_visible() -> None:
    assert run_on_ranks(2, meshes) == [(("dp_shard",), None)] * 2


def selected() -> list[int]:
    plugins = {"small": DeepSpeedPlugin(zero_stage=2), "large": DeepSpeedPlugin(zero_stage=3)}
    accelerator = Accelerator(cpu=True, deepspeed_plugins=plugins)
    stages = []
    for name in ("small", "large"):
        accelerator.select_deepspeed_plugin(name)
        model: Any = net()
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        assert accelerator.deepspeed_plugin is not None
        stages += [accelerator.deepspeed_plugin.zero_stage, model.zero_optimization_stage()]
        accelerator.backward(model(torch.ones(1, 4)).sum())
        optimizer.step()
        with pytest.raises(PrepareError, match="Other settings of deepspeed were selected after"):
            accelerator.select_deepspeed_plugin("small")
        accelerator.free_memory(model, optimizer)
    with pytest.raises(ConfigError, match="choose one of small, large"):
        accelerator.select_deepspeed_plugin("medium")
    return stages


@needs_deepspeed
def test_deepspeed_settings_are_selected_by_name() -> None:
    assert run_on_ranks(2, selected) == [[2, 2, 3, 3]] * 2


# Models that something else has sharded, as transformers' from_pretrained(distributed_config=...) does


def sharded_elsewhere(how: str) -> dict[str, torch.Tensor]:
    """A model whose placement and gradient exchange are its own: only autocast is added, and its optimizer prepared."""
    accelerator = make("ddp")
    model: Any = net()
    mesh = init_device_mesh("cpu", (2,))
    if how == "tensor parallel":
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        parts = [torch.cat(pair) for pair in zip(*(micro_batches(rank) for rank in range(2)), strict=True)]
    else:
        fully_shard(model, mesh=mesh)
        parts = micro_batches(accelerator.process_index)
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    optimizer = accelerator.prepare(optimizer_of(model))
    for index, batch in enumerate(parts):
        accelerator.sync_gradients = index % 2 == 1
        accelerator.backward(model(batch).pow(2).mean() / 2)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }


def parallel_under_fsdp() -> str:
    model = parallelize_module(net(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {"0": ColwiseParallel()})
    with pytest.raises(PrepareError) as refused:
        make("fsdp").prepare(model)
    return str(refused.value)


def test_fsdp_refuses_what_tensor_parallelism_has_sharded() -> None:
    for message in run_on_ranks(2, parallel_under_fsdp):
        assert "0.weight is sharded already, over the mesh axis tp by something other than FSDP" in message


def loaded_in_shards(folder: str) -> tuple[list[float], str]:
    """Train what transformers has sharded while it loaded, and return the losses."""
    from transformers import LlamaForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    accelerator = make("fsdp")
    model: Any = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    losses = _losses(accelerator, model)
    accelerator.save_state(f"{folder}/state")
    accelerator.load_state(f"{folder}/state")
    return losses, type(next(model.parameters())).__name__


def _losses(accelerator: Accelerator, model: Any) -> list[float]:
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    rows = torch.arange(32).reshape(4, 8)[accelerator.process_index :: accelerator.num_processes]
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses


@pytest.mark.compat
def test_what_transformers_loads_in_shards_is_trained_as_it_is(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.24")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, **shape))
    model.save_pretrained(tmp_path)
    wanted = _losses(make("single"), model)
    for losses, kind in run_on_ranks(2, loaded_in_shards, str(tmp_path)):
        assert kind == "DTensor"
        assert losses == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("how", ["fully_shard", "tensor parallel"])
def test_what_was_sharded_elsewhere_is_trained_as_it_is(how: str) -> None:
    wanted = alone()
    for got in run_on_ranks(2, sharded_elsewhere, how):
        assert_equal(got, wanted)
