"""Detects that ranks wait for others that do not arrive, and reports which are missing and where they are.

Nothing of it runs in the path of a step: a thread polls torch's flight recorder, and the main thread's stack only while
a collective is pending.
"""

from __future__ import annotations

from paceline.collectives.watchdog.watch import Watch, default_limit, start_watch

__all__ = ["Watch", "default_limit", "start_watch"]
