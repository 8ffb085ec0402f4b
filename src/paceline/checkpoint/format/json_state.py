"""States as JSON can hold them, with their tensors aside: what is loaded later runs no code."""

from __future__ import annotations

import base64
import sys
from dataclasses import is_dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from paceline.checkpoint.format.layout import DTYPE_CODES, dtype_name, dtype_named
from paceline.collectives import as_bytes
from paceline.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    """A state as JSON holds it.

    Args:
        value: Numbers, texts, tensors, arrays, and lists, tuples and dictionaries of them.
        owner: Whose state it is, and where in it `value` stands; names the tensors too.
        tensors: Gets the tensors, by name; None puts them into the JSON itself, for small ones.

    Raises:
        StateError: It holds anything else; says where.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic) and isinstance(value.item(), (bool, int, float, str, complex)):
        return to_plain(value.item(), owner)
    if isinstance(value, complex):
        return {_COMPLEX: [value.real, value.imag]}
    if isinstance(value, np.ndarray):
        return {_ARRAY: to_plain(_as_tensor(value, owner), owner, tensors)}
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, owner, tensors)
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, f"{owner}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, dict):
        return _plain_dict(value, owner, tensors)
    if is_dataclass(value):
        advice = "Let state_dict() give dataclasses.asdict(…) of it, and load_state_dict() make it again"
        raise _unfit(owner, f"dataclass, {type(value).__name__}", advice)
    raise _unfit(owner, type(value).__name__)


def _unfit(
    owner: str, kind: str, advice: str = "Leave it out of state_dict(), or put what it stands for in its place"
) -> StateError:
    return StateError(
        f"{owner} is a {kind}",
        "A checkpoint holds numbers, texts, tensors and lists and dictionaries of them: loading it runs no code",
        advice,
    )


def _as_tensor(array: np.ndarray[Any, Any], owner: str) -> Tensor:
    try:
        return torch.from_numpy(array.copy())
    except (TypeError, ValueError) as error:
        raise _unfit(owner, f"array of {array.dtype}, which torch does not have") from error


def _plain_tensor(tensor: Tensor, owner: str, tensors: dict[str, Tensor] | None) -> dict[str, Any]:
    # First: a class of its own may not even answer what its layout is.
    if _is_opaque(tensor, sharded=tensors is not None):
        advice = "Give a DTensor, which each rank saves its part of, or a whole tensor in its place"
        raise _unfit(owner, type(tensor).__name__, advice)
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise _unfit(owner, "tensor that is sparse, nested or quantized")
    if tensor.is_meta:
        raise _unfit(owner, "tensor on the meta device, which has no values")
    if tensor.is_complex() or tensor.is_neg():
        # What is conjugated or negated only when it is read.
        tensor = tensor.resolve_conj().resolve_neg()
    if tensors is None:
        return _inline(tensor)
    if tensor.dtype is torch.complex128:
        # safetensors knows complex numbers of 64 bits only.
        return {_COMPLEX: _plain_tensor(torch.view_as_real(tensor), owner, tensors)}
    if dtype_name(tensor.dtype) not in DTYPE_CODES:
        raise _unfit(owner, f"tensor of {tensor.dtype}, which safetensors files cannot hold")
    # `{"a.b": …}` and `{"a": {"b": …}}` would have one name.
    name = next(name for n in count() if (name := f"{owner}~{n}" if n else owner) not in tensors)
    tensors[name] = tensor
    return {_TENSOR: name}


def _is_opaque(tensor: Tensor, *, sharded: bool) -> bool:
    """Whether a tensor is of a class whose values are not all in memory of its own; `sharded` lets DTensors pass."""
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
    # JSON's keys are texts, and those of milestones, say, are numbers.
    items = [[key, item] for key, item in value.items()]
    return {_ITEMS: to_plain(items, owner, tensors)}


def from_plain(value: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """What `to_plain` was given; a named tuple comes back as a tuple, a number of numpy as one of Python."""
    tensors = tensors or {}
    if isinstance(value, list):
        return [from_plain(item, tensors) for item in value]
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if _BYTES in value:
            content = bytearray(base64.b64decode(value[_BYTES]))
            # torch.frombuffer refuses an empty buffer, which a tensor without elements has.
            raw = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
            return raw.view(dtype_named(value["dtype"])).reshape(value["shape"])
        if set(value) == {_TUPLE}:
            return tuple(from_plain(item, tensors) for item in value[_TUPLE])
        if set(value) == {_COMPLEX}:
            return _complex(from_plain(value[_COMPLEX], tensors))
        if set(value) == {_ARRAY}:
            return from_plain(value[_ARRAY], tensors).numpy()
        if set(value) == {_ITEMS}:
            return {from_plain(key): from_plain(item, tensors) for key, item in value[_ITEMS]}
        return {key: from_plain(item, tensors) for key, item in value.items()}
    return value


def _complex(shards: Any) -> Any:
    return torch.view_as_complex(shards) if isinstance(shards, torch.Tensor) else complex(*shards)
