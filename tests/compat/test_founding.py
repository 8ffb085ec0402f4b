"""The configuration file of the first day, with transformers' Trainer on two ranks of a CPU: both ways of using it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.founding import launch_founding
from tests.unit.config.files import FOUNDING

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.compat, pytest.mark.timeout(900)]
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

FULL_PRECISION = FOUNDING.replace("mixed_precision: bf16", "mixed_precision: 'no'")


def _run(way: str, folder: Path, text: str) -> dict[str, Any]:
    (folder / "run.yaml").write_text(text)
    return launch_founding(way, folder, "--config_file", "run.yaml", "--num_processes", "2")


def _reference(folder: Path, precision: str) -> dict[str, Any]:
    """Accelerate itself, which trains whole replicas on CPUs."""
    variables = {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_USE_CPU": "true"}
    return launch_founding("torchrun", folder, "--nproc-per-node", "2", variables=variables)


def test_through_the_switch_it_shards_and_gives_the_same_numbers(tmp_path: Path) -> None:
    real, ours = _reference(tmp_path, "no"), _run("switched", tmp_path, FULL_PRECISION)
    assert (ours["library"], ours["type"], ours["precision"]) == ("paceline", "DistributedType.FSDP", "no")
    assert (real["library"], real["type"]) == ("accelerate", "DistributedType.MULTI_CPU")
    assert ours["losses"] == pytest.approx(real["losses"], abs=1e-5)
    assert ours["norms"] == pytest.approx(real["norms"], rel=1e-4)


@pytest.mark.slow
def test_as_it_stands_in_bf16(tmp_path: Path) -> None:
    real = _reference(tmp_path, "bf16")
    ours, through_variables = _run("switched", tmp_path, FOUNDING), _run("unswitched", tmp_path, FOUNDING)
    assert {run["precision"] for run in (real, ours, through_variables)} == {"bf16"}
    assert [run["library"] for run in (ours, through_variables)] == ["paceline", "accelerate"]
    # The same library in the same way, from the file.
    assert through_variables["losses"] == pytest.approx(real["losses"], abs=1e-5)
    assert (
        "trains whole replicas" in through_variables["output"] or "train whole replicas" in through_variables["output"]
    )
    # Shards are computed with in bf16 outside of autocast, too.
    assert ours["losses"] == pytest.approx(real["losses"], rel=1e-3)
