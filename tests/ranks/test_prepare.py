"""What prepare accepts, refuses and leaves alone, on real ranks."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paceline import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
)
from paceline.errors import (
    ForeignOptimizerError,
    PrepareError,
    UnassignedParametersError,
    UnknownBlockError,
    UnusedParametersError,
)
from tests.support.engines import ZERO_STAGES, make, needs_deepspeed, slowly, with_deepspeed
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks


def step(accelerator: Accelerator, model: Any, optimizer: Any, shift: int = 0) -> float:
    tokens = make_tokens(4, seed=shift)[accelerator.process_index :: accelerator.num_processes]
    loss = token_losses(model(tokens), tokens).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(accelerator.reduce(loss.detach(), "mean"))


# The order of things


def trained(strategy: str, order: str) -> list[float]:
    accelerator = make(strategy)
    model: Any = TinyTransformer()
    match order:
        case "together":
            model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        case "optimizer first":
            optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01))
            model = accelerator.prepare(model)
        case "model first":
            raw = torch.optim.AdamW(model.parameters(), lr=0.01)
            model = accelerator.prepare(model)
            optimizer = accelerator.prepare(raw)
        case "made after":
            model = accelerator.prepare(model)
            optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01))
        case _:
            raise AssertionError(order)
    return [step(accelerator, model, optimizer, i) for i in range(4)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_order_of_model_and_optimizer_does_not_matter(strategy: str) -> None:
    orders = ["together", "optimizer first", "model first", "made after"]
    losses = [run_on_ranks(2, trained, strategy, order)[0] for order in orders]
    assert all(one == pytest.approx(losses[0], abs=1e-6) for one in losses[1:])
    assert losses[0][0] != losses[0][-1]


@pytest.mark.parametrize("strategy", ZERO_STAGES)
def test_an_optimizer_may_come_before_its_model(strategy: str) -> None:
    plain = run_on_ranks(2, trained, "ddp", "together")[0]
    for order in ("together", "optimizer first"):
        assert run_on_ranks(2, trained, strategy, order)[0] == pytest.approx(plain, abs=1e-5)


def too_late(order: str) -> str:
    with pytest.raises(PrepareError) as error:
        trained("zero2", order)
    return str(error.value)


@needs_deepspeed
@pytest.mark.parametrize("order", ["model first", "made after"])
def test_deepspeed_takes_model_and_optimizer_together(order: str) -> None:
    for message in run_on_ranks(2, too_late, order):
        assert "TinyTransformer was prepared with 0 optimizers of its parameters" in message
        assert "prepare(model, optimizer)" in message


def optimizer_state_follows() -> list[str]:
    from torch.distributed.tensor import DTensor

    accelerator = Accelerator(cpu=True, strategy="fsdp")
    model: Any = TinyTransformer()
    raw = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = make_tokens(2)
    token_losses(model(tokens), tokens).mean().backward()  # type: ignore[no-untyped-call]
    raw.step()  # the optimizer comes with a state of its own
    raw.zero_grad()
    wanted = {id(p): s["exp_avg"].clone() for p, s in raw.state.items()}
    names = {id(p): name for name, p in model.named_parameters()}
    by_name = {names[key]: value for key, value in wanted.items()}
    model, optimizer = accelerator.prepare(model, raw)
    kinds = []
    for name, parameter in model.named_parameters():
        moment = optimizer.state[parameter]["exp_avg"]
        assert isinstance(moment, DTensor)
        assert moment.placements == parameter.placements
        assert torch.equal(moment.full_tensor(), by_name[name]), name
        kinds.append(type(moment).__name__)
    step(accelerator, model, optimizer)
    return kinds


def test_optimizer_state_follows_the_shards() -> None:
    assert set(run_on_ranks(2, optimizer_state_follows)[0]) == {"DTensor"}


def meta_start(strategy: str) -> list[float]:
    """Only rank 0 has values; the others built the model on the meta device."""
    accelerator = Accelerator(cpu=True, strategy=strategy)
    if accelerator.is_main_process:
        model: Any = TinyTransformer()
    else:
        with torch.device("meta"):
            model = TinyTransformer()
        model.head.weight = model.tokens.weight
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    unwrapped: Any = accelerator.unwrap_model(model)
    assert unwrapped.head.weight is unwrapped.tokens.weight
    return [step(accelerator, model, optimizer, i) for i in range(4)]


def test_ranks_without_values_get_them_from_rank_0() -> None:
    assert run_on_ranks(2, meta_start, "fsdp")[1] == pytest.approx(
        run_on_ranks(2, trained, "fsdp", "together")[0], abs=1e-6
    )


# What is refused


def refused(case: str, strategy: str) -> str:
    accelerator = make(strategy)
    model: Any = TinyTransformer()
    error: Any
    match case:
        case "foreign optimizer":
            other = TinyTransformer()
            with pytest.raises(ForeignOptimizerError) as error:
                accelerator.prepare(model, torch.optim.AdamW(other.parameters()))
        case "nothing trainable":
            model.requires_grad_(False)
            with pytest.raises(PrepareError) as error:
                accelerator.prepare(model)
        case "no parameters":
            with pytest.raises(PrepareError) as error:
                accelerator.prepare(nn.ReLU())
        case "unassigned":
            some = [p for name, p in model.named_parameters() if not name.startswith("norm")]
            model, optimizer = accelerator.prepare(model, torch.optim.AdamW(some))
            with pytest.raises(UnassignedParametersError) as error:
                step(accelerator, model, optimizer)
        case _:
            raise AssertionError(case)
    return str(error.value)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", *ZERO_STAGES])
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("foreign optimizer", "belong to no prepared model"),
        ("nothing trainable", "none of them requires a gradient"),
        ("no parameters", "0 parameters"),
        ("unassigned", "norm.weight, norm.bias are trainable but in no optimizer"),
    ],
)
def test_bad_input_is_named(strategy: str, case: str, words: str) -> None:
    assert all(words in message for message in run_on_ranks(2, refused, case, strategy))


def trained_after_a_refused_call(strategy: str) -> list[float]:
    accelerator = make(strategy)
    foreign, model = TinyTransformer(), TinyTransformer()
    with pytest.raises(ForeignOptimizerError):
        accelerator.prepare(model, torch.optim.AdamW(foreign.parameters()))
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    with without_warnings("paceline.strategies.ddp.module"):
        return [step(accelerator, prepared, optimizer, i) for i in range(4)]


class Raising(logging.Handler):
    """Fails when a warning is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


