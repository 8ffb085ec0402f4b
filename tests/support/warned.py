"""What was logged while something ran."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Collector(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def warnings_of(logger: str = "paceline") -> Iterator[list[str]]:
    """Collect the warnings of a logger and those below it, on this rank."""
    texts: list[str] = []
    collector = _Collector(texts)
    logging.getLogger(logger).addHandler(collector)
    try:
        yield texts
    finally:
        logging.getLogger(logger).removeHandler(collector)
