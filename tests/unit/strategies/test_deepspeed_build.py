"""What is said before DeepSpeed compiles an operation of its own."""

from __future__ import annotations

import pytest
import torch

from paceline.errors import PrepareError
from paceline.strategies.deepspeed_build import check_disk


def test_an_architecture_that_deepspeed_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    with pytest.raises(PrepareError, match=r"TORCH_CUDA_ARCH_LIST='8\.0;9\.0' for this run"):
        check_disk({"zero_optimization": {"offload_param": {"device": "nvme"}}})
