"""`accelerate launch`: Accelerate's flags and files, merged as it merges them, and run by `paceline launch`.

The run is a process of the public command: it replaces processes and handles signals in ways that a function in the
caller's process must not, and reports failures at its end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import yaml

from paceline.compat.accelerate.commands.config.config_args import (
    ClusterConfig,
    SageMakerConfig,
    default_config_file,
    load_config_from_file,
)
from paceline.compat.accelerate.commands.flags import add_flags, defaults, destination
from paceline.compat.accelerate.commands.utils import command_parser, run_command
from paceline.compat.accelerate.settings.enums import ComputeEnvironment
from paceline.compat.accelerate.settings.errors import InvalidValueError, UnsupportedError
from paceline.config import options
from paceline.config.schema.names import settings_by_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "deepspeed_launcher",
    "launch_command",
    "launch_command_parser",
    "main",
    "multi_gpu_launcher",
    "sagemaker_launcher",
    "simple_launcher",
    "tpu_launcher",
    "tpu_pod_launcher",
]

# The flags that select how to train, with the sections of a file that each makes use of.
_PARADIGMS: Final = {
    "use_deepspeed": ("DEEPSPEED", ("deepspeed_config", "parallelism_config")),
    "use_fsdp": ("FSDP", ("fsdp_config", "parallelism_config")),
    "use_megatron_lm": ("MEGATRON_LM", ("megatron_lm_config",)),
    "tpu": ("XLA", ()),
}
_SECTIONS_OF_ALL: Final = ("", "dynamo_config", "fp8_config", "mpirun_config", "ddp_config")
_TPU_KEYS: Final = (
    *("tpu", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo"),
    *("vm", "env", "main_training_function", "downcast_bf16"),
)
_PREFIXES: Final = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_", "ddp_config": "ddp_"}
# Of the configuration itself, or decided by what follows here.
_NOT_SETTINGS: Final = frozenset({"compute_environment", "distributed_type", "mixed_precision"})
_COMMAND_SWITCHES: Final = ("module", "no_python", "quiet")


def launch_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Return a parser of the flags, followed by a script and its arguments.

    Args:
        subparsers: Where to add it as the command `launch`, if it is one of several.
    """
    texts: dict[str, Any] = {
        # The flag stands first, so that no line breaks within it.
        "description": "`--num-processes 2` and the like can also be written with underscores. Run a script on all "
        "devices; `paceline launch --help` describes the flags with examples.",
        "usage": "accelerate launch [flags] script [arguments]",
        "allow_abbrev": False,
    }
    parser = command_parser("launch", subparsers, **texts)
    parser.add_argument("--config_file", help="YAML or JSON file to read.")
    parser.add_argument("-q", "--quiet", action="store_true", default=None, help="Do not print notes.")
    parser.add_argument("-m", "--module", action="store_true", default=None, help="The script is a module.")
    parser.add_argument("--no_python", action="store_true", default=None, help="The script is any program.")
    parser.add_argument("--log_dir", help="Write each rank's output to files in this folder.")
    parser.add_argument("-t", "--tee", default="0", help="With the flag above: also show the output (3), or not (0).")
    parser.add_argument("--role", default="default", help="Not supported: all ranks have one role.")
    parser.add_argument("--no_tpu_cluster", action="store_false", dest="tpu_use_cluster", help="Not supported.")
    parser.add_argument("--aws_access_key_id", help="Not supported.")
    parser.add_argument("--aws_secret_access_key", help="Not supported.")
    add_flags(parser)
    parser.set_defaults(tpu_use_cluster=False)
    parser.add_argument("training_script", help="The script, or module, or program.")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER, help="Its arguments.")
    if subparsers is not None:
        parser.set_defaults(func=launch_command)
    return parser


def launch_command(args: argparse.Namespace) -> None:
    """Run a script as `paceline launch` does, with paceline in the place of Accelerate.

    Args:
        args: What the parser returned.

    Raises:
        SystemExit: The command failed; it has reported why.
        InvalidValueError: Flags contradict each other, or the file has unknown keys.
        UnsupportedError: The configuration is for SageMaker or for a TPU.
    """
    native = _native_file(args)
    if native:
        _run(args, {}, native)
        return
    args, file, _ = _validate_launch_command(args)
    if isinstance(file, SageMakerConfig):
        sagemaker_launcher(file, args)
    values = {} if file is None else vars(file)
    if not Path(default_config_file).is_file():
        _run(args, values, "")
        return
    # All that the file says is among the flags: `paceline launch` must not read the default file once more.
    with tempfile.TemporaryDirectory() as folder:
        neutral = Path(folder, "config.yaml")
        neutral.write_text("as_accelerate: true\n", encoding="utf-8")
        _run(args, values, str(neutral))


