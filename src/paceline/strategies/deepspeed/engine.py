"""One model in training under DeepSpeed, and the registry of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paceline.errors import SteppingError
from paceline.strategies.placeholders import DummyOptim

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.strategies.deepspeed.partitions import Partitions, PartitionSlice
    from paceline.strategies.deepspeed.weight_check import WeightCheck
    from paceline.strategies.use_check import UseCheck


@dataclass(slots=True, eq=False)
class ZeroEngine:
    """One model in training: DeepSpeed's engine, and what it was built from.

    Attributes:
        engine: DeepSpeed's engine.
        model: The user's module inside it.
        given_optimizer: What the script passed to `prepare`: its optimizer, or a `DummyOptim`.
        partitions: Where the engine keeps values, gradients and optimizer states.
        groups: The model's parameters by parameter group.
        dtypes: The dtype to save each parameter in, by its `id`.
        weights: Notices weights that the script changed.
        uses: Compares which parameters the backward of each rank has reached.
        used: Those that it has reached since the last step, by their `id`, where they are to be compared.
        syncs: Whether its backward may end a window; not under `no_sync`.
        window_ended: Whether a backward has ended the window, and no step has been taken since.
        is_clipped: Whether the gradients of this window were clipped.
        awaits_backward: Whether a forward ran whose loss has had no backward.
        foreign: The model's parameters that another engine trains, by name; mostly none.
        step_counts: For each flat tensor by its `id`, its slice and the step counts that a checkpoint fills in.
    """

    engine: Any
    model: nn.Module
    given_optimizer: Optimizer
    partitions: Partitions
    groups: list[list[nn.Parameter]]
    dtypes: dict[int, torch.dtype]
    weights: WeightCheck
    uses: UseCheck
    used: set[int] = field(default_factory=set)
    syncs: bool = True
    window_ended: bool = False
    is_clipped: bool = False
    awaits_backward: bool = False
    foreign: dict[str, nn.Parameter] = field(default_factory=dict)
    step_counts: dict[int, tuple[PartitionSlice, list[Tensor]]] = field(default_factory=dict)

    @property
    def keeps_gradients_of(self) -> set[int]:
        """The `id`s of the tensors whose gradients are not in `grad`: of parameters, and of what the optimizer has."""
        own = {id(p) for group in self.groups for p in group if self.partitions.is_updated(p)}
        return own and own | {id(p) for group in self.optimizer.param_groups for p in group["params"]}

    @property
    def hides_parameters(self) -> bool:
        """Whether the optimizer's groups are empty outside of a step, as with stage 3."""
        return not any(group["params"] for group in self.optimizer.param_groups)

    @property
    def optimizer(self) -> Any:
        """The optimizer that owns the states: the user's own, or the one that the configuration describes."""
        return self.engine.basic_optimizer


class EngineRegistry:
    """The engines of a run: one for each trained model, and those of models that are only evaluated.

    Attributes:
        settings: DeepSpeed's configuration with every `"auto"` resolved; empty until an engine is built.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self._engines: list[ZeroEngine] = []
        self._evaluated: list[Any] = []

    def __iter__(self) -> Iterator[ZeroEngine]:
        """Yield the engines of trained models, in the order in which they were built."""
        return iter(self._engines)

    def add(self, zero: ZeroEngine) -> None:
        """Register the engine of a trained model."""
        self._engines.append(zero)

    def add_evaluated(self, engine: Any) -> None:
        """Register DeepSpeed's engine of a model that is only evaluated."""
        self._evaluated.append(engine)

    def find(self, optimizer: object) -> ZeroEngine | None:
        """The engine that trains with an optimizer: one that the script passed in, or the engine's own."""
        return next((z for z in self._engines if z.given_optimizer is optimizer or z.optimizer is optimizer), None)

    def engine_of(self, model: nn.Module) -> ZeroEngine | None:
        """The engine that trains a model, prepared or as the script made it."""
        return next((zero for zero in self._engines if zero.engine is model or zero.model is model), None)

    def owners(self) -> dict[int, nn.Module]:
        """The model whose engine trains a parameter, by the `id` of the parameter."""
        return {id(p): zero.model for zero in self._engines for group in zero.groups for p in group}

    def source_of_loss(self) -> ZeroEngine:
        """The engine that a loss comes from: the one whose forward ran since its last backward.

        Raises:
            SteppingError: Several ran, or none.
        """
        if len(self._engines) == 1:
            return self._engines[0]
        pending = [zero for zero in self._engines if zero.awaits_backward]
        if len(pending) == 1:
            return pending[0]
        names = ", ".join(type(zero.model).__name__ for zero in pending) or "none"
        raise SteppingError(
            f"backward() was called after the forward of several trained models: {names}",
            "Each has its own DeepSpeed engine, which must run the backward of its own loss",
            "Call forward and backward of one model before the forward of the next, with torch.no_grad() around a "
            "forward that needs no gradient; or use strategy='fsdp'",
        )

    def close(self) -> None:
        """Destroy all engines; their placeholders may be prepared again."""
        for zero in self._engines:
            if isinstance(zero.given_optimizer, DummyOptim):
                zero.given_optimizer.detach()
        for engine in (*(zero.engine for zero in self._engines), *self._evaluated):
            destroy_engine(engine)
        self._engines.clear()
        self._evaluated.clear()


def destroy_engine(engine: Any) -> None:
    """Destroy an engine, so that its model and its buckets of some GiB can be garbage-collected.

    Its hooks are attached to autograd's gradient accumulators, which the collector does not see, and ZeRO-3 keeps a
    list of all models that it ever sharded.
    """
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    sharded = parameter_offload.FWD_MODULE_STACK
    sharded[:] = [module for module in sharded if module is not engine.module]
