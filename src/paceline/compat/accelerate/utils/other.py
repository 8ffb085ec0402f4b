"""Models out of their wrappers, files on the main process, and small helpers."""

from __future__ import annotations

import copy
import logging
import platform
import re
import socket
import sys
from collections import defaultdict
from functools import reduce
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import numpy as np
import torch
from packaging.version import Version
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from paceline.compat.accelerate.state import PartialState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "check_os_kernel",
    "clean_state_dict_for_safetensors",
    "compile_regions",
    "compile_regions_deepspeed",
    "compile_regions_fsdp2",
    "convert_bytes",
    "extract_model_from_parallel",
    "get_free_port",
    "get_model_tp_size",
    "get_module_children_bottom_up",
    "get_pretty_name",
    "has_compiled_regions",
    "has_repeated_blocks",
    "id_tensor_storage",
    "is_compiled_module",
    "is_port_in_use",
    "is_repeated_blocks",
    "load",
    "merge_dicts",
    "model_has_dtensor",
    "recursive_getattr",
    "save",
    "wait_for_everyone",
]

M = TypeVar("M", bound=nn.Module)
# Kernels before it were seen to hang.
_OLDEST_KERNEL = Version("5.5.0")
_LOG = logging.getLogger(__name__.removeprefix("paceline.compat."))  # programs filter "accelerate"
# NumPy's generators and arrays, which checkpoints of random states hold.
_SAFE_GLOBALS = [
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
]


def _class_if_imported(module: str, name: str) -> tuple[type, ...]:
    """A class of a module, for `isinstance`; of a module that nobody has imported there are no instances."""
    loaded = sys.modules.get(module)
    return () if loaded is None else (getattr(loaded, name),)


def is_compiled_module(module: object) -> bool:
    """Whether `torch.compile` returned a module."""
    return isinstance(module, _class_if_imported("torch._dynamo.eval_frame", "OptimizedModule"))


def has_compiled_regions(module: nn.Module) -> bool:
    """Whether `torch.compile` returned a module inside another."""
    return any(is_compiled_module(each) for each in module.modules()) and bool(module._modules)


def is_repeated_blocks(module: nn.Module) -> bool:
    """Whether a module is a list of blocks of one class."""
    return isinstance(module, nn.ModuleList) and len(module) > 0 and all(isinstance(m, type(module[0])) for m in module)


def has_repeated_blocks(module: nn.Module) -> bool:
    """Whether a module contains a list of blocks of one class."""
    return any(is_repeated_blocks(each) for each in module.modules())


def compile_regions(module: nn.Module, **compile_kwargs: Any) -> nn.Module:
    """Compile each repeated block, and the rest part by part: all blocks share one compilation.

    Args:
        module: The model, which is left as it is.
        **compile_kwargs: Arguments of `torch.compile`.

    Returns:
        A model with the same parameters, whose `_orig_mod` is `module`.
    """
    compiled = _compiled(module, compile_kwargs)
    if "_orig_mod" not in vars(compiled):
        vars(compiled)["_orig_mod"] = module
    return compiled


def _compiled(module: nn.Module, compile_kwargs: dict[str, Any]) -> nn.Module:
    if is_repeated_blocks(module):
        return nn.ModuleList(_whole(block, compile_kwargs) for block in module.children())
    if not has_repeated_blocks(module):
        return _whole(module, compile_kwargs)
    shell = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            vars(shell)[name] = MethodType(value.__func__, shell)
    vars(shell)["_modules"] = {name: _compiled(child, compile_kwargs) for name, child in module.named_children()}
    return shell


def _whole(module: nn.Module, compile_kwargs: dict[str, Any]) -> nn.Module:
    return cast("nn.Module", torch.compile(module, **compile_kwargs))


def compile_regions_deepspeed(module: nn.Module, **compile_kwargs: Any) -> None:
    """Compile each repeated block, and the rest part by part, in place.

    Args:
        module: The model.
        **compile_kwargs: Arguments of `torch.compile`.
    """
    for region in _regions(module):
        region.compile(**compile_kwargs)


def compile_regions_fsdp2(module: M, **compile_kwargs: Any) -> M:
    """Compile each repeated block, and the rest part by part, in place: FSDP's hooks keep running.

    Args:
        module: The model.
        **compile_kwargs: Arguments of `torch.compile`.
    """
    compile_regions_deepspeed(module, **compile_kwargs)
    return module


def _regions(module: nn.Module) -> Iterator[nn.Module]:
    if is_repeated_blocks(module):
        yield from module.children()
    elif has_repeated_blocks(module):
        for child in module.children():
            yield from _regions(child)
    else:
        yield module


def model_has_dtensor(model: nn.Module) -> bool:
    """Whether parameters are distributed tensors."""
    kinds = _class_if_imported("torch.distributed.tensor", "DTensor")
    return any(isinstance(parameter, kinds) for parameter in model.parameters())


def get_model_tp_size(model: nn.Module) -> int | None:
    """Return the number of ranks that share each layer of a transformers model; None if it is not shared."""
    size = getattr(model, "tp_size", None)
    if size is not None:
        return int(size)
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    found = config.get("tp_size") if isinstance(config, dict) else getattr(config, "tp_size", None)
    return None if found is None else int(found)


