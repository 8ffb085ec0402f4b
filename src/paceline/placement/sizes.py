"""How many bytes modules need, and how many devices have."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from paceline.environment.byte_sizes import BYTE_UNITS, read_byte_size
from paceline.environment.device import memory_info
from paceline.errors import PlacementError
from paceline.placement.tensors import as_dtype, is_number_kept, named_module_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

__all__ = [
    "calculate_maximum_sizes",
    "compute_module_sizes",
    "compute_module_total_buffer_size",
    "convert_file_size_to_int",
    "dtype_byte_size",
    "get_balanced_memory",
    "get_max_layer_size",
    "get_max_memory",
    "get_module_leaves",
]

logger = logging.getLogger(__name__)

# Devices that have no number, in the order in which they are filled.
_BESIDE_NUMBERS = ("mps", "cpu", "disk")
# Formats that torch has no dtype for.
_PACKED = {"int2": 0.25, "int4": 0.5, "fp8": 1.0}
# What a single device keeps free for activations, where its memory was not limited by hand.
_USED_PART = 0.9
# Each device but the last gets an equal share and this many largest blocks more, so that nothing is left over.
_BLOCKS_OF_MARGIN = 1.25


def convert_file_size_to_int(size: int | str) -> int:
    """Read a number of bytes, such as 2048, "5MB" or "1.5GiB"; a small b at the end of "5Mb" counts bits.

    Raises:
        PlacementError: It cannot be read as a number of bytes.
    """
    if isinstance(size, int):
        return size
    found = read_byte_size(size)
    if found is None or found.unit.upper() not in ("", *BYTE_UNITS):
        raise PlacementError(
            f"A size is given as {size!r}",
            "It is not a number of bytes",
            "Write a number, or one with a unit such as 5GB",
        )
    if found.unit.endswith("b") and len(found.unit) == 2:
        count = found.number // 8
        logger.warning("The size %r counts bits, by the small b: it is %d bytes. Write B for bytes.", size, count)
        return count
    return found.number


def dtype_byte_size(dtype: torch.dtype | str) -> float:
    """Return the bytes that one number of a dtype takes; a bool counts as one bit.

    Args:
        dtype: A dtype, its name, or one of "int2", "int4" and "fp8".
    """
    name = getattr(dtype, "value", dtype)
    if isinstance(name, str) and name in _PACKED:
        return _PACKED[name]
    if dtype == torch.bool:
        return 0.125
    return as_dtype(dtype).itemsize


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
    special = {name: dtype_byte_size(each) for name, each in (special_dtypes or {}).items()}
    largest = dtype_byte_size(dtype) if dtype is not None else float("inf")
    tensors = model.named_buffers() if buffers_only else named_module_tensors(model, recurse=True)
    for name, tensor in tensors:
        own = dtype_byte_size(tensor.dtype)
        size = special.get(name, own if is_number_kept(tensor.dtype) else min(own, largest))
        parts = name.split(".")
        for depth in range(len(parts) + 1):
            sizes[".".join(parts[:depth])] += tensor.numel() * size
    return sizes


def compute_module_total_buffer_size(
    model: nn.Module,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
) -> float:
    """Return the bytes of all buffers of a model."""
    return compute_module_sizes(model, dtype, special_dtypes, buffers_only=True).get("", 0)


def get_module_leaves(module_sizes: Iterable[str]) -> list[str]:
    """Return the names that have no other name below them.

    Args:
        module_sizes: Names of modules and tensors.
    """
    names = list(module_sizes)
    parents = {name.rpartition(".")[0] for name in names}
    return [name for name in names if name and name not in parents]


def get_max_layer_size(
    modules: Sequence[tuple[str, Any]], module_sizes: Mapping[str, float], no_split_module_classes: Collection[str]
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


def can_split(module: Any, whole: Collection[str]) -> bool:
    """Whether the modules inside a module may be on different devices.

    Args:
        module: The module, or a tensor in the place of one.
        whole: Classes of modules that stay whole.
    """
    if not isinstance(module, nn.Module) or next(module.children(), None) is None:
        return False
    # It uses the weights of its output layer without calling that.
    return not isinstance(module, nn.MultiheadAttention) and type(module).__name__ not in whole


def _layers(modules: Sequence[tuple[str, Any]], whole: Collection[str]) -> Iterator[tuple[str, Any]]:
    for name, module in modules:
        if can_split(module, whole):
            yield from _layers([(f"{name}.{child}", each) for child, each in module.named_children()], whole)
        else:
            yield name, module


def calculate_maximum_sizes(model: nn.Module) -> tuple[float, tuple[float, list[str]]]:
    """Return the bytes of a model, and those of its largest layer with the layers' names."""
    sizes = compute_module_sizes(model)
    whole = getattr(model, "_no_split_modules", None) or []
    return sizes[""], get_max_layer_size(list(model.named_children()), sizes, whole)


