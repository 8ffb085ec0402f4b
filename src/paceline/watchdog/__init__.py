"""Noticing that a rank waits for others that do not come, and saying who is missing and where it is.

Nothing of it runs in the path of a step: a thread looks now and then at what torch's flight recorder has noted anyway,
and at the main thread's stack only once something stands still.
"""

from __future__ import annotations

from paceline.watchdog.watch import Watch, default_limit, start_watch

__all__ = ["Watch", "default_limit", "start_watch"]
