"""The store in which launchers talk, asked so that a dead connection cannot hold the asker."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from paceline.errors import WorldError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._C._distributed_c10d import Store

__all__ = ["CutOffError", "StoreClient", "call_in_thread"]

_Answer = TypeVar("_Answer")
_POLL = 0.05


class CutOffError(WorldError):
    """The store does not answer, or its launcher is gone."""


class _Call:
    """One question on its way, and its answer."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask
        self.done = threading.Event()
        self.answer: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.answer = self._ask()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


def call_in_thread(ask: Callable[[], _Answer], meanwhile: Callable[[], None], name: str) -> _Answer:
    """Call something that may take long in a thread, and look after other things every moment until it returns.

    Args:
        ask: What to call.
        meanwhile: Called in this thread while waiting; what it raises ends the waiting.
        name: Of the thread.
    """
    call = _Call(ask)
    threading.Thread(target=call.run, name=name, daemon=True).start()
    while not call.done.wait(_POLL):
        meanwhile()
    if call.error is not None:
        raise call.error
    answer: _Answer = call.answer
    return answer


class StoreClient:
    """A store, asked by one thread that may be left behind in a call that never returns."""

    def __init__(self, store: Store, patience: float) -> None:
        self._store = store
        self._patience = patience
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="paceline-store", daemon=True)
        self._thread.start()

    def has(self, *keys: str) -> bool:
        """Whether all these keys are set."""
        return bool(self._ask(lambda: self._store.check(list(keys))))

    def get(self, key: str) -> bytes:
        """Return the value of a key that is set."""
        return bytes(self._ask(lambda: self._store.get(key)))

    def put(self, key: str, value: str) -> None:
        """Set a key."""
        self._ask(lambda: self._store.set(key, value))

    def claim(self, key: str, value: str) -> bytes:
        """Set a key unless it is set; return what it holds then."""
        return bytes(self._ask(lambda: self._store.compare_set(key, "", value)))

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; return what it is then."""
        return int(self._ask(lambda: self._store.add(key, amount)))

    def close(self) -> None:
        """End the thread, unless it hangs."""
        self._calls.put(None)
        self._thread.join(timeout=1.0)

    def _ask(self, ask: Callable[[], Any]) -> Any:
        call = _Call(ask)
        self._calls.put(call)
        deadline = time.monotonic() + self._patience
        while not call.done.wait(_POLL):
            if time.monotonic() > deadline:
                raise CutOffError(f"no answer for {self._patience:.0f} s")
        if isinstance(call.error, Exception):
            raise CutOffError(f"its launcher is gone ({first_line(call.error, 80)})") from call.error
        if call.error is not None:
            raise call.error
        return call.answer

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()
