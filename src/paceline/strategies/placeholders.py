"""Stand-ins for an optimizer and a scheduler that the DeepSpeed configuration describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from typing_extensions import override

from paceline.errors import PrepareError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

__all__ = ["DummyOptim", "DummyScheduler"]

_LATER = "DummyScheduler(optimizer, lr_scheduler_callable=…), which makes it on the optimizer that is built"


class DummyOptim(Optimizer):
    """Stands for the `optimizer` section of the DeepSpeed configuration until `prepare` builds what it describes.

    Args:
        params: As for any optimizer of torch. What a group says itself, such as its decay, holds for that group.
        lr: Fills `"auto"` in the section, or what it leaves out; 0.001 when nobody says it.
        weight_decay: Fills `"auto"` in the section, or what it leaves out; 0 when nobody says it.
        kwargs: Fill other values likewise, such as `betas` and `eps`.

    A schedule of torch may be made on it: what the schedule sets is handed to the optimizer that is built, and the
    groups are that one's from then on.

    Attributes:
        said: The arguments that were given.
        said_by_groups: The options that each group says itself.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | None = None,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        said = {"lr": lr, "weight_decay": weight_decay, **kwargs}
        self.said = {key: value for key, value in said.items() if value is not None}
        self.said_by_groups: list[dict[str, Any]] = []
        self._built: Optimizer | None = None
        self._own_groups: list[dict[str, Any]] = []
        # The groups as they were made, before a schedule set anything in them.
        self._at_first: list[dict[str, Any]] = []
        super().__init__(params, {"lr": 0.001, "weight_decay": 0.0, **self.said})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Its own groups, and those of the optimizer that was built, once there is one."""
        return self._own_groups if self._built is None else self._built.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._own_groups = groups

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; note what it says itself, before the base class fills the defaults in."""
        self.said_by_groups.append({key: value for key, value in param_group.items() if key != "params"})
        super().add_param_group(param_group)
        self._at_first.append(dict(self._own_groups[-1]))

    def hand_over(self, built: Optimizer) -> None:
        """Give what a schedule has set to the optimizer that was built, which the schedule moves from here on.

        Raises:
            PrepareError: The schedule was made from another learning rate than the configuration asks for.
        """
        changes = [
            {key: value for key, value in group.items() if key != "params" and _differs(key, value, at_first)}
            for group, at_first in zip(self._own_groups, self._at_first, strict=True)
        ]
        if any(changes):
            self._check_schedule(changes, built)
            for new, changed in zip(built.param_groups, changes, strict=True):
                new.update(changed)
        self._built = built
        # The engine steps what was built; torch would tell the schedule that nobody steps this one.
        self._opt_called = True

    def take_back(self) -> None:
        """Stand for nothing that was built any more, so that it may be prepared again."""
        built, self._built = self._built, None
        if built is not None:
            for own, new in zip(self._own_groups, built.param_groups, strict=False):
                own.update((key, new[key]) for key in own if key != "params" and key in new)

    def _check_schedule(self, changes: Sequence[dict[str, Any]], built: Optimizer) -> None:
        if len(changes) != len(built.param_groups):
            raise PrepareError(
                f"A schedule was made on a DummyOptim of {len(changes)} groups, and DeepSpeed made "
                f"{len(built.param_groups)} of them",
                "The schedule sets one learning rate for each group that it has seen",
                f"Hand it over as {_LATER}",
            )
        for changed, at_first, new in zip(changes, self._at_first, built.param_groups, strict=True):
            if changed.get("initial_lr") == at_first["lr"] != new["lr"]:
                raise PrepareError(
                    f"A schedule was made on a DummyOptim with lr={at_first['lr']:g}, and the DeepSpeed configuration "
                    f"says optimizer.params.lr {new['lr']:g}",
                    "The schedule would set learning rates that are shares of another one",
                    f"Write DummyOptim(parameters, lr={new['lr']:g}), or hand the schedule over as {_LATER}",
                )

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Refuse: there is nothing to step yet.

        Raises:
            PrepareError: Always.
        """
        raise PrepareError(
            "DummyOptim.step() was called",
            "It only stands for the optimizer that the DeepSpeed configuration describes",
            "Use what accelerator.prepare(model, optimizer) returned, under strategy='deepspeed'",
        )


def _differs(key: str, value: Any, at_first: dict[str, Any]) -> bool:
    return key not in at_first or bool(at_first[key] != value)


class DummyScheduler:
    """Stands for the `scheduler` section of the DeepSpeed configuration until `prepare` builds what it describes.

    Args:
        optimizer: A `DummyOptim`, or an optimizer of torch.
        total_num_steps: Optimizer steps of the whole training; fills `"auto"`.
        warmup_num_steps: Optimizer steps of the warm-up; fills `"auto"`.
        lr_scheduler_callable: Given the optimizer, makes the scheduler; takes the place of the section.
        kwargs: Fill other values that are `"auto"`.
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
