"""State dicts as JSON, with their tensors kept apart, so that loading them never runs code."""

from __future__ import annotations

import base64
import sys
from dataclasses import is_dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from paceline.checkpoint.format.layout import DTYPE_CODES, dtype_name, dtype_named
from paceline.collectives import as_bytes
from paceline.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["from_plain", "to_plain"]

_TENSOR = "__tensor__"
_BYTES = "__bytes__"
_ITEMS = "__items__"
_TUPLE = "__tuple__"
_ARRAY = "__array__"
_COMPLEX = "__complex__"
_MARKS = {_TENSOR, _BYTES, _ITEMS, _TUPLE, _ARRAY, _COMPLEX}


def to_plain(value: Any, owner: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """Convert a state to what JSON can hold.

    Args:
        value: Numbers, strings, tensors, arrays, and lists, tuples and dictionaries of them.
        owner: Where `value` comes from, such as `custom_0/state.shadow`; also names the tensors.
        tensors: Receives the tensors, by name; None puts them into the JSON itself, which suits small ones.

    Raises:
        StateError: It holds anything else; says where.
    """
    value = _as_python(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, complex):
        return {_COMPLEX: [value.real, value.imag]}
    if isinstance(value, np.ndarray):
        return {_ARRAY: to_plain(_as_tensor(value, owner), owner, tensors)}
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, owner, tensors)
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, f"{owner}.{index}", tensors) for index, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return {_TUPLE: items}
    if isinstance(value, dict):
        return _plain_dict(value, owner, tensors)
    if is_dataclass(value):
        advice = "Return dataclasses.asdict(…) from state_dict(), and rebuild it in load_state_dict()"
        raise _unsupported(owner, f"dataclass, {type(value).__name__}", advice)
    raise _unsupported(owner, type(value).__name__)


def _as_python(value: Any) -> Any:
    """A NumPy scalar as a Python number or string; any other value unchanged."""
    if isinstance(value, np.generic) and isinstance(value.item(), (bool, int, float, str, complex)):
        return value.item()
    return value


def _unsupported(
    owner: str, kind: str, advice: str = "Leave it out of state_dict(), or store plain values in its place"
) -> StateError:
    return StateError(
        f"{owner} is a {kind}",
        "A checkpoint holds only numbers, strings, tensors and containers of them, so that loading it runs no code",
        advice,
    )


def _as_tensor(array: np.ndarray[Any, Any], owner: str) -> Tensor:
    try:
        return torch.from_numpy(array.copy())
    except (TypeError, ValueError) as error:
        raise _unsupported(owner, f"array of {array.dtype}, which torch does not have") from error


def _plain_tensor(tensor: Tensor, owner: str, tensors: dict[str, Tensor] | None) -> dict[str, Any]:
    # Checked first: a tensor subclass may not even implement `layout`.
    if _is_opaque(tensor, sharded=tensors is not None):
        advice = "Give a DTensor, of which each rank saves its shard, or a whole tensor"
        raise _unsupported(owner, type(tensor).__name__, advice)
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise _unsupported(owner, "tensor that is sparse, nested or quantized")
    if tensor.is_meta:
        raise _unsupported(owner, "tensor on the meta device, which has no values")
    if tensor.is_complex() or tensor.is_neg():
        # The conjugate and negative bits are not part of the bytes.
        tensor = tensor.resolve_conj().resolve_neg()
    if tensors is None:
        return _inline(tensor)
    if tensor.dtype is torch.complex128:
        # safetensors supports only complex64.
        return {_COMPLEX: _plain_tensor(torch.view_as_real(tensor), owner, tensors)}
    if dtype_name(tensor.dtype) not in DTYPE_CODES:
        raise _unsupported(owner, f"tensor of {tensor.dtype}, which safetensors files cannot hold")
    name = _unused_name(owner, tensors)
    tensors[name] = tensor
    return {_TENSOR: name}


def _unused_name(owner: str, tensors: Mapping[str, Tensor]) -> str:
    """A name for a tensor: `{"a.b": …}` and `{"a": {"b": …}}` must not share one."""
    name, attempts = owner, count()
    while name in tensors:
        name = f"{owner}~{next(attempts) + 1}"
    return name


def _is_opaque(tensor: Tensor, *, sharded: bool) -> bool:
    """Whether a tensor subclass keeps its values outside its own memory; `sharded` allows DTensors."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    if sharded and module is not None and isinstance(tensor, module.DTensor):
        return False
    has_own_dispatch = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return has_own_dispatch or bool(is_traceable_wrapper_subclass(tensor))


def _inline(tensor: Tensor) -> dict[str, Any]:
    raw = as_bytes(tensor.detach().cpu().contiguous()).numpy().tobytes()
    return {_BYTES: base64.b64encode(raw).decode(), "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}


def _plain_dict(value: Mapping[Any, Any], owner: str, tensors: dict[str, Tensor] | None) -> dict[str, Any]:
    if all(isinstance(key, str) for key in value) and not _MARKS & value.keys():
        return {key: to_plain(item, f"{owner}.{key}", tensors) for key, item in value.items()}
    # JSON keys are strings; those of a scheduler's milestones, for example, are numbers.
    items = [[key, item] for key, item in value.items()]
    return {_ITEMS: to_plain(items, owner, tensors)}


def from_plain(value: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """Undo `to_plain`. Named tuples come back as tuples, NumPy scalars as Python numbers."""
    tensors = tensors or {}
    if isinstance(value, list):
        return [from_plain(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _BYTES in value:
        return _from_inline(value)
    mark = ""
    if len(value) == 1:
        mark = next(iter(value))
    if mark in _DECODERS:
        return _DECODERS[mark](value[mark], tensors)
    return {key: from_plain(item, tensors) for key, item in value.items()}


_DECODERS: Final[dict[str, Callable[[Any, Mapping[str, Tensor]], Any]]] = {
    _TENSOR: lambda name, tensors: tensors[name],
    _TUPLE: lambda items, tensors: tuple(from_plain(item, tensors) for item in items),
    _COMPLEX: lambda parts, tensors: _complex(from_plain(parts, tensors)),
    _ARRAY: lambda array, tensors: from_plain(array, tensors).numpy(),
    _ITEMS: lambda items, tensors: {from_plain(key): from_plain(item, tensors) for key, item in items},
}


def _from_inline(value: Mapping[str, Any]) -> Tensor:
    content = bytearray(base64.b64decode(value[_BYTES]))
    # torch.frombuffer refuses the empty buffer of a tensor without elements.
    raw = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return raw.view(dtype_named(value["dtype"])).reshape(value["shape"])


def _complex(parts: Any) -> Any:
    if isinstance(parts, torch.Tensor):
        return torch.view_as_complex(parts)
    return complex(*parts)
