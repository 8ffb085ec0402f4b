"""Nested batches: moved, sliced, joined, and exchanged between ranks.

A nested batch is a tensor, or lists, tuples, named tuples and mappings of tensors at any depth. Results have the same
structure and the same types.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast

import torch

from paceline import collectives
from paceline.collectives import nested
from paceline.collectives.nested import map_leaves, maybe_children, tensors
from paceline.compat.accelerate.settings.enums import DistributedType
from paceline.compat.accelerate.settings.errors import InvalidValueError, WrongTypeError
from paceline.compat.accelerate.settings.plugins import TensorInformation
from paceline.compat.accelerate.state import AcceleratorState, PartialState, current_group
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CannotPadNestedTensorWarning",
    "ConvertOutputsToFp32",
    "DistributedOperationException",
    "GatheredParameters",
    "broadcast",
    "broadcast_object_list",
    "concatenate",
    "convert_outputs_to_fp32",
    "convert_to_fp32",
    "copy_tensor_to_devices",
    "find_batch_size",
    "find_device",
    "gather",
    "gather_object",
    "gather_tensor_shape",
    "get_data_structure",
    "get_shape",
    "honor_type",
    "ignorant_find_batch_size",
    "initialize_tensors",
    "is_namedtuple",
    "is_tensor_information",
    "is_torch_tensor",
    "listify",
    "pad_across_processes",
    "pad_input_tensors",
    "recursively_apply",
    "reduce",
    "send_to_device",
    "slice_tensors",
]

T = TypeVar("T")


class DistributedOperationException(CollectiveError):  # the name that programs catch
    """The ranks do not agree about what they exchange; raised in debug mode."""


class CannotPadNestedTensorWarning(UserWarning):
    """A tensor of torch's nested layout was not padded."""


def is_torch_tensor(tensor: object) -> bool:
    """Whether an object is a tensor."""
    return isinstance(tensor, torch.Tensor)


def is_namedtuple(data: object) -> bool:
    """Whether an object is an instance of a named tuple's class."""
    return nested.is_namedtuple(data)


def is_tensor_information(tensor_info: object) -> bool:
    """Whether an object describes a tensor of another rank."""
    return isinstance(tensor_info, TensorInformation)


def honor_type(obj: Any, generator: Iterable[Any]) -> Any:
    """Make a list, tuple or named tuple of the type of `obj` from other entries."""
    return type(obj)(*generator) if is_namedtuple(obj) else type(obj)(generator)


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """Replace every leaf that passes a test by `func(leaf, *args, **kwargs)`.

    Args:
        func: Called once per leaf.
        data: The nested batch.
        *args: Further arguments of `func`.
        test_type: The test.
        error_on_other_type: Refuse other leaves instead of keeping them.
        **kwargs: Further arguments of `func`.

    Raises:
        WrongTypeError: There is another leaf, and that is refused.
    """

    def apply(leaf: Any) -> Any:
        if test_type(leaf):
            return func(leaf, *args, **kwargs)
        if error_on_other_type:
            name = getattr(func, "__name__", repr(func))
            raise WrongTypeError(
                f"{name} got a {type(leaf).__name__}",
                "It takes tensors, in lists, tuples and dicts at any depth",
                "Convert it to a tensor, or use gather_object or broadcast_object_list",
            )
        return leaf

    return map_leaves(apply, data, _is_leaf)


def _is_leaf(data: Any) -> bool:
    """Accelerate's containers are fewer than the core's: a dataclass counts only as a mapping."""
    return dataclasses.is_dataclass(data) and not isinstance(data, Mapping)


def send_to_device(
    tensor: Any,
    device: torch.device | str | int,
    non_blocking: bool = False,
    skip_keys: str | Collection[str] | None = None,
) -> Any:
    """Move everything in a nested batch that can be moved.

    Args:
        tensor: The nested batch.
        device: The target.
        non_blocking: Return before a copy out of pinned memory has finished.
        skip_keys: Keys of mappings whose values stay where they are, at any depth.
    """
    return collectives.send_to_device(tensor, device, non_blocking=non_blocking, skip_keys=skip_keys)


