from __future__ import annotations

import pytest
import torch

from paceline.data.pinning import Pinner, num_copiers

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
        "empty": torch.empty(0, 4),
    }


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", everything())
def test_copies_are_equal_whatever_the_layout(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether torch's threads copy, or our own.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8 if threads == 2 else 1)
    tensor = everything()[name]
    pinner = Pinner(torch.empty_like, threads)
    copy = pinner.pin(tensor)
    pinner.close()
    assert copy.dtype is tensor.dtype
    assert torch.equal(copy, tensor)
    assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or not tensor.numel()


def test_a_failing_copy_is_an_error_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    pinner = Pinner(lambda tensor: torch.empty(5), 2)
    with pytest.raises((ValueError, RuntimeError)):
        pinner.pin(torch.zeros(ROWS))
    pinner.close()


def test_ranks_of_one_machine_share_its_cores() -> None:
    assert num_copiers(10_000) == 1
    assert 1 <= num_copiers(0) <= 8
