"""Command lines and environment variables of a launch, for programs that start processes themselves.

`accelerate launch` under the switch does not use them: `paceline launch` plans its own processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from shutil import which
from typing import Any, Final

import torch

from paceline.compat.accelerate.settings.enums import DistributedType, DynamoBackend, PrecisionType
from paceline.compat.accelerate.settings.errors import InvalidValueError, unsupported
from paceline.compat.accelerate.utils.other import get_free_port, is_port_in_use
from paceline.errors import UsageError

__all__ = [
    "PrepareForLaunch",
    "env_var_path_add",
    "prepare_deepspeed_cmd_env",
    "prepare_extend_env_parallelism_config",
    "prepare_multi_gpu_env",
    "prepare_sagemager_args_inputs",
    "prepare_simple_launcher_cmd_env",
    "prepare_tpu",
    "setup_fp8_env",
]

_DEFAULT_PORT: Final = 29500
_VISIBLE: Final = {
    "xpu": "ZE_AFFINITY_MASK",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "hpu": "HABANA_VISIBLE_MODULES",
    "mlu": "MLU_VISIBLE_DEVICES",
    "sdaa": "SDAA_VISIBLE_DEVICES",
    "musa": "MUSA_VISIBLE_DEVICES",
    "neuron": "NEURON_RT_VISIBLE_CORES",
}
# Flag: variable. A flag that is None has no variable.
_FSDP: Final = {
    "fsdp_version": "FSDP_VERSION",
    "fsdp_sharding_strategy": "FSDP_SHARDING_STRATEGY",
    "fsdp_reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
    "fsdp_offload_params": "FSDP_OFFLOAD_PARAMS",
    "fsdp_min_num_params": "FSDP_MIN_NUM_PARAMS",
    "fsdp_auto_wrap_policy": "FSDP_AUTO_WRAP_POLICY",
    "fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "fsdp_backward_prefetch": "FSDP_BACKWARD_PREFETCH",
    "fsdp_state_dict_type": "FSDP_STATE_DICT_TYPE",
    "fsdp_forward_prefetch": "FSDP_FORWARD_PREFETCH",
    "fsdp_use_orig_params": "FSDP_USE_ORIG_PARAMS",
    "fsdp_cpu_ram_efficient_loading": "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "fsdp_sync_module_states": "FSDP_SYNC_MODULE_STATES",
    "fsdp_activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
    "fsdp_activation_checkpointing_offload": "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD",
    "fsdp_ignored_modules": "FSDP_IGNORED_MODULES",
}
_AS_WRITTEN: Final = frozenset(
    {
        "fsdp_sharding_strategy",
        "fsdp_auto_wrap_policy",
        "fsdp_transformer_layer_cls_to_wrap",
        "fsdp_backward_prefetch",
        "fsdp_state_dict_type",
        "fsdp_ignored_modules",
        "deepspeed_config_file",
        "deepspeed_moe_layer_cls_names",
    }
)
"""Flags whose value keeps its capital letters."""
_DEEPSPEED: Final = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    # Accelerate's launcher loses these two on the way to the workers, which read them.
    "offload_optimizer_nvme_path": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH",
    "offload_param_nvme_path": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH",
    "zero3_init_flag": "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "zero3_save_16bit_model": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "deepspeed_moe_layer_cls_names": "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
}
_PARALLELISM: Final = "PARALLELISM_CONFIG_"
_ALWAYS: Final = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "cp_backend", "sp_size", "sp_backend")
_OF_SEQUENCE: Final = ("sp_seq_length", "sp_seq_length_is_variable", "sp_attn_implementation")
_TPU_TEXT: Final = ("paceline trains on GPUs and CPUs", "Run this program with Accelerate itself, without the switch")
_CLOUD_TEXT: Final = ("paceline does not start jobs on SageMaker", "Start `paceline launch` in the job's entry point")


def prepare_simple_launcher_cmd_env(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment of a script in one process, or under mpirun.

    Args:
        args: Completed flags of `accelerate launch`.

    Raises:
        InvalidValueError: Flags contradict each other, or a precision or backend does not exist.
        UsageError: There is no mpirun.
    """
    command = list(_mpirun(args)) if args.mpirun_hostfile is not None else []
    command += _script(args)
    env = {**os.environ, **_common(args), "ACCELERATE_USE_CPU": str(bool(args.cpu or args.use_cpu))}
    if args.cpu or args.use_cpu:
        env |= {"KMP_AFFINITY": "granularity=fine,compact,1,0", "KMP_BLOCKTIME": "1"}
    return command, {**env, **_meeting_point(args)}