def get_data_structure(data: Any) -> Any:
    """Replace every tensor by its shape and dtype."""
    return recursively_apply(lambda tensor: TensorInformation(shape=tensor.shape, dtype=tensor.dtype), data)


def get_shape(data: Any) -> Any:
    """Replace every tensor by its shape, as a list."""
    return recursively_apply(lambda tensor: list(tensor.shape), data)


def initialize_tensors(data_structure: Any) -> Any:
    """Replace every description of a tensor by a new tensor, with any values."""
    return recursively_apply(
        lambda info: torch.empty(*info.shape, dtype=info.dtype), data_structure, test_type=is_tensor_information
    )


def find_batch_size(data: Any) -> int:
    """Return the size of the first dimension of the first tensor.

    Raises:
        InvalidValueError: A container on the way to it is empty.
        WrongTypeError: What comes first is no tensor.
    """
    children = None if _is_leaf(data) else maybe_children(data)
    if children is not None:
        if not children:
            raise InvalidValueError(
                f"find_batch_size got an empty {type(data).__name__}", "It has no batch size", "Pass a batch"
            )
        return find_batch_size(children[0][1])
    if not isinstance(data, torch.Tensor):
        raise WrongTypeError(f"find_batch_size got a {type(data).__name__}", "It is no tensor", "Pass tensors")
    return data.shape[0]


def ignorant_find_batch_size(data: Any) -> int | None:
    """Return the size of the first dimension of the first tensor, or None if there is none."""
    try:
        return find_batch_size(data)
    except (ValueError, TypeError):
        return None


def find_device(data: Any) -> torch.device | None:
    """Return the device of the first tensor; None if there is no tensor."""
    return next((tensor.device for tensor in tensors(data)), None)


def listify(data: Any) -> Any:
    """Replace every tensor by a list of numbers, or by a number."""

    def to_list(tensor: torch.Tensor) -> Any:
        return tensor.detach().cpu().tolist()

    return recursively_apply(to_list, data)


def slice_tensors(
    data: Any, tensor_slice: slice, process_index: int | None = None, num_processes: int | None = None
) -> Any:
    """Replace every tensor by a part of its rows.

    Args:
        data: The nested batch.
        tensor_slice: The rows.
        process_index: Ignored; what replaces this function in a dispatched loader gets it.
        num_processes: Ignored.
    """
    return recursively_apply(lambda tensor: tensor[tensor_slice], data)


