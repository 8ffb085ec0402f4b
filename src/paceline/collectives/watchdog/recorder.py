"""Reads torch's flight recorder: the collectives that this process has entered, and which of them are pending."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from paceline.errors import named

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "OPENING",
    "GroupStatus",
    "Operation",
    "current_status",
    "flight_record",
    "group_being_opened",
    "is_device_busy",
    "read_operation",
    "recent_operations",
]

# For gloo and for NCCL; a build of torch has one or both.
_NCCL = "_dump_nccl_trace_json"
_JSON_DUMPS = ("_dump_fr_trace_json", _NCCL)
_DUMPS = ("_dump_fr_trace", "_dump_nccl_trace")
# Functions of torch in which ranks wait for each other through the store, which is not recorded.
_C10D = dist.distributed_c10d.__name__
_OPENERS = ("new_group", "split_group")
OPENING = "opening/0"
"""As what group the opening of groups is reported."""
# Operations per group to report; ranks rarely diverge further back than this.
_MAX_OPERATIONS = 24

# By group, the number of the last collective entered and of the last completed.
GroupStatus = dict[str, tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A collective that this process has entered.

    Attributes:
        group: Name of the group, the same on all its ranks.
        number: Index among the collectives of the group, from 1.
        name: Such as `all_reduce`.
        what: The input tensors, such as `float32 (4,)`.
        done: Whether it has completed on this rank.
    """

    group: str
    number: int
    name: str
    what: str
    done: bool

    def __str__(self) -> str:
        return f"{self.name} #{self.number}" + (f" of {self.what}" if self.what else "")


def current_status() -> GroupStatus:
    """Return how far each group is; empty when nothing is recorded. Takes about 0.1 ms."""
    groups: GroupStatus = {}
    for name in _JSON_DUMPS:
        for key, status in _dump(name, False).get("pg_status", {}).items():
            entered, completed = (str(status.get(f"last_{what}_collective")) for what in ("enqueued", "completed"))
            groups[f"{name}/{key}"] = (entered, completed)
    return groups


def is_device_busy() -> bool:
    """Whether a NCCL collective has been entered and has not completed."""
    behind = any(name.startswith(_NCCL) and entered != done for name, (entered, done) in current_status().items())
    return behind and any(not o.done for o in recent_operations() if o.group.startswith("nccl"))


def recent_operations() -> list[Operation]:
    """Return the last collectives of each group, oldest first. It may take half a second."""
    groups: dict[str, list[Operation]] = {}
    for name in _JSON_DUMPS:
        for entry in _dump(name).get("entries", ()):
            if not entry.get("is_p2p"):
                operation = read_operation(entry)
                groups.setdefault(operation.group, []).append(operation)
    return [operation for group in groups.values() for operation in group[-_MAX_OPERATIONS:]]


def group_being_opened() -> Operation | None:
    """Return the opening of a process group that the main thread is in, as a collective that is pending.

    Torch's record does not contain it, and every rank must take part, members of the group or not. Groups that only
    their members open are left out.
    """
    ident = threading.main_thread().ident
    frame = None if ident is None else sys._current_frames().get(ident)
    while frame is not None:
        name = frame.f_code.co_name
        if name in _OPENERS and frame.f_globals.get("__name__") == _C10D:
            if frame.f_locals.get("use_local_synchronization"):
                return None
            # All ranks open groups in the same order, and torch counts them.
            count = dist.distributed_c10d._world.group_count
            return Operation(group=OPENING, number=count, name=name, what="", done=False)
        frame = frame.f_back
    return None


def flight_record() -> bytes:
    """Return the whole record in the format of torch's own tools; empty when there is none."""
    for name in reversed(_DUMPS):
        dump: Callable[[], bytes] | None = getattr(c10d, name, None)
        with contextlib.suppress(RuntimeError):
            if dump is not None:
                return dump()
    return b""


def _dump(name: str, *arguments: bool) -> dict[str, Any]:
    dump: Callable[..., bytes] | None = getattr(c10d, name, None)
    if dump is None:
        return {}
    try:
        record: dict[str, Any] = json.loads(dump(*arguments))
    except (RuntimeError, ValueError):  # a build without a recorder raises
        return {}
    return record


def read_operation(entry: dict[str, Any]) -> Operation:
    """Return the collective that an entry of the record describes."""
    backend, _, name = str(entry.get("profiling_name", "")).rpartition(":")
    group = entry.get("process_group") or [entry.get("pg_id", 0)]
    dtypes = [_dtype(name) for name in entry.get("input_dtypes", ())]
    pairs = [_described(dtype, shape) for dtype, shape in zip(dtypes, entry.get("input_sizes", ()), strict=False)]
    return Operation(
        group=f"{backend}/{group[0]}",
        number=int(entry.get("collective_seq_id", 0)),
        name=name.strip("_"),
        what=named(pairs, 3),
        done=bool(entry.get("retired")) or entry.get("state") == "completed",
    )


def _described(dtype: str, shape: Sequence[int]) -> str:
    if dtype in ("byte", "char") and len(shape) == 1:  # pickled objects, and this library's own messages
        return f"{shape[0]} bytes"
    return f"{dtype} ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


def _dtype(name: str) -> str:
    return {"Float": "float32", "Double": "float64", "Half": "float16", "Long": "int64", "Int": "int32"}.get(
        name, name.lower()
    )
