"""Converts command lines of torchrun: settings become a file, the rest becomes a `paceline launch`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Final

from paceline.config.conversion.result import Conversion
from paceline.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KNOWN_OPTIONS", "convert_torchrun", "is_torchrun"]

_MODULES: Final = ("torch.distributed.run", "torch.distributed.launch")
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_SHORT: Final = {"-m": "module", "-r": "redirects", "-t": "tee"}
_SWITCHES: Final = ("standalone", "module", "no_python", "run_path", "use_env")
_ALWAYS: Final = {
    "standalone": "one machine needs no rendezvous",
    "run_path": "scripts always run as __main__",
    "use_env": "ranks are always set by variables",
    "rdzv_id": "each launch has its own id",
    "role": "all ranks have the same role",
    "start_method": "each rank is a separate program",
    "redirects": "--log_dir writes both streams of every rank",
    "signals_to_handle": "SIGTERM, SIGINT, SIGHUP and SIGQUIT reach the ranks",
    "logs_specs": "--log_dir names the folder",
    "duplicate_stdout_filters": "every line is kept",
    "duplicate_stderr_filters": "every line is kept",
    "event_log_handler": "events are not recorded",
    "shutdown_timeout": "the launcher has its own timeout",
}
"""Flags that change nothing here, with the reason."""

_SAME: Final = {
    "max_restarts": "max_restarts",
    "monitor_interval": "monitor_interval",
    "node_rank": "machine_rank",
    "rdzv_backend": "rdzv_backend",
    "rdzv_conf": "rdzv_conf",
    "master_addr": "main_process_ip",
    "master_port": "main_process_port",
}
"""Flags with a key of the same meaning."""

_REFUSED: Final = {
    "local_ranks_filter": "all ranks' output is shown, each line with its rank; use --log_dir for single ranks",
    "local_addr": "give main_process_ip as the other machines see it",
    "virtual_local_rank": "each rank sees all devices; use gpu_ids to choose among them",
}
_SEVERAL_ONLY: Final = ("node_rank", "rdzv_backend", "rdzv_conf", "master_addr", "rdzv_endpoint")
KNOWN_OPTIONS: Final = (
    *_SWITCHES,
    *_ALWAYS,
    *_SAME,
    *_REFUSED,
    *("nnodes", "nproc_per_node", "rdzv_endpoint", "tee", "log_dir", "numa_binding"),
)
_VARIABLES: Final = {"OMP_NUM_THREADS": "num_cpu_threads_per_process", "CUDA_VISIBLE_DEVICES": "gpu_ids"}


@dataclass(slots=True)
class _Line:
    """A parsed command line; flags by name, with underscores."""

    variables: dict[str, str] = field(default_factory=dict)
    program: str = ""
    flags: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name to the flag as written, and its value."""
    unknown: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)


def is_torchrun(words: Sequence[str]) -> bool:
    """Whether the words are a command line of torchrun rather than the name of a file."""
    return bool(words) and bool(_parse(words).program)


def convert_torchrun(words: Sequence[str]) -> Conversion:
    """Convert a command line like `OMP_NUM_THREADS=4 torchrun --nproc_per_node 8 train.py --lr 1e-3`."""
    line = _parse(words)
    result = Conversion("a command line of torchrun", is_changed=True)
    for name, value in line.variables.items():
        if name in _VARIABLES:
            number = int(value) if value.isdecimal() and name != "CUDA_VISIBLE_DEVICES" else value
            result.put(line.program, name, value, _VARIABLES[name], number)
        else:
            result.leave_out(line.program, name, value, "set it before `paceline launch`; ranks inherit it")
    for flag in line.unknown:
        hint = did_you_mean(flag.lstrip("-").replace("-", "_"), KNOWN_OPTIONS)
        result.refuse(line.program, flag, "", Problem(line.program, flag, "unknown flag", "", hint))
    machines = _machines(result, line)
    for name, (written, value) in line.flags.items():
        if name != "nnodes":
            _convert(result, line.program, name, written, value, machines)
    result.command = ("paceline", "launch", *_launch_words(line), *line.rest)
    if not line.rest:
        result.problems.append(
            Problem(line.program, "", "there is no script", "", "give the whole line, as you run it")
        )
    return result


