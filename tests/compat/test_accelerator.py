"""`Accelerator` under Accelerate's name: what a stand-in easily gets wrong in silence, against Accelerate's numbers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline.compat.accelerate.accelerator import Accelerator
from paceline.compat.accelerate.bridge.sections import dynamo_section
from paceline.compat.accelerate.optimizer import AcceleratedOptimizer
from paceline.compat.accelerate.scheduler import AcceleratedScheduler
from paceline.compat.accelerate.settings.errors import UnsupportedError
from paceline.compat.accelerate.state import AcceleratorState, GradientState, PartialState
from paceline.compat.accelerate.utils.dataclasses import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    ProfileKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)
from paceline.compat.accelerate.utils.deepspeed import DummyOptim, DummyScheduler
from paceline.compat.accelerate.utils.fsdp_utils import (
    get_parameters_from_modules,
    load_fsdp_model,
    load_fsdp_optimizer,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from paceline.config import resolve, use_configuration
from tests.support.engines import needs_deepspeed, with_deepspeed
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STRATEGIES = ["ddp", "fsdp", *with_deepspeed(["zero2", "zero3"])]


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """No states of an earlier program, and none left behind; the constructor writes environment variables."""
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    with fresh():
        return function(*arguments)


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a program returns on each rank; one rank is this process."""
    if size == 1:
        return [call(function, *arguments)]
    return run_on_ranks(size, call, function, *arguments)


def build(strategy: str, **arguments: Any) -> Accelerator:
    if strategy == "fsdp":
        arguments["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2)
    if strategy.startswith("zero"):
        arguments["deepspeed_plugin"] = DeepSpeedPlugin(zero_stage=int(strategy[-1]))
        # Under DeepSpeed this argument would mean DDP.
        os.environ["ACCELERATE_USE_CPU"] = "false"
        return Accelerator(**arguments)
    return Accelerator(cpu=True, **arguments)


def net() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def samples(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, 4, generator=generator)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def mse(model: Any, batch: Any) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


# Metrics


def repeated_losses() -> tuple[int, list[float]]:
    """As the Trainer does: a loss for each sample of the batch size, though the last batch is shorter."""
    accelerator = Accelerator(cpu=True)
    numbers: Any = torch.arange(13.0)
    loader = accelerator.prepare(DataLoader(numbers, batch_size=4))
    gathered = [accelerator.gather_for_metrics(batch.mean().repeat(4)) for batch in loader]
    return len(torch.cat(gathered)), torch.cat(gathered)[-5:].tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_gathered_is_cut_to_the_samples_that_are_left_whatever_its_length(ranks: int) -> None:
    for count, last in on_ranks(ranks, repeated_losses):
        assert count == 13
        # 12 alone in the last batch; on two ranks 8 to 11 beside it, and 12 with fillers 0 to 2.
        assert last == ([9.5] * 4 + [12.0] if ranks == 1 else [9.5] * 4 + [3.75])


def gathered_objects() -> tuple[list[Any], Any, Any]:
    accelerator = Accelerator(cpu=True)
    numbers: Any = torch.arange(13)
    loader = accelerator.prepare(DataLoader(numbers, batch_size=4))
    rows: list[Any] = []
    for batch in loader:
        rows = accelerator.gather_for_metrics(batch, use_gather_object=True)
    text = accelerator.gather_for_metrics(["a", "b"])
    tensor = torch.ones(2)
    return [int(row) for row in rows], text, accelerator.gather_for_metrics(tensor, use_gather_object=True) is tensor


def test_objects_are_gathered_by_row() -> None:
    [(rows, text, is_same)] = on_ranks(1, gathered_objects)
    # One rank gets the input itself.
    assert (rows, text, is_same) == ([12], ["a", "b"], True)
    for rows, text, _ in on_ranks(2, gathered_objects):
        assert rows == [8, 9, 10, 11, 12]
        assert text == ["a", "b", "a", "b"]


# Windows and schedules


def windows(**arguments: Any) -> tuple[list[float], list[float]]:
    """The gradient at the end of each window with a loss of 1 x weight, and the learning rate after it."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4, **arguments)
    model: Any = nn.Linear(1, 1, bias=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    ones: Any = torch.ones(6 * accelerator.num_processes, 1)
    loader: Any = DataLoader(ones)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert isinstance(scheduler, AcceleratedScheduler)
    gradients, rates = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).sum())
            if accelerator.sync_gradients:
                gradients.append(float(next(model.parameters()).grad))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            rates += scheduler.get_last_lr()
    return gradients, rates


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_last_window_is_divided_as_a_full_one_and_a_schedule_counts_every_rank(ranks: int) -> None:
    for gradients, rates in on_ranks(ranks, windows):
        assert gradients == pytest.approx([1.0, 0.5])
        assert rates == pytest.approx([0.5**ranks, 0.5 ** (2 * ranks)])


def split_windows() -> tuple[list[float], list[float]]:
    config = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    optimizer: Any = torch.optim.SGD(net().parameters(), lr=1.0)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step))
    scheduler.step()
    config.split_batches = False
    scheduler.step()
    return scheduler.get_last_lr(), [accelerator.split_batches]


def test_split_batches_count_once_as_long_as_the_configuration_says_so() -> None:
    assert on_ranks(2, split_windows) == [([0.125], [False])] * 2


def driven(strategy: str) -> tuple[dict[str, torch.Tensor], int]:
    """As the Trainer: `_set_sync_gradients`, one loader read ahead, the loss divided by the program."""
    accelerator = build(strategy, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
    model: Any = net()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(samples(24), batch_size=3))
    for index, batch in enumerate(list(loader)):
        ends = index % 2 == 1
        accelerator.gradient_state._set_sync_gradients(ends)
        with contextlib.nullcontext() if ends else accelerator.no_sync(model):
            accelerator.backward(mse(model, batch) / 2, scale_wrt_gas=False)
        if ends:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            model.zero_grad()
    return accelerator.get_state_dict(model), optimizer.num_steps


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_program_that_drives_windows_itself(strategy: str) -> None:
    # DeepSpeed's engine clips by itself, to 1 as Accelerate sets it, whatever the program asks for.
    [(wanted, _)] = on_ranks(1, driven_alone, 1.0 if strategy.startswith("zero") else 0.5)
    state, steps = on_ranks(2, driven, strategy)[0]
    assert steps == 2
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-5)


def driven_alone(max_norm: float) -> tuple[dict[str, torch.Tensor], int]:
    """The same steps in plain PyTorch, over the batches of both ranks."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = list(DataLoader(samples(24), batch_size=3))
    for step in range(2):
        torch.stack([mse(model, batch) / 4 for batch in batches[4 * step : 4 * step + 4]]).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), 2