def _native_file(args: argparse.Namespace) -> str:
    """Return the configuration file if only paceline can read it, else nothing."""
    path = Path(args.config_file or default_config_file)
    if not path.is_file() or (args.cpu and args.config_file is None):
        return ""
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if values.get("compute_environment") == ComputeEnvironment.AMAZON_SAGEMAKER:
        return ""
    known = set(ClusterConfig.__dataclass_fields__)
    has_own_keys = any(key in settings_by_key("") and key not in known for key in values)
    return str(path) if has_own_keys or "distributed_type" not in values else ""


def _validate_launch_command(
    args: argparse.Namespace,
) -> tuple[argparse.Namespace, ClusterConfig | SageMakerConfig | None, bool]:
    """Complete the flags by the file, or by what is detected.

    Returns:
        The flags, changed in place; the file; whether the precision is the file's.
    """
    _reject_contradictions(args)
    file = None
    if args.config_file is not None or (Path(default_config_file).is_file() and not args.cpu):
        file = load_config_from_file(args.config_file)
    is_from_file = not args.mixed_precision and file is not None and file.mixed_precision is not None
    if isinstance(file, ClusterConfig):
        _complete_from_file(args, file)
    if file is not None and not args.mixed_precision:
        args.mixed_precision = file.mixed_precision
    _complete_from_machine(args)
    return args, file, is_from_file


def _reject_contradictions(args: argparse.Namespace) -> None:
    exclusive = [name for name in ("cpu", "multi_gpu", "tpu", "use_deepspeed", "use_fsdp") if getattr(args, name)]
    if len(exclusive) > 1:
        raise InvalidValueError(
            " and ".join(f"--{name}" for name in exclusive) + " were given",
            "Each selects how to train",
            "Keep one of them",
        )
    if args.multi_gpu and args.num_processes is not None and args.num_processes < 2:
        raise InvalidValueError(
            f"--multi_gpu and --num_processes {args.num_processes} were given",
            "Several devices need several processes",
            "Leave --multi_gpu out, or start at least 2 processes",
        )
    if args.use_parallelism_config and not (args.use_fsdp and str(args.fsdp_version) == "2"):
        raise InvalidValueError(
            "--use_parallelism_config was given without --use_fsdp --fsdp_version 2",
            "The mesh belongs to FSDP2",
            "Add the two flags",
        )


def _complete_from_file(args: argparse.Namespace, file: ClusterConfig) -> None:
    """Take from the file what the flags leave open. A flag that was given counts, and any value set by a program."""
    kind = str(getattr(file.distributed_type, "value", file.distributed_type))
    if not any(getattr(args, name) for name in ("multi_gpu", "tpu_use_cluster", *_PARADIGMS)):
        for name, (value, _) in _PARADIGMS.items():
            setattr(args, name, kind == value)
        args.multi_gpu = kind.startswith("MULTI_") and kind != "MULTI_CPU"
        args.use_parallelism_config = bool(file.parallelism_config)
        args.distributed_type = kind
    given: set[str] = getattr(args, "nondefault", set())
    preset = defaults()
    args.from_file = set()
    for name, value in _leaves(file):
        is_open = name not in given and getattr(args, name, None) in (None, preset.get(name))
        if is_open and value is not None:
            setattr(args, name, value)
            args.from_file.add(name)
    _reject_incomplete(args, kind)


def _reject_incomplete(args: argparse.Namespace, kind: str) -> None:
    if args.num_processes == -1:
        raise InvalidValueError(
            "The configuration file has no num_processes",
            f"Its distributed_type {kind} needs the number of processes on all machines",
            "Add the key, or --num_processes",
        )
    is_one_device = args.gpu_ids not in (None, "all") and "," not in str(args.gpu_ids)
    if is_one_device and args.multi_gpu and (args.num_machines or 1) <= 1:
        raise InvalidValueError(
            f"gpu_ids is {args.gpu_ids}, and distributed_type {kind}",
            "Several processes need several devices",
            "Name at least two, or all",
        )


def _leaves(file: ClusterConfig) -> Iterator[tuple[str, Any]]:
    """Yield every value of a file under the name of its flag."""
    for name, value in vars(file).items():
        if isinstance(value, dict):
            prefix = _PREFIXES.get(name, "")
            for key, inner in value.items():
                yield key if key.startswith(prefix) else f"{prefix}{key}", inner
        elif name not in _NOT_SETTINGS:
            yield name, value


def _complete_from_machine(args: argparse.Namespace) -> None:
    if args.gpu_ids is None:
        args.gpu_ids = "all"
    if args.num_processes is None:
        # Without a device, and with --cpu, one process is started.
        args.num_processes = 1 if args.cpu else max(torch.accelerator.device_count(), 1)
        args.multi_gpu = args.multi_gpu or (args.num_processes > 1 and not any(getattr(args, n) for n in _PARADIGMS))
    args.num_machines = args.num_machines or 1
    args.mixed_precision = args.mixed_precision or "no"
    args.dynamo_backend = args.dynamo_backend or "no"
    args.use_cpu = bool(args.cpu or getattr(args, "use_cpu", None))
    args.cpu = args.use_cpu
    args.debug = bool(args.debug)
    if args.num_cpu_threads_per_process is None:
        args.num_cpu_threads_per_process = _threads(args)


