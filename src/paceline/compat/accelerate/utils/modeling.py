"""Sizes and names of a model's tensors. Placing a model on several devices is not supported."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from paceline.compat.accelerate.settings.enums import CustomDtype, DistributedType
from paceline.compat.accelerate.settings.errors import InvalidValueError, unsupported
from paceline.compat.accelerate.state import AcceleratorState, PartialState
from paceline.compat.accelerate.utils.other import extract_model_from_parallel, id_tensor_storage
from paceline.environment.device import memory_info

if TYPE_CHECKING:
    from paceline.compat.accelerate.settings.handlers import AutocastKwargs

__all__ = [
    "align_module_device",
    "calculate_maximum_sizes",
    "check_device_map",
    "check_device_same",
    "check_tied_parameters_in_config",
    "check_tied_parameters_on_same_device",
    "clean_device_map",
    "compute_module_sizes",
    "compute_module_total_buffer_size",
    "convert_file_size_to_int",
    "dtype_byte_size",
    "find_tied_parameters",
    "get_balanced_memory",
    "get_grad_scaler",
    "get_max_layer_size",
    "get_max_memory",
    "get_mixed_precision_context_manager",
    "get_non_persistent_buffers",
    "has_offloaded_params",
    "id_tensor_storage",
    "infer_auto_device_map",
    "is_peft_model",
    "load_checkpoint_in_model",
    "load_offloaded_weights",
    "load_state_dict",
    "named_module_tensors",
    "placement_unsupported",
    "retie_parameters",
    "set_module_tensor_to_device",
]

# Of bytes, in either system; a small b at the end counts bits.
_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_CUSTOM_SIZES = {CustomDtype.INT2: 0.25, CustomDtype.INT4: 0.5, CustomDtype.FP8: 1.0}

placement_unsupported = unsupported(
    "Placing one model on several devices, in host memory or on disk is not supported through the switch",
    "Shard it instead (FSDP or DeepSpeed), or load it on one device",
)
"""Marks a function that belongs to device maps, hooks or offloading."""


def is_peft_model(model: Any) -> bool:
    """Whether a model, or what its wrappers hold, is one of PEFT."""
    peft = sys.modules.get("peft")  # without it, nobody can have made such a model
    return peft is not None and isinstance(extract_model_from_parallel(model), peft.PeftModel)


def check_device_same(first_device: torch.device, second_device: torch.device) -> bool:
    """Whether two devices are the same one; an accelerator without a number is number 0."""
    return _numbered(first_device) == _numbered(second_device)


def _numbered(device: torch.device) -> torch.device:
    return torch.device(device.type, 0) if device.type != "cpu" and device.index is None else device


def convert_file_size_to_int(size: int | str) -> int:
    """Read a number of bytes, such as 2048, "5MB" or "1.5GiB".

    Raises:
        InvalidValueError: It is no size.
    """
    if isinstance(size, int):
        return size
    for unit, factor in _UNITS.items():
        number = size[: -len(unit)]
        if size.upper().endswith(unit) and number.replace(".", "", 1).strip().isdigit():
            is_bits = size.endswith("b") and len(unit) == 2
            return int(float(number) * factor) // (8 if is_bits else 1)
    raise InvalidValueError(
        f"A size is given as {size!r}", "It is no number of bytes", "Write a number, or one with a unit such as 5GB"
    )


def dtype_byte_size(dtype: torch.dtype | CustomDtype) -> float:
    """Return the bytes that one number of a dtype takes; a bool counts as one bit."""
    if dtype == torch.bool:
        return 0.125
    if isinstance(dtype, CustomDtype):
        return _CUSTOM_SIZES[dtype]
    return dtype.itemsize


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of a module, with their names.

    Args:
        module: The module.
        include_buffers: Yield buffers, too.
        recurse: Yield those of the modules inside it, too.
        remove_non_persistent: Leave out buffers that are not part of the state dict.
    """
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        left_out = get_non_persistent_buffers(module, recurse, fqns=True) if remove_non_persistent else set()
        for name, buffer in module.named_buffers(recurse=recurse):
            if name not in left_out:
                yield name, buffer


def get_non_persistent_buffers(module: nn.Module, recurse: bool = False, fqns: bool = False) -> set[str]:
    """Return the names of the buffers that are not part of the state dict.

    Args:
        module: The module.
        recurse: Include the modules inside it.
        fqns: Return full names.
    """
    found = set()
    for prefix, each in module.named_modules() if recurse else [("", module)]:
        found |= {f"{prefix}.{name}" if fqns and prefix else name for name in each._non_persistent_buffers_set}
    return found


