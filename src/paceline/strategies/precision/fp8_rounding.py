"""Rounds many tensors to fp8 by their scales: in one Triton kernel where there is one, else one after another."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Rounding"]

# Elements that one program of the kernel rounds.
_BLOCK = 4096
# Of addresses in bytes, for loads of 16 bytes.
_ALIGNMENT = 16


class Rounding:
    """Rounds the same tensors again and again into the same memory.

    Args:
        tensors: fp32 or bf16, contiguous, all on one device.
        dtype: An fp8 dtype.
    """

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._rounded = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        self._table = _Table(tensors, self._rounded) if _fits_kernel(tensors, self._rounded) else None

    def is_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are those that it was made for, in the same memory."""
        return self._addresses == [tensor.data_ptr() for tensor in tensors]

    @torch.no_grad()
    def __call__(self, scales: Sequence[Tensor]) -> list[Tensor]:
        """Multiply each tensor by its scale, and round it.

        Args:
            scales: fp32, each of shape [].

        Returns:
            In fp8, each of the shape of its tensor; the next call writes into the same memory.
        """
        if self._table is not None:
            self._table.round(torch.stack(list(scales)))
            return self._rounded
        for tensor, scale, rounded in zip(self._tensors, scales, self._rounded, strict=True):
            largest = torch.finfo(rounded.dtype).max
            rounded.copy_((tensor.float() * scale).clamp_(-largest, largest))
        return self._rounded


class _Table:
    """Where the tensors are, in the memory of their device."""

    def __init__(self, tensors: Sequence[Tensor], rounded: Sequence[Tensor]) -> None:
        device = tensors[0].device
        which = [index for index, tensor in enumerate(tensors) for _ in range(0, tensor.numel(), _BLOCK)]
        starts = [start for tensor in tensors for start in range(0, tensor.numel(), _BLOCK)]
        self._num_programs = len(which)
        self._is_fp32 = tensors[0].dtype == torch.float32
        self._which = torch.tensor(which, dtype=torch.int32, device=device)
        self._starts = torch.tensor(starts, dtype=torch.int64, device=device)
        self._sizes = torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64, device=device)
        self._sources = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=device)
        self._targets = torch.tensor([tensor.data_ptr() for tensor in rounded], dtype=torch.int64, device=device)

    def round(self, scales: Tensor) -> None:
        """Round all tensors; `scales` has one element for each."""
        _kernel()[(self._num_programs,)](
            self._sources, self._targets, scales, self._which, self._starts, self._sizes,
            is_fp32=self._is_fp32, block=_BLOCK, num_warps=4,
        )  # fmt: skip


def _fits_kernel(tensors: Sequence[Tensor], rounded: Sequence[Tensor]) -> bool:
    """Whether the kernel rounds them, and gives what torch's operations give."""
    first = tensors[0]
    alike = all(tensor.dtype == first.dtype and tensor.is_contiguous() for tensor in tensors)
    aligned = all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in (*tensors, *rounded))
    empty = all(tensor.numel() == 0 for tensor in tensors)
    return alike and aligned and not empty and _has_kernel(first.device, first.dtype, rounded[0].dtype)


@lru_cache
def _has_kernel(device: torch.device, dtype: torch.dtype, target: torch.dtype) -> bool:
    if device.type != "cuda" or torch.version.hip or target != torch.float8_e4m3fn:
        return False
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator(device).manual_seed(0)
    tensor = torch.randn(_BLOCK + 5, device=device, generator=generator).to(dtype)
    scale = torch.tensor(200.0, device=device)
    rounded = torch.empty_like(tensor, dtype=target)
    try:
        _Table([tensor], [rounded]).round(scale[None])
    except Exception:  # Triton is missing, or there is no compiler for its launcher.
        return False
    largest = torch.finfo(target).max
    expected = (tensor.float() * scale).clamp_(-largest, largest).to(target)
    return torch.equal(rounded.view(torch.uint8), expected.view(torch.uint8))


@lru_cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]
        sources, targets, scales, which, starts, sizes, is_fp32: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        index = tl.load(which + program)
        offsets = tl.load(starts + program) + tl.arange(0, block)
        inside = offsets < tl.load(sizes + index)
        if is_fp32:
            source = tl.load(sources + index).to(tl.pointer_type(tl.float32))
        else:
            source = tl.load(sources + index).to(tl.pointer_type(tl.bfloat16))
        target = tl.load(targets + index).to(tl.pointer_type(tl.float8e4nv))
        source = tl.multiple_of(source, 16)
        target = tl.multiple_of(target, 16)
        x = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32) * tl.load(scales + index)
        # The conversion saturates.
        tl.store(target + offsets, x.to(tl.float8e4nv), mask=inside)

    return kernel