def _meeting_point(args: argparse.Namespace) -> dict[str, str]:
    """Where several processes meet."""
    machines = args.num_machines or 1
    if (args.num_processes or 1) <= 1 and machines <= 1:
        return {}
    if machines > 1 and (args.main_process_ip is None or args.main_process_port is None):
        raise InvalidValueError(
            f"{machines} machines, and main_process_ip is {args.main_process_ip}",
            "They meet at the address and port of the first one",
            "Give --main_process_ip and --main_process_port",
        )
    port = args.main_process_port or _DEFAULT_PORT
    return {"MASTER_ADDR": args.main_process_ip or "127.0.0.1", "MASTER_PORT": str(port)}


def prepare_multi_gpu_env(args: argparse.Namespace) -> dict[str, str]:
    """Return the environment of a run under torchrun, and set the attributes that torchrun reads.

    Args:
        args: Completed flags of `accelerate launch`; changed in place.

    Raises:
        InvalidValueError: Flags contradict each other, or a precision or backend does not exist.
        ConnectionError: The port is in use, and other machines will look for this one there.
    """
    _set_rendezvous(args)
    _reject_module_and_program(args)
    env = {**os.environ, **_common(args)}
    if args.use_fsdp:
        env |= {"ACCELERATE_USE_FSDP": "true", **_of_flags(args, _FSDP)}
    if args.use_megatron_lm:
        env["ACCELERATE_USE_MEGATRON_LM"] = "true"
        names = [name for name in vars(args) if name.startswith("megatron_lm_")]
        env |= _of_flags(args, {name: name.upper() for name in names})
    if getattr(args, "use_parallelism_config", False):
        env = prepare_extend_env_parallelism_config(args, env)
    return env


