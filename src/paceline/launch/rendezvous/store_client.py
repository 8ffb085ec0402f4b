"""A client of the launchers' store whose caller cannot hang on a dead connection."""

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

_Result = TypeVar("_Result")
_POLL = 0.05


class CutOffError(WorldError):
    """The store does not respond, or its launcher is gone."""


class _Call:
    """A pending call and its result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


def call_in_thread(function: Callable[[], _Result], on_wait: Callable[[], None], name: str) -> _Result:
    """Call a slow function in a thread and return its result.

    Args:
        function: What to call.
        on_wait: Called repeatedly in the current thread while waiting; what it raises ends the wait.
        name: Name of the thread.
    """
    call = _Call(function)
    threading.Thread(target=call.run, name=name, daemon=True).start()
    while not call.done.wait(_POLL):
        on_wait()
    if call.error is not None:
        raise call.error
    result: _Result = call.result
    return result


class StoreClient:
    """A store whose calls are made by one thread, which is left behind when a call never returns."""

    def __init__(self, store: Store, timeout: float) -> None:
        self._store = store
        self._timeout = timeout
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="paceline-store", daemon=True)
        self._thread.start()

    def has(self, *keys: str) -> bool:
        """Whether all these keys are set."""
        return bool(self._call(lambda: self._store.check(list(keys))))

    def get(self, key: str) -> bytes:
        """Return the value of a key that is set."""
        return bytes(self._call(lambda: self._store.get(key)))

    def put(self, key: str, value: str) -> None:
        """Set a key."""
        self._call(lambda: self._store.set(key, value))

    def claim(self, key: str, value: str) -> bytes:
        """Set a key unless it is set; return its value after that."""
        return bytes(self._call(lambda: self._store.compare_set(key, "", value)))

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; return its new value."""
        return int(self._call(lambda: self._store.add(key, amount)))

    def close(self) -> None:
        """End the thread, unless it hangs."""
        self._calls.put(None)
        self._thread.join(timeout=1.0)

    def _call(self, function: Callable[[], Any]) -> Any:
        call = _Call(function)
        self._calls.put(call)
        deadline = time.monotonic() + self._timeout
        while not call.done.wait(_POLL):
            if time.monotonic() > deadline:
                raise CutOffError(f"no response for {self._timeout:.0f} s")
        if isinstance(call.error, Exception):
            raise CutOffError(f"its launcher is gone ({first_line(call.error, 80)})") from call.error
        if call.error is not None:
            raise call.error
        return call.result

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()
