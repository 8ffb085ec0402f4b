from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from paceline.config import resolve
from paceline.errors import ConfigError, UsageError, WorldError
from paceline.launch.clusters import Cluster, check_against, detect_cluster
from paceline.launch.command import Command
from paceline.launch.schedulers.sbatch import Allocation, batch_options, batch_script, reject_partial_allocation
from paceline.launch.schedulers.task import plan_task

# As printed by `srun -N2 --ntasks-per-node=1 env` of Slurm 22.05, second task.
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
# As printed by a batch script of the same job, before any srun.
BATCH = {
    **{name: value for name, value in SLURM.items() if "STEP" not in name},
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
}
FOUR_ON_TWO = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "2"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
# What the training operator 1.9 sets in the first worker of a PyTorchJob with a master and three workers of 8 devices.
PYTORCHJOB = {
    **POD,
    "MASTER_ADDR": "train-master-0",
    "MASTER_PORT": "23456",
    "PET_MASTER_ADDR": "train-master-0",
    "PET_MASTER_PORT": "23456",
    "PET_NNODES": "4",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "8",
    "RANK": "1",
    "WORLD_SIZE": "32",
}
TRAINJOB = {
    **POD,
    "PET_MASTER_ADDR": "train-node-0-0.train",
    "PET_MASTER_PORT": "29400",
    "PET_NNODES": "2",
    "PET_NODE_RANK": "0",
    "PET_NPROC_PER_NODE": "auto",
}
ELASTIC = {
    **POD,
    "PET_MAX_RESTARTS": "3",
    "PET_NNODES": "2:4",
    "PET_NPROC_PER_NODE": "2",
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_ENDPOINT": "train-worker-0:23456",
    "PET_RDZV_ID": "train",
}


def said(cluster: Cluster | None) -> dict[str, object]:
    assert cluster is not None
    return {key: found.value for key, found in cluster.values.items()}


def sources(cluster: Cluster | None) -> dict[str, str]:
    assert cluster is not None
    return {key: found.where for key, found in cluster.values.items()}


