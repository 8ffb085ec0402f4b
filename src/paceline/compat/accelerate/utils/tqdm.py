"""A progress bar of one rank."""

from __future__ import annotations

from typing import Any

__all__ = ["tqdm"]


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """Return a progress bar of tqdm's, which stays hidden on all but the first rank of each machine.

    Args:
        *args: Arguments of `tqdm.auto.tqdm`.
        main_process_only: Show it on the first rank of each machine only.
        **kwargs: Keyword arguments of `tqdm.auto.tqdm`.
    """
    # On first use, as reading notebooks' tools takes time.
    from tqdm.auto import tqdm as bar

    from paceline.compat.accelerate.state import PartialState

    hidden = main_process_only and not PartialState().is_local_main_process
    return bar(*args, **{**kwargs, "disable": kwargs.get("disable", False) or hidden})
