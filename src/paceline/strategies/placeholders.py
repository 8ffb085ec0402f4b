"""Placeholders for an optimizer and a scheduler that the DeepSpeed configuration describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from typing_extensions import override

from paceline.errors import PrepareError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

__all__ = ["DummyOptim", "DummyScheduler", "placeholder_error"]

_LATER = "DummyScheduler(optimizer, lr_scheduler_callable=…), which builds it on the real optimizer"


class DummyOptim(Optimizer):
    """A placeholder for the `optimizer` section of the DeepSpeed configuration, from which `prepare` builds one.

    A torch scheduler may be created on it: what the scheduler has set is passed to the optimizer that is built, whose
    groups it changes from then on.

    Args:
        params: As for any torch optimizer. Options of a group, such as its weight decay, apply to that group.
        lr: Learning rate where the section says `"auto"` or nothing; 0.001 by default.
        weight_decay: Weight decay where the section says `"auto"` or nothing; 0 by default.
        kwargs: Further options for the section, such as `betas` and `eps`.

    Attributes:
        explicit: The options that were passed.
        explicit_by_group: The options that were passed with each group.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | None = None,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, **kwargs}
        self.explicit = {key: value for key, value in options.items() if value is not None}
        self.explicit_by_group: list[dict[str, Any]] = []
        self._built: Optimizer | None = None
        self._own_groups: list[dict[str, Any]] = []
        # The groups as they were created, before a scheduler set anything in them.
        self._initial_groups: list[dict[str, Any]] = []
        super().__init__(params, {"lr": 0.001, "weight_decay": 0.0, **self.explicit})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer that was built, or its own until there is one."""
        return self._own_groups if self._built is None else self._built.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._own_groups = groups

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and note its explicit options before the base class fills in the defaults."""
        self.explicit_by_group.append({key: value for key, value in param_group.items() if key != "params"})
        super().add_param_group(param_group)
        self._initial_groups.append(dict(self._own_groups[-1]))

    def attach(self, built: Optimizer) -> None:
        """Become a view of the optimizer that was built, and pass on what a scheduler has set.

        Args:
            built: The optimizer that the engine steps, with the same groups.

        Raises:
            PrepareError: The scheduler was created with another learning rate than the configuration has.
        """
        changes = [
            {key: value for key, value in group.items() if key != "params" and _differs(key, value, initial)}
            for group, initial in zip(self._own_groups, self._initial_groups, strict=True)
        ]
        if any(changes):
            self._check_schedule(changes, built)
            for new, changed in zip(built.param_groups, changes, strict=True):
                new.update(changed)
        self._built = built
        # Without it torch would warn that the scheduler steps before this optimizer, which is never stepped itself.
        self._opt_called = True

    def detach(self) -> None:
        """Forget the optimizer that was built, so that this placeholder can be prepared again."""
        built, self._built = self._built, None
        if built is not None:
            for own, new in zip(self._own_groups, built.param_groups, strict=False):
                own.update((key, new[key]) for key in own if key != "params" and key in new)

    def _check_schedule(self, changes: Sequence[dict[str, Any]], built: Optimizer) -> None:
        if len(changes) != len(built.param_groups):
            raise PrepareError(
                f"A scheduler was created on a DummyOptim with {len(changes)} groups, and DeepSpeed made "
                f"{len(built.param_groups)} of them",
                "The scheduler sets one learning rate for each of the groups that it was created with",
                f"Pass it as {_LATER}",
            )
        for changed, initial, new in zip(changes, self._initial_groups, built.param_groups, strict=True):
            if changed.get("initial_lr") == initial["lr"] != new["lr"]:
                raise PrepareError(
                    f"A scheduler was created on a DummyOptim with lr={initial['lr']:g}, and the DeepSpeed "
                    f"configuration says optimizer.params.lr {new['lr']:g}",
                    "The scheduler would scale the wrong learning rate",
                    f"Write DummyOptim(parameters, lr={new['lr']:g}), or pass the scheduler as {_LATER}",
                )

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Refuse: a placeholder cannot be stepped.

        Raises:
            PrepareError: Always.
        """
        raise PrepareError(
            "DummyOptim.step() was called",
            "It is only a placeholder for the optimizer that the DeepSpeed configuration describes",
            "Use what accelerator.prepare(model, optimizer) returned, under strategy='deepspeed'",
        )


def _differs(key: str, value: Any, initial: dict[str, Any]) -> bool:
    return key not in initial or bool(initial[key] != value)


class DummyScheduler:
    """A placeholder for the `scheduler` section of the DeepSpeed configuration, from which `prepare` builds one.

    Args:
        optimizer: A `DummyOptim`, or a torch optimizer.
        total_num_steps: Optimizer steps of the whole training, where the section says `"auto"`.
        warmup_num_steps: Optimizer steps of the warm-up, where the section says `"auto"`.
        lr_scheduler_callable: Builds the scheduler from the optimizer; takes the place of the section.
        kwargs: Further values for the section, where it says `"auto"`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Callable[[Optimizer], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.lr_scheduler_callable = lr_scheduler_callable
        self.kwargs = kwargs


def placeholder_error(placeholder: str, section: str, strategy: str) -> PrepareError:
    """Make the error of a strategy that reads no DeepSpeed configuration.

    Args:
        placeholder: The class that was prepared.
        section: The section of the configuration that it stands for.
        strategy: The strategy's name.

    Returns:
        The error, to be raised.
    """
    return PrepareError(
        f"A {placeholder} was prepared under strategy={strategy!r}",
        f"It is a placeholder for the {section} section of a DeepSpeed configuration, which this strategy ignores",
        f"Pass a torch {section}, or use strategy='deepspeed'",
    )
