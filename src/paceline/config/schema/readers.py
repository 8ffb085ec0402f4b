"""Validators of several sections, which convert the accepted forms of a value to one."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator


def as_names(value: Any) -> Any:
    """Turn a comma-separated string, a list or a set into a tuple of names."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(value, key=str))
    if isinstance(value, list):
        return tuple(value)
    return value


def as_dtype_name(value: Any) -> Any:
    """Turn any usual name of a floating-point dtype, or torch's object, into fp32, bf16 or fp16."""
    word = str(value).removeprefix("torch.").casefold()
    return _DTYPES.get(word, value)


_DTYPES = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "fp16": "fp16",
    "fp32": "fp32",
    "half": "fp16",
}

Names = Annotated[tuple[str, ...], BeforeValidator(as_names)]
"""Names; a file may write them as a list or with commas between."""

FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file or folder; `~` is the user's own folder, as in a shell."""
