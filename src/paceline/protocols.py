"""Small protocols that several floors speak; nothing here imports anything of paceline."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["Stateful"]


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken out as a dictionary and put back."""

    def state_dict(self) -> dict[str, Any]:
        """Take the state out."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Put a state back in."""
        ...
