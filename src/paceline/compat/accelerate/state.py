"""The process-wide states: this process, the run, and the gradients.

Every instance of a class shares one dict, `_shared_state`; `_reset_state` empties it. paceline itself has no such
states: these describe to programs what the core holds as values.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.distributed as dist

from paceline.collectives import Group, SoloGroup, TorchGroup, main_process_first, split_between_processes
from paceline.compat.accelerate.settings.enums import DistributedType, DynamoBackend
from paceline.compat.accelerate.settings.errors import InvalidValueError, UnsupportedError
from paceline.compat.accelerate.settings.variables import parse_choice_from_env, parse_flag_from_env
from paceline.environment.device import choose_device
from paceline.environment.process_group import open_process_group
from paceline.environment.world import World
from paceline.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.compat.accelerate.parallelism_config import ParallelismConfig
    from paceline.compat.accelerate.settings.deepspeed import DeepSpeedPlugin
    from paceline.compat.accelerate.settings.fsdp import FullyShardedDataParallelPlugin
    from paceline.compat.accelerate.settings.plugins import GradientAccumulationPlugin, TorchDynamoPlugin

__all__ = ["AcceleratorState", "GradientState", "PartialState", "current_group", "is_initialized"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

# The names of several devices of a vendor, by torch's name of the device; others are called MULTI_<DEVICE>.
_BY_DEVICE = {"cuda": DistributedType.MULTI_GPU}
_GROUP_ARGUMENTS = frozenset({"backend", "init_method", "timeout"})


def is_initialized() -> bool:
    """Whether there is an `AcceleratorState`."""
    return AcceleratorState._shared_state != {}


def current_group() -> Group:
    """Return the ranks of this run, for the core's collectives."""
    state = PartialState()
    if state.num_processes == 1 and not dist.is_initialized():
        return SoloGroup(state.device)
    return TorchGroup(state.device)


