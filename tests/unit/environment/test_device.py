from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from paceline.environment.device import choose_device, describe_device, memory_info, supported_precisions, why_no_fp8
from paceline.environment.host import core_count, host_memory
from paceline.environment.world import World
from paceline.errors import DeviceError

CPU = torch.device("cpu")


class FakeAccelerator:
    """Stands in for torch.accelerator on a machine without one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.chosen: int | None = None

    def current_accelerator(self, check_available: bool = False) -> torch.device:
        return torch.device("cuda")

    def device_count(self) -> int:
        return self.count

    def set_device_index(self, index: int) -> None:
        self.chosen = index


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    fake = FakeAccelerator(2)
    monkeypatch.setattr(torch, "accelerator", fake)
    return fake


def place(rank: int, size: int, source: str = "torchrun") -> World:
    return World(rank=rank, size=size, local_rank=rank, local_size=size, source=source)  # type: ignore[arg-type]


def test_each_local_rank_takes_its_device(two_devices: FakeAccelerator) -> None:
    assert choose_device(place(1, 2)) == torch.device("cuda", 1)
    assert two_devices.chosen == 1


def test_more_processes_than_devices(two_devices: FakeAccelerator) -> None:
    with pytest.raises(DeviceError, match=r"local rank 2 of 3, and it sees 2 cuda devices.*at most 2 processes"):
        choose_device(place(2, 3))
    assert two_devices.chosen is None


def test_cpu_asked_for_leaves_devices_alone(two_devices: FakeAccelerator) -> None:
    assert choose_device(place(5, 6), cpu=True) == CPU
    assert two_devices.chosen is None


def test_slurm_that_bound_one_device_to_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "accelerator", FakeAccelerator(1))
    assert choose_device(place(3, 4, "slurm")) == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="sees 1 cuda device"):
        choose_device(place(3, 4))


def test_precisions_of_the_processor_are_those_it_computes_in() -> None:
    assert supported_precisions(CPU) == {"no", "bf16", "fp16"}
    for dtype in (torch.bfloat16, torch.float16):
        a = torch.ones(4, 4, dtype=dtype)
        assert torch.equal(a @ a, torch.full((4, 4), 4, dtype=dtype))


@pytest.mark.parametrize(
    ("bf16", "capability", "expected"),
    [
        (True, (9, 0), {"no", "fp16", "bf16", "fp8"}),
        (True, (8, 9), {"no", "fp16", "bf16", "fp8"}),
        (True, (8, 0), {"no", "fp16", "bf16"}),
        (False, (7, 5), {"no", "fp16"}),
    ],
)
def test_precisions_of_a_device(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, capability: tuple[int, int], expected: set[str]
) -> None:
    module = SimpleNamespace(
        is_bf16_supported=lambda including_emulation: bf16 or including_emulation,
        get_device_capability=lambda device: capability,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert supported_precisions(torch.device("cuda", 0)) == expected
    reason = why_no_fp8(torch.device("cuda", 0))
    assert (reason == "") == ("fp8" in expected)
    assert reason == "" or reason.endswith(f"8.9 or higher, and this one has {capability[0]}.{capability[1]}")


def test_memory_of_the_processor_is_shared_out() -> None:
    free, total = memory_info(CPU)
    assert 0 < free <= total <= psutil.virtual_memory().total
    assert memory_info(CPU, local_size=4)[1] == total // 4


def test_memory_of_a_device_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(mem_get_info=lambda device: (3, 7))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert memory_info(torch.device("cuda", 0), local_size=4) == (3, 7)


def test_description_names_cores_and_memory() -> None:
    text = describe_device(CPU)
    assert text.startswith(f"cpu ({core_count()} core")
    assert f"{host_memory()[1] / 2**30:.1f} GiB" in text
