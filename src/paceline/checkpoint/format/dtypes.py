"""Dtypes by name: torch's, and what the header of a safetensors file calls them.

The codes are those of the format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["CODES", "SIZES", "dtype_named", "name_of"]

CODES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
SIZES: Final[dict[str, int]] = {name: getattr(torch, name).itemsize for name in CODES}
"""Bytes of one element."""


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name in `CODES`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
