"""What cannot go together, what nothing would read, and what this release does not carry out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from paceline.config.schema.names import places
from paceline.config.schema.rendezvous import RENDEZVOUS, RENDEZVOUS_OPTIONS, read_rendezvous_options
from paceline.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config.schema.run import RunConfig
    from paceline.config.sources.origin import Origin

_OWNERS: Final = {
    "ddp_config": ("ddp",),
    "fsdp_config": ("fsdp",),
    "deepspeed_config": ("deepspeed",),
    "megatron_lm_config": (),
    "parallelism_config": ("fsdp", "deepspeed"),
}
"""Which strategies read a section."""

_AUTO_READS: Final = ("ddp_config", "fsdp_config", "parallelism_config")
"""What the strategies that auto chooses among read."""

_NEEDS: Final = {
    "ddp_config": "distributed_type: MULTI_GPU or strategy: ddp",
    "fsdp_config": "distributed_type: FSDP or strategy: fsdp",
    "deepspeed_config": "distributed_type: DEEPSPEED",
    "megatron_lm_config": "distributed_type: MEGATRON_LM",
    "parallelism_config": "distributed_type: FSDP or strategy: fsdp",
}

_UNBUILT_TYPES: Final = {
    "XLA": "use a machine with GPUs, or use_cpu: true",
    "MEGATRON_LM": "write distributed_type: FSDP and remove megatron_lm_config",
}
_HOST_FILTERS: Final = ("deepspeed_inclusion_filter", "deepspeed_exclusion_filter")
_TPU_KEYS: Final = (
    "tpu_name",
    "tpu_zone",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "tpu_vm",
    "tpu_env",
    "downcast_bf16",
)
_TPU_KEYS_MORE: Final = ("commands", "command_file", "main_training_function")


@dataclass(frozen=True, slots=True)
class CheckContext:
    """What the checks look at.

    Attributes:
        config: The values; those that were wrong are at their defaults.
        given: Source of every key that some source set, also of those that were translated away.
        broken: Keys whose value was wrong and has been reported.
    """

    config: RunConfig
    given: Mapping[str, Origin]
    broken: frozenset[str] = frozenset()

    def where(self, *keys: str) -> str:
        """Return the source of the first of the keys that somebody set."""
        return next((self.given[key].where for key in keys if key in self.given), "")

    def asked(self, key: str) -> bool:
        """Whether somebody asked for a key's value, rather than it being detected."""
        return key in self.given and self.given[key].is_explicit

    def keys_in(self, section: str) -> list[str]:
        """List the keys of a section that somebody set, in the order of their sources."""
        return [key for key in self.given if key.startswith(f"{section}.") and self.asked(key)]

    def differs(self, key: str) -> bool:
        """Whether a top-level key was set to something other than its default."""
        return self.asked(key) and getattr(self.config, key) != places()[key].default


def find_problems(context: CheckContext) -> list[Problem]:
    """Return everything that is wrong with a whole configuration."""
    checks = (
        _unbuilt,
        _unused_sections,
        _unused_keys,
        _devices,
        _machines,
        _processes,
        _mesh,
        _mpirun,
    )
    return [problem for check in checks for problem in check(context)]


def _not_built(where: str, key: str, value: object, todo: str) -> Problem:
    return Problem(where, key, f"{value} is known but not carried out in this release", "", todo)


def _unbuilt(context: CheckContext) -> Iterator[Problem]:
    config = context.config
    if config.distributed_type in _UNBUILT_TYPES:
        todo = _UNBUILT_TYPES[config.distributed_type]
        yield _not_built(context.where("distributed_type"), "distributed_type", config.distributed_type, todo)
    elif any(map(context.differs, _TPU_KEYS + _TPU_KEYS_MORE)):
        yield from _tpu(context)
    yield from _unbuilt_values(context)
    yield from _unbuilt_sizes(context)


def _tpu(context: CheckContext) -> Iterator[Problem]:
    for key in filter(context.differs, _TPU_KEYS + _TPU_KEYS_MORE):
        value = getattr(context.config, key)
        shown = ",".join(value) if isinstance(value, tuple) else value
        yield _not_built(context.where(key), key, f"{shown} (a TPU setting)", "remove the key")


def _unbuilt_values(context: CheckContext) -> Iterator[Problem]:
    config = context.config
    if config.mixed_precision == "fp8":
        yield _not_built(context.where("mixed_precision"), "mixed_precision", "fp8", "write mixed_precision: bf16")


