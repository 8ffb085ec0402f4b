"""A logger that knows its rank: a message appears once, not once for every process."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from paceline.environment.world import World
from paceline.errors import UsageError, WorldError

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    _Adapter = logging.LoggerAdapter[logging.Logger]
    _Handler = logging.StreamHandler[Any]
else:  # Python 3.10 cannot subscript them
    _Adapter = logging.LoggerAdapter
    _Handler = logging.StreamHandler

__all__ = ["RankLogger", "get_logger"]

_LEVEL_VARIABLE = "PACELINE_LOG_LEVEL"


def get_logger(name: str, log_level: str | None = None, *, env: Mapping[str, str] | None = None) -> RankLogger:
    """Return a logger whose messages come from rank 0 alone unless a call says otherwise.

    Only the logger of that name is touched. While the program has set up no logging of its own, the messages
    go to stderr as they are.

    Args:
        name: As for `logging.getLogger`, usually `__name__`.
        log_level: "DEBUG", "INFO" and so on; None takes PACELINE_LOG_LEVEL, and without it changes nothing.
        env: The environment to read; the process's own when None.

    Raises:
        UsageError: There is no such level.
    """
    env = os.environ if env is None else env
    logger = logging.getLogger(name)
    level = log_level or env.get(_LEVEL_VARIABLE)
    if level:
        _set_level(logger, level, log_level is None)
    try:
        world = World.read(env)
    except WorldError:  # whoever starts the training reports it; a message must not fail
        world = World()
    return RankLogger(logger, world)


class RankLogger(_Adapter):
    """A `logging.LoggerAdapter` whose calls take `main_process_only` and `in_order`.

    * `main_process_only=True`, the default: only rank 0 writes.
    * `main_process_only=False`: every rank writes, with `[rank R]` before the message.
    * `in_order=True` besides: the ranks write one after the other. Collective: every rank must call it.
    """

    def __init__(self, logger: logging.Logger, world: World) -> None:
        super().__init__(logger, {})
        self._world = world
        self._warned: set[str] = set()

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Write a message on the ranks that shall write it."""
        main_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        kwargs.setdefault("stacklevel", 2)
        kwargs["stacklevel"] += 1
        rank, size = self._place()
        if main_only or not in_order or size == 1:
            if rank == 0 or not main_only:
                self._write(level, msg, args, kwargs, "" if main_only else f"[rank {rank}] ")
            return
        # Every rank takes part in every barrier, even one whose level keeps it silent.
        for turn in range(size):
            if turn == rank:
                self._write(level, msg, args, kwargs, f"[rank {rank}] ")
            if dist.is_initialized():
                dist.barrier()

    def warning_once(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Write a warning the first time that this logger gets it, and never again."""
        text = str(msg) % args if args else str(msg)
        if text not in self._warned:
            self._warned.add(text)
            kwargs["stacklevel"] = kwargs.get("stacklevel", 2) + 1
            self.log(logging.WARNING, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave message and arguments as they are."""
        return msg, kwargs

    def _place(self) -> tuple[int, int]:
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return self._world.rank, self._world.size

    def _write(self, level: int, msg: object, args: tuple[object, ...], kwargs: dict[str, Any], prefix: str) -> None:
        if self.logger.isEnabledFor(level):
            self.logger.log(level, f"{prefix}{msg}" if prefix else msg, *args, **kwargs)


class _UntilConfigured(_Handler):
    """Writes to stderr as long as no other handler would: a level that was asked for must show something."""

    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(not isinstance(handler, _UntilConfigured) for handler in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        super().emit(record)


def _set_level(logger: logging.Logger, level: str, from_variable: bool) -> None:
    number = logging.getLevelName(level.upper())
    if not isinstance(number, int):
        raise UsageError(
            f"The log level {level!r} was asked for" + (f" in {_LEVEL_VARIABLE}" if from_variable else ""),
            "There is no such level",
            "Choose one of DEBUG, INFO, WARNING, ERROR, CRITICAL",
        )
    logger.setLevel(number)
    if not any(isinstance(handler, _UntilConfigured) for handler in logger.handlers):
        logger.addHandler(_UntilConfigured())
