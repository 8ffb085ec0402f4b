"""Copies of a training state in host memory, from which it is written while training goes on.

On an accelerator the copies run on a stream of their own beside the next forward and backward. What only an
optimizer's step changes may be copied until that step begins, so the step waits for the copies, on the device; what
the forward itself changes is copied before anything else runs.
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
    """Host memory for one copy of the state, kept from one save to the next."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._registered: list[int] = []
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def stage(self, shards: Mapping[str, TensorShard], *, updated_by_step: Collection[str]) -> dict[str, TensorShard]:
        """Copy parts to the host, and return at once where an accelerator does the copying.

        Call `wait` before reading the copies, and `hold_stream` before the state is changed.

        Args:
            shards: In live memory.
            updated_by_step: Names of those that only an optimizer's step changes.
        """
        room = self._room({name: part.values.numel() * part.values.element_size() for name, part in shards.items()})
        device = next((p.values.device for p in shards.values() if p.values.device.type == "cuda"), None)
        ordered = sorted(shards, key=lambda name: name in updated_by_step)
        if device is None:
            return {name: self._copy(shards[name], room[name]) for name in ordered}
        return self._on_stream(device, shards, room, ordered, updated_by_step)

    def _on_stream(
        self,
        device: torch.device,
        shards: Mapping[str, TensorShard],
        room: Mapping[str, Tensor],
        ordered: list[str],
        updated_by_step: Collection[str],
    ) -> dict[str, TensorShard]:
        current = torch.cuda.current_stream(device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(current)
        staged = {}
        with torch.cuda.stream(self._stream):
            hasty = [name for name in ordered if name not in updated_by_step]
            staged.update({name: self._copy(shards[name], room[name]) for name in hasty})
            current.wait_event(self._stream.record_event())
            staged.update({name: self._copy(shards[name], room[name]) for name in ordered[len(hasty) :]})
            self._copied = self._stream.record_event()
        return staged

    @staticmethod
    def _copy(part: TensorShard, raw: Tensor) -> TensorShard:
        kept = raw.view(part.dtype)
        source = part.values
        if source.device.type == "cuda" and not source.is_contiguous():
            source = source.contiguous()
            source.record_stream(torch.cuda.current_stream(source.device))
        kept.copy_(source.reshape(-1), non_blocking=True)
        return replace(part, values=kept)

    def wait(self) -> None:
        """Let the calling thread wait until the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()

    def hold_stream(self) -> None:
        """Let the device, not the host, finish the copies before it goes on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def _room(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Memory for each part, out of slabs that fit this state."""
        wanted = _pack(sizes)
        if [slab.numel() for slab in self._slabs] != [end for end, _ in wanted]:
            self.release()
            self._slabs = [torch.empty(end, dtype=torch.uint8) for end, _ in wanted]
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                self._pin()
        return {
            name: slab[begin : begin + sizes[name]]
            for slab, (_, begins) in zip(self._slabs, wanted, strict=True)
            for name, begin in begins.items()
        }

    def _pin(self) -> None:
        # torch's own pinned allocator would round each slab up to a power of two.
        for slab in self._slabs:
            if slab.numel():
                cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
                torch.cuda.check_error(cudart.cudaHostRegister(slab.data_ptr(), slab.numel(), 0))
                self._registered.append(slab.data_ptr())

    def release(self) -> None:
        """Give the memory back."""
        self.wait()
        for address in self._registered:
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(cudart.cudaHostUnregister(address))
        self._registered.clear()
        self._slabs = []


def _pack(sizes: Mapping[str, int]) -> list[tuple[int, dict[str, int]]]:
    """For each slab its bytes, and where in it each part begins."""
    slabs: list[tuple[int, dict[str, int]]] = []
    for name, size in sizes.items():
        padded = -(-size // _ALIGNMENT) * _ALIGNMENT
        if not slabs or (slabs[-1][0] and slabs[-1][0] + padded > _SLAB_BYTES):
            slabs.append((0, {}))
        end, begins = slabs[-1]
        begins[name] = end
        slabs[-1] = end + padded, begins
    return slabs
