"""Encodes the state of a data set as what a checkpoint can store: JSON values and tensors."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch

from paceline.errors import DataError

__all__ = ["decode", "encode"]

TAG = "__paceline__"


def encode(value: Any, owner: str, path: str = "state") -> Any:
    """Return `value` as numbers, strings, booleans, None, lists, dicts with string keys, and tensors.

    Tuples, bytes, numpy arrays and dicts with other keys are encoded so that `decode` restores them.

    Args:
        value: What a `state_dict()` returned.
        owner: What the state belongs to, for errors.
        path: Where `value` stands in the state, for errors.

    Raises:
        DataError: It contains an object of another type.
    """
    match value:
        case None | bool() | str() | torch.Tensor():
            return value
        case np.generic():
            return encode(value.item(), owner, path)
        case int() | float() if type(value) in (int, float):
            return value
        case bytes() | bytearray():
            return {TAG: "bytes", "base64": base64.b64encode(bytes(value)).decode()}
        case list() if type(value) is list:
            return [encode(item, owner, f"{path}[{i}]") for i, item in enumerate(value)]
        case tuple() if type(value) is tuple:
            return {TAG: "tuple", "items": encode(list(value), owner, path)}
        case np.ndarray() if not value.dtype.hasobject:
            return _encode_array(value)
        case dict():
            return _encode_dict(value, owner, path)
        case _:
            raise DataError(
                f"The state of {owner} contains a {type(value).__name__} at {path}",
                "A checkpoint can store numbers, strings, bytes, lists, tuples, dicts, arrays and tensors; it is never "
                "unpickled",
                "Return only such values from its state_dict()",
            )


def _encode_array(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
    # As bytes, because torch lacks some of numpy's dtypes.
    return {TAG: "array", "dtype": array.dtype.str, "shape": list(array.shape), "bytes": torch.from_numpy(data.copy())}


def _encode_dict(value: dict[Any, Any], owner: str, path: str) -> dict[str, Any]:
    if all(type(key) is str for key in value) and TAG not in value:
        return {key: encode(item, owner, f"{path}[{key!r}]") for key, item in value.items()}
    items = [[encode(k, owner, path), encode(v, owner, f"{path}[{k!r}]")] for k, v in value.items()]
    return {TAG: "dict", "items": items}


def decode(value: Any) -> Any:
    """Undo `encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get(TAG):
        case None:
            return {key: decode(item) for key, item in value.items()}
        case "bytes":
            return base64.b64decode(value["base64"])
        case "tuple":
            return tuple(decode(value["items"]))
        case "array":
            data = value["bytes"].cpu().numpy()
            return np.frombuffer(data.tobytes(), np.dtype(value["dtype"])).reshape(value["shape"]).copy()
        case "dict":
            return {decode(key): decode(item) for key, item in value["items"]}
        case kind:
            raise DataError(
                f"The state of a stream contains a value of kind {kind!r}",
                "This release can decode bytes, tuple, array and dict",
                "Load it with the paceline release that saved it",
            )
