"""The rules that an adapter to another library exchanges, on one process: strict by default, each by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from paceline import Accelerator, DistributedDataParallelKwargs, GradScalerKwargs
from paceline.accelerator.policies import Policies, use_policies
from paceline.accelerator.stepping import AcceleratedOptimizer, AcceleratedScheduler, OwnBoundary, WindowPolicy
from paceline.config import Leniency, resolve, use_configuration
from paceline.config.resolution import with_arguments
from paceline.errors import ConfigError, DeviceError, ForeignOptimizerError, SteppingError, UnassignedParametersError

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.data import ActiveLoaders


def build(policies: Policies, **arguments: Any) -> Accelerator:
    with use_policies(policies):
        return Accelerator(cpu=True, **arguments)


def lenient(**what: bool) -> Policies:
    return Policies(leniency=Leniency(**what))


def test_rules_hold_for_what_is_built_inside_alone() -> None:
    build(lenient(unread_settings=True))
    with pytest.raises(ConfigError, match="unused settings"):
        Accelerator(
            cpu=True, strategy="single", kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
        )


# Leniency


def test_foreign_parameters() -> None:
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(ForeignOptimizerError):
        Accelerator(cpu=True).prepare(model, optimizer)
    model, prepared = build(lenient(foreign_parameters=True)).prepare(model, optimizer)
    model(torch.ones(1, 1)).sum().backward()
    prepared.step()
    assert prepared.num_steps == 1


def test_unassigned_parameters() -> None:
    def step(accelerator: Accelerator) -> None:
        model: Any = nn.Linear(1, 1)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD([model.weight], lr=0.1))
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()

    with pytest.raises(UnassignedParametersError):
        step(Accelerator(cpu=True))
    step(build(lenient(unassigned_parameters=True)))


def test_unread_settings_of_the_script_are_tolerated_and_those_of_the_file_are_not(tmp_path: Path) -> None:
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    build(lenient(unread_settings=True), strategy="single", kwargs_handlers=[handler, GradScalerKwargs(init_scale=2.0)])
    file = tmp_path / "config.yaml"
    file.write_text("strategy: single\nuse_cpu: true\n")
    read = resolve(flags={}, env={}, file=file)
    with_arguments(read, {"ddp_config": handler}, Leniency(unread_settings=True))
    file.write_text("strategy: single\nuse_cpu: true\nddp_config:\n  ddp_static_graph: true\n")
    with pytest.raises(ConfigError, match="static_graph"):
        resolve(flags={}, env={}, file=file)


def clip_in_first(accelerator: Accelerator) -> float:
    model = accelerator.prepare(nn.Linear(1, 1, bias=False))
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.full((1, 1), 4.0)).sum())
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
    return float(model.weight.grad)


def test_clipping_inside_a_window() -> None:
    with pytest.raises(SteppingError, match="in micro-batch 1 of a window of 2"):
        clip_in_first(Accelerator(cpu=True, gradient_accumulation_steps=2))
    # The part that is there, 4 / 2, is clipped.
    clipped = clip_in_first(build(lenient(clip_inside_window=True), gradient_accumulation_steps=2))
    assert clipped == pytest.approx(0.5, abs=1e-5)


def test_saving_with_open_gradients(tmp_path: Path) -> None:
    def save(accelerator: Accelerator) -> None:
        model: Any = nn.Linear(1, 1)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.backward(model(torch.ones(1, 1)).sum())
        accelerator.save_state(tmp_path / "state")

    with pytest.raises(SteppingError, match="after backward"):
        save(Accelerator(cpu=True))
    save(build(lenient(save_open_gradients=True)))


def test_the_script_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("use_cpu: true\nmixed_precision: bf16\ngradient_accumulation_steps: 4\n")
    read = resolve(flags={}, env={}, file=file)
    with use_configuration(read), pytest.raises(ConfigError, match=r"'no' contradicts 'bf16' at .*yaml:2"):
        Accelerator(mixed_precision="no")
    with use_configuration(read), use_policies(lenient(script_wins=True)):
        accelerator = Accelerator(mixed_precision="no")
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 4)


def test_a_section_of_the_launcher_may_be_unread_where_the_script_wins(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("mixed_precision: fp8\nfp8_config:\n  backend: AO\n")
    read = resolve(flags={}, env={}, file=file)
    replaced = {"mixed_precision": "bf16"}
    assert with_arguments(read, replaced, Leniency(script_wins=True)).config.mixed_precision == "bf16"
    with pytest.raises(ConfigError):
        with_arguments(read, replaced)


def test_the_script_wins_over_deepspeeds_json() -> None:
    from paceline import DeepSpeedPlugin

    read = resolve(flags={"cpu": True}, env={}, file=None)
    plugin = DeepSpeedPlugin(hf_ds_config={"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}})
    arguments = {"deepspeed_config": plugin, "gradient_accumulation_steps": 1}
    with pytest.raises(ConfigError, match="1 contradicts 2"):
        with_arguments(read, arguments)
    assert with_arguments(read, arguments, Leniency(script_wins=True)).config.gradient_accumulation_steps == 1


# Windows and schedulers


def gradients_of_windows(accelerator: Accelerator, batches: int) -> list[float]:
    """The gradient of a weight with which each batch has a loss of 1 x weight, at the end of each window."""
    model: Any = nn.Linear(1, 1, bias=False)
    loader = DataLoader(TensorDataset(torch.ones(batches, 1)))
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), loader)
    seen = []
    for (batch,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).sum())
            if accelerator.sync_gradients:
                seen.append(float(model.weight.grad))
            optimizer.step()
            optimizer.zero_grad()
    return seen


def test_a_short_last_window_is_divided_by_its_own_length_or_by_that_of_a_full_one() -> None:
    own = Accelerator(cpu=True, gradient_accumulation_steps=4)
    assert gradients_of_windows(own, 6) == pytest.approx([1.0, 1.0])
    full = build(Policies(window=WindowPolicy(divide_by="num_steps")), gradient_accumulation_steps=4)
    assert gradients_of_windows(full, 6) == pytest.approx([1.0, 0.5])


def test_outside_of_accumulate_a_full_window_divides_too() -> None:
    accelerator = build(Policies(window=WindowPolicy(divide_by="num_steps")), gradient_accumulation_steps=4)
    model = accelerator.prepare(nn.Linear(1, 1, bias=False))
    accelerator.backward(model(torch.ones(1, 1)).sum())
    assert float(model.weight.grad) == pytest.approx(0.25)


class TwoStepScheduler(AcceleratedScheduler):
    """Counts as two ranks would."""

    def advance(self, *args: Any, **kwargs: Any) -> None:
        for _ in range(2):
            super().advance(*args, **kwargs)


class LoggedOptimizer(AcceleratedOptimizer):
    """An optimizer of another name."""


def test_the_classes_of_prepared_objects_are_exchanged() -> None:
    accelerator = build(Policies(scheduler=TwoStepScheduler, optimizer=LoggedOptimizer))
    model: Any = nn.Linear(1, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, StepLR(optimizer, 2, 0.1))
    accelerator.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    scheduler.step()
    assert isinstance(optimizer, LoggedOptimizer)
    assert scheduler.get_last_lr() == pytest.approx([0.1])


# Loaders


class Position:
    """Told from outside where the loop is."""

    def __init__(self) -> None:
        self.remaining: int | None = None
        self.loop_ends = False

    def begin_micro_batch(self) -> None:
        """Nothing to count."""


class PlainLoaders:
    """A family that hands loaders back as they are."""

    def __init__(self, active: ActiveLoaders) -> None:
        self.position = Position()
        self.current = None

    def prepare(self, loader: Any, **_: Any) -> Any:
        return loader


def test_another_family_of_loaders_ends_windows(tmp_path: Path) -> None:
    families: list[PlainLoaders] = []

    def make(active: ActiveLoaders) -> PlainLoaders:
        families.append(PlainLoaders(active))
        return families[-1]

    accelerator = build(Policies(loaders=make), gradient_accumulation_steps=4)
    model: Any = nn.Linear(1, 1, bias=False)
    loader = DataLoader(TensorDataset(torch.ones(6, 1)))
    model, optimizer, prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), loader)
    assert prepared is loader
    assert accelerator.prepared.foreign_loaders == [loader]
    ends = []
    for index, (batch,) in enumerate(prepared):
        families[0].position.loop_ends = index == 5
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).sum())
            ends.append(accelerator.sync_gradients)
            optimizer.step()
    assert ends == [False, False, False, True, False, True]
    accelerator.save_state(tmp_path / "state")


# Boundaries


def test_the_script_sets_where_a_window_ends() -> None:
    shared = OwnBoundary()
    accelerator = build(Policies(boundary=lambda: shared))
    model: Any = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for index in range(4):
        accelerator.sync_gradients = index % 2 == 1
        assert shared.sync_gradients == (index % 2 == 1)
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.num_steps == 2
    shared.sync_gradients = False
    assert not accelerator.sync_gradients


# The device


def test_the_device_is_named_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    assert Accelerator(strategy="single").device == torch.device("cpu")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "toaster:1")
    with pytest.raises(DeviceError, match="'toaster:1' was named by ACCELERATE_TORCH_DEVICE"):
        Accelerator(strategy="single")
