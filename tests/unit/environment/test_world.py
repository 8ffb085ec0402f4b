from __future__ import annotations

import subprocess
import sys

import pytest

from paceline.environment.world import World, first_host
from paceline.errors import WorldError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "4242",
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "3",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[08-09,11]",
    "SLURM_JOB_NODELIST": "other[1-9]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MV2 = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


def test_no_variables_mean_one_process() -> None:
    world = World.read({"PATH": "/bin"})
    assert world == World()
    assert (world.is_main, world.is_local_main, world.is_last, world.source) == (True, True, True, "none")


def test_torchrun() -> None:
    assert World.read(TORCHRUN) == World(
        rank=5,
        size=8,
        local_rank=1,
        local_size=4,
        node_rank=1,
        num_nodes=2,
        source="torchrun",
        main_address="node-a",
        main_port=4242,
        run_id="job",
        restart_count=2,
        max_restarts=3,
        use_agent_store=True,
    )


def test_ranks_set_by_hand_take_defaults() -> None:
    world = World.read({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    assert (world.main_address, world.main_port, world.local_size) == ("127.0.0.1", 29500, 2)
    assert (world.node_rank, world.num_nodes, world.is_main, world.is_last) == (0, 1, False, True)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_all_or_none_names_the_missing_variable(missing: str) -> None:
    with pytest.raises(WorldError, match=f"but {missing} is not"):
        World.read(without(TORCHRUN, missing))


def test_all_missing_variables_are_named() -> None:
    with pytest.raises(WorldError, match=r"WORLD_SIZE=2 is set but RANK and LOCAL_RANK are not"):
        World.read({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"RANK": "8"}, "rank 8 of 8"),
        ({"RANK": "-1"}, "rank -1 of 8"),
        ({"WORLD_SIZE": "0"}, "rank 5 of 0"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "9 processes on this machine of 8"),
        ({"GROUP_RANK": "2"}, "node rank 2 of 2"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x'"),
    ],
)
def test_contradictions_are_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(WorldError, match=named):
        World.read({**TORCHRUN, **change})


def test_several_machines_need_an_address() -> None:
    with pytest.raises(WorldError, match="MASTER_ADDR is not set"):
        World.read(without(TORCHRUN, "MASTER_ADDR"))


def test_slurm() -> None:
    world = World.read(SLURM)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 5, 1, 2)
    assert (world.node_rank, world.num_nodes, world.source) == (1, 3, "slurm")
    assert (world.main_address, world.run_id) == ("node08", "1234567.0")


def test_slurm_ports_differ_from_job_to_job_and_step_to_step() -> None:
    jobs = [{**SLURM, "SLURM_JOB_ID": str(1000 + n), "SLURM_STEP_ID": str(s)} for n in range(20) for s in range(3)]
    ports = [World.read(job).main_port for job in jobs]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32768 for port in ports)


def test_slurm_takes_address_and_port_that_were_set() -> None:
    world = World.read({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "7"})
    assert (world.main_address, world.main_port) == ("head", 7)


@pytest.mark.parametrize(
    "env",
    [
        without(SLURM, "SLURM_STEP_ID"),  # a batch script
        without(SLURM, "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID"),  # a shell in an allocation
        {**SLURM, "SLURM_NTASKS": "1"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # `srun --pty bash` in an allocation of five
    ],
)
def test_slurm_outside_a_step_of_several_tasks_is_one_process(env: dict[str, str]) -> None:
    assert World.read(env) == World()


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID is not"),
        (without(SLURM, "SLURM_PROCID"), "SLURM_PROCID is not"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "2(y)"}, "SLURM_TASKS_PER_NODE is"),
        ({**SLURM, "SLURM_PROCID": "5"}, "rank 5 of 5"),
    ],
)
def test_slurm_errors(env: dict[str, str], named: str) -> None:
    with pytest.raises(WorldError, match=named):
        World.read(env)


def test_torchrun_under_slurm_wins() -> None:
    assert World.read({**SLURM, **TORCHRUN}).source == "torchrun"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node[01-04,07]", "node01"),
        ("node7", "node7"),
        ("a[3,5],b[1-2]", "a3"),
        ("first,second", "first"),
        ("rack[1-2]node[003-004]-ib", "rack1node003-ib"),
        ("gpu-[10-12]", "gpu-10"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(("env", "source"), [(OPENMPI, "openmpi"), (PMI, "pmi"), (MV2, "pmi")])
def test_mpi_on_one_machine(env: dict[str, str], source: str) -> None:
    world = World.read(env)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (1, 2, 1, 2)
    assert (world.source, world.main_address, world.num_nodes) == (source, "127.0.0.1", 1)


def test_mpi_on_several_machines_needs_an_address() -> None:
    env = {**OPENMPI, "OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(WorldError, match="-x MASTER_ADDR"):
        World.read(env)
    assert World.read({**env, "MASTER_ADDR": "head"}).num_nodes == 2
    assert World.read({**env, "SLURM_JOB_NODELIST": "node[3-4]"}).main_address == "node3"


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        (OPENMPI, "OMPI_COMM_WORLD_RANK"),
        (OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK"),
        (PMI, "PMI_RANK"),
        (PMI, "MPI_LOCALRANKID"),
        (MV2, "MV2_COMM_WORLD_LOCAL_SIZE"),
    ],
)
def test_mpi_names_the_missing_variable(env: dict[str, str], missing: str) -> None:
    with pytest.raises(WorldError, match=f"{missing} is not"):
        World.read(without(env, missing))


def test_jobs_of_intel_mpi_have_ports_of_their_own() -> None:
    one, again, other = (
        World.read({**PMI, "I_MPI_HYDRA_UUID": job}) for job in ("9374-0f3a", "9374-0f3a", "9374-0f3b")
    )
    assert one.main_port == again.main_port != other.main_port
    assert one.run_id == "9374-0f3a"


def test_srun_with_pmi_reads_slurm() -> None:
    assert World.read({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "5"}).source == "slurm"


def test_world_does_not_import_torch() -> None:
    code = "import sys, paceline.environment.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