# Settings


def settings_of_fsdp() -> tuple[str, list[str], bool]:
    """DDP's keyword arguments are passed under any strategy, and the plugin is changed after the constructor."""
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True), GradScalerKwargs(init_scale=2.0)]
    accelerator = build("fsdp", kwargs_handlers=handlers, dynamo_plugin=TorchDynamoPlugin(backend=None, mode=None))  # type: ignore[arg-type]
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = _units_of_linear(plugin)
    model: Any = net()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    units = [name for name, module in model.named_modules() if type(module).__name__.startswith("FSDP")]
    return str(accelerator.distributed_type), units, accelerator.is_fsdp2


def kept_gradients(options: dict[str, bool] | None) -> tuple[bool, bool]:
    """Whether gradients are views of DDP's buckets, and whether those of each step are still there after the last."""
    handlers = [] if options is None else [DistributedDataParallelKwargs(**options)]  # type: ignore[arg-type]
    accelerator = build("ddp", kwargs_handlers=handlers)
    model: Any = net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    # DDP makes new buckets in its second step.
    loader = DataLoader(samples(12), batch_size=4)
    kept, copies = [], []
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(mse(model, batch))
        kept.extend([parameter.grad for parameter in model.parameters()])
        copies.extend([parameter.grad.clone() for parameter in model.parameters()])
    stays = all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    return model.gradient_as_bucket_view, stays


@pytest.mark.parametrize(
    ("options", "views"),
    [
        (None, False),
        ({}, False),
        ({"find_unused_parameters": True}, False),
        ({"gradient_as_bucket_view": True}, True),
        ({"gradient_as_bucket_view": False}, False),
    ],
)
def test_gradients_are_copies_unless_a_program_says_otherwise(options: dict[str, bool] | None, views: bool) -> None:
    for found in on_ranks(2, kept_gradients, options):
        assert found == (views, not views)


