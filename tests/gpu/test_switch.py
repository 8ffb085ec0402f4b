"""The configuration file of the first day on accelerators: Accelerate, and paceline in its place, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.founding import launch_founding
from tests.unit.config.files import FOUNDING

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.timeout(900)]
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

STEPS = 16


def _compare(folder: Path, ranks: int, capsys: pytest.CaptureFixture[str], *, precision: str) -> None:
    text = FOUNDING.replace("num_processes: 4", f"num_processes: {ranks}")
    (folder / "run.yaml").write_text(text.replace("mixed_precision: bf16", f"mixed_precision: '{precision}'"))
    found: dict[str, dict[str, Any]] = {}
    for way in ("accelerate", "switched", "unswitched"):
        found[way] = launch_founding(way, folder, "--config_file", "run.yaml", size="large", steps=STEPS)
    with capsys.disabled():
        print(f"\n{precision}, {ranks} device{'s' * (ranks > 1)} of type {torch.cuda.get_device_name()}")
        for way, run in found.items():
            print(
                f"{way:12} {run['type']:24} {1000 * run['seconds']:8.1f} ms/step {run['peak_mib']:9.0f} MiB "
                f"first loss {run['losses'][0]:.5f} last loss {run['losses'][-1]:.5f} "
                f"first norm {run['norms'][0]:.4f} last norm {run['norms'][-1]:.4f}"
            )
    real, ours, through_variables = found.values()
    assert [run["library"] for run in found.values()] == ["accelerate", "paceline", "accelerate"]
    assert {run["processes"] for run in found.values()} == {ranks}
    # In bf16 two runs of the same program on a GPU drift apart: seen after 16 steps, 3.86 and 4.03.
    compared, tolerance = {"no": (STEPS, 1e-4), "bf16": (3, 2e-2)}[precision]
    for run in (through_variables, ours):
        assert run["losses"][:compared] == pytest.approx(real["losses"][:compared], rel=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str) -> None:
    _compare(tmp_path, 1, capsys, precision=precision)


@pytest.mark.gpus2
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_two_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str) -> None:
    _compare(tmp_path, 2, capsys, precision=precision)
