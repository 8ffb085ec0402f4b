"""Flags of Accelerate, past and present, and of torchrun that `paceline launch` has not: what stands for each."""

from __future__ import annotations

__all__ = ["instead_of"]

_NO_TPU = "TPUs are not carried out in this release; leave it out"
_NO_SAGEMAKER = "SageMaker is not carried out in this release; leave it out"
_MEETING = "--main_process_ip and --main_process_port say where machines meet"
_INSTEAD = {
    "role": "all ranks have the same role; leave it out",
    "no_tpu_cluster": _NO_TPU,
    "aws_access_key_id": _NO_SAGEMAKER,
    "aws_secret_access_key": _NO_SAGEMAKER,
    "fp16": "write --mixed_precision fp16",
    "bf16": "write --mixed_precision bf16",
    "ipex": "torch has what was in IPEX; leave it out",
    "use_xpu": "devices are found without it; leave it out",
    "nproc_per_node": "--num_processes is the number of processes of all machines together",
    "nnodes": "write --num_machines",
    "node_rank": "write --machine_rank",
    "master_addr": _MEETING,
    "master_port": _MEETING,
    "rdzv_endpoint": _MEETING,
    "rdzv_id": "each launch has a name of its own; leave it out",
    "standalone": "one machine needs no rendezvous of its own; leave it out",
    "redirects": "--log_dir writes both streams of every rank into files",
}


def instead_of(flag: str) -> str | None:
    """Say what stands for a flag of another launcher, as typed; None if it is none of theirs."""
    return _INSTEAD.get(flag.lstrip("-").replace("-", "_"))
