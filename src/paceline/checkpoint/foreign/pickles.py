"""Reading pickled files without running code from them.

torch's weights-only unpickler builds only tensors and plain containers. Other names in a file are listed before
anything is read: classes of the libraries that write checkpoints become inert records, a few of NumPy's are harmless,
and any other name is refused.
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from paceline.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import io
    from pathlib import Path

__all__ = ["Inert", "load_pickled", "load_pickled_stream"]

_WRITERS = ("deepspeed.", "accelerate.", "transformers.", "argparse.Namespace")
_ARRAY_MAKER: Any = np.empty(0).__reduce__()[0]
_NUMPY: dict[str, Any] = {
    "numpy._core.multiarray._reconstruct": _ARRAY_MAKER,
    "numpy.core.multiarray._reconstruct": _ARRAY_MAKER,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
}
_NUMPY_TYPES = [type(np.dtype(name)) for name in ("uint32", "int64", "float64", "uint8")]


class Inert:
    """Stands in for an object of another library: has its arguments and fields, but no behavior."""

    args: tuple[Any, ...]
    fields: dict[str, Any]

    def __new__(cls, *args: Any) -> Inert:
        """Store the arguments."""
        record = super().__new__(cls)
        record.__dict__.update(args=args, fields={})
        return record

    def __setstate__(self, state: Any) -> None:
        self.__dict__["fields"] = state if isinstance(state, dict) else {"state": state}


def load_pickled(path: Path) -> Any:
    """Read a file that `torch.save` wrote; its tensors are memory-mapped.

    Raises:
        CheckpointError: It cannot be read, or refers to code.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a zip-format torch.save file (torch >= 1.6)",
            "An older or damaged file cannot be read without running code from it",
            "Save it again with a newer torch",
        )
    return _load(path, str(path), mmap=True)


def load_pickled_stream(stream: io.BytesIO, where: str) -> Any:
    """Read a small value that `torch.save` wrote.

    Raises:
        CheckpointError: It cannot be read, or refers to code.
    """
    return _load(stream, where, mmap=False)


def _load(source: Any, where: str, *, mmap: bool) -> Any:
    try:
        named = get_unsafe_globals_in_checkpoint(source)
        if not mmap:
            source.seek(0)
        refused = [name for name in named if name not in _NUMPY and not name.startswith(_WRITERS)]
        if refused:
            raise CheckpointError(
                f"{where} names {', '.join(sorted(refused)[:5])}",
                "Loading it would run code from the file",
                "If you wrote it, save only tensors, numbers, strings, and lists and dictionaries of them",
            )
        allowed = [(_NUMPY.get(name, Inert), name) for name in named]
        with safe_globals([*allowed, *_NUMPY_TYPES]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except CheckpointError:
        raise
    except Exception as error:
        # Damaged bytes raise all kinds of errors.
        reason = first_line(error)
        raise CheckpointError(f"{where} cannot be read", reason, "Copy the file again, or load another") from error
