"""What holds while a module with offloaded weights runs: one thread at a time, and no weight without values in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from paceline.errors import OffloadedModelError
from paceline.placement.tensors import META, shortened

__all__ = ["ForwardLock", "check_output", "guarded"]


class ForwardLock:
    """Lets one thread at a time run a module whose weights come and go; a copy of a hook has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        self._lock.release()

    def __deepcopy__(self, _memo: dict[int, Any]) -> ForwardLock:
        return ForwardLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardLock, ()


class _Running(threading.local):
    """The modules whose forward runs in this thread, from the outermost on."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []


_running = _Running()


@contextmanager
def guarded(module: nn.Module, lock: ForwardLock | None = None) -> Iterator[None]:
    """Refuse weights without values while a module runs on the CPU.

    A product with a weight on the meta device does not fail there: it returns whatever is in memory. Accelerators
    refuse it by themselves.

    Args:
        module: The module.
        lock: Held meanwhile.
    """
    is_outermost = not _running.modules and not torch.compiler.is_compiling()
    _running.modules.append(module)
    try:
        with lock or nullcontext(), _NoWeightsWithoutValues() if is_outermost else nullcontext():
            yield
    finally:
        _running.modules.pop()


class _NoWeightsWithoutValues(TorchFunctionMode):
    """Refuses operations on tensors with and without values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if len(args) > 1:
            devices = {each.device for each in args if isinstance(each, torch.Tensor)}
            if META in devices and len(devices) > 1:
                raise _used_without_values(next(each for each in args if _is_empty(each)))
        return func(*args, **(kwargs or {}))


def _is_empty(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device == META


def _used_without_values(weight: torch.Tensor) -> OffloadedModelError:
    module = _running.modules[-1]
    kind = type(module).__name__
    shapes = (weight.shape, weight.shape[::-1])
    names = [name for name, each in module.named_parameters() if each.device == META and each.shape in shapes]
    which = f", as {shortened(names, 3)} has," if names else ""
    return OffloadedModelError(
        f"{kind} used a weight of shape {tuple(weight.shape)}{which} that has no values now",
        *_advice(kind),
    )


def check_output(module: nn.Module, tensors: Iterable[torch.Tensor]) -> None:
    """Refuse an output that was computed from nothing but weights without values, which fails nowhere before.

    Args:
        module: The module.
        tensors: Its output.
    """
    empty = next(filter(_is_empty, tensors), None)
    if empty is not None:
        kind = type(module).__name__
        raise OffloadedModelError(
            f"{kind} returned a tensor of shape {tuple(empty.shape)} that has no values", *_advice(kind)
        )


def _advice(kind: str) -> tuple[str, str]:
    return (
        "Offloaded weights have values only while the forward of the module that has them runs",
        f"Call that module instead of using its weight, or name {kind}, or the class inside it that does this, in "
        "preload_module_classes",
    )
