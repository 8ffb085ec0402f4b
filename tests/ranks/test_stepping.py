"""Windows, weights, schedules and skipped steps, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from paceline import Accelerator, GradientAccumulationPlugin, GradScalerKwargs
from paceline.errors import SteppingError
from tests.support.engines import ZERO_STAGES, make, slowly, whole_gradients, with_deepspeed
from tests.support.models import VOCABULARY, TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks

STRATEGIES = ["ddp", "fsdp", *ZERO_STAGES]


# Token weighting

# How many tokens each rank has in each micro-batch: nobody has as many as another.
LENGTHS = [[3, 9, 5], [12, 2, 7]]


def weighted_batches(rank: int) -> list[torch.Tensor]:
    return [make_tokens(1, length + 1, seed=10 * rank + i) for i, length in enumerate(LENGTHS[rank])]


def weighted(strategy: str, accumulation: int, as_tensor: bool) -> dict[str, torch.Tensor]:
    accelerator = make(strategy, gradient_accumulation_steps=accumulation)
    model: Any = TinyTransformer()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = weighted_batches(accelerator.process_index)
    for batch in batches if accumulation == 3 else batches[:1]:
        with accelerator.accumulate(model):
            losses = token_losses(model(batch), batch)
            count: Any = torch.tensor(losses.numel()) if as_tensor else losses.numel()
            accelerator.backward(losses.sum(), weight=count)
    return whole_gradients(accelerator, model)


def one_batch_gradient(micro_batches: int) -> dict[str, torch.Tensor]:
    model = TinyTransformer()
    batches = [b for rank in range(2) for b in weighted_batches(rank)[:micro_batches]]
    total = torch.zeros(())
    for batch in batches:
        total = total + token_losses(model(batch), batch).sum()
    (total / sum(batch.shape[1] - 1 for batch in batches)).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_token_weights_give_the_gradient_of_one_big_batch(strategy: str, accumulation: int, as_tensor: bool) -> None:
    wanted = one_batch_gradient(accumulation)
    for got in run_on_ranks(2, weighted, strategy, accumulation, as_tensor):
        for name, gradient in wanted.items():
            assert torch.allclose(got[name], gradient, atol=1e-6), name


def mean_of_means(strategy: str) -> dict[str, torch.Tensor]:
    accelerator = Accelerator(cpu=True, strategy=strategy, gradient_accumulation_steps=3)
    model: Any = accelerator.prepare(TinyTransformer())
    for batch in weighted_batches(accelerator.process_index):
        with accelerator.accumulate(model):
            accelerator.backward(token_losses(model(batch), batch).mean())
    return whole_gradients(accelerator, model)


def test_the_mean_of_means_is_another_gradient() -> None:
    wanted = one_batch_gradient(3)
    got = run_on_ranks(2, mean_of_means, "ddp")[0]
    assert any(not torch.allclose(got[name], wanted[name], atol=1e-3) for name in wanted)


def mixing_weights() -> str:
    accelerator = Accelerator(cpu=True, strategy="single", gradient_accumulation_steps=2)
    weight = nn.Parameter(torch.ones(()))
    with accelerator.accumulate():
        accelerator.backward(weight * 2, weight=3)
    with accelerator.accumulate(), pytest.raises(SteppingError, match="without one"):
        accelerator.backward(weight * 2)
    return "done"


def test_weighted_and_plain_losses_do_not_mix() -> None:
    assert run_on_ranks(1, mixing_weights) == ["done"]


# Windows


class Stream(IterableDataset[torch.Tensor]):
    """Nobody knows how long it is."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __iter__(self) -> Any:
        return iter(torch.tensor([value]) for value in self.values)


