"""The entry point of every launched process: `python -m paceline.launch.worker` runs the user's script.

It runs the script as `python script.py` would. When that fails it writes the failure to the error file for the
launcher, which prints the first failure once. It must start fast: it imports neither torch nor the rest of paceline.
"""

from __future__ import annotations

import atexit
import base64
import builtins
import contextlib
import errno
import faulthandler
import functools
import importlib
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

__all__ = ["exit_now", "is_library", "main", "pack", "run", "unpack"]

_PR_SET_PDEATHSIG = 1
# Frames of these files are not part of the script.
_PACELINE_FILES = {__file__, str(Path(__file__).with_name("notebook") / "rank_main.py")}
_FACADE = "paceline.accelerator"
_SWITCH = "paceline.compat"
# Seconds between two checks for a process group that the script opens itself.
_POLL = 2.0
# The exit code of a shell for a file that exists and cannot be executed.
_NOT_EXECUTABLE = 126

# Errors of a rank that failed only because another one exited (gloo, NCCL, torch's stores).
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
    """Run the script, module or program that `arguments` name; exit with its code."""
    command = _read_options(list(arguments))
    _enable_faulthandler()
    _buffer_lines()
    _install_as_accelerate()
    accelerate = _install_import_hooks()
    kind = command.pop(0) if command[0] in ("--module", "--program") else "--script"
    if kind == "--program":
        _exec_program(command)
    sys.argv = command
    try:
        if kind == "--module":
            _run_module(command[0])
        else:
            _run_script(command[0])
    except SystemExit as stop:
        code = _exit_code(stop)
        if code != 0:
            _record_failure(stop, code)
        elif not accelerate.was_built:
            _say_unused()
        raise
    except KeyboardInterrupt as stop:
        _record_failure(stop, 128 + signal.SIGINT)
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        _call_excepthook(error)
        _record_failure(error, 1)
        sys.exit(1)
    if not accelerate.was_built:
        _say_unused()


def _read_options(arguments: list[str]) -> list[str]:
    """Apply the options for the worker itself, and return what follows them."""
    if arguments[0] == "--parent":
        _die_with_parent(int(arguments[1]))
        del arguments[:2]
    if arguments[0] == "--packed":
        variables, arguments = unpack(arguments[1])
        os.environ.update(variables)
        # This file was run by path; the script's modules are searched as under `python -m`.
        sys.path[0] = str(Path.cwd())
    return arguments


def _install_as_accelerate() -> None:
    """Turn the switch on where the launcher's configuration says so, before the script imports anything."""
    config = os.environ.get("PACELINE_CONFIG")
    # A run without the switch pays for no parsing and no import.
    if config and '"as_accelerate":true' in config and json.loads(config)["config"].get("as_accelerate"):
        # By name: it lies above this package.
        importlib.import_module(_SWITCH).install_as_accelerate()


def _install_import_hooks() -> _AccelerateImportHook:
    accelerate = _AccelerateImportHook()
    if "PACELINE_CONFIG" not in os.environ:
        return accelerate
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.meta_path.insert(0, _DistributedImportHook())
    if _SWITCH not in sys.modules:
        sys.meta_path.insert(0, accelerate)
    return accelerate


def _say_unused() -> None:
    """Say on rank 0 what the launcher did for nothing, after a script that built no Accelerator.

    That is explicit settings that had no reader, and processes that knew nothing of one another.
    """
    config = os.environ.get("PACELINE_CONFIG")
    if config is None or os.environ.get("RANK", "0") != "0":
        return
    _say_copies(os.environ.get("WORLD_SIZE", "1"))
    kinds = {origin["kind"] for origin in json.loads(config)["origins"].values()}
    if kinds - {"detected", "default"}:
        from paceline.launch.unused_settings import say_unused

        say_unused(os.environ)


def _say_copies(size: str) -> None:
    """Say that each of several processes did all of the work: the script has connected them in no way."""
    resolution = sys.modules.get("paceline.config.resolution")
    was_built = resolution is not None and resolution.was_read()
    if size != "1" and not was_built and not _has_opened_process_group():
        print(
            f"paceline: {size} processes each ran the whole script: it builds neither an Accelerator nor a Trainer and "
            "opens no process group, so each worked on all data. Build an Accelerator, or launch with "
            "--num_processes 1.",
            file=sys.stderr,
            flush=True,
        )