def concatenate(data: Any, dim: int = 0) -> Any:
    """Join nested batches of one structure, tensor by tensor; a single other leaf is returned as it is.

    Raises:
        WrongTypeError: Leaves of several batches are no tensors.
    """
    first = data[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(data, dim=dim)
    if isinstance(first, tuple | list):
        return honor_type(first, [concatenate([batch[index] for batch in data], dim) for index in range(len(first))])
    if isinstance(first, Mapping):
        joined = {key: concatenate([batch[key] for batch in data], dim) for key in first}
        return joined if type(first) is dict else cast("Callable[[Any], Any]", type(first))(joined)
    if len(data) == 1:
        return first
    raise WrongTypeError(
        f"concatenate got {len(data)} objects of type {type(first).__name__}", "It joins tensors", "Pass tensors"
    )


def pad_input_tensors(tensor: Any, batch_size: int, num_processes: int, dim: int = 0) -> Any:
    """Append rows of zeros to every tensor, so that each of several ranks gets some.

    Args:
        tensor: The nested batch.
        batch_size: Its number of rows.
        num_processes: The number of ranks.
        dim: Along this dimension, the present rows are copied.
    """
    per_rank, left = divmod(batch_size, num_processes)
    missing = num_processes - (per_rank or batch_size)
    if missing < min(left, 1):
        missing = left - missing

    def pad(data: torch.Tensor) -> torch.Tensor:
        padded = data.new_zeros((batch_size + missing, *data.shape[1:]))
        padded.narrow(dim, 0, data.shape[dim]).copy_(data)
        return padded

    return recursively_apply(pad, tensor, error_on_other_type=True)


def convert_to_fp32(tensor: Any) -> Any:
    """Replace every fp16 and bf16 tensor by a float32 one."""

    def is_half(leaf: Any) -> bool:
        return getattr(leaf, "dtype", None) in (torch.float16, torch.bfloat16)

    return recursively_apply(lambda half: half.float(), tensor, test_type=is_half)


class ConvertOutputsToFp32:
    """A function whose fp16 and bf16 outputs are converted to float32. It cannot be pickled.

    Args:
        model_forward: The function, such as the forward of a model.
    """

    def __init__(self, model_forward: Callable[..., Any]) -> None:
        self.model_forward = model_forward
        functools.update_wrapper(self, model_forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, and convert its outputs."""
        return convert_to_fp32(self.model_forward(*args, **kwargs))

    def __getstate__(self) -> NoReturn:
        raise pickle.PicklingError(
            "A model prepared for mixed precision was to be pickled. Its forward is wrapped. "
            "Pickle accelerator.unwrap_model(model)."
        )


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that converts the outputs of another, which is its `__wrapped__`."""
    converting = ConvertOutputsToFp32(model_forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return converting(*args, **kwargs)

    forward.__wrapped__ = converting  # type: ignore[attr-defined]
    return forward


# Between ranks. A single process gets back what it passes.


def _is_distributed() -> bool:
    return PartialState().distributed_type != DistributedType.NO


def _check_tensors(operation: str, data: Any) -> None:
    """Refuse leaves that are no tensors; in debug mode, also tensors that differ between the ranks."""

    def named(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    named.__name__ = operation
    recursively_apply(named, data, error_on_other_type=True)
    state = PartialState()
    if not state.debug:
        return
    device = find_device(data)
    if device is not None and device.type != state.device.type:
        raise DistributedOperationException(
            f"{operation} got a tensor on {device}", f"This run is on {state.device}", "Move it there first"
        )
    shapes = current_group().all_gather_object(get_shape(data))
    if any(shape != shapes[0] for shape in shapes):
        seen = "; ".join(f"rank {rank}: {shape}" for rank, shape in enumerate(shapes))
        raise DistributedOperationException(
            f"{operation} got tensors of different shapes: {seen}",
            "All ranks must pass the same shapes",
            "Use pad_across_processes first",
        )


def gather(tensor: Any) -> Any:
    """Concatenate every tensor over the ranks along dimension 0, in rank order.

    Collective: every rank must call it.
    """
    if not _is_distributed():
        return tensor
    _check_tensors("gather", tensor)
    return collectives.gather(current_group(), tensor)


def gather_object(object: Any) -> Any:  # noqa: A002  # Accelerate's name
    """Return the entries of all ranks' lists, in rank order; they are pickled.

    What is no list or tuple gives a list with one entry per rank. Collective: every rank must call it.
    """
    if not _is_distributed():
        return object
    entries = list(object) if isinstance(object, tuple) else object
    return collectives.gather_object(current_group(), entries)


def broadcast(tensor: T, from_process: int = 0) -> T:
    """Overwrite every tensor, in place, with that of one rank. Collective: every rank must call it."""
    if not _is_distributed():
        return tensor
    _check_tensors("broadcast", tensor)
    return collectives.broadcast(current_group(), tensor, from_process)


def broadcast_object_list(object_list: list[T], from_process: int = 0) -> list[T]:
    """Overwrite the entries of a list, in place, with those of one rank. Collective: every rank must call it."""
    if not _is_distributed():
        return object_list
    return collectives.broadcast_object_list(current_group(), object_list, from_process)


def reduce(tensor: Any, reduction: Literal["mean", "sum", "max", "none"] = "mean", scale: float = 1.0) -> Any:
    """Reduce every tensor over the ranks, into a new tensor. Collective: every rank must call it.

    Args:
        tensor: The nested batch.
        reduction: "none" exchanges nothing.
        scale: Ignored, as it is on all devices but TPUs.
    """
    if not _is_distributed():
        return recursively_apply(torch.clone, tensor, error_on_other_type=True)
    _check_tensors("reduce", tensor)
    return collectives.reduce(current_group(), tensor, reduction)


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
    """Pad every tensor along `dim` to the largest size that it has on any rank.

    Tensors of torch's nested layout are left as they are, with a warning. Collective: every rank must call it.

    Args:
        tensor: The nested batch.
        dim: The dimension; tensors that do not have it are left as they are.
        pad_index: The value to pad with.
        pad_first: Put the padding before the data.
    """
    flat: list[torch.Tensor] = []

    def pad_across_processes(leaf: torch.Tensor) -> None:  # an error names it
        flat.append(leaf)

    recursively_apply(pad_across_processes, tensor, error_on_other_type=True)
    dense = [leaf for leaf in flat if not leaf.is_nested]
    _check_dimensions(dense)
    if len(dense) == len(flat):
        return collectives.pad_across_processes(current_group(), tensor, dim, pad_index, pad_first)
    warnings.warn("Nested tensors are not padded", CannotPadNestedTensorWarning, stacklevel=2)
    padded = iter(collectives.pad_across_processes(current_group(), dense, dim, pad_index, pad_first))
    return recursively_apply(lambda leaf: leaf if leaf.is_nested else next(padded), tensor)


def _check_dimensions(tensors: list[torch.Tensor]) -> None:
    """In debug mode, refuse tensors of which ranks have different numbers of dimensions."""
    if not (PartialState().debug and _is_distributed()):
        return
    dimensions = current_group().all_gather_object([tensor.ndim for tensor in tensors])
    if any(each != dimensions[0] for each in dimensions):
        seen = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(dimensions))
        raise DistributedOperationException(
            f"pad_across_processes got tensors with different numbers of dimensions: {seen}",
            "Only sizes along one dimension can be made equal",
            "Pass tensors of the same kind on all ranks",
        )


def gather_tensor_shape(tensor: torch.Tensor | None) -> tuple[torch.Size, torch.dtype]:
    """Return shape and dtype of the tensor of the first rank that has one. Collective: every rank must call it."""
    described = None if tensor is None else (tensor.shape, tensor.dtype)
    known = [each for each in current_group().all_gather_object(described) if each is not None]
    if not known:
        raise InvalidValueError("No rank has a tensor", "There is nothing to copy", "Pass a tensor on one rank")
    return known[0]


def copy_tensor_to_devices(tensor: torch.Tensor | None = None) -> torch.Tensor:
    """Give every rank the tensor that one rank has; the others pass None. Collective: every rank must call it."""
    shape, dtype = gather_tensor_shape(tensor)
    own = torch.zeros(shape, dtype=dtype, device=PartialState().device) if tensor is None else tensor
    return cast("torch.Tensor", reduce(own, "sum"))


@contextmanager
def GatheredParameters(  # noqa: N802  # DeepSpeed's name
    params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
) -> Iterator[None]:
    """Make parameters whole within the block, under ZeRO 3; elsewhere they are.

    Collective under ZeRO 3: every rank must enter it.

    Args:
        params: The parameters.
        modifier_rank: The rank whose changes are sent to the others; None if none changes them.
        fwd_module: See DeepSpeed.
        enabled: Do nothing if False.
    """
    state = AcceleratorState()
    plugin = state.deepspeed_plugin
    whole: AbstractContextManager[Any] = nullcontext()
    if state.distributed_type == DistributedType.DEEPSPEED and (plugin is None or plugin.is_zero3_init_enabled()):
        whole = import_module("deepspeed").zero.GatheredParameters(
            params, modifier_rank=modifier_rank, fwd_module=fwd_module, enabled=enabled
        )
    with whole:
        yield