@contextlib.contextmanager
def without_warnings(name: str) -> Iterator[None]:
    """Fail if the body logs a warning."""
    handler = Raising(logging.WARNING)
    logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", *ZERO_STAGES])
def test_the_same_model_can_be_prepared_after_a_refused_call(strategy: str) -> None:
    """Nothing is left of the refused call: its optimizer is not checked, and gradients are averaged once."""
    losses = run_on_ranks(2, trained_after_a_refused_call, strategy)[0]
    assert losses == pytest.approx(run_on_ranks(2, trained, strategy, "together")[0], abs=1e-6)


def unknown_block() -> tuple[tuple[str, ...], str]:
    plugin = FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap=("Blok",))
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    with pytest.raises(UnknownBlockError) as error:
        accelerator.prepare(TinyTransformer())
    return error.value.candidates, str(error.value)


def test_an_unknown_block_class_lists_the_candidates_and_names_the_setting() -> None:
    candidates, text = run_on_ranks(2, unknown_block)[0]
    assert "Block" in candidates
    key = "fsdp_config.fsdp_transformer_layer_cls_to_wrap"
    place = "Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap=…))"
    assert text.startswith(f"{place}: {key}: No module of the model is of class 'Blok'"), text


BLOCKS_SCRIPT = """
from paceline import Accelerator
from tests.support.models import TinyTransformer
Accelerator(cpu=True).prepare(TinyTransformer())
"""


@pytest.mark.parametrize("place", ["file", "flag"])
def test_an_unknown_block_class_is_named_with_the_line_of_a_file_or_the_flag(tmp_path: Path, place: str) -> None:
    (tmp_path / "train.py").write_text(BLOCKS_SCRIPT)
    config = "strategy: fsdp\nuse_cpu: true\nnum_processes: 2\n"
    flags = ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    where = flags[0]
    if place == "file":
        config += "fsdp_config:\n  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer\n"
        flags = []
        where = f"{tmp_path}/run.yaml:5"
    (tmp_path / "run.yaml").write_text(config)
    command = [sys.executable, "-m", "paceline", "launch", "--config_file", f"{tmp_path}/run.yaml", *flags]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"{tmp_path}/train.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    key = "fsdp_config.fsdp_transformer_layer_cls_to_wrap"
    assert f"{where}: {key}: No module of the model is of class 'LlamaDecoderLayer'" in done.stderr
    assert "Remove the setting, and paceline finds the blocks itself (Block)" in done.stderr


