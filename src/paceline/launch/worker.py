"""What every launched process runs first, as `python -m paceline.launch.worker`, before the user's script.

It runs the script as `python script.py` would, and when that fails leaves an account of it for the launcher,
which prints the first failure once. It must start fast and alone: it imports neither torch nor the rest of
paceline, and no module that the script could do without.
"""

from __future__ import annotations

import atexit
import base64
import builtins
import contextlib
import errno
import faulthandler
import functools
import importlib.machinery
import importlib.util
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import TracebackType

__all__ = ["exit_now", "is_library", "main", "pack", "unpack"]

_PR_SET_PDEATHSIG = 1
# Frames of these files are not the script's.
_OWN_FILES = {__file__, str(Path(__file__).with_name("notebook") / "rank_main.py")}
_FACADE = "paceline.accelerator.accelerator"
# Seconds between two looks for a process group that the script opens itself.
_PAUSE = 2.0
# What a shell gives for a program that is there and cannot be run.
_NOT_RUN = 126

# What a rank says when it failed only because another one went away (gloo, NCCL, torch's stores).
_SECONDARY_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_SECONDARY_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Software caused connection abort",
    "remote process exited or there was a network error",
    "Timed out waiting",
    "went first and failed",
    "Read timeout",
    "Write timeout",
)


def main(arguments: Sequence[str]) -> None:
    """Run the script, module or program that `arguments` name; leave with its exit code."""
    rest = list(arguments)
    if rest[0] == "--parent":
        _die_with(int(rest[1]))
        del rest[:2]
    if rest[0] == "--packed":
        variables, rest = unpack(rest[1])
        os.environ.update(variables)
        # It was started by its path; modules of the script's are looked for as under `python -m`.
        sys.path[0] = str(Path.cwd())
    _note_faults()
    _write_whole_lines()
    if "PACELINE_CONFIG" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.meta_path.insert(0, _NoticeDistributed())
    if "PACELINE_CONFIG" in os.environ and os.environ.get("RANK", "0") == "0":
        sys.meta_path.insert(0, _NoticeAccelerate())
    kind = rest.pop(0) if rest[0] in ("--module", "--program") else "--script"
    if kind == "--program":
        _become(rest)
    sys.argv = rest
    try:
        if kind == "--module":
            _run_module(rest[0])
        else:
            _run_script(rest[0])
    except SystemExit as stop:
        code = _exit_code(stop)
        if code != 0:
            _leave(stop, code)
        raise
    except KeyboardInterrupt as stop:
        _leave(stop, 128 + signal.SIGINT)
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        _tell_hook(error)
        _leave(error, 1)
        sys.exit(1)


def _become(command: list[str]) -> None:
    """Run a program in this one's place."""
    try:
        os.execvp(command[0], command)
    except OSError as error:
        words = error.strerror or str(error)
        if error.errno == errno.ENOEXEC:
            words += "; it is no program of this machine, and a script needs a first line such as #!/bin/sh"
        _leave(OSError(error.errno, words, command[0]), _NOT_RUN)
        sys.exit(_NOT_RUN)


def _note_faults() -> None:
    """Let Python note where it was when a signal such as SIGSEGV or SIGABRT ends this process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not faulthandler.is_enabled():
        # It must stay open until the process ends, and be forgotten by what it starts.
        faulthandler.enable(os.open(f"{path}.fault", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))


def _write_whole_lines() -> None:
    """Hand on a line when it is whole, and in one piece, so that lines of ranks that share a console stay apart.

    Into a pipe or a file python would hand on blocks, which end anywhere, or, unbuffered, each argument of a `print`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


class _NoticeDistributed:
    """Starts a watch over exchanges between ranks once the script imports what they are made with.

    Until then nothing of it runs, so that a script without torch stays without a second thread.
    """

    _module = "torch.distributed.distributed_c10d"

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Leave finding modules to others."""
        if name == self._module and self in sys.meta_path:
            sys.meta_path.remove(self)
            threading.Thread(target=self._watch, name="paceline-unasked", daemon=True).start()

    def _watch(self) -> None:
        while not self._is_open():
            if _FACADE in sys.modules:  # an Accelerator watches by itself, under the limit that it was given
                return
            time.sleep(_PAUSE)
        from paceline.launch.bare_watchdog import start_bare_watchdog

        start_bare_watchdog(os.environ)

    def _is_open(self) -> bool:
        # The thread takes no part in the script's imports, so the module may be half there.
        is_open: Callable[[], bool] | None = getattr(sys.modules.get(self._module), "is_initialized", None)
        return is_open is not None and is_open()


class _NoticeAccelerate:
    """Says what of the configuration is not used, when the script builds an Accelerator of Accelerate's.

    The Trainer of transformers builds one before it trains. Until the script imports it nothing of this runs.
    """

    _module = "accelerate.accelerator"

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Leave finding modules to others, and look at the one that is waited for once it is loaded."""
        if name != self._module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        load = getattr(loader, "exec_module", None)
        if load is not None:

            def load_and_watch(module: ModuleType) -> None:
                load(module)
                self._watch(getattr(module, "Accelerator", None))

            loader.exec_module = load_and_watch
        return spec

    def _watch(self, kind: Any) -> None:
        """Put a note in front of the constructor until it is called first."""
        build = getattr(kind, "__init__", None)
        if not isinstance(kind, type) or build is None:
            return

        @functools.wraps(build)
        def note_and_build(own: Any, *args: Any, **kwargs: Any) -> None:
            kind.__init__ = build  # type: ignore[misc]
            self._say()
            build(own, *args, **kwargs)

        kind.__init__ = note_and_build  # type: ignore[misc]

    def _say(self) -> None:
        from paceline.launch.unused_settings import say_unused

        by = ", which the Trainer of transformers builds," if "transformers.trainer" in sys.modules else ""
        say_unused(f"Accelerate's own Accelerator{by}", os.environ)


