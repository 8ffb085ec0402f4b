"""At which steps a check is made that is too expensive for each of them."""

from __future__ import annotations

__all__ = ["EVERY", "is_due"]

# How many steps lie between two checks of a long run.
EVERY = 256


def is_due(step: int) -> bool:
    """Whether a step is one of 1, 2, 4 ... 128, 256, 512, 768 ...

    Args:
        step: Its number, from 1.
    """
    return step % EVERY == 0 or (step < EVERY and step & (step - 1) == 0)
