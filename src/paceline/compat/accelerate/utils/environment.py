"""Environment variables, and facts about the machine."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from paceline.compat.accelerate.settings.variables import (
    clear_environment,
    get_int_from_env,
    parse_choice_from_env,
    parse_flag_from_env,
    patch_environment,
    str_to_bool,
)
from paceline.environment.device import supported_precisions
from paceline.environment.world import World

__all__ = [
    "CPUInformation",
    "are_libraries_initialized",
    "check_cuda_fp8_capability",
    "check_cuda_p2p_ib_support",
    "clear_environment",
    "convert_dict_to_env_variables",
    "get_cpu_distributed_information",
    "get_current_device_type",
    "get_driver_version",
    "get_gpu_info",
    "get_int_from_env",
    "override_numa_affinity",
    "parse_choice_from_env",
    "parse_flag_from_env",
    "patch_environment",
    "purge_accelerate_environment",
    "set_numa_affinity",
    "str_to_bool",
]

T = TypeVar("T")
_LOG = logging.getLogger(__name__.removeprefix("paceline.compat."))  # programs filter "accelerate"
_PREFIX = "ACCELERATE_"


def convert_dict_to_env_variables(current_env: Mapping[str, str]) -> list[str]:
    """Return `NAME=value` lines; what cannot be written as one is left out, with a warning."""
    lines = []
    for name, value in current_env.items():
        if name and value and not set(name + value) & set(";\n<> "):
            lines.append(f"{name}={value}\n")
        else:
            _LOG.warning("%s=%s is left out: it is empty, or has a blank or one of ; < >.", name, value)
    return lines


def are_libraries_initialized(*library_names: str) -> list[str]:
    """Return those modules that are imported already."""
    return [name for name in library_names if name in sys.modules]


def get_current_device_type() -> tuple[str, str]:
    """Return the type of device, and the distributed type of several of them; without a device, those of CUDA."""
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator is not None else "cuda"
    return kind, f"MULTI_{'GPU' if kind == 'cuda' else kind.upper()}"


def _nvidia_smi(query: str) -> list[str]:
    import subprocess

    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.check_output(command, text=True).strip().splitlines()


def get_gpu_info() -> tuple[list[str], int]:
    """Return the names of the GPUs and their number, as nvidia-smi says; CUDA is not initialized."""
    names = [line.strip() for line in _nvidia_smi("name")]
    return names, len(names)


def get_driver_version() -> str:
    """Return the version of the first GPU's driver, as nvidia-smi says."""
    return _nvidia_smi("driver_version")[0].strip()


def check_cuda_p2p_ib_support() -> bool:
    """Whether GPUs can exchange data directly; torch and NCCL find that out by themselves."""
    return True


@functools.lru_cache
def check_cuda_fp8_capability() -> bool:
    """Whether the GPU multiplies 8-bit floats."""
    return torch.cuda.is_available() and "fp8" in supported_precisions(torch.device("cuda"))


@dataclass
class CPUInformation:
    """Rank and number of processes, over all machines and on this one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def get_cpu_distributed_information() -> CPUInformation:
    """Read rank and number of processes from the launcher's variables."""
    world = World.read(os.environ)
    return CPUInformation(world.rank, world.size, world.local_rank, world.local_size)


def override_numa_affinity(local_process_index: int, verbose: bool | None = None) -> None:
    """Bind this process to the cores next to its GPU.

    Args:
        local_process_index: The number of the GPU.
        verbose: Log the cores; None does in debug mode.
    """
    if not torch.cuda.is_available():
        return
    properties: Any = torch.cuda.get_device_properties(local_process_index)
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    cores = _cores(Path(f"/sys/bus/pci/devices/{address}/local_cpulist"))
    if not cores:
        return
    os.sched_setaffinity(0, cores)
    if parse_flag_from_env("ACCELERATE_DEBUG_MODE") if verbose is None else verbose:
        _LOG.info("Process %d runs on the cores %s.", local_process_index, sorted(cores))


def _cores(path: Path) -> set[int]:
    """Read a list such as `0-7,16-23`; a machine that does not tell has none."""
    if not path.exists():
        return set()
    ranges = [part.partition("-") for part in path.read_text().strip().split(",") if part]
    return {core for first, _, last in ranges for core in range(int(first), int(last or first) + 1)}


@functools.lru_cache
def set_numa_affinity(local_process_index: int, verbose: bool | None = None) -> None:
    """Bind this process to the cores next to its GPU, once; see `override_numa_affinity`."""
    override_numa_affinity(local_process_index, verbose)


def purge_accelerate_environment(func_or_cls: T) -> T:
    """Make a function take back its changes of `ACCELERATE_*` variables.

    Args:
        func_or_cls: The function; or a class of tests, whose methods `test*` are changed, and those of its subclasses.
    """
    if not isinstance(func_or_cls, type):
        return cast("T", _purged(cast("Callable[..., Any]", func_or_cls)))

    def purge_tests(cls: type, **_kwargs: Any) -> None:
        tests = {name: value for name, value in vars(cls).items() if name.startswith("test") and callable(value)}
        for name, value in tests.items():
            setattr(cls, name, _purged(value))

    purge_tests(func_or_cls)
    func_or_cls.__init_subclass__ = classmethod(purge_tests)  # type: ignore[assignment, arg-type]
    return cast("T", func_or_cls)


def _purged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def purged(*args: Any, **kwargs: Any) -> Any:
        saved = _own(os.environ)
        try:
            return function(*args, **kwargs)
        finally:
            for name in _own(os.environ):
                del os.environ[name]
            os.environ.update(saved)

    return purged


def _own(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(_PREFIX)}
