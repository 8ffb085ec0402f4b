"""The variables that Kubeflow's operators set in the pods of a PyTorchJob or a TrainJob.

Both set torchrun's PET_ variables; older operators only MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK, the last two
counting pods, not ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.config import Detected
from paceline.errors import WorldError
from paceline.launch.clusters.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read_kubernetes"]

# torchrun accepts these words instead of a number, for one rank per device.
_ONE_PER_DEVICE = ("", "auto", "gpu", "cpu", "xpu")
_OTHER_KEYS = {"rdzv_backend": "PET_RDZV_BACKEND", "rdzv_conf": "PET_RDZV_CONF"}


def read_kubernetes(env: Mapping[str, str]) -> Cluster | None:
    """Return the pod's job; None outside such a pod, and in a rank that was already started in one.

    Raises:
        WorldError: A variable is not a number, or a required one is missing.
    """
    if env.get("LOCAL_RANK"):
        return None
    scheduler = "Kubernetes" if env.get("KUBERNETES_SERVICE_HOST") else "torchrun's variables"
    if env.get("PET_NNODES"):
        values = _read_pet(env, scheduler)
    elif env.get("KUBERNETES_SERVICE_HOST") and all(env.get(n) for n in ("MASTER_ADDR", "WORLD_SIZE", "RANK")):
        values = {
            "num_machines": _number(env, "WORLD_SIZE", scheduler),
            "machine_rank": _number(env, "RANK", scheduler),
            **_address(env, scheduler, env["MASTER_ADDR"], "MASTER_ADDR", env.get("MASTER_PORT", ""), "MASTER_PORT"),
        }
    else:
        return None
    if values["num_machines"].value == 1:
        values = {key: value for key, value in values.items() if key in ("num_processes", "max_restarts")}
    return Cluster(scheduler=scheduler, task="machine", values=values)


def _read_pet(env: Mapping[str, str], scheduler: str) -> dict[str, Detected]:
    values = {"num_machines": _machines(env, scheduler)}
    if env.get("PET_NODE_RANK"):
        values["machine_rank"] = _number(env, "PET_NODE_RANK", scheduler)
    per_machine = env.get("PET_NPROC_PER_NODE", "")
    if per_machine not in _ONE_PER_DEVICE:
        ranks_per_machine = _read_number("PET_NPROC_PER_NODE", per_machine)
        max_machines = _read_number("PET_NNODES", str(values["num_machines"].value).rpartition(":")[2])
        values["num_processes"] = Detected(ranks_per_machine * max_machines, f"{scheduler} (PET_NPROC_PER_NODE)")
    host, _, port = env.get("PET_RDZV_ENDPOINT", "").rpartition(":")
    if host:
        values |= _address(env, scheduler, host, "PET_RDZV_ENDPOINT", port, "PET_RDZV_ENDPOINT")
    else:
        prefix = "PET_" if env.get("PET_MASTER_ADDR") else ""
        names = f"{prefix}MASTER_ADDR", f"{prefix}MASTER_PORT"
        values |= _address(env, scheduler, env.get(names[0], ""), names[0], env.get(names[1], ""), names[1])
    for key, name in _OTHER_KEYS.items():
        if env.get(name):
            values[key] = Detected(env[name], f"{scheduler} ({name})")
    if env.get("PET_MAX_RESTARTS"):
        values["max_restarts"] = _number(env, "PET_MAX_RESTARTS", scheduler)
    return values


def _machines(env: Mapping[str, str], scheduler: str) -> Detected:
    """Read `4`, or `2:4` for an elastic job."""
    low, _, high = env["PET_NNODES"].partition(":")
    if high and high != low:
        for part in (low, high):
            _read_number("PET_NNODES", part)
        return Detected(env["PET_NNODES"], f"{scheduler} (PET_NNODES)")
    return Detected(_read_number("PET_NNODES", low), f"{scheduler} (PET_NNODES)")


def _address(
    env: Mapping[str, str], scheduler: str, host: str, host_name: str, port: str, port_name: str
) -> dict[str, Detected]:
    values = {"main_process_ip": Detected(host or None, f"{scheduler} ({host_name})")}
    if port:
        values["main_process_port"] = Detected(_read_number(port_name, port), f"{scheduler} ({port_name})")
    return values


def _number(env: Mapping[str, str], name: str, scheduler: str) -> Detected:
    return Detected(_read_number(name, env[name]), f"{scheduler} ({name})")


def _read_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise WorldError(
            f"{name} is {text!r}", "It must be a whole number", f"Unset {name}, or let the operator of the job set it"
        )
    return int(text)
