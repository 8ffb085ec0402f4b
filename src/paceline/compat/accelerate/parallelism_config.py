"""The sizes of the device mesh."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, fields
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from paceline.compat.accelerate.settings.enums import DistributedType
from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.compat.accelerate.settings.parallelism import (
    DeepSpeedSequenceParallelConfig,
    TorchContextParallelConfig,
    TorchTensorParallelConfig,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ParallelismConfig"]

_PREFIX = "PARALLELISM_CONFIG_"
# From the slowest axis of the mesh to the fastest.
_AXES = ("dp_replicate", "dp_shard", "cp", "sp", "tp")


@dataclass
class ParallelismConfig:
    """The sizes of the device mesh; those not set come from `PARALLELISM_CONFIG_*`, and are 1 without it."""

    dp_replicate_size: int = None  # type: ignore[assignment]  # the sizes are read in __post_init__
    dp_shard_size: int = None  # type: ignore[assignment]
    tp_size: int = None  # type: ignore[assignment]
    cp_size: int = None  # type: ignore[assignment]
    cp_backend: Literal["torch"] = None  # type: ignore[assignment]
    sp_size: int = None  # type: ignore[assignment]
    sp_backend: Literal["deepspeed"] = None  # type: ignore[assignment]
    tp_handler: TorchTensorParallelConfig | None = None
    cp_handler: TorchContextParallelConfig | None = None
    sp_handler: DeepSpeedSequenceParallelConfig | None = None

    device_mesh: DeviceMesh | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        for axis in _AXES:
            if getattr(self, f"{axis}_size") is None:
                setattr(self, f"{axis}_size", int(os.environ.get(f"{_PREFIX}{axis.upper()}_SIZE", 1)))
        self._read_backends()
        self._check()
        if self.tp_enabled and self.tp_handler is None:
            self.tp_handler = TorchTensorParallelConfig()
        if self.cp_enabled and self.cp_handler is None:
            self.cp_handler = TorchContextParallelConfig()
        if self.sp_enabled and self.sp_handler is None:
            self.sp_handler = DeepSpeedSequenceParallelConfig()

    def _read_backends(self) -> None:
        for axis, only in (("cp", "torch"), ("sp", "deepspeed")):
            name = f"{axis}_backend"
            if getattr(self, name) is None:
                setattr(self, name, os.environ.get(f"{_PREFIX}{name.upper()}", only))
            if getattr(self, name) != only:
                raise InvalidValueError(
                    f"{name} is {getattr(self, name)!r}", "There is no such backend", f"Use {only!r}, or leave it out"
                )

    def _check(self) -> None:
        for axis in _AXES:
            if self._size(axis) < 1:
                raise InvalidValueError(f"{axis}_size is {self._size(axis)}", "A size is at least 1", "Leave it out")
        if self.cp_enabled and self.sp_enabled:
            raise InvalidValueError(
                f"cp_size is {self.cp_size} and sp_size is {self.sp_size}",
                "Both divide the sequence",
                "Set one of them to 1",
            )
        if (self.tp_enabled or self.cp_enabled) and self.dp_replicate_enabled and not self.dp_shard_enabled:
            raise InvalidValueError(
                f"dp_replicate_size is {self.dp_replicate_size}, dp_shard_size 1, tp_size {self.tp_size} and cp_size "
                f"{self.cp_size}",
                "Whole replicas cannot be combined with tensor or context parallelism",
                "Set dp_shard_size above 1",
            )
        if self.cp_handler is not None and not isinstance(self.cp_handler, TorchContextParallelConfig):
            raise InvalidValueError(
                f"cp_handler is a {type(self.cp_handler).__name__}",
                "The torch backend cannot read it",
                "Pass a TorchContextParallelConfig",
            )

    def __repr__(self) -> str:
        values = [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.init]
        return f"ParallelismConfig({', '.join(values)}, total_size={self.total_size})"

    def to_json(self) -> dict[str, Any]:
        """Return the settings as numbers, text and dicts."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        return {name: dict(vars(value)) if hasattr(value, "__dict__") else value for name, value in values.items()}

    def _size(self, axis: str) -> int:
        size: int = getattr(self, f"{axis}_size")
        return size

    def _enabled(self, *axes: str) -> list[str]:
        return [axis for axis in axes if self._size(axis) > 1]

    @property
    def dp_dim_names(self) -> list[str]:
        """Axes along which ranks get different samples."""
        return self._enabled("dp_replicate", "dp_shard")

    @property
    def non_dp_dim_names(self) -> list[str]:
        """Axes along which ranks get the same samples."""
        return self._enabled("tp", "cp", "sp")

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Axes over which parameters are sharded."""
        return self._enabled("dp_shard", "cp")

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """Axes over which the loss is averaged."""
        return self._enabled("dp_replicate", "dp_shard", "cp")

    @property
    def fsdp_dim_names(self) -> list[str]:
        """Axes of the mesh that FSDP gets."""
        return [*self._enabled("dp_replicate"), "dp_shard_cp"]

    @property
    def active_mesh_dims(self) -> list[str]:
        """Axes of more than one rank."""
        return self.dp_dim_names + self.non_dp_dim_names

    @property
    def total_size(self) -> int:
        """The number of ranks of the mesh."""
        return self.data_parallel_size * self.non_data_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """The number of ranks with different samples."""
        return self.dp_replicate_size * self.dp_shard_size

    @property
    def non_data_parallel_size(self) -> int:
        """The number of ranks with the same samples."""
        return self.tp_size * self.cp_size * self.sp_size

    @property
    def dp_replicate_enabled(self) -> bool:
        """Whether there are several replicas."""
        return self.dp_replicate_size > 1

    @property
    def dp_shard_enabled(self) -> bool:
        """Whether a replica is sharded."""
        return self.dp_shard_size > 1

    @property
    def tp_enabled(self) -> bool:
        """Whether layers are divided among ranks."""
        return self.tp_size > 1

    @property
    def cp_enabled(self) -> bool:
        """Whether sequences are divided by ring attention."""
        return self.cp_size > 1

    @property
    def sp_enabled(self) -> bool:
        """Whether sequences are divided by Ulysses attention."""
        return self.sp_size > 1

    def build_device_mesh(self, device_type: str) -> DeviceMesh | None:
        """Build the mesh of the axes with several ranks, and its flattened parts `dp`, `dp_shard_cp` and `dp_cp`.

        Collective: every rank must call it.

        Args:
            device_type: Such as "cuda" or "cpu".

        Returns:
            The mesh; None without such an axis, and under Ulysses attention, where DeepSpeed has its own groups.
        """
        axes, shape = self._get_mesh()
        if not axes or self.sp_enabled:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        assert prod(shape) == self.total_size
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=axes)
        parts = {"dp": self.dp_dim_names, "dp_shard_cp": self.dp_shard_cp_dim_names, "dp_cp": self.dp_cp_dim_names}
        for name, names in parts.items():
            if names:
                # Torch takes a list as well as a tuple.
                mesh[names]._flatten(name)  # type: ignore[index]
        return mesh

    def _get_mesh(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The axes of more than one rank and their sizes, from the slowest axis to the fastest."""
        axes = tuple(self._enabled(*_AXES))
        return axes, tuple(self._size(axis) for axis in axes)

    def get_device_mesh(self, device_type: str | None = None) -> DeviceMesh | None:
        """Return the mesh, which the first call builds.

        Collective on the first call: every rank must make it.

        Args:
            device_type: Such as "cuda"; the first call needs it.

        Raises:
            InvalidValueError: It is missing, or differs from that of the first call.
        """
        mesh = self.device_mesh
        if mesh is None:
            if device_type is None:
                raise InvalidValueError("The mesh is not built yet", "That needs a type of device", "Pass device_type")
            mesh = self.build_device_mesh(device_type)
            self.device_mesh = mesh
        elif device_type not in (None, mesh.device_type):
            raise InvalidValueError(
                f"A mesh on {device_type} is requested",
                f"There is one already, on {mesh.device_type}",
                "Leave device_type out",
            )
        return mesh

    def _set_size(self, parallelism: str, size: int) -> None:
        setattr(self, f"{parallelism}_size", size)

    def _validate_accelerator(self, accelerator: Any) -> None:
        """Check the sizes against a run; a mesh of one rank is made one replica per process."""
        if self.total_size == 1:
            if not accelerator.multi_device:
                return
            self._set_size("dp_replicate", accelerator.num_processes)
        self._check_run(accelerator)
        unused = [axis for axis in ("tp", "cp", "sp") if self._size(axis) == 1 and getattr(self, f"{axis}_handler")]
        if unused and accelerator.is_main_process:
            names = ", ".join(f"{axis}_handler" for axis in unused)
            warnings.warn(f"{names} has no effect: the size of that axis is 1", stacklevel=2)

    def _check_run(self, accelerator: Any) -> None:
        if not self.sp_enabled and self.total_size != accelerator.num_processes:
            raise InvalidValueError(
                f"The mesh has {self.total_size} ranks, the run {accelerator.num_processes}",
                "Every rank has one place in the mesh",
                "Change the sizes, or the number of processes",
            )
        if accelerator.is_fsdp2 and not (self.dp_shard_enabled or self.cp_enabled):
            raise InvalidValueError(
                f"FSDP is to shard, with dp_shard_size and cp_size 1 in {self!r}",
                "There is no axis to shard over",
                "Set dp_shard_size, or leave the FSDP settings out",
            )
        is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if not (accelerator.is_fsdp2 or accelerator.multi_device or is_deepspeed):
            raise InvalidValueError(
                f"A ParallelismConfig of {self.total_size} ranks under {accelerator.distributed_type}",
                "It needs FSDP2, DeepSpeed or several devices",
                "Leave it out",
            )
