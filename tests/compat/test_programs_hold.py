"""What programs do with an Accelerator and its helpers beside training: pickle it, drop it, unwrap, compare, catch."""

from __future__ import annotations

import gc
import logging
import pickle
import warnings
import weakref
from types import MethodType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from paceline.compat.accelerate.accelerator import Accelerator
from paceline.compat.accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from paceline.compat.accelerate.parallelism_config import ParallelismConfig
from paceline.compat.accelerate.settings.errors import value_errors
from paceline.compat.accelerate.state import PartialState
from paceline.compat.accelerate.utils import DataLoaderConfiguration, environment, other
from paceline.compat.accelerate.utils.operations import (
    DistributedOperationException,
    convert_outputs_to_fp32,
    pad_across_processes,
)
from paceline.errors import ConfigError, PrepareError, Problem
from tests.compat.suite import compare, exceptions, outcomes
from tests.compat.test_accelerator import fresh, net, on_ranks, samples

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_states() -> Iterator[None]:
    with fresh():
        yield


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 2)
        self.other = self.one
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.one.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.tied(self.other(self.one(inputs)))  # type: ignore[no-any-return]


# The Accelerator as an object


@pytest.mark.parametrize("dispatch", [True, False])
def test_an_accelerator_is_pickled_with_what_it_prepared(dispatch: bool) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    model: Any = net()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader: Any = DataLoader(samples(6), batch_size=2)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    accelerator.step = 3
    copied = pickle.loads(pickle.dumps(accelerator))
    (copy,) = copied._dataloaders
    assert isinstance(copy, DataLoaderDispatcher if dispatch else DataLoaderShard)
    assert [batch[0].tolist() for batch in copy] == [batch[0].tolist() for batch in loader]
    (trained,), (stepped,) = copied._models, copied._optimizers
    assert copied._schedulers[0].scheduler.optimizer is stepped.optimizer
    assert copied.step == 3
    # The copied optimizer steps the copied model.
    copied.backward(trained(torch.ones(1, 4)).sum())
    before = [p.detach().clone() for p in trained.parameters()]
    stepped.step()
    assert any(not torch.equal(p, old) for p, old in zip(trained.parameters(), before, strict=True))


def test_an_accelerator_is_freed_with_the_last_reference() -> None:
    accelerator = Accelerator(cpu=True)
    loader: Any = accelerator.prepare(DataLoader(samples(6), batch_size=2))
    iterator = iter(loader)
    next(iterator)
    references = [weakref.ref(accelerator), weakref.ref(loader)]
    gc.disable()
    try:
        del accelerator, loader, iterator
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


def test_shared_tensors_come_back_from_safetensors(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Tied())
    saved = model.one.weight.detach().clone()
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        model.one.weight.zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(model.one.weight, saved)
    assert model.tied.weight is model.one.weight


def test_objects_that_cannot_be_saved_are_named_by_their_place() -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r"Item at index 1 \(int\), Item at index 2 \(Tensor\)"):
        accelerator.register_for_checkpointing(nn.Linear(1, 1), 3, torch.ones(1))


def test_a_quantized_model_that_is_not_on_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    home = "paceline.compat.accelerate.accelerator.is_bitsandbytes_multi_backend_available"
    model = nn.Linear(2, 2)
    vars(model).update(is_loaded_in_8bit=True, hf_device_map={"": "cpu"})
    monkeypatch.setattr(home, lambda: True)
    assert accelerator.prepare_model(model) is model
    vars(model)["hf_device_map"] = {"": "disk"}
    for prepare in (accelerator.prepare_model, accelerator.prepare):
        with pytest.raises(ValueError, match="CPU or disk offload"):
            prepare(model)
    vars(model)["hf_device_map"] = {"": "cpu"}
    monkeypatch.setattr(home, lambda: False)
    with pytest.raises(ValueError, match="CPU or disk offload"):
        accelerator.prepare_model(model)


def test_a_skipped_step_has_the_name_that_programs_set() -> None:
    accelerator = Accelerator(cpu=True)
    model: Any = net()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    accelerator.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    assert optimizer._is_overflow is False
    optimizer._is_overflow = True
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(0.1)]
    optimizer._is_overflow = False
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(0.09)]


# Models out of their wrappers


@pytest.mark.parametrize("keep", [True, False])
def test_wrappers_inside_of_a_compiled_model_are_taken_off(keep: bool) -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    wrapped: Any = torch.compile(nn.DataParallel(model), backend="eager")
    inner = accelerator.unwrap_model(wrapped, keep_torch_compile=keep)
    assert getattr(inner, "_orig_mod", inner) is model
    assert (inner is model) is not keep


def test_a_model_gets_back_the_forward_that_a_program_wrapped() -> None:
    model: Any = nn.Linear(2, 2).bfloat16()
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(model.forward)
    inputs = torch.ones(1, 2, dtype=torch.bfloat16)
    assert model(inputs).dtype == torch.float32
    assert other.extract_model_from_parallel(model) is model
    assert model(inputs).dtype == torch.float32
    assert other.extract_model_from_parallel(model, keep_fp32_wrapper=False)(inputs).dtype == torch.bfloat16
    assert pickle.loads(pickle.dumps(model))(inputs).dtype == torch.bfloat16


