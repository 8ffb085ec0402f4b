"""Memory of the device: freed, and a batch size that fits into it."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch

from paceline.compat.accelerate.settings.errors import NotInitializedError, WrongTypeError

__all__ = ["clear_device_cache", "find_executable_batch_size", "release_memory", "should_reduce_batch_size"]

# What libraries say when memory runs out, or when a convolution has no kernel for a large batch.
_MESSAGES = (
    " out of memory.",
    "MPS backend out of memory",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
    "DefaultCPUAllocator: can't allocate memory",
    "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed",
)


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give memory that torch holds but does not use back to the device.

    Args:
        garbage_collection: Collect Python's unreachable objects first; that takes time.
    """
    if garbage_collection:
        gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """Free the memory of objects, which the caller overwrites with the result.

    Args:
        *objects: The objects.

    Returns:
        A None for each.
    """
    count = len(objects)
    del objects
    clear_device_cache(garbage_collection=True)
    return [None] * count


def should_reduce_batch_size(exception: BaseException) -> bool:
    """Whether an exception says that a smaller batch may fit."""
    if not isinstance(exception, RuntimeError) or len(exception.args) != 1:
        return False
    return any(message in str(exception.args[0]) for message in _MESSAGES)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Any:
    """Call a function with smaller batch sizes until memory suffices; a size that was found is kept for later calls.

    Args:
        function: Takes the batch size as its first argument; without one, return a decorator.
        starting_batch_size: The first batch size.
        reduce_batch_size_fn: Returns the next one; None multiplies by 0.9.

    Raises:
        WrongTypeError: The caller passed a batch size.
        NotInitializedError: Not even one sample fits.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    batch_size = starting_batch_size
    num_parameters = len(inspect.signature(function).parameters)

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal batch_size
        if num_parameters < len(args) + 1:
            raise WrongTypeError(
                f"{function.__name__} got {len(args)} arguments",
                f"It takes {num_parameters}, the first of which is the batch size that is searched for",
                "Do not pass a batch size",
            )
        clear_device_cache(garbage_collection=True)
        while batch_size > 0:
            try:
                return function(batch_size, *args, **kwargs)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            clear_device_cache(garbage_collection=True)
            batch_size = int(batch_size * 0.9) if reduce_batch_size_fn is None else reduce_batch_size_fn()
        raise NotInitializedError(
            f"No batch size from {starting_batch_size} down to 1 fits",
            "Memory runs out with each of them",
            "Use a smaller model, shorter samples, or a strategy that shards",
        )

    return run