def _has_opened_process_group() -> bool:
    """Whether torch's process group is open, or was: torch keeps the method by which it was opened."""
    distributed = sys.modules.get("torch.distributed.distributed_c10d")
    is_open: Callable[[], bool] | None = getattr(distributed, "is_initialized", None)
    was_opened = getattr(distributed, "_default_pg_init_method", None) is not None
    return was_opened or (is_open is not None and is_open())


def _exec_program(command: list[str]) -> None:
    """Replace this process by a program."""
    try:
        os.execvp(command[0], command)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOEXEC:
            reason += "; it is not a binary for this machine, and a script needs a first line such as #!/bin/sh"
        _record_failure(OSError(error.errno, reason, command[0]), _NOT_EXECUTABLE)
        sys.exit(_NOT_EXECUTABLE)


def _enable_faulthandler() -> None:
    """Dump the Python stack to a file when a fatal signal such as SIGSEGV or SIGABRT kills this process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not faulthandler.is_enabled():
        # The file must stay open until the process exits; children do not inherit it.
        faulthandler.enable(os.open(f"{path}.fault", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))


def _buffer_lines() -> None:
    """Flush stdout and stderr line by line, so that the lines of ranks that share a console do not mix.

    To a pipe or a file Python would write blocks, which end anywhere, or, unbuffered, each argument of a `print`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


class _DistributedImportHook:
    """Starts the watchdog once the script imports `torch.distributed`.

    Until then nothing of it runs, so that a script without torch has no second thread.
    """

    _module = "torch.distributed.distributed_c10d"

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Find nothing: other finders do."""
        if name == self._module and self in sys.meta_path:
            sys.meta_path.remove(self)
            threading.Thread(target=self._watch, name="paceline-bare-watchdog", daemon=True).start()

    def _watch(self) -> None:
        while not self._is_open():
            if self._has_facade():
                return
            time.sleep(_POLL)
        if self._has_facade():
            return
        self._start()

    @staticmethod
    def _start() -> None:
        """Start the watchdog that an Accelerator would start, from the launcher's variables."""
        from paceline.collectives.watchdog import start_watch
        from paceline.config import Resolved
        from paceline.environment.error_file import ErrorFile
        from paceline.environment.world import World

        config = Resolved.from_json(os.environ["PACELINE_CONFIG"]).config
        start_watch(World.read(os.environ), ErrorFile.read(os.environ), config.hang_timeout)

    @staticmethod
    def _has_facade() -> bool:
        """Whether an Accelerator is at hand: it starts its own watchdog, with its own limit.

        Its package counts from the first of its modules on. This thread imports what they import, and two threads that
        import parts of one package at the same time can deadlock.
        """
        return _FACADE in sys.modules

    def _is_open(self) -> bool:
        # This thread does not hold the import lock, so the module may be partially initialized.
        is_open: Callable[[], bool] | None = getattr(sys.modules.get(self._module), "is_initialized", None)
        return is_open is not None and is_open()


class _AccelerateImportHook:
    """Compares the settings with what the script does when it builds Accelerate's own Accelerator.

    Until the script imports it nothing of this runs.
    """

    _module = "accelerate.accelerator"

    def __init__(self) -> None:
        self.was_built = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Find Accelerate's module through the other finders, and patch it once it is loaded."""
        if name != self._module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        load = getattr(loader, "exec_module", None)
        if load is not None:

            def load_and_patch(module: ModuleType) -> None:
                load(module)
                self._patch(getattr(module, "Accelerator", None))

            loader.exec_module = load_and_patch
        return spec

    def _patch(self, kind: Any) -> None:
        """Wrap the constructor until its first call."""
        build = getattr(kind, "__init__", None)
        if not isinstance(kind, type) or build is None:
            return

        @functools.wraps(build)
        def check_and_build(instance: Any, *args: Any, **kwargs: Any) -> None:
            kind.__init__ = build  # type: ignore[misc]
            self.was_built = True
            self._check(kwargs)
            build(instance, *args, **kwargs)

        kind.__init__ = check_and_build  # type: ignore[misc]

    def _check(self, arguments: Mapping[str, Any]) -> None:
        from paceline.launch.unused_settings import check_accelerate

        check_accelerate(arguments, os.environ)


def pack(variables: Mapping[str, str], arguments: Sequence[str]) -> str:
    """Encode variables and arguments for this module as one argument that no shell expands."""
    text = json.dumps([dict(variables), list(arguments)])
    return base64.urlsafe_b64encode(text.encode()).decode()


