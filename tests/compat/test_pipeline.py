"""`prepare_pippy`: programs that divide a model over processes for inference, beside the real package."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from paceline.compat.accelerate import PartialState, prepare_pippy
from tests.compat.test_accelerator import on_ranks


def stack() -> Any:
    torch.manual_seed(1)
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
    return nn.Sequential(nn.Embedding(10, 6), *layers, nn.Linear(6, 10)).eval()


def pipelined(gather_output: bool, **options: Any) -> tuple[list[str], bool, list[bool | None]]:
    state = PartialState(cpu=True)
    whole, model = stack(), stack()
    ids = torch.arange(24).reshape(6, 4) % 10
    model = prepare_pippy(model, example_args=(ids[:2],), gather_output=gather_output, **options)
    same: list[bool | None] = []
    # Only the first process reads the inputs.
    for rows in (4, 3, 6):
        output = model(ids[:rows]) if state.is_main_process else model()
        same.append(None if output is None else torch.allclose(output, whole(ids[:rows]), rtol=0, atol=1e-6))
    return model.hf_split_points, model.pippy_stage is None, same


def test_the_last_process_has_the_output() -> None:
    first, last = on_ranks(2, pipelined, False)
    assert first == (["3"], False, [None] * 3)
    assert last[2] == [True] * 3


def test_every_process_has_the_output_where_it_is_gathered() -> None:
    for points, _, same in on_ranks(
        2,
        pipelined,
        True,
    ):
        assert points == ["3"]
        assert same == [True] * 3


def test_one_process_runs_the_model_itself() -> None:
    assert pipelined(False) == ([], True, [True] * 3)