class Half(nn.Module):
    """Uses one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.forgotten = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(x)
        return out


def unused(find: bool) -> str:
    accelerator = Accelerator(
        cpu=True,
        strategy="ddp",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find)],
    )
    model: Any = Half()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        accelerator.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
    return "trained"


def unused_caught() -> tuple[str, ...]:
    with pytest.raises(UnusedParametersError) as error:
        unused(False)
    return error.value.names


def unused_noticed_by_torch() -> tuple[str, ...]:
    accelerator = Accelerator(cpu=True, strategy="ddp")
    model: Any = accelerator.prepare(Half())
    accelerator.backward(model(torch.ones(2, 4)).sum())
    with pytest.raises(UnusedParametersError) as error:
        model(torch.ones(2, 4))
    return error.value.names


def test_unused_parameters_are_named() -> None:
    names = ("forgotten.weight", "forgotten.bias")
    assert run_on_ranks(2, unused_caught) == [names, names]
    assert run_on_ranks(2, unused_noticed_by_torch) == [names, names]
    assert run_on_ranks(2, unused, True) == ["trained", "trained"]


# DDP's hooks


def hooked(hook: Any, wrapper: Any) -> list[float]:
    handler = DistributedDataParallelKwargs(
        comm_hook=hook,
        comm_wrapper=wrapper,
        comm_state_option={"start_powerSGD_iter": 3} if "power" in hook else {},
    )
    accelerator = Accelerator(cpu=True, strategy="ddp", kwargs_handlers=[handler])
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    return [step(accelerator, model, optimizer, i) for i in range(6)]


def bf16_hook() -> tuple[str, bool]:
    """What came of it, and whether torch was built for a backend that carries it."""
    carries = torch.version.cuda is not None or torch.version.hip is not None
    try:
        hooked("bf16", "no")
    except PrepareError as error:
        return str(error), carries
    return "trained", carries


def test_a_hook_that_the_backend_cannot_carry_is_refused() -> None:
    for answer, carries in run_on_ranks(2, bf16_hook):
        assert answer == "trained" if carries else "comm_hook='bf16'" in answer


@pytest.mark.parametrize(("hook", "wrapper"), [("fp16", "no"), ("power_sgd", "no"), ("power_sgd", "fp16")])
def test_communication_hooks_train(hook: str, wrapper: str) -> None:
    plain = run_on_ranks(2, hooked, "no", "no")[0]
    got = run_on_ranks(2, hooked, hook, wrapper)[0]
    assert got == pytest.approx(plain, abs=0.05)
    assert got != plain, "the hook did nothing"


# Sharding by other rules


def sharded_by(settings: dict[str, Any]) -> tuple[str, list[float]]:
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(**settings))
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    return accelerator.strategy.describe()[0], [step(accelerator, model, optimizer, i) for i in range(3)]


@pytest.mark.parametrize(
    ("settings", "units"),
    [
        ({}, "4 units: 3 Block + the rest (repeated blocks)"),
        ({"transformer_cls_names_to_wrap": "Block"}, "4 units: 3 Block + the rest (class Block as configured)"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 800}, "3 Linear + 3 Sequential"),
        ({"auto_wrap_policy": "NO_WRAP"}, "1 unit: the whole model"),
    ],
)
def test_units_are_found_and_told(settings: dict[str, Any], units: str) -> None:
    told, losses = run_on_ranks(2, sharded_by, settings)[0]
    assert units in told
    assert losses == pytest.approx(run_on_ranks(2, trained, "ddp", "together")[0][:3], abs=1e-5)


def clip_some(strategy: str, norm_type: float) -> float:
    accelerator = make(strategy)
    model: Any = TinyTransformer()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    tokens = make_tokens(4)[accelerator.process_index :: accelerator.num_processes]
    accelerator.backward(token_losses(model(tokens), tokens).mean())
    some = [p for name, p in model.named_parameters() if "blocks.1" in name or name.endswith("norm.weight")]
    return float(accelerator.clip_grad_norm_(itertools.chain(some), 0.1, norm_type))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_the_norm_of_a_subset_is_global(norm_type: float) -> None:
    wanted = run_on_ranks(1, clip_some, "single", norm_type)[0]
    assert wanted > 0
    for ranks in (2, 4):
        for got in run_on_ranks(ranks, clip_some, "fsdp", norm_type):
            assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("strategy", ZERO_STAGES)
def test_the_norm_of_a_subset_is_global_under_zero(strategy: str, norm_type: float) -> None:
    wanted = run_on_ranks(1, clip_some, "single", norm_type)[0]
    for got in run_on_ranks(2, clip_some, strategy, norm_type):
        assert got == pytest.approx(wanted, rel=1e-5)


# auto


def free_memory(count: int) -> AbstractContextManager[Any]:
    """Let the choice of a strategy find so many bytes of memory."""
    return mock.patch("paceline.accelerator.strategy_selection.memory_info", return_value=(count, count))


def automatic(free: int | None) -> tuple[str, str]:
    with contextlib.nullcontext() if free is None else free_memory(free):
        accelerator = Accelerator(cpu=True)
        model: Any = TinyTransformer(width=64)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        step(accelerator, model, optimizer)
    return accelerator.strategy.name, accelerator.describe()


def test_auto_takes_the_least_sharding_that_fits() -> None:
    assert run_on_ranks(1, automatic, None)[0][0] == "single"
    name, text = run_on_ranks(2, automatic, None)[0]
    assert name == "ddp"
    assert "on every rank" in text
    name, text = run_on_ranks(2, automatic, 1_000_000)[0]
    assert name == "fsdp"
    assert "too much for one rank" in text


def test_auto_keeps_what_was_said_about_fsdp() -> None:
    assert "class Block as configured" in run_on_ranks(2, automatic_with_a_hint)[0]


def automatic_with_a_hint() -> str:
    """What the script says about FSDP holds when `auto` takes it."""
    os.environ["PACELINE_FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP"] = "Block"
    try:
        with free_memory(1_000_000):
            accelerator = Accelerator(cpu=True)
            accelerator.prepare(TinyTransformer(width=64))
    finally:
        del os.environ["PACELINE_FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP"]
    return "\n".join(accelerator.strategy.describe())


class TwoTowers(nn.Module):
    """One that learns and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.frozen(self.trained(x))
        return out


