"""Attributes of a package that are imported on first use."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["lazy_attributes"]


def lazy_attributes(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """Return the `__getattr__` and `__all__` of a package.

    Args:
        package: The package's name.
        names: For each module of the package, the names that it defines, with spaces between. The module itself becomes
            an attribute, too; with a dot before its name it is one of the package above.
    """
    homes = {name: f".{module}" for module, text in names.items() for name in text.split()}
    # Whoever imports the module would find it under the name from then on.
    assert not homes.keys() & names.keys(), f"{package}: a name is that of a module: {homes.keys() & names.keys()}"

    def getattr_(name: str) -> Any:
        if name in homes:
            value = getattr(import_module(homes[name], package), name)
        elif name in names:
            value = import_module(f".{name}", package)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return getattr_, sorted(homes)