class PartialState:
    """This process: its rank, its device, and the process group, which the first instance opens.

    Collective on the first call: every rank must make it.

    Args:
        cpu: Run on the CPU even if there is an accelerator.
        **kwargs: `backend`, `init_method` and `timeout` of the process group.

    Attributes:
        device: This rank's device.
        distributed_type: How the run is distributed.
        backend: The backend of the process group; None without one.
        num_processes: The number of ranks.
        process_index: This rank.
        local_process_index: Its number on this machine.
        debug: Whether collectives compare what the ranks pass.
        fork_launched: Whether a notebook started this process.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    _known_attrs: ClassVar[list[str]] = [
        "_cpu",
        "_mixed_precision",
        "_shared_state",
        "backend",
        "debug",
        "device",
        "distributed_type",
        "fork_launched",
        "local_process_index",
        "num_processes",
        "process_index",
    ]

    device: torch.device
    distributed_type: DistributedType
    backend: str | None
    num_processes: int
    process_index: int
    local_process_index: int
    debug: bool
    fork_launched: bool
    _cpu: bool

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        self.__dict__ = self._shared_state
        if not self.initialized:
            fields = _open_process(cpu, kwargs)
            self._shared_state.update(fields)
        self.fork_launched = parse_flag_from_env("FORK_LAUNCHED")

    def __repr__(self) -> str:
        backend = f"  Backend: {self.backend}" if self.backend else ""
        lines = {
            "Distributed environment": f"{self.distributed_type}{backend}",
            "Num processes": self.num_processes,
            "Process index": self.process_index,
            "Local process index": self.local_process_index,
            "Device": self.device,
        }
        return "".join(f"{name}: {value}\n" for name, value in lines.items())

    def __getattr__(self, name: str) -> Any:
        raise _missing_attribute(type(self).__name__, name, self._known_attrs)

    @staticmethod
    def _reset_state() -> None:
        PartialState._shared_state.clear()

    @property
    def initialized(self) -> bool:
        """Whether there is a state."""
        return self._shared_state != {}

    @property
    def use_distributed(self) -> bool:
        """Whether there are several ranks."""
        return self.distributed_type != DistributedType.NO and self.num_processes > 1

    @property
    def is_last_process(self) -> bool:
        """Whether this is the highest rank."""
        return self.process_index == self.num_processes - 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.local_process_index == 0

    @property
    def default_device(self) -> torch.device:
        """The type of device of a single process."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device(accelerator.type) if accelerator is not None else torch.device("cpu")

    def set_device(self) -> None:
        """Choose this rank's device, unless it has one."""
        if self._shared_state.get("device") is None:
            self.device = choose_device(World.read(os.environ), cpu=self._cpu)

    def wait_for_everyone(self) -> None:
        """Return when every rank has arrived. Collective: every rank must call it."""
        if self.use_distributed:
            current_group().barrier()

    def destroy_process_group(self, group: dist.ProcessGroup | None = None) -> None:
        """Close a process group, by default that of all ranks; a notebook's own group stays open."""
        if dist.is_initialized() and not (self.fork_launched and group is None):
            dist.destroy_process_group(group)

    def split_between_processes(self, inputs: T, apply_padding: bool = False) -> AbstractContextManager[T]:
        """Give each rank a contiguous part of `inputs`; the first ranks get one more of what is left over.

        Args:
            inputs: A list, tuple, tensor or dataset, or a dict of those; the same on all ranks.
            apply_padding: Give every rank the same number, by repeating its last input.
        """
        if not self.use_distributed:
            return nullcontext(inputs)
        return split_between_processes(current_group(), inputs, apply_padding)

    def main_process_first(self) -> AbstractContextManager[None]:
        """Run the block on rank 0, then on the others. Collective: every rank must enter it."""
        return main_process_first(current_group(), self.is_main_process)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """Run the block on the first rank of each machine, then on its others. Collective: every rank must enter it."""
        machine = (self.process_index - self.local_process_index) if self.use_distributed else 0
        return main_process_first(current_group(), self.is_local_main_process, f"machine/{machine}")

    def on_main_process(self, function: F | None = None) -> F:
        """Make a function run on rank 0 only; elsewhere it returns None. Without a function, return a decorator."""
        return self._only_if(lambda: self.is_main_process, function)

    def on_local_main_process(self, function: F | None = None) -> F:
        """Make a function run on the first rank of each machine only."""
        return self._only_if(lambda: self.is_local_main_process, function)

    def on_last_process(self, function: F) -> F:
        """Make a function run on the highest rank only."""
        return self._only_if(lambda: self.is_last_process, function)

    def on_process(self, function: F | None = None, process_index: int | None = None) -> F:
        """Make a function run on one rank only; without a function, return a decorator."""
        if function is None:
            return partial(self.on_process, process_index=process_index)  # type: ignore[return-value]
        return self._only_if(lambda: self.process_index == process_index, function)

    def on_local_process(self, function: F | None = None, local_process_index: int | None = None) -> F:
        """Make a function run on one rank of each machine only; without a function, return a decorator."""
        if function is None:
            return partial(self.on_local_process, local_process_index=local_process_index)  # type: ignore[return-value]
        return self._only_if(lambda: self.local_process_index == local_process_index, function)

    def _only_if(self, applies: Callable[[], bool], function: F | None) -> F:
        """A single process runs everything, whatever rank is named."""
        if function is None:
            return partial(self._only_if, applies)  # type: ignore[return-value]

        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if applies() or not self.use_distributed else None

        return limited  # type: ignore[return-value]

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank of each machine."""
        if self.is_local_main_process:
            print(*args, **kwargs)


def _open_process(cpu: bool, arguments: dict[str, Any]) -> dict[str, Any]:
    """Choose the device, open the process group, and return the fields of the state."""
    if arguments.pop("_use_sagemaker_dp", None):
        raise UnsupportedError("_use_sagemaker_dp is set", "SageMaker's own backend is not supported", "Leave it out")
    if unknown := sorted(arguments.keys() - _GROUP_ARGUMENTS):
        raise InvalidValueError(
            f"PartialState got {', '.join(unknown)}",
            "The launcher's variables decide everything else",
            f"Pass only cpu and {', '.join(sorted(_GROUP_ARGUMENTS))}",
        )
    world = World.read(os.environ)
    requested = os.environ.get("ACCELERATE_TORCH_DEVICE")
    device = torch.device(requested) if requested else choose_device(world, cpu=cpu)
    is_launched = world.size > 1 or (world.source != "none" and _needs_group(device, cpu))
    backend = open_process_group(world, device, force=True, **arguments) if is_launched else None
    distributed_type = _distributed_type(device, cpu) if is_launched else DistributedType.NO
    if distributed_type == DistributedType.DEEPSPEED:
        from paceline.strategies.registry import load_strategy

        # Programs build sharded models before they make an Accelerator.
        load_strategy("deepspeed").join_process_group()
    return {
        "_cpu": cpu,
        "backend": backend,
        "debug": parse_flag_from_env("ACCELERATE_DEBUG_MODE"),
        "device": device,
        "distributed_type": distributed_type,
        "local_process_index": world.local_rank,
        "num_processes": world.size,
        "process_index": world.rank,
    }


def _needs_group(device: torch.device, cpu: bool) -> bool:
    """Whether a single process that was launched gets a process group."""
    # As under torchrun: it gives one process on a device a process group of its own. The launcher's single process runs
    # without one, unless it shards.
    if "PACELINE_CONFIG" in os.environ and not _shards():
        return False
    # A single rank on a CPU needs one for FSDP only, which shards there as well.
    return cpu or device.type != "cpu" or parse_flag_from_env("ACCELERATE_USE_FSDP")


def _shards() -> bool:
    """Whether the launcher's variables ask for DeepSpeed or FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or parse_flag_from_env("ACCELERATE_USE_FSDP")


