"""The Accelerator's own methods on two real ranks, and what its constructor refuses."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import (
    Accelerator,
    AutocastKwargs,
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    GradScalerKwargs,
    ProfileKwargs,
    ProjectConfiguration,
    set_seed,
)
from paceline.config import resolve
from paceline.config.schema.names import all_settings
from paceline.errors import CollectiveError, ConfigError, PacelineError, PrepareError
from paceline.strategies import load_strategy
from tests.support.engines import ZERO_STAGES, make, whole_gradients, with_deepspeed
from tests.support.models import TinyTransformer
from tests.support.ranks import run_on_ranks
from tests.support.state import prepared_models
from tests.support.warned import warnings_of
from tests.unit.data.support import Numbers

if TYPE_CHECKING:
    from collections.abc import Callable


def make_plain(**arguments: Any) -> Accelerator:
    return Accelerator(cpu=True, **arguments)


# Between ranks


def exchange() -> dict[str, Any]:
    one = make_plain()
    rank = one.process_index
    mine = torch.tensor([float(rank), 10.0 + rank])
    found: dict[str, Any] = {
        "gather": one.gather({"a": [mine]})["a"][0].tolist(),
        "sum": one.reduce(mine).tolist(),
        "mean": one.reduce(mine, "mean").tolist(),
        "scaled": one.reduce(mine, "sum", scale=0.5).tolist(),
        "kept": mine.tolist(),
        "objects": one.gather_object([f"rank {rank}"]),
        "broadcast": one.broadcast(mine.clone(), from_process=1).tolist(),
        "list": one.broadcast_object_list([rank, {"x": rank}], from_process=1),
        "padded": one.pad_across_processes(torch.ones(rank + 1), pad_index=-1).tolist(),
        "first": one.pad_across_processes(torch.ones(rank + 1), pad_index=-1, pad_first=True).tolist(),
    }
    with one.split_between_processes([1, 2, 3]) as part:
        found["split"] = part
    with one.split_between_processes([1, 2, 3], apply_padding=True) as part:
        found["split, padded"] = part
    one.wait_for_everyone()
    return found


def test_exchanges() -> None:
    first, second = run_on_ranks(2, exchange)
    for found in (first, second):
        assert found["gather"] == [0.0, 10.0, 1.0, 11.0]
        assert found["sum"] == [1.0, 21.0]
        assert found["mean"] == [0.5, 10.5]
        assert found["scaled"] == [0.5, 10.5]
        assert found["objects"] == ["rank 0", "rank 1"]
        assert found["broadcast"] == [1.0, 11.0]
        assert found["list"] == [1, {"x": 1}]
    assert (first["kept"], second["kept"]) == ([0.0, 10.0], [1.0, 11.0]), "reduce makes new tensors"
    assert (first["padded"], second["padded"]) == ([1.0, -1.0], [1.0, 1.0])
    assert first["first"] == [-1.0, 1.0]
    assert (first["split"], second["split"]) == ([1, 2], [3])
    assert (first["split, padded"], second["split, padded"]) == ([1, 2], [3, 3])


def triggers() -> list[bool]:
    one = make_plain()
    seen = [one.check_trigger()]
    if one.process_index == 1:
        one.set_trigger()
    return [*seen, one.check_trigger(), one.check_trigger()]


def test_a_trigger_on_one_rank_is_seen_by_all_once() -> None:
    assert run_on_ranks(2, triggers) == [[False, True, False]] * 2


# Only here, only there


def only(folder: str) -> dict[str, Any]:
    one = make_plain()
    rank = one.process_index
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        one.print("once", end="!")
    mark = Path(folder) / "made"
    with one.main_process_first():
        if one.is_main_process:
            time.sleep(0.2)
            mark.touch()
        there = mark.exists()
    return {
        "who": (rank, one.local_process_index, one.is_main_process, one.is_last_process, one.num_processes),
        "main": one.on_main_process(lambda x: x)(5),
        "last": one.on_last_process(lambda: rank)(),
        "local main": one.on_local_main_process(lambda: rank)(),
        "one": one.on_process(lambda: rank, process_index=1)(),
        "decorated": one.on_process(process_index=1)(lambda: rank)(),
        "local": one.on_local_process(local_process_index=1)(lambda: rank)(),
        "printed": printed.getvalue(),
        "there": there,
    }


def test_ranks_of_their_own(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, only, str(tmp_path))
    assert first["who"] == (0, 0, True, False, 2)
    assert second["who"] == (1, 1, False, True, 2)
    assert (first["main"], second["main"]) == (5, None)
    assert (first["local main"], second["local main"]) == (0, None)
    assert (first["printed"], second["printed"]) == ("once!", "")
    for name in ("last", "one", "decorated", "local"):
        assert (first[name], second[name]) == (None, 1), name
    assert first["there"]
    assert second["there"], "rank 0 goes first"


# Prepare


def in_order() -> dict[str, Any]:
    one = make_plain(strategy="ddp")
    model: Any = nn.Linear(2, 2)
    raw = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(raw)
    data: Any = DataLoader(Numbers(3))
    other = {"left": "alone"}
    got = one.prepare(schedule, other, data, raw, model, None, 7)
    again = one.prepare(*got)
    with pytest.raises(PrepareError, match="2 entries for 1 arguments"):
        one.prepare(model, device_placement=[True, None])
    inner = one.unwrap_model(got[4])
    unprepared = nn.Linear(1, 1)
    return {
        "names": [type(thing).__name__ for thing in got],
        "alone": got[1] is other,
        "again": all(a is b for a, b in zip(got, again, strict=True)),
        "unwrapped": inner is model,
        "plain": one.unwrap_model(unprepared) is unprepared,
        "freed": one.free_memory(*got),
        "after": len(prepared_models(one)),
    }


def test_prepare_keeps_the_order_and_leaves_the_rest_alone() -> None:
    for found in run_on_ranks(2, in_order):
        assert found["names"] == [
            "AcceleratedScheduler",
            "dict",
            "PreparedDataLoader",
            "AcceleratedOptimizer",
            "NamingDDP",
            "NoneType",
            "int",
        ]
        assert found["alone"]
        assert found["again"], "preparing again changes nothing"
        assert found["unwrapped"]
        assert found["plain"]
        assert found["freed"] == [None] * 7
        assert found["after"] == 0


def after_freeing(strategy: str) -> list[bool]:
    one, held = make(strategy), []
    for _ in range(2):
        model: Any = nn.Linear(2, 2)
        held.append(weakref.ref(model))
        model, optimizer = one.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        one.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        model, optimizer = one.free_memory(model, optimizer)
    gc.collect()  # now that nobody has a name for them
    return [model() is None for model in held]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", *ZERO_STAGES])
def test_memory_is_freed_and_training_goes_on(strategy: str) -> None:
    assert run_on_ranks(2, after_freeing, strategy) == [[True, True]] * 2


def clipped_and_cast(strategy: str) -> list[Any]:
    one = make(strategy, mixed_precision="bf16")
    model: Any = nn.Linear(2, 1, bias=False)
    model, _ = one.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    one.backward(model(torch.tensor([[8.0, 0.25]])).sum())
    one.clip_grad_value_(model.parameters(), 1.0)
    plain = nn.Linear(2, 1)
    with one.autocast():
        inside = plain(torch.ones(1, 2)).dtype
    outside = plain(torch.ones(1, 2)).dtype
    return [whole_gradients(one, model)["weight"].tolist(), str(inside), str(outside)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", *ZERO_STAGES])
def test_clipping_values_and_autocast(strategy: str) -> None:
    assert run_on_ranks(2, clipped_and_cast, strategy) == [[[[1.0, 0.25]], "torch.bfloat16", "torch.float32"]] * 2


def joined() -> tuple[int, list[float], bool]:
    one = make_plain(strategy="ddp")
    model: Any = nn.Linear(1, 1, bias=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)
    data: Any = DataLoader(TensorDataset(torch.arange(5.0)[:, None]), batch_size=1)
    model, optimizer, data = one.prepare(model, optimizer, data)
    steps = 0
    with one.join_uneven_inputs([model], even_batches=False):
        for (batch,) in data:
            one.backward(model(batch).sum())
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return steps, one.gather(model.module.weight.detach()).flatten().tolist(), data.even_batches


def test_ranks_with_fewer_batches_follow_along() -> None:
    first, second = run_on_ranks(2, joined)
    assert (first[0], second[0]) == (3, 2)
    assert first[1][0] == first[1][1], "the ranks parted"
    assert first[2] is True, "the loader has its own setting back"


def traced(folder: str) -> None:
    one = make_plain(kwargs_handlers=[ProfileKwargs(activities=("cpu",), output_trace_dir=folder)])
    with one.profile() as profiler:
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert any("mm" in event.key for event in profiler.key_averages())


def test_each_rank_writes_its_trace(tmp_path: Path) -> None:
    run_on_ranks(2, traced, str(tmp_path / "traces"))
    files = sorted((tmp_path / "traces").iterdir())
    assert [file.name for file in files] == ["profile_0.json", "profile_1.json"]
    assert all(json.loads(file.read_text())["traceEvents"] for file in files)


def test_a_loop_that_ends_before_the_schedule_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "traces"
    settings = ProfileKwargs(
        schedule_option={"wait": 5, "warmup": 1, "active": 1}, output_trace_dir=str(folder), activities=("cpu",)
    )
    with make_plain().profile(settings) as profiler:
        profiler.step()
    assert not folder.exists()
    assert "recorded nothing: its schedule waits longer than the loop" in caplog.text


def mismatched() -> list[str]:
    with mock.patch.dict(os.environ, {"PACELINE_DEBUG": "true"}):
        one = make_plain()
    other: list[Callable[[], object]] = [
        lambda: one.gather_object(1),
        lambda: one.broadcast_object_list([1]),
        lambda: one.pad_across_processes(torch.ones(1)),
        one.wait_for_everyone,
        one.check_trigger,
    ]
    said = []
    for call in other:
        own = call if one.process_index == 1 else lambda: one.gather(torch.ones(1))
        with pytest.raises(CollectiveError) as caught:
            own()
        said.append(str(caught.value))
    return said


def test_debug_names_every_method_that_only_one_rank_is_in() -> None:
    """Not compared, such ranks abort in gloo, with the advice to set debug."""
    names = ["gather_object", "broadcast_object_list", "pad_across_processes", "wait_for_everyone", "check_trigger"]
    for said in run_on_ranks(2, mismatched):
        for name, text in zip(names, said, strict=True):
            assert re.match(rf"Rank 1 is in {name}.* where rank 0 is in gather", text)


# What it says, and what it refuses


def described(strategy: str) -> tuple[str, str]:
    one = make(strategy, mixed_precision="bf16", gradient_accumulation_steps=3)
    model: Any = TinyTransformer()
    one.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(Numbers(64), batch_size=4))
    return one.describe(), str(one.distributed_type)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("ddp", "MULTI_CPU"), ("fsdp", "FSDP"), *with_deepspeed([("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")])],
)
def test_a_run_describes_itself(strategy: str, kind: str) -> None:
    text, told = run_on_ranks(2, described, strategy)[0]
    assert told == kind
    name = "deepspeed" if "zero" in strategy else strategy
    assert f"{name}: set by" in text
    assert name == strategy or f"ZeRO stage {strategy[-1]}: " in text
    assert name == strategy or "sharded over 2 ranks" in text
    assert "an optimizer step takes 24 samples = 3 micro-batches x 8 samples" in text
    assert "bf16" in text
    assert "gloo" in text
    assert "processes     2" in text
    assert "global batch of 8 samples = 2 ranks x 4 samples, 8 batches per rank" in text
    assert "gradient_accumulation_steps = 3 micro-batches" in text
    assert strategy != "fsdp" or "FSDP2 over 2 ranks (dp_shard)" in text


def test_a_run_says_whether_it_can_be_repeated() -> None:
    torch.seed()
    assert (
        "none: initial weights and the order of samples differ in every run; call set_seed(0) first"
        in make("single").describe()
    )
    set_seed(3)
    assert "seed          3\n" in f"{make('single').describe()}\n"


_PURE = re.compile(r"machine_rank|port|ddp_dim|zero_stage|clipping|memory_budget|fsdp_version|megatron_lm_|fp8_|mpirun")


def test_every_setting_that_is_a_number_is_shown_with_its_unit() -> None:
    numbers = [
        key
        for key, setting in all_settings().items()
        if re.search(r"\b(int|float)\b", str(setting.info.annotation)) and not _PURE.search(key)
    ]
    assert len(numbers) > 15
    settings = all_settings()
    assert [key for key in numbers if settings[key].with_unit(2) == "2"] == []
    assert settings["gradient_accumulation_steps"].with_unit(1) == "1 micro-batch"
    assert settings["timeout"].with_unit(600.0) == "600 s"
    assert settings["debug"].with_unit(True) == "True"


def filled(fill: bool) -> tuple[list[str], str]:
    flags = {"use_cpu": True, "fsdp_offload_params": True}
    os.environ["PACELINE_CONFIG"] = resolve(flags=flags, env={}, file=None).to_json()
    try:
        one = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=fill))
    finally:
        del os.environ["PACELINE_CONFIG"]
    model: Any = TinyTransformer()
    with warnings_of() as warned:
        one.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(Numbers(61), batch_size=4))
    return warned, one.describe()


def test_what_auto_leaves_unused_and_what_is_read_twice_is_told() -> None:
    warned, text = run_on_ranks(2, filled, True)[0]
    assert len(warned) == 1
    assert "fsdp_config.fsdp_offload_params" in warned[0]
    assert "no effect: strategy auto chose ddp" in warned[0]
    assert "set strategy to fsdp, or remove it" in warned[0]
    assert "fsdp_offload_params = True" in text
    assert "; not used)" in text
    assert "8 batches per rank, the last filled up with 3 samples from the start of the epoch" in text
    assert "filled up" not in run_on_ranks(2, filled, False)[0][1]


def backward_of_nothing_prepared() -> None:
    one = Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    with pytest.raises(PrepareError, match=r"before any model was passed to prepare\(\)"):
        one.backward(model(torch.ones(1, 2)).sum())


def test_a_model_that_was_never_prepared_is_named_first() -> None:
    run_on_ranks(2, backward_of_nothing_prepared)


def own_class() -> list[str]:
    cls = load_strategy("fsdp")
    one = make_plain(strategy=cls)
    with pytest.raises(PrepareError, match="derived from"):
        make_plain(strategy=lambda around: "nothing")
    return [one.strategy.name, str(one.distributed_type == DistributedType.FSDP), one.describe()]


def test_a_strategy_given_as_a_class() -> None:
    name, alike, text = run_on_ranks(2, own_class)[0]
    assert (name, alike) == ("fsdp", "True")
    assert "passed by the script" in text


def contradicted() -> list[str]:
    launched = resolve(flags={"mixed_precision": "bf16"}, env={}, file=None)
    os.environ["PACELINE_CONFIG"] = launched.to_json()
    try:
        assert make_plain().mixed_precision == "bf16"
        assert make_plain(mixed_precision="bf16").mixed_precision == "bf16"
        with pytest.raises(ConfigError) as error:
            make_plain(mixed_precision="fp16", strategy="ddp")
    finally:
        del os.environ["PACELINE_CONFIG"]
    return [str(problem) for problem in error.value.problems]


def test_a_script_that_contradicts_its_launcher() -> None:
    [problem] = run_on_ranks(2, contradicted)[0]
    assert "--mixed_precision" in problem
    assert "Accelerator" in problem
    assert "bf16" in problem
    assert "fp16" in problem


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"log_with": "tensorbord"}, ConfigError, "did you mean tensorboard"),
        ({"mixed_precision": "fp8"}, PacelineError, "fp8"),
        ({"mixed_precision": "bf61"}, PacelineError, "did you mean bf16?"),
        (
            {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=3), "strategy": "ddp"},
            ConfigError,
            "unused settings: zero_stage",
        ),
        ({"kwargs_handlers": [GradScalerKwargs(), GradScalerKwargs()]}, ConfigError, "two GradScalerKwargs"),
        ({"kwargs_handlers": [DataLoaderConfiguration()]}, ConfigError, "a DataLoaderConfiguration"),
        ({"rng_types": ["torch"]}, ConfigError, "rng_types"),
        ({"strategy": "dpp"}, PacelineError, "ddp"),
        (
            {"project_dir": "a", "project_config": ProjectConfiguration(project_dir="b")},
            ConfigError,
            "project_config",
        ),
        ({"gradient_accumulation_steps": 0}, ConfigError, "gradient_accumulation_steps"),
    ],
    ids=str,
)
def test_what_the_constructor_refuses(arguments: dict[str, Any], error: type[PacelineError], said: str) -> None:
    with pytest.raises(error) as raised:
        make_plain(**arguments)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("handlers", "words"),
    [
        (AutocastKwargs(), r"a AutocastKwargs and not a list; write \[AutocastKwargs\(…\)\]"),
        ([AutocastKwargs], r"the class AutocastKwargs; pass an instance, AutocastKwargs\(…\)"),
        ([3], "a int; handlers are"),
    ],
)
def test_what_is_no_list_of_handlers(handlers: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_plain(kwargs_handlers=handlers)