def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
    """Return the groups of names under which a model has one parameter.

    Args:
        model: The model.
        **kwargs: Ignored.
    """
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of[id(parameter)].append(name)
    return [sorted(names) for names in names_of.values() if len(names) > 1]


def retie_parameters(model: nn.Module, tied_params: Sequence[Sequence[str]]) -> None:
    """Put one parameter under all names of each group: the first that has values.

    Args:
        model: The model.
        tied_params: The groups, as `find_tied_parameters` returned them.
    """
    for group in tied_params:
        owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in group]
        candidates = (getattr(owner, name) for owner, name in owners)
        shared = next((each for each in candidates if each.device.type != "meta"), None)
        if shared is not None:
            for owner, name in owners:
                setattr(owner, name, shared)


def compute_module_sizes(
    model: nn.Module,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    buffers_only: bool = False,
) -> dict[str, float]:
    """Return the bytes of every module and tensor by name; the model's own name is empty.

    Args:
        model: The model.
        dtype: Floating-point tensors count as if they had this dtype, if that is smaller.
        special_dtypes: Dtypes by name of a tensor.
        buffers_only: Leave parameters out.
    """
    sizes: dict[str, float] = defaultdict(int)
    special = {name: dtype_byte_size(_as_dtype(each)) for name, each in (special_dtypes or {}).items()}
    largest = dtype_byte_size(_as_dtype(dtype)) if dtype is not None else float("inf")
    tensors = model.named_buffers() if buffers_only else named_module_tensors(model, recurse=True)
    for name, tensor in tensors:
        own = dtype_byte_size(tensor.dtype)
        size = special.get(name, min(own, largest) if tensor.is_floating_point() else own)
        parts = name.split(".")
        for depth in range(len(parts) + 1):
            sizes[".".join(parts[:depth])] += tensor.numel() * size
    return sizes


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    return found


def compute_module_total_buffer_size(
    model: nn.Module,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
) -> float:
    """Return the bytes of all buffers of a model."""
    return compute_module_sizes(model, dtype, special_dtypes, buffers_only=True).get("", 0)


def get_max_layer_size(
    modules: list[tuple[str, nn.Module]], module_sizes: Mapping[str, float], no_split_module_classes: Sequence[str]
) -> tuple[float, list[str]]:
    """Return the size of the largest layer, and the names of the layers that have it.

    Args:
        modules: Modules with their names.
        module_sizes: Their sizes and those of the modules inside them.
        no_split_module_classes: Classes of modules that count as one layer.
    """
    sizes = {name: module_sizes[name] for name, _ in _layers(modules, no_split_module_classes)}
    largest = max(sizes.values(), default=0)
    return largest, [name for name, size in sizes.items() if size == largest]


def _layers(modules: list[tuple[str, nn.Module]], whole: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in modules:
        # A parameter may stand in the place of a module.
        children = list(module.named_children()) if isinstance(module, nn.Module) else []
        if not children or type(module).__name__ in whole:
            yield name, module
        else:
            yield from _layers([(f"{name}.{child}", each) for child, each in children], whole)


def calculate_maximum_sizes(model: nn.Module) -> tuple[float, tuple[float, list[str]]]:
    """Return the bytes of a model, and those of its largest layer with the layers' names."""
    sizes = compute_module_sizes(model)
    whole = getattr(model, "_no_split_modules", None) or []
    return sizes[""], get_max_layer_size(list(model.named_children()), sizes, whole)


def get_max_memory(max_memory: dict[int | str, float | str] | None = None) -> dict[int | str, float]:
    """Return the free bytes of every device by number, and of the host as "cpu"; accelerators come first.

    Args:
        max_memory: Sizes to use instead, as numbers or text such as "5GB".

    Raises:
        InvalidValueError: There can be no such device.
    """
    if max_memory is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        free: dict[int | str, float] = {}
        if accelerator is not None:
            for index in range(torch.accelerator.device_count()):
                free[index] = memory_info(torch.device(accelerator.type, index))[0]
        return {**free, "cpu": psutil.virtual_memory().available}
    numbers = sorted(key for key in max_memory if isinstance(key, int))
    ordered = [*numbers, *(key for key in ("mps", "cpu", "disk") if key in max_memory)]
    if unknown := [key for key in max_memory if key not in ordered]:
        raise InvalidValueError(
            f"max_memory has {unknown!r}", "It is no device", 'Use numbers, "mps", "cpu" and "disk"'
        )
    return {key: _bytes(max_memory[key]) for key in ordered}


def _bytes(size: float | str) -> float:
    return convert_file_size_to_int(size) if isinstance(size, str) else size


def clean_device_map(device_map: dict[str, Any], module_name: str = "") -> dict[str, Any]:
    """Replace the entries of modules by one of the module that contains them, where all are on one device.

    Args:
        device_map: Devices by name of a module; changed in place.
        module_name: Where to begin.
    """
    prefix = f"{module_name}." if module_name else ""
    inside = [name for name in device_map if name.startswith(prefix)]
    if len(inside) > 1 and len({device_map[name] for name in inside}) == 1:
        device = device_map[inside[0]]
        for name in inside:
            del device_map[name]
        device_map[module_name] = device
        return device_map
    for child in {name[len(prefix) :].partition(".")[0] for name in inside if name != module_name}:
        clean_device_map(device_map, f"{prefix}{child}")
    return device_map


def check_device_map(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Check that every tensor of a model has a device.

    Raises:
        InvalidValueError: Some have none.
    """
    names = [name for name, _ in named_module_tensors(model, recurse=True)]
    if "" in device_map:
        return
    homeless = [name for name in names if not any(f"{name}.".startswith(f"{module}.") for module in device_map)]
    if homeless:
        raise InvalidValueError(
            f"device_map has no device for {', '.join(homeless)}", "Every tensor needs one", "Add these modules"
        )


def check_tied_parameters_in_config(model: nn.Module) -> bool:
    """Whether the configuration of a transformers model ties weights."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_encoder_decoder", False))


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether a hook keeps a module's parameters elsewhere; there are no such hooks here."""
    return False


