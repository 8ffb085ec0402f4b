"""The name of a TPU's set-up, which paceline does not do: importable, and an error where it is used."""

from __future__ import annotations

from paceline.compat.accelerate.settings.errors import unsupported

__all__ = ["install_xla"]


@unsupported("paceline does not run on TPUs", "Install torch_xla as its own documentation says")
def install_xla(upgrade: bool = False) -> None:
    """Install torch_xla in a notebook."""
