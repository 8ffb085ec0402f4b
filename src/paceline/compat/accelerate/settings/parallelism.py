"""Handlers of `ParallelismConfig`: how each dimension of the mesh is implemented."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.compat.accelerate.settings.variables import parse_choice_from_env, parse_flag_from_env

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "DeepSpeedSequenceParallelConfig",
    "TorchContextParallelConfig",
    "TorchTensorParallelConfig",
    "TorchTensorParallelPlugin",
]

_PREFIX = "PARALLELISM_CONFIG_"
_EXCHANGES = ("allgather", "alltoall")
_ATTENTION = ("flash_attention_2", "flash_attention_3", "sdpa")


@dataclass
class TorchTensorParallelPlugin:
    """The size of tensor parallelism, in the form that preceded `ParallelismConfig`."""

    tp_size: int = 1
    torch_device_mesh: DeviceMesh | None = None


@dataclass
class TorchTensorParallelConfig:
    """How layers are divided among ranks."""

    enable_async_tp: bool = False

    def __post_init__(self) -> None:
        if self.enable_async_tp:
            warnings.warn("enable_async_tp has no effect", stacklevel=3)


@dataclass
class TorchContextParallelConfig:
    """How ranks that share a sequence exchange keys and values."""

    cp_comm_strategy: str | None = None

    def __post_init__(self) -> None:
        if self.cp_comm_strategy is None:
            self.cp_comm_strategy = parse_choice_from_env(f"{_PREFIX}CP_COMM_STRATEGY", "allgather")
        if self.cp_comm_strategy not in _EXCHANGES:
            raise InvalidValueError(
                f"Invalid cp_comm_strategy: {self.cp_comm_strategy}",
                "There is no such exchange",
                f"Use one of {', '.join(_EXCHANGES)}",
            )


@dataclass
class DeepSpeedSequenceParallelConfig:
    """How DeepSpeed's Ulysses attention divides sequences."""

    sp_seq_length: int | None = None
    sp_seq_length_is_variable: bool | None = None
    sp_attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.sp_seq_length_is_variable is None:
            self.sp_seq_length_is_variable = parse_flag_from_env(f"{_PREFIX}SP_SEQ_LENGTH_IS_VARIABLE", True)
        if not self.sp_seq_length_is_variable and self.sp_seq_length is None:
            self.sp_seq_length = self._length_from_env()
        if self.sp_attn_implementation is None:
            self.sp_attn_implementation = os.environ.get(f"{_PREFIX}SP_ATTN_IMPLEMENTATION")
        self._check_attention()

    @staticmethod
    def _length_from_env() -> int | None:
        name = f"{_PREFIX}SP_SEQ_LENGTH"
        if name not in os.environ:
            raise InvalidValueError(
                "sp_seq_length_is_variable is False and sp_seq_length is not set",
                "Sequences of one length need that length",
                f"Pass sp_seq_length or set {name}",
            )
        text = os.environ[name]
        return None if text == "None" else int(text)

    def _check_attention(self) -> None:
        name = self.sp_attn_implementation
        if name is None or name in _ATTENTION or ("/" in name and "flash-attn" in name):
            return
        raise InvalidValueError(
            f"Invalid sp_attn_implementation: {name}",
            "Ulysses attention needs a fused kernel",
            f"Use one of {', '.join(_ATTENTION)}, or a kernel of the hub such as kernels-community/flash-attn2",
        )
