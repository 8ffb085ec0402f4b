"""Pickled files, read without running what they name.

torch's weights-only unpickler builds tensors and plain containers and nothing else. What a file names beyond that is
listed before anything is read: classes of the libraries that write checkpoints become inert records, a few of numpy's
are harmless, and any other name is refused.
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
    """What stands in for an object of another library: its arguments and fields, and no behaviour."""

    args: tuple[Any, ...]
    fields: dict[str, Any]

    def __new__(cls, *args: Any) -> Inert:
        """Keep the arguments."""
        made = super().__new__(cls)
        made.__dict__.update(args=args, fields={})
        return made

    def __setstate__(self, state: Any) -> None:
        self.__dict__["fields"] = state if isinstance(state, dict) else {"state": state}


def load_pickled(path: Path) -> Any:
    """Read a file that `torch.save` wrote; tensors are mapped from it.

    Raises:
        CheckpointError: It cannot be read, or names something that could run.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a file of torch.save as torch has written it since 1.6",
            "An older or damaged file cannot be read without running what is in it",
            "Save it again with a newer torch",
        )
    return _load(path, str(path), mmap=True)


def load_pickled_stream(stream: io.BytesIO, where: str) -> Any:
    """Read a small value that `torch.save` wrote.

    Raises:
        CheckpointError: It cannot be read, or names something that could run.
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
                "Reading it as it was meant would run code out of the file",
                "If it is yours, save tensors, numbers, texts and lists and dictionaries of them instead",
            )
        allowed = [(_NUMPY.get(name, Inert), name) for name in named]
        with safe_globals([*allowed, *_NUMPY_TYPES]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except CheckpointError:
        raise
    except Exception as error:
        # Whatever is wrong with the bytes of a file, it is the file that cannot be read.
        reason = first_line(error)
        raise CheckpointError(f"{where} cannot be read", reason, "Copy the file again, or load another") from error
