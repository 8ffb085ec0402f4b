"""Finds settings that contradict each other, that no part of the run reads, or that this release does not support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from paceline.config.leniency import STRICT
from paceline.config.packages import missing_packages
from paceline.config.schema.names import TPU_KEYS, all_settings
from paceline.config.schema.rendezvous import RENDEZVOUS, RENDEZVOUS_OPTIONS, read_rendezvous_options
from paceline.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config.leniency import Leniency
    from paceline.config.schema.run import RunConfig
    from paceline.config.sources.origin import Origin

__all__ = ["CheckContext", "find_problems"]


@dataclass(frozen=True, slots=True)
class _Readers:
    """Which strategies read a section, and what to write so that one of them is chosen."""

    strategies: tuple[str, ...]
    needs: str


_SECTIONS: Final = {
    "ddp_config": _Readers(("ddp", "auto"), "distributed_type: MULTI_GPU or strategy: ddp"),
    "fsdp_config": _Readers(("fsdp", "auto"), "distributed_type: FSDP or strategy: fsdp"),
    "deepspeed_config": _Readers(("deepspeed",), "distributed_type: DEEPSPEED"),
    "megatron_lm_config": _Readers((), "distributed_type: MEGATRON_LM"),
    "parallelism_config": _Readers(("fsdp", "deepspeed", "auto"), "distributed_type: FSDP or strategy: fsdp"),
}
"""`auto` chooses among single, ddp and fsdp, and hands them their sections."""

_UNSUPPORTED_TYPES: Final = {
    "XLA": "use a machine with GPUs, or use_cpu: true",
    "MEGATRON_LM": "write distributed_type: FSDP and remove megatron_lm_config",
}
_MULTI_NODE_KEYS: Final = ("machine_rank", "main_process_ip", "rdzv_backend", "rdzv_conf", "preflight")
_HOST_FILTERS: Final = ("deepspeed_inclusion_filter", "deepspeed_exclusion_filter")
_MESH: Final = "parallelism_config.parallelism_config_"


@dataclass(frozen=True, slots=True)
class CheckContext:
    """What the checks look at.

    Attributes:
        config: The values; those that were wrong are at their defaults.
        given: Source of every key that some source set, also of those that were translated away.
        invalid: Keys whose value was wrong and has been reported.
        leniency: What is tolerated.
        starts_ranks: Whether ranks are about to be started here, which need their packages.
    """

    config: RunConfig
    given: Mapping[str, Origin]
    invalid: frozenset[str] = frozenset()
    leniency: Leniency = STRICT
    starts_ranks: bool = False

    def where(self, *keys: str) -> str:
        """Return the source of the first of the keys that is set."""
        return next((self.given[key].where for key in keys if key in self.given), "")

    def is_explicit(self, key: str) -> bool:
        """Whether a flag, variable, file or argument sets the key, rather than it being detected."""
        return key in self.given and self.given[key].is_explicit

    def keys_in(self, section: str) -> list[str]:
        """List the explicit keys of a section, in the order of their sources."""
        return [key for key in self.given if key.startswith(f"{section}.") and self.is_explicit(key)]

    def differs(self, key: str) -> bool:
        """Whether a top-level key is explicit and not at its default."""
        return self.is_explicit(key) and getattr(self.config, key) != all_settings()[key].default

    def problem(self, key: str, what: str, why: str = "", hint: str = "") -> Problem:
        """Make a problem at the source of a key."""
        return Problem(self.where(key), key, what, why, hint)

    def unused(self, section: str, why: str, hint: str) -> Iterator[Problem]:
        """Yield a problem for the keys of a section that no part of the run reads, if there are any."""
        keys = self.keys_in(section)
        if self.leniency.unread_settings:
            keys = [key for key in keys if self.given[key].kind != "argument"]
        if keys:
            names = ", ".join(key.rpartition(".")[2] for key in keys)
            yield Problem(self.where(keys[0]), section, f"unused settings: {names}", why, hint)


def find_problems(context: CheckContext) -> list[Problem]:
    """Return everything that is wrong with a whole configuration."""
    checks = (
        _unsupported_type,
        _fp8_needs,
        _two_ways_to_recompute,
        _unsupported_mesh,
        _unused_sections,
        _unused_multi_node_keys,
        _unused_host_filters,
        _unread_host_file,
        _unused_fp8,
        _cpu_under_a_device_type,
        _devices_on_the_cpu,
        _too_few_devices,
        _rendezvous_backend,
        _machine_rank,
        _processes_per_machine,
        _rendezvous_options,
        _single_process,
        _copies,
        _mesh_sizes,
        _mpirun_without_cpu,
        _missing_packages,
    )
    return [problem for check in checks for problem in check(context)]


# What this release does not support


def _unsupported(context: CheckContext, key: str, value: object, hint: str) -> Problem:
    return context.problem(key, f"{value} is not supported in this release", hint=hint)


def _unsupported_type(context: CheckContext) -> Iterator[Problem]:
    named = context.config.distributed_type
    if named in _UNSUPPORTED_TYPES:
        yield _unsupported(context, "distributed_type", named, _UNSUPPORTED_TYPES[named])
        return
    for key in filter(context.differs, TPU_KEYS):
        value = getattr(context.config, key)
        shown = value
        if isinstance(value, tuple):
            shown = ",".join(value)
        yield _unsupported(context, key, f"{shown} (a TPU setting)", "remove the key")


def _fp8_needs(context: CheckContext) -> Iterator[Problem]:
    """Report what fp8 cannot be combined with."""
    config = context.config
    if config.mixed_precision != "fp8":
        return
    if config.strategy == "deepspeed":
        why = f"DeepSpeed's engine computes in bf16 or fp16 ({context.where('strategy', 'distributed_type')})"
        yield context.problem("mixed_precision", "fp8 under strategy deepspeed", why, "write strategy: fsdp, or bf16")
    dynamo, settings = config.dynamo_config, config.fp8_config
    emulates = settings is not None and settings.emulate
    if config.use_cpu and not emulates:
        why = f"use_cpu is true ({context.where('use_cpu')}), and fp8 needs an NVIDIA GPU"
        yield context.problem("mixed_precision", "fp8 on the CPU", why, "write mixed_precision: bf16")
    if (dynamo.backend == "no" or dynamo.disable) and not emulates:
        key = "dynamo_config.dynamo_disable" if dynamo.disable else "dynamo_config.dynamo_backend"
        where = context.where(key, "mixed_precision")
        why = "without torch.compile, scaling and rounding cost more than fp8 products save"
        hint = "remove the key: fp8 compiles the model's blocks by itself; or write mixed_precision: bf16"
        yield Problem(where, "mixed_precision", "fp8 with torch.compile turned off", why, hint)


def _two_ways_to_recompute(context: CheckContext) -> Iterator[Problem]:
    fsdp, dynamo = context.config.fsdp_config, context.config.dynamo_config
    if fsdp is not None and fsdp.activation_checkpointing and dynamo.activation_memory_budget < 1:
        key = "dynamo_config.dynamo_activation_memory_budget"
        what = f"{dynamo.activation_memory_budget:g} with fsdp_activation_checkpointing"
        why = "a checkpointed block keeps its input only, so there is nothing left to choose from"
        yield context.problem(key, what, why, "set one of them")


def _unsupported_mesh(context: CheckContext) -> Iterator[Problem]:
    mesh = context.config.parallelism_config
    for part in ("tp", "cp", "sp") if mesh is not None else ():
        size = getattr(mesh, f"{part}_size")
        if size > 1:
            hint = "write 1, and shard with parallelism_config_dp_shard_size"
            if part == "sp":
                hint = f"{hint}; or {_sequence_parallelism(context.config, size)}"
            yield _unsupported(context, f"{_MESH}{part}_size", size, hint)


def _sequence_parallelism(config: RunConfig, size: int) -> str:
    """How a run divides sequences: what Accelerate's scripts say themselves is not a setting of the launcher."""
    needed = []
    if not config.as_accelerate:
        needed.append("--as_accelerate")
    if config.strategy != "deepspeed":
        needed.append("--use_deepspeed")
    start = f"start with {' '.join(needed)}, " if needed else ""
    return (
        f"leave it out, {start}and let the script pass ParallelismConfig(sp_size={size}) to its Accelerator "
        "(Ulysses attention, for models of transformers)"
    )


