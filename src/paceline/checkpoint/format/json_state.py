"""States as JSON can hold them, with their tensors aside: what is loaded later runs no code."""

from __future__ import annotations

import base64
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.checkpoint.format.dtypes import dtype_named, name_of
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
_MARKS = {_TENSOR, _BYTES, _ITEMS, _TUPLE, _ARRAY}


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
    if isinstance(value, np.generic) and isinstance(value.item(), (bool, int, float, str)):
        return value.item()
    if isinstance(value, np.ndarray):
        return {_ARRAY: to_plain(_as_tensor(value, owner), owner, tensors)}
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value.detach(), owner, tensors)
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, f"{owner}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, dict):
        return _plain_dict(value, owner, tensors)
    raise _unfit(owner, type(value).__name__)


def _unfit(owner: str, kind: str) -> StateError:
    return StateError(
        f"{owner} is a {kind}",
        "A checkpoint holds numbers, texts, tensors and lists and dictionaries of them: loading it runs no code",
        "Leave it out of state_dict(), or put what it stands for in its place",
    )


def _as_tensor(array: np.ndarray[Any, Any], owner: str) -> Tensor:
    try:
        return torch.from_numpy(array.copy())
    except (TypeError, ValueError) as error:
        raise _unfit(owner, f"array of {array.dtype}, which torch does not have") from error


def _plain_tensor(tensor: Tensor, owner: str, tensors: dict[str, Tensor] | None) -> dict[str, Any]:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise _unfit(owner, "tensor that is sparse or quantized")
    if tensors is None:
        return _inline(tensor)
    # `{"a.b": …}` and `{"a": {"b": …}}` would have one name.
    name = next(name for n in count() if (name := f"{owner}~{n}" if n else owner) not in tensors)
    tensors[name] = tensor
    return {_TENSOR: name}


def _inline(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {_BYTES: base64.b64encode(raw).decode(), "dtype": name_of(tensor.dtype), "shape": list(tensor.shape)}


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
            raw = torch.frombuffer(bytearray(base64.b64decode(value[_BYTES])), dtype=torch.uint8)
            return raw.view(dtype_named(value["dtype"])).reshape(value["shape"])
        if set(value) == {_TUPLE}:
            return tuple(from_plain(item, tensors) for item in value[_TUPLE])
        if set(value) == {_ARRAY}:
            return from_plain(value[_ARRAY], tensors).numpy()
        if set(value) == {_ITEMS}:
            return {from_plain(key): from_plain(item, tensors) for key, item in value[_ITEMS]}
        return {key: from_plain(item, tensors) for key, item in value.items()}
    return value
