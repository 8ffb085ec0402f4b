"""What has one element, or none, counts as contiguous whatever its stride; its bytes travel like any others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.checkpoint.format.json_state import from_plain, to_plain
from paceline.checkpoint.io.transfer import HostBuffers
from paceline.collectives import FakeGroup, as_bytes, gather_samples, run_fake_ranks
from paceline.collectives.samples import BatchCounts
from paceline.data.batch_packing import PackedBatch, unpack

SLICES = {
    "one row": torch.tensor([[1.0, 2.0]])[:, 0],
    "one row of int64": torch.tensor([[1, 2]])[:, 1],
    "no row": torch.zeros(0, 3)[:, 1],
    "one by one": torch.arange(6.0).view(1, 6)[:, ::3][:, :1],
}


@pytest.mark.parametrize("name", SLICES)
def test_bytes_are_seen_whatever_the_stride(name: str) -> None:
    tensor = SLICES[name]
    assert as_bytes(tensor).numpy().tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("name", SLICES)
def test_slices_are_gathered_together(name: str) -> None:
    tensor = SLICES[name]
    rows = tensor.shape[0]

    def run(group: FakeGroup) -> Any:
        counts = BatchCounts((rows, rows), (rows, rows))
        return gather_samples(group, {"predictions": tensor, "labels": tensor}, counts)

    for gathered in run_fake_ranks(2, run):
        assert torch.equal(gathered["predictions"], torch.cat([tensor, tensor]))
        assert torch.equal(gathered["labels"], torch.cat([tensor, tensor]))


@pytest.mark.parametrize("name", SLICES)
def test_slices_are_dispatched(name: str) -> None:
    parcel = PackedBatch.of({"x": SLICES[name]})
    place = torch.zeros(parcel.size, dtype=torch.uint8)
    parcel.write(place, 0, 0)
    assert torch.equal(unpack(place)["x"], SLICES[name])


@pytest.mark.parametrize("name", SLICES)
def test_slices_are_saved(name: str) -> None:
    tensor = SLICES[name]
    assert torch.equal(from_plain(to_plain({"x": tensor}, "a registered object"))["x"], tensor)
    with HostBuffers(1).on_host(tensor.flatten()) as raw:
        assert bytes(raw) == tensor.numpy().tobytes()