def ignored_modules() -> tuple[list[str], float]:
    """Ranks without values leave the same parameters out as the rank that has them."""
    from torch.distributed.tensor import DTensor

    plugin = FullyShardedDataParallelPlugin(ignored_modules="frozen")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    torch.manual_seed(0)
    with torch.device("cpu" if accelerator.is_main_process else "meta"):
        model: Any = TwoTowers()
    model = accelerator.prepare(model)
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    return whole, float(model(torch.ones(1, 4)).sum().detach())


def test_ignored_modules_stay_whole_on_every_rank() -> None:
    torch.manual_seed(0)
    wanted = float(TwoTowers()(torch.ones(1, 4)).sum().detach())
    for whole, value in run_on_ranks(2, ignored_modules):
        assert whole == ["frozen.weight", "frozen.bias"]
        assert value == pytest.approx(wanted, abs=1e-6)


def freed() -> int:
    """Whether gradients are still exchanged in every micro-batch, as asked, after memory was freed."""
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    accelerator = Accelerator(cpu=True, strategy="ddp", gradient_accumulation_plugin=plugin)
    accelerator.free_memory(accelerator.prepare(nn.Linear(2, 2)))
    model: Any = accelerator.prepare(nn.Linear(2, 2))
    with accelerator.accumulate(model):
        return int(model.require_backward_grad_sync)


def test_freeing_memory_keeps_the_settings() -> None:
    assert run_on_ranks(2, freed) == [1, 1]


# Compile


def compiled(strategy: str, regional: bool) -> list[float]:
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=regional)
    accelerator = make(strategy, dynamo_plugin=plugin)
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    return [step(accelerator, model, optimizer, i) for i in range(3)]


@pytest.mark.parametrize(
    ("strategy", "regional"),
    [
        ("ddp", False),
        ("ddp", True),
        ("fsdp", True),
        *with_deepspeed([("zero2", False)]),
        *slowly(with_deepspeed([("zero3", True)])),
    ],
)
def test_compiled_models_train_alike(strategy: str, regional: bool) -> None:
    plain = run_on_ranks(2, trained, strategy, "together")[0][:3]
    assert run_on_ranks(2, compiled, strategy, regional)[0] == pytest.approx(plain, abs=1e-5)


# Weights on disk


def saved(folder: str, strategy: str, shard_size: int) -> dict[str, torch.Tensor]:
    accelerator = make(strategy, mixed_precision="bf16")
    model: Any = TinyTransformer()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.save_model(model, folder, max_shard_size=shard_size)
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("shard_size", [10**9, 4096], ids=["one file", "many files"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", *ZERO_STAGES])
def test_saved_weights_are_safetensors(tmp_path: Path, strategy: str, shard_size: int) -> None:
    state = run_on_ranks(2, saved, str(tmp_path), strategy, shard_size)[0]
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size == 4096)
    loaded: dict[str, torch.Tensor] = {}
    for file in files:
        loaded |= load_file(file)
    assert not list(tmp_path.glob("*.partial"))
    assert set(state) - set(loaded) == {"head.weight"}, "the tie is written once"
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)
    first = TinyTransformer().state_dict()
    assert all(torch.equal(state[name], first[name]) for name in state), "nothing was rounded to 16 bits"


def unwritable(folder: str) -> str:
    accelerator = Accelerator(cpu=True, strategy="ddp")
    model = accelerator.prepare(TinyTransformer())
    with pytest.raises(Exception, match="could not be saved") as error:
        accelerator.save_model(model, folder)
    return str(error.value)


def test_a_failed_save_fails_on_every_rank(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    first, second = run_on_ranks(2, unwritable, str(blocked / "weights"))
    assert first == second
