"""Pipelines for inference over accelerators: stages pass activations through NCCL."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from paceline.placement import pipeline_model
from tests.ranks.test_pipeline import seeded
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.gpus2


def outputs_of(rows: list[int], gather_output: bool) -> list[str]:
    """How the output of each batch compares to the whole model's."""
    model, ids = seeded()
    model, ids = model.cuda(), ids.cuda()
    with torch.no_grad():
        expected = [model(ids[:count]) for count in rows]
    pipeline = pipeline_model(model, (ids[:2],), gather_output=gather_output)
    found = []
    for count, whole in zip(rows, expected, strict=True):
        output = pipeline(ids[:count]) if dist.get_rank() == 0 else pipeline()
        if output is not None:
            assert all(part.is_cuda for part in output)
            torch.testing.assert_close(output, whole, rtol=1e-5, atol=1e-5)
        found.append("none" if output is None else "equal")
    return found


@pytest.mark.parametrize("gather_output", [False, True])
def test_a_pipeline_gives_the_whole_models_output(gather_output: bool) -> None:
    first, last = run_on_ranks(2, outputs_of, [4, 3, 11], gather_output, device="cuda")
    assert first == ["equal" if gather_output else "none"] * 3
    assert last == ["equal"] * 3
