"""Functions as ranks: of a notebook, or of a test on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paceline import launch
from paceline.compat.accelerate.state import PartialState

__all__ = ["debug_launcher", "notebook_launcher", "test_launch"]


def test_launch() -> None:
    """Make a `PartialState`."""
    PartialState()


def notebook_launcher(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str = "29500",
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: Mapping[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> None:
    """Run a function on every device of this machine.

    Args:
        function: Called as `function(*args)`, in processes of its own if there are several.
        args: Its arguments.
        num_processes: Number of ranks; None starts one per device.
        mixed_precision: `no`, `bf16` or `fp16`; `no` leaves it to the function's Accelerator.
        use_port: Port at which the ranks meet.
        master_addr: Address of machine 0.
        node_rank: Index of this machine.
        num_nodes: Number of machines.
        rdzv_backend: How machines meet: `static` or `c10d`.
        rdzv_endpoint: `host:port`, instead of `master_addr` and `use_port`.
        rdzv_conf: Settings of the rendezvous.
        rdzv_id: Accepted and ignored.
        max_restarts: How often the ranks are restarted after a failure.
        monitor_interval: Seconds between two polls of the ranks.
        log_line_prefix_template: Prefix of each line that a rank prints.
    """
    launch.notebook_launcher(
        function,
        args,
        num_processes=num_processes,
        mixed_precision=None if mixed_precision == "no" else mixed_precision,
        use_port=use_port,
        master_addr=master_addr,
        node_rank=node_rank,
        num_nodes=num_nodes,
        rdzv_backend=rdzv_backend,
        rdzv_endpoint=rdzv_endpoint,
        rdzv_conf=rdzv_conf,
        rdzv_id=rdzv_id,
        max_restarts=max_restarts,
        monitor_interval=monitor_interval,
        log_line_prefix_template=log_line_prefix_template,
    )


def debug_launcher(function: Callable[..., Any], args: tuple[Any, ...] = (), num_processes: int = 2) -> None:
    """Run a function on a few CPU processes.

    Args:
        function: Called as `function(*args)`.
        args: Its arguments.
        num_processes: Number of ranks.
    """
    launch.debug_launcher(function, args, num_processes)