def _threads(args: argparse.Namespace) -> int:
    named = int(os.environ.get("OMP_NUM_THREADS") or 0)
    if named or not args.use_cpu:
        return named or 1
    import psutil

    local = max(int(args.num_processes or 1) // int(args.num_machines), 1)
    return max((psutil.cpu_count(logical=False) or 1) // local, 1)


def _flags(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield the flags of `paceline launch` that stand for the flags and the file of Accelerate."""
    given: set[str] = getattr(args, "nondefault", set())
    of_file: set[str] = getattr(args, "from_file", set())
    sections, skipped = _used_sections(args), _skipped(args) - of_file
    for option in options():
        name = destination(option)
        value = getattr(args, name, None)
        is_set = name in of_file or value != defaults().get(name)
        is_read = option.section in sections and (args.tpu or name not in _TPU_KEYS)
        is_used = is_set and is_read and name not in skipped
        if value is not None and (name in given or is_used):
            yield option.flag, _text(value)
    yield from _of_version_1(args)


def _of_version_1(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """FSDP of version 1 saves whole weights unless somebody says otherwise; paceline's own default is shards."""
    if args.use_fsdp and str(args.fsdp_version) == "1" and args.fsdp_state_dict_type is None:
        yield "fsdp_state_dict_type", "FULL_STATE_DICT"


def _skipped(args: argparse.Namespace) -> set[str]:
    """Flags that a run does without unless somebody gave them."""
    # Without a word about it, dynamo_backend is "no", and fp8 compiles: that needs nobody's leave.
    skipped = {"num_cpu_threads_per_process", "gpu_ids", "as_accelerate", "dynamo_backend"}
    if args.distributed_type:
        skipped |= {"multi_gpu", *_PARADIGMS}
    return skipped


def _used_sections(args: argparse.Namespace) -> tuple[str, ...]:
    used: tuple[str, ...] = _SECTIONS_OF_ALL
    for name, (_, sections) in _PARADIGMS.items():
        if getattr(args, name):
            used += sections
    return used


def _unused_sections(args: argparse.Namespace, file: Mapping[str, Any]) -> list[str]:
    names = [name for _, sections in _PARADIGMS.values() for name in sections]
    return [name for name in dict.fromkeys(names) if file.get(name) and name not in _used_sections(args)]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)


def _run(args: argparse.Namespace, file: Mapping[str, Any], config_file: str) -> None:
    _reject_unsupported(args)
    command = [sys.executable, "-m", "paceline", "launch", "--as_accelerate", "true"]
    command += ["--config_file", config_file] if config_file else []
    for name, value in _flags(args):
        command += [f"--{name}", value]
    command += [f"--{name}" for name in _COMMAND_SWITCHES if getattr(args, name, None)]
    for name in ("log_dir", "tee"):
        if getattr(args, name, None) not in (None, "0"):
            command += [f"--{name}", str(getattr(args, name))]
    unused = _unused_sections(args, file)
    if unused and not args.quiet:
        where = args.config_file or default_config_file
        print(
            f"paceline: {where}: not read under distributed_type {args.distributed_type}: {', '.join(unused)}",
            file=sys.stderr,
        )
    code = subprocess.call([*command, args.training_script, *args.training_script_args])
    if code:
        raise SystemExit(code)


def _reject_unsupported(args: argparse.Namespace) -> None:
    if args.role != "default":
        raise UnsupportedError(
            f"--role {args.role} was given", "All ranks of paceline have one role", "Leave the flag out"
        )
    if args.tpu:
        tpu_launcher(args)
    if args.aws_access_key_id or args.aws_secret_access_key:
        sagemaker_launcher(None, args)


# The flags say where a script runs: there is one way to launch it.
simple_launcher = multi_gpu_launcher = deepspeed_launcher = launch_command


def tpu_launcher(args: argparse.Namespace) -> None:
    """Refuse to run on a TPU.

    Args:
        args: What the parser returned.

    Raises:
        UnsupportedError: Always.
    """
    raise UnsupportedError(
        f"{args.training_script} was to be launched on a TPU",
        "paceline trains on GPUs and CPUs",
        "Leave out --tpu and the keys tpu_…, or run this script with Accelerate itself, without the switch",
    )


tpu_pod_launcher = tpu_launcher


def sagemaker_launcher(sagemaker_config: Any, args: argparse.Namespace) -> None:
    """Refuse to start a job on SageMaker.

    Args:
        sagemaker_config: The configuration of the job.
        args: What the parser returned.

    Raises:
        UnsupportedError: Always.
    """
    raise UnsupportedError(
        f"{args.training_script} was to be launched on Amazon SageMaker",
        "paceline starts processes on machines that it runs on, not jobs of a cloud service",
        "Create the job with SageMaker's own estimator, and start `paceline launch` as its entry point",
    )


def main() -> None:
    """Run `accelerate launch`."""
    run_command(launch_command, launch_command_parser().parse_args())


if __name__ == "__main__":
    main()
