from __future__ import annotations

import pytest
import torch

from paceline.data.pinning import StagedCopier, num_copiers

ROWS = 3 * 2**20 + 1


def everything() -> dict[str, torch.Tensor]:
    """Tensors above and below the size that is split, of widths that divide by no number of threads."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(-100, 100, (ROWS,), generator=generator)
    return {
        "int64": wide,
        "bf16": wide.to(torch.bfloat16).expand(2, -1).contiguous(),
        "bool": (wide > 0).repeat(2),
        "complex": torch.complex(wide.float(), -wide.float()),
        "conjugate": torch.complex(wide.float(), -wide.float()).conj(),
        "transposed": wide.float()[:-1].view(2**10, -1).t(),
        "strided": wide.float()[::2],
        "part": wide[7:],
        "small": wide[:3].clone(),
        "scalar": torch.tensor(3.5),
        "one row's column": wide[:10].view(1, 10)[:, 3],
        "empty": torch.empty(0, 4),
    }


def copier(threads: int, buffer_bytes: int = 2**20) -> StagedCopier:
    return StagedCopier(torch.device("cpu"), None, threads, allocate=unpinned, buffer_bytes=buffer_bytes)


def unpinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("threads", "torch_threads", "buffer_bytes"), [(1, 1, 2**20), (3, 1, 5 * 2**20), (4, 8, 777_777), (2, 1, 2**24)]
)
@pytest.mark.parametrize("name", everything())
def test_copies_are_equal_whatever_the_layout(
    name: str, threads: int, torch_threads: int, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether torch's threads copy, or our own.
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    tensor = everything()[name]
    staged = copier(threads, buffer_bytes)
    for _ in range(2):
        copy = staged.copy(tensor)
        assert copy.dtype is tensor.dtype
        assert torch.equal(copy, tensor)
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or not tensor.numel()
    staged.close()


def test_a_failing_copy_is_an_error_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    staged = StagedCopier(torch.device("cpu"), None, 2, allocate=lambda size: unpinned(5))
    with pytest.raises((ValueError, RuntimeError)):
        staged.copy(torch.zeros(ROWS))
    staged.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
@pytest.mark.parametrize("name", everything())
def test_copies_to_the_device_are_equal(name: str) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    stream = torch.Stream(device=device)
    staged = StagedCopier(device, stream, 3)
    for _ in range(3):
        tensor = everything()[name]
        expected = tensor.clone()
        with stream:
            copy = staged.copy(tensor)
        if not tensor.is_conj():
            tensor.zero_()
        stream.synchronize()
        assert torch.equal(copy.cpu(), expected)
    staged.close()


def test_ranks_of_one_machine_share_its_cores() -> None:
    assert num_copiers(10_000) == 1
    assert 1 <= num_copiers(0) <= 8
