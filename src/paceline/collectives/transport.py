"""Converts tensors and objects to what every backend can send (bytes) or reduce (a supported dtype)."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable

Op: TypeAlias = Literal["sum", "mean", "max", "min"]
TransportOp: TypeAlias = Literal["sum", "max", "min"]

# The dtypes that gloo and NCCL both know. Others are widened for a reduction, and sent as bytes.
_COMMON_DTYPES = frozenset(
    {
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.int8,
    }
)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor as a flat tensor of bytes, sharing its memory.

    Every backend can send bytes; gloo, for one, rejects int16, complex and float8.
    """
    # Not view(-1): a tensor of at most one element counts as contiguous with any stride (`x[:, 0]` of one row), keeps
    # that stride, and then cannot be viewed as a dtype of another size.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def is_common(tensor: torch.Tensor) -> bool:
    """Say whether every backend can send the tensor's elements as they are."""
    return tensor.dtype in _COMMON_DTYPES and not tensor.is_neg()


def as_sendable(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous, detached tensor as a flat one that every backend can send, sharing its memory."""
    if tensor.dtype in _COMMON_DTYPES:
        return tensor.view(-1)
    return as_bytes(tensor)


def from_bytes(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View bytes, [..., n], as `dtype`, [..., n / itemsize], sharing their memory."""
    if not data.numel():
        # A view of no bytes can still be rejected for its stride.
        return data.new_empty((*data.shape[:-1], data.shape[-1] // dtype.itemsize), dtype=dtype)
    return data.view(dtype)


def as_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous, detached tensor with the same values; copies only if necessary."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def pickle_or_reason(value: object) -> bytes | str:
    """Pickle an object; if that fails, return the reason, which is sent in its place."""
    try:
        return pickle.dumps(value)
    except Exception as error:
        return f"{type(value).__name__}: {error}"


def unpickle_from(pickled: bytes | str, rank: int) -> Any:
    """Return the object that `rank` has pickled.

    Raises:
        CollectiveError: It could not be pickled. Every rank receives the reason, so none waits for the object.
    """
    if isinstance(pickled, str):
        raise CollectiveError(
            f"Rank {rank} passed an object that cannot be pickled ({pickled})",
            "Objects are pickled to be sent to other ranks",
            "Send plain values, or define the class at the top level of a module",
        )
    return pickle.loads(pickled)


def reduce_with(
    tensor: torch.Tensor, op: Op, size: int, exchange: Callable[[torch.Tensor, TransportOp], None]
) -> torch.Tensor:
    """Reduce `tensor` over `size` ranks with `exchange`, which reduces one flat contiguous tensor in place.

    Returns:
        `tensor`, with the result written into it; or a new tensor if the dtype has to differ, as for `torch.sum` and
        `torch.mean`: a sum of bool is int64, a mean of bool or integers is float32.

    Raises:
        CollectiveError: `op` is unknown, or it is "max" or "min" and the tensor is complex.
    """
    _check_op(tensor, op)
    transport_op: TransportOp = "sum" if op == "mean" else op
    dtype = _transport_dtype(tensor.dtype, op)
    if tensor.is_complex():
        buffer = torch.view_as_real(as_contiguous(tensor)).reshape(-1)
    else:
        buffer = as_contiguous(tensor).reshape(-1).to(dtype)
    if buffer.numel():
        exchange(buffer, transport_op)
    if op == "mean":
        buffer.div_(size)
    result = buffer
    if tensor.is_complex():
        result = torch.view_as_complex(buffer.view(-1, 2))
    return _write_result(tensor, result.reshape(tensor.shape), op)


def _check_op(tensor: torch.Tensor, op: Op) -> None:
    if op not in ("sum", "mean", "max", "min"):
        raise CollectiveError(f"all_reduce got op={op!r}", "There is no such reduction", "Use sum, mean, max or min")
    if tensor.is_complex() and op in ("max", "min"):
        raise CollectiveError(
            f"all_reduce got op={op!r} for a {tensor.dtype} tensor",
            "Complex numbers have no order",
            "Reduce tensor.abs() instead",
        )


def _transport_dtype(dtype: torch.dtype, op: Op) -> torch.dtype:
    if dtype == torch.bool:
        return {"sum": torch.int64, "mean": torch.float32}.get(op, torch.uint8)
    if not (dtype.is_floating_point or dtype.is_complex):
        if op == "mean":
            return torch.float32
        return dtype if dtype in _COMMON_DTYPES else torch.int64
    # A sum of a few float16 values can overflow (65,504) although their mean does not.
    if op == "mean" and dtype == torch.float16:
        return torch.float32
    return dtype if dtype in _COMMON_DTYPES else torch.float32


def _write_result(tensor: torch.Tensor, result: torch.Tensor, op: Op) -> torch.Tensor:
    is_integral = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    if is_integral and (op == "mean" or (op == "sum" and tensor.dtype == torch.bool)):
        return result
    target = tensor.detach()
    if target.data_ptr() != result.data_ptr():
        target.copy_(result)
    return tensor
