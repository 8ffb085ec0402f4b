"""Compiled blocks under every strategy: the same training as without, by the compiler that users get."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_on_ranks
from tests.support.trainer import farthest, run

FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Block"]}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"single": (1, {}), "ddp": (2, {}), "fsdp": (2, FSDP)}
WHOLE = {"global_batch_size": 8, "max_steps": 12, "eval_strategy": "steps", "eval_steps": 5}


def train(changes: dict[str, Any], folder: str) -> tuple[list[dict[str, Any]], list[bool], int]:
    """The log, whether each block was compiled, and how many graphs inductor made or took from its store."""
    counters: Any = torch._dynamo.utils.counters
    counters.clear()
    log, trainer = run({**WHOLE, **changes}, folder)
    made = counters["inductor"]
    blocks = [block._compiled_call_impl is not None for block in trainer.model.blocks]
    assert trainer.model._compiled_call_impl is None, "only what repeats"
    return log, blocks, made["fxgraph_cache_hit"] + made["fxgraph_cache_miss"] + made["fxgraph_cache_bypass"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for the processor with g++")
@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": True}], ids=["", "recomputed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inductor_changes_nothing(layout: str, more: dict[str, Any], tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    plain, blocks, graphs = run_on_ranks(ranks, train, changes, str(tmp_path / "plain"))[0]
    assert (blocks, graphs) == ([False, False], 0)
    compiled = {**changes, **more, "torch_compile": True}
    log, blocks, graphs = run_on_ranks(ranks, train, compiled, str(tmp_path / "compiled"), timeout=800)[0]
    assert (blocks, graphs >= 2) == ([True, True], True), "forward and backward at least"
    assert farthest(plain, log) < 1e-5
