"""Comparisons of versions."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from packaging.version import Version, parse

from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.compat.accelerate.utils.constants import STR_OPERATION_TO_FUNC

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["compare_versions", "is_torch_version"]

_COMPARISONS: Mapping[str, Callable[[Version, Version], bool]] = STR_OPERATION_TO_FUNC


def compare_versions(library_or_version: str | Version, operation: str, requirement_version: str) -> bool:
    """Compare the version of an installed package, or a version, with another.

    Args:
        library_or_version: The package's name, or a version.
        operation: Such as ">=".
        requirement_version: The other version.

    Raises:
        InvalidValueError: There is no such comparison.
    """
    if operation not in _COMPARISONS:
        raise InvalidValueError(
            f"Versions are to be compared with {operation!r}",
            "There is no such comparison",
            f"Use one of {', '.join(_COMPARISONS)}",
        )
    present = parse(version(library_or_version)) if isinstance(library_or_version, str) else library_or_version
    return _COMPARISONS[operation](present, parse(requirement_version))


def is_torch_version(operation: str, version: str) -> bool:
    """Compare the version of torch with another."""
    return compare_versions("torch", operation, version)
