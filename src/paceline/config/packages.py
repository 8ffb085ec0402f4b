"""Optional packages that a configuration needs: whether they are installed is known before any rank starts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from paceline.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config.schema.run import RunConfig
    from paceline.config.sources.origin import Origin

__all__ = ["is_installed", "missing_packages"]


def is_installed(package: str) -> bool:
    """Whether a package can be imported. A folder of that name in the working directory does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def missing_packages(config: RunConfig, origins: Mapping[str, Origin]) -> Iterator[Problem]:
    """Yield a problem for each package that a run needs and that this Python environment does not have.

    Args:
        config: The configuration of the run.
        origins: The source of each key that is not at its default.
    """
    for keys, value, package in _needs(config):
        if not is_installed(package):
            where = next((origins[key].where for key in keys if key in origins), "")
            why = "it is not installed in this Python environment"
            # The extra has the package's name.
            hint = f"run: pip install 'paceline[{package}]'"
            yield Problem(where, keys[0], f"{value} needs the package {package}", why, hint)


def _needs(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield the keys that may have chosen it, the choice, and its package."""
    if config.strategy == "deepspeed":
        yield ("strategy", "distributed_type"), "deepspeed", "deepspeed"
    if config.mixed_precision == "fp8":
        yield ("mixed_precision",), "fp8", "torchao"
