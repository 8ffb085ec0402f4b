"""What travels: bytes when a tensor only moves, a dtype that every backend can add when it is reduced."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable

Op: TypeAlias = Literal["sum", "mean", "max", "min"]
WireOp: TypeAlias = Literal["sum", "max", "min"]

# The dtypes that gloo and NCCL both reduce; everything else is widened for the journey.
_REDUCED_AS_IS = frozenset(
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

    Bytes travel on every backend; gloo, for one, refuses int16, complex and float8.
    """
    # Not view(-1): what has one element or none counts as contiguous whatever its stride, as `x[:, 0]` of one row does,
    # and keeps that stride, which a view of another item size refuses.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def from_bytes(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View bytes, [..., n], as `dtype`, [..., n / itemsize], sharing their memory."""
    if not data.numel():
        # A view of no bytes would still be refused for its stride.
        return data.new_empty((*data.shape[:-1], data.shape[-1] // dtype.itemsize), dtype=dtype)
    return data.view(dtype)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous, detached tensor with the same values, without a copy where it is one already."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def seal(value: object) -> bytes | str:
    """Pickle an object for the journey; where that fails return the reason, which travels in its place."""
    try:
        return pickle.dumps(value)
    except Exception as error:
        return f"{type(value).__name__}: {error}"


def unseal(sealed: bytes | str, rank: int) -> Any:
    """Return the object that `rank` has sealed.

    Raises:
        CollectiveError: It could not be pickled. As the reason has travelled, every rank learns of it, and
            none is left waiting for the one that has the object.
    """
    if isinstance(sealed, str):
        raise CollectiveError(
            f"Rank {rank} brought an object that cannot be pickled ({sealed})",
            "Objects travel between ranks pickled",
            "Send plain values, or define the class at the top of a module",
        )
    return pickle.loads(sealed)


def reduce_over_wire(
    tensor: torch.Tensor, op: Op, size: int, exchange: Callable[[torch.Tensor, WireOp], None]
) -> torch.Tensor:
    """Reduce `tensor` over `size` ranks with `exchange`, which reduces one flat contiguous tensor in place.

    The result lands in `tensor` itself and is returned, except where its dtype has to differ, as in
    `torch.sum` and `torch.mean`: a sum of bool is int64, a mean of bool or integers is float32. Then a new
    tensor is returned.

    Raises:
        CollectiveError: `op` is not known, or it asks for the order of complex numbers.
    """
    _check_op(tensor, op)
    wire_op: WireOp = "sum" if op == "mean" else op
    travelling = _wire_dtype(tensor.dtype, op)
    if tensor.is_complex():
        buffer = torch.view_as_real(plain(tensor)).reshape(-1)
    else:
        buffer = plain(tensor).reshape(-1).to(travelling)
    if buffer.numel():
        exchange(buffer, wire_op)
    if op == "mean":
        buffer.div_(size)
    result = torch.view_as_complex(buffer.view(-1, 2)) if tensor.is_complex() else buffer
    return _land(tensor, result.reshape(tensor.shape), op)


def _check_op(tensor: torch.Tensor, op: Op) -> None:
    if op not in ("sum", "mean", "max", "min"):
        raise CollectiveError(
            f"A reduction {op!r} was asked for", "No such reduction is known", "Choose sum, mean, max or min"
        )
    if tensor.is_complex() and op in ("max", "min"):
        raise CollectiveError(
            f"The {op} of {tensor.dtype} tensors was asked for",
            "Complex numbers have no order",
            "Reduce tensor.abs() instead",
        )


def _wire_dtype(dtype: torch.dtype, op: Op) -> torch.dtype:
    if dtype == torch.bool:
        return {"sum": torch.int64, "mean": torch.float32}.get(op, torch.uint8)
    if not (dtype.is_floating_point or dtype.is_complex):
        if op == "mean":
            return torch.float32
        return dtype if dtype in _REDUCED_AS_IS else torch.int64
    # A sum of a few float16 leaves its range (65,504) although their mean does not.
    if op == "mean" and dtype == torch.float16:
        return torch.float32
    return dtype if dtype in _REDUCED_AS_IS else torch.float32


def _land(tensor: torch.Tensor, result: torch.Tensor, op: Op) -> torch.Tensor:
    whole = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    if whole and (op == "mean" or (op == "sum" and tensor.dtype == torch.bool)):
        return result
    target = tensor.detach()
    if target.data_ptr() != result.data_ptr():
        target.copy_(result)
    return tensor
