"""The report of `paceline env`: versions, devices, the launcher's variables and the configuration."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from paceline.config import TorchDynamoPlugin, find_config_file, is_accelerate_file, resolve
from paceline.environment.device import describe_device, memory_info
from paceline.environment.host import core_count, cpu_quota, host_memory, processor_name
from paceline.environment.world import World
from paceline.errors import ConfigError, PacelineError, WorldError
from paceline.strategies.compile_cache import describe_cache

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DeviceReport", "EnvironmentReport", "environment_report"]

_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "flash-attn",
    "liger-kernel",
    "mlflow",
    "mpi4py",
    "numpy",
    "peft",
    "pydantic",
    "ray",
    "safetensors",
    "tensorboard",
    "torchao",
    "torchdata",
    "transformer-engine",
    "transformers",
    "triton",
    "trl",
    "wandb",
)
_PROGRAMS = ("mpirun", "srun", "pdsh", "numactl", "ninja", "g++", "nvcc")
_LAUNCHER_PREFIXES = (
    "ACCELERATE_",
    "CUDA_",
    "FI_",
    "GLOO_",
    "HIP_",
    "MV2_COMM_",
    "NCCL_",
    "OMPI_COMM_",
    "PACELINE_",
    "PMIX_RANK",
    "PET_",
    "PMI_",
    "PYTORCH_",
    "RAY_",
    "ROCR_",
    "SLURM_",
    "TORCHELASTIC_",
    "TORCH_",
    "UCX_",
)
_LAUNCHER_NAMES = (
    "DS_ACCELERATOR",
    "GROUP_RANK",
    "HF_HOME",
    "LD_LIBRARY_PATH",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MPI_LOCALNRANKS",
    "MPI_LOCALRANKID",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "RANK",
    "WORLD_SIZE",
    "XDG_CACHE_HOME",
    "ZE_AFFINITY_MASK",
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|JWT|AUTH", re.IGNORECASE)
_LONGEST = 200
_BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")
_PROGRAM_SECONDS = 10
_SHARED_MEMORY: Final = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One accelerator, with its memory in bytes."""

    name: str
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class EnvironmentReport:
    """What a bug report should contain about a machine.

    Attributes:
        versions: paceline, Python, torch and the platform.
        packages: Versions of installed packages that matter here, by name.
        devices: The accelerators that torch sees.
        drivers: Versions of the device's driver and libraries.
        backends: The communication backends of this torch, in one line.
        topology: How the devices are connected, as the vendor's program prints it; empty when unknown.
        processor: Its model name.
        cores: Physical processor cores that this process may use.
        host_memory: Bytes of host memory available, and in all.
        compile_cache: Where compiled code is kept, and how large that is.
        limits: What runs often hit: shared memory, disk, open files, a container's share of the processor.
        programs: The installed launchers and compilers, in one line.
        world: This process's rank and size, and whose variables they come from.
        variables: The variables that are set and matter here; those that look like secrets are masked.
        config_file: The configuration file that is used; empty without one.
        config_origin: Why it is that file.
        config_problems: What is wrong with it, a line each.
    """

    versions: Mapping[str, str]
    packages: Mapping[str, str]
    devices: tuple[DeviceReport, ...]
    drivers: Mapping[str, str]
    backends: str
    topology: str
    processor: str
    cores: int
    host_memory: tuple[int, int]
    compile_cache: str
    limits: Mapping[str, str]
    programs: str
    world: str
    variables: Mapping[str, str]
    config_file: str
    config_origin: str
    config_problems: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return plain values that JSON can hold."""
        return asdict(self)

    def as_text(self) -> str:
        """Return aligned lines, to read or to paste."""
        available, total = self.host_memory
        rows = [
            *self.versions.items(),
            ("processor", f"{self.processor}, {self.cores} cores"),
            ("memory", f"{_gib(available)} of {_gib(total)} GiB available"),
            *((f"device {n}", _device_line(device)) for n, device in enumerate(self.devices)),
            *([] if self.devices else [("devices", "none: runs on the CPU")]),
            *self.drivers.items(),
            ("backends", self.backends),
            *self.limits.items(),
            ("compile cache", self.compile_cache),
            ("programs", self.programs or "no launcher or compiler"),
            ("packages", ", ".join(f"{name} {version}" for name, version in self.packages.items())),
            ("world", self.world),
            *self.variables.items(),
            ("configuration", _file_line(self.config_file, self.config_origin)),
            *(("problem", problem) for problem in self.config_problems),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        return "\n".join([*lines, *(["", self.topology] if self.topology else [])])


def environment_report(env: Mapping[str, str], *, ask_programs: bool = True) -> EnvironmentReport:
    """Describe this machine and process; problems are reported, never raised.

    Args:
        env: The environment variables of the process.
        ask_programs: Run the vendor's programs for drivers and topology, which may take seconds.
    """
    searched = env if ask_programs else {**env, "PATH": ""}
    file, problems, dynamo = _config(env)
    return EnvironmentReport(
        versions={
            "paceline": _maybe_version("paceline") or "not installed: runs from its source",
            "python": f"{platform.python_version()} ({sys.executable})",
            "torch": torch.__version__,
            "platform": platform.platform(),
        },
        packages=_packages(),
        devices=_devices(),
        drivers=_drivers(searched),
        backends=_backends(),
        topology=_output(searched, "nvidia-smi", "topo", "-m"),
        processor=processor_name(),
        cores=core_count(),
        host_memory=host_memory(),
        compile_cache=describe_cache(dynamo, env),
        limits=_limits(),
        programs=", ".join(name for name in _PROGRAMS if shutil.which(name, path=env.get("PATH"))),
        world=_world(env),
        variables={
            name: _shown(name, value)
            for name, value in sorted(env.items())
            if name in _LAUNCHER_NAMES or name.startswith(_LAUNCHER_PREFIXES)
        },
        config_file=file,
        config_origin=_config_origin(file, env),
        config_problems=problems,
    )


def _shown(name: str, value: str) -> str:
    if _SECRET.search(name):
        return "(set, not shown)"
    # Proxies and stores are given as https://user:password@host.
    value = re.sub(r"(://)[^/@\s]+@", r"\1…@", value)
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"


def _backends() -> str:
    if not torch.distributed.is_available():
        return "none: this torch has no torch.distributed"
    available = [name for name in _BACKENDS if torch.distributed.is_backend_available(name)]
    missing = [name for name in ("gloo", "nccl", "mpi") if name not in available]
    suffix = f" (not: {', '.join(missing)})" if missing else ""
    return f"{', '.join(available)}{suffix}"


def _packages() -> dict[str, str]:
    """The optional and required packages that are installed."""
    versions = {name: _maybe_version(name) for name in _PACKAGES}
    return {name: version for name, version in versions.items() if version is not None}


def _maybe_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[DeviceReport, ...]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ()
    reports = []
    for index in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, index)
        free, total = memory_info(device)
        reports.append(DeviceReport(describe_device(device), free, total))
    return tuple(reports)


def _drivers(env: Mapping[str, str]) -> dict[str, str]:
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    versions = {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": _output(env, "nvidia-smi", *query).partition("\n")[0],
    }
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        from torch.cuda import nccl

        versions["nccl"] = ".".join(map(str, nccl.version()))  # type: ignore[no-untyped-call]
        versions["cudnn"] = str(torch.backends.cudnn.version() or "")  # type: ignore[no-untyped-call]
    return {name: version for name, version in versions.items() if version}


def _output(env: Mapping[str, str], program: str, *arguments: str) -> str:
    """Return what a program prints; empty when it is not installed, fails, or takes long."""
    path = shutil.which(program, path=env.get("PATH"))
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=_PROGRAM_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.rstrip()


def _world(env: Mapping[str, str]) -> str:
    try:
        world = World.read(env)
    except WorldError as error:
        return f"contradictory: {error}"
    if world.source == "none":
        return "one process, no launcher"
    local = f"local {world.local_rank} of {world.local_size}"
    return f"rank {world.rank} of {world.size} ({local}) by {world.source}"


def _config(env: Mapping[str, str]) -> tuple[str, tuple[str, ...], TorchDynamoPlugin]:
    file = None
    problems: tuple[str, ...] = ()
    dynamo = TorchDynamoPlugin()
    try:
        file = find_config_file(env, None)
        dynamo = resolve(flags={}, env=env, file=file).config.dynamo_config
    except ConfigError as error:
        problems = tuple(map(str, error.problems))
    except PacelineError as error:
        problems = (str(error),)
    return str(file or ""), problems, dynamo


def _config_origin(file: str, env: Mapping[str, str]) -> str:
    if not file:
        return ""
    if env.get("PACELINE_CONFIG_FILE"):
        return "named by PACELINE_CONFIG_FILE"
    return "Accelerate's, since paceline has none" if is_accelerate_file(Path(file), env) else "the default file"


def _file_line(file: str, origin: str) -> str:
    return f"{file} ({origin})" if file else "no file: defaults and detected values"


def _limits() -> dict[str, str]:
    """Loader workers need shared memory and open files, checkpoints need disk; containers often limit all three."""
    limits = {}
    if _SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(_SHARED_MEMORY)
        limits["shared memory"] = f"{_gib(usage.free)} of {_gib(usage.total)} GiB free"
    # Not Path.cwd(), which raises where that folder was deleted.
    for name, folder in (("disk here", Path()), ("disk of /tmp", Path(tempfile.gettempdir()))):
        usage = shutil.disk_usage(folder)
        limits[name] = f"{_gib(usage.free)} of {_gib(usage.total)} GiB free"
    quota = cpu_quota()
    if quota is not None:
        limits["processor time"] = f"at most {quota:g} cores' worth (this container's limit)"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits["open files"] = f"at most {soft} (could be raised to {hard})" if soft != hard else f"at most {soft}"
    return limits


def _device_line(device: DeviceReport) -> str:
    return f"{device.name}, {_gib(device.free)} of {_gib(device.total)} GiB free"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
