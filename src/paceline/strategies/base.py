"""`Strategy`: how models are trained, on one device or spread over many ranks.

A single device is a strategy too, so no code outside this folder asks which strategy is in use. A method that a
strategy does not override does what plain PyTorch does. An engine that owns backward and step (DeepSpeed) overrides
`backward`, `clip_norm`, `step` and `scale_gradients`, and takes the models together with their optimizers in `prepare`.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import override

from paceline.collectives.coalescing import broadcast_coalesced
from paceline.errors import PrepareError, SteppingError, counted, named
from paceline.strategies.placeholders import DummyOptim, placeholder_error
from paceline.strategies.precision import autocast_forward, short_dtype
from paceline.strategies.protocols import Describable, GradientAccess, OptimizerAccess, TrainingStateAccess

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from paceline.strategies.attention import AttentionKernels
    from paceline.strategies.compiler import Compiler
    from paceline.strategies.context import DistributedType, RunContext
    from paceline.strategies.fp8_models import Fp8Models
    from paceline.strategies.placeholders import DummyScheduler


class Strategy(TrainingStateAccess, GradientAccess, OptimizerAccess, Describable):
    """One way to spread training over ranks. All ranks call the same methods in the same order.

    A subclass must define `name`, `distributed_type` and `prepare_model`.

    Attributes:
        name: What selects the strategy, as in `Accelerator(strategy="ddp")`.
        scales_loss: Whether the engine scales the loss itself under fp16, and skips steps by itself.
        prepares_again: Whether a prepared model can be prepared once more, its optimizer's state kept.
        keeps_gradients: Whether gradients never reach `parameter.grad`, so that only the engine can step.
        keeps_addresses: Whether weights stay where they are in memory, so that steps can be replayed as CUDA graphs.
        context: The run's ranks, device, precision and configuration.

    Args:
        context: Of this run.
    """

    name: ClassVar[str]
    scales_loss: bool = False
    prepares_again: bool = True
    keeps_gradients: bool = False
    keeps_addresses: bool = False

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self._models: list[nn.Module] = []
        self._parameters: list[nn.Parameter] | None = None
        # How many contexts hold back the exchange of a model's gradients, by its id.
        self._sync_holds: dict[int, int] = {}

    @property
    @abstractmethod
    def distributed_type(self) -> DistributedType:
        """The name of this way of training in configuration files."""

    @property
    def mesh(self) -> DeviceMesh | None:
        """The device mesh over which models are spread; None where there is none."""
        return None

    @cached_property
    def attention(self) -> AttentionKernels:
        """Which kernels compute attention while models are prepared."""
        # Needed with the first model.
        from paceline.strategies.attention import AttentionKernels

        return AttentionKernels(self.context)

    @cached_property
    def compiler(self) -> Compiler:
        """What is compiled of each model."""
        # It needs the configuration's schema, which takes too long to load for a mere import of paceline.
        from paceline.strategies.compiler import Compiler

        return Compiler(self.context, keeps_addresses=self.keeps_addresses)

    @cached_property
    def fp8(self) -> Fp8Models:
        """The models whose large linear layers multiply in fp8."""
        from paceline.strategies.fp8_models import Fp8Models

        return Fp8Models(self.context)

    @override
    def gather_parameters(
        self, parameters: Sequence[nn.Parameter], modifier_rank: int | None
    ) -> AbstractContextManager[Any]:
        """Return a context after which all ranks have what one rank has changed inside.

        Collective: every rank must enter and leave it.

        Args:
            parameters: Of prepared models.
            modifier_rank: Whose changes reach all ranks at the end; None if nothing is changed inside.

        Returns:
            A context manager.

        Raises:
            CollectiveError: There is no such rank.
        """
        if modifier_rank is None:
            return super().gather_parameters(parameters, modifier_rank)
        self.context.group.check_source(modifier_rank)
        return self._changed_on(modifier_rank, parameters)

    @contextmanager
    def _changed_on(self, rank: int, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Give all ranks the parameters that one of them has changed inside."""
        yield
        broadcast_coalesced(self.context.group, [p.detach() for p in parameters], rank)

    # Models and optimizers

    def prepare(
        self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer], *, place: Sequence[bool]
    ) -> list[nn.Module]:
        """Spread models over the ranks, and rebind their optimizers in place.

        Collective: every rank must call it.

        Args:
            models: To be trained, each once.
            optimizers: Of these models' parameters, or of models prepared before.
            place: For each model, whether to move it to the device.

        Returns:
            For each model, in order, the module to call in its place.

        Raises:
            PrepareError: Something cannot be trained in this way.
        """
        prepared = []
        for model, move in zip(models, place, strict=True):
            check_trainable(model)
            prepared.append(self.prepare_model(model, place=move))
            self._models.append(model)
            self._parameters = None
        for optimizer in optimizers:
            if isinstance(optimizer, DummyOptim):
                raise placeholder_error("DummyOptim", "optimizer", self.name)
            self.rebind_optimizer(optimizer)
        return prepared

    def prepare_training(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        *,
        place: Sequence[bool],
        micro_batch: int | None = None,
        schedules: Sequence[DummyScheduler] = (),
    ) -> list[nn.Module]:
        """Call `prepare`; only an engine whose configuration depends on loaders and schedules overrides this.

        The Accelerator calls it. Collective: every rank must call it.

        Args:
            models: See `prepare`.
            optimizers: See `prepare`.
            place: See `prepare`.
            micro_batch: Samples in one rank's batch; None if no prepared loader has a batch size.
            schedules: Placeholders of schedules that are prepared in the same call.

        Returns:
            See `prepare`.
        """
        return self.prepare(models, optimizers, place=place)

    @abstractmethod
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        """Spread one model over the ranks.

        Collective: every rank must call it.

        Args:
            model: To be trained.
            place: Whether to move it to the device.

        Returns:
            The module that the script calls in its place.
        """

    def prepare_evaluation(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        """Prepare a model that is only evaluated, whose gradients are never averaged.

        Collective: every rank must call it.

        Args:
            model: Not trained by this run.
            place: Whether to move it to the device.

        Returns:
            The module that the script calls in its place.
        """
        self.place_whole(model, place=place)
        return model

    def place_whole(self, model: nn.Module, *, place: bool = True) -> None:
        """Move an unsharded model to this rank's device, and let its forward compute in the run's precision.

        A model that a device map has spread over several devices stays where it is, and so does one whose weights are
        kept in host memory or on disk by hooks.

        Args:
            model: Changed in place.
            place: False leaves it where it is.

        Raises:
            PrepareError: There are several ranks, and a device map has spread the model, or it is offloaded.
        """
        devices = _devices_of_map(model)
        stays = len(devices) > 1 or _is_offloaded(model)
        if stays and self.context.group.size > 1:
            how = f"spread over {', '.join(map(str, devices))} by a device map" if devices else "offloaded"
            raise PrepareError(
                f"{type(model).__name__} is {how}, and there are {self.context.group.size} ranks",
                "Each rank trains a whole model on its device",
                "Load the model without device_map, shard it (FSDP or DeepSpeed), or run one process",
            )
        if place and not stays:
            model.to(self.context.device)
        autocast_forward(model, self.context.precision)

    def add_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        """Let a prepared optimizer update further parameters.

        Args:
            optimizer: A prepared optimizer.
            group: As for `Optimizer.add_param_group`.

        Raises:
            PrepareError: The engine cannot train them.
        """
        optimizer.add_param_group(group)
        self._parameters = None

    def init_module(self) -> AbstractContextManager[Any]:
        """Return a context in which models are built as this strategy wants them: sharded at once, where it can.

        Returns:
            A context manager that is entered on all ranks alike.
        """
        return nullcontext()

    # One step

    def hold_gradient_sync(self, model: nn.Module) -> None:
        """Let a model's gradients add up on each rank, until every hold on it is released.

        Args:
            model: A prepared model.
        """
        holds = self._sync_holds.get(id(model), 0)
        self._sync_holds[id(model)] = holds + 1
        if holds == 0:
            self.set_gradient_sync(model, False)

    def release_gradient_sync(self, model: nn.Module) -> None:
        """Release one hold on a model; the last one lets its next backward average gradients again.

        Args:
            model: A prepared model.
        """
        holds = self._sync_holds.pop(id(model), 1) - 1
        if holds > 0:
            self._sync_holds[id(model)] = holds
        else:
            self.set_gradient_sync(model, True)

    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        """Set whether the next forward and backward of a model average its gradients over the ranks.

        Args:
            model: A prepared model.
            enabled: False accumulates gradients on each rank, as under `no_sync`.
        """

    def set_window_end(self, ends: bool) -> None:
        """Say whether the next backward is the last of its accumulation window, whoever decided that.

        Args:
            ends: Only an engine that acts on its own at that point needs to know.
        """

    def sync_next_backward(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context whose backward averages gradients, though every forward ran without gradient sync.

        Args:
            model: A prepared model.

        Returns:
            A context manager; it does nothing where the backward itself decides, or where there is nothing to average.
        """
        return nullcontext()

    def backward(self, loss: Tensor, scale: Tensor | None = None, **kwargs: Any) -> None:
        """Compute the gradients of `loss * scale`, averaged over the ranks if gradient sync is enabled.

        Collective if gradient sync is enabled: every rank must call it.

        Args:
            loss: The loss of this rank's micro-batch.
            scale: Shape and dtype of `loss`; None is one. It is the first gradient, which costs no extra kernel.
            kwargs: Passed on to `Tensor.backward`.
        """
        loss.backward(gradient=scale, **kwargs)  # type: ignore[no-untyped-call]

    def mean_loss(self, loss: Tensor) -> Tensor:
        """Average the loss of a closure over the ranks, so that its optimizer decides alike on all of them.

        Collective: every rank must call it.

        Args:
            loss: Of this rank.

        Returns:
            A tensor of the same shape with the mean's value and the graph of this rank's loss.

        Raises:
            SteppingError: Ranks that have run out of batches could not follow.
        """
        group = self.context.group
        if group.size == 1:
            return loss
        return loss + (group.all_reduce(loss.detach().clone(), "mean") - loss.detach())

    def parameters(self) -> list[nn.Parameter]:
        """List the parameters of all prepared models.

        Returns:
            Each parameter once. The list is cached, since every step asks for it.
        """
        if self._parameters is None:
            self._parameters = list({id(p): p for model in self._models for p in model.parameters()}.values())
        return self._parameters

    @override
    def stepped(self) -> None:
        """Take note of an optimizer step that was taken or skipped, for what is compiled by default."""
        self.compiler.stepped()

    def join(self, models: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        """Return a context in which ranks that run out of batches early follow the others' collectives.

        Args:
            models: The prepared models that are trained inside.

        Returns:
            A context manager that is entered on all ranks.

        Raises:
            SteppingError: Ranks cannot follow along under this strategy.
        """
        return nullcontext()

    # Results

    def gather_state(self, model: nn.Module, *, without: Container[str] = ()) -> dict[str, Tensor]:
        """Gather all weights of a prepared model.

        Collective: every rank must call it.

        Args:
            model: A prepared model.
            without: Names of weights to leave out, which are not gathered.

        Returns:
            On rank 0 the unsharded tensors, on the CPU, by their names in the user's own module; {} on other ranks.
            They may share memory with a model that is whole and on the CPU.
        """
        if not self.context.world.is_main:
            return {}
        state = {name: value for name, value in _state_dict(self.unwrap(model)).items() if name not in without}
        return {name: value.detach().cpu() for name, value in state.items() if torch.is_tensor(value)}

    @override
    def dtypes(self) -> dict[str, str]:
        """Say which dtype is used where.

        Returns:
            Short names such as `bf16` under `stored`, `compute`, `reduce`, `optimizer` and `saved`.
        """
        first = next((p for p in self.parameters() if p.requires_grad), None)
        stored = short_dtype(first.dtype) if first is not None else "fp32"
        policy = self.context.precision
        compute = short_dtype(policy.compute_dtype) if policy.uses_autocast else stored
        return {"stored": stored, "compute": compute, "reduce": stored, "optimizer": stored, "saved": stored}

    @staticmethod
    def join_process_group() -> None:
        """Let the engine use the process group that is open, before there is a run: programs build sharded models."""

    def close(self) -> None:
        """Release what the garbage collector cannot reach. Nothing that was prepared works afterwards."""
        self.compiler.close()
        self.attention.release()


def check_trainable(model: nn.Module) -> None:
    """Refuse a model without anything to train.

    Args:
        model: About to be prepared.

    Raises:
        PrepareError: The model has no parameter, or none that requires a gradient.
    """
    if any(p.requires_grad for p in model.parameters()):
        return
    total = counted(sum(1 for _ in model.parameters()), "parameter")
    raise PrepareError(
        f"{type(model).__name__} has {total}, and none of them requires a gradient",
        "There is nothing to train, and no gradient to average",
        "Unfreeze what should be trained with requires_grad_(True), or use "
        "prepare_model(model, evaluation_mode=True) for a model that is only evaluated",
    )


def check_dense_gradients(model: nn.Module, engine: str) -> None:
    """Refuse layers with sparse gradients.

    Args:
        model: About to be sharded.
        engine: Which reduces gradients, as it is called in the error.

    Raises:
        PrepareError: There are some; it names them.
    """
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    sparse = [name or type(layer).__name__ for name, layer in layers if layer.sparse and layer.weight.requires_grad]
    if sparse:
        raise PrepareError(
            f"{named(sparse)} of {type(model).__name__} {'has' if len(sparse) == 1 else 'have'} sparse gradients "
            "(sparse=True)",
            f"{engine} reduces gradients as one dense buffer",
            "Build it with sparse=False, and use SGD or AdamW in place of SparseAdam; or train with strategy='ddp'",
        )


def check_needs_no_closure(optimizer: Optimizer, engine: str, why: str) -> None:
    """Refuse L-BFGS where it cannot work.

    Args:
        optimizer: About to be prepared.
        engine: As it is called in the error.
        why: It cannot work.

    Raises:
        PrepareError: The optimizer is L-BFGS.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise PrepareError(
            f"{type(optimizer).__name__} was prepared under {engine}",
            why,
            "Use strategy='ddp', or an optimizer that updates each element on its own, such as AdamW",
        )


def refuse_join(engine: str) -> SteppingError:
    """Make the error of a strategy whose ranks cannot follow along without a batch of their own.

    Args:
        engine: Its name for users.

    Returns:
        The error, to be raised by `join`.
    """
    return SteppingError(
        f"join_uneven_inputs was called under {engine}",
        "Its ranks exchange parameters in every forward, so a rank without a batch cannot follow along",
        "Keep even_batches=True: it fills up the last batches, and gather_for_metrics drops the added samples",
    )


def _state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model, with the values of weights that are offloaded."""
    if not _is_offloaded(model):
        return model.state_dict()
    from paceline.placement import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(model)


def _is_offloaded(model: nn.Module) -> bool:
    """Whether hooks keep weights of a model in host memory or on disk."""
    return bool(offloaded_modules(model))


def offloaded_modules(model: nn.Module) -> list[nn.Module]:
    """Find the modules whose weights hooks keep in host memory or on disk.

    Args:
        model: A model with or without hooks.

    Returns:
        Those modules; usually none.
    """
    hooked = [module for module in model.modules() if hasattr(module, "_hf_hook")]
    if not hooked:  # as in nearly every run: placement need not be imported
        return []
    from paceline.placement import has_offloaded_params

    return [module for module in hooked if has_offloaded_params(module)]


def _devices_of_map(model: nn.Module) -> list[object]:
    """The devices over which a device map has spread a model, or the model inside a wrapper."""
    maps = [getattr(module, "hf_device_map", None) for module in model.modules()]
    return list(dict.fromkeys(device for each in maps if isinstance(each, dict) for device in each.values()))
