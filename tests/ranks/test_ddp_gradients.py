"""Under DDP every gradient is the mean over the ranks, whatever led to it; others train the same or refuse."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paceline import DistributedDataParallelKwargs
from paceline.errors import PrepareError, SteppingError, UnusedParametersError
from tests.support.engines import make, with_deepspeed
from tests.support.ranks import run_on_ranks

STEPS = 4


class Encoder(nn.Module):
    """A trunk that scripts also call by itself, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.other = nn.Linear(6, 2)
        self.narrow = False

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.trunk(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encode(x)
        if self.narrow:
            out: Tensor = self.head(hidden)
            return out
        return torch.cat([self.head(hidden), self.other(hidden)], dim=1)


class PlainLoop:
    """The accelerator's part in plain PyTorch on one process."""

    def __init__(self, accumulation: int) -> None:
        self.accumulation = accumulation

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        (loss / self.accumulation).backward(**kwargs)  # type: ignore[no-untyped-call]

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, _model: nn.Module) -> Any:
        return nullcontext()


def micro_batch(case: str, accelerator: Any, model: Any, x: Tensor) -> None:
    match case:
        case "two backwards":
            out = model(x)
            accelerator.backward(out.pow(2).mean(), retain_graph=True)
            accelerator.backward(out.tanh().mean())
        case "two forwards":
            one, two = model(x), model(-x)
            accelerator.backward(one.pow(2).mean())
            accelerator.backward(two.tanh().mean())
        case "around":
            accelerator.backward(model(x).pow(2).mean())
            accelerator.backward(accelerator.unwrap_model(model).encode(x).pow(2).mean())
        case "around first":
            accelerator.backward(accelerator.unwrap_model(model).encode(x).pow(2).mean())
            accelerator.backward(model(x).pow(2).mean())
        case "around only":
            accelerator.backward(accelerator.unwrap_model(model)(x).pow(2).mean())
        case "in one loss":
            inner = accelerator.unwrap_model(model)
            accelerator.backward(model(x).pow(2).mean() + inner.encode(x).tanh().mean())
        case "kept back":
            with accelerator.no_sync(model):
                accelerator.backward(model(x).pow(2).mean())
        case "forward between":
            out = model(x)
            accelerator.backward(accelerator.unwrap_model(model).encode(x).pow(2).mean())
            accelerator.backward(out.pow(2).mean())
        case _:
            accelerator.backward(model(x).pow(2).mean())


def batches() -> Tensor:
    return torch.randn(STEPS, 2, 8, 4, generator=torch.Generator().manual_seed(1))


def fresh() -> Encoder:
    torch.manual_seed(0)
    return Encoder()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def wanted(case: str, accumulation: int) -> Tensor:
    """The weights of one process that trains on the whole batches."""
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loop = PlainLoop(accumulation)
    for index, window in enumerate(batches()):
        for x in window[:accumulation]:
            micro_batch(case, loop, model, x)
        if index % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return flat(model)


def trained(case: str, accumulation: int, settings: dict[str, Any], precision: str, strategy: str) -> Tensor:
    """The weights after the same steps through an accelerator."""
    accelerator = make(
        strategy,
        gradient_accumulation_steps=accumulation,
        mixed_precision=precision,
        kwargs_handlers=[DistributedDataParallelKwargs(**settings)] if settings else [],
    )
    model: Any = fresh()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    for index, window in enumerate(batches()):
        for x in window[:accumulation]:
            with accelerator.accumulate(model):
                micro_batch(case, accelerator, model, x[mine])
                if accelerator.sync_gradients and index % 2:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    named = accelerator.unwrap_model(model).named_parameters()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for _, p in named]
    return torch.cat([p.detach().flatten() for p in whole])


