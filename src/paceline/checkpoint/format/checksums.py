"""CRC-32 of a file from the checksums of its pieces, so that a file written by many ranks is not read again.

The checksum of two byte ranges follows from the checksums of both and the length of the second, by multiplication of
polynomials modulo that of CRC-32. This is zlib's `crc32_combine` (`multmodp` and `x2nmodp` in
https://github.com/madler/zlib/blob/v1.3.1/crc32.c), which Python's zlib does not expose.
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
    """Bytes `[start, stop)` of a file, and their CRC-32."""

    start: int
    stop: int
    crc32: int


def combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two byte ranges, one after the other.

    Args:
        first: CRC-32 of the first range.
        second: CRC-32 of the second range.
        length: Bytes of the second range.
    """
    return _product(_shift(length), first) ^ second


def of_spans(size: int, spans: Iterable[Span]) -> int:
    """The CRC-32 of a file of `size` bytes that holds `spans` and zeros everywhere else.

    Raises:
        ValueError: They overlap, or do not fit into the file.
    """
    whole, reached = 0, 0
    for span in sorted(spans):
        if not reached <= span.start <= span.stop <= size:
            raise ValueError(f"bytes {span.start} to {span.stop} come after byte {reached} of {size}")
        whole = combine(_with_zeros(whole, span.start - reached), span.crc32, span.stop - span.start)
        reached = span.stop
    return _with_zeros(whole, size - reached)


def _with_zeros(crc: int, count: int) -> int:
    # CRC-32 starts from all 32 bits set and flips them at the end.
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
    """The factor that moves a checksum by `count` bytes: x to the 8 x `count`. Cached, as pieces have few sizes."""
    power, square = _ONE, _X_TO_THE_8
    while count:
        if count & 1:
            power = _product(power, square)
        square = _product(square, square)
        count >>= 1
    return power
