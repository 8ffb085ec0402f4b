"""Where a thread is in the user's program: file and line, and the call that it has made there."""

from __future__ import annotations

import linecache
import os
import re
import sys
import textwrap
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import FrameType, TracebackType

__all__ = ["CodeLocation", "all_stacks", "here", "location_in_traceback", "location_of", "main_stack"]

_LIBRARIES = (str(Path(os.__file__).parent), str(Path(__file__).parents[2]), "<")
# The methods of the facade are what a script calls.
_FACADE = re.compile(r"paceline\.accelerator\.\w+")
_MAX_CODE_LENGTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeLocation:
    """A line of the user's program.

    Attributes:
        where: `file:line`.
        function: The function that contains the line.
        code: The source line, shortened.
        call: What it has called: a method of the facade, else a function of a library; empty when it calls nothing.
        is_collective: Whether `call` is a method of the facade that every rank must call.
    """

    where: str
    function: str = ""
    code: str = ""
    call: str = ""
    is_collective: bool = False

    def __str__(self) -> str:
        inside = f" in {self.function}" if self.function not in ("", "<module>") else ""
        return f"{self.where}{inside}" + (f": {self.code}" if self.code else "")


@dataclass(frozen=True, slots=True)
class _Level:
    file: str
    line: int
    function: str
    module: str
    is_collective: bool


def here() -> CodeLocation | None:
    """Return where the main thread is now."""
    frame = _main_frame()
    if frame is None:
        return None
    return location_of(frame)


def main_stack() -> tuple[tuple[int, int], ...]:
    """Return the main thread's stack as values to compare: they differ once it has moved."""
    frame = _main_frame()
    stack = []
    while frame is not None:
        stack.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return tuple(stack)


def _main_frame() -> FrameType | None:
    ident = threading.main_thread().ident
    if ident is None:
        return None
    return sys._current_frames().get(ident)


def location_of(frame: FrameType) -> CodeLocation:
    """Return where the thread of an innermost frame is."""
    return _locate(reversed([(f, line) for f, line in traceback.walk_stack(frame)]))


def location_in_traceback(trace: TracebackType | None) -> CodeLocation | None:
    """Return where an exception was raised."""
    if trace is None:
        return None
    return _locate(traceback.walk_tb(trace))


def all_stacks() -> str:
    """Return the stacks of all threads of this process, the main thread's first."""
    main = threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames
    )


def _locate(frames: Iterable[tuple[FrameType, int]]) -> CodeLocation:
    levels = [_level(frame, line) for frame, line in frames]
    user = [index for index, level in enumerate(levels) if _is_user_code(level.file)]
    index = user[-1] if user else len(levels) - 1
    level = levels[index]
    call, is_collective = _call(levels[index + 1 :])
    code = linecache.getline(level.file, level.line).strip()
    return CodeLocation(
        where=f"{level.file}:{level.line}",
        function=level.function,
        code=textwrap.shorten(code, _MAX_CODE_LENGTH, placeholder=" …"),
        call=call,
        is_collective=is_collective,
    )


def _level(frame: FrameType, line: int) -> _Level:
    code = frame.f_code
    # The first constant of a function is its docstring.
    doc = next(iter(code.co_consts), None)
    module = str(frame.f_globals.get("__name__", ""))
    is_collective = isinstance(doc, str) and "Collective" in doc
    return _Level(code.co_filename, line, code.co_name, module, is_collective)


def _is_user_code(file: str) -> bool:
    return not (file.startswith(_LIBRARIES) or "site-packages" in file)


def _call(below: Sequence[_Level]) -> tuple[str, bool]:
    """The call that tells most about what the user's line is doing."""
    public = [level for level in below if not level.function.startswith(("_", "<"))]
    for level in public:
        if _FACADE.fullmatch(level.module):
            return level.function, level.is_collective
    for prefix in ("paceline.", "torch.distributed.distributed_c10d", ""):
        for level in public:
            # Names of decorators' inner functions tell nothing.
            if level.module.startswith(prefix) and level.function not in ("wrapper", "inner", "decorate_context"):
                return level.function, False
    return "", False