CASES = ["two backwards", "two forwards", "around", "around first", "around only", "in one loss", "kept back"]
PLAIN: dict[str, Any] = {}
FIND = {"find_unused_parameters": True}
STATIC = {"static_graph": True}
COPIED = {"gradient_as_bucket_view": False}
COMPRESSED = {"comm_hook": "fp16"}
POWER = {"comm_hook": "power_sgd", "comm_state_option": {"start_powerSGD_iter": 3}}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("settings", [PLAIN, FIND, STATIC, COPIED], ids=["plain", "find", "static", "copied"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_would(case: str, settings: dict[str, Any], accumulation: int) -> None:
    if case == "around first" and settings is STATIC:
        pytest.skip("static_graph promises that the first backward is that of the forward; see the test of its error")
    right = wanted(case, accumulation)
    for got in run_on_ranks(2, trained, case, accumulation, settings, "no", "ddp"):
        assert torch.allclose(got, right, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", ["two backwards", "around"])
@pytest.mark.parametrize(
    ("settings", "precision", "tolerance"),
    [(COMPRESSED, "no", 1e-3), (POWER, "no", 0.05), (PLAIN, "bf16", 0.02), (PLAIN, "fp16", 0.02)],
    ids=["fp16 hook", "power_sgd", "bf16", "fp16"],
)
def test_hooks_and_precisions(
    case: str, settings: dict[str, Any], precision: str, tolerance: float, accumulation: int
) -> None:
    right = wanted(case, accumulation)
    first, second = run_on_ranks(2, trained, case, accumulation, settings, precision, "ddp")
    assert torch.equal(first, second)
    if precision != "fp16":
        assert torch.allclose(first, right, atol=tolerance)


@pytest.mark.parametrize("strategy", ["fsdp", "single"])
@pytest.mark.parametrize("case", ["two backwards", "two forwards"])
def test_other_strategies_stay_right(case: str, strategy: str) -> None:
    right = wanted(case, 2)
    if strategy == "single":
        assert torch.allclose(trained(case, 2, {}, "no", "single"), right, atol=1e-6)
        return
    for got in run_on_ranks(2, trained, case, 2, {}, "no", strategy):
        assert torch.allclose(got, right, atol=1e-6)


def refused(case: str, settings: dict[str, Any], strategy: str) -> str:
    with pytest.raises((SteppingError, UnusedParametersError)) as error:
        trained(case, 1, settings, "no", strategy)
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "settings", "strategy", "words"),
    [
        ("kept back", PLAIN, "fsdp", "every backward since the last step ran under no_sync()"),
        ("forward between", PLAIN, "ddp", "was computed twice for one forward of the prepared model"),
        ("around first", STATIC, "ddp", "got no gradient: trunk.0.weight, trunk.0.bias"),
    ],
)
def test_what_cannot_be_averaged_is_named(case: str, settings: dict[str, Any], strategy: str, words: str) -> None:
    for message in run_on_ranks(2, refused, case, settings, strategy):
        assert words in message


# Freezing, unfreezing and adding


def change(case: str, step: int, model: Any, optimizer: Any) -> None:
    """What a script does to its model before a step; `model` is its own."""
    match case, step:
        case ("thaw", 0) | ("freeze", 2):
            model.trunk.requires_grad_(False)
        case ("thaw", 1) | ("freeze", 3):
            model.trunk.requires_grad_(True)
        case ("freeze", 1):
            model.trunk.requires_grad_(False)
        case ("by turns", _):
            model.head.requires_grad_(step % 2 == 0)
            model.other.requires_grad_(step % 2 == 1)
        case ("add group", 2):
            model.trunk.requires_grad_(True)
            optimizer.add_param_group({"params": model.trunk.parameters(), "lr": 0.25})
        case ("new module", 2):
            # Each rank draws its own values; rank 0's must win.
            extra = nn.Linear(6, 3)
            if not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
                nn.init.constant_(extra.weight, 0.1)
                nn.init.constant_(extra.bias, 0.2)
            model.head = nn.Sequential(model.head, nn.Linear(3, 6, bias=False), extra)
            nn.init.constant_(model.head[1].weight, 0.3)
            optimizer.add_param_group({"params": [*extra.parameters(), *model.head[1].parameters()]})


def start(case: str) -> tuple[Encoder, torch.optim.Optimizer]:
    model = fresh()
    if case == "add group":
        model.trunk.requires_grad_(False)
        return model, torch.optim.SGD([*model.head.parameters(), *model.other.parameters()], lr=0.5)
    if case == "thaw":
        model.trunk.requires_grad_(False)
    return model, torch.optim.SGD(model.parameters(), lr=0.5)


def wanted_changing(case: str, accumulation: int) -> Tensor:
    model, optimizer = start(case)
    for step, window in enumerate(batches()):
        change(case, step, model, optimizer)
        for x in window[:accumulation]:
            micro_batch("", PlainLoop(accumulation), model, x)
        optimizer.step()
        optimizer.zero_grad()
    return flat(model)


def train_changing(case: str, accumulation: int, settings: dict[str, Any], strategy: str) -> Tensor:
    handlers = [DistributedDataParallelKwargs(**settings)] if settings else []
    accelerator = make(strategy, gradient_accumulation_steps=accumulation, kwargs_handlers=handlers)
    own, given = start(case)
    model: Any
    optimizer: Any
    model, optimizer = accelerator.prepare(own, given)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    for step, window in enumerate(batches()):
        change(case, step, accelerator.unwrap_model(model), optimizer)
        for x in window[:accumulation]:
            with accelerator.accumulate(model):
                micro_batch("", accelerator, model, x[mine])
                optimizer.step()
                optimizer.zero_grad()
    inner = accelerator.unwrap_model(model).parameters()
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in inner])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", ["thaw", "freeze", "by turns", "add group", "new module"])
@pytest.mark.parametrize("settings", [PLAIN, FIND, COPIED], ids=["plain", "find", "copied"])
def test_what_is_trained_may_change(case: str, settings: dict[str, Any], accumulation: int) -> None:
    right = wanted_changing(case, accumulation)
    for got in run_on_ranks(2, train_changing, case, accumulation, settings, "ddp"):
        assert torch.allclose(got, right, atol=1e-6)


