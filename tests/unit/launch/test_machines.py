"""Starting several machines by DeepSpeed's launcher: the commands that it makes, and what is refused."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

import pytest

from paceline.config import resolve
from paceline.errors import ConfigError, UsageError
from paceline.launch import Command, launch_deepspeed, plan_deepspeed
from paceline.launch.worker import unpack
from tests.support.engines import needs_deepspeed

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.config import Resolved
    from paceline.launch.schedulers.deepspeed import DeepSpeedPlan

pytestmark = needs_deepspeed
ENV = {"PATH": os.environ["PATH"], "NCCL_DEBUG": "INFO", "HOME": "/nowhere"}
ARGUMENTS = ("--name", "two words", "$HOME", '{"a": 1}')


@pytest.fixture(autouse=True)
def _a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    (tmp_path / "hosts").write_text("# ours\nworker-1 slots=2\nworker-2 slots=2\nworker-3 slots=4\n")


def resolved(launcher: str = "pdsh", **flags: object) -> Resolved:
    given = {
        "use_deepspeed": True,
        "cpu": True,
        "num_machines": 2,
        "deepspeed_multinode_launcher": launcher,
        "deepspeed_hostfile": "hosts",
        "deepspeed_exclusion_filter": "worker-3",
    }
    return resolve(flags={k: v for k, v in (given | flags).items() if v is not None}, env={}, file=None)


def planned(launcher: str = "pdsh", **flags: object) -> DeepSpeedPlan:
    return plan_deepspeed(resolved(launcher, **flags), Command("train.py", ARGUMENTS), ENV)


def packed(plan: DeepSpeedPlan) -> tuple[dict[str, str], list[str]]:
    return unpack(plan.command[-1])


MPI: dict[str, Any] = {"deepspeed_exclusion_filter": None, "num_machines": 2}


@pytest.mark.parametrize("launcher", ["pdsh", "slurm", "nossh"])
def test_configuration_and_arguments_travel_in_one_word(launcher: str, tmp_path: Path) -> None:
    plan = planned(launcher, main_process_ip="10.0.0.7", main_process_port=1234)
    assert plan.hosts == {"worker-1": 2, "worker-2": 2}
    assert plan.command[-2] == "--packed"
    assert shlex.quote(plan.command[-1]) == plan.command[-1], "no shell reads anything into it"
    variables, arguments = packed(plan)
    assert arguments == [str(tmp_path / "train.py"), *ARGUMENTS]
    assert variables["DS_ACCELERATOR"] == "cpu"
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.7", "1234")
    assert '"strategy":"deepspeed"' in variables["PACELINE_CONFIG"]
    text = str(plan)
    assert "4 processes on 2 machines" in text
    assert shlex.join(plan.command) in text
    assert "'two words'" in text


def test_pdsh_reaches_every_machine() -> None:
    plan = planned("pdsh")
    assert plan.command[:6] == ("pdsh", "-S", "-f", "1024", "-w", "worker-1,worker-2")
    text = " ".join(plan.command)
    assert "-m deepspeed.launcher.launch --world_info=" in text
    assert "--node_rank=%n --master_addr=worker-1 --master_port=29500" in text
    assert "export PYTHONPATH=" in text
    assert plan.variables["PDSH_RCMD_TYPE"] == "ssh"
    assert plan.stop[0] == "pdsh"
    assert "pkill" in " ".join(plan.stop)


def test_slurm_names_the_machines_that_the_filter_left() -> None:
    text = " ".join(planned("slurm").command)
    assert text.startswith("srun -n 4 --nodelist worker-1,worker-2 --nodes 2 --export=ALL,")


def test_without_ssh_each_machine_starts_its_own() -> None:
    text = " ".join(planned("nossh", machine_rank=1).command)
    assert "deepspeed.launcher.launch" in text
    assert "--node_rank=1" in text


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("openmpi", ["mpirun -n 4 -hostfile hosts", "-x PYTHONPATH="]),
        ("mpich", ["mpirun -n 4 -ppn 2", "-hosts worker-1,worker-2", "-genv MASTER_ADDR worker-1"]),
        ("mvapich", ["mpirun -np 4 -ppn 2", "-env MV2_SUPPORT_DL=1"]),
    ],
)
def test_the_kinds_of_mpi(launcher: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("worker-1 slots=2\nworker-2 slots=2\n")
    plan = planned(launcher, **MPI)
    text = " ".join(plan.command)
    assert all(part in text for part in words), text
    assert packed(plan)[1][1:] == list(ARGUMENTS)


def test_a_launcher_that_cannot_filter_says_so() -> None:
    with pytest.raises(ConfigError) as error:
        planned("openmpi")
    assert "openmpi backend does not support worker include/exclusion" in str(error.value)
    assert "--deepspeed_multinode_launcher" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"num_machines": 3}, "num_machines: 3 contradicts it"),
        ({"num_processes": 8}, "num_processes: 8 contradicts it"),
        ({"machine_rank": 2}, "machine_rank: 2 is out of range"),
        ({"deepspeed_hostfile": "nowhere"}, "there is no host file nowhere"),
        ({"deepspeed_exclusion_filter": "worker-9"}, "'worker-9' does not fit hosts"),
        ({"deepspeed_inclusion_filter": "worker-1"}, "does not fit hosts"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(flags: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        planned("nossh", **flags)
    assert said in str(error.value)


def test_a_bad_host_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("worker-1 slots=two\n")
    with pytest.raises(ConfigError, match="a bad entry: worker-1 slots=two"):
        planned()


def test_a_missing_program_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no program 'pdsh' in PATH"):
        launch_deepspeed(resolved(), Command("train.py"), env={"PATH": str(tmp_path)})


def test_when_deepspeed_starts_the_machines() -> None:
    assert resolved().config.spans_machines
    assert resolved(num_machines=None).config.spans_machines
    assert not resolve(flags={"use_deepspeed": True}, env={}, file=None).config.spans_machines
    assert not resolved("standard", deepspeed_hostfile=None, deepspeed_exclusion_filter=None).config.spans_machines
    with pytest.raises(ConfigError, match="hosts is not used; deepspeed_multinode_launcher is standard") as error:
        resolved("standard")
    assert "worker-3 is not used" in str(error.value)
    with pytest.raises(ConfigError, match="worker-3 is not used; there is one machine"):
        resolved(num_machines=None, deepspeed_hostfile=None)
