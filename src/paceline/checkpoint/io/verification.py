"""Checking all files of a checkpoint against the checksums of its files and pieces, reading it once and in order."""

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

    Pieces = dict[Span, tuple[TensorRecord, Piece, str]]

__all__ = ["verify"]

_CHUNK = 16 * 1024**2


def verify(folder: Path, manifest: Manifest, on_progress: Callable[[int], None]) -> None:
    """Compare every byte of a checkpoint with its checksums.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        on_progress: Called with the bytes checked since the last call.

    Raises:
        DamagedCheckpointError: A checksum differs.
    """
    pieces: dict[str, Pieces] = {name: {} for name in manifest.files}
    for name, record in manifest.tensors.items():
        spans = zip(record.spans(), record.pieces, strict=True)
        pieces[record.file].update((span, (record, piece, name)) for span, piece in spans)
    for name, file in manifest.files.items():
        if _checksum(folder / name, file.size, pieces[name], on_progress) != file.crc32:
            raise DamagedCheckpointError(
                f"{name} of {folder} is damaged", "The checksum of the file differs", "Load another checkpoint"
            )


def _checksum(path: Path, size: int, pieces: Pieces, on_progress: Callable[[int], None]) -> int:
    """The CRC-32 of a file, combined from its spans; each piece is checked on the way."""
    whole = 0
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb") as opened:
        for span in _all_spans(size, pieces):
            crc = 0
            for begin in range(span.start, span.stop, _CHUNK):
                data = opened.read(min(_CHUNK, span.stop - begin))
                crc = zlib.crc32(data, crc)
                on_progress(len(data))
            if span in pieces and crc != span.crc32:
                raise damaged_piece(*pieces[span])
            whole = combine(whole, crc, span.stop - span.start)
    return whole


def _all_spans(size: int, pieces: Iterable[Span]) -> Iterator[Span]:
    """Spans that cover a file once and in order: its pieces, and the gaps between them."""
    reached = 0
    for piece in sorted(pieces):
        if reached < piece.start:
            yield Span(reached, piece.start, 0)
        yield piece
        reached = piece.stop
    if reached < size:
        yield Span(reached, size, 0)
