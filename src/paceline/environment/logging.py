"""A rank-aware logger: a message appears once, not once per process."""

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
    """Return a logger whose messages come from rank 0 only, unless a call sets `main_process_only=False`.

    A level that is given changes only the logger of that name; PACELINE_LOG_LEVEL, for a module of this package, that
    of the whole package. As long as the program has configured no logging, messages go to stderr without a prefix.

    >>> logger = get_logger(__name__)
    >>> logger.info("loaded %d samples", 1000)
    >>> logger.info("rank is ready", main_process_only=False)

    Args:
        name: The name for `logging.getLogger`, usually `__name__`.
        log_level: "DEBUG", "INFO" and so on; None takes PACELINE_LOG_LEVEL, or leaves the level unchanged without it.
        env: The environment to read; None reads the process's own.

    Returns:
        The logger; its calls take `main_process_only` and `in_order`.

    Raises:
        UsageError: The level does not exist.
    """
    env = os.environ if env is None else env
    logger = logging.getLogger(name)
    if log_level:
        _set_level(logger, log_level)
    elif env.get(_LEVEL_VARIABLE):
        _apply_variable(logger, env[_LEVEL_VARIABLE])
    try:
        world = World.read(env)
    except WorldError:  # reported when the training starts; logging must not fail
        world = World()
    return RankLogger(logger, world)


class RankLogger(_Adapter):
    """A `logging.LoggerAdapter` whose calls take `main_process_only` and `in_order`.

    * `main_process_only=True`, the default: only rank 0 writes.
    * `main_process_only=False`: every rank writes, with `[rank R]` before the message.
    * `in_order=True` in addition: the ranks write one after the other. Collective: every rank must call it.
    """

    def __init__(self, logger: logging.Logger, world: World) -> None:
        super().__init__(logger, {})
        self._world = world
        self._warned: set[str] = set()

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message on rank 0, or on all ranks.

        Collective with `in_order=True`: every rank must call it.

        Args:
            level: The level, such as `logging.INFO`.
            msg: The message, with %-style placeholders.
            args: Values of the placeholders.
            kwargs: `main_process_only`, `in_order`, and those of `logging.Logger.log`.
        """
        main_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        kwargs.setdefault("stacklevel", 2)
        kwargs["stacklevel"] += 1
        rank, size = self._rank_and_size()
        if main_only or not in_order or size == 1:
            if rank == 0 or not main_only:
                self._write(level, msg, args, kwargs, "" if main_only else f"[rank {rank}] ")
            return
        # Every rank takes part in every barrier, even if its level suppresses the message.
        for turn in range(size):
            if turn == rank:
                self._write(level, msg, args, kwargs, f"[rank {rank}] ")
            if dist.is_initialized():
                dist.barrier()

    def warning_once(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a warning unless this logger has logged the same text before.

        Args:
            msg: The message, with %-style placeholders.
            args: Values of the placeholders.
            kwargs: As in `log`.
        """
        try:
            # `logging` formats a single mapping in its own way.
            text = logging.LogRecord(self.name, logging.WARNING, "", 0, msg, args, None).getMessage()
        except (TypeError, ValueError, KeyError):  # a wrong placeholder, of which `logging` tells
            text = repr((str(msg), args))
        if text not in self._warned:
            self._warned.add(text)
            kwargs["stacklevel"] = kwargs.get("stacklevel", 2) + 1
            self.log(logging.WARNING, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Return message and arguments unchanged; called by `logging`.

        Args:
            msg: The message.
            kwargs: The keyword arguments.

        Returns:
            Both, unchanged.
        """
        return msg, kwargs

    def _rank_and_size(self) -> tuple[int, int]:
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return self._world.rank, self._world.size

    def _write(self, level: int, msg: object, args: tuple[object, ...], kwargs: dict[str, Any], prefix: str) -> None:
        if self.logger.isEnabledFor(level):
            self.logger.log(level, f"{prefix}{msg}" if prefix else msg, *args, **kwargs)


class _UntilConfigured(_Handler):
    """Writes to stderr as long as no other handler does, so that a requested level shows something."""

    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(not isinstance(handler, _UntilConfigured) for handler in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        super().emit(record)


def _apply_variable(logger: logging.Logger, level: str) -> None:
    """Set the level of a logger; for one of this package the package's, unless the program has set that already."""
    package = logging.getLogger("paceline")
    if not logger.name.startswith("paceline."):
        _set_level(logger, level, f" in {_LEVEL_VARIABLE}")
    elif package.level == logging.NOTSET:
        _set_level(package, level, f" in {_LEVEL_VARIABLE}")


def _set_level(logger: logging.Logger, level: str, where: str = "") -> None:
    number = logging.getLevelName(level.upper())
    if not isinstance(number, int):
        raise UsageError(
            f"The log level is {level!r}{where}",
            "There is no such level",
            "Choose one of DEBUG, INFO, WARNING, ERROR, CRITICAL",
        )
    logger.setLevel(number)
    if not any(isinstance(handler, _UntilConfigured) for handler in logger.handlers):
        logger.addHandler(_UntilConfigured())