def get_max_memory(max_memory: Mapping[int | str, float | str] | None = None) -> dict[int | str, float]:
    """Return the free bytes of every device by number, and of the host as "cpu"; accelerators come first.

    Args:
        max_memory: Sizes to use instead, as numbers or text such as "5GB".

    Raises:
        PlacementError: There can be no such device.
    """
    if max_memory is None:
        return _free_memory()
    if not isinstance(max_memory, Mapping):
        raise PlacementError(
            f"max_memory={max_memory!r} was given",
            "Limits are needed by device",
            'Pass a dict such as {0: "10GB", "cpu": "30GB"}',
        )
    return {key: _bytes(key, max_memory[key]) for key in _in_order(max_memory)}


def _in_order(devices: Iterable[int | str]) -> list[int | str]:
    """The devices in the order in which they are filled."""
    known = set(devices)
    numbers = sorted(key for key in known if isinstance(key, int))
    ordered: list[int | str] = [*numbers, *(key for key in _BESIDE_NUMBERS if key in known)]
    unknown = sorted(repr(key) for key in known - set(ordered))
    if unknown:
        raise PlacementError(
            f"max_memory has {', '.join(unknown)}",
            "Devices are known by number here, without accelerators' names",
            'Use numbers, such as 0, and "mps", "cpu" and "disk"',
        )
    absent = [key for key in numbers if not 0 <= key < torch.accelerator.device_count()]
    if absent:
        logger.warning("max_memory has devices that this machine does not have: %s", absent)
    return ordered


def _free_memory() -> dict[int | str, float]:
    """The free bytes of every device, and of the host unless an accelerator shares its memory."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    host = psutil.virtual_memory().available
    if accelerator is None:
        return {"cpu": host}
    if accelerator.type == "mps":
        return {"mps": host}
    free: dict[int | str, float] = {}
    for index in range(torch.accelerator.device_count()):
        free[index] = memory_info(torch.device(accelerator.type, index))[0]
    shares = accelerator.type == "cuda" and bool(getattr(torch.cuda.get_device_properties(0), "is_integrated", False))
    return free if shares else {**free, "cpu": host}


def _bytes(device: int | str, size: object) -> float:
    """Read a limit."""
    found = convert_file_size_to_int(size) if isinstance(size, str) else size
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not found >= 0:
        raise PlacementError(
            f"max_memory gives {size!r} to {device!r}",
            "It is not a number of bytes",
            'Write a number of at least 0, or one with a unit such as "5GB"; leave the device out to use none of it',
        )
    return found


def class_names(given: str | type | Collection[str | type] | None) -> list[str]:
    """Return names of classes as a list; the classes themselves may be given, too."""
    if given is None:
        return []
    each = [given] if isinstance(given, (str, type)) else list(given)
    return [name if isinstance(name, str) else name.__name__ for name in each]


def get_balanced_memory(
    model: nn.Module,
    max_memory: Mapping[int | str, float | str] | None = None,
    no_split_module_classes: str | Collection[str] | None = None,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    low_zero: bool = False,
) -> dict[int | str, float]:
    """Return memory limits that spread a model evenly over the accelerators.

    Args:
        model: The model, which may be on the meta device.
        max_memory: Limits by device, as in `get_max_memory`; by default all that is free.
        no_split_module_classes: Classes of modules that stay whole.
        dtype: The dtype that the weights will have.
        special_dtypes: Dtypes by name of a tensor.
        low_zero: Put as little as possible on device 0, which then has room for other things (generation, for example).
    """
    limits = get_max_memory(max_memory)
    devices = _usable_accelerators(limits)
    if not devices:
        return limits
    numbers = sorted(key for key in devices if isinstance(key, int))
    if devices == numbers[:1] and max_memory is None:
        limits[numbers[0]] *= _USED_PART
    sizes = compute_module_sizes(model, dtype, special_dtypes)
    margin = int(_BLOCKS_OF_MARGIN * _typical_block(model, sizes, class_names(no_split_module_classes)))
    if low_zero and len(devices) > 1:
        _limit_equally(limits, numbers[:-1], sizes[""] // (len(devices) - 1) + margin, spared=0)
        rest = sizes[""] - sum(limits[index] for index in numbers if index != 0)
        limits[0] = min(max(0, rest), limits.get(0, 0))
    else:
        _limit_equally(limits, numbers[:-1], sizes[""] // len(devices) + margin)
    return limits


def _usable_accelerators(limits: Mapping[int | str, float]) -> list[int | str]:
    return [key for key in limits if key not in ("cpu", "disk") and limits[key] > 0]


def _limit_equally(
    limits: dict[int | str, float], numbers: Sequence[int], share: float, spared: int | None = None
) -> None:
    """Limit accelerators to an equal share. The last one is not in `numbers`: it takes what is left over."""
    for index in numbers:
        if index != spared:
            limits[index] = min(share, limits[index])


def _typical_block(model: nn.Module, sizes: Mapping[str, float], whole: Collection[str]) -> float:
    """The bytes of the largest block that stays whole, or of a mean layer if that is more."""
    blocks = [sizes[name] for name, module in model.named_modules() if type(module).__name__ in whole and name in sizes]
    tensors = set(get_module_leaves(sizes))
    layers = get_module_leaves(name for name in sizes if name not in tensors)
    mean = int(sum(sizes[name] for name in layers) / max(len(layers), 1))
    return max([*blocks, mean])
