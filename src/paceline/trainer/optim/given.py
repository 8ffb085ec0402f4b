"""Which optimizer and schedule a training begins with."""

from __future__ import annotations

from typing import Any

__all__ = ["GivenOptimizers"]


class GivenOptimizers:
    """The script's own optimizer and schedule, told apart from those of earlier trainings.

    A script may give them to the Trainer, set its attributes, or call `create_optimizer` and change the result.

    Args:
        optimizer: As given to the Trainer; None if it makes one.
        scheduler: Likewise.
    """

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._prepared_optimizer: Any = None
        self._prepared_scheduler: Any = None
        self._made_optimizer: Any = None
        self._made_scheduler: Any = None

    def choose(self, optimizer: Any, scheduler: Any) -> tuple[Any, Any]:
        """Look at the Trainer's attributes when a training begins.

        Args:
            optimizer: What the Trainer has.
            scheduler: Likewise.

        Returns:
            The optimizer and the schedule to train with, each None if a new one is to be made: what an earlier training
            prepared is not used again, and a schedule that the Trainer made before has another length.
        """
        if optimizer is None or optimizer is not self._prepared_optimizer:
            self.optimizer = optimizer
        if scheduler is None or scheduler is not self._prepared_scheduler:
            self.scheduler = None if scheduler is self._made_scheduler else scheduler
        return self.optimizer, self.scheduler

    def note_made(self, *, optimizer: Any = None, scheduler: Any = None) -> None:
        """Record what the Trainer made from its arguments."""
        if optimizer is not None:
            self._made_optimizer = optimizer
        if scheduler is not None:
            self._made_scheduler = scheduler

    def note_prepared(self, optimizer: Any, scheduler: Any) -> None:
        """Record what a training prepared, which is its own."""
        self._prepared_optimizer, self._prepared_scheduler = optimizer, scheduler

    def forget_old_model(self) -> None:
        """Discard an optimizer that the Trainer made for a model which was replaced."""
        if self.optimizer is self._made_optimizer:
            self.optimizer = None
