"""Configuration files as people have them, and a way to resolve one from its text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paceline.config import Resolved, resolve
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FOUNDING = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
  fsdp_cpu_offload: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_activation_checkpointing: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
mixed_precision: bf16
num_machines: 1
num_processes: 4
"""

ANSWERS = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: {distributed_type}
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: {num_processes}
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: {use_cpu}
{rest}"""

FSDP1 = """\
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_cpu_ram_efficient_loading: true
  fsdp_forward_prefetch: false
  fsdp_offload_params: true
  fsdp_reshard_after_forward: SHARD_GRAD_OP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_sync_module_states: true
  fsdp_use_orig_params: true
  fsdp_version: 1
"""

DEEPSPEED = """\
deepspeed_config:
  gradient_accumulation_steps: 1
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
"""


def answers(distributed_type: str, rest: str = "", num_processes: int = 2, use_cpu: str = "false") -> str:
    """Write a file as the questions of Accelerate's `config` command leave it."""
    return ANSWERS.format(distributed_type=distributed_type, rest=rest, num_processes=num_processes, use_cpu=use_cpu)


def read(
    folder: Path,
    text: str | None,
    flags: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
    detected: Mapping[str, object] | None = None,
) -> Resolved:
    """Resolve a file with this text, and other sources."""
    file = None if text is None else folder / "config.yaml"
    if file is not None and text is not None:
        file.write_text(text, encoding="utf-8")
    return resolve(flags=flags or {}, env=env or {}, file=file, detected=detected)


def problems(
    folder: Path,
    text: str | None,
    flags: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
) -> list[Problem]:
    """Return the problems of a configuration; file names are cut to `config.yaml:LINE`."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text, flags, env)
    cut = f"{folder}/"
    return [
        Problem(*(part.replace(cut, "") for part in (p.where, p.key, p.what, p.why, p.hint)))
        for p in caught.value.problems
    ]
