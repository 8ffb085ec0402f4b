"""Stand-ins for an optimizer and a scheduler that the DeepSpeed configuration describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from typing_extensions import override

from paceline.errors import PrepareError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

__all__ = ["DummyOptim", "DummyScheduler"]


class DummyOptim(Optimizer):
    """Stands for the `optimizer` section of the DeepSpeed configuration until `prepare` builds what it describes.

    Args:
        params: As for any optimizer of torch. What a group says itself, such as its decay, holds for that group.
        lr: Fills `"auto"` in the section, or what it leaves out; 0.001 when nobody says it.
        weight_decay: Fills `"auto"` in the section, or what it leaves out; 0 when nobody says it.
        kwargs: Fill other values likewise, such as `betas` and `eps`.

    Attributes:
        said: The arguments that were given.
        said_by_groups: The names of the options that each group says itself.
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
        self.said_by_groups: list[set[str]] = []
        super().__init__(params, {"lr": 0.001, "weight_decay": 0.0, **self.said})

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; note what it says itself, before the base class fills the defaults in."""
        self.said_by_groups.append(set(param_group) - {"params"})
        super().add_param_group(param_group)

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