def _unbuilt_sizes(context: CheckContext) -> Iterator[Problem]:
    mesh = context.config.parallelism_config
    for part in ("tp", "cp", "sp") if mesh is not None else ():
        size = getattr(mesh, f"{part}_size")
        if size > 1:
            key = f"parallelism_config.parallelism_config_{part}_size"
            yield _not_built(context.where(key), key, size, "write 1 and shard by parallelism_config_dp_shard_size")


def _unused_sections(context: CheckContext) -> Iterator[Problem]:
    strategy = context.config.strategy
    if context.broken & {"strategy", "distributed_type"}:
        return
    for section, owners in _OWNERS.items():
        keys = context.keys_in(section)
        if strategy in owners or (strategy == "auto" and section in _AUTO_READS):
            continue
        if not keys or (section == "parallelism_config" and not _asks_mesh(context)):
            continue
        if section == "megatron_lm_config" and context.config.distributed_type == "MEGATRON_LM":
            continue
        names = ", ".join(key.rpartition(".")[2] for key in keys)
        chosen = context.where("strategy", "distributed_type")
        why = f"the strategy is {strategy}" + (f" ({chosen})" if chosen else "")
        hint = f"write {_NEEDS[section]}, or remove the section"
        yield Problem(context.where(keys[0]), section, f"nothing reads {names}", why, hint)


def _asks_mesh(context: CheckContext) -> bool:
    mesh = context.config.parallelism_config
    return mesh is not None and mesh.total_size > 1


def _unused_keys(context: CheckContext) -> Iterator[Problem]:
    config = context.config
    if config.max_machines == 1 and "num_machines" not in context.broken:
        for key in ("machine_rank", "main_process_ip", "rdzv_backend", "rdzv_conf", "preflight"):
            if context.differs(key):
                what = f"{getattr(config, key)} is not used"
                yield Problem(context.where(key), key, what, "there is one machine", "remove the key")
        yield from _unused_host_keys(context)
    yield from _idle_host_keys(context)
    keys = context.keys_in("fp8_config")
    if keys and config.mixed_precision != "fp8" and "mixed_precision" not in context.broken:
        names = ", ".join(key.rpartition(".")[2] for key in keys)
        why = f"mixed_precision is {config.mixed_precision}"
        yield Problem(context.where(keys[0]), "fp8_config", f"nothing reads {names}", why, "remove the section")


def _unused_host_keys(context: CheckContext) -> Iterator[Problem]:
    """What narrows a host file down, where nobody names one."""
    plugin = context.config.deepspeed_config
    if plugin is None or plugin.deepspeed_hostfile is not None or plugin.deepspeed_multinode_launcher == "standard":
        return
    for name in _HOST_FILTERS:
        if getattr(plugin, name) is not None:
            key = f"deepspeed_config.{name}"
            what = f"{getattr(plugin, name)} is not used"
            yield Problem(context.where(key), key, what, "there is one machine", "set deepspeed_hostfile, or remove it")


def _idle_host_keys(context: CheckContext) -> Iterator[Problem]:
    """A host file beside the one launcher that does not read it."""
    plugin = context.config.deepspeed_config
    if plugin is None or plugin.deepspeed_multinode_launcher != "standard":
        return
    why = f"deepspeed_multinode_launcher is standard ({context.where('deepspeed_config.deepspeed_multinode_launcher')})"
    for name in ("deepspeed_hostfile", *_HOST_FILTERS):
        value, key = getattr(plugin, name), f"deepspeed_config.{name}"
        if value is not None:
            hint = "choose a launcher that reads it, such as pdsh, or remove it"
            yield Problem(context.where(key), key, f"{value} is not used", why, hint)


def _devices(context: CheckContext) -> Iterator[Problem]:
    config = context.config
    named = config.distributed_type or ""
    if config.use_cpu and named.startswith("MULTI_") and named != "MULTI_CPU" and context.asked("use_cpu"):
        why = f"{context.where('distributed_type')} has distributed_type {named}, which trains on devices"
        hint = "write distributed_type: MULTI_CPU, or remove use_cpu"
        yield Problem(context.where("use_cpu"), "use_cpu", "true cannot be carried out", why, hint)
    ids = config.gpu_ids
    if ids is None or ids == "all":
        return
    if config.use_cpu:
        why = f"use_cpu is true ({context.where('use_cpu')})"
        yield Problem(context.where("gpu_ids"), "gpu_ids", f"{ids} is not used", why, "remove one of the two")
        return
    machines, count = config.max_machines, len(ids.split(","))
    if (config.num_processes or 0) > count * machines and context.asked("num_processes"):
        among = f", for {machines} machines together" if machines > 1 else ""
        why = f"num_processes is {config.num_processes} ({context.where('num_processes')}){among}"
        hint = f"list as many devices as a machine has processes, or set num_processes to {count * machines}"
        yield Problem(context.where("gpu_ids"), "gpu_ids", f"{ids} names {count} devices", why, hint)


