"""Pickling of functions and values that are sent to ranks and back, including those defined in a notebook.

cloudpickle pickles by value what is defined in `__main__`, which plain pickle only references by name.
"""

from __future__ import annotations

import inspect
import io
import sys
from types import CodeType
from typing import TYPE_CHECKING, Any

import cloudpickle

from paceline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["pack_call", "pack_value"]


def _restore_code(filename: str, kind: type[CodeType], arguments: tuple[Any, ...]) -> CodeType:
    return kind(*arguments).replace(co_filename=filename)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc,no-any-unimported,unused-ignore]
    """Moves tensors to the CPU, and keeps the file names of code objects.

    The reader may have another device, or none, and each rank would use rank 0's. Without the file names, which
    cloudpickle drops, a traceback could not show the lines of the function.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, CodeType):
            kind, arguments = self.dispatch_table[CodeType](obj)
            return _restore_code, (obj.co_filename, kind, arguments)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(obj, torch.Tensor) and obj.device.type not in ("cpu", "meta"):
            host = obj.detach().cpu()
            if isinstance(obj, torch.nn.Parameter):
                host = torch.nn.Parameter(host, obj.requires_grad)
            return host.__reduce_ex__(4)
        return super().reducer_override(obj)


def pack_value(value: object) -> bytes:
    """Pickle a value; raises what pickling raises."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def pack_call(function: Callable[..., Any], arguments: tuple[Any, ...], extras: dict[str, Any]) -> bytes:
    """Pickle a function with its arguments.

    Raises:
        UsageError: Something that they use cannot be pickled; the error names it.
    """
    try:
        return pack_value({"function": function, "arguments": arguments, **extras})
    except Exception as error:
        name = getattr(function, "__name__", "the function")
        culprits = list(_culprits(function, arguments))
        names = ", ".join(culprits) or "something that it uses"
        raise UsageError(
            f"{names} of {name}() cannot be sent to the ranks ({type(error).__name__}: {error})",
            "Each rank is a separate process that gets a pickled copy, and this cannot be pickled",
            "Create it inside the function, in particular the Accelerator and what it prepares",
        ) from error


def _culprits(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[str]:
    used = {f"argument {index}": value for index, value in enumerate(arguments)}
    if inspect.isfunction(function):
        names = inspect.getclosurevars(function)
        used |= {f"the variable {key!r}": value for key, value in {**names.globals, **names.nonlocals}.items()}
    for name, value in used.items():
        try:
            pack_value(value)
        except Exception:
            yield f"{name} ({type(value).__name__})"
