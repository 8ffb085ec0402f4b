"""Logged values: tensors are copied to the host without blocking the step, then converted for the trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LogEntry", "copy_to_host", "flatten", "numbers", "plain", "short_text", "to_json"]


_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


@dataclass
class LogEntry:
    """One call of `log`.

    Attributes:
        values: Values by name; tensors are on the host, though the copy may still be in flight.
        step: The run's step.
        settings: Keyword arguments for trackers, by their names.
        facts: What the run itself adds: time, samples seen, memory.
        copied: Event that the device records after the copies; None when there are none.
    """

    values: dict[str, Any]
    step: int | None
    settings: Mapping[str, Mapping[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    copied: Any = None

    @property
    def is_ready(self) -> bool:
        """Whether all copies have completed; does not wait."""
        return self.copied is None or bool(self.copied.query())

    def read(self) -> dict[str, Any]:
        """Return the values with numbers instead of tensors; waits for the copies."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        return {name: plain(value) for name, value in self.values.items()}


def copy_to_host(values: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Copy values, so that later changes in place do not affect them.

    Tensors on an accelerator are copied to the host asynchronously, after the work that is queued there.

    Returns:
        The values, and an event that the device records after the copies; None when there are none in flight.
    """
    devices: list[Any] = []
    copies = {str(name): _copy(value, devices) for name, value in values.items()}
    if not devices:
        return copies, None
    import torch

    event = torch.Event(device=devices[0])
    event.record(torch.accelerator.current_stream(devices[0]))
    return copies, event


def _copy(value: Any, devices: list[Any]) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _copy(part, devices) for name, part in value.items()}
    if not (hasattr(value, "detach") and hasattr(value, "device")):
        return value
    tensor = value.detach()
    # The event is one of the first device: copies from another one are waited for.
    if tensor.device.type in ("cuda", "xpu") and not devices:
        devices.append(tensor.device)
    if tensor.device in devices:
        # torch copies to pinned memory, so that the copy is queued like any kernel.
        return tensor.to("cpu", non_blocking=True)
    return plain(tensor.to("cpu"))


def plain(value: Any) -> Any:
    """Convert a tensor or array of one element to a number, a larger one to an array; leave the rest as it is."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if hasattr(value, "detach"):
        value = value.detach()
        if value.is_sparse:
            value = value.to_dense()
        if value.is_floating_point():
            value = value.float()  # numpy has no bfloat16
        value = value.resolve_conj().resolve_neg().numpy().copy()
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        return value.item()
    return value


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among values; those in nested mappings as `name/part`."""
    return {name: value for name, value in flatten(values).items() if isinstance(value, int | float)}


def flatten(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten nested mappings, with `/` between names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{before}{name}/")
        else:
            flat[f"{before}{name}"] = value
    return flat


def short_text(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Flatten settings to numbers and text only."""
    allowed = (bool, int, float, str)
    return {name: value if isinstance(value, allowed) else str(value) for name, value in flatten(values).items()}


def to_json(value: Any) -> Any:
    """Convert to JSON-compatible values: NaN and infinities, which JSON lacks, become text."""
    if isinstance(value, Mapping):
        return {str(name): to_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _NON_FINITE[str(value)]
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value
