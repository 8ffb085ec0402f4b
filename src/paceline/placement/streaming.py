"""Offloaded weights ahead of need: while one module computes, the weights of those that follow are on their way.

Which modules follow is learned: the stream remembers what was used after what. A wrong guess costs time, never
correctness. Weights in host memory are page-locked once, when they are first used; those on disk pass through a few
page-locked pieces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from paceline.placement.tensors import address
from paceline.placement.transfer import DeviceQueue, PinnedMemory, Source, Transfer, Transfers, pack
from paceline.placement.weight_file import FileSlice

__all__ = ["WeightGroup", "WeightStream"]

# What is on the way or in use, where no limit was given: this many times the largest group.
_GROUPS_AHEAD = 3


class WeightGroup:
    """Weights that come to a device in one copy, for example those of a linear layer.

    Args:
        sources: Their values by name: tensors in host memory, or places in files.
        device: Where they are needed.
        on_pinned: Gets the tensors in page-locked memory, so that the originals can be freed; None to keep these.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        device: torch.device,
        on_pinned: Callable[[dict[str, torch.Tensor]], None] | None = None,
    ) -> None:
        self.device = device
        self.names = list(sources)
        self.segments, self.nbytes = pack(sources.values())
        self._on_pinned = on_pinned
        self.is_on_disk = any(isinstance(source, FileSlice) for source in sources.values())
        self.pinned: torch.Tensor | None = None
        self.users = 0
        self.tensors: dict[str, torch.Tensor] = {}

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors in a block of bytes."""
        return {name: segment.view(block) for name, segment in zip(self.names, self.segments, strict=True)}

    def keep_pinned(self, block: torch.Tensor) -> None:
        """Use page-locked memory that holds the weights instead of the sources from now on."""
        self.pinned = block
        if self._on_pinned is not None:
            views = self.views(block)
            self.segments = [
                replace(segment, source=view) for view, segment in zip(views.values(), self.segments, strict=True)
            ]
            self._on_pinned(views)


class _Load:
    """A group on its way: the memory that it will be in, and page-locked memory that keeps it from now on."""

    def __init__(
        self, group: WeightGroup, block: torch.Tensor, transfer: Transfer, staging: torch.Tensor | None = None
    ) -> None:
        self.group = group
        self.block = block
        self._transfer = transfer
        self._staging = staging

    def wait(self) -> None:
        """Let the computation that comes wait for the weights."""
        self._transfer.wait()
        if self._staging is not None:
            self.group.keep_pinned(self._staging)
            self._staging = None

    def drop(self) -> None:
        """Give up a copy that is not needed; what was page-locked for it stays."""
        if self._staging is not None:
            self.wait()


# The group before, and the group now.
Position = tuple[WeightGroup | None, WeightGroup | None]


class UseOrder:
    """Learns which group is used after which.

    It looks at the last two: a module that runs twice in a pass, between different others, is foreseen both times. In
    the first pass the order in which the groups were made serves as a guess.
    """

    def __init__(self) -> None:
        self._next: dict[Position, WeightGroup] = {}
        self._last: Position = (None, None)
        self._made: dict[WeightGroup, WeightGroup] = {}
        self._newest: WeightGroup | None = None

    def add(self, group: WeightGroup) -> None:
        """Note that a group was made."""
        if self._newest is not None:
            self._made[self._newest] = group
        self._newest = group

    def visit(self, group: WeightGroup) -> None:
        """Note that a group is used now."""
        self._next[self._last] = group
        self._last = (self._last[1], group)

    @property
    def position(self) -> Position:
        """The last two groups that were used."""
        return self._last

    def after(self, position: Position) -> WeightGroup | None:
        """Return the group that came next the last time; None if nothing is known."""
        group = self._next.get(position)
        if group is None and position[1] is not None:
            group = self._made.get(position[1])
        return group

    def without(self, groups: Collection[WeightGroup]) -> UseOrder:
        """Return an order that has yet to be learned, of the same groups without some."""
        order = UseOrder()
        for group in [*self._made, self._newest]:
            if group is not None and group not in groups:
                order.add(group)
        return order


class WeightStream:
    """Brings groups of weights to their devices ahead of need, within a limit of memory.

    Args:
        limit: The most bytes of a device for groups in use and on their way. At least the group in use fits always. By
            default three times the largest group.
        pinned_limit: The most bytes of host memory to page-lock; by default 60 % of what is free.
        devices: Types of devices that it serves; others get their weights without it.
    """

    def __init__(
        self, limit: int | None = None, pinned_limit: int | None = None, devices: tuple[str, ...] = ("cuda",)
    ) -> None:
        self.limit = limit
        self._pinned_limit = pinned_limit
        self._devices = devices
        self.order = UseOrder()
        self._transfers = Transfers()
        self._pinned = PinnedMemory(pinned_limit)
        self._queues: dict[torch.device, DeviceQueue] = {}
        # In the order in which they are needed, up to the position where the guess ends.
        self._ahead: dict[WeightGroup, _Load] = {}
        self._ahead_bytes: dict[torch.device, int] = {}
        self._foreseen_up_to: Position = (None, None)
        self._in_use: dict[torch.device, int] = {}
        self._released: dict[torch.device, list[tuple[Any, dict[str, torch.Tensor]]]] = {}
        # By the address of a source, which is kept alive: another tensor could come to lie there.
        self._shared: dict[tuple[int, torch.device], tuple[WeightGroup, torch.Tensor]] = {}
        self._largest = 0
        self._lock = threading.RLock()  # modules may run in several threads
        self.foreseen = 0
        self.unforeseen = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightStream:
        copy = WeightStream(self.limit, self._pinned_limit, self._devices)
        memo[id(self)] = copy
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightStream, (self.limit, self._pinned_limit, self._devices)

    def serves(self, device: torch.device) -> bool:
        """Whether weights for this device come through the stream."""
        return device.type in self._devices

    def group(
        self,
        sources: Mapping[str, Source],
        device: torch.device,
        on_pinned: Callable[[dict[str, torch.Tensor]], None] | None = None,
    ) -> WeightGroup:
        """Make a group of weights that always come in one copy; the arguments are those of `WeightGroup`."""
        group = WeightGroup(sources, device, on_pinned)
        self._largest = max(self._largest, group.nbytes)
        self.order.add(group)
        return group

    def shared_group(self, source: torch.Tensor, device: torch.device) -> WeightGroup:
        """Return the group of one tensor that several modules have: it is on the device once."""
        key = (address(source), device)
        if key not in self._shared:
            # Not noted in the order: it may be on the device anyway, for a module that stays there.
            group = WeightGroup({"": source}, device)
            self._shared[key] = group, source
            self._largest = max(self._largest, group.nbytes)
        return self._shared[key][0]

    def fetch(self, group: WeightGroup) -> dict[str, torch.Tensor]:
        """Return the weights of a group on its device, ready for the computation that comes."""
        with self._lock:
            return self._fetch(group)

    def _fetch(self, group: WeightGroup) -> dict[str, torch.Tensor]:
        if group.users:
            group.users += 1
            return group.tensors
        is_next = next(iter(self._ahead), None) is group
        if group in self._ahead:
            self.foreseen += 1
            load = self._take_ahead(group)
        else:
            self.unforeseen += 1
            load = self._start(group)
        group.users = 1
        self._in_use[group.device] = self._in_use.get(group.device, 0) + group.nbytes
        self.order.visit(group)
        try:
            if not is_next:
                self._foresee_anew()
            self._look_ahead()
            load.wait()
        except BaseException:
            # Memory may have run out, or a file be gone: the next fetch begins anew.
            self._release(group)
            raise
        queue = self._queue(group.device)
        if torch.is_grad_enabled():
            queue.keep_for_computation(load.block)
        group.tensors = group.views(load.block)
        return group.tensors

    def release(self, group: WeightGroup) -> None:
        """Give the weights of a group back: their memory serves others, after the computation so far."""
        with self._lock:
            self._release(group)

    def _release(self, group: WeightGroup) -> None:
        group.users -= 1
        if group.users > 0:
            return
        mark = self._queue(group.device).mark_computation()
        self._released.setdefault(group.device, []).append((mark, group.tensors))
        self._in_use[group.device] -= group.nbytes
        group.tensors = {}

    def forget(self, groups: Collection[WeightGroup]) -> None:
        """Drop groups that are not used any more."""
        with self._lock:
            for group in groups:
                if group in self._ahead:
                    self._take_ahead(group)
            self._shared = {key: each for key, each in self._shared.items() if each[0] not in groups}
            self.order = self.order.without(groups)
            self._foreseen_up_to = self.order.position

    def _queue(self, device: torch.device) -> DeviceQueue:
        if device not in self._queues:
            self._queues[device] = DeviceQueue(device)
        return self._queues[device]

    def _start(self, group: WeightGroup) -> _Load:
        """Put the copy of a group into its device's queue."""
        queue = self._queue(group.device)
        self._free_released(group.device)
        if torch.is_inference_mode_enabled():  # what is made there could not be used for gradients later
            with torch.inference_mode(False):
                return self._begin(group, queue)
        return self._begin(group, queue)

    def _begin(self, group: WeightGroup, queue: DeviceQueue) -> _Load:
        with queue.current():
            block = torch.empty(group.nbytes, dtype=torch.uint8, device=group.device)
            if group.pinned is not None:
                block.copy_(group.pinned, non_blocking=True)
                return _Load(group, block, Transfer(queue))
        staging = None if group.is_on_disk else self._pinned.take(group.nbytes)
        return _Load(group, block, self._transfers.start(group.segments, queue, block, staging), staging)

    def _free_released(self, device: torch.device) -> None:
        """Free the memory of released groups. The queue waits for what still computes with it before it goes on."""
        queue = self._queue(device)
        for mark, tensors in self._released.pop(device, ()):
            queue.wait_for(mark)
            tensors.clear()

    def _look_ahead(self) -> None:
        """Start the copies of the groups that come next, as far as the limit allows."""
        group = self.order.after(self._foreseen_up_to)
        while group is not None and group not in self._ahead and not group.users:
            if self._taken(group.device) + group.nbytes > self._allowed():
                return
            self._ahead[group] = self._start(group)
            self._ahead_bytes[group.device] = self._ahead_bytes.get(group.device, 0) + group.nbytes
            self._foreseen_up_to = (self._foreseen_up_to[1], group)
            group = self.order.after(self._foreseen_up_to)

    def _allowed(self) -> int:
        return self._largest * _GROUPS_AHEAD if self.limit is None else self.limit

    def _taken(self, device: torch.device) -> int:
        """The bytes of a device for groups in use and on their way."""
        return self._in_use.get(device, 0) + self._ahead_bytes.get(device, 0)

    def _foresee_anew(self) -> None:
        """Drop the copies that are not needed soon after all, and look ahead from here."""
        position = self.order.position
        wanted: set[WeightGroup] = set()
        total = 0
        group = self.order.after(position)
        while group is not None and group not in wanted and total <= self._allowed():
            wanted.add(group)
            total += group.nbytes
            position = (position[1], group)
            group = self.order.after(position)
        for stale in [each for each in self._ahead if each not in wanted]:
            self._take_ahead(stale).drop()
        self._foreseen_up_to = self.order.position
        self._skip_what_is_on_its_way()

    def _skip_what_is_on_its_way(self) -> None:
        """Go on after the groups that are on their way already."""
        for _ in range(len(self._ahead)):
            group = self.order.after(self._foreseen_up_to)
            if group is None or group not in self._ahead:
                return
            self._foreseen_up_to = (self._foreseen_up_to[1], group)

    def _take_ahead(self, group: WeightGroup) -> _Load:
        self._ahead_bytes[group.device] -= group.nbytes
        return self._ahead.pop(group)
