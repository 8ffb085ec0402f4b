"""Names of what paceline does not support: they can be imported, and using one is an error with the alternative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

from paceline.compat.accelerate.settings.errors import UnsupportedError

__all__ = ["MEGATRON", "MENU", "Refused", "refused_names"]

Reason = tuple[str, str]

MEGATRON: Final[Reason] = (
    "paceline does not drive Megatron-LM",
    "Shard with FullyShardedDataParallelPlugin or DeepSpeedPlugin, or run with Accelerate itself, without the switch",
)
MENU: Final[Reason] = (
    "paceline asks its questions in another way",
    "Use `questionary.select(question, choices=choices).ask()`, which paceline installs",
)


class Refused:
    """What a refused name stands for: a class, so that programs can test for its type. Making or calling it raises."""

    reason: ClassVar[Reason] = ("", "")

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise UnsupportedError(f"{type(self).__name__} was used", *self.reason)


def refused_names(module: str, names: str, reason: Reason) -> tuple[Callable[[str], Any], list[str]]:
    """Return the `__getattr__` and `__all__` of a module whose names are all refused.

    Args:
        module: The module's name.
        names: Its names, with spaces between.
        reason: Why, and what to do instead.
    """
    classes = {name: type(name, (Refused,), {"reason": reason, "__module__": module}) for name in names.split()}

    def getattr_(name: str) -> Any:
        if name not in classes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return classes[name]

    return getattr_, sorted(classes)
