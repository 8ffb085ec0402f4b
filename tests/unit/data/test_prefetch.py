from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline.data import DevicePrefetcher

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCELERATOR = torch.accelerator.is_available()
needs_accelerator = pytest.mark.skipif(not ACCELERATOR, reason="no accelerator")


class Moves:
    """Hides a tensor and can move itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def to(self, device: Any, non_blocking: bool = False) -> Moves:
        return Moves(self.tensor.to(device, non_blocking=non_blocking))


def test_batches_on_the_cpu_are_not_touched() -> None:
    batches = iter([{"x": torch.ones(2)}, "text"])
    assert DevicePrefetcher(torch.device("cpu"), non_blocking=True).iterate(batches) is batches


def test_a_device_without_streams_gets_plain_copies() -> None:
    # The meta device has no streams, and holds no numbers.
    prefetcher = DevicePrefetcher(torch.device("meta"), non_blocking=False)
    found = list(prefetcher.iterate(iter([{"x": torch.ones(2), "name": "a"}, Moves(torch.ones(3))])))
    assert found[0]["x"].device.type == "meta"
    assert found[0]["name"] == "a"
    assert found[1].tensor.device.type == "meta"


def filled(number: int, rows: int, pin: bool) -> Iterator[dict[str, Any]]:
    for value in range(number):
        full = torch.full((rows, 1024), float(value))
        full = full.pin_memory() if pin else full
        yield {"x": full, "parts": [full[:8].clone(), (f"n{value}", value)]}


@pytest.mark.gpu
@needs_accelerator
@pytest.mark.parametrize(("rows", "pin"), [(4096, True), (4096, False), (8, False)])
def test_batches_arrive_whole_while_earlier_ones_are_still_being_used(rows: int, pin: bool) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    slow = torch.ones(4096, 4096, device=device)
    sums = []
    for batch in DevicePrefetcher(device, non_blocking=True).iterate(filled(24, rows, pin)):
        assert batch["x"].device.type == device.type
        # Long work first: the batch is read on the device when the host has long let go of it.
        for _ in range(20):
            slow = (slow @ slow).clamp_(max=1.0)
        sums.append((batch["x"].amin(), batch["x"].amax(), batch["parts"][0].mean(), batch["parts"][1]))
        del batch
    for value, (low, high, part, (name, number)) in enumerate(sums):
        assert (low.item(), high.item(), part.item()) == (value, value, value)
        assert (name, number) == (f"n{value}", value)


@pytest.mark.gpu
@needs_accelerator
def test_the_next_batch_is_fetched_before_this_one_is_handed_out() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    fetched = []

    def source() -> Iterator[torch.Tensor]:
        for value in range(4):
            fetched.append(value)
            yield torch.tensor([value])

    seen = []
    for batch in DevicePrefetcher(device, non_blocking=False).iterate(source()):
        seen.append((batch.item(), len(fetched)))
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]


@pytest.mark.gpu
@needs_accelerator
def test_objects_that_move_themselves_arrive_too() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    batches = iter([{"a": Moves(torch.ones(3)), "b": torch.ones(2)} for _ in range(3)])
    for batch in DevicePrefetcher(device, non_blocking=True).iterate(batches):
        assert batch["a"].tensor.device.type == batch["b"].device.type == device.type


@pytest.mark.gpu
@needs_accelerator
def test_batches_that_are_kept_stay_what_they_were() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    kept = list(DevicePrefetcher(device, non_blocking=True).iterate(filled(12, 4096, False)))
    assert [batch["x"].mean().item() for batch in kept] == list(range(12))


@pytest.mark.gpu
@needs_accelerator
def test_pageable_batches_do_not_pile_up_on_the_device() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    prefetcher = DevicePrefetcher(device, non_blocking=True)
    rows = 2**13
    slow = torch.ones(8192, 8192, device=device)
    torch.accelerator.synchronize()
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    for batch in prefetcher.iterate(filled(40, rows, False)):
        for _ in range(5):
            slow = (slow @ slow).clamp_(max=1.0)
        slow[0, 0] += batch["x"].sum()
        del batch
    torch.accelerator.synchronize()
    size = rows * 1024 * 4
    assert torch.accelerator.max_memory_allocated() - before < 8 * size + 3 * slow.nbytes
    text = prefetcher.describe()
    assert "by a thread through pinned memory" in text
    assert "MB on the device" in text


@pytest.mark.gpu
@needs_accelerator
def test_an_error_of_the_loader_reaches_the_loop() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None

    def failing() -> Iterator[Any]:
        yield from filled(3, 4096, False)
        raise ValueError("no more")

    batches = DevicePrefetcher(device, non_blocking=True).iterate(failing())
    assert [next(batches)["x"].mean().item() for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="no more"):
        next(batches)


@pytest.mark.gpu
@needs_accelerator
@pytest.mark.parametrize("rows", [8, 64, 8192])
def test_a_source_may_use_its_memory_again(rows: int) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    buffer = torch.empty(rows, 1024)

    def source() -> Iterator[torch.Tensor]:
        for value in range(30):
            yield buffer.fill_(value)

    found = DevicePrefetcher(device, non_blocking=True).iterate(source())
    assert [(batch.amin().item(), batch.amax().item()) for batch in found] == [(i, i) for i in range(30)]


@pytest.mark.gpu
@needs_accelerator
def test_an_object_that_moves_itself_may_use_its_memory_again() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    buffer = torch.empty(1024)

    def source() -> Iterator[Moves]:
        for value in range(10):
            yield Moves(buffer.fill_(value))

    found = list(DevicePrefetcher(device, non_blocking=True).iterate(source()))
    assert [batch.tensor.mean().item() for batch in found] == list(range(10))
