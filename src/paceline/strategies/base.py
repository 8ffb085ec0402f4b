"""What a strategy is: about ten verbs, and what it is told about the run.

The plain single device is a strategy too, so nobody outside this folder asks which strategy it is. A verb that a
strategy leaves alone does what plain PyTorch does. An engine that owns backward and step (DeepSpeed) overrides
`backward`, `clip_norm`, `step` and `scale_gradients`, and takes the models together with their optimizers in `prepare`.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from paceline.errors import PrepareError, SteppingError
from paceline.precision import autocast_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from paceline.collectives import Group
    from paceline.config import RunConfig
    from paceline.environment.world import World
    from paceline.precision import PrecisionPolicy


class DistributedType(str, enum.Enum):
    """How a run is distributed, under the names that configuration files use."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_XPU = "MULTI_XPU"
    MULTI_NPU = "MULTI_NPU"
    FSDP = "FSDP"
    DEEPSPEED = "DEEPSPEED"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """All that a strategy may know of the run around it.

    Attributes:
        world: Which rank this is, among how many.
        device: Where this rank computes.
        group: All ranks that share the global batch.
        precision: The number format of the forward.
        config: The run's configuration, complete and checked.
    """

    world: World
    device: torch.device
    group: Group
    precision: PrecisionPolicy
    config: RunConfig


class Strategy(ABC):
    """One way to spread training over ranks.

    All ranks call the same verbs in the same order.
    """

    name: ClassVar[str]

    def __init__(self, surroundings: Surroundings) -> None:
        self.around = surroundings
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
            self.adopt(optimizer)
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
            model.to(self.around.device)
        autocast_forward(model, self.around.precision)

    def adopt(self, optimizer: Optimizer) -> None:  # noqa: B027 - doing nothing is right for most
        """Point an optimizer at the parameters that this strategy has put in place of its own."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The user's own module behind a prepared one."""
        return model

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

    def check_first_backward(self) -> None:  # noqa: B027
        """Look at the gradients of the first window, once; raise for what would go wrong silently."""

    def join(self, models: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        """Let ranks that run out of batches early follow along."""
        return nullcontext()

    # What others want to know

    def named_parameters(self, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters of a prepared model under the names that they have in the user's own module."""
        return self.unwrap(model).named_parameters()

    def gather_state(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights of a prepared model under their own names, on the CPU of the main rank; {} elsewhere.

        They may share memory with a model that is on the CPU and whole.
        Collective: every rank must call it.
        """
        if not self.around.world.is_main:
            return {}
        state = self.unwrap(model).state_dict()
        return {name: value.detach().cpu() for name, value in state.items() if torch.is_tensor(value)}

    def describe(self) -> list[str]:
        """Sentences about what was decided: one a line."""
        return []

    def dtypes(self) -> dict[str, str]:
        """Which dtype is used where: stored, compute, reduce, optimizer."""
        first = next((p for p in self.parameters() if p.requires_grad), None)
        stored = short_dtype(first.dtype) if first is not None else "fp32"
        policy = self.around.precision
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
