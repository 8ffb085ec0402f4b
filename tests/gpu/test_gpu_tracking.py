"""Logging what is on a device: nobody waits, and what is written is what was there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from paceline import Accelerator


@pytest.mark.gpu
def test_logging_does_not_wait_for_the_device(tmp_path: Path) -> None:
    accelerator = Accelerator(log_with="jsonl", project_dir=tmp_path)
    accelerator.init_trackers("p")
    loss = torch.zeros((), device=accelerator.device)
    # What a device loads at the first use of an operation may wait for it.
    loss += 0
    accelerator.log({"loss": loss, "half": loss.bfloat16()}, step=0)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for step in range(1, 5):
        torch.cuda._sleep(500_000_000)  # type: ignore[no-untyped-call]  # some hundred milliseconds
        loss += 1
        accelerator.log({"loss": loss, "half": loss.bfloat16()}, step=step)
    queued = time.perf_counter() - begun
    torch.cuda.synchronize()
    took = time.perf_counter() - begun
    assert queued < took / 4, f"{queued:.3f} s of {took:.3f} s"
    accelerator.end_training()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["loss"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["half"] for line in lines] == [0, 1, 2, 3, 4]
