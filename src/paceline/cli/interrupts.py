"""Ctrl-C while torch is imported."""

from __future__ import annotations

import signal
import threading

__all__ = ["INTERRUPTED", "import_torch"]

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C ended."""


def import_torch() -> None:
    """Import torch; meanwhile Ctrl-C ends the process at once.

    Native code of torch imports NumPy and drops a KeyboardInterrupt that comes then (torch 2.13, for a tenth of the
    import's time): the command would continue as if Ctrl-C had not been pressed.
    """
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_usual or threading.current_thread() is not threading.main_thread():
        import torch

        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import torch  # noqa: F401
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