@pytest.mark.parametrize(
    "env",
    [
        {},
        BATCH,
        {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"MASTER_ADDR": "here", "WORLD_SIZE": "2", "RANK": "0"},  # left over in a shell, and not in a pod
        {**SLURM, "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},  # a rank that torchrun started
        {**TRAINJOB, "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
    ],
)
def test_outside_of_a_job_and_in_a_rank_that_was_started_nothing_is_detected(env: dict[str, str]) -> None:
    assert detect_cluster(env) is None


def test_one_task_on_each_machine_is_a_launcher() -> None:
    cluster = detect_cluster(SLURM)
    assert cluster is not None
    assert cluster.task == "machine"
    port = 12000 + 7
    expected = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "node1", "main_process_port": port}
    assert said(cluster) == expected
    assert sources(cluster)["machine_rank"] == "Slurm (SLURM_NODEID)"
    named = detect_cluster({**SLURM, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "4000"})
    assert (said(named)["main_process_ip"], said(named)["main_process_port"]) == ("10.1.1.1", 4000)
    assert sources(named)["main_process_ip"] == "MASTER_ADDR"


def test_several_tasks_on_a_machine_are_ranks() -> None:
    cluster = detect_cluster({**SLURM, **FOUR_ON_TWO})
    assert cluster is not None
    assert cluster.world is not None
    assert (cluster.task, cluster.world.rank, cluster.world.local_size) == ("rank", 2, 2)
    assert said(cluster)["num_processes"] == 4
    assert sources(cluster)["num_processes"] == "Slurm (SLURM_STEP_NUM_TASKS)"


def test_tasks_of_mpi_are_ranks() -> None:
    cluster = detect_cluster(OPENMPI)
    assert cluster is not None
    assert (cluster.scheduler, cluster.task, said(cluster)["num_processes"]) == ("Open MPI", "rank", 2)
    with pytest.raises(WorldError, match=r"-x MASTER_ADDR=<host>"):
        detect_cluster({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "4"})


def test_pods_of_a_pytorchjob() -> None:
    cluster = detect_cluster(PYTORCHJOB)
    address = {"main_process_ip": "train-master-0", "main_process_port": 23456}
    assert said(cluster) == {"num_machines": 4, "machine_rank": 1, "num_processes": 32, **address}
    assert sources(cluster)["machine_rank"] == "Kubernetes (PET_NODE_RANK)"
    old = {name: value for name, value in PYTORCHJOB.items() if not name.startswith("PET_")}
    cluster = detect_cluster({**old, "WORLD_SIZE": "4"})
    assert said(cluster) == {"num_machines": 4, "machine_rank": 1, **address}
    assert sources(cluster)["num_machines"] == "Kubernetes (WORLD_SIZE)"


def test_pods_of_a_trainjob() -> None:
    address = {"main_process_ip": "train-node-0-0.train", "main_process_port": 29400}
    assert said(detect_cluster(TRAINJOB)) == {"num_machines": 2, "machine_rank": 0, **address}
    assert said(detect_cluster({**TRAINJOB, "PET_NNODES": "1", "PET_NPROC_PER_NODE": "4"})) == {"num_processes": 4}


def test_pods_that_come_and_go() -> None:
    assert said(detect_cluster(ELASTIC)) == {
        "num_machines": "2:4",
        "num_processes": 8,
        "main_process_ip": "train-worker-0",
        "main_process_port": 23456,
        "rdzv_backend": "c10d",
        "max_restarts": 3,
    }


@pytest.mark.parametrize(
    "wrong", [{"PET_NNODES": "two"}, {"PET_NODE_RANK": "x"}, {"PET_NPROC_PER_NODE": "all"}, {"PET_MASTER_PORT": "a"}]
)
def test_a_variable_that_is_no_number_is_named(wrong: dict[str, str]) -> None:
    with pytest.raises(WorldError, match=f"{next(iter(wrong))} is"):
        detect_cluster({**TRAINJOB, **wrong})


def test_what_was_asked_must_be_what_the_job_has() -> None:
    cluster = detect_cluster({**SLURM, **FOUR_ON_TWO, "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"})
    assert cluster is not None
    resolved = resolve(flags={"num_processes": "2", "max_restarts": "1"}, env={}, file=None)
    with pytest.raises(ConfigError) as caught:
        check_against(cluster, resolved)
    assert "--num_processes: 2 contradicts 4 from Slurm (SLURM_STEP_NUM_TASKS)" in str(caught.value)
    assert "--max_restarts: 1 would be ignored" in str(caught.value)
    check_against(cluster, resolve(flags={"num_processes": "4"}, env={}, file=None))


def test_a_task_becomes_the_rank(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    cluster = detect_cluster(OPENMPI)
    assert cluster is not None
    resolved = resolve(flags={"cpu": "true"}, env={}, file=None, detected=cluster.values)
    planned = plan_task(resolved, Command(str(script), ("--lr", "1")), {**OPENMPI, "OMP_NUM_THREADS": "3"}, cluster)
    assert planned.command[1:] == ("-m", "paceline.launch.worker", str(script), "--lr", "1")
    assert "OMP_NUM_THREADS" not in planned.variables
    assert planned.variables["MASTER_ADDR"] == "127.0.0.1"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(planned.variables)
    assert "rank 1 of 2: Open MPI started a task for each" in planned.as_text()


def test_the_batch_script_can_be_read_and_run() -> None:
    asked = Allocation(nodes=2, gpus_per_node=8, time="24:00:00", options={"account": "abc", "signal": "USR1@300"})
    options = batch_options(asked, "train", Path("/runs/a"))
    text = batch_script(options, ["python", "train.py", "two words"], Path("/my code"))
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=24:00:00",
        "#SBATCH --account=abc",
        "#SBATCH --signal=USR1@300",
        "#SBATCH --requeue",
        "#SBATCH --output=/runs/a/%j.log",
        "cd '/my code' || exit",
        "    python train.py 'two words'",
    ):
        assert line in lines
    assert "partition" not in text


def test_several_machines_without_srun_are_refused() -> None:
    with pytest.raises(UsageError, match=r"srun --ntasks-per-node=1 paceline launch"):
        reject_partial_allocation(BATCH)
    reject_partial_allocation({**BATCH, "SLURM_JOB_NUM_NODES": "1"})
    reject_partial_allocation({})


@pytest.mark.parametrize("name", ["pytorchjob", "trainjob"])
def test_the_manifests_name_our_command_and_no_numbers_that_the_operator_sets(name: str) -> None:
    path = Path(__file__).parents[3] / "examples" / "kubernetes" / f"{name}.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    spec = document["spec"]
    if name == "pytorchjob":
        assert (document["apiVersion"], document["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
        commands = [r["template"]["spec"]["containers"][0]["command"] for r in spec["pytorchReplicaSpecs"].values()]
        assert set(spec["pytorchReplicaSpecs"]) == {"Master", "Worker"}
        assert all(
            r["template"]["spec"]["containers"][0]["name"] == "pytorch" for r in spec["pytorchReplicaSpecs"].values()
        )
    else:
        assert (document["apiVersion"], document["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
        assert spec["runtimeRef"]["name"] == "torch-distributed"
        assert spec["trainer"]["numNodes"] == 2
        commands = [spec["trainer"]["command"]]
    for command in commands:
        assert command == ["paceline", "launch", "--mixed_precision", "bf16", "train.py"]
