"""Several pieces of work at a time, also while the program ends."""

from __future__ import annotations

from threading import Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["in_threads"]

T = TypeVar("T")
R = TypeVar("R")


def in_threads(count: int, name: str, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Do some work on each item, `count` at a time; return what came of it, in the order of the items.

    A pool of `concurrent.futures` takes no work once the main thread has come to its end, and a save in the
    background that is still being written then would be lost.

    Raises:
        BaseException: The first failure; what was not begun by then is left.
    """
    done: dict[int, R] = {}
    failures: list[BaseException] = []
    waiting = iter(range(len(items)))

    def take() -> None:
        for index in waiting:
            if failures:
                return
            try:
                done[index] = work(items[index])
            except BaseException as error:
                failures.append(error)

    threads = [Thread(target=take, name=f"{name}_{number}") for number in range(min(count, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:
        # Whoever interrupts this closes the files next, which nobody may use by then.
        failures.append(error)
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return [done[index] for index in range(len(items))]
