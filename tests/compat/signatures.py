"""The public surface of a package with Accelerate's names, as plain data.

`python -m tests.compat.signatures` writes `signatures.json` from the Accelerate that is installed. Do so in an
environment of its own, with the newest release; the tests only read the file.
"""

from __future__ import annotations

import enum
import functools
import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

RECORD = Path(__file__).parents[1] / "data" / "compat" / "signatures.json"

# The modules from which programs import.
MODULES = (
    "",
    "accelerator",
    "big_modeling",
    "checkpointing",
    "commands.config",
    "commands.launch",
    "data_loader",
    "hooks",
    "inference",
    "launchers",
    "local_sgd",
    "logging",
    "memory_utils",
    "optimizer",
    "parallelism_config",
    "scheduler",
    "state",
    "tracking",
    "utils",
    "utils.constants",
    "utils.dataclasses",
    "utils.deepspeed",
    "utils.environment",
    "utils.fsdp_utils",
    "utils.imports",
    "utils.memory",
    "utils.modeling",
    "utils.offload",
    "utils.operations",
    "utils.other",
    "utils.random",
    "utils.tqdm",
    "utils.versions",
)

# Packages whose names are other modules'.
EXPORTING = ("", "utils", "commands.config")


def recorded() -> dict[str, dict[str, Any]]:
    """What the real one has, by module and name."""
    record: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def full_name(package: str, module: str) -> str:
    return f"{package}.{module}" if module else package


def surface(package: str, module: str) -> dict[str, Any]:
    """The public names that a module defines; of a package that exports other modules' names, only the names."""
    loaded = import_module(full_name(package, module))
    names = [name for name, value in vars(loaded).items() if _is_public(package, loaded, name, value)]
    if module in EXPORTING:
        return dict.fromkeys(names)
    return {name: described(getattr(loaded, name)) for name in names}


def _is_public(package: str, module: ModuleType, name: str, value: Any) -> bool:
    if name.startswith("_") or inspect.ismodule(value):
        return False
    home = getattr(value, "__module__", None)
    if home is None:  # constants
        return name.isupper() and module.__name__.rpartition(".")[2] in ("constants", "utils")
    is_package = hasattr(module, "__path__")
    return bool(home == module.__name__ or (is_package and home.startswith(f"{package}.")))


def described(value: Any) -> Any:
    """Parameters of a function, members of an enumeration, methods of a class, or a value as text."""
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return {"members": {member.name: member.value for member in value}}
    if isinstance(value, type) and issubclass(value, BaseException):
        return {"error": [base.__name__ for base in value.__mro__ if base.__module__ == "builtins"]}
    if isinstance(value, type):
        return {"parameters": parameters(value), "methods": methods(value)}
    return {"parameters": parameters(value)} if callable(value) else {"value": plain(value)}


def methods(cls: type) -> dict[str, Any]:
    """The public methods and properties that the package's own classes define."""
    package = cls.__module__.partition(".")[0]
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != package:
            continue
        for name, value in vars(base).items():
            if not name.startswith("_") and name not in found:
                found[name] = _method(value)
    return {name: value for name, value in sorted(found.items()) if value is not None}


def _method(value: Any) -> Any:
    if isinstance(value, (property, functools.cached_property)):
        return "property"
    if isinstance(value, (staticmethod, classmethod)):
        return parameters(value.__func__)
    return parameters(value) if inspect.isfunction(value) else None


# What versions of Python have added to EnumMeta and logging.LoggerAdapter.
_BY_VERSION = ("boundary", "_simple", "merge_extra")


def parameters(function: Any) -> str:
    """`name, name=default, *name, **name`; a lone `*` is before the keyword-only ones."""
    texts: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in _BY_VERSION:
            continue
        kind = parameter.kind
        if kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in texts):
            texts.append("*")
        stars = {inspect.Parameter.VAR_POSITIONAL.value: "*", inspect.Parameter.VAR_KEYWORD.value: "**"}
        star = stars.get(kind.value, "")
        default = "" if parameter.default is parameter.empty else f"={plain(parameter.default)}"
        texts.append(f"{star}{parameter.name}{default}")
    return ", ".join(texts)


def plain(value: Any) -> str:
    """A default as text, without addresses and without the package's name."""
    if isinstance(value, enum.Enum):
        return str(value.value)
    if inspect.isfunction(value) or isinstance(value, type):
        return value.__name__
    text = repr(value)
    return type(value).__name__ if " at 0x" in text or "/" in text else text


def main() -> None:
    record = {module: surface("accelerate", module) for module in MODULES}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print({module: len(names) for module, names in record.items()})


if __name__ == "__main__":
    main()
