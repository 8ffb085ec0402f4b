"""The narrow views of a strategy: the training state, the gradients, the optimizers, and what a summary shows.

By default their methods do what plain PyTorch does. `Strategy` derives from all of them, and code that needs only one
view takes that one as its parameter type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.format.shards import OptimizerState, TensorShard
from paceline.strategies.activation_checkpointing import plain_name
from paceline.strategies.quantized_states import quantize_before_step
from paceline.strategies.state import (
    allocate_slots,
    check_groups,
    load_options,
    local_shard,
    options_of,
    saved_buffers,
    split_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.checkpoint.format.shards import Number, Slot

__all__ = ["Describable", "GradientAccess", "OptimizerAccess", "TrainingStateAccess", "multiply"]


class TrainingStateAccess:
    """Reads and writes the training state: each rank sees its own shard of every tensor, in live memory.

    To load a state: `make_slots`, `set_groups`, write into the shards of `model_state` and `optimizer_state`,
    `load_engine_state`, and `state_written` at the end. No method communicates unless it says so.
    """

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the user's own module.

        Args:
            model: A prepared model, or any other module, which comes back unchanged.

        Returns:
            The module without the strategy's wrapper. It shares all parameters with `model`.
        """
        return model

    def gather_parameters(
        self, parameters: Sequence[nn.Parameter], modifier_rank: int | None
    ) -> AbstractContextManager[Any]:
        """Return a context in which sharded parameters are whole.

        Collective: every rank must enter and leave it.

        Args:
            parameters: Of prepared models.
            modifier_rank: Whose changes reach all ranks at the end; None if nothing is changed inside.

        Returns:
            A context manager; it does nothing where parameters are whole anyway.
        """
        return nullcontext()

    def named_parameters(self, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
        """List the parameters of a prepared model under the names that they have in the user's own module.

        Args:
            model: A prepared model.

        Returns:
            Pairs of name and parameter, each parameter once.
        """
        return self.unwrap(model).named_parameters()

    def tied_names(self, model: nn.Module) -> dict[str, str]:
        """Find further names of tied parameters.

        Args:
            model: A prepared model.

        Returns:
            For each name that `model_state` leaves out, the name under which it has the same tensor.
        """
        first: dict[int, str] = {}
        tied = {}
        for name, parameter in self.unwrap(model).named_parameters(remove_duplicate=False):
            known = first.setdefault(id(parameter), plain_name(name))
            if known != plain_name(name):
                tied[plain_name(name)] = known
        return tied

    def model_state(self, model: nn.Module) -> dict[str, TensorShard]:
        """Return this rank's shard of every parameter and persistent buffer.

        Args:
            model: A prepared model.

        Returns:
            Each tensor once, by its name in the user's own module. The shards are live memory: call `state_written`
            after writing into them.

        Raises:
            StateError: A tensor is sharded over another dimension than the first.
            SteppingError: Ranks that should have the same weights were found to differ.
        """
        shards = {name: local_shard(parameter) for name, parameter in self.named_parameters(model)}
        return shards | {name: TensorShard.whole(buffer) for name, buffer in saved_buffers(self.unwrap(model))}

    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerState:
        """Return this rank's shard of an optimizer's state, in live memory.

        Args:
            optimizer: A prepared optimizer, as it was passed to `prepare`.
            names: The names of all prepared parameters, by the parameter's `id`.

        Returns:
            Tensors, numbers and group options by parameter name.

        Raises:
            StateError: The optimizer stores something that is neither a tensor nor a number.
        """
        state = OptimizerState()
        for group in optimizer.param_groups:
            state.groups.append({**options_of(group), "params": [names[id(p)] for p in group["params"]]})
            for parameter in group["params"]:
                name = names[id(parameter)]
                slots, numbers = split_state(optimizer, name, optimizer.state.get(parameter, {}))
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
        """Allocate an optimizer's state for a checkpoint, so that `optimizer_state` has shards to write into.

        State that the checkpoint does not have is dropped.

        Args:
            optimizer: A prepared optimizer.
            names: The names of all prepared parameters, by the parameter's `id`.
            slots: Shape and dtype of each parameter's saved tensors, unsharded, by parameter name and slot name.
            numbers: Each parameter's saved numbers, which are stored as they are.

        Raises:
            StateError: This strategy cannot shard such a state.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                state = allocate_slots(optimizer, parameter, group, slots.get(name, {}), name)
                state.update(numbers.get(name, {}))
                if state:
                    optimizer.state[parameter] = state
                else:
                    optimizer.state.pop(parameter, None)
        quantize_before_step(optimizer)

    def set_groups(self, optimizer: Optimizer, names: Mapping[int, str], groups: Sequence[Mapping[str, Any]]) -> None:
        """Restore the options of an optimizer's parameter groups.

        Args:
            optimizer: A prepared optimizer.
            names: The names of all prepared parameters, by the parameter's `id`.
            groups: `OptimizerState.groups` of the checkpoint.

        Raises:
            StateError: The checkpoint's groups have other parameters.
        """
        check_groups([[names[id(p)] for p in group["params"]] for group in optimizer.param_groups], groups)
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            load_options(group, saved)

    def state_written(self) -> None:
        """Copy what was written into the shards to every other copy of the same values.

        Collective: every rank must call it.
        """

    def engine_state(self) -> dict[str, Any]:
        """Return what the engine needs besides tensors in order to resume, such as its loss scale.

        Returns:
            Values that JSON can hold, the same on all ranks. Empty by default.
        """
        return {}

    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `engine_state` returned.

        Args:
            state: Of the checkpoint. Keys of another strategy are ignored.
        """


class GradientAccess:
    """Acts on gradients between the backward that ends a window and the optimizer's step."""

    def complete_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make gradients final that the engine has not averaged over the ranks yet.

        It is called before anything reads the gradients. Collective: every rank must call it.

        Args:
            parameters: Whose gradients are about to be used.

        Raises:
            SteppingError: They cannot be made final.
        """

    def check_first_backward(self) -> None:
        """Check once, before the first step, for what would go wrong silently.

        Raises:
            PrepareError: Something that was prepared would have no effect.
        """

    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        """Multiply gradients by one number, without reading it on the host.

        Args:
            parameters: Whose gradients to scale; those without one are skipped.
            factor: A number, or a tensor of shape [].
        """
        multiply([p.grad for p in parameters if p.grad is not None], factor)

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
        """Scale gradients so that their norm over all ranks is at most `max_norm`.

        Collective: every rank must call it.

        Args:
            parameters: Whose gradients count, together, as one vector.
            max_norm: The largest norm; `inf` only computes it.
            norm_type: The `p` of the p-norm; `inf` is the largest absolute value.

        Returns:
            The norm before clipping, shape [], on the device of the gradients. Reading it on the host waits for the
            device, and is left to the caller.
        """
        listed = list(parameters)
        try:
            return torch.nn.utils.clip_grad_norm_(listed, max_norm, norm_type)
        except NotImplementedError:
            # Torch has no norm of sparse gradients.
            gradients = _values_of(listed)
            total = torch.nn.utils.get_total_norm(gradients, norm_type)
            multiply(gradients, torch.clamp(max_norm / (total + 1e-6), max=1.0))
            return total

    def clip_value(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        """Clamp every element of every gradient to [-value, value].

        Args:
            parameters: Whose gradients to clamp.
            value: Not negative.
        """
        listed = list(parameters)
        try:
            torch.nn.utils.clip_grad_value_(listed, value)
        except NotImplementedError:
            for gradient in _values_of(listed):
                gradient.clamp_(-value, value)


class OptimizerAccess:
    """Steps optimizers, and says what stands behind one once its model is prepared."""

    def rebind_optimizer(self, optimizer: Optimizer) -> None:
        """Point an optimizer, in place, at the parameters that replaced its own.

        Args:
            optimizer: Made before or after its model was prepared; a second call changes nothing.
        """

    def replaced(self, parameter: nn.Parameter) -> bool:
        """Tell whether a prepared model has another parameter in place of this one.

        Args:
            parameter: Any parameter.

        Returns:
            True if an optimizer that holds it must be rebound.
        """
        return False

    def parameters_of(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """List the models' parameters that an optimizer updates, whatever its engine has put into its groups.

        Args:
            optimizer: A prepared optimizer.

        Returns:
            The parameters of all its groups, in order.
        """
        return [p for group in optimizer.param_groups for p in group["params"]]

    def resolve_placeholder_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer that was built in place of a placeholder.

        Args:
            optimizer: What was passed to `prepare`.

        Returns:
            The built one; `optimizer` itself unless it is a `DummyOptim`.
        """
        return optimizer

    def resolve_placeholder_scheduler(self, scheduler: Any) -> Any:
        """Return the learning-rate scheduler to step.

        Args:
            scheduler: What was passed to the Accelerator's `prepare`.

        Returns:
            What the engine's configuration describes for a `DummyScheduler`; `scheduler` itself otherwise.

        Raises:
            PrepareError: The engine's configuration contradicts what was passed.
        """
        return scheduler

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimizer step.

        Args:
            optimizer: A prepared optimizer.
            closure: Computes the loss again, for optimizers that ask for it.

        Returns:
            What `Optimizer.step` returns.
        """
        return optimizer.step() if closure is None else optimizer.step(closure)

    def stepped(self) -> None:
        """React to an optimizer step that was taken or skipped. Collective: every rank must call it."""

    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        """Tell whether the engine skipped the step just taken, because of an fp16 overflow.

        Args:
            optimizer: The prepared optimizer that was stepped.

        Returns:
            Always False for a strategy that does not scale the loss itself.
        """
        return False

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        """Drop the gradients of an optimizer's parameters.

        Args:
            optimizer: A prepared optimizer.
            set_to_none: Free the gradients' memory instead of filling it with zeros.
        """
        optimizer.zero_grad(set_to_none=set_to_none)


class Describable(ABC):
    """Says what was decided, for start summaries, trackers and checkpoint manifests."""

    @property
    def settings(self) -> dict[str, Any]:
        """The engine's own configuration, complete; empty for a strategy whose engine has none."""
        return {}

    def describe(self) -> list[str]:
        """Say how models are spread over the ranks.

        Returns:
            Sentences, one a line; empty if there is nothing to say.
        """
        return []

    @abstractmethod
    def dtypes(self) -> dict[str, str]:
        """Say which dtype is used where.

        Returns:
            Short names such as `bf16` under `stored`, `compute`, `reduce`, `optimizer` and `saved`.
        """

    def num_elements(self, model: nn.Module) -> int:
        """Count the elements of a model's parameters, over all ranks.

        Args:
            model: A prepared model.

        Returns:
            The number of elements, tied parameters counted once.
        """
        return sum(parameter.numel() for parameter in model.parameters())


def _values_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients of parameters in live memory: of a sparse one its values, which are coalesced before."""
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad._values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    return values


def multiply(tensors: Iterable[Tensor], factor: Tensor | float) -> None:
    """Multiply tensors in place by one number, with one kernel for all that are on a device.

    Args:
        tensors: On any devices.
        factor: A number, or a tensor of shape [].
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    for device, same in by_device.items():
        torch._foreach_mul_(same, factor.to(device) if isinstance(factor, torch.Tensor) else factor)
