"""Launching a function: from a notebook, or from any program that has it at hand."""

from __future__ import annotations

import linecache
import os
import pickle
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.config import in_force, resolve
from paceline.errors import WorkerError
from paceline.launch.notebook.rank_main import CALL, result_file, results_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from paceline.config import Resolved

__all__ = ["debug_launcher", "notebook_launcher"]


def notebook_launcher(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    num_processes: int | None = None,
    mixed_precision: str | None = None,
    use_port: int | str | None = None,
    master_addr: str | None = None,
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str | None = None,
    rdzv_endpoint: str = "",
    rdzv_conf: Mapping[str, Any] | str | None = None,
    rdzv_id: str | None = None,
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
    *,
    config_file: str | os.PathLike[str] | None = None,
) -> list[Any]:
    """Run a function on every device of this machine, and return what each rank's call returned, by rank.

    The function may be defined in a cell, and CUDA may have been used before: each rank is a fresh process, which gets
    a copy of the function, of what it uses and of its arguments. Build the Accelerator, models and loaders inside it.
    What it returns must be picklable; tensors come back on the CPU. What ranks print appears in the cell.

    One process is not started anew: the function is called here, and what it raises comes up as it is.

    What is not said here is detected: one process for each device, one in all on a machine without. No default
    configuration file is read; name one with `config_file` to train as `paceline launch --config_file` would.

    Args:
        function: To call, as `function(*args)`.
        args: Its arguments.
        num_processes: On this machine.
        mixed_precision: `no`, `bf16` or `fp16`; None leaves it to the function's Accelerator.
        use_port: Where the ranks meet; None or 0 takes a free port.
        master_addr: The machine of rank 0, when there are several.
        node_rank: Which machine this is.
        num_nodes: How many machines call this.
        rdzv_backend: How machines meet.
        rdzv_endpoint: `host:port`, in place of `master_addr` and `use_port`.
        rdzv_conf: Settings of the rendezvous.
        rdzv_id: Accepted; machines that meet at one address and port belong together.
        max_restarts: How often ranks are started again after a failure.
        monitor_interval: Seconds between two looks at the ranks.
        log_line_prefix_template: What to put before each line of a rank, such as `[rank ${rank}] `.
        config_file: A YAML or JSON file with further settings.

    Returns:
        One value for each rank, in their order; with several machines, for the ranks of this one.

    Raises:
        WorkerError: A rank failed; its text holds that rank's own traceback.
        KeyboardInterrupt: The cell was interrupted; all ranks have ended.
        UsageError: The function uses something that cannot be sent to another process.
        ConfigError: The settings cannot work here. Nothing was started.
    """
    host, _, port = rdzv_endpoint.partition(":")
    conf = (
        rdzv_conf if isinstance(rdzv_conf, str) or not rdzv_conf else ",".join(f"{k}={v}" for k, v in rdzv_conf.items())
    )
    count = None if num_processes is None else num_processes * num_nodes
    flags = {
        "num_processes": count,
        "mixed_precision": mixed_precision,
        "main_process_port": int(port or use_port or 0) or None,
        "main_process_ip": host or master_addr,
        "machine_rank": node_rank or None,
        "num_machines": num_nodes if num_nodes > 1 else None,
        "rdzv_backend": rdzv_backend,
        "rdzv_conf": conf or None,
        "max_restarts": max_restarts or None,
        "monitor_interval": monitor_interval,
    }
    return _run(function, args, flags, config_file, log_line_prefix_template)


def debug_launcher(function: Callable[..., Any], args: tuple[Any, ...] = (), num_processes: int = 2) -> list[Any]:
    """Run a function on a few CPU processes, to see whether it works on several ranks; see `notebook_launcher`.

    Args:
        function: To call, as `function(*args)`.
        args: Its arguments.
        num_processes: How many.

    Returns:
        What each rank's call returned, by rank.

    Raises:
        WorkerError: A rank failed; its text holds that rank's own traceback.
    """
    return _run(function, args, {"num_processes": num_processes, "use_cpu": True}, None, None)


def _run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    flags: Mapping[str, object],
    config_file: str | os.PathLike[str] | None,
    template: str | None,
) -> list[Any]:
    flags = {name: value for name, value in flags.items() if value is not None}
    file = None if config_file is None else Path(config_file)
    resolved = resolve(flags=flags, env=os.environ, file=file)
    if resolved.config.num_processes is None:
        from paceline.launch.accelerators import count_accelerators

        found = 1 if resolved.config.use_cpu else count_accelerators()[1] or 1
        resolved = resolve(flags=flags, env=os.environ, file=file, detected={"num_processes": found})
    if resolved.config.num_processes == 1:
        with in_force(resolved):
            return [function(*args)]
    return _launch(function, args, resolved, template)


def _launch(function: Callable[..., Any], args: tuple[Any, ...], resolved: Resolved, template: str | None) -> list[Any]:
    from paceline.launch.command import Command
    from paceline.launch.launcher import launch
    from paceline.launch.notebook.pickling import pack_call
    from paceline.launch.notebook.pipes import RankPipes, is_stdout_redirected

    config = resolved.config
    # Ranks are dealt out to machines in order.
    local = (config.num_processes or 1) // config.max_machines
    first = config.machine_rank * local
    with tempfile.TemporaryDirectory(prefix="paceline_call_") as name:
        folder = Path(name)
        head = pickle.dumps({"path": list(sys.path), "sources": _cells()})
        (folder / CALL).write_bytes(head + pack_call(function, args, {}))
        command = Command("paceline.launch.notebook.rank_main", (name,), "module")
        try:
            if template is None and not is_stdout_redirected():
                launch(resolved, command, env=_environment())
            else:
                with RankPipes(folder, local, template, first=first) as pipes:
                    launch(resolved, command, env=_environment(), pipes=pipes.folder)
        except WorkerError as failure:
            if failure.code == 128 + signal.SIGINT:
                raise KeyboardInterrupt("all ranks have ended") from None
            raise
        if config.max_machines == 1:
            return [_result(result_file(folder, rank)) for rank in range(local)]
        return [_result(path) for _, path in sorted(results_in(folder))]


def _environment() -> dict[str, str]:
    """This environment, in which a rank finds paceline even where only `sys.path` leads to it."""
    home = str(Path(__file__).parents[2])
    env = dict(os.environ)
    if "site-packages" not in home:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (env.get("PYTHONPATH"), home)))
    return env


def _cells() -> dict[str, list[str]]:
    """The lines of code that is in no file, by the name that tracebacks give it."""
    return {name: linecache.getlines(name) for name in list(linecache.cache) if not Path(name).is_file()}


def _result(path: Path) -> Any:
    # A rank that ended itself with sys.exit(0) has returned nothing.
    return pickle.loads(path.read_bytes()) if path.exists() else None
