"""A run that has finished its work ends with 0, whoever started it, and whatever threads of torch still do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.forked import ROOT, run_pairs

SCRIPT = Path(__file__).with_name("end_script.py")
CODES = {
    "waited for": 0,
    "not waited for": 0,
    "groups of its own": 0,
    "sys.exit(3)": 3,
    "words": 1,
    "an exception": 1,
}
STRATEGIES = ("ddp", "fsdp")
CASES = [("ddp", way) for way in CODES] + [("fsdp", "waited for"), ("fsdp", "an exception")]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at threads through /proc")


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[tuple[int, str]]]:
    """What each rank of each case ended with."""
    found = run_pairs(tmp_path_factory.mktemp("ends"), SCRIPT, [list(case) for case in CASES], timeout=800)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize(("strategy", "way"), CASES)
def test_the_exit_code_is_the_scripts(
    strategy: str, way: str, ends: dict[tuple[str, str], list[tuple[int, str]]]
) -> None:
    for code, output in ends[strategy, way]:
        assert code == CODES[way], output
        for line in ("done", "an early exit handler ran", "a late exit handler ran"):
            assert line in output.splitlines(), output
        assert "terminate called" not in output
        assert "that it did not wait for is pending" not in output


def launched(*launcher: str, way: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(SCRIPT), "ddp", way],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


@pytest.mark.slow
def test_under_torchrun() -> None:
    done = launched("torch.distributed.run", "--nproc-per-node", "2", "--standalone", way="waited for")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


@pytest.mark.slow
def test_words_given_to_exit_are_the_end_of_a_launched_rank_too() -> None:
    done = launched("paceline", "launch", "--cpu", "--num_processes", "2", way="words")
    assert done.returncode == 1, done.stderr
    assert "some words" in done.stderr
    assert "terminate called" not in done.stderr
    assert done.stdout.count("a late exit handler ran") == 2


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_ends_under_load(strategy: str, tmp_path: Path) -> None:
    """gloo's threads get the processor last."""
    found = run_pairs(tmp_path, SCRIPT, [[strategy, "at once"]] * 100, timeout=2900)
    assert [code for pair in found for code, _ in pair] == [0] * 200
