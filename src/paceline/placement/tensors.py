"""The parameters and buffers of a model by name: listing, tying and moving them one by one."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from paceline.errors import PlacementError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "as_device",
    "as_dtype",
    "find_tied_parameters",
    "get_non_persistent_buffers",
    "is_extra_state",
    "named_module_tensors",
    "retie_parameters",
    "set_module_tensor_to_device",
]

Device = int | str | torch.device
META = torch.device("meta")


class TiedParameters(dict[int, dict[Any, torch.Tensor]]):
    """For each tied parameter, by the address of its original values, the parameter on each device that has it."""

    def __init__(self) -> None:
        super().__init__()
        self._originals: dict[int, Any] = {}

    def note(self, tensor: torch.Tensor) -> None:
        """Note that a tensor is tied, so that each device gets it once."""
        key = address(tensor)
        if key:
            self.setdefault(key, {})
            make: Any = StorageWeakRef
            self._originals[key] = make(tensor.untyped_storage())

    def forget_gone(self, key: int) -> None:
        """Forget an original whose memory was freed: what lies there now is another tensor."""
        original = self._originals.get(key)
        if original is not None and original.expired():
            del self[key], self._originals[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> TiedParameters:
        # The originals of a copied model lie elsewhere, and come to each device once for each of their modules.
        memo[id(self)] = twin = TiedParameters()
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return TiedParameters, ()


def tied_copies(
    tied: dict[int, dict[Any, torch.Tensor]] | None, tensor: torch.Tensor | None
) -> dict[Any, torch.Tensor] | None:
    """The parameters on devices that a tied tensor has; None if it is not tied.

    Args:
        tied: Parameters that are tied.
        tensor: The original.
    """
    key = address(tensor)
    if not tied or not key:
        return None
    if isinstance(tied, TiedParameters):
        tied.forget_gone(key)
    return tied.get(key)


# Parameters of bitsandbytes: their constructors take what they know of their quantization.
_BITSANDBYTES = ("Int8Params", "FP4Params", "Params4bit")


def as_device(device: Device) -> torch.device:
    """Return the device; a number is one of this machine's accelerator."""
    if not isinstance(device, int):
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cuda" if accelerator is None else accelerator.type, device)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name such as `float16` or `torch.float16`.

    Raises:
        PlacementError: torch has no such dtype.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise PlacementError(f"dtype={dtype!r} was given", "torch has no such dtype", "Write, for example, 'bfloat16'")
    return found


def is_same_device(first: torch.device, second: torch.device) -> bool:
    """Whether two devices are the same one; an accelerator without a number is number 0."""
    return _numbered(first) == _numbered(second)


def _numbered(device: torch.device) -> torch.device:
    return torch.device(device.type, 0) if device.type not in ("cpu", "meta") and device.index is None else device


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
    """Put one parameter under all names of each group: the first that has values, or the first if none has.

    Args:
        model: The model.
        tied_params: The groups, as `find_tied_parameters` returned them.
    """
    for group in tied_params:
        owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in group]
        candidates = [each for each in (getattr(owner, name) for owner, name in owners) if each is not None]
        shared = next((each for each in candidates if each.device.type != "meta"), next(iter(candidates), None))
        if shared is not None:
            for owner, name in owners:
                setattr(owner, name, shared)


def is_extra_state(name: str) -> bool:
    """Whether an entry of a state dict is what a module adds by `get_extra_state`: any object, and no weight."""
    return name.rpartition(".")[2] == "_extra_state"


def shortened(names: Sequence[str], most: int = 8) -> str:
    """Return names for a message, not more than a line holds."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def find_owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that owns a tensor, and the tensor's name in it.

    Raises:
        PlacementError: There is no such tensor.
    """
    *path, last = name.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part, None)
        if owner is None:
            break
    if owner is None or (last not in owner._parameters and last not in owner._buffers):
        raise PlacementError(
            f"The tensor {name!r} was looked for in {type(module).__name__}",
            "It has no parameter or buffer of that name",
            "Check the name against model.state_dict()",
        )
    return owner, last


