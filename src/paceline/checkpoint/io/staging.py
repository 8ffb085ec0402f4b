"""Copies of a training state in host memory, from which it is written while training continues.

On a GPU the copies run on a separate stream, during the next forward and backward. What only an optimizer step
changes may be copied until that step, which waits for the copies on the device. What the forward changes, such as
buffers, is copied before anything else runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from paceline.checkpoint.format.shards import TensorShard

__all__ = ["Stager"]

_ALIGNMENT = 512
_SLAB_BYTES = 2 * 1024**3


class Stager:
    """Host memory for one copy of the state, reused from one save to the next.

    Attributes:
        copied: Recorded after the last asynchronous copy; None before the first.
    """

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._registered: list[int] = []
        self._stream: torch.cuda.Stream | None = None
        self.copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def stage(self, shards: Mapping[str, TensorShard], *, updated_by_step: Collection[str]) -> dict[str, TensorShard]:
        """Copy shards to the host; a GPU copies asynchronously.

        Call `wait` before reading the copies, and `hold_stream` before changing the state.

        Args:
            shards: Live memory.
            updated_by_step: Names of the shards that only an optimizer step changes.

        Returns:
            The copies.
        """
        memory = self._allocate({name: s.values.numel() * s.values.element_size() for name, s in shards.items()})
        device = next((p.values.device for p in shards.values() if p.values.device.type == "cuda"), None)
        ordered = sorted(shards, key=lambda name: name in updated_by_step)
        if device is None:
            return {name: self._copy(shards[name], memory[name]) for name in ordered}
        return self._on_stream(device, shards, memory, ordered, updated_by_step)

    def _on_stream(
        self,
        device: torch.device,
        shards: Mapping[str, TensorShard],
        memory: Mapping[str, Tensor],
        ordered: list[str],
        updated_by_step: Collection[str],
    ) -> dict[str, TensorShard]:
        current = torch.cuda.current_stream(device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(current)
        staged = {}
        with torch.cuda.stream(self._stream):
            urgent = [name for name in ordered if name not in updated_by_step]
            staged.update({name: self._copy(shards[name], memory[name]) for name in urgent})
            current.wait_event(self._stream.record_event())
            staged.update({name: self._copy(shards[name], memory[name]) for name in ordered[len(urgent) :]})
            self.copied = self._stream.record_event()
        return staged

    @staticmethod
    def _copy(shard: TensorShard, raw: Tensor) -> TensorShard:
        copy = raw.view(shard.dtype)
        source = shard.values
        if source.device.type == "cuda" and not source.is_contiguous():
            source = source.contiguous()
            source.record_stream(torch.cuda.current_stream(source.device))
        copy.copy_(source.reshape(-1), non_blocking=True)
        return replace(shard, values=copy)

    def wait(self) -> None:
        """Block the calling thread until the copies are complete."""
        if self.copied is not None:
            self.copied.synchronize()

    def hold_stream(self) -> None:
        """Make the current stream wait for the copies; the host does not wait."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)

    def _allocate(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Memory for each shard, from slabs that fit this state."""
        packed = _pack(sizes)
        if [slab.numel() for slab in self._slabs] != [end for end, _ in packed]:
            self.release()
            self._slabs = [torch.empty(end, dtype=torch.uint8) for end, _ in packed]
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                self._pin()
        return {
            name: slab[begin : begin + sizes[name]]
            for slab, (_, offsets) in zip(self._slabs, packed, strict=True)
            for name, begin in offsets.items()
        }

    def _pin(self) -> None:
        # torch's pinned-memory allocator would round each slab up to a power of two.
        for slab in self._slabs:
            if slab.numel():
                cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                torch.cuda.check_error(cudart.cudaHostRegister(slab.data_ptr(), slab.numel(), 0))
                self._registered.append(slab.data_ptr())

    def release(self) -> None:
        """Free the memory."""
        self.wait()
        for address in self._registered:
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(cudart.cudaHostUnregister(address))
        self._registered.clear()
        self._slabs = []


def _pack(sizes: Mapping[str, int]) -> list[tuple[int, dict[str, int]]]:
    """The size of each slab, and the offset of each shard in it."""
    slabs: list[tuple[int, dict[str, int]]] = []
    for name, size in sizes.items():
        padded = -(-size // _ALIGNMENT) * _ALIGNMENT
        if not slabs or (slabs[-1][0] and slabs[-1][0] + padded > _SLAB_BYTES):
            slabs.append((0, {}))
        end, offsets = slabs[-1]
        offsets[name] = end
        slabs[-1] = end + padded, offsets
    return slabs
