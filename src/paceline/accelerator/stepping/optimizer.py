"""The prepared optimizer, which steps at the end of an accumulation window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from paceline.errors import SteppingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from paceline.accelerator.stepping.loss_scaler import LossScaler
    from paceline.accelerator.stepping.window import Window
    from paceline.strategies import Strategy

__all__ = ["AcceleratedOptimizer", "steps_taken", "unassigned_parameters"]

# By an optimizer's second step every other one of the loop has had its first.
_CHECKED_STEPS = 2


class ParametersOf:
    """The parameters of an optimizer, listed whenever somebody iterates: most steps need no list of them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (p for group in self._optimizer.param_groups for p in group["params"])


class AcceleratedOptimizer(Optimizer):
    """An optimizer that steps and zeroes gradients at the end of an accumulation window only.

    It is a `torch.optim.Optimizer`, so schedulers accept it; its state and parameter groups are those of the
    optimizer that was prepared, which stays reachable as `optimizer`.

    Args:
        optimizer: The optimizer to step.
        window: The accumulation window.
        scaler: The loss scaler of fp16.
        check_step: Called with the first steps' numbers (1, 2); checks what can be checked once and returns the
            strategy, which may be decided after the optimizer was prepared.
        before_step: Called before each step.
        add_group: Adds a parameter group to the optimizer inside.

    Attributes:
        num_steps: Steps taken, those before the checkpoint that was loaded included, skipped ones not.
        steps_since_start: Steps taken since the script started.
        step_was_skipped: Whether the last step was skipped for an fp16 overflow.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        window: Window,
        scaler: LossScaler | None,
        check_step: Callable[[AcceleratedOptimizer, int], Strategy],
        before_step: Callable[[], None],
        add_group: Callable[[Optimizer, dict[str, Any]], None],
    ) -> None:
        # The base class's constructor would build groups of its own.
        self.optimizer = optimizer
        self.num_steps = 0
        self.steps_since_start = 0
        self._window = window
        self._scaler = scaler
        self._before_step = before_step
        self._add_group = add_group
        self._check_step = check_step
        self._checks = 0
        self._parameters = ParametersOf(optimizer)
        self._strategy: Strategy | None = None
        self.step_was_skipped = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step if this micro-batch ends its window; otherwise do nothing.

        Under fp16 a step in which any rank found an overflow is skipped on all ranks: see `step_was_skipped`.
        Collective: every rank must call it.

        Args:
            closure: Passed on to the optimizer inside; not under fp16. An optimizer that decides by the loss, such as
                L-BFGS, gets its mean over the ranks, so that all of them go on alike.

        Returns:
            What the optimizer inside returns; None if it was not stepped.

        Raises:
            SteppingError: A closure under fp16, or gradients that cannot be right.
            PrepareError: In the first step: parameters, optimizers or models that were left out of `prepare`.
        """
        window = self._window
        if not window.boundary.sync_gradients:
            window.defer_step(self)
            return None
        strategy = self._strategy
        if strategy is None or self._checks < _CHECKED_STEPS:
            self._checks += 1
            strategy = self._strategy = self._check_step(self, self._checks)
            self._parameters = ParametersOf(self.optimizer)
        self._before_step()
        strategy.complete_gradients(self._parameters)
        window.finalize_gradients(strategy)
        if closure is not None:
            closure = self._on_all_ranks(closure, strategy)
        if self._scaler is None:
            result = strategy.step(self.optimizer, closure)
            self.step_was_skipped = strategy.scales_loss and strategy.step_was_skipped(self.optimizer)
        else:
            self._refuse_closure(closure)
            result = None
            self.step_was_skipped = not self._scaler.step_if_finite(self.optimizer)
        if not self.step_was_skipped:
            self.num_steps += 1
            self.steps_since_start += 1
        window.record_step(self)
        strategy.stepped()
        return result

    def _on_all_ranks(self, closure: Callable[..., Any], strategy: Strategy) -> Callable[..., Any]:
        """A closure whose gradients and, where the optimizer decides by it, loss are those of all ranks."""
        lacks_backward = self._window.lacks_backward
        reads_loss = _reads_loss(self.optimizer)

        def completed(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            if lacks_backward:
                self._window.check_closure()
            strategy.complete_gradients(self._parameters)
            return strategy.mean_loss(loss) if reads_loss and torch.is_tensor(loss) else loss

        return completed

    @staticmethod
    def _refuse_closure(closure: object) -> None:
        if closure is not None:
            raise SteppingError(
                "optimizer.step(closure) was called under mixed_precision='fp16'",
                "The gradient scaler must unscale the gradients between the closure and the step",
                "Use mixed_precision='bf16' or 'no' with optimizers that call a closure",
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, unless the open window still needs them.

        Args:
            set_to_none: Free their memory instead of writing zeros.
        """
        if self._window.can_zero_gradients:
            self.drop_gradients(set_to_none)

    def drop_gradients(self, set_to_none: bool = True) -> None:
        """Drop gradients, whatever the open window still needs.

        Args:
            set_to_none: Free their memory instead of writing zeros.
        """
        if self._strategy is None:
            self.optimizer.zero_grad(set_to_none=set_to_none)
        else:
            self._strategy.zero_grad(self.optimizer, set_to_none)
        self._window.record_zero_grad()

    def train(self) -> None:
        """Switch a schedule-free optimizer to training; any other ignores it."""
        getattr(self.optimizer, "train", _do_nothing)()

    def eval(self) -> None:
        """Switch a schedule-free optimizer to evaluation; any other ignores it."""
        getattr(self.optimizer, "eval", _do_nothing)()

    # Handed on to the optimizer inside

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the optimizer inside, by parameter."""
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        """The parameter groups of the optimizer inside."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        """The defaults of the optimizer inside."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the optimizer inside.

        Args:
            param_group: As for `torch.optim.Optimizer`.

        Raises:
            PrepareError: The strategy cannot train its parameters.
        """
        self._add_group(self.optimizer, param_group)
        # The next step is checked as the first one was.
        self._strategy = None

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer inside."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state into the optimizer inside."""
        self.optimizer.load_state_dict(state_dict)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Register a hook on the optimizer inside: it runs only before steps that are taken."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Register a hook on the optimizer inside: it runs only after steps that are taken."""
        return self.optimizer.register_step_post_hook(hook)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A window cannot be copied, so a copy or a pickle is the optimizer inside.
        return _unpickled, (self.optimizer,)


def _do_nothing() -> None:
    """Do nothing."""


def _reads_loss(optimizer: Optimizer) -> bool:
    """Whether an optimizer may decide by the loss of its closure how it goes on: of torch's own, only L-BFGS does."""
    return isinstance(optimizer, torch.optim.LBFGS) or not type(optimizer).step.__module__.startswith("torch.optim.")


def _unpickled(optimizer: Optimizer) -> Optimizer:
    return optimizer


def steps_taken(optimizers: Iterable[AcceleratedOptimizer]) -> int:
    """Optimizer steps that a run has taken: those of the optimizer that took the most."""
    return max((optimizer.num_steps for optimizer in optimizers), default=0)


def unassigned_parameters(
    models: Iterable[nn.Module], optimizers: Iterable[Optimizer], strategy: Strategy
) -> list[str]:
    """The names of trainable parameters that no optimizer updates, in models of which it updates others.

    A model of which no parameter is in any optimizer and none got a gradient (a teacher, say) is skipped.
    """
    assigned = {id(p) for optimizer in optimizers for p in strategy.parameters_of(optimizer)}
    names: list[str] = []
    for model in models:
        trained = [(name, p) for name, p in strategy.named_parameters(model) if p.requires_grad]
        missing = [name for name, p in trained if id(p) not in assigned]
        involved = len(missing) < len(trained) or any(p.grad is not None for _, p in trained)
        if involved:
            names.extend(missing)
    return names
