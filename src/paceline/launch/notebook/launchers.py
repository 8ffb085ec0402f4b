"""`notebook_launcher` and `debug_launcher`: run a Python function on several ranks."""

from __future__ import annotations

import linecache
import os
import pickle
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.config import resolve, use_configuration
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
    """Run a function on every device of this machine, and return each rank's result.

    The function may be defined in a cell, and CUDA may have been initialized before: each rank is a new process that
    gets a pickled copy of the function, of what it uses and of its arguments. Create the Accelerator, models and data
    loaders inside it. Its result must be picklable; tensors come back on the CPU. What ranks print appears in the cell.

    A single process is not started: the function is called directly, and its exceptions propagate unchanged.

    Settings left out are detected: one process per device, or a single one without devices. No default configuration
    file is read; pass `config_file` to train as `paceline launch --config_file` would.

    Args:
        function: The function to call, as `function(*args)`.
        args: Its positional arguments.
        num_processes: Number of ranks on this machine; None starts one per device.
        mixed_precision: `no`, `bf16` or `fp16`; None leaves it to the function's Accelerator.
        use_port: Port at which the ranks meet; None or 0 chooses a free one.
        master_addr: Address of machine 0, when there are several.
        node_rank: Index of this machine, from 0.
        num_nodes: Number of machines that call this.
        rdzv_backend: How machines meet: `static` or `c10d`.
        rdzv_endpoint: `host:port`, instead of `master_addr` and `use_port`.
        rdzv_conf: Settings of the rendezvous, as a mapping or as `key=value,…`.
        rdzv_id: Accepted and ignored; machines that meet at the same address and port form one run.
        max_restarts: How often the ranks are restarted after a failure.
        monitor_interval: Seconds between two polls of the ranks.
        log_line_prefix_template: Prefix of each output line of a rank, such as `[rank ${rank}] `.
        config_file: A YAML or JSON file with further settings.

    Returns:
        The results, ordered by rank; with several machines, those of this machine's ranks.

    Raises:
        WorkerError: A rank failed; the message contains its traceback.
        KeyboardInterrupt: The cell was interrupted; all ranks have exited.
        UsageError: The function uses something that cannot be pickled.
        ConfigError: The settings cannot work here. Nothing was started.
    """
    host, _, port = rdzv_endpoint.rpartition(":") if ":" in rdzv_endpoint else (rdzv_endpoint, "", "")
    port = port or str(use_port or 0)
    count = None if num_processes is None else num_processes * num_nodes
    flags = {
        "num_processes": count,
        "mixed_precision": mixed_precision,
        "main_process_port": None if port == "0" else port,
        "main_process_ip": host or master_addr,
        "machine_rank": node_rank or None,
        "num_machines": num_nodes if num_nodes > 1 else None,
        "rdzv_backend": rdzv_backend,
        "rdzv_conf": _as_text(rdzv_conf) or None,
        "max_restarts": max_restarts or None,
        "monitor_interval": monitor_interval,
    }
    return _run(function, args, flags, config_file, log_line_prefix_template)


def _as_text(rdzv_conf: Mapping[str, Any] | str | None) -> str | None:
    if rdzv_conf is None or isinstance(rdzv_conf, str):
        return rdzv_conf
    return ",".join(f"{key}={value}" for key, value in rdzv_conf.items())


def debug_launcher(function: Callable[..., Any], args: tuple[Any, ...] = (), num_processes: int = 2) -> list[Any]:
    """Run a function on a few CPU processes, to test it on several ranks; see `notebook_launcher`.

    Args:
        function: The function to call, as `function(*args)`.
        args: Its positional arguments.
        num_processes: Number of ranks.

    Returns:
        The results, ordered by rank.

    Raises:
        WorkerError: A rank failed; the message contains its traceback.
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
    read = partial(resolve, flags=flags, env=os.environ, file=file, starts_ranks=True)
    resolved = read()
    if resolved.config.num_processes is None:
        from paceline.launch.accelerators import count_accelerators

        count = 1 if resolved.config.use_cpu else count_accelerators()[1] or 1
        resolved = read(detected={"num_processes": count})
    if resolved.config.num_processes == 1:
        with use_configuration(resolved):
            return [function(*args)]
    return _launch(function, args, resolved, template)


def _launch(function: Callable[..., Any], args: tuple[Any, ...], resolved: Resolved, template: str | None) -> list[Any]:
    from paceline.launch.command import Command
    from paceline.launch.launcher import launch
    from paceline.launch.notebook.pickling import pack_call
    from paceline.launch.notebook.pipes import RankPipes, is_stdout_redirected

    config = resolved.config
    # Ranks are assigned to machines in order.
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
                raise KeyboardInterrupt("all ranks have exited") from None
            raise
        if config.max_machines == 1:
            return [_result(result_file(folder, rank)) for rank in range(local)]
        return [_result(path) for _, path in sorted(results_in(folder))]


def _environment() -> dict[str, str]:
    """This environment, with paceline importable even where only `sys.path` contains it."""
    home = str(Path(__file__).parents[2])
    env = dict(os.environ)
    if "site-packages" not in home:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (env.get("PYTHONPATH"), home)))
    return env


def _cells() -> dict[str, list[str]]:
    """The source lines of code that is in no file, by its name in tracebacks."""
    return {name: linecache.getlines(name) for name in list(linecache.cache) if not Path(name).is_file()}


def _result(path: Path) -> Any:
    # A rank that called sys.exit(0) has saved no result.
    return pickle.loads(path.read_bytes()) if path.exists() else None