def _units_of_linear(plugin: Any) -> Any:
    plugin.transformer_cls_names_to_wrap = ["Linear"]
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    return transformer_auto_wrap_policy


def test_fsdp_takes_ddps_arguments_and_a_plugin_that_changes() -> None:
    for kind, units, is_fsdp2 in on_ranks(2, settings_of_fsdp):
        assert kind == "DistributedType.FSDP"
        assert units == ["", "0", "2"]
        assert is_fsdp2


def launched_with(text: str) -> tuple[str, str, int, bool]:
    """What the file says, with what the Trainer passes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(text)
        with use_configuration(resolve(flags={}, env={}, file=path)):
            accelerator = Accelerator(
                mixed_precision="no", gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1)
            )
    return (
        accelerator.mixed_precision,
        str(accelerator.distributed_type),
        accelerator.gradient_accumulation_steps,
        hasattr(accelerator.state, "fsdp_plugin"),
    )


def test_what_the_program_says_goes_before_the_file() -> None:
    text = "use_cpu: true\nmixed_precision: bf16\ngradient_accumulation_steps: 4\n"
    assert on_ranks(1, launched_with, text)[0][:3] == ("no", "DistributedType.NO", 1)


@pytest.mark.parametrize(("key", "count"), [("gradient_accumulation_steps: 4\n", 1), ("", 0)])
def test_accumulation_of_the_launcher_beside_a_plugin_is_said_once(key: str, count: int, tmp_path: Path) -> None:
    """As transformers' Trainer builds it, which counts the micro-batches of its arguments itself."""
    (tmp_path / "run.yaml").write_text(f"num_processes: 2\nuse_cpu: true\nas_accelerate: true\n{key}")
    (tmp_path / "script.py").write_text(
        "from accelerate import Accelerator\nfrom accelerate.utils import GradientAccumulationPlugin\n"
        "print(Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1)).num_processes)\n"
    )
    command = [sys.executable, "-m", "paceline", "launch", "--quiet", "--config_file", "run.yaml", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("gradient_accumulation_steps 4 (") == said.count("the script's own number is") == count, said


def accumulation_against_json() -> tuple[int, dict[str, Any]]:
    settings = {
        "zero_optimization": {"stage": 2},
        "gradient_accumulation_steps": 2,
        "train_micro_batch_size_per_gpu": 3,
        "train_batch_size": 12,
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    model: Any = net()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, _ = accelerator.prepare(model, optimizer, DataLoader(samples(12), batch_size=3))
    return accelerator.gradient_accumulation_steps, {"micro": model.train_micro_batch_size_per_gpu()}


@needs_deepspeed
def test_deepspeeds_json_goes_before_the_programs_windows() -> None:
    assert on_ranks(2, accumulation_against_json) == [(2, {"micro": 3})] * 2


def placeholders() -> tuple[list[float], int]:
    """A schedule of DeepSpeed's counts once for each step, whatever the number of ranks."""
    sections = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 1.0, "warmup_num_steps": 4, "warmup_type": "linear"},
        },
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}, **sections})
    )
    model: Any = net()
    optimizer: Any = DummyOptim(model.parameters(), lr=1.0)
    scheduler: Any = DummyScheduler(optimizer)
    model, optimizer, scheduler, loader = accelerator.prepare(
        model, optimizer, scheduler, DataLoader(samples(12), batch_size=3)
    )
    rates = []
    for batch in loader:
        accelerator.backward(mse(model, batch))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rates += scheduler.get_last_lr()
    return rates, optimizer.num_steps


@needs_deepspeed
def test_a_schedule_of_deepspeed_counts_each_step_once() -> None:
    for rates, steps in on_ranks(2, placeholders):
        # DeepSpeed's warm-up begins one step late; a step that counted for both ranks would give 0.25 and 0.75.
        assert rates == pytest.approx([0.0, 0.25])
        assert steps == 2


def optimizer_alone() -> None:
    accelerator = build("zero2")
    model = net()
    engine, _, _ = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(samples(12), batch_size=3)
    )
    accelerator.free_memory()
    # As a second train() of one Trainer does, which keeps the engine of the first.
    with pytest.raises(ValueError, match=r"SGD was prepared without its model.*trainer\.optimizer = None"):
        accelerator.prepare(torch.optim.SGD(engine.module.parameters(), lr=0.1))


