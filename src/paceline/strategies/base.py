"""What a strategy is: verbs for models and optimizers, for one step, for the state, and what others want to know.

The plain single device is a strategy too, so nobody outside this folder asks which strategy it is. A verb that a
strategy leaves alone does what plain PyTorch does. An engine that owns backward and step (DeepSpeed) overrides
`backward`, `clip_norm`, `step` and `scale_gradients`, and takes the models together with their optimizers in `prepare`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from paceline.checkpoint.format.shards import OptimizerState, TensorShard
from paceline.errors import PrepareError, SteppingError
from paceline.precision import autocast_forward
from paceline.strategies.activation_checkpointing import plain_name
from paceline.strategies.placeholders import DummyOptim, DummyScheduler
from paceline.strategies.state import (
    check_groups,
    make_slots_of,
    options_of,
    part_of,
    saved_buffers,
    sort_state,
    take_options,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from paceline.checkpoint.format.shards import Number, Slot
    from paceline.strategies.context import DistributedType, RunContext


class Strategy(ABC):
    """One way to spread training over ranks.

    All ranks call the same verbs in the same order.
    """

    name: ClassVar[str]
    scales_loss: bool = False
    """Whether the engine scales the loss itself under fp16, and skips steps by itself."""
    prepares_again: bool = True
    """Whether a model that was prepared before can be prepared once more, its optimizer's state kept."""

    keeps_gradients: bool = False
    """Whether gradients never reach `parameter.grad`, so that only the engine's own optimizers can step."""

    def __init__(self, surroundings: RunContext) -> None:
        self.context = surroundings
        # Samples in a batch of one rank, as far as a prepared loader has said.
        self.micro_batch: int | None = None
        # Stand-ins for schedules, handed over in the same call as the models.
        self.schedules: Sequence[DummyScheduler] = ()
        self._models: list[nn.Module] = []
        self._parameters: list[nn.Parameter] | None = None

    @property
    @abstractmethod
    def distributed_type(self) -> DistributedType:
        """What configuration files call this way of training."""

    # What becomes of models and optimizers

    def prepare(
        self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer], *, place: Sequence[bool]
    ) -> list[nn.Module]:
        """Make models and their optimizers fit this strategy; return the models to call instead.

        Optimizers are changed in place. Collective: every rank must call it.

        Args:
            models: To be trained, each once.
            optimizers: Whose parameters belong to these models or to models prepared before.
            place: For each model, whether to move it to the device.
        """
        prepared = []
        for model, move in zip(models, place, strict=True):
            check_trainable(model)
            prepared.append(self.prepare_model(model, place=move))
            self._models.append(model)
            self._parameters = None
        for optimizer in optimizers:
            if isinstance(optimizer, DummyOptim):
                raise self._refuse_stand_in("DummyOptim", "optimizer")
            self.rebind_optimizer(optimizer)
        return prepared

    @abstractmethod
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        """Spread one model over the ranks; return what the script calls instead of it."""

    def prepare_evaluation(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        """Place a model that is only evaluated: no gradient of it is ever exchanged."""
        self.place_whole(model, place=place)
        return model

    def place_whole(self, model: nn.Module, *, place: bool = True) -> None:
        """Move a model that no rank holds a part of, and let it compute in the run's precision."""
        if place:
            model.to(self.context.device)
        autocast_forward(model, self.context.precision)

    def rebind_optimizer(self, optimizer: Optimizer) -> None:  # noqa: B027 - doing nothing is right for most
        """Point an optimizer at the parameters that this strategy has put in place of its own."""

    def add_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        """Let a prepared optimizer update further parameters.

        Raises:
            PrepareError: The engine cannot train them.
        """
        optimizer.add_param_group(group)
        self._parameters = None

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The user's own module behind a prepared one."""
        return model

    def init_module(self) -> AbstractContextManager[Any]:
        """Build models inside as this strategy wants them: sharded from the start, where it can."""
        return nullcontext()

    def gather_parameters(
        self, parameters: Sequence[nn.Parameter], modifier_rank: int | None
    ) -> AbstractContextManager[Any]:
        """Hold `parameters` whole inside; changes made on `modifier_rank` reach all ranks."""
        return nullcontext()

    def replaced(self, parameter: nn.Parameter) -> bool:
        """Whether a prepared model has another parameter in place of this one."""
        return False

    def parameters_of(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """The models' parameters that an optimizer updates, whatever its engine has put in its groups."""
        return [p for group in optimizer.param_groups for p in group["params"]]

    def resolve_placeholder_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer that acts in place of one handed to `prepare`: itself, unless it was a stand-in."""
        return optimizer

    def resolve_placeholder_scheduler(self, scheduler: Any) -> Any:
        """The learning-rate scheduler to step: the one given, unless it is a stand-in for a described one.

        Raises:
            PrepareError: A stand-in, and this strategy reads no configuration that could describe one.
        """
        if isinstance(scheduler, DummyScheduler):
            raise self._refuse_stand_in("DummyScheduler", "scheduler")
        return scheduler

    def _refuse_stand_in(self, stand_in: str, section: str) -> PrepareError:
        return PrepareError(
            f"A {stand_in} was prepared",
            f"It stands for the {section} section of a DeepSpeed configuration, and the strategy is {self.name}",
            f"Pass a {section} of torch",
        )

    # One step

    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:  # noqa: B027
        """Say whether the next forward and backward of `model` end in an exchange of gradients."""

    def backward(self, loss: Tensor, scale: Tensor | None = None, **kwargs: Any) -> None:
        """Compute gradients of `loss * scale`, averaged over ranks when gradients are exchanged.

        Args:
            loss: The loss of this rank's micro-batch.
            scale: Shape and dtype of `loss`; None is one. It enters as the first gradient, which costs nothing.
            kwargs: Passed on to `Tensor.backward`.
        """
        loss.backward(gradient=scale, **kwargs)  # type: ignore[no-untyped-call]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of every prepared model, each once; listed when first asked for, since steps ask."""
        if self._parameters is None:
            self._parameters = list({id(p): p for model in self._models for p in model.parameters()}.values())
        return self._parameters

    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        """Multiply the gradients of `parameters` by one number, without reading it on the host."""
        multiply([p.grad for p in parameters if p.grad is not None], factor)

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
        """Scale gradients so that their norm over all ranks is at most `max_norm`; return the norm before.

        Returns:
            Shape [], on the device of the gradients; reading it is the caller's choice.
        """
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_value(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        """Clamp every element of every gradient to [-value, value]."""
        torch.nn.utils.clip_grad_value_(parameters, value)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Let the optimizer take one step."""
        return optimizer.step() if closure is None else optimizer.step(closure)

    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        """Whether the engine skipped the step just taken, for an fp16 overflow."""
        return False

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        """Drop the gradients of an optimizer's parameters."""
        optimizer.zero_grad(set_to_none=set_to_none)

    def complete_gradients(self, parameters: Iterable[nn.Parameter]) -> None:  # noqa: B027
        """Before anything acts on the gradients of `parameters`: make those final that the engine left on this rank."""

    def stepped(self) -> None:  # noqa: B027
        """Note that an optimizer has taken or skipped its step."""

    def check_first_backward(self) -> None:  # noqa: B027
        """Look at the gradients of the first window, once; raise for what would go wrong silently."""

    def join(self, models: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        """Let ranks that run out of batches early follow along."""
        return nullcontext()

    # State, in and out

    def model_state(self, model: nn.Module) -> dict[str, TensorShard]:
        """This rank's part of every parameter and saved buffer, each once, by its name in the user's own module.

        The parts are live memory: who writes into them calls `state_written` afterwards.
        """
        parts = {name: part_of(parameter) for name, parameter in self.named_parameters(model)}
        return parts | {name: TensorShard.whole(buffer) for name, buffer in saved_buffers(self.unwrap(model))}

    def num_elements(self, model: nn.Module) -> int:
        """Numbers in a prepared model's parameters, over all ranks."""
        return sum(parameter.numel() for parameter in model.parameters())

    def tied_names(self, model: nn.Module) -> dict[str, str]:
        """Further names of tensors in `model_state`, with the name under which it has them."""
        first: dict[int, str] = {}
        tied = {}
        for name, parameter in self.unwrap(model).named_parameters(remove_duplicate=False):
            known = first.setdefault(id(parameter), plain_name(name))
            if known != plain_name(name):
                tied[plain_name(name)] = known
        return tied

    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerState:
        """This rank's part of an optimizer's state, in live memory.

        Args:
            optimizer: A prepared one (as `prepare` got it).
            names: Of the prepared models' parameters, by `id`.

        Raises:
            StateError: It keeps something that is neither a tensor nor a number.
        """
        state = OptimizerState()
        for group in optimizer.param_groups:
            state.groups.append({**options_of(group), "params": [names[id(p)] for p in group["params"]]})
            for parameter in group["params"]:
                name = names[id(parameter)]
                slots, numbers = sort_state(optimizer, name, optimizer.state.get(parameter, {}))
                if slots:
                    state.slots[name] = slots
                if numbers:
                    state.numbers[name] = numbers
        return state

    def make_slots(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        slots: Mapping[str, Mapping[str, Slot]],
        numbers: Mapping[str, Mapping[str, Number]],
    ) -> None:
        """Make room for a saved state, and drop what is not in it, so that `optimizer_state` has parts to write into.

        Args:
            optimizer: A prepared one.
            names: Of the prepared models' parameters, by `id`.
            slots: The saved tensors of each parameter, as they are when whole.
            numbers: The saved numbers of each parameter; they are taken over as they are.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                made = make_slots_of(optimizer, parameter, group, slots.get(name, {}), name)
                made.update(numbers.get(name, {}))
                if made:
                    optimizer.state[parameter] = made
                else:
                    optimizer.state.pop(parameter, None)

    def set_groups(self, optimizer: Optimizer, names: Mapping[int, str], groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over the options of saved groups.

        Raises:
            StateError: The saved groups hold other parameters.
        """
        check_groups([[names[id(p)] for p in group["params"]] for group in optimizer.param_groups], groups)
        for held, saved in zip(optimizer.param_groups, groups, strict=True):
            take_options(held, saved)

    def state_written(self) -> None:  # noqa: B027
        """Carry what was written into the parts to every other copy of it. Collective."""

    def close(self) -> None:  # noqa: B027
        """Let go of what the collector cannot reach; nothing that was prepared works after it."""

    @property
    def settings(self) -> dict[str, Any]:
        """The engine's own configuration, complete, where it has one."""
        return {}

    def engine_state(self) -> dict[str, Any]:
        """What else the engine needs to go on: numbers that are the same on all ranks."""
        return {}

    def load_engine_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over what `engine_state` gave; what another strategy gave is left alone."""

    # What others want to know

    def named_parameters(self, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters of a prepared model under the names that they have in the user's own module."""
        return self.unwrap(model).named_parameters()

    def gather_state(self, model: nn.Module, *, without: Container[str] = ()) -> dict[str, Tensor]:
        """All weights of a prepared model under their own names, on the CPU of rank 0; {} elsewhere.

        They may share memory with a model that is on the CPU and whole.
        Collective: every rank must call it.

        Args:
            model: A prepared one.
            without: Names of weights that are not wanted, and need not be gathered.
        """
        if not self.context.world.is_main:
            return {}
        state = {name: value for name, value in self.unwrap(model).state_dict().items() if name not in without}
        return {name: value.detach().cpu() for name, value in state.items() if torch.is_tensor(value)}

    def describe(self) -> list[str]:
        """Sentences about what was decided: one a line."""
        return []

    def dtypes(self) -> dict[str, str]:
        """Which dtype is used where: stored, compute, reduce, optimizer, saved."""
        first = next((p for p in self.parameters() if p.requires_grad), None)
        stored = short_dtype(first.dtype) if first is not None else "fp32"
        policy = self.context.precision
        compute = short_dtype(policy.compute_dtype) if policy.uses_autocast else stored
        return {"stored": stored, "compute": compute, "reduce": stored, "optimizer": stored, "saved": stored}


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that nothing could train.

    Raises:
        PrepareError: The model has no parameter, or none that requires a gradient.
    """
    if any(p.requires_grad for p in model.parameters()):
        return
    total = sum(1 for _ in model.parameters())
    raise PrepareError(
        f"{type(model).__name__} has {total} parameters and none of them requires a gradient",
        "There is nothing in it to train or to exchange gradients for",
        "Unfreeze what should learn with requires_grad_(True), or use "
        "prepare_model(model, evaluation_mode=True) for a model that is only evaluated",
    )


def multiply(tensors: Iterable[Tensor], factor: Tensor | float) -> None:
    """Multiply tensors in place by one number, with one kernel for all that are on a device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    for device, same in by_device.items():
        torch._foreach_mul_(same, factor.to(device) if isinstance(factor, torch.Tensor) else factor)


def refuse_join(strategy: str) -> SteppingError:
    """The error of a strategy whose ranks cannot follow along without a batch of their own."""
    return SteppingError(
        f"join_uneven_inputs was called under {strategy}",
        "Its ranks exchange parameters in every forward, so a rank without a batch cannot follow along",
        "Keep even_batches=True: the last batches are filled up, and gather_for_metrics drops what was added",
    )


def short_dtype(dtype: torch.dtype) -> str:
    """`fp32`, `bf16`, `fp16` for torch's names of them; the plain name of any other."""
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}.get(name, name)
