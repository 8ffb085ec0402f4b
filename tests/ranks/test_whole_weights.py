"""Optimizers that compute with whole weights, of which ZeRO gives them pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paceline.accelerator.policies import Policies, use_policies
from paceline.config import Leniency
from paceline.errors import PrepareError
from tests.support.engines import make, needs_deepspeed, slowly
from tests.support.ranks import run_on_ranks
from tests.support.warned import warnings_of

pytestmark = needs_deepspeed


class Lamb(torch.optim.SGD):
    """Steps as long as the weight itself."""


class Normed(torch.optim.Optimizer):
    """Of the script's own; nothing says what it computes with."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        """Do nothing."""


OPTIMIZERS = {"Adafactor": torch.optim.Adafactor, "Lamb": Lamb, "Normed": Normed, "NAdam": torch.optim.NAdam}


def prepared(strategy: str, name: str, lenient: bool) -> tuple[str, list[str]]:
    with use_policies(Policies(leniency=Leniency(script_wins=lenient))):
        accelerator = make(strategy)
    model: Any = nn.Linear(4, 3)
    with warnings_of() as warnings:
        try:
            accelerator.prepare(model, OPTIMIZERS[name](model.parameters()))
        except PrepareError as error:
            return str(error), warnings
    return "", [text for text in warnings if "flat pieces" in text]


@pytest.mark.parametrize("name", ["Adafactor", "Lamb"])
@pytest.mark.parametrize("strategy", ["zero2", "zero3", *slowly(["zero1"])])
def test_what_needs_whole_weights_is_refused(strategy: str, name: str) -> None:
    for said, _ in run_on_ranks(1, prepared, strategy, name, False):
        assert f"{name} was prepared under ZeRO" in said


@pytest.mark.parametrize(
    ("strategy", "name", "lenient", "count"),
    [("zero2", "Normed", False, 1), ("zero3", "Adafactor", True, 1), ("zero2", "NAdam", False, 0),
     ("zero0", "Adafactor", False, 0), ("zero0", "Normed", False, 0)],
)  # fmt: skip
def test_a_warning_names_what_may_need_them(strategy: str, name: str, lenient: bool, count: int) -> None:
    for said, warnings in run_on_ranks(1, prepared, strategy, name, lenient):
        assert said == ""
        assert len(warnings) == count
        assert all(text.startswith(f"{name} was prepared under ZeRO") for text in warnings)
