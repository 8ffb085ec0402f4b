"""Tracebacks in colour, by rich: importing this module turns them on, as with Accelerate."""

from __future__ import annotations

from rich.traceback import install

install(show_locals=False)
