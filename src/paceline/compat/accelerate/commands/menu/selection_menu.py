"""A menu of choices on a terminal, which is not supported."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.compat.accelerate.settings.errors import UnsupportedError

__all__ = ["BulletMenu"]


class BulletMenu:
    """A menu: making one is refused.

    Args:
        prompt: The question.
        choices: The answers.

    Raises:
        UnsupportedError: Always.
    """

    def __init__(self, prompt: str | None = None, choices: Sequence[str] = ()) -> None:
        raise UnsupportedError(
            f"A menu with the question {prompt!r} was made",
            "paceline asks its questions in another way",
            "Use `questionary.select(prompt, choices=choices).ask()`, which paceline installs",
        )
