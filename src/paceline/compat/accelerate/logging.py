"""A logger whose messages come from rank 0 only, or from each rank in turn."""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from paceline.compat.accelerate.settings.errors import NotInitializedError
from paceline.compat.accelerate.state import PartialState

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:  # Python 3.10 cannot subscript it
    _Adapter = logging.LoggerAdapter

__all__ = ["MultiProcessAdapter", "get_logger"]

_WARNED: set[tuple[str, str]] = set()


class MultiProcessAdapter(_Adapter):
    """A `logging.LoggerAdapter` that puts the rank before each message. Its calls take two arguments more.

    * `main_process_only=True`, the default: only rank 0 writes. Otherwise every rank does.
    * `in_order=True`: every rank writes, one after the other. Collective: every rank must call it.
    """

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message.

        Args:
            level: The level, such as `logging.INFO`.
            msg: The message, with %-style placeholders.
            *args: Values of the placeholders.
            **kwargs: `main_process_only`, `in_order`, and those of `logging.Logger.log`.

        Raises:
            NotInitializedError: There is no Accelerator and no PartialState yet, so the rank is not known.
        """
        if PartialState._shared_state == {}:
            raise NotInitializedError(
                "A message was logged before there is an Accelerator",
                "The rank, which decides whether it appears, is not known yet",
                "Make an Accelerator or a PartialState first",
            )
        state = PartialState()
        main_only, in_order = kwargs.pop("main_process_only", True), kwargs.pop("in_order", False)
        msg, kwargs = self.process(msg, kwargs)  # type: ignore[assignment]
        # The ranks may log at different levels, so all of them wait for each other.
        for rank in range(state.num_processes) if in_order else [state.process_index]:
            is_turn = rank == state.process_index and (in_order or not main_only or state.is_main_process)
            if is_turn and self.isEnabledFor(level):
                self.logger.log(level, msg, *args, **kwargs)
            if in_order:
                state.wait_for_everyone()

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[object, MutableMapping[str, Any]]:
        """Put the rank before a message."""
        kwargs.setdefault("stacklevel", 2)
        return f"[RANK {PartialState().process_index}] {msg}", kwargs

    def warning_once(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a warning, unless it was logged before with the same arguments.

        Args:
            msg: The message, with %-style placeholders.
            *args: Values of the placeholders.
            **kwargs: As in `log`.
        """
        key = (self.logger.name, repr((msg, args, kwargs)))
        if key not in _WARNED:
            _WARNED.add(key)
            kwargs.setdefault("stacklevel", 3)
            self.log(logging.WARNING, msg, *args, **kwargs)


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """Return a logger whose messages come from rank 0 only, unless a call says otherwise.

    Args:
        name: Usually `__name__`.
        log_level: "DEBUG", "INFO" and so on, for all loggers; None takes `ACCELERATE_LOG_LEVEL`.
    """
    logger = logging.getLogger(name)
    level = log_level or os.environ.get("ACCELERATE_LOG_LEVEL")
    if level is not None:
        logger.setLevel(level.upper())
        logger.root.setLevel(level.upper())
    return MultiProcessAdapter(logger, {})