@pytest.mark.parametrize("settings", [COMPRESSED, POWER], ids=["fp16 hook", "power_sgd"])
@pytest.mark.parametrize("case", ["thaw", "freeze"])
def test_what_is_trained_may_change_under_a_hook(case: str, settings: dict[str, Any]) -> None:
    right = wanted_changing(case, 1)
    first, second = run_on_ranks(2, train_changing, case, 1, settings, "ddp")
    assert torch.equal(first, second)
    assert torch.allclose(first, right, atol=0.05)


@pytest.mark.parametrize("case", ["thaw", "freeze", "add group"])
@pytest.mark.parametrize("strategy", ["single", "fsdp", *with_deepspeed(["zero0"])])
def test_what_is_trained_may_change_elsewhere(case: str, strategy: str) -> None:
    if strategy == "zero0" and case == "add group":
        pytest.skip("refused; see below")
    right = wanted_changing(case, 1)
    if strategy == "single":
        assert torch.allclose(train_changing(case, 1, {}, "single"), right, atol=1e-6)
        return
    for got in run_on_ranks(2, train_changing, case, 1, {}, strategy):
        assert torch.allclose(got, right, atol=1e-6)


def refused_change(case: str, settings: dict[str, Any], strategy: str) -> str:
    with pytest.raises((PrepareError, SteppingError)) as error:
        train_changing(case, 1, settings, strategy)
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "settings", "strategy", "words"),
    [
        (
            "thaw",
            STATIC,
            "ddp",
            "trunk.0.bias, trunk.0.weight was frozen or unfrozen after the model was prepared with",
        ),
        ("new module", PLAIN, "fsdp", "was called with head.1.weight, head.2.weight, head.2.bias"),
        *with_deepspeed(
            [
                ("thaw", PLAIN, "zero1", "trunk.0.weight, trunk.0.bias of Encoder were frozen or unfrozen"),
                ("freeze", PLAIN, "zero2", "trunk.0.weight, trunk.0.bias of Encoder were frozen or unfrozen"),
                ("thaw", PLAIN, "zero3", "trunk.0.weight, trunk.0.bias of Encoder were frozen or unfrozen"),
                ("add group", PLAIN, "zero2", "add_param_group() was called after the optimizer was prepared"),
            ]
        ),
    ],
)
def test_changes_that_cannot_be_followed_are_named(
    case: str, settings: dict[str, Any], strategy: str, words: str
) -> None:
    for message in run_on_ranks(2, refused_change, case, settings, strategy):
        assert words in message


def frozen_on_one_rank() -> str:
    accelerator = make("ddp")
    model: Any = fresh()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    frozen = [model.module.trunk, model.module.head][accelerator.process_index]
    frozen.requires_grad_(False)
    with pytest.raises(PrepareError) as error:
        model(torch.ones(2, 4))
    return str(error.value)


def test_ranks_that_freeze_different_parameters_are_told() -> None:
    for message in run_on_ranks(2, frozen_on_one_rank):
        assert "head.bias, head.weight, trunk.0.bias, trunk.0.weight requires a gradient on rank 0 and not" in message


def turns() -> tuple[Tensor, int]:
    """A generator against a discriminator that is frozen while the generator learns; and how often DDP was rebuilt."""
    accelerator = make("ddp")
    torch.manual_seed(0)
    generator: Any = nn.Linear(3, 4)
    judge: Any = nn.Linear(4, 1)
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, judge))
    generator, judge, first, second = accelerator.prepare(generator, judge, first, second)
    reducers = {id(judge.reducer)}
    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    x = noise[accelerator.process_index :: accelerator.num_processes]
    for _ in range(3):
        judge.requires_grad_(True)
        accelerator.backward(judge(generator(x).detach()).pow(2).mean())
        second.step()
        second.zero_grad()
        judge.requires_grad_(False)
        accelerator.backward(judge(generator(x)).mean())
        first.step()
        first.zero_grad()
        reducers.add(id(judge.reducer))
    return torch.cat([flat(generator), flat(judge)]), len(reducers)