def windows(sized: bool, count: int, steps: int, follow: bool = True) -> list[tuple[bool, float | None]]:
    """For each micro-batch: whether it syncs, and the gradient of `w * x` at the end of the window."""
    plugin = GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=follow)
    accelerator = Accelerator(cpu=True, strategy="single", gradient_accumulation_plugin=plugin)
    values = [float(i + 1) for i in range(count)]
    model: Any = nn.Linear(1, 1, bias=False)
    data: Any = TensorDataset(torch.tensor(values)[:, None]) if sized else Stream(values)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.0), DataLoader(data, batch_size=1)
    )
    seen = []
    for batch in loader:
        x = batch[0] if sized else batch
        with accelerator.accumulate(model):
            accelerator.backward(model(x).mean())
            sync = accelerator.sync_gradients
            optimizer.step()
        seen.append((sync, float(model.weight.grad) if sync else None))
        optimizer.zero_grad()
    return seen


def short_window(strategy: str, sized: bool) -> list[float]:
    """Five micro-batches on each of two ranks, in windows of four: the norm of each window's gradient of `w * x`."""
    accelerator = make(strategy, gradient_accumulation_steps=4)
    # As many elements as ranks, of which one sees a gradient: both ranks hold a part under sharding.
    model: Any = nn.Linear(2, 1, bias=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
    values = [float(i + 1) for i in range(10)]
    data: Any = TensorDataset(torch.tensor(values)[:, None]) if sized else Stream(values)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=1))
    seen = []
    for batch in loader:
        x = (batch[0] if sized else batch).reshape(1, 1)
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.cat([x, torch.zeros(1, 1)], 1)).mean())
            if accelerator.sync_gradients:
                seen.append(float(accelerator.clip_grad_norm_(model.parameters(), float("inf"))))
            optimizer.step()
            optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("sized", [True, False], ids=["sized", "stream"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_short_last_window_is_a_true_mean_over_ranks(strategy: str, sized: bool) -> None:
    # 1..8 make a window of four on each rank, whose mean is 4.5; 9 and 10 stand alone.
    for seen in run_on_ranks(2, short_window, strategy, sized):
        assert seen == pytest.approx([4.5, 9.5])


@pytest.mark.parametrize("sized", [True, False], ids=["sized", "stream"])
def test_the_short_last_window_is_a_true_mean(sized: bool) -> None:
    # 1..4 make a window whose mean is 2.5; 5 stands alone and weighs as much as itself, not a quarter.
    seen = run_on_ranks(1, windows, sized, 5, 4)[0]
    assert [sync for sync, _ in seen] == [False, False, False, True, True]
    assert [gradient for _, gradient in seen if gradient is not None] == [2.5, 5.0]


def test_windows_may_ignore_the_end_of_the_loader() -> None:
    assert [sync for sync, _ in run_on_ranks(1, windows, True, 5, 4, False)[0]] == [False] * 3 + [True, False]


def early_clip() -> str:
    accelerator = Accelerator(cpu=True, strategy="single", gradient_accumulation_steps=4)
    model: Any = nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 2)).sum())
        with pytest.raises(SteppingError, match=r"clip_grad_norm_ was called in micro-batch 1 of a window of 4"):
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        before = model.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(before, model.weight)
        assert model.weight.grad is not None
    return "done"


def test_nothing_acts_inside_a_window() -> None:
    assert run_on_ranks(1, early_clip) == ["done"]


