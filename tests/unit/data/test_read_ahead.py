"""How many batches of a stream ranks agree on at once."""

from __future__ import annotations

import time

import torch

from paceline.data.read_ahead import MAX_BATCHES, ReadAhead

BATCH = torch.zeros(8, 16)


def test_the_first_iteration_begins_carefully() -> None:
    read_ahead = ReadAhead()
    assert read_ahead.next_size(0, BATCH) == 2
    assert 2 < read_ahead.next_size(2, BATCH) <= 32


def test_a_later_iteration_begins_with_what_the_one_before_has_learned() -> None:
    first = ReadAhead()
    first.next_size(0, BATCH)
    first.next_size(10_000, BATCH)
    assert ReadAhead(first).next_size(0, BATCH) == MAX_BATCHES
    # 32 MiB, whatever the time.
    assert ReadAhead(first).next_size(0, torch.zeros(2**20)) == 8


def test_after_a_slow_iteration_one_batch_is_read_ahead() -> None:
    first = ReadAhead()
    first.next_size(0, BATCH)
    time.sleep(0.06)
    assert first.next_size(2, BATCH) == 1
    assert ReadAhead(first).next_size(0, BATCH) == 1
