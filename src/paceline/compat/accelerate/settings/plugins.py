"""Plugins of data loaders, gradient accumulation, compilation and the project's folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.compat.accelerate.settings.enums import CustomDtype, DynamoBackend
from paceline.compat.accelerate.settings.errors import InvalidValueError, UnsupportedError
from paceline.compat.accelerate.settings.handlers import KwargsHandler
from paceline.compat.accelerate.settings.variables import maybe_flag, parse_choice_from_env, parse_flag_from_env

if TYPE_CHECKING:
    import torch

__all__ = [
    "BnbQuantizationConfig",
    "DataLoaderConfiguration",
    "GradientAccumulationPlugin",
    "MegatronLMPlugin",
    "ProjectConfiguration",
    "TensorInformation",
    "TorchDynamoPlugin",
]

_DYNAMO = "ACCELERATE_DYNAMO_"


@dataclass
class TensorInformation:
    """Shape and dtype of a tensor that another rank has."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass
class DataLoaderConfiguration:
    """How prepared data loaders divide data among ranks."""

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False


@dataclass
class ProjectConfiguration:
    """Where a run keeps its files, and how many checkpoints."""

    project_dir: str | os.PathLike[str] | None = None
    logging_dir: str | os.PathLike[str] | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False

    def __post_init__(self) -> None:
        self.set_directories(self.project_dir)

    def set_directories(self, project_dir: str | os.PathLike[str] | None = None) -> None:
        """Set the project's folder, which is the trackers' folder too unless that is set already."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir


@dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """How many micro-batches make one optimizer step, and when gradients are averaged."""

    num_steps: int | None = None
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """How models are compiled by `torch.compile`; fields that are not set come from `ACCELERATE_DYNAMO_*`."""

    backend: DynamoBackend = None  # type: ignore[assignment]  # read in __post_init__
    mode: str | None = None
    fullgraph: bool | None = None
    dynamic: bool | None = None
    options: Any = None
    disable: bool = False
    use_regional_compilation: bool | None = None

    def __post_init__(self) -> None:
        given = str(self.backend or parse_choice_from_env(f"{_DYNAMO}BACKEND"))
        self.backend = DynamoBackend(given.upper())
        if self.mode is None:
            self.mode = parse_choice_from_env(f"{_DYNAMO}MODE", "default")
        if self.fullgraph is None:
            self.fullgraph = parse_flag_from_env(f"{_DYNAMO}USE_FULLGRAPH")
        if self.use_regional_compilation is None:
            self.use_regional_compilation = parse_flag_from_env(f"{_DYNAMO}USE_REGIONAL_COMPILATION")
        if self.dynamic is None:
            self.dynamic = maybe_flag(f"{_DYNAMO}USE_DYNAMIC")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, with the backend in lower case as `torch.compile` takes it."""
        return {**super().to_dict(), "backend": self.backend.value.lower()}

    def to_kwargs(self) -> dict[str, Any]:
        """Return the changed fields that `torch.compile` takes."""
        kwargs = super().to_kwargs()
        kwargs.pop("use_regional_compilation", None)
        return kwargs


class _Unsupported:
    """A plugin that is importable, as programs test for its type; making one raises."""

    todo = ""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise UnsupportedError(
            f"{type(self).__name__}(…) was made",
            "It is not supported through the switch",
            self.todo,
        )


class MegatronLMPlugin(_Unsupported):
    """Settings of Megatron-LM, which paceline does not drive."""

    todo = "Use FullyShardedDataParallelPlugin or DeepSpeedPlugin"


@dataclass
class BnbQuantizationConfig:
    """Settings of bitsandbytes, for models that are loaded in 4 or 8 bits.

    Raises:
        InvalidValueError: Both widths or none is chosen, or a value is not one of its kind.
    """

    load_in_8bit: bool = False
    llm_int8_threshold: float = 6.0
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Any = "fp16"
    torch_dtype: Any = None
    skip_modules: list[str] | None = None
    keep_in_fp32_modules: list[str] | None = None

    def __post_init__(self) -> None:
        self._check()
        self.bnb_4bit_compute_dtype = _torch_dtype("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype)
        if self.torch_dtype is not None:
            self.torch_dtype = _torch_dtype("torch_dtype", self.torch_dtype)
        import torch

        if self.load_in_8bit:
            self.target_dtype: Any = torch.int8
            self.torch_dtype = self.torch_dtype or torch.float16
        else:
            self.target_dtype = CustomDtype.INT4
            self.torch_dtype = self.torch_dtype or self.bnb_4bit_compute_dtype

    def _check(self) -> None:
        if bool(self.load_in_8bit) == bool(self.load_in_4bit):
            raise InvalidValueError(
                f"load_in_8bit is {self.load_in_8bit} and load_in_4bit {self.load_in_4bit}",
                "Weights are stored in one of them",
                "Set one of them to True",
            )
        if self.bnb_4bit_quant_type not in ("fp4", "nf4"):
            raise InvalidValueError(
                f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}", "There is no such format", "Use fp4 or nf4"
            )
        for name in ("skip_modules", "keep_in_fp32_modules"):
            if not isinstance(getattr(self, name), (list, type(None))):
                raise InvalidValueError(f"{name} is {getattr(self, name)!r}", "It lists names", "Pass a list")


def _torch_dtype(field_name: str, value: Any) -> torch.dtype:
    import torch

    known = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = known.get(value, value)
    if not isinstance(dtype, torch.dtype):
        raise InvalidValueError(f"{field_name} is {value!r}", "It is no dtype", f"Use one of {', '.join(known)}")
    return dtype