def test_a_discriminator_may_be_frozen_by_turns() -> None:
    torch.manual_seed(0)
    generator, judge = nn.Linear(3, 4), nn.Linear(4, 1)
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, judge))
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        judge(generator(x).detach()).pow(2).mean().backward()
        second.step()
        second.zero_grad()
        judge(generator(x)).mean().backward()
        first.step()
        first.zero_grad()
        second.zero_grad()
    right = torch.cat([flat(generator), flat(judge)])
    for got, reducers in run_on_ranks(2, turns):
        assert torch.allclose(got, right, atol=1e-6)
        assert reducers == 1, "the whole model frozen and back is no reason to build the reducer anew"


# The second net


def drift(how: str) -> None:
    accelerator = make("ddp", kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=how == "plain")])
    model: Any = fresh()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    for index in range(8):
        out = model(batches()[index % STEPS, 0][accelerator.process_index :: 2])
        if how == "plain":
            # Twice by hand, where DDP looks for unused parameters: nothing tells of it.
            out.pow(2).mean().backward(retain_graph=True)
            out.tanh().mean().backward()
        else:
            accelerator.backward(out.pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        if how != "plain" and accelerator.is_main_process and index == 1:
            with torch.no_grad():
                model.module.head.weight.mul_(1.01)
        if how == "saved" and index == 3:
            accelerator.strategy.model_state(model)


def drifting(how: str) -> str:
    with pytest.raises(SteppingError) as error:
        drift(how)
    return str(error.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("plain", "After 1 steps the ranks have different weights: trunk.0.weight (by"),
        ("by hand", "After 4 steps the ranks have different weights: head.weight (by"),
        ("saved", "After 4 steps the ranks have different weights"),
    ],
)
def test_weights_that_drift_apart_are_noticed(how: str, words: str) -> None:
    for message in run_on_ranks(2, drifting, how):
        assert words in message


def steps_apart() -> list[float]:
    """Ranks with different numbers of batches under join; later both take the same steps."""
    accelerator = make("ddp")
    model: Any = fresh()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    x = batches()[0, 0]
    with accelerator.join_uneven_inputs([model]):
        for _ in range(3 + 2 * accelerator.process_index):
            accelerator.backward(model(x).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
    for _ in range(10):
        accelerator.backward(model(x).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    weights: list[float] = flat(model).tolist()
    return weights


def test_joined_ranks_may_take_different_numbers_of_steps() -> None:
    first, second = run_on_ranks(2, steps_apart)
    assert first == second


def local_steps() -> list[float]:
    """Steps that the script keeps local on purpose, ended by an average of its own."""
    accelerator = make("ddp")
    model: Any = fresh()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    x = batches()[0, 0][accelerator.process_index :: 2]
    apart = []
    with accelerator.no_sync(model):
        for _ in range(4):
            accelerator.backward(model(x).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
        both = accelerator.gather(flat(model)[None])
        apart.append(float((both[0] - both[1]).abs().max()))
        for parameter in model.parameters():
            parameter.data = accelerator.reduce(parameter.data, "mean")
    accelerator.backward(model(x).pow(2).mean())
    optimizer.step()
    both = accelerator.gather(flat(model)[None])
    apart.append(float((both[0] - both[1]).abs().max()))
    return apart


def test_steps_kept_local_on_purpose_stay_local() -> None:
    for local, shared in run_on_ranks(2, local_steps):
        assert local > 1e-3
        assert shared == 0.0


def leave_a_head_out_later() -> None:
    accelerator = make("ddp")
    model: Any = fresh()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    for index in range(3):
        model.module.narrow = index == 2
        accelerator.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        # Zeros, not None: what is missing is not seen by looking at the gradients.
        optimizer.zero_grad(set_to_none=False)


def unused_later() -> tuple[str, ...]:
    with pytest.raises(UnusedParametersError) as error:
        leave_a_head_out_later()
    return error.value.names


def test_a_parameter_that_goes_unused_later_is_named_before_the_step() -> None:
    assert run_on_ranks(2, unused_later) == [("other.weight", "other.bias")] * 2