# What no part of the run reads


def _unused_sections(context: CheckContext) -> Iterator[Problem]:
    config = context.config
    if context.invalid & {"strategy", "distributed_type"}:
        return
    chosen = context.where("strategy", "distributed_type")
    why = f"the strategy is {config.strategy}" + (f" ({chosen})" if chosen else "")
    for section, readers in _SECTIONS.items():
        is_read = config.strategy in readers.strategies
        is_reported = section == "megatron_lm_config" and config.distributed_type == "MEGATRON_LM"
        is_trivial = section == "parallelism_config" and not _divides_ranks(config)
        if not (is_read or is_reported or is_trivial):
            yield from context.unused(section, why, f"write {readers.needs}, or remove the section")


def _divides_ranks(config: RunConfig) -> bool:
    return config.parallelism_config is not None and config.parallelism_config.total_size > 1


def _has_one_machine(context: CheckContext) -> bool:
    return context.config.max_machines == 1 and "num_machines" not in context.invalid


def _unused_multi_node_keys(context: CheckContext) -> Iterator[Problem]:
    if _has_one_machine(context):
        for key in filter(context.differs, _MULTI_NODE_KEYS):
            what = f"{getattr(context.config, key)} is not used"
            yield context.problem(key, what, "there is one machine", "remove the key")


