"""Values on their way into a record: tensors leave the device without making the step wait."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LogEntry", "copy_to_host", "flatten", "numbers", "plain", "short_text", "to_json"]


@dataclass
class LogEntry:
    """What one call of `log` said.

    Attributes:
        values: By name; tensors are on the host, though their numbers may still be on the way there.
        step: Of the run.
        settings: Passed on to trackers, by their names.
        facts: What the run knows itself: time, samples seen, memory.
        copied: Is reached by the device when the numbers are there; None if they are.
    """

    values: dict[str, Any]
    step: int | None
    settings: Mapping[str, Mapping[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    copied: Any = None

    @property
    def is_here(self) -> bool:
        """Whether all numbers have come; does not wait."""
        return self.copied is None or bool(self.copied.query())

    def read(self) -> dict[str, Any]:
        """The values with numbers in place of tensors; waits until they have come."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        return {name: plain(value) for name, value in self.values.items()}


def copy_to_host(values: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Take a copy of values that no later change reaches, and say when it is there.

    Tensors on an accelerator are copied to the host behind the work that is queued there; nobody waits.

    Returns:
        The values, and an event that the device reaches when they are on the host; None if they are.
    """
    devices: list[Any] = []
    held = {str(name): _hold(value, devices) for name, value in values.items()}
    if not devices:
        return held, None
    import torch

    event = torch.Event(device=devices[0])
    event.record(torch.accelerator.current_stream(devices[0]))
    return held, event


def _hold(value: Any, devices: list[Any]) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _hold(part, devices) for name, part in value.items()}
    if not (hasattr(value, "detach") and hasattr(value, "device")):
        return value
    tensor = value.detach()
    if tensor.device.type in ("cuda", "xpu"):
        devices.append(tensor.device)
        # torch makes the copy in pinned memory, so that it is queued like everything else.
        return tensor.to("cpu", non_blocking=True)
    return plain(tensor.to("cpu"))


def plain(value: Any) -> Any:
    """A number for a tensor or array of one element, an array for a larger one; the rest as it is."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if hasattr(value, "detach"):
        value = value.detach()
        # numpy has no bfloat16.
        value = value.float().numpy().copy() if value.is_floating_point() else value.numpy().copy()
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        return value.item()
    return value


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among values; those in mappings under `name/part`."""
    return {name: value for name, value in flatten(values).items() if isinstance(value, int | float)}


def flatten(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """One level in place of nested mappings, with `/` between names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{before}{name}/")
        else:
            found[f"{before}{name}"] = value
    return found


def short_text(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Settings as numbers and text only, on one level."""
    kept = (bool, int, float, str)
    return {name: value if isinstance(value, kept) else str(value) for name, value in flatten(values).items()}


def to_json(value: Any) -> Any:
    """What JSON can copy_to_host: numbers that are none, which it has no words for, become text."""
    if isinstance(value, Mapping):
        return {str(name): to_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value
