"""CRC-32 of what is known piece by piece: the checksum of a file that many ranks wrote, without reading it again.

The sum of two runs of bytes follows from the sums of both and the length of the second: it is multiplication of
polynomials modulo that of CRC-32. The way is zlib's own `crc32_combine` (`multmodp` and `x2nmodp` in
https://github.com/madler/zlib/blob/v1.3.1/crc32.c), which Python's zlib does not hand on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Span", "combine", "of_spans"]

# As in zlib, the lowest power of x is the highest bit.
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_X_TO_THE_8 = 1 << 23


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Bytes `[start, stop)` of a file, and the CRC-32 of them."""

    start: int
    stop: int
    crc32: int


def combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two runs of bytes, one after the other.

    Args:
        first: CRC-32 of the first run.
        second: CRC-32 of the second.
        length: Of the second, in bytes.
    """
    return _product(_shift(length), first) ^ second


def of_spans(size: int, spans: Iterable[Span]) -> int:
    """The CRC-32 of a file of `size` bytes that holds `spans`, and zeros everywhere else.

    Raises:
        ValueError: They lie over each other, or do not fit into the file.
    """
    whole, reached = 0, 0
    for span in sorted(spans):
        if not reached <= span.start <= span.stop <= size:
            raise ValueError(f"bytes {span.start} to {span.stop} come after byte {reached} of {size}")
        whole = combine(_with_zeros(whole, span.start - reached), span.crc32, span.stop - span.start)
        reached = span.stop
    return _with_zeros(whole, size - reached)


def _with_zeros(crc: int, count: int) -> int:
    # CRC-32 begins at, and ends by flipping, all 32 bits.
    return _product(_shift(count), crc ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _product(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32."""
    product, bit = 0, _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _shift(count: int) -> int:
    """What moves a checksum up by `count` bytes: x to the 8 x `count`. Most pieces are of few sizes, so it is kept."""
    power, square = _ONE, _X_TO_THE_8
    while count:
        if count & 1:
            power = _product(power, square)
        square = _product(square, square)
        count >>= 1
    return power