def _machines(context: CheckContext) -> Iterator[Problem]:
    """What torch elastic needs to bring several machines together."""
    config = context.config
    if config.max_machines == 1 or config.spans_machines or "num_machines" in context.broken:
        return
    if config.mpirun_config is not None:
        return  # mpirun brings them together
    most = config.max_machines
    if config.rdzv_backend not in RENDEZVOUS:
        is_torchs = config.rdzv_backend in ("etcd", "etcd-v2")
        fate = "is known but not carried out in this release" if is_torchs else "is no rendezvous of torch elastic"
        what = f"{config.rdzv_backend} {fate}"
        hint = "write static, or c10d for machines that come and go"
        yield Problem(context.where("rdzv_backend"), "rdzv_backend", what, "", hint)
    elif config.min_machines != most and config.rdzv_backend != "c10d":
        why = f"num_machines is {config.num_machines} ({context.where('num_machines')})"
        what = "static keeps every machine to the end"
        where = context.where("rdzv_backend", "num_machines")
        yield Problem(where, "rdzv_backend", what, why, "write c10d, or one number of machines")
    if config.machine_rank >= most:
        what = f"{config.machine_rank} is no machine of {most}"
        yield Problem(context.where("machine_rank"), "machine_rank", what, "they count from 0", "")
    count = config.num_processes
    if count is not None and count % most and context.asked("num_processes"):
        what = f"{count} cannot be divided among {most} machines"
        why = "num_processes counts the processes of all machines"
        hint = f"write a multiple of {most}, or leave it out: each machine then starts one for each of its devices"
        yield Problem(context.where("num_processes"), "num_processes", what, why, hint)
    yield from _rendezvous_options(context)


def _rendezvous_options(context: CheckContext) -> Iterator[Problem]:
    try:
        read_rendezvous_options(context.config.rdzv_conf)
    except ValueError as error:
        where = context.where("rdzv_conf")
        yield Problem(where, "rdzv_conf", str(error), "", f"known are {', '.join(RENDEZVOUS_OPTIONS)}")


def _mpirun(context: CheckContext) -> Iterator[Problem]:
    keys = context.keys_in("mpirun_config")
    if not keys or context.config.use_cpu or context.broken & {"use_cpu", "distributed_type"}:
        return
    names = ", ".join(key.rpartition(".")[2] for key in keys)
    why = "mpirun starts ranks that train on CPUs"
    hint = "write distributed_type: MULTI_CPU, or remove the section"
    yield Problem(context.where(keys[0]), "mpirun_config", f"nothing reads {names}", why, hint)


def _processes(context: CheckContext) -> Iterator[Problem]:
    config = context.config
    count = config.num_processes
    if config.strategy == "single" and count is not None and count > 1:
        chosen = "distributed_type" if context.asked("distributed_type") else "strategy"
        value = getattr(config, chosen)
        why = f"{context.where(chosen)} has {chosen} {value}, which is one process"
        hint = "write strategy: ddp, or num_processes: 1"
        yield Problem(context.where("num_processes"), "num_processes", f"{count} cannot be carried out", why, hint)


def _mesh(context: CheckContext) -> Iterator[Problem]:
    mesh, count = context.config.parallelism_config, context.config.num_processes
    if mesh is None or count is None or mesh.total_size in (1, count):
        return
    if max(mesh.tp_size, mesh.cp_size, mesh.sp_size) > 1:
        return  # reported as not built
    prefix = "parallelism_config.parallelism_config_"
    key = next((k for k in context.keys_in("parallelism_config") if k.endswith("_size")), "parallelism_config")
    processes = f"num_processes is {count} ({context.where('num_processes')})"
    if not context.asked(f"{prefix}dp_shard_size"):
        if count % mesh.dp_replicate_size:
            what = f"{mesh.dp_replicate_size} copies cannot share the processes out evenly"
            hint = f"choose a divisor of {count}"
            yield Problem(context.where(key), f"{prefix}dp_replicate_size", what, processes, hint)
        return
    sizes = f"dp_replicate_size {mesh.dp_replicate_size} times dp_shard_size {mesh.dp_shard_size}"
    what = f"{sizes} is {mesh.total_size}"
    yield Problem(context.where(key), "parallelism_config", what, processes, "choose sizes whose product is that")