def extract_model_from_parallel(
    model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> Any:
    """Get the program's own model out of the wrappers of DDP, FSDP and DeepSpeed.

    Args:
        model: The model.
        keep_fp32_wrapper: False gives a model its own forward back that a program wrapped, keeping the old one as
            `_original_forward`. The forward of a prepared model is its own in any case.
        keep_torch_compile: Keep the wrapper of `torch.compile`, around the model that was found.
        recursive: Take wrappers inside the model off, too.
    """
    compiled = model if is_compiled_module(model) or "_orig_mod" in getattr(model, "__dict__", {}) else None
    inner = model if compiled is None else compiled._orig_mod
    wrappers: tuple[Any, ...] = (
        DistributedDataParallel,
        DataParallel,
        *_class_if_imported("deepspeed", "DeepSpeedEngine"),
        *_class_if_imported("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
    )
    while isinstance(inner, wrappers):
        inner = inner.module
    if recursive:
        inner = _without_wrappers(inner)
    if not keep_fp32_wrapper:
        _restore_forward(inner)
    if compiled is None or not keep_torch_compile:
        return inner
    if is_compiled_module(compiled):
        compiled._orig_mod = inner
    else:
        vars(compiled)["_orig_mod"] = inner
    return compiled


def _restore_forward(model: Any) -> None:
    """Take the wrappers off a forward down to the model's original one, if it is among them."""
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    forward = model.forward
    while hasattr(forward, "__wrapped__") and forward != original:
        forward = forward.__wrapped__
    # As a method of the model, which can be pickled.
    model.forward = forward if isinstance(forward, MethodType) else MethodType(forward, model)


def _without_wrappers(module: nn.Module) -> nn.Module:
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module  # type: ignore[assignment]
    for name, child in module.named_children():
        setattr(module, name, _without_wrappers(child))
    return module


def wait_for_everyone() -> None:
    """Return when every rank has arrived. Collective: every rank must call it."""
    PartialState().wait_for_everyone()


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """Return what tensors that share memory have in common: device, address and size of the memory."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def clean_state_dict_for_safetensors(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without second names of the same tensor, with contiguous tensors.

    Args:
        state_dict: The state dict; second names are deleted from it.
    """
    names_of: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in state_dict.items():
        if isinstance(tensor, torch.Tensor):
            names_of[id_tensor_storage(tensor)].append(name)
    removed = [name for names in names_of.values() for name in names[1:]]
    for name in removed:
        del state_dict[name]
    if removed:
        names = ", ".join(removed)
        _LOG.warning("Removed shared tensor(s) %s from the file: it has their memory under another name.", names)
    return {name: each.contiguous() if isinstance(each, torch.Tensor) else each for name, each in state_dict.items()}


def save(obj: Any, f: Any, save_on_each_node: bool = False, safe_serialization: bool = False) -> None:
    """Write an object to a file, on rank 0.

    Args:
        obj: The object.
        f: The file.
        save_on_each_node: Write on the first rank of each machine.
        safe_serialization: Write a state dict in the format of safetensors.
    """
    state = PartialState()
    if not (state.is_local_main_process if save_on_each_node else state.is_main_process):
        return
    if safe_serialization:
        from safetensors.torch import save_file

        save_file(clean_state_dict_for_safetensors(dict(obj)), f, metadata={"format": "pt"})
    else:
        torch.save(obj, f)


def load(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """Read what `save` wrote. By default only tensors, arrays and Python's own types are accepted.

    Args:
        f: The file.
        map_location: See `torch.load`.
        **kwargs: See `torch.load`.
    """
    with torch.serialization.safe_globals(_SAFE_GLOBALS):
        return torch.load(f, map_location=map_location, **{"weights_only": True, **kwargs})


def get_pretty_name(obj: Any) -> str:
    """Return the name of a class or function, or that of an object's class."""
    named = obj if hasattr(obj, "__qualname__") or hasattr(obj, "__name__") else type(obj)
    return str(getattr(named, "__qualname__", None) or named.__name__)


def merge_dicts(source: Mapping[Any, Any], destination: dict[Any, Any]) -> dict[Any, Any]:
    """Write the entries of a nested dict into another, which is returned."""
    for key, value in source.items():
        if isinstance(value, dict):
            merge_dicts(value, destination.setdefault(key, {}))
        else:
            destination[key] = value
    return destination


def is_port_in_use(port: int | None = None) -> bool:
    """Whether some process listens at a port of this machine, by default 29500."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        return connection.connect_ex(("localhost", 29500 if port is None else port)) == 0


def get_free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def convert_bytes(size: float) -> str:
    """Write a number of bytes in the largest unit that fits."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1024:
            return f"{round(size, 2)} {unit}"
        size /= 1024
    return f"{round(size, 2)} PB"


def check_os_kernel() -> None:
    """Warn about a Linux older than 5.5, on which processes were seen to hang."""
    system = platform.uname()
    version = re.match(r"\d+\.\d+(\.\d+)?", system.release)
    if system.system == "Linux" and version is not None and Version(version.group()) < _OLDEST_KERNEL:
        _LOG.warning(f"Linux {version.group()} is old: with less than {_OLDEST_KERNEL}, processes may hang.")


def recursive_getattr(obj: Any, attr: str) -> Any:
    """Return an attribute of an attribute: `recursive_getattr(model, "layer.weight")`."""
    return reduce(getattr, attr.split("."), obj)


@overload
def get_module_children_bottom_up(model: nn.Module, return_fqns: Literal[False] = False) -> list[nn.Module]: ...
@overload
def get_module_children_bottom_up(model: nn.Module, return_fqns: Literal[True]) -> list[tuple[str, nn.Module]]: ...
def get_module_children_bottom_up(model: nn.Module, return_fqns: bool = False) -> list[Any]:
    """Return all modules of a model, each after those inside it; the model itself is the last one.

    Args:
        model: The model.
        return_fqns: Return pairs of name and module.
    """
    stack: list[tuple[str, nn.Module]] = [("", model)]
    found: list[Any] = []
    while stack:
        name, module = stack.pop()
        found.append((name, module) if return_fqns else module)
        stack.extend((f"{name}.{child}" if name else child, each) for child, each in module.named_children())
    return found[::-1]