def test_methods_of_a_model_belong_to_the_copy_that_is_compiled() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                inputs = block(inputs)
            return inputs

    def forward(self: Any, inputs: torch.Tensor) -> str:
        return f"{self.tag} {type(self.blocks[0]).__name__} {len(inputs)}"

    model: Any = Blocks()
    model.tag = "model"
    model.forward = MethodType(forward, model)
    compiled: Any = other.compile_regions(model, backend="eager")
    compiled.tag = "copy"
    assert compiled(torch.ones(1, 2)) == "copy OptimizedModule 1"
    assert model(torch.ones(1, 2)) == "model Linear 1"


# Settings, messages and errors


def test_the_mesh_is_shown_before_it_is_built() -> None:
    sizes = ParallelismConfig(dp_replicate_size=2, dp_shard_size=3, tp_size=4)
    assert sizes._get_mesh() == (("dp_replicate", "dp_shard", "tp"), (2, 3, 4))


def test_messages_are_logged_under_accelerates_names(caplog: pytest.LogCaptureFixture) -> None:
    environment.convert_dict_to_env_variables({"A": "a b"})
    assert [record.name for record in caplog.records] == ["accelerate.utils.environment"]
    assert not [name for name in logging.root.manager.loggerDict if name.startswith("paceline.compat.accelerate")]


@pytest.mark.parametrize(("release", "warned"), [("5.4.0-35-generic", True), ("5.15.0-1", False), ("6.1", False)])
def test_an_old_kernel_is_named(
    release: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("platform.uname", lambda: type("Uname", (), {"system": "Linux", "release": release}))
    other.check_os_kernel()
    assert bool(caplog.records) is warned
    assert all("5.4.0" in record.msg and "5.5.0" in record.msg for record in caplog.records)


@pytest.mark.parametrize(
    "error",
    [PrepareError("It was seen", "It cannot work", "Do something"), ConfigError([Problem("file", "key", "value")])],
    ids=["PrepareError", "ConfigError"],
)
def test_what_the_core_refuses_is_a_value_error_too(error: Exception) -> None:
    with pytest.raises(ValueError, match=r"seen|1 problem") as caught, value_errors():
        raise error
    assert isinstance(caught.value, type(error))
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def different_dimensions() -> str:
    state = PartialState(cpu=True)
    state.debug = True
    tensor = torch.ones([1] * (2 + state.process_index))
    same = pad_across_processes({"a": torch.ones(1 + state.process_index, 2)})
    assert same["a"].shape == (2, 2)
    try:
        pad_across_processes({"a": tensor})
    except DistributedOperationException as error:
        return str(error)
    return ""


def test_ranks_that_pad_tensors_of_different_dimensions_hear_of_it_in_debug_mode() -> None:
    for text in on_ranks(2, different_dimensions):
        assert "rank 0: [2]; rank 1: [3]" in text


def test_what_cannot_be_padded_is_said_of_padding() -> None:
    with pytest.raises(TypeError, match="pad_across_processes got a NoneType"):
        pad_across_processes({"a": torch.ones(1), "b": None})


# The harness for Accelerate's own tests


def test_a_report_is_read_and_compared(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a.B" name="one"/><testcase classname="a.B" name="two">'
        '<failure message="it failed">text</failure></testcase><testcase classname="a.B" name="three">'
        '<skipped message="no GPU"/></testcase><testcase classname="a.B" name="two"/></testsuite></testsuites>'
    )
    ours = outcomes(report, "f.py")
    assert {name.rpartition("::")[2]: text.partition(":")[0] for name, text in ours.items()} == {
        "one": "passed",
        "two": "failure",
        "three": "skipped",
    }
    real = dict.fromkeys(ours, "passed")
    reasons = {"f.py::B::two": "a reason", "f.py::B::one": "needless"}
    lines = "\n".join(compare(real, ours, reasons))
    assert "f.py::B::two\n    a reason" in lines
    assert "f.py::B::three\n    NO REASON GIVEN" in lines
    assert "f.py::B::one\n    is an exception and passes" in lines


def test_every_exception_has_a_reason() -> None:
    assert all(name.startswith("tests/") and reason.strip().endswith(".") for name, reason in exceptions().items())


def test_a_configuration_of_loaders_that_is_replaced_holds_from_then_on() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.dataloader_config = DataLoaderConfiguration(dispatch_batches=True)
    loader: Any = accelerator.prepare(DataLoader(samples(6), batch_size=2))
    assert isinstance(loader, DataLoaderDispatcher)
    assert accelerator.dispatch_batches is True


def joined_streams() -> list[str]:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))

    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

    model = accelerator.prepare(nn.Linear(1, 1))
    accelerator.prepare(DataLoader(Stream(), batch_size=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with accelerator.join_uneven_inputs([model], even_batches=False):
            pass
    return [str(each.message) for each in caught if each.category is UserWarning]


def test_even_batches_cannot_be_overridden_for_streams() -> None:
    for messages in on_ranks(2, joined_streams):
        assert any("only supported for map-style datasets" in message for message in messages)
