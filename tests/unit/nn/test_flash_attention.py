"""What goes to the kernels of flash-attn-4 at all, and where they cannot be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paceline import Accelerator
from paceline.errors import ConfigError
from paceline.nn.flash_attention import takes, unusable_reason


def shaped(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


WHOLE: dict[str, Any] = {"query": (2, 16, 2048, 64), "key": (2, 16, 2048, 64), "dropout_p": 0.0, "is_causal": True}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "as in a model": ({}, True),
    "grouped heads": ({"key": (2, 4, 2048, 64)}, True),
    "heads that do not divide": ({"key": (2, 3, 2048, 64)}, False),
    "dropout": ({"dropout_p": 0.1}, False),
    # torch's mask begins at the first key, the kernels' mask ends at the last one.
    "causal, with more keys": ({"key": (2, 16, 4096, 64)}, False),
    "more keys": ({"key": (2, 16, 4096, 64), "is_causal": False}, True),
    "small": ({"query": (2, 16, 512, 64), "key": (2, 16, 512, 64)}, False),
    "wide heads": ({"query": (2, 16, 2048, 256), "key": (2, 16, 2048, 256)}, False),
    "heads of an odd width": ({"query": (2, 16, 4096, 60), "key": (2, 16, 4096, 60)}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_computed_alike_and_pays(case: str) -> None:
    changes, expected = CASES[case]
    settings = {**WHOLE, **changes}
    query, key = shaped(*settings["query"]), shaped(*settings["key"])
    assert takes(query, key, key, settings["dropout_p"], is_causal=settings["is_causal"]) is expected


def test_only_16_bits() -> None:
    query = shaped(2, 16, 2048, 64, dtype=torch.float32)
    assert not takes(query, query, query, 0.0, is_causal=True)


def test_a_cpu_has_torchs_kernels_only() -> None:
    assert unusable_reason(torch.device("cpu")) == "they compute on CUDA, not on cpu"
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(2, 1))
    assert "attention_kernels: auto" not in accelerator.describe()


def test_kernels_that_were_asked_for_and_cannot_be_used() -> None:
    accelerator = Accelerator(cpu=True, attention_kernels="flash-attn-4")
    with pytest.raises(ConfigError, match=r"attention_kernels.*they compute on CUDA, not on cpu"):
        accelerator.prepare(nn.Linear(2, 1))
    # Nothing was put in use, so nothing stands in the way.
    accelerator.free_memory()
