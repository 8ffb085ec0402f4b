"""The switch: `import accelerate` finds `paceline.compat.accelerate`, and its metadata too, until it is undone.

Nothing inside a client is changed: Python's own import system asks a finder of ours before it looks at installed
packages. Processes that this one starts find a folder of ours first on their search path, which does the same there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from paceline.errors import UsageError, named

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from importlib.metadata import Distribution, DistributionFinder
    from types import CodeType

__all__ = ["VERSION", "install_as_accelerate", "is_installed", "uninstall_as_accelerate"]

VERSION: Final = "1.15.0"
"""The version of Accelerate whose names and behaviour the stand-in has."""

_NAME: Final = "accelerate"
_TARGET: Final = "paceline.compat.accelerate"
# Helpers for tests, which have no twin: a suite brings the real package's own files, and they use the twin.
_TESTS: Final = "accelerate.test_utils"
# Holds a package `accelerate` that turns the switch on, and the metadata of a distribution of that name.
_PATH_ENTRY: Final = str(Path(__file__).with_name("path_entry"))


def install_as_accelerate(*, ignore_earlier_imports: bool = False) -> None:
    """Let `import accelerate` find `paceline.compat.accelerate` from now on, in this process and those that it starts.

    It does not matter whether the real package is installed or was imported; `uninstall_as_accelerate` restores it. A
    second call does nothing. Other processes inherit the switch through PYTHONPATH.

    Args:
        ignore_earlier_imports: Allow modules that already imported names of the real package, and keep those.

    Raises:
        UsageError: A module already holds names of the real package, so that it would not use paceline.

    Example:
        >>> from paceline.compat import install_as_accelerate
        >>> install_as_accelerate()  # doctest: +SKIP
        >>> from transformers import Trainer  # doctest: +SKIP
    """
    if is_installed():
        return
    replaced = {name: module for name, module in sys.modules.items() if _is_accelerate(name)}
    holders = [] if ignore_earlier_imports or not replaced else sorted(_holders())
    if holders:
        raise UsageError(
            f"{named(holders)} imported names of the real Accelerate before the switch",
            "Such a module keeps them, and would not use paceline",
            "Call install_as_accelerate() first, or start the script with `python -m paceline.compat`",
        )
    for name in replaced:
        del sys.modules[name]
    sys.meta_path.insert(0, AccelerateFinder(replaced))
    # After the script's folder, before installed packages. Processes of multiprocessing get a copy of this list.
    sys.path.insert(1, _PATH_ENTRY)
    os.environ["PYTHONPATH"] = os.pathsep.join([_PATH_ENTRY, *_python_path()])
    importlib.invalidate_caches()


def uninstall_as_accelerate() -> None:
    """Undo `install_as_accelerate`: the real package, if there is one, is found again.

    Where it was imported before, the same module objects come back. Names that were imported in between keep their
    meaning. Without the switch this does nothing.
    """
    for finder in _installed():
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_accelerate(name)]:
            del sys.modules[name]
        sys.modules.update(finder.replaced)
    sys.path[:] = [entry for entry in sys.path if entry != _PATH_ENTRY]
    rest = _python_path()
    if rest:
        os.environ["PYTHONPATH"] = os.pathsep.join(rest)
    else:
        os.environ.pop("PYTHONPATH", None)
    importlib.invalidate_caches()


def is_installed() -> bool:
    """Whether `import accelerate` means paceline's stand-in in this process."""
    return bool(_installed())


