"""The command that every rank runs, checked before anything starts."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from paceline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from importlib.machinery import ModuleSpec

__all__ = ["Command", "check_command"]

_MAIN: Final = "__main__.py"


@dataclass(frozen=True, slots=True)
class Command:
    """A script and its arguments.

    Attributes:
        script: Path of a script (or of a zip application or folder with a `__main__.py`), dotted name of a module,
            or name of a program.
        arguments: Its arguments, passed on unchanged.
        kind: How to run it: `python SCRIPT`, `python -m MODULE`, or as a program.
    """

    script: str
    arguments: tuple[str, ...] = ()
    kind: Literal["script", "module", "program"] = "script"


def check_command(command: Command, env: Mapping[str, str]) -> None:
    """Raise `UsageError` when the script, module or program does not exist or cannot be run."""
    match command.kind:
        case "script":
            _check_script(Path(command.script))
        case "module":
            _check_module(command.script)
        case "program":
            _check_program(command.script, env)


def _check_program(name: str, env: Mapping[str, str]) -> None:
    if shutil.which(name, path=env.get("PATH")) is not None:
        return
    instead = "or remove --no_python to run it with Python"
    if os.access(name, os.X_OK) and Path(name).is_file():
        raise UsageError(f"The program {name!r} is not in PATH", "", f"Write {shlex.quote(f'./{name}')}, {instead}")
    if Path(name).is_file():
        raise UsageError(f"The program {name!r} is not executable", "", f"Run chmod +x {shlex.quote(name)}, {instead}")
    raise UsageError(
        f"There is no program {name!r}",
        "It is neither a path to an executable file nor a name found in PATH",
        "Check the spelling, or remove --no_python to run it with Python",
    )


def _check_script(path: Path) -> None:
    if path.is_file():
        _check_archive(path)
    elif path.is_dir():
        _check_folder(path)
    else:
        _refuse_missing(path)


def _check_archive(path: Path) -> None:
    """Raise where a zip archive, or a file named like one, cannot be run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not {_MAIN, "__main__.pyc"}.intersection(names):
            raise UsageError(
                f"{str(path)!r} is a zip archive without {_MAIN}",
                f"Python runs the {_MAIN} at the top of an archive",
                "Build it with `python -m zipapp FOLDER -m module:function`",
            )
    elif path.suffix in (".pyz", ".pyzw", ".zip"):
        raise UsageError(
            f"{str(path)!r} is not a zip archive",
            "Python would read it as source text",
            "Build it with `python -m zipapp`, or rename a plain script to .py",
        )


def _check_folder(path: Path) -> None:
    if (path / _MAIN).is_file():
        return
    scripts = sorted(p.name for p in path.glob("*.py"))[:8]
    raise UsageError(
        f"{str(path)!r} is a folder without {_MAIN}",
        "Python runs a folder only through that file",
        f"Name a script in it ({', '.join(scripts)})" if scripts else "Name a script",
    )


def _refuse_missing(path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(
            f"There is no script {str(path)!r}: the folder {str(folder)!r} does not exist",
            f"Paths are relative to {Path.cwd()}",
            _or_option(path) or "Check the path",
        )
    names = [p.name for p in folder.iterdir() if p.is_file() and (p.suffix == ".py" or p.name == path.name)]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    hint = f"Did you mean {str(folder / close[0])!r}?" if close else _or_option(path) or "Check the path"
    raise UsageError(
        f"There is no script {str(path)!r}", f"The folder {str(folder.resolve())!r} does not contain it", hint
    )


def _or_option(path: Path) -> str:
    """Return what a missing script may be instead; may be empty."""
    if str(path).startswith("-"):
        return "Options of the launcher come before the script, the script's own after it; check the spelling"
    if path.suffix != ".py" and len(path.parts) == 1:
        return "To run a module, add -m; to run a program that is not Python, add --no_python"
    return ""


def _check_module(name: str) -> None:
    # The workers, started with `python -m`, search the current folder first; this command does not.
    with _current_folder_first():
        spec = _find_without_importing(name)
        if spec is None:
            raise _no_module(name)
        if spec.submodule_search_locations is None:
            return
        if _find_without_importing(f"{name}.__main__") is None:
            raise UsageError(
                f"{name!r} is a package without a __main__ module",
                "Python cannot run it",
                f"Name a module in it, such as {name}.train",
            )


def _find_without_importing(name: str) -> ModuleSpec | None:
    """Find a module; `importlib.util.find_spec` alone would import its parent packages."""
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    head, *rest = name.split(".")
    spec = importlib.util.find_spec(head)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        head = f"{head}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(head, list(spec.submodule_search_locations))
    return spec


def _no_module(name: str) -> UsageError:
    hint = "Check the spelling, and that it is installed or in the current folder"
    if Path(name).is_file():
        hint = f"{name!r} is a file: remove -m"
    return UsageError(
        f"There is no module {name!r}",
        f"Modules are searched in {Path.cwd()} and on sys.path",
        hint,
    )


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