def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: Device,
    value: torch.Tensor | None = None,
    dtype: str | torch.dtype | None = None,
    fp16_statistics: torch.Tensor | None = None,
    tied_params_map: TiedParameters | None = None,
    non_blocking: bool = False,
    clear_cache: bool = True,
) -> None:
    """Put one parameter or buffer of a module on a device, optionally with other values.

    Args:
        module: The module.
        tensor_name: The tensor, such as `layers.0.weight`.
        device: The device.
        value: The new values; needed where the tensor is on the meta device and is to leave it.
        dtype: The dtype of the new values; by default the tensor's. Integers keep theirs.
        fp16_statistics: The scales of an 8-bit weight of bitsandbytes.
        tied_params_map: Parameters that are already on a device, by the address of their original and by device.
        non_blocking: Return before a copy out of pinned memory has finished.
        clear_cache: Accepted, and without effect: freed memory stays with the process, for the next weights.

    Raises:
        PlacementError: There is no such tensor, its shape is another one, or values are missing.
    """
    owner, name = find_owner(module, tensor_name)
    old = getattr(owner, name)
    tied = tied_copies(tied_params_map, old if value is None else value)
    if tied is not None and device in tied:
        owner._parameters[name] = tied[device]  # type: ignore[assignment]
        return
    if value is not None:
        value = _converted(old, value, name, dtype, non_blocking)
    elif old.device == META and as_device(device) != META:
        raise PlacementError(
            f"{tensor_name} is on the meta device, and is to go to {device} without new values",
            "A tensor on the meta device has no values",
            "Pass value=",
        )
    new = _placed(owner, name, as_device(device), value, dtype, non_blocking)
    if fp16_statistics is not None:
        new.SCB = fp16_statistics.to(new.device, non_blocking=non_blocking)  # type: ignore[attr-defined]
    if tied is not None:
        tied[device] = new


def _converted(
    old: torch.Tensor, value: torch.Tensor, name: str, dtype: str | torch.dtype | None, non_blocking: bool
) -> torch.Tensor:
    """New values for a tensor, in the dtype that they are to have."""
    check_shape(old, value.shape, name)
    if dtype is None:
        return value.to(old.dtype, non_blocking=non_blocking)
    if is_number_kept(value.dtype):
        return value
    return value.to(as_dtype(dtype), non_blocking=non_blocking)


def check_shape(old: torch.Tensor, shape: Sequence[int], name: str) -> None:
    """Check that new values for a tensor have its shape.

    Args:
        old: The tensor.
        shape: The shape of the new values.
        name: The tensor's name.

    Raises:
        PlacementError: They have another one.
    """
    if not _may_replace(old, shape):
        raise PlacementError(
            f"The new values of {name} have the shape {tuple(shape)}; it has {tuple(old.shape)} in the model",
            "They are weights of another model, or of this one with another configuration",
            "Build the model as the one that was saved",
        )


def _may_replace(old: torch.Tensor, shape: Sequence[int]) -> bool:
    # A 4-bit weight of bitsandbytes is packed into another shape.
    return tuple(old.shape) == tuple(shape) or type(old).__name__ == "Params4bit"


def is_number_kept(dtype: torch.dtype) -> bool:
    """Whether a tensor of this dtype keeps it when a model's dtype is changed."""
    return not (dtype.is_floating_point or dtype.is_complex)


def _placed(
    owner: nn.Module,
    name: str,
    device: torch.device,
    value: torch.Tensor | None,
    dtype: str | torch.dtype | None,
    non_blocking: bool,
) -> torch.Tensor:
    """Put a tensor, or its new values, on a device, into the module; return it."""
    old: Any = getattr(owner, name)
    if value is None:
        # Without values only the dtype of what stays without values changes.
        is_cast = dtype is not None and device == META and not is_number_kept(old.dtype)
        target = as_dtype(dtype) if is_cast and dtype is not None else old.dtype
        if is_same_device(old.device, device) and target == old.dtype:
            return old  # type: ignore[no-any-return]
        value = old.detach().to(target)
    value = value.to(device, non_blocking=non_blocking)
    if name in owner._buffers:
        owner._buffers[name] = value
        return value
    with torch.no_grad():
        new = as_parameter(old, value, device)
    owner._parameters[name] = new
    return new


def as_parameter(old: nn.Parameter, value: torch.Tensor, device: torch.device) -> nn.Parameter:
    """Return a parameter of the same kind as another one, with other values.

    Args:
        old: The parameter whose class, attributes and `requires_grad` it takes.
        value: Its values.
        device: Where it goes; a quantized one quantizes its values on the way.
    """
    kind: Any = type(old)
    if kind is nn.Parameter:
        new = nn.Parameter(value, requires_grad=old.requires_grad)
    elif kind.__name__ in _BITSANDBYTES:
        attributes = {name: each for name, each in vars(old).items() if name != "_is_hf_initialized"}
        new = kind(value, requires_grad=old.requires_grad, **attributes).to(device)
    elif isinstance(value, nn.Parameter):
        return value
    else:
        new = nn.Parameter(value, requires_grad=old.requires_grad)
    if "_is_hf_initialized" in vars(old):
        new._is_hf_initialized = vars(old)["_is_hf_initialized"]  # type: ignore[attr-defined]
    return new


def address(tensor: torch.Tensor | None) -> int:
    """Return the address of a tensor's values; 0 where it has none."""
    if tensor is None or tensor.device.type == "meta":
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without one storage of its own
        return 0
