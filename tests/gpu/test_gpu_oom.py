"""A device that runs out of memory: whose it is, and what would help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

# 64 MiB of parameters; activations of 128 MiB a sample and layer, until the device is full.
SOURCE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from paceline import Accelerator

torch.cuda.set_per_process_memory_fraction(min(1.0, 8 * 2**30 / torch.cuda.get_device_properties(0).total_memory))
accelerator = Accelerator()
model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.Tanh()) for _ in range(16)))
loader = DataLoader(TensorDataset(torch.randn(64, 32768, 1024)), batch_size=8)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
accelerator.backward(model(torch.randn(8, 1024, device=accelerator.device)).sum())
optimizer.step()
for (inputs,) in loader:
    accelerator.backward(model(inputs).sum())  # too much
"""


def test_a_device_that_runs_out_of_memory(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SOURCE)
    command = [sys.executable, "-m", "paceline", "launch", "--num_processes", "1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=dict(os.environ), check=False)
    error = done.stderr
    assert done.returncode == 1, error
    assert "OutOfMemoryError" in error
    assert re.search(r"memory of rank 0 on .*\(cuda:0, .*\): \d", error), error
    assert re.search(r"parameters 64\.\d+ MiB, gradients 64\.\d+ MiB, optimizer state 128\.\d+ MiB, activations", error)
    assert re.search(r"^  1\.00 GiB  an activation or a buffer", error, re.MULTILINE)
    assert "batches of 4 with gradient_accumulation_steps=2" in error
