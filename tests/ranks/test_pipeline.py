"""Pipelines for inference on real ranks: the whole model's output, for any number of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paceline.collectives import TorchGroup
from paceline.errors import PlacementError
from paceline.placement import pipeline_model
from paceline.placement.pipeline import balanced_split_points
from tests.support.ranks import run_on_ranks


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + y


class Stack(nn.Module):
    def __init__(self, blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 20)

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return scale * self.head(x), x


def seeded(blocks: int = 4) -> tuple[Stack, torch.Tensor]:
    torch.manual_seed(0)
    return Stack(blocks).eval(), torch.randint(0, 20, (11, 5))


def outputs_of(rows: list[int], kwargs: dict[str, Any]) -> list[str]:
    """Where the output of each batch is, and how it compares to the whole model's."""
    model, ids = seeded()
    whole = Stack().eval()
    whole.load_state_dict(model.state_dict())
    pipeline = pipeline_model(model, (ids[:2],), **kwargs)
    found = []
    for count in rows:
        output = pipeline(ids[:count]) if TorchGroup().rank == 0 else pipeline()
        if output is None:
            found.append("none")
            continue
        with torch.no_grad():
            expected = whole(ids[:count])
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
        found.append("equal")
    return found


def test_the_last_rank_has_the_whole_models_output_for_any_number_of_rows() -> None:
    # Two chunks of two rows at once: less than that, more, and more than twice.
    assert run_on_ranks(2, outputs_of, [4, 3, 1, 7, 11], {}) == [["none"] * 5, ["equal"] * 5]


def test_every_rank_has_the_output_where_it_is_gathered() -> None:
    options = {"gather_output": True, "split_points": ["blocks.1", "blocks.3"], "chunks": 4}
    assert run_on_ranks(3, outputs_of, [8, 5], options) == [["equal"] * 2] * 3


def refusals() -> list[str]:
    model, ids = seeded()
    pipeline = pipeline_model(model, (ids[:2],), {"scale": 2.0})
    texts = []
    for args, kwargs in [((ids[:, :3],), {"scale": 2.0}), ((ids,), {"scale": 3.0}), ((ids,), {}), ((), {"scale": 2.0})]:
        is_first = TorchGroup().rank == 0
        with pytest.raises(PlacementError) as caught:
            pipeline(*args, **kwargs) if is_first else pipeline()
        texts.append(str(caught.value))
    return texts


def test_inputs_of_another_form_are_refused_on_every_rank() -> None:
    first, second = run_on_ranks(2, refusals)
    assert first == second
    length, constant, missing, nothing = first
    assert "[rows, 3]" in length
    assert "[rows, 5]" in length
    assert "3.0 for scale; the example has 2.0" in constant
    assert "no input for scale" in missing
    assert "no input for argument 0" in nothing


def wrong_points() -> list[str]:
    texts = []
    for points in (["blocks.1", "blocks.2"], ["block.1"]):
        model, ids = seeded()
        with pytest.raises(PlacementError) as caught:
            pipeline_model(model, (ids[:2],), split_points=points)
        texts.append(str(caught.value))
    return texts


def test_split_points_that_do_not_fit_are_named() -> None:
    for several, unknown in run_on_ranks(2, wrong_points):
        assert "2 names" in several
        assert "did you mean blocks.1" in unknown


def test_stages_have_about_the_same_bytes_and_blocks_stay_whole() -> None:
    model, _ = seeded(blocks=6)
    assert balanced_split_points(model, 2) == ["blocks.3"]
    assert balanced_split_points(model, 3) == ["blocks.2", "blocks.4"]
    # Fewer blocks than stages: what is inside them begins stages.
    model, _ = seeded(blocks=1)
    assert balanced_split_points(model, 2) == ["blocks.0.down"]
    assert balanced_split_points(model, 2, ["Block"]) == ["head"]
    with pytest.raises(PlacementError, match="3 modules"):
        balanced_split_points(model, 4, ["Block"])