def unpack(encoded: str) -> tuple[dict[str, str], list[str]]:
    """Decode what `pack` returned."""
    variables, arguments = json.loads(base64.urlsafe_b64decode(encoded))
    return variables, arguments


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the launcher dies, however it dies; no-op outside Linux."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os._exit(128 + signal.SIGKILL)


def _run_script(script: str) -> None:
    path = str(Path(script).absolute())
    # A zip application or a folder; for a plain script no finder returns a spec.
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
    """Run the module of a spec as `__main__`."""
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
    """Replace `__main__` by an empty module, and keep it until the process exits, as Python does.

    Pickling, `multiprocessing` and the script's exit handlers look up its names there.
    """
    module = ModuleType("__main__")
    module.__dict__.update({"__builtins__": builtins, "__annotations__": {}, "__spec__": None, **names})
    sys.modules["__main__"] = module
    return module


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    return stop.code & 0xFF if isinstance(stop.code, int) else 1


def _call_excepthook(error: BaseException) -> None:
    """Call the exception hook that the script installed (trackers record a crash there), but print nothing."""
    if sys.excepthook is not sys.__excepthook__:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
            sys.excepthook(type(error), error, _script_traceback(error))


def _record_failure(error: BaseException, code: int) -> None:
    """Write the failure to torch elastic's error file, in its format with our fields added."""
    # As after any uncaught exception; exit handlers read it, and must not wait for other ranks then.
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    trace = _script_traceback(error)
    text = "".join(traceback.format_exception(type(error), error.with_traceback(trace), trace))
    if not path:
        # Started by another launcher, nobody else would report it. Python itself prints the argument of sys.exit.
        if not isinstance(error, SystemExit):
            print(text, file=sys.stderr, end="", flush=True)
        return
    headline = traceback.format_exception_only(type(error), error)[-1].strip()
    record = {
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
            "where": _user_location(trace),
            "headline": headline,
            "traceback": text,
            "secondary": _is_secondary(error),
        },
    }
    unfinished = Path(f"{path}.part")
    unfinished.write_text(json.dumps(record), encoding="utf-8")
    unfinished.rename(path)


def _kind(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "exit"
    return "interrupt" if isinstance(error, KeyboardInterrupt) else "exception"


def _script_traceback(error: BaseException) -> TracebackType | None:
    """Return the traceback from the script's first line on, without the worker's frames."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in _PACELINE_FILES:
        trace = trace.tb_next
    return trace


def _user_location(trace: TracebackType | None) -> str:
    """Return `file:line` of the innermost frame outside of libraries."""
    location = ""
    for frame, line in traceback.walk_tb(trace):
        name = frame.f_code.co_filename
        if not location or not is_library(name):
            location = f"{name}:{line}"
    return location


def is_library(file: str) -> bool:
    """Whether a file of a traceback belongs to Python, paceline or an installed package, not to the script."""
    libraries = (str(Path(os.__file__).parent), str(Path(__file__).parents[1]), "<")
    return file.startswith(libraries) or "site-packages" in file


def _is_secondary(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        names = {cls.__name__ for cls in type(cause).__mro__}
        if names & _SECONDARY_TYPES or any(text in _message(cause) for text in _SECONDARY_TEXTS):
            return True
        cause = cause.__cause__
    return False


def _message(error: BaseException) -> str:
    """The message of an exception; empty if its own `__str__` raises."""
    try:
        return str(error)
    except Exception:
        return ""


def exit_now(code: int) -> None:
    """Exit a process whose work is done, without finalizing the interpreter.

    Threads are joined, exit handlers run and output is flushed. Finalization is left out because threads of torch and
    gloo still run during it: one that acquires the GIL then aborts the process with SIGABRT, after all work was done
    (1 of 24 exits of a script under DDP on a busy machine, torch 2.13).
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def run(arguments: Sequence[str]) -> None:
    """Run `main`, and end the process with its exit code."""
    exit_status = 0
    try:
        main(arguments)
    except SystemExit as stop:
        exit_status = _exit_code(stop)
        if not isinstance(stop.code, (int, type(None))):
            print(stop.code, file=sys.stderr)
    if "torch.distributed" not in sys.modules:
        sys.exit(exit_status)
    exit_now(exit_status)


if __name__ == "__main__":
    run(sys.argv[1:])
