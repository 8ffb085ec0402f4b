"""Threads of one process that read streams: each sees its own part."""

from __future__ import annotations

import gc
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from paceline.data.randomness import IsolatedRng
from paceline.data.worker_split import StreamShard

if TYPE_CHECKING:
    from collections.abc import Iterator


class SplitsItself(IterableDataset[int]):
    """Reads its part by the worker info, and lets other threads run while it does."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        assert info is not None
        time.sleep(0.02)
        for number in range(info.id, 40, info.num_workers):
            current: Any = get_worker_info()
            assert current is info
            time.sleep(0.001)
            yield number


def test_each_thread_sees_its_own_part() -> None:
    parts: dict[int, list[int]] = {}

    def read(rank: int) -> None:
        parts[rank] = list(StreamShard(SplitsItself(), rank, 2, 0))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get_worker_info() is None
    assert parts == {0: list(range(0, 40, 2)), 1: list(range(1, 40, 2))}


def test_threads_see_the_generator_of_numpy_while_a_loader_isolates_it() -> None:
    np.random.seed(0)
    np.random.standard_normal()
    seen: set[str] = set()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            seen.add(np.random.get_state(legacy=False)["bit_generator"])

    thread = threading.Thread(target=look)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        isolated = IsolatedRng(0)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            with isolated():
                pass
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert seen == {"MT19937"}
    # The second of the two normal numbers that were computed at once.
    assert np.random.standard_normal() == 0.4001572083672233


def test_a_thread_that_begins_while_another_reads_sees_its_own_part() -> None:
    reading = threading.Event()

    class TellsWhenItReads(SplitsItself):
        def __iter__(self) -> Iterator[int]:
            reading.set()
            yield from super().__iter__()

    first: list[int] = []
    thread = threading.Thread(target=lambda: first.extend(StreamShard(TellsWhenItReads(), 0, 2, 0)))
    thread.start()
    assert reading.wait(timeout=60)
    second = list(StreamShard(SplitsItself(), 1, 2, 0))
    thread.join()
    assert (first, second) == (list(range(0, 40, 2)), list(range(1, 40, 2)))


def test_a_finalizer_sees_the_generator_of_numpy_while_a_loader_isolates_it() -> None:
    """Python 3.11 and older collect garbage whenever memory is allocated: at each point of the exchange once here."""
    seen: list[str] = []
    numpy_random: Any = np.random

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            seen.append(type(numpy_random.get_bit_generator()).__name__)

    isolated_rng = IsolatedRng(0)
    thresholds = gc.get_threshold()
    # What is there already need not be looked through each time.
    gc.collect()
    gc.freeze()
    for allocations in range(100):
        gc.collect()
        gc.disable()
        Cycle()
        gc.set_threshold(gc.get_count()[0] + allocations, *thresholds[1:])
        try:
            gc.enable()
            with isolated_rng():
                pass
        finally:
            gc.enable()
            gc.set_threshold(*thresholds)
    gc.collect()
    gc.unfreeze()
    assert seen == ["MT19937"] * 100
