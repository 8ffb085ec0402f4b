"""The optimizer that steps at the end of a window, and what can be said of several of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from paceline.errors import SteppingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from paceline.precision import LossScaler
    from paceline.stepping.window import Window
    from paceline.strategies import Strategy

__all__ = ["AcceleratedOptimizer", "steps_taken", "unassigned"]

# In the second step, every other optimizer of the loop has had its first.
_CHECKED_STEPS = 2


class AcceleratedOptimizer(Optimizer):
    """An optimizer that steps and zeroes at the end of a window only.

    It is a `torch.optim.Optimizer`, so schedulers accept it; its state and its groups are those of the optimizer
    that it was made from, which stays reachable as `optimizer`.

    Attributes:
        num_steps: Steps taken; those that fp16 skipped are not counted.
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
        # The same without those that a checkpoint brought.
        self.num_steps_here = 0
        self._window = window
        self._scaler = scaler
        self._before_step = before_step
        self._add_group = add_group
        # Checks what can be checked once, and says which strategy was decided: an optimizer may come before that.
        self._check_step = check_step
        self._checks = 0
        self._strategy: Strategy | None = None
        self.step_was_skipped = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step if this micro-batch ends its window; otherwise do nothing.

        Under fp16 a step in which any rank found an overflow is skipped on all ranks: see `step_was_skipped`.
        """
        window = self._window
        if not window.sync_gradients:
            window.held_back(self)
            return None
        strategy = self._strategy
        if strategy is None or self._checks < _CHECKED_STEPS:
            self._checks += 1
            strategy = self._strategy = self._check_step(self, self._checks)
        self._before_step()
        strategy.complete_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        window.finalize_gradients(strategy)
        result = None
        if self._scaler is None:
            result = strategy.step(self.optimizer, closure)
            self.step_was_skipped = strategy.step_was_skipped(self.optimizer)
        else:
            self._refuse_closure(closure)
            self.step_was_skipped = not self._scaler.step_if_finite(self.optimizer)
        if not self.step_was_skipped:
            self.num_steps += 1
            self.num_steps_here += 1
        window.stepped(self)
        strategy.stepped()
        return result

    @staticmethod
    def _refuse_closure(closure: object) -> None:
        if closure is not None:
            raise SteppingError(
                "optimizer.step(closure) was called under mixed_precision='fp16'",
                "The gradient scaler must see the gradients before the optimizer does",
                "Use mixed_precision='bf16' or 'no' with optimizers that call a closure",
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, unless the open window still needs them."""
        if not self._window.may_zero:
            return
        if self._strategy is None:
            self.optimizer.zero_grad(set_to_none=set_to_none)
        else:
            self._strategy.zero_grad(self.optimizer, set_to_none)
        self._window.dropped()

    def train(self) -> None:
        """Switch a schedule-free optimizer to training; nothing for any other."""
        getattr(self.optimizer, "train", _nothing)()

    def eval(self) -> None:
        """Switch a schedule-free optimizer to evaluation; nothing for any other."""
        getattr(self.optimizer, "eval", _nothing)()

    # What the optimizer inside has

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the optimizer inside, by parameter."""
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        """The groups of the optimizer inside."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        """The defaults of the optimizer inside."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer inside.

        Raises:
            PrepareError: The strategy cannot train its parameters.
        """
        self._add_group(self.optimizer, param_group)
        # The next step is looked at as the first one was.
        self._strategy = None

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer inside."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer inside."""
        self.optimizer.load_state_dict(state_dict)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Register on the optimizer inside: it runs only before steps that are taken."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Register on the optimizer inside: it runs only after steps that are taken."""
        return self.optimizer.register_step_post_hook(hook)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A window cannot be copied: a copy, or what comes out of a pickle, is the optimizer inside.
        return _itself, (self.optimizer,)


def _nothing() -> None:
    """Do nothing."""


def _itself(optimizer: Optimizer) -> Optimizer:
    """Hand an unpickled optimizer back."""
    return optimizer


def steps_taken(optimizers: Iterable[AcceleratedOptimizer]) -> int:
    """Optimizer steps that a run has taken: those of the optimizer that took most."""
    return max((optimizer.num_steps for optimizer in optimizers), default=0)


def unassigned(models: Iterable[nn.Module], optimizers: Iterable[Optimizer], strategy: Strategy) -> list[str]:
    """The names of trainable parameters that no optimizer updates, in models of which it updates others.

    A model of which no parameter is in any optimizer and none got a gradient (a teacher, say) is left alone.
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
