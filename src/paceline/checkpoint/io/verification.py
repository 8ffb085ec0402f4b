"""Reading all of a checkpoint once, in order, and comparing it with the checksums of its files and pieces."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING

from paceline.checkpoint.format.checksums import Span, combine
from paceline.checkpoint.io.storage import damaged_piece
from paceline.errors import DamagedCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from paceline.checkpoint.format.manifest import Manifest, Piece, TensorRecord

    Known = dict[Span, tuple[TensorRecord, Piece, str]]

__all__ = ["verify"]

_CHUNK = 16 * 1024**2


def verify(folder: Path, manifest: Manifest, told: Callable[[int], None]) -> None:
    """Compare every byte of a checkpoint with its checksums.

    Args:
        folder: The checkpoint.
        manifest: What it says of itself.
        told: Called with the bytes checked since the last call.

    Raises:
        DamagedCheckpointError: Something is not what was written.
    """
    pieces: dict[str, Known] = {name: {} for name in manifest.files}
    for name, record in manifest.tensors.items():
        known = zip(record.spans(), record.pieces, strict=True)
        pieces[record.file].update((span, (record, piece, name)) for span, piece in known)
    for name, file in manifest.files.items():
        if _checksum(folder / name, file.size, pieces[name], told) != file.crc32:
            raise DamagedCheckpointError(
                f"{name} of {folder} is damaged", "The checksum of the file differs", "Load another checkpoint"
            )


def _checksum(path: Path, size: int, pieces: Known, told: Callable[[int], None]) -> int:
    """The CRC-32 of a file, put together from the runs that it is read in; those of pieces are compared on the way."""
    whole = 0
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb") as opened:
        for span in _runs(size, pieces):
            crc = 0
            for begin in range(span.start, span.stop, _CHUNK):
                data = opened.read(min(_CHUNK, span.stop - begin))
                crc = zlib.crc32(data, crc)
                told(len(data))
            if span in pieces and crc != span.crc32:
                raise damaged_piece(*pieces[span])
            whole = combine(whole, crc, span.stop - span.start)
    return whole


def _runs(size: int, pieces: Iterable[Span]) -> Iterator[Span]:
    """Every byte of a file once, in order: its pieces, and what lies between them."""
    reached = 0
    for piece in sorted(pieces):
        if reached < piece.start:
            yield Span(reached, piece.start, 0)
        yield piece
        reached = piece.stop
    if reached < size:
        yield Span(reached, size, 0)