def prepare_deepspeed_cmd_env(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment of a run under DeepSpeed.

    The command line is empty where torchrun starts the processes: on one machine, and under the launcher `standard`.

    Args:
        args: Completed flags of `accelerate launch`; changed in place.

    Raises:
        InvalidValueError: Flags contradict each other, or a precision or backend does not exist.
        ConnectionError: The port is in use, and other machines will look for this one there.
    """
    is_engine = args.num_machines > 1 and (args.deepspeed_multinode_launcher or "pdsh") != "standard"
    _set_rendezvous(args)
    _reject_module_and_program(args)
    fields = str(getattr(args, "deepspeed_fields_from_accelerate_config", "")).lower()
    env = {**os.environ, **_common(args), "PYTHONPATH": env_var_path_add("PYTHONPATH", os.path.abspath("."))}  # noqa: PTH100
    env |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_CONFIG_DS_FIELDS": fields, **_of_flags(args, _DEEPSPEED)}
    if getattr(args, "use_parallelism_config", False):
        env = prepare_extend_env_parallelism_config(args, env)
    return list(_deepspeed(args)) if is_engine else [], env


def _deepspeed(args: argparse.Namespace) -> Iterator[str]:
    yield from ("deepspeed", "--hostfile", str(args.deepspeed_hostfile))
    yield from ("--launcher", str(args.deepspeed_multinode_launcher or "pdsh"))
    if args.deepspeed_exclusion_filter is not None:
        yield from ("--exclude", str(args.deepspeed_exclusion_filter))
    elif args.deepspeed_inclusion_filter is not None:
        yield from ("--include", str(args.deepspeed_inclusion_filter))
    else:
        yield from ("--num_gpus", str(args.num_processes // args.num_machines))
    if args.main_process_ip:
        yield from ("--master_addr", str(args.main_process_ip))
    yield from ("--master_port", str(args.main_process_port))
    if args.module or args.no_python:
        yield "--module" if args.module else "--no_python"
    yield from (args.training_script, *args.training_script_args)


def _script(args: argparse.Namespace) -> Iterator[str]:
    _reject_module_and_program(args)
    if not args.no_python:
        yield sys.executable
    if args.module:
        yield "-m"
    yield args.training_script
    yield from args.training_script_args


def _reject_module_and_program(args: argparse.Namespace) -> None:
    if args.module and args.no_python:
        raise InvalidValueError(
            "--module and --no_python were given", "A module needs Python", "Leave one of the two out"
        )


def _mpirun(args: argparse.Namespace) -> Iterator[str]:
    program = next((name for name in ("mpirun", "mpiexec") if which(name)), None)
    if program is None:
        raise UsageError(
            "There is no program 'mpirun' or 'mpiexec' in PATH",
            f"The host file {args.mpirun_hostfile} is for mpirun, which starts the ranks",
            "Install Open MPI, Intel MPI, MPICH or MVAPICH2, or leave the host file out",
        )
    is_open_mpi = b"Open MPI" in subprocess.check_output([program, "--version"])
    hosts, per_node = ("--hostfile", "--npernode") if is_open_mpi else ("-f", "-ppn")
    size = int(args.num_processes or 0)
    yield from (program, hosts, args.mpirun_hostfile, per_node, str(max(size // (args.num_machines or 1), 1)))
    if size:
        yield from ("-n", str(size))
    if is_open_mpi:
        yield from ("--bind-to", getattr(args, "bind-to", "socket"))


def _set_rendezvous(args: argparse.Namespace) -> None:
    """Set what torchrun reads: where the machines meet, and how many processes each starts."""
    if args.main_process_port is None:
        args.main_process_port = _DEFAULT_PORT
    elif args.main_process_port == 0:
        args.main_process_port = get_free_port()
    address, port = args.main_process_ip, args.main_process_port
    is_single = args.num_machines <= 1
    args.nproc_per_node = str(args.num_processes // max(args.num_machines, 1))
    if not is_single:
        args.nnodes, args.node_rank = str(args.num_machines), int(args.machine_rank)
    if is_single:
        args.master_port = str(port)
    elif getattr(args, "same_network", False):
        args.master_addr, args.master_port = str(address), str(port)
    else:
        args.rdzv_endpoint = f"{address}:{port}"
    if (is_single or int(args.machine_rank) == 0) and is_port_in_use(port):
        if not is_single:
            raise ConnectionError(
                f"Port {port} is in use. The other machines will look for this one there. Give another "
                "--main_process_port on all of them."
            )
        args.standalone = True


def _common(args: argparse.Namespace) -> dict[str, str]:
    """The variables of every run."""
    found = {"ACCELERATE_MIXED_PRECISION": _member(PrecisionType, "mixed_precision", args.mixed_precision.lower())}
    found["ACCELERATE_DYNAMO_BACKEND"] = _member(DynamoBackend, "dynamo_backend", args.dynamo_backend.upper())
    found["ACCELERATE_DYNAMO_MODE"] = args.dynamo_mode
    for name in ("use_fullgraph", "use_dynamic", "use_regional_compilation"):
        found[f"ACCELERATE_DYNAMO_{name.upper()}"] = str(getattr(args, f"dynamo_{name}"))
    if getattr(args, "num_cpu_threads_per_process", None) is not None:
        found["OMP_NUM_THREADS"] = str(args.num_cpu_threads_per_process)
    if args.debug:
        found["ACCELERATE_DEBUG_MODE"] = "true"
    if args.enable_cpu_affinity:
        found["ACCELERATE_CPU_AFFINITY"] = "1"
    ids = getattr(args, "gpu_ids", None)
    if ids not in (None, "all"):
        device = torch.accelerator.current_accelerator()
        found[_VISIBLE.get(device.type if device else "", "CUDA_VISIBLE_DEVICES")] = str(ids)
    return setup_fp8_env(args, found) if args.mixed_precision.lower() == "fp8" else found


def _member(kind: Any, name: str, value: str) -> str:
    if value not in kind:
        raise InvalidValueError(f"{name} is {value!r}", "There is no such choice", f"Use {', '.join(kind.list())}")
    return str(kind(value).value)


def _of_flags(args: argparse.Namespace, variables: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, variable in variables.items():
        value = getattr(args, name, None)
        if value is not None:
            found[variable] = str(value) if name in _AS_WRITTEN else str(value).lower()
    return found


def setup_fp8_env(args: argparse.Namespace, current_env: dict[str, str]) -> dict[str, str]:
    """Add the variables of fp8 training.

    Args:
        args: Completed flags of `accelerate launch`.
        current_env: The environment; changed in place.

    Returns:
        The same dictionary.
    """
    for name, value in vars(args).items():
        if name == "fp8_override_linear_precision":
            for part, word in zip(("FPROP", "DGRAD", "WGRAD"), value, strict=True):
                current_env[f"ACCELERATE_FP8_OVERRIDE_{part}"] = str(bool(word))
        elif name.startswith("fp8_") and value is not None:
            current_env[f"ACCELERATE_{name.upper()}"] = str(value)
    return current_env


def prepare_extend_env_parallelism_config(args: argparse.Namespace, current_env: dict[str, str]) -> dict[str, str]:
    """Add the variables of a mesh.

    Args:
        args: Completed flags of `accelerate launch`.
        current_env: The environment; changed in place.

    Returns:
        The same dictionary.
    """
    names = [*_ALWAYS]
    if int(args.parallelism_config_cp_size) > 1:
        names.append("cp_comm_strategy")
    if int(args.parallelism_config_sp_size) > 1:
        names += _OF_SEQUENCE
    current_env["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    for name in names:
        current_env[f"{_PARALLELISM}{name.upper()}"] = str(getattr(args, f"parallelism_config_{name}"))
    return current_env


def env_var_path_add(env_var_name: str, path_to_add: str) -> str:
    """Return the value of a variable that lists folders, with one more at its end.

    Args:
        env_var_name: The variable; it is not changed.
        path_to_add: The folder.
    """
    return ":".join([*filter(None, os.environ.get(env_var_name, "").split(":")), str(path_to_add)])


@unsupported(*_TPU_TEXT)
def prepare_tpu(
    args: argparse.Namespace, current_env: dict[str, str], pod: bool = False
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Return the environment of a run on a TPU: not supported."""
    return args, current_env


@unsupported(*_CLOUD_TEXT)
def prepare_sagemager_args_inputs(
    sagemaker_config: Any, args: argparse.Namespace
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the arguments of a job on SageMaker: not supported."""
    return args, {}


def _convert_nargs_to_dict(nargs: Sequence[str]) -> dict[str, Any]:
    """Read `--name value` pairs, each value as the number or truth value that it looks like."""
    values: dict[str, Any] = {}
    rest = list(nargs)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("-"):
            continue
        if not rest or rest[0].startswith("-"):
            raise InvalidValueError(
                f"{flag} has no value",
                "Hyperparameters of SageMaker are pairs of a name and a value, not switches",
                f"Write {flag} True, and let the script read it",
            )
        values[flag.lstrip("-").replace("-", "_")] = _typed(rest.pop(0))
    return values


def _typed(text: str) -> Any:
    if text in ("True", "False"):
        return literal_eval(text)
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


class PrepareForLaunch:
    """Makes a function the entry point of a process that a program starts itself.

    Args:
        launcher: The function.
        distributed_type: How the run is distributed.
        debug: Join a group of processes on the CPU, which meet in the file of ACCELERATE_DEBUG_RDV_FILE.
    """

    def __init__(
        self, launcher: Callable[..., Any], distributed_type: str | DistributedType = "NO", debug: bool = False
    ) -> None:
        self.launcher = launcher
        self.distributed_type = DistributedType(distributed_type)
        self.debug = debug

    def __call__(self, index: int, *args: Any) -> None:
        """Run the function as the process of this index."""
        if self.debug:
            size = int(os.environ["WORLD_SIZE"])
            store = torch.distributed.FileStore(  # type: ignore[attr-defined]
                os.environ["ACCELERATE_DEBUG_RDV_FILE"], size
            )
            torch.distributed.init_process_group("gloo", rank=index, store=store, world_size=size)
        elif self.distributed_type.value.startswith("MULTI_"):
            machine = int(os.environ.get("NODE_RANK", "0")) * int(os.environ.get("NPROC", "1"))
            os.environ |= {"LOCAL_RANK": str(index), "RANK": str(machine + index)}
        os.environ["FORK_LAUNCHED"] = "1"
        self.launcher(*args)
