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
        params: As for any optimizer of torch.
        lr: Fills `"auto"` in the section; 0.001 when nobody says it.
        weight_decay: Fills `"auto"` in the section; 0 when nobody says it.
        kwargs: Fill other values that are `"auto"`, such as `betas` and `eps`.
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
        super().__init__(params, {"lr": 0.001, "weight_decay": 0.0, **self.said})

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