@needs_deepspeed
def test_an_engine_that_was_destroyed_is_not_trained_again() -> None:
    on_ranks(2, optimizer_alone)


# Training again, and files


def built_before_the_accelerator() -> tuple[int, bool]:
    import deepspeed

    # As in a process in which nothing has used DeepSpeed yet.
    deepspeed.comm.comm.cdb = None
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState()
    # What transformers writes for two ranks, before `from_pretrained`.
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    with deepspeed.zero.Init(config_dict_or_path={**sizes, "zero_optimization": {"stage": 3}}):
        model = nn.Linear(4, 4)
    weight: Any = model.weight
    return weight.ds_numel, weight.ds_tensor.numel() < weight.ds_numel


@needs_deepspeed
def test_a_model_is_built_sharded_before_there_is_an_accelerator() -> None:
    assert on_ranks(2, built_before_the_accelerator) == [(16, True)] * 2


def trained_again(strategy: str) -> list[float]:
    accelerator = build(strategy)
    model: Any = net()
    prepared = (
        accelerator.prepare(model) if strategy == "fsdp" else accelerator.prepare_model(model, evaluation_mode=True)
    )
    with torch.no_grad():
        prepared(torch.ones(1, 4))
    losses = []
    for _ in range(2):
        trained, optimizer, loader = accelerator.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(samples(12), batch_size=3)
        )
        for batch in loader:
            loss = mse(trained, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        accelerator.free_memory()
        assert (accelerator._models, accelerator._optimizers, accelerator._dataloaders) == ([], [], [])
    if strategy == "ddp":
        # Ranks that train apart have different weights.
        sums = torch.stack([p.detach().sum() for p in accelerator.unwrap_model(trained).parameters()])
        one, other = accelerator.gather(sums).chunk(2)
        assert torch.equal(one, other)
    return losses


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_evaluating_and_then_training_twice(strategy: str) -> None:
    model = net()
    wanted = []
    batches = list(DataLoader(samples(12), batch_size=6))
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in batches:
            loss = mse(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            wanted.append(float(loss.detach()))
    assert on_ranks(2, trained_again, strategy)[0] == pytest.approx(wanted, abs=1e-5)


class Count:
    """Something with a state."""

    value = 1

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def saved(folder: str) -> tuple[list[str], list[str], bool, int]:
    project = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(cpu=True, project_config=project)
    model: Any = net()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    count = Count()
    accelerator.register_for_checkpointing(count)
    seen: list[Any] = []
    handle = accelerator.register_save_state_pre_hook(lambda models, weights, where: seen.append(len(weights)))
    accelerator.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    for _ in range(3):
        accelerator.save_state()
        handle.remove()
    before = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
    drawn = torch.rand(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    count.value = 5
    accelerator.load_state()
    after = accelerator.get_state_dict(model)
    same = all(torch.equal(before[name], after[name]) for name in before) and torch.equal(drawn, torch.rand(1))
    root = Path(folder, "checkpoints")
    names = sorted(path.name for path in root.iterdir())
    files = sorted(path.name for path in (root / names[-1]).iterdir())
    assert seen == [1]
    return names, files, same, count.value


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_have_accelerates_names(ranks: int, tmp_path: Path) -> None:
    random = [f"random_states_{rank}.pkl" for rank in range(ranks)]
    wanted = ["custom_checkpoint_0.pkl", "model.safetensors", "optimizer.bin", *random, "scheduler.bin"]
    for names, files, same, value in on_ranks(ranks, saved, str(tmp_path)):
        assert names == ["checkpoint_1", "checkpoint_2"]
        assert files == wanted
        assert same
        assert value == 1


def sharded_files(kind: str, folder: str) -> tuple[list[str], bool]:
    accelerator = build("fsdp")
    plugin = accelerator.state.fsdp_plugin
    plugin.set_state_dict_type(kind)
    model: Any = net()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    save_fsdp_model(plugin, accelerator, model, folder)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    before = [p.to_local().clone() for p in model.parameters()]
    moments = [state["exp_avg"].to_local().clone() for state in optimizer.state.values()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
    load_fsdp_model(plugin, accelerator, model, folder)
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    same = all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
    again = [state["exp_avg"].to_local() for state in optimizer.state.values()]
    same = same and all(torch.equal(one, other) for one, other in zip(again, moments, strict=True))
    return sorted(path.name for path in Path(folder).iterdir()), same


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("FULL_STATE_DICT", ["optimizer.bin", "pytorch_model_fsdp.bin"]),
        ("SHARDED_STATE_DICT", ["optimizer_0", "pytorch_model_fsdp_0"]),
    ],
)
def test_sharded_models_are_saved_and_loaded(kind: str, files: list[str], tmp_path: Path) -> None:
    assert on_ranks(2, sharded_files, kind, str(tmp_path)) == [(files, True)] * 2


def test_parameters_of_modules() -> None:
    model = net()
    assert get_parameters_from_modules("2", model, torch.device("cpu")) == set(model[2].parameters())
    assert get_parameters_from_modules([model[0]], model, torch.device("cpu")) == set(model[0].parameters())


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mixed_precision": "fp12"}, ValueError, "mixed_precision is 'fp12'"),
        ({"kwargs_handlers": [GradScalerKwargs(), GradScalerKwargs()]}, ValueError, "two GradScalerKwargs"),
        ({"kwargs_handlers": [3]}, TypeError, "kwargs_handlers has a int"),
        ({"fsdp_plugin": 3}, TypeError, "fsdp_plugin is a int"),
        ({"megatron_lm_plugin": object()}, NotImplementedError, "Megatron-LM is asked for"),
        (
            {"gradient_accumulation_steps": 2, "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=2)},
            ValueError,
            "gradient_accumulation_steps is 2, beside",
        ),
        ({"dynamo_backend": "no", "dynamo_plugin": TorchDynamoPlugin()}, ValueError, "are both given"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with fresh(), pytest.raises(error, match=message):
        Accelerator(cpu=True, **arguments)


def test_calls_that_cannot_work() -> None:
    with fresh():
        accelerator = Accelerator(cpu=True)
        with pytest.raises(UnsupportedError, match="LOMO"):
            accelerator.backward(torch.ones((), requires_grad=True), learning_rate=0.1)
        with pytest.raises(ValueError, match=r"\(int\) cannot be registered"):
            accelerator.register_for_checkpointing(3)
        with pytest.raises(TypeError, match="without a folder"):
            accelerator.save_state()
        with pytest.raises(ValueError, match="does not exist"):
            accelerator.load_state("/nowhere/at/all")
        with pytest.raises(ValueError, match="device_placement has 1 entries for 2"):
            accelerator.prepare(1, 2, device_placement=[True])
        assert accelerator.prepare(None, "text", {"a": 1}) == (None, "text", {"a": 1})


@pytest.mark.parametrize("first", [True, False], ids=["zero_grad first", "zero_grad last"])
def test_gradients_are_dropped_where_they_are_synchronized(first: bool) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    weights = []
    for value in (1.0, 2.0, 4.0, 8.0):
        with accelerator.accumulate(model):
            if first:
                optimizer.zero_grad()
            accelerator.backward(model(torch.full((1, 1), value)).sum())
            optimizer.step()
            if not first:
                optimizer.zero_grad()
        weights.append(model.weight.item())
    # A script that drops gradients first trains on the last micro-batch and on what the step before it left.
    assert weights == ([0.0, -1.0, -1.0, -5.0] if first else [0.0, -1.5, -1.5, -7.5])


def test_nothing_compiles_unless_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    section = dynamo_section(TorchDynamoPlugin())
    assert section is not None
    assert section.backend == "no", "paceline's own default compiles on a GPU"
    monkeypatch.setenv("PACELINE_DYNAMO_BACKEND", "auto")
    assert dynamo_section(TorchDynamoPlugin()) is None, "the configuration says it"


def test_a_loop_that_ends_before_its_profile_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schedule = {"wait": 5, "warmup": 1, "active": 1}
    handler = ProfileKwargs(activities=["cpu"], schedule_option=schedule, output_trace_dir=str(tmp_path / "traces"))
    with fresh(), Accelerator(cpu=True).profile(handler) as profiler:
        profiler.step()
    assert not (tmp_path / "traces").exists()
    assert "profile() recorded nothing" in caplog.text