def _parse(words: Sequence[str]) -> _Line:
    line, rest = _Line(), list(words)
    while rest and _ASSIGNMENT.fullmatch(rest[0]):
        name, _, value = rest.pop(0).partition("=")
        line.variables[name] = value
    if rest and PurePath(rest[0]).name == "torchrun":
        line.program = rest.pop(0)
    elif len(rest) > 2 and PurePath(rest[0]).name.startswith("python") and rest[1] == "-m" and rest[2] in _MODULES:
        line.program = rest[2]
        del rest[:3]
    while rest and rest[0].startswith("-"):
        _take_flag(line, rest)
    line.rest = rest
    return line


def _take_flag(line: _Line, rest: list[str]) -> None:
    written, has_value, value = rest.pop(0).partition("=")
    name = _SHORT.get(written, written.lstrip("-").replace("-", "_"))
    if name not in KNOWN_OPTIONS:
        line.unknown.append(written)
        if not has_value and rest and not rest[0].startswith("-") and not rest[0].endswith(".py"):
            rest.pop(0)
        return
    if not has_value and name not in _SWITCHES and rest:
        value = rest.pop(0)
    line.flags[name] = (written, value)


def _machines(result: Conversion, line: _Line) -> int:
    written, value = line.flags.get("nnodes", ("", "1"))
    low, _, high = value.partition(":")
    if not low.isdecimal() or not (high or low).isdecimal():
        why = "it must be a number, or MIN:MAX"
        problem = Problem(line.program, "num_machines", f"{value} machines", why, "give one number")
        result.refuse(line.program, written, value, problem)
        return 2
    if high and high != low:
        result.put(line.program, written, value, "num_machines", value)
        return int(high)
    machines = int(low)
    if written and machines > 1:
        result.put(line.program, written, value, "num_machines", machines)
    elif written:
        result.leave_out(line.program, written, value, "it is the default")
    return machines


def _convert(result: Conversion, program: str, name: str, written: str, value: str, machines: int) -> None:
    if name in _ALWAYS:
        result.leave_out(program, written, value, _ALWAYS[name])
    elif name in _REFUSED:
        problem = Problem(program, written, "has no counterpart", "", _REFUSED[name])
        result.refuse(program, written, value, problem)
    elif machines == 1 and name in _SEVERAL_ONLY:
        result.leave_out(program, written, value, "one machine needs no rendezvous")
    elif name == "nproc_per_node":
        _processes(result, program, written, value, machines)
    elif name == "rdzv_endpoint":
        _endpoint(result, program, written, value)
    elif name == "numa_binding":
        result.put(program, written, value, "enable_cpu_affinity", True)
    elif name in _SAME:
        result.put(program, written, value, _SAME[name], _number(value))
    else:
        result.leave_out(program, written, value, "it is part of the command")


def _processes(result: Conversion, program: str, written: str, value: str, machines: int) -> None:
    if value.isdecimal():
        result.put(program, written, value, "num_processes", int(value) * machines)
    elif value == "cpu":
        result.put(program, written, value, "use_cpu", True)
    elif machines > 1:
        problem = Problem(
            program, "num_processes", f"{value!r} over {machines} machines", "", "give the number of processes"
        )
        result.refuse(program, written, value, problem)
    else:
        result.leave_out(program, written, value, "without num_processes each device gets one process")


def _endpoint(result: Conversion, program: str, written: str, value: str) -> None:
    host, _, port = value.rpartition(":") if ":" in value else (value, "", "")
    result.put(program, written, value, "main_process_ip", host)
    if port.isdecimal():
        result.put(program, written, value, "main_process_port", int(port))


def _number(value: str) -> object:
    if value.isdecimal():
        return int(value)
    if re.fullmatch(r"\d*\.\d+", value):
        return float(value)
    return value


def _launch_words(line: _Line) -> list[str]:
    words = [f"--{name}" for name in ("module", "no_python") if name in line.flags]
    if "log_dir" in line.flags:
        words += ["--log_dir", line.flags["log_dir"][1]]
    if line.flags.get("tee", ("", "0"))[1] != "0":
        words.append("--tee")
    return words
