"""Examples under the help of a command."""

from __future__ import annotations

__all__ = ["examples"]


def examples(*lines: str) -> str:
    """Write command lines as click takes them for the end of a help text, unwrapped."""
    return "\b\n" + "\n".join(("Examples:", *(f"    {line}" for line in lines)))