def _distributed_type(device: torch.device, cpu: bool) -> DistributedType:
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not cpu:
        if find_spec("deepspeed") is None:
            raise MissingExtraError("deepspeed", "deepspeed", "ACCELERATE_USE_DEEPSPEED")
        return DistributedType.DEEPSPEED
    return _BY_DEVICE.get(device.type) or DistributedType(f"MULTI_{device.type.upper()}")


def _missing_attribute(owner: str, name: str, known: Iterable[str]) -> AttributeError:
    if name in known:
        return AttributeError(
            f"`{owner}` object has no attribute `{name}` now. This happens if `{owner}._reset_state()` emptied it. "
            "Make a new Accelerator or PartialState."
        )
    return AttributeError(f"{owner!r} object has no attribute {name!r}")


class AcceleratorState:
    """The run: what `PartialState` has, with the precision and the plugins. The Accelerator makes the first one.

    Args:
        mixed_precision: "no", "fp16", "bf16" or "fp8"; None takes `ACCELERATE_MIXED_PRECISION`.
        cpu: Run on the CPU.
        dynamo_plugin: How models are compiled.
        deepspeed_plugin: DeepSpeed's plugin, or several by name, of which the first is active.
        fsdp_plugin: FSDP's plugin.
        torch_tp_plugin: The size of tensor parallelism, as before `ParallelismConfig`.
        megatron_lm_plugin: Not supported.
        parallelism_config: The sizes of the mesh.
        _from_accelerator: Whether the Accelerator makes it.
        **kwargs: Arguments of `PartialState`.

    Raises:
        InvalidValueError: There is no Accelerator yet, or a setting of an existing state is changed.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}
    _known_attrs: ClassVar[list[str]] = [
        *PartialState._known_attrs,
        "deepspeed_plugin",
        "fsdp_plugin",
        "megatron_lm_plugin",
        "dynamo_plugin",
    ]

    device: torch.device
    distributed_type: DistributedType
    backend: str | None
    num_processes: int
    process_index: int
    local_process_index: int
    debug: bool
    dynamo_plugin: TorchDynamoPlugin | None
    deepspeed_plugins: dict[str, DeepSpeedPlugin] | DeepSpeedPlugin | None
    fsdp_plugin: FullyShardedDataParallelPlugin
    parallelism_config: ParallelismConfig | None
    device_mesh: Any
    _mixed_precision: str

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        deepspeed_plugin: DeepSpeedPlugin | dict[str, DeepSpeedPlugin] | None = None,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        parallelism_config: ParallelismConfig | None = None,
        _from_accelerator: bool = False,
        **kwargs: Any,
    ) -> None:
        self.__dict__ = self._shared_state
        cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        if PartialState._shared_state == {}:
            PartialState(cpu, **kwargs)
        if self.initialized:
            self._check_unchanged(mixed_precision, cpu)
            return
        if not _from_accelerator:
            raise InvalidValueError(
                "AcceleratorState() is used before there is an Accelerator",
                "It describes the Accelerator's settings",
                "Make the Accelerator first, or use PartialState()",
            )
        precision = (mixed_precision or parse_choice_from_env("ACCELERATE_MIXED_PRECISION")).lower()
        self._shared_state.update(
            PartialState._shared_state,
            deepspeed_plugins=None,
            torch_tp_plugin=torch_tp_plugin,
            parallelism_config=parallelism_config,
            device_mesh=None,
            dynamo_plugin=dynamo_plugin,
            _mixed_precision=precision,
        )
        if deepspeed_plugin is not None:
            self._use_deepspeed(deepspeed_plugin)
        elif self.distributed_type not in (DistributedType.NO, DistributedType.DEEPSPEED):
            self._use_fsdp(fsdp_plugin)
        is_compiled = dynamo_plugin is not None and dynamo_plugin.backend != DynamoBackend.NO
        if is_compiled and precision == "no" and self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        PartialState._shared_state["distributed_type"] = self.distributed_type

    def _use_deepspeed(self, plugin: DeepSpeedPlugin | dict[str, DeepSpeedPlugin]) -> None:
        """DeepSpeed keeps the precision in its own configuration."""
        self.distributed_type = DistributedType.DEEPSPEED
        plugins = list(plugin.values()) if isinstance(plugin, dict) else [plugin]
        for each in plugins:
            each.set_mixed_precision(self._mixed_precision)
        plugins[0].select(_from_accelerator_state=True)
        self.deepspeed_plugins = plugin

    def _use_fsdp(self, plugin: FullyShardedDataParallelPlugin | None) -> None:
        if plugin is None and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return
        self.distributed_type = DistributedType.FSDP
        if plugin is not None and self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self._shared_state["fsdp_plugin"] = plugin

    def _check_unchanged(self, mixed_precision: str | None, cpu: bool) -> None:
        changed = ""
        if cpu and self.device.type != "cpu":
            changed = "cpu=True"
        is_own = self.distributed_type != DistributedType.DEEPSPEED
        if is_own and mixed_precision not in (None, self._mixed_precision):
            changed = f"mixed_precision={mixed_precision!r}"
        if changed:
            raise InvalidValueError(
                f"{changed} is passed after the first Accelerator, which runs {self._mixed_precision} on {self.device}",
                "All Accelerators of a program share this setting",
                "Pass it to the first one",
            )

    def __repr__(self) -> str:
        text = f"{PartialState()!r}\nMixed precision type: {self.mixed_precision}\n"
        if self.deepspeed_plugin is not None:
            text += f"ds_config: {self.deepspeed_plugin.deepspeed_config}\n"
        return text

    def __getattr__(self, name: str) -> Any:
        raise _missing_attribute(type(self).__name__, name, self._known_attrs)

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        AcceleratorState._shared_state.clear()
        if reset_partial_state:
            PartialState._reset_state()

    @property
    def initialized(self) -> bool:
        """Whether an Accelerator has made the state."""
        return "_mixed_precision" in self._shared_state

    @property
    def mixed_precision(self) -> str:
        """The precision of the forward; under DeepSpeed, that of its configuration."""
        plugin = self.deepspeed_plugin
        if plugin is None or self._mixed_precision == "fp8":
            return self._mixed_precision
        enabled = [dtype for dtype in ("fp16", "bf16") if plugin.deepspeed_config.get(dtype, {}).get("enabled")]
        return enabled[0] if enabled else "no"

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The active plugin of DeepSpeed; None without DeepSpeed."""
        plugins = self._shared_state.get("deepspeed_plugins")
        if isinstance(plugins, dict):
            return next((plugin for plugin in plugins.values() if plugin.selected), None)
        return plugins

    def get_deepspeed_plugin(self, name: str) -> DeepSpeedPlugin:
        """Return one of several plugins of DeepSpeed."""
        return self._named_plugins()[name]

    def select_deepspeed_plugin(self, name: str | None = None) -> None:
        """Make one of several plugins of DeepSpeed the active one."""
        plugins = self._named_plugins()
        for key, plugin in plugins.items():
            if key != name:
                plugin._unselect()
        plugins[str(name)].select(_from_accelerator_state=True)

    def _named_plugins(self) -> dict[str, DeepSpeedPlugin]:
        if not isinstance(self.deepspeed_plugins, dict):
            raise InvalidValueError(
                f"A plugin of DeepSpeed is requested by name, and there is {self.deepspeed_plugins!r}",
                "Only several plugins have names",
                "Pass them as Accelerator(deepspeed_plugins={name: plugin})",
            )
        return self.deepspeed_plugins

    @property
    def is_fsdp2(self) -> bool:
        """Whether FSDP shards, in its version 2."""
        return self.distributed_type == DistributedType.FSDP and self.fsdp_plugin.fsdp_version == 2

    @property
    def fork_launched(self) -> bool:
        """Whether a notebook started this process."""
        return PartialState().fork_launched

    @property
    def use_distributed(self) -> bool:
        """Whether there are several ranks."""
        return PartialState().use_distributed

    @property
    def is_last_process(self) -> bool:
        """Whether this is the highest rank."""
        return PartialState().is_last_process

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return PartialState().is_main_process

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first rank of its machine."""
        return PartialState().is_local_main_process

    def wait_for_everyone(self) -> None:
        """Return when every rank has arrived. Collective: every rank must call it."""
        PartialState().wait_for_everyone()

    def destroy_process_group(self, group: dist.ProcessGroup | None = None) -> None:
        """See `PartialState.destroy_process_group`."""
        PartialState().destroy_process_group(group)

    def split_between_processes(self, inputs: T, apply_padding: bool = False) -> AbstractContextManager[T]:
        """See `PartialState.split_between_processes`."""
        return PartialState().split_between_processes(inputs, apply_padding=apply_padding)

    def main_process_first(self) -> AbstractContextManager[None]:
        """See `PartialState.main_process_first`. Collective: every rank must enter it."""
        return PartialState().main_process_first()

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """See `PartialState.local_main_process_first`. Collective: every rank must enter it."""
        return PartialState().local_main_process_first()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank of each machine."""
        PartialState().print(*args, **kwargs)


