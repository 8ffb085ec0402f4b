"""The rules of a run that an adapter to another library exchanges, and the one way to hand them to an `Accelerator`."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.accelerator.stepping import TRUE_MEAN, AcceleratedOptimizer, AcceleratedScheduler, OwnBoundary, Window
from paceline.config.leniency import STRICT, Leniency
from paceline.data import OwnLoaders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.accelerator.stepping import GradientBoundary, WindowPolicy
    from paceline.collectives import Group
    from paceline.config import GradientAccumulationPlugin
    from paceline.data import ActiveLoaders, LoaderFamily, LoopPosition

__all__ = ["Policies", "current_policies", "use_policies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """The rules of one run.

    Attributes:
        leniency: What is tolerated instead of refused.
        window: What the gradients of an accumulation window are divided by.
        boundary: Makes what holds `sync_gradients`.
        optimizer: Makes prepared optimizers, from the arguments of `AcceleratedOptimizer`.
        scheduler: Makes prepared schedulers, from the arguments of `AcceleratedScheduler`, whose `advance` says how far
            one step goes.
        loaders: Makes the family of prepared loaders.
    """

    leniency: Leniency = STRICT
    window: WindowPolicy = TRUE_MEAN
    boundary: Callable[[], GradientBoundary] = OwnBoundary
    optimizer: Callable[..., AcceleratedOptimizer] = AcceleratedOptimizer
    scheduler: Callable[..., AcceleratedScheduler] = AcceleratedScheduler
    loaders: Callable[[ActiveLoaders], LoaderFamily] = OwnLoaders

    def open_window(self, accumulation: GradientAccumulationPlugin, position: LoopPosition, group: Group) -> Window:
        """Make the accumulation window of a run.

        Args:
            accumulation: Its length, and whether it ends with the loader.
            position: Where the loop is.
            group: The ranks.
        """
        return Window(
            accumulation.num_steps,
            position,
            group,
            sync_with_dataloader=accumulation.sync_with_dataloader,
            policy=self.window,
            boundary=self.boundary(),
            leniency=self.leniency,
        )


_OWN = Policies()
_CURRENT: ContextVar[Policies | None] = ContextVar("paceline_policies", default=None)


@contextmanager
def use_policies(policies: Policies) -> Iterator[None]:
    """Give each `Accelerator` built inside, in this thread, these rules instead of paceline's own.

    Args:
        policies: The rules.

    Example:
        >>> from paceline import Accelerator
        >>> from paceline.accelerator.stepping import WindowPolicy
        >>> with use_policies(Policies(window=WindowPolicy(divide_by="num_steps"))):
        ...     accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    """
    token = _CURRENT.set(policies)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_policies() -> Policies:
    """Return the rules of the enclosing `use_policies`; paceline's own outside of one."""
    return _CURRENT.get() or _OWN
