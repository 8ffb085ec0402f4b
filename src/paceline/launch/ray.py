"""Ranks as workers of a Ray cluster: a Ray Train `TorchTrainer` whose workers get the configuration.

Ray starts the workers, assigns their ranks and opens their process group; `Accelerator()` in the training loop uses
both. Ray is imported only when `ray_trainer` is called.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from paceline.config import Detected, find_config_file, resolve
from paceline.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from paceline.config import Resolved

__all__ = ["ray_trainer"]


def ray_trainer(
    train_loop: Callable[..., Any],
    *,
    num_workers: int,
    use_gpu: bool = False,
    settings: Mapping[str, object] | None = None,
    config_file: Path | None = None,
    run_config: Any = None,
    **options: Any,
) -> Any:
    """Return a `ray.train.torch.TorchTrainer` that runs `train_loop` as one rank on each worker.

    Args:
        train_loop: Called on every worker, as Ray's `train_loop_per_worker`; it creates an `Accelerator()`.
        num_workers: Number of ranks.
        use_gpu: Give each rank a GPU; otherwise all train on the CPU.
        settings: Values as flags of `paceline launch` would give them, such as `{"mixed_precision": "bf16"}`.
        config_file: The configuration file; None uses the default file if there is one.
        run_config: Ray's `RunConfig`.
        options: Any other argument of `TorchTrainer`, such as `train_loop_config`.

    Returns:
        The `TorchTrainer`; call its `fit()` to train.

    Raises:
        ConfigError: The configuration cannot work, or contradicts the workers; the error lists every problem.
        MissingExtraError: Ray Train is not installed.
    """
    resolved = _resolve(num_workers, use_gpu, settings or {}, config_file)
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise MissingExtraError("ray[train]", "ray", "ray_trainer") from error
    options.setdefault("scaling_config", ScalingConfig(num_workers=num_workers, use_gpu=use_gpu))
    # Python objects and checkpoints are exchanged on the CPU, through gloo beside the device's own backend.
    timeout = {} if resolved.config.timeout is None else {"timeout_s": int(resolved.config.timeout)}
    backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
    options.setdefault("torch_config", TorchConfig(backend=backend, **timeout))
    return TorchTrainer(train_loop, run_config=_with_config(run_config or RunConfig(), resolved), **options)


def _resolve(num_workers: int, use_gpu: bool, settings: Mapping[str, object], config_file: Path | None) -> Resolved:
    from paceline.launch.clusters.cluster import Cluster, check_against

    values = {"num_processes": Detected(num_workers, "ray_trainer(num_workers=…)")}
    if not use_gpu:
        values["use_cpu"] = Detected(True, "ray_trainer(use_gpu=False)")
    file = find_config_file(os.environ, config_file)
    resolved = resolve(flags=settings, env=os.environ, file=file, detected=values)
    check_against(Cluster(scheduler="Ray", task="rank", values=values), resolved)
    return resolved


def _with_config(run_config: Any, resolved: Resolved) -> Any:
    """Pass the configuration to the workers as the launcher does, in their environment only."""
    environment = dict(run_config.worker_runtime_env or {})
    variables = {**environment.get("env_vars", {}), "PACELINE_CONFIG": resolved.to_json()}
    return dataclasses.replace(run_config, worker_runtime_env={**environment, "env_vars": variables})