def _unused_host_filters(context: CheckContext) -> Iterator[Problem]:
    """Report filters of a host file where no host file is named."""
    plugin = context.config.deepspeed_config
    if plugin is None or not _has_one_machine(context):
        return
    if plugin.deepspeed_hostfile is not None or plugin.deepspeed_multinode_launcher == "standard":
        return
    for name, value in _set_fields(plugin, _HOST_FILTERS):
        hint = "set deepspeed_hostfile, or remove it"
        yield context.problem(f"deepspeed_config.{name}", f"{value} is not used", "there is one machine", hint)


def _unread_host_file(context: CheckContext) -> Iterator[Problem]:
    """Report a host file under the one launcher that does not read it."""
    plugin = context.config.deepspeed_config
    if plugin is None or plugin.deepspeed_multinode_launcher != "standard":
        return
    why = f"deepspeed_multinode_launcher is standard ({context.where('deepspeed_config.deepspeed_multinode_launcher')})"
    hint = "choose a launcher that reads it, such as pdsh, or remove it"
    for name, value in _set_fields(plugin, ("deepspeed_hostfile", *_HOST_FILTERS)):
        yield context.problem(f"deepspeed_config.{name}", f"{value} is not used", why, hint)


def _set_fields(section: object, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name in names:
        value = getattr(section, name)
        if value is not None:
            yield name, value


def _unused_fp8(context: CheckContext) -> Iterator[Problem]:
    precision = context.config.mixed_precision
    # What the script says instead leaves the launcher's section unread: an adapter computes fp8 by itself.
    origin = context.given.get("mixed_precision")
    is_replaced = context.leniency.script_wins and origin is not None and origin.kind == "argument"
    if precision != "fp8" and "mixed_precision" not in context.invalid and not is_replaced:
        yield from context.unused("fp8_config", f"mixed_precision is {precision}", "remove the section")


# Devices


def _cpu_under_a_device_type(context: CheckContext) -> Iterator[Problem]:
    config = context.config
    named = config.distributed_type or ""
    names_devices = named.startswith("MULTI_") and named != "MULTI_CPU"
    if config.use_cpu and names_devices and context.is_explicit("use_cpu"):
        what = f"true conflicts with distributed_type {named}"
        why = f"that type trains on devices ({context.where('distributed_type')})"
        yield context.problem("use_cpu", what, why, "write distributed_type: MULTI_CPU, or remove use_cpu")


def _devices_on_the_cpu(context: CheckContext) -> Iterator[Problem]:
    ids = context.config.gpu_ids
    if ids not in (None, "all") and context.config.use_cpu:
        why = f"use_cpu is true ({context.where('use_cpu')})"
        yield context.problem("gpu_ids", f"{ids} is not used", why, "remove one of the two")


def _too_few_devices(context: CheckContext) -> Iterator[Problem]:
    config, ids = context.config, context.config.gpu_ids
    if ids is None or ids == "all" or config.use_cpu or not context.is_explicit("num_processes"):
        return
    machines, count = config.max_machines, len(ids.split(","))
    if (config.num_processes or 0) > count * machines:
        total = f" over {machines} machines" if machines > 1 else ""
        why = f"num_processes is {config.num_processes} ({context.where('num_processes')}){total}"
        hint = f"list one device for each process of a machine, or set num_processes to {count * machines}"
        yield context.problem("gpu_ids", f"{ids} names {count} devices", why, hint)


# Machines, as torch elastic needs them: mpirun and DeepSpeed's launcher have their own way to join machines


def _uses_elastic(context: CheckContext) -> bool:
    config = context.config
    other = config.spans_machines or config.mpirun_config is not None
    return config.max_machines > 1 and not other and "num_machines" not in context.invalid


def _rendezvous_backend(context: CheckContext) -> Iterator[Problem]:
    config = context.config
    if not _uses_elastic(context):
        return
    if config.rdzv_backend not in RENDEZVOUS:
        is_known = config.rdzv_backend in ("etcd", "etcd-v2")
        reason = "is not supported in this release" if is_known else "is not a rendezvous backend of torch elastic"
        hint = "write static, or c10d for machines that come and go"
        yield context.problem("rdzv_backend", f"{config.rdzv_backend} {reason}", hint=hint)
    elif config.min_machines != config.max_machines and config.rdzv_backend != "c10d":
        why = f"num_machines is {config.num_machines} ({context.where('num_machines')})"
        what = "static needs every machine until the end"
        where = context.where("rdzv_backend", "num_machines")
        yield Problem(where, "rdzv_backend", what, why, "write c10d, or one number of machines")


def _machine_rank(context: CheckContext) -> Iterator[Problem]:
    rank, machines = context.config.machine_rank, context.config.max_machines
    if _uses_elastic(context) and rank >= machines:
        what, hint = f"{rank} with {machines} machines", f"write 0 to {machines - 1}"
        yield context.problem("machine_rank", what, "they count from 0", hint)


def _processes_per_machine(context: CheckContext) -> Iterator[Problem]:
    count, machines = context.config.num_processes, context.config.max_machines
    if count is not None and count % machines and context.is_explicit("num_processes") and _uses_elastic(context):
        what = f"{count} cannot be divided among {machines} machines"
        why = "num_processes counts the processes of all machines"
        hint = f"write a multiple of {machines}, or leave it out: each machine then starts one for each of its devices"
        yield context.problem("num_processes", what, why, hint)


def _rendezvous_options(context: CheckContext) -> Iterator[Problem]:
    if not _uses_elastic(context):
        return
    try:
        read_rendezvous_options(context.config.rdzv_conf)
    except ValueError as error:
        yield context.problem("rdzv_conf", str(error), hint=f"the options are {', '.join(RENDEZVOUS_OPTIONS)}")


# Processes


def _single_process(context: CheckContext) -> Iterator[Problem]:
    config, count = context.config, context.config.num_processes
    if config.strategy == "single" and count is not None and count > 1:
        chosen = "strategy"
        if context.is_explicit("distributed_type"):
            chosen = "distributed_type"
        value = getattr(config, chosen)
        what = f"{count} conflicts with {chosen} {value}"
        why = f"{context.where(chosen)} has {chosen} {value}, which is one process"
        yield context.problem("num_processes", what, why, "write strategy: ddp, or num_processes: 1")


def _checked_mesh(context: CheckContext) -> tuple[Any, int, str] | None:
    """Return the mesh, the number of processes and the key to report at; None where the sizes fit or are unknown."""
    mesh, count = context.config.parallelism_config, context.config.num_processes
    if mesh is None or count is None or mesh.total_size in (1, count):
        return None
    if max(mesh.tp_size, mesh.cp_size, mesh.sp_size) > 1:
        return None  # reported as not supported
    sizes = (key for key in context.keys_in("parallelism_config") if key.endswith("_size"))
    return mesh, count, context.where(next(sizes, "parallelism_config"))


def _copies(context: CheckContext) -> Iterator[Problem]:
    checked = _checked_mesh(context)
    if checked is None or context.is_explicit(f"{_MESH}dp_shard_size"):
        return
    mesh, count, where = checked
    if count % mesh.dp_replicate_size:
        what = f"{mesh.dp_replicate_size} copies cannot divide the processes evenly"
        why = f"num_processes is {count} ({context.where('num_processes')})"
        yield Problem(where, f"{_MESH}dp_replicate_size", what, why, f"choose a divisor of {count}")


def _mesh_sizes(context: CheckContext) -> Iterator[Problem]:
    checked = _checked_mesh(context)
    if checked is None or not context.is_explicit(f"{_MESH}dp_shard_size"):
        return
    mesh, count, where = checked
    sizes = f"dp_replicate_size {mesh.dp_replicate_size} times dp_shard_size {mesh.dp_shard_size}"
    why = f"num_processes is {count} ({context.where('num_processes')})"
    yield Problem(where, "parallelism_config", f"{sizes} is {mesh.total_size}", why, f"sizes must multiply to {count}")


def _mpirun_without_cpu(context: CheckContext) -> Iterator[Problem]:
    if not context.config.use_cpu and not context.invalid & {"use_cpu", "distributed_type"}:
        hint = "write distributed_type: MULTI_CPU, or remove the section"
        yield from context.unused("mpirun_config", "mpirun starts ranks that train on CPUs", hint)


def _missing_packages(context: CheckContext) -> Iterator[Problem]:
    if context.starts_ranks:
        yield from missing_packages(context.config, context.given)