def pack(variables: Mapping[str, str], arguments: Sequence[str]) -> str:
    """Variables and arguments of this module as one word that no shell reads anything into."""
    text = json.dumps([dict(variables), list(arguments)])
    return base64.urlsafe_b64encode(text.encode()).decode()


def unpack(word: str) -> tuple[dict[str, str], list[str]]:
    """Return what `pack` packed."""
    variables, arguments = json.loads(base64.urlsafe_b64decode(word))
    return variables, arguments


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the launcher dies, however it dies; nothing outside Linux."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(128 + signal.SIGKILL)


def _run_script(script: str) -> None:
    path = str(Path(script).absolute())
    # A zip application or a folder; of a plain script no finder makes anything.
    application = importlib.machinery.PathFinder.find_spec("__main__", [path])
    if application is not None:
        sys.path[0] = path
        _run_spec(application)
        return
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(path).resolve().parent)
    with io.open_code(path) as source:
        text = source.read()
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    module = _new_main({"__file__": path, "__loader__": loader, "__cached__": None})
    exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)


def _run_module(name: str) -> None:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    if spec is None or not hasattr(spec.loader, "get_code"):
        sys.exit(f"{sys.executable}: no module named {name!r} that can be run")
    sys.argv[0] = spec.origin or name
    _run_spec(spec)


def _run_spec(spec: ModuleSpec) -> None:
    """Run what an import would load, as `__main__`."""
    loader: Any = spec.loader
    names = {
        "__file__": spec.origin,
        "__loader__": loader,
        "__cached__": spec.cached,
        "__spec__": spec,
        "__package__": spec.parent,
    }
    code = loader.get_code(spec.name)
    exec(code, _new_main(names).__dict__)


def _new_main(names: Mapping[str, object]) -> ModuleType:
    """Put an empty `__main__` in this one's place, and keep it until the process ends, as python does.

    Pickling, `multiprocessing` and exit handlers of the script look for its names there.
    """
    module = ModuleType("__main__")
    module.__dict__.update({"__builtins__": builtins, "__annotations__": {}, "__spec__": None, **names})
    sys.modules["__main__"] = module
    return module


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    return stop.code & 0xFF if isinstance(stop.code, int) else 1


def _tell_hook(error: BaseException) -> None:
    """Call an exception hook that the script installed (trackers note a crash there), but print nothing."""
    if sys.excepthook is not sys.__excepthook__:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
            sys.excepthook(type(error), error, _own_traceback(error))


def _leave(error: BaseException, code: int) -> None:
    """Write the account of a failure where torch elastic looks for it, in its format, with fields added."""
    # Exit handlers look here, as after any uncaught exception: they must not wait for other ranks now.
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    own = _own_traceback(error)
    text = "".join(traceback.format_exception(type(error), error.with_traceback(own), own))
    if not path:
        # Another launcher started this rank: nobody else would tell. Python says itself what sys.exit was given.
        if not isinstance(error, SystemExit):
            print(text, file=sys.stderr, end="", flush=True)
        return
    headline = traceback.format_exception_only(type(error), error)[-1].strip()
    account = {
        "message": {
            "message": headline,
            "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))},
        },
        "paceline": {
            "kind": _kind(error),
            "rank": int(os.environ.get("RANK", "0")),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "code": code,
            "where": _place(own),
            "headline": headline,
            "traceback": text,
            "secondary": _looks_secondary(error),
        },
    }
    unfinished = Path(f"{path}.part")
    unfinished.write_text(json.dumps(account), encoding="utf-8")
    unfinished.rename(path)


def _kind(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "exit"
    return "interrupt" if isinstance(error, KeyboardInterrupt) else "exception"


def _own_traceback(error: BaseException) -> TracebackType | None:
    """Return the traceback from the script's first line on, without the frames that lead there."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    return trace


def _place(trace: TracebackType | None) -> str:
    """Return `file:line` of the innermost frame that belongs to no library."""
    place = ""
    for frame, line in traceback.walk_tb(trace):
        name = frame.f_code.co_filename
        if not place or not is_library(name):
            place = f"{name}:{line}"
    return place


def is_library(file: str) -> bool:
    """Whether a file of a traceback is Python's, paceline's or an installed package's, and not the script's."""
    libraries = (str(Path(os.__file__).parent), str(Path(__file__).parents[1]), "<")
    return file.startswith(libraries) or "site-packages" in file


def _looks_secondary(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        names = {cls.__name__ for cls in type(cause).__mro__}
        if names & _SECONDARY_TYPES or any(text in _words(cause) for text in _SECONDARY_TEXTS):
            return True
        cause = cause.__cause__
    return False


def _words(error: BaseException) -> str:
    """What an exception says, if its own method does not fail."""
    try:
        return str(error)
    except Exception:
        return ""


def exit_now(code: int) -> None:
    """End a process whose work has come to its end, without taking the interpreter apart.

    Everything that a program may rely on happens: threads are waited for, exit handlers run, output is flushed. What
    is left out is the time in which threads of torch and gloo still run while Python ends under them: one that asks
    for the interpreter then takes the process down with SIGABRT, after all work was done (1 of 24 ends of a script
    under DDP on a busy machine, torch 2.13).
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    ended = 0
    try:
        main(sys.argv[1:])
    except SystemExit as stop:
        ended = _exit_code(stop)
        if not isinstance(stop.code, (int, type(None))):
            print(stop.code, file=sys.stderr)
    if "torch.distributed" not in sys.modules:
        sys.exit(ended)
    exit_now(ended)
