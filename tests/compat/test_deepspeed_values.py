"""DeepSpeed's configuration under the switch: what `prepare` fills in, refuses, and returns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from paceline.compat.accelerate.accelerator import Accelerator
from paceline.compat.accelerate.bridge.deepspeed_values import fill_configuration
from paceline.compat.accelerate.bridge.sections import deepspeed_section
from paceline.compat.accelerate.scheduler import AcceleratedScheduler
from paceline.compat.accelerate.utils.dataclasses import DeepSpeedPlugin
from paceline.compat.accelerate.utils.deepspeed import (
    DeepSpeedOptimizerWrapper,
    DeepSpeedSchedulerWrapper,
    DummyOptim,
    DummyScheduler,
)
from tests.compat.test_accelerator import mse, net, on_ranks, samples
from tests.support.engines import needs_deepspeed

OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
SCHEDULE = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
    },
}
BUCKETS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def plugin_of(*sections: str, buckets: bool = False) -> DeepSpeedPlugin:
    known = {"optimizer": OPTIMIZER, "scheduler": SCHEDULE}
    zero: dict[str, Any] = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": "auto"}
    if buckets:
        zero.update(dict.fromkeys(BUCKETS, "auto"))
    settings: dict[str, Any] = {"zero_optimization": zero, "gradient_clipping": "auto"}
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        settings[key] = "auto"
    return DeepSpeedPlugin(hf_ds_config={**settings, **{name: known[name] for name in sections}})


def filled(plugin: DeepSpeedPlugin, *things: Any, **changed: Any) -> dict[str, Any]:
    options = {"accumulation": 4, "ranks": 2, "split_batches": False, **changed}
    fill_configuration(plugin, things, **options)
    return plugin.deepspeed_config


def loader_of(batch_size: int) -> DataLoader[Any]:
    return DataLoader(samples(12), batch_size=batch_size)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_values_of_the_run_are_filled_where_programs_read_them() -> None:
    model = net()
    placeholder = DummyOptim(model.parameters(), lr=5e-5, weight_decay=1e-4)
    schedule = DummyScheduler(placeholder, warmup_num_steps=10, total_num_steps=1001)
    plugin = plugin_of("optimizer", "scheduler")
    config = filled(plugin, model, placeholder, schedule, loader_of(6), loader_of(3))
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["train_batch_size"] == 3 * 4 * 2
    assert config["gradient_accumulation_steps"] == 4
    # As Accelerate does where nobody says otherwise.
    assert config["gradient_clipping"] == 1.0
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is False
    assert config["optimizer"]["params"] == {"lr": 5e-5, "weight_decay": 1e-4, "torch_adam": True}
    # A program counts its steps for one process.
    assert config["scheduler"]["params"] == {
        "warmup_min_lr": 0,
        "warmup_max_lr": 5e-5,
        "warmup_num_steps": 10,
        "total_num_steps": 501,
    }


def test_the_largest_batch_counts_where_the_plugin_says_so_and_a_split_batch_is_divided() -> None:
    plugin = plugin_of()
    plugin.is_train_batch_min = False
    model = net()
    config = filled(plugin, model, sgd(model), loader_of(6), loader_of(3), split_batches=True)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize(
    ("config", "width"),
    [(SimpleNamespace(hidden_size=8), 8), (SimpleNamespace(hidden_sizes=[4, 6]), 6)],
    ids=["one width", "several"],
)
def test_buckets_follow_from_the_width_of_the_model(config: Any, width: int) -> None:
    model: Any = net()
    model.config = config
    zero = filled(plugin_of(buckets=True), model, sgd(model), loader_of(3))["zero_optimization"]
    assert [zero[name] for name in BUCKETS] == [width * width, int(0.9 * width * width), 10 * width]


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, r"Can't find `model.config` entry.*stage3_prefetch_bucket_size"), (SimpleNamespace(), "neither")],
)
def test_buckets_of_a_model_without_a_width_are_refused(config: Any, message: str) -> None:
    model: Any = net()
    model.config = config
    with pytest.raises(ValueError, match=message):
        filled(plugin_of(buckets=True), model, sgd(model), loader_of(3))


def _placeholder_without_section(model: nn.Module) -> tuple[str, list[Any]]:
    return "", [DummyOptim(model.parameters())]


def _optimizer_beside_section(model: nn.Module) -> tuple[str, list[Any]]:
    return "optimizer", [sgd(model)]


def _schedule_beside_section(model: nn.Module) -> tuple[str, list[Any]]:
    optimizer = sgd(model)
    return "scheduler", [optimizer, LambdaLR(optimizer, lambda _: 1.0)]


def _schedule_without_section(model: nn.Module) -> tuple[str, list[Any]]:
    optimizer = sgd(model)
    return "", [optimizer, DummyScheduler(optimizer)]


def _schedule_of_a_placeholder(model: nn.Module) -> tuple[str, list[Any]]:
    placeholder = DummyOptim(model.parameters())
    return "optimizer", [placeholder, LambdaLR(placeholder, lambda _: 1.0)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_placeholder_without_section, "DummyOptim is prepared, .* no section optimizer"),
        (_optimizer_beside_section, "SGD is prepared, .* a section optimizer"),
        (_schedule_beside_section, "LambdaLR is prepared, .* a section scheduler"),
        (_schedule_without_section, "A DummyScheduler is prepared, .* no section scheduler"),
        (_schedule_of_a_placeholder, "LambdaLR is prepared beside a DummyOptim"),
    ],
)
def test_what_contradicts_the_configuration_is_refused(make: Any, message: str) -> None:
    model = net()
    section, things = make(model)
    with pytest.raises(ValueError, match=message):
        filled(plugin_of(*filter(None, [section])), model, *things, loader_of(3))


def test_a_batch_size_that_nobody_knows_is_refused() -> None:
    model = net()
    data: TensorDataset = samples(12)
    unknown: Any = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 3, False))
    for loaders, message in ([], "No loader"), ([unknown], "have no batch size"):
        with pytest.raises(ValueError, match=message):
            filled(plugin_of(), model, sgd(model), *loaders)


def test_a_stage_as_text_and_offloaded_parameters_that_it_does_not_have(caplog: pytest.LogCaptureFixture) -> None:
    stage: Any = "zero2"
    section = deepspeed_section(DeepSpeedPlugin(zero_stage=stage, offload_param_device="cpu"))
    assert section.zero_stage == 2
    assert "offload_param_device has no effect" in caplog.text


def engine_of_four() -> tuple[list[bool], str, str, str, float, int]:
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=4, gradient_clipping=1.0)
    )
    model: Any = net()
    optimizer: Any = sgd(model)
    schedule: Any = LambdaLR(optimizer, lambda _: 1.0)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader_of(3))
    syncs = []
    batch = next(iter(loader))
    norm = 0.0
    for _ in range(4):
        with accelerator.accumulate(model):
            syncs.append(accelerator.sync_gradients)
            accelerator.backward(mse(model, batch))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.deepspeed_config is not None
    kinds = (type(optimizer).__name__, type(schedule).__name__, type(norm).__name__)
    return syncs, *kinds, float(norm), accelerator.deepspeed_config["train_batch_size"]


@pytest.mark.slow
@needs_deepspeed
def test_deepspeeds_number_of_micro_batches_holds() -> None:
    for syncs, *kinds, norm, total in on_ranks(2, engine_of_four):
        assert syncs == [False, False, False, True]
        assert kinds == [DeepSpeedOptimizerWrapper.__name__, AcceleratedScheduler.__name__, "float"]
        assert norm > 0
        assert total == 3 * 4 * 2


def engines_schedule() -> str:
    settings = {"zero_optimization": {"stage": 2}, "optimizer": OPTIMIZER, "scheduler": SCHEDULE}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    model: Any = net()
    placeholder: Any = DummyOptim(model.parameters(), lr=1.0)
    schedule: Any = DummyScheduler(placeholder, total_num_steps=10)
    return type(accelerator.prepare(model, placeholder, schedule, loader_of(3))[2]).__name__


@needs_deepspeed
def test_the_schedule_of_an_engine_is_known_by_its_class() -> None:
    assert on_ranks(2, engines_schedule) == [DeepSpeedSchedulerWrapper.__name__] * 2


def undivided(scale_wrt_gas: bool) -> float:
    """The first step of SGD with two micro-batches, whose losses the program divides itself or not."""
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=2))
    model: Any = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    loader = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=1)
    model, optimizer, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), loader)
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(0.25 * model(torch.ones(1, 1)).sum(), scale_wrt_gas=scale_wrt_gas)
            optimizer.step()
    (weight,) = [p.detach() for p in model.module.parameters()]
    return float(weight)


@needs_deepspeed
@pytest.mark.parametrize(("scale_wrt_gas", "expected"), [(True, -0.25), (False, -0.5)])
def test_a_loss_that_the_program_has_divided_is_not_divided_again(scale_wrt_gas: bool, expected: float) -> None:
    assert on_ranks(2, undivided, scale_wrt_gas) == pytest.approx([expected] * 2)


def teacher_beside_a_student(is_placeholder: bool) -> tuple[bool, bool]:
    torch.manual_seed(0)
    optimizer_section = {"optimizer": OPTIMIZER} if is_placeholder else {}
    plugins = {
        "student": DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}, **optimizer_section}),
        "teacher": DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 3}, "train_batch_size": 2}),
    }
    accelerator = Accelerator(deepspeed_plugin=plugins)
    student: Any = net()
    optimizer: Any = DummyOptim(student.parameters(), lr=0.1) if is_placeholder else sgd(student)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader_of(3))
    accelerator.state.select_deepspeed_plugin("teacher")
    teacher: Any = net()
    batch = next(iter(loader))
    before = teacher(batch[0])
    teacher = accelerator.prepare(teacher)
    is_unchanged = torch.equal(teacher(batch[0]), before)
    first = mse(student, batch)
    accelerator.backward(first)
    optimizer.step()
    return is_unchanged, bool(mse(student, batch) < first)


@needs_deepspeed
@pytest.mark.parametrize("is_placeholder", [False, True])
def test_a_model_beside_the_one_that_is_trained_needs_no_optimizer(is_placeholder: bool) -> None:
    assert on_ranks(2, teacher_beside_a_student, is_placeholder) == [(True, True)] * 2