class AccelerateFinder(MetaPathFinder):
    """Finds `accelerate.x.y` as the module `paceline.compat.accelerate.x.y`, one object under both names.

    Args:
        replaced: The modules of the real package that were imported before.
    """

    def __init__(self, replaced: Mapping[str, ModuleType]) -> None:
        self.replaced = replaced

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the stand-in of a module of Accelerate; leave all others to the next finder."""
        if not _is_accelerate(fullname):
            return None
        is_test = fullname == _TESTS or fullname.startswith(f"{_TESTS}.")
        # Unless somebody has put a copy into the twin.
        if is_test and importlib.util.find_spec(_TARGET + _TESTS.removeprefix(_NAME)) is None:
            return _tests_of_the_real_one(fullname, path)
        source = importlib.util.find_spec(_TARGET + fullname.removeprefix(_NAME))
        if source is None:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: paceline is installed as accelerate in this process, and "
                f"{_TARGET + fullname.removeprefix(_NAME)} does not exist. Without the switch "
                "(paceline.compat.install_as_accelerate, --as_accelerate) the real package is imported.",
                name=fullname,
            )
        is_package = source.submodule_search_locations is not None
        spec = ModuleSpec(fullname, _AliasLoader(source), origin=source.origin, is_package=is_package)
        if source.submodule_search_locations is not None:
            spec.submodule_search_locations = list(source.submodule_search_locations)
        return spec

    def find_distributions(self, context: DistributionFinder.Context) -> Iterator[Distribution]:
        """Yield the metadata of the stand-in where all distributions, or this one, are looked up."""
        from importlib.metadata import PathDistribution

        if context.name is None or context.name.lower() == _NAME:
            yield PathDistribution(Path(_PATH_ENTRY, f"{_NAME}-{VERSION}.dist-info"))


class _AliasLoader(InspectLoader):
    """Loads a module under a second name: imports it under its own, and returns that object."""

    def __init__(self, source: ModuleSpec) -> None:
        self._source = source
        self._own_spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module under its own name."""
        module = importlib.import_module(self._source.name)
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore what the import system overwrote: the module was executed under its own name."""
        module.__spec__ = self._own_spec

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the code, for `python -m`."""
        loader: Any = self._source.loader
        code: CodeType | None = loader.get_code(self._source.name)
        return code

    def get_source(self, fullname: str) -> str | None:
        """Return the source text, for tracebacks."""
        loader: Any = self._source.loader
        text: str | None = loader.get_source(self._source.name)
        return text

    def is_package(self, fullname: str) -> bool:
        """Whether the module has submodules."""
        return self._source.submodule_search_locations is not None


def _tests_of_the_real_one(fullname: str, path: Sequence[str] | None) -> ModuleSpec:
    """Find a module of `accelerate.test_utils` in the real package, which is searched for and not imported."""
    if fullname == _TESTS:
        path = _folders_of_the_real_one()
    spec = PathFinder.find_spec(fullname, path)
    if spec is None:
        raise ModuleNotFoundError(
            f"No module named {fullname!r}: paceline is installed as accelerate in this process, and has no helpers "
            "for tests of its own. Those of the real package are used where it is installed: pip install accelerate.",
            name=fullname,
        )
    if fullname == f"{_TESTS}.testing":
        spec.loader = _TestingLoader(spec.loader)
    return spec


def _folders_of_the_real_one() -> list[str]:
    """The folder of the installed package, if there is one."""
    spec = PathFinder.find_spec(_NAME, [entry for entry in sys.path if entry != _PATH_ENTRY])
    return list(spec.submodule_search_locations or ()) if spec is not None else []


class _TestingLoader(Loader):
    """Loads `test_utils.testing`: scripts of the real package's tests are where that package is."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the file's own loader."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the file, and let what it says of the package's folder hold for its tests."""
        self._loader.exec_module(module)
        in_twin: Any = vars(module)["path_in_accelerate_package"]
        package = Path(str(module.__file__)).parents[1]

        def path_in_accelerate_package(*components: str) -> Path:
            in_real = package.joinpath(*components)
            return in_real if components[:1] == ("test_utils",) else in_twin(*components)

        vars(module)["path_in_accelerate_package"] = path_in_accelerate_package


def _is_accelerate(name: str) -> bool:
    return name.partition(".")[0] == _NAME


def _installed() -> list[AccelerateFinder]:
    return [finder for finder in sys.meta_path if isinstance(finder, AccelerateFinder)]


def _python_path() -> list[str]:
    """The entries of PYTHONPATH, without ours."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [entry for entry in entries if entry not in ("", _PATH_ENTRY)]


def _holders() -> Iterator[str]:
    """Yield the modules outside of Accelerate that hold a module, class or function of it."""
    # multiprocessing has a second name for `__main__`.
    for name, module in list({id(module): (name, module) for name, module in reversed(sys.modules.items())}.values()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict) and not _is_accelerate(name) and any(map(_is_of_accelerate, list(names.values()))):
            yield name


def _is_of_accelerate(thing: object) -> bool:
    # Not `isinstance`: some libraries keep objects that fail when they are asked for their class.
    kind = type(thing)
    if issubclass(kind, ModuleType):
        return _is_accelerate(str(vars(thing).get("__name__", "")))
    if issubclass(kind, (type, FunctionType)):
        return _is_accelerate(str(getattr(thing, "__module__", "")))
    return False
