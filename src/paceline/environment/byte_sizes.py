"""Numbers of bytes as people write them: `5GB`, `1.5 GiB`, `512MiB`."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["BYTE_UNITS", "ByteSize", "read_byte_size"]

BYTE_UNITS = ("KB", "MB", "GB", "TB", "KIB", "MIB", "GIB", "TIB")
"""The units that nobody takes for anything else, in capital letters; `read_byte_size` takes shorter ones, too."""


_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_FACTORS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*([0-9_.]+(?:e[0-9]+)?)\s*((?:[KMGT]I?)?B?)\s*", re.IGNORECASE)


class ByteSize(NamedTuple):
    """A number of bytes that was read from text.

    Attributes:
        number: The bytes, in decimal units (kB, MB) or binary ones (KiB, MiB), as the unit says.
        unit: The unit as it was written; empty without one. What a small b means is left to the reader.
    """

    number: int
    unit: str


def read_byte_size(text: str) -> ByteSize | None:
    """Read a number of bytes; None if the text is not one.

    Args:
        text: A number, with a unit such as B, KB, GiB, m or Gi after it or none.

    Example:
        >>> read_byte_size("1.5 GiB")
        ByteSize(number=1610612736, unit='GiB')
        >>> read_byte_size("5 apples")
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    number, unit = match.groups()
    try:
        read = int(float(number) * _FACTORS[unit.upper().removesuffix("B")])
    except (ValueError, OverflowError):  # 1.2.3, or 1e999
        return None
    return ByteSize(read, unit)