def zero_first() -> float:
    """Scripts that zero at the top of the loop must not lose what the window gathered."""
    accelerator = Accelerator(cpu=True, strategy="single", gradient_accumulation_steps=2)
    model: Any = nn.Linear(1, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for x in (1.0, 3.0):
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            accelerator.backward(model(torch.tensor([[x]])).sum())
            optimizer.step()
    return float(model.weight.grad)


def test_zero_grad_at_the_top_keeps_the_window() -> None:
    assert run_on_ranks(1, zero_first) == [2.0]


# Schedules


def schedule(strategy: str) -> tuple[list[float], int]:
    """100 optimizer steps of a schedule that ends at step 100, with two micro-batches to a step."""
    accelerator = make(strategy, gradient_accumulation_steps=2)
    model: Any = nn.Linear(4, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler: Any = LinearLR(optimizer, start_factor=1.0, end_factor=1e-9, total_iters=100)
    data = TensorDataset(torch.ones(200 * accelerator.num_processes, 4))
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(data, batch_size=1), scheduler
    )
    rates, taken = [], 0
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).mean())
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            taken += accelerator.sync_gradients
    assert scheduler.last_epoch == 100
    return [rates[0], rates[100], rates[198], scheduler.get_last_lr()[0]], taken


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (1, "single"),
        (2, "ddp"),
        (2, "fsdp"),
        (4, "ddp"),
        *with_deepspeed([(2, f"zero{stage}") for stage in range(3)]),
        *slowly(with_deepspeed([(2, "zero3")])),
    ],
)
def test_a_schedule_of_100_steps_ends_at_step_100(ranks: int, strategy: str) -> None:
    for rates, taken in run_on_ranks(ranks, schedule, strategy):
        assert taken == 100
        assert rates == pytest.approx([1.0, 0.5, 0.01, 0.0], abs=1e-6)


# Skipped steps


def overflow(strategy: str) -> list[tuple[bool, float, float, bool]]:
    """fp16; in step 1 the gradient of rank 1 alone overflows."""
    accelerator = Accelerator(
        cpu=True,
        strategy=strategy,
        mixed_precision="fp16",
        kwargs_handlers=[GradScalerKwargs(init_scale=1024.0, growth_interval=1000)],
    )
    model: Any = TinyTransformer()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler: Any = LinearLR(optimizer, start_factor=1.0, end_factor=0.5, total_iters=10)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    tokens = make_tokens(2)
    seen = []
    for step in range(3):
        before = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
        loss = token_losses(model(tokens), tokens).mean()
        broken = step == 1 and accelerator.process_index == accelerator.num_processes - 1
        accelerator.backward(loss * (float("inf") if broken else 1.0))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        after = accelerator.get_state_dict(model)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        scale = accelerator.scaler.get_scale() if accelerator.scaler else 0.0
        seen.append((accelerator.optimizer_step_was_skipped, scheduler.get_last_lr()[0], scale, moved))
    # The scale is adapted when the next loss is scaled.
    accelerator.backward(token_losses(model(tokens), tokens).mean())
    assert accelerator.scaler is not None
    assert accelerator.scaler.get_scale() == 512.0
    return seen


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "single"), (2, "ddp"), (2, "fsdp")])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: int, strategy: str) -> None:
    results = run_on_ranks(ranks, overflow, strategy)
    for seen in results:
        assert [skipped for skipped, *_ in seen] == [False, True, False]
        assert [rate for _, rate, *_ in seen] == pytest.approx([0.095, 0.095, 0.09])
    # Only rank 0 holds gathered weights.
    assert [moved for *_, moved in results[0]] == [True, False, True]


# Two accelerators


def two_at_once() -> tuple[str, str, int, int, bool, bool]:
    one = Accelerator(cpu=True, strategy="ddp", gradient_accumulation_steps=4)
    two = Accelerator(cpu=True, strategy="fsdp", mixed_precision="bf16")
    model_one: Any = one.prepare(TinyTransformer())
    model_two: Any = two.prepare(TinyTransformer())
    tokens = make_tokens(2)
    with one.accumulate(model_one):
        one.backward(token_losses(model_one(tokens), tokens).mean())
        two.backward(token_losses(model_two(tokens), tokens).mean())
        return (
            one.mixed_precision,
            two.mixed_precision,
            one.gradient_accumulation_steps,
            two.gradient_accumulation_steps,
            one.sync_gradients,
            two.sync_gradients,
        )


def test_two_accelerators_do_not_disturb_each_other() -> None:
    assert run_on_ranks(2, two_at_once)[0] == ("no", "bf16", 4, 1, False, True)


def test_the_vocabulary_divides_by_no_number_of_ranks() -> None:
    assert all(VOCABULARY % ranks for ranks in (2, 3, 4))