class GradientState:
    """The accumulation of gradients: whether the next step counts, and which loader is being read.

    Args:
        gradient_accumulation_plugin: The settings; a later instance with others replaces them for all.

    Attributes:
        sync_gradients: Whether the current micro-batch ends in an optimizer step.
        plugin_kwargs: The settings that differ from the defaults.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}

    sync_gradients: bool
    plugin_kwargs: dict[str, Any]
    _dataloader_references_ref: list[weakref.ref[Any] | None]

    def __init__(self, gradient_accumulation_plugin: GradientAccumulationPlugin | None = None) -> None:
        self.__dict__ = self._shared_state
        if not self.initialized:
            self.sync_gradients = True
            self._dataloader_references_ref = [None]
            self.plugin_kwargs = {}
            self._is_xla_gradients_synced = False
        if gradient_accumulation_plugin is not None:
            self.plugin_kwargs = gradient_accumulation_plugin.to_kwargs()

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\n"
            f"At end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\n"
            f"Gradient accumulation plugin: {self.plugin_kwargs}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        GradientState._shared_state.clear()

    @property
    def initialized(self) -> bool:
        """Whether there is a state."""
        return GradientState._shared_state != {}

    @property
    def num_steps(self) -> int:
        """The number of micro-batches of an optimizer step."""
        return int(self.plugin_kwargs.get("num_steps", 1))

    @property
    def adjust_scheduler(self) -> bool:
        """Whether a scheduler counts micro-batches too."""
        return bool(self.plugin_kwargs.get("adjust_scheduler", False))

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether the end of a loader ends the window."""
        return bool(self.plugin_kwargs.get("sync_with_dataloader", True))

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the current batch is the last one of its loader."""
        return self.in_dataloader and bool(self.active_dataloader.end_of_dataloader)

    @property
    def remainder(self) -> int:
        """The number of samples in the last global batch, 0 if it is full; -1 outside of a loader."""
        return int(self.active_dataloader.remainder) if self.in_dataloader else -1

    @property
    def in_dataloader(self) -> bool:
        """Whether a loader is being read."""
        return self.active_dataloader is not None

    @property
    def active_dataloader(self) -> Any:
        """The innermost loader that is being read; None without one."""
        return self.dataloader_references[-1]

    @property
    def dataloader_references(self) -> list[Any]:
        """None, and then the loaders that are being read, from the outermost to the innermost."""
        return [None if reference is None else reference() for reference in self._dataloader_references_ref]

    @dataloader_references.setter
    def dataloader_references(self, references: list[Any]) -> None:
        # Weak references: a state that lives as long as the process must not keep loaders and their workers.
        self._dataloader_references_ref = [None if each is None else weakref.ref(each) for each in references]

    @property
    def is_xla_gradients_synced(self) -> bool:
        """Whether gradients were reduced on a TPU; always so under FSDP."""
        return parse_flag_from_env("ACCELERATE_USE_FSDP") or self._is_xla_gradients_synced

    @is_xla_gradients_synced.setter
    def is_xla_gradients_synced(self, is_synced: bool) -> None:
        self._is_xla_gradients_synced = is_synced

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        self.sync_gradients = sync_gradients

    def _add_dataloader(self, dataloader: Any) -> None:
        self.dataloader_references = [*self.dataloader_references, dataloader]

    def _remove_dataloader(self, dataloader: Any) -> None:
        self.dataloader_references = [each for each in self.dataloader_references if each is not dataloader]


class SharedBoundary:
    """`sync_gradients` of the `GradientState`, which programs set too."""

    @property
    def sync_gradients(self) -> bool:
        """Whether the current micro-batch is the last of its window."""
        return GradientState().sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        GradientState()._set_sync_gradients(value)


class InnermostLoader:
    """The loop ends where the innermost loader does."""

    remaining = None

    def begin_micro_batch(self) -> None:
        """Count nothing: the loader knows."""

    @property
    def loop_ends(self) -> bool:
        """Whether the current batch is the last of the innermost loader."""
        return GradientState().end_of_dataloader