def get_mixed_precision_context_manager(
    native_amp: bool = False, autocast_kwargs: AutocastKwargs | None = None
) -> AbstractContextManager[Any]:
    """Return the autocast context of this run, or an empty one.

    Args:
        native_amp: Whether torch's autocast is used.
        autocast_kwargs: Its settings.
    """
    if not native_amp:
        return nullcontext()
    kwargs = {} if autocast_kwargs is None else autocast_kwargs.to_kwargs()
    state = AcceleratorState()
    if state.mixed_precision in ("fp16", "bf16", "fp8"):
        kwargs["dtype"] = torch.float16 if state.mixed_precision == "fp16" else torch.bfloat16
    return torch.autocast(device_type=state.device.type, **kwargs)


def get_grad_scaler(distributed_type: DistributedType | None = None, **kwargs: Any) -> torch.amp.GradScaler:
    """Return the loss scaler of this run.

    Args:
        distributed_type: How the run is distributed.
        **kwargs: Arguments of `torch.amp.GradScaler`.
    """
    return torch.amp.GradScaler(PartialState().device.type, **kwargs)


def load_state_dict(checkpoint_file: str, device_map: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Read a file of weights, in the format of safetensors or torch's own.

    Args:
        checkpoint_file: The file.
        device_map: One device for all weights, as `{"": device}`; None is the CPU.
    """
    devices = set((device_map or {"": "cpu"}).values())
    device = devices.pop() if len(devices) == 1 else "cpu"
    if checkpoint_file.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(checkpoint_file, device=device)
    weights: dict[str, torch.Tensor] = torch.load(checkpoint_file, map_location=device, weights_only=True)
    return weights


@placement_unsupported
def align_module_device(module: nn.Module, execution_device: torch.device | None = None) -> Any:
    """Bring the parameters of a module onto a device, for a block."""


@placement_unsupported
def check_tied_parameters_on_same_device(tied_params: Any, device_map: Any) -> Any:
    """Check that tied parameters are on one device."""


@placement_unsupported
def get_balanced_memory(
    model: nn.Module,
    max_memory: Any = None,
    no_split_module_classes: Any = None,
    dtype: Any = None,
    special_dtypes: Any = None,
    low_zero: bool = False,
) -> Any:
    """Divide a model's size evenly among devices."""


@placement_unsupported
def infer_auto_device_map(
    model: nn.Module,
    max_memory: Any = None,
    no_split_module_classes: Any = None,
    dtype: Any = None,
    special_dtypes: Any = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> Any:
    """Choose a device for every module."""


@placement_unsupported
def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: Any,
    device_map: Any = None,
    offload_folder: Any = None,
    dtype: Any = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Any = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> Any:
    """Load weights into a model, piece by piece."""


@placement_unsupported
def load_offloaded_weights(model: nn.Module, index: Any, offload_folder: Any) -> Any:
    """Load offloaded weights into a model."""


@placement_unsupported
def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: Any,
    value: Any = None,
    dtype: Any = None,
    fp16_statistics: Any = None,
    tied_params_map: Any = None,
    non_blocking: bool = False,
    clear_cache: bool = True,
) -> Any:
    """Put a tensor of a module on a device."""
