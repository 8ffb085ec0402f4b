"""Makes models, optimizers, loaders and schedulers fit the run, and checks what was prepared at the first step."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from paceline.accelerator.stepping import (
    AcceleratedOptimizer,
    AcceleratedScheduler,
    ScheduleLengthCheck,
    is_scheduler,
    planned_steps,
    unassigned_parameters,
)
from paceline.accelerator.unprepared import FirstSteps, check_model_is_prepared
from paceline.environment.logging import get_logger
from paceline.errors import ForeignOptimizerError, PrepareError, UnassignedParametersError, counted, named
from paceline.strategies.base import offloaded_modules
from paceline.strategies.placeholders import DummyScheduler, placeholder_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from paceline.accelerator.assembly import RunComponents
    from paceline.accelerator.oom_report import MemorySnapshot
    from paceline.accelerator.prepared import Prepared
    from paceline.accelerator.recording import RunRecorder
    from paceline.accelerator.stepping import LossScaler, Window
    from paceline.accelerator.strategy_selection import StrategySelector
    from paceline.config import DataLoaderConfiguration
    from paceline.data import ActiveLoaders, LoaderFamily
    from paceline.strategies import Strategy

__all__ = ["Preparer"]

_LOG = get_logger(__name__)

T = TypeVar("T")


class Preparer:
    """Prepares what a script trains with.

    Prepared optimizers keep it alive, prepared loaders do not: they must not keep models alive in turn.

    Args:
        components: The run.
        prepared: Gets what is prepared.
        selector: Knows the strategy.
        window: The accumulation window.
        loaders: Knows which prepared loaders are being iterated.
        family: Prepares loaders.
        scaler: The loss scaler of fp16.
        before_step: Called before each optimizer step.
        recorder: Records steps where a check needs them.
        device_placement: See the attribute.
        dataloader_config: See the attribute.
        step_scheduler_with_optimizer: See the attribute.

    Attributes:
        device_placement: Whether models and batches are moved to the device.
        dataloader_config: How loaders are split over ranks.
        step_scheduler_with_optimizer: Whether schedulers step once for each optimizer step; else on every call.
    """

    def __init__(
        self,
        components: RunComponents,
        prepared: Prepared,
        selector: StrategySelector,
        window: Window,
        loaders: ActiveLoaders,
        family: LoaderFamily,
        *,
        scaler: LossScaler | None,
        before_step: Callable[[], None],
        recorder: RunRecorder | None,
        device_placement: bool,
        dataloader_config: DataLoaderConfiguration,
        step_scheduler_with_optimizer: bool,
    ) -> None:
        self.device_placement = device_placement
        self.dataloader_config = dataloader_config
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self._context = components.context
        self._prepared = prepared
        self._selector = selector
        self._window = window
        self._family = family
        self._policies = components.policies
        self._scaler = scaler
        self._before_step = before_step
        self._recorder = recorder
        recording = components.resolved.recording
        self._num_merged_ranks = 1 if recording is None else recording.plays
        if self._num_merged_ranks > 1 and not dataloader_config.split_batches:
            # Few runs are recorded.
            from paceline.accelerator.recording.lengths import merge_lengths

            merge_lengths(self._num_merged_ranks)
        self._lengths = ScheduleLengthCheck(self._context.group.size, window)
        # Not `self`: see above.
        loaders.micro_batches = lambda: window.num_steps
        loaders.on_iteration_start = self._lengths.begin_epoch
        loaders.on_iteration_end = self._lengths.end_epoch
        weakref.finalize(self, _log_pending, self._lengths.pending)
        self._first_steps = FirstSteps(self._context.group, window, family, prepared.models, scaler, selector)

    def prepare(self, args: Sequence[Any], device_placement: Sequence[bool | None] | None) -> Any:
        """See `Accelerator.prepare`."""
        placement = _placement_flags(args, device_placement)
        with self._prepared.undone_on_error():
            done = self._prepare_all(args, placement)
        result = [done.get(id(arg), arg) for arg in args]
        return result[0] if len(result) == 1 else tuple(result)

    def _prepare_all(self, args: Sequence[Any], placement: dict[int, bool | None]) -> dict[int, Any]:
        """Prepare each argument; return what to use instead of it, by `id`."""
        done: dict[int, Any] = {}
        for loader in _unique(args, DataLoader):
            done[id(loader)] = self.prepare_data_loader(loader, placement[id(loader)])
        models = [model for model in _unique(args, nn.Module) if model not in self._prepared]
        optimizers = [optimizer for optimizer in _unique(args, Optimizer) if optimizer not in self._prepared]
        _refuse_offloaded_weights(models, optimizers)
        done |= self._prepare_trained(models, optimizers, placement, _unique(args, DummyScheduler))
        for other in args:
            if id(other) not in done and not isinstance(other, (nn.Module, Optimizer)):
                done[id(other)] = self._prepare_other(other, placement[id(other)])
        return done

    def _prepare_other(self, other: Any, place: bool | None) -> Any:
        """Prepare a scheduler or an iterable of batches; anything else is returned unchanged."""
        if is_scheduler(other) or isinstance(other, DummyScheduler):
            return self.prepare_scheduler(other)
        from paceline.data import looks_like_batches

        # Unchanged, every rank would iterate over all batches, and no checkpoint would contain their position.
        if looks_like_batches(other):
            return self.prepare_data_loader(other, place)
        return other

    def prepare_model(self, model: nn.Module, device_placement: bool | None, *, evaluation_mode: bool) -> nn.Module:
        """See `Accelerator.prepare_model`."""
        if model in self._prepared:
            return model
        place = self._placement(device_placement)
        if evaluation_mode:
            _trust_own_positions([model])
            return self._selector.select([model]).prepare_evaluation(model, place=place)
        with self._prepared.undone_on_error():
            prepared: nn.Module = self._prepare_trained([model], [], {id(model): place})[id(model)]
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer) -> AcceleratedOptimizer:
        """See `Accelerator.prepare_optimizer`."""
        if isinstance(optimizer, AcceleratedOptimizer) and optimizer in self._prepared:
            return optimizer
        with self._prepared.undone_on_error():
            prepared: AcceleratedOptimizer = self._prepare_trained([], [optimizer], {})[id(optimizer)]
        return prepared

    def prepare_data_loader(
        self, data_loader: Any, device_placement: bool | None, *, saved: bool = True, ordered: bool = False
    ) -> Any:
        """See `Accelerator.prepare_data_loader`."""
        from paceline.data import PreparedDataLoader

        place = self._placement(device_placement)
        prepared = self._family.prepare(
            data_loader,
            group=self._context.group,
            device=self._context.device if place else None,
            config=self._loader_config(data_loader, ordered=ordered),
            num_merged_ranks=self._num_merged_ranks,
        )
        if not isinstance(prepared, PreparedDataLoader):
            if not any(prepared is known for known in self._prepared.foreign_loaders):
                self._prepared.foreign_loaders.append(prepared)
        elif saved and prepared not in self._prepared.loaders:
            self._prepared.loaders.append(prepared)
            self._lengths.add_loader(data_loader, prepared)
        return prepared

    def _loader_config(self, data_loader: Any, *, ordered: bool) -> DataLoaderConfiguration:
        """The settings of one loader: ranks that share out a stream's items would mix up their order."""
        config, dataset = self.dataloader_config, getattr(data_loader, "dataset", None)
        is_split = config.streams_are_sharded or getattr(dataset, "_distributed", None) is not None
        if not ordered or is_split or config.dispatch_batches is not None or not isinstance(dataset, IterableDataset):
            return config
        return config.model_copy(update={"dispatch_batches": True})

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """See `Accelerator.prepare_scheduler`."""
        if isinstance(scheduler, AcceleratedScheduler):
            if scheduler in self._prepared:
                return scheduler
            # It was forgotten by free_memory, or belongs to another Accelerator.
            scheduler = scheduler.scheduler
        strategy = self._selector.maybe_current
        if strategy is not None:
            scheduler = strategy.resolve_placeholder_scheduler(scheduler)
            if isinstance(scheduler, DummyScheduler):
                raise placeholder_error("DummyScheduler", "scheduler", strategy.name)
        inner = getattr(scheduler, "optimizer", None)
        inner = inner.optimizer if isinstance(inner, AcceleratedOptimizer) else inner
        if strategy is not None and isinstance(inner, Optimizer):
            inner = strategy.resolve_placeholder_optimizer(inner)
        own = [wrapper for wrapper in self._prepared.optimizers if inner is wrapper.optimizer]
        prepared = self._policies.scheduler(
            scheduler,
            window=self._window,
            optimizers=own or self._prepared.optimizers,
            step_with_optimizer=self.step_scheduler_with_optimizer,
        )
        self._prepared.attributes.note_functions(f"scheduler_{len(self._prepared.schedulers)}", prepared.scheduler)
        self._prepared.schedulers.append(prepared)
        self._lengths.add_scheduler(prepared)
        if self._recorder is not None:
            self._recorder.note_schedule(type(prepared.scheduler).__name__, planned_steps(prepared.scheduler))
        return prepared

    def unwrap_model(self, model: nn.Module, *, keep_torch_compile: bool) -> nn.Module:
        """See `Accelerator.unwrap_model`."""
        strategy = self._selector.maybe_current
        inner = model if strategy is None else strategy.unwrap(model)
        if keep_torch_compile:
            return inner
        original: nn.Module = getattr(inner, "_orig_mod", inner)
        return original

    def gather_parameters(
        self, parameters: nn.Module | nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None
    ) -> AbstractContextManager[Any]:
        """See `Accelerator.gather_parameters`."""
        if isinstance(parameters, nn.Parameter):
            parameters = [parameters]
        listed = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        return self._selector.current.gather_parameters(list(listed), modifier_rank)

    def memory_snapshot(self) -> MemorySnapshot:
        """What fills the memory, for the report of a run that has none left."""
        from paceline.accelerator.oom_report import MemorySnapshot

        return MemorySnapshot(
            models=self._prepared.models,
            optimizers=[wrapper.optimizer for wrapper in self._prepared.optimizers],
            micro_batch=self._prepared.micro_batch,
            accumulation=self._window.num_steps,
        )

    def forget(self) -> None:
        """Let go of everything prepared, and log a warning that waits for the end of the training."""
        self._prepared.forget()
        _log_pending(self._lengths.pending)

    # Models and optimizers

    def _placement(self, flag: bool | None) -> bool:
        return self.device_placement if flag is None else flag

    def _prepare_trained(
        self,
        models: list[nn.Module],
        optimizers: list[Optimizer],
        place: dict[int, bool | None],
        schedules: Sequence[DummyScheduler] = (),
    ) -> dict[int, Any]:
        """Prepare models and optimizers; return what to use instead of each, by `id`."""
        if not models and not optimizers:
            return {}
        strategy = self._selector.select(models, optimizers) if models else self._selector.maybe_current
        done: dict[int, Any] = {id(optimizer): self._wrap_optimizer(optimizer) for optimizer in optimizers}
        if strategy is not None:
            strategy.attention.use()
            _trust_own_positions(models)
            where = [self._placement(place.get(id(model))) for model in models]
            # Optimizers prepared before their model still have its original parameters.
            known = [wrapper.optimizer for wrapper in self._prepared.optimizers]
            prepared = strategy.prepare_training(
                models, known, place=where, micro_batch=self._prepared.micro_batch, schedules=schedules
            )
            self._prepared.models.extend(prepared)
            for wrapper in self._prepared.optimizers:
                wrapper.optimizer = strategy.resolve_placeholder_optimizer(wrapper.optimizer)
            done.update((id(model), result) for model, result in zip(models, prepared, strict=True))
            self._check_dtypes(strategy)
        if models:
            self._check_foreign(optimizers)
        self._prepared.note_attributes(strategy)
        return done

    def _wrap_optimizer(self, optimizer: Optimizer) -> AcceleratedOptimizer:
        before_step = self._before_step
        if self._recorder is not None:
            before_step = self._recorder.watching(before_step, len(self._prepared.optimizers))
        # A wrapped one was forgotten by free_memory, or belongs to another Accelerator.
        former = optimizer if isinstance(optimizer, AcceleratedOptimizer) else None
        wrapper = self._policies.optimizer(
            optimizer if former is None else former.optimizer,
            window=self._window,
            scaler=self._scaler,
            check_step=self._check_step,
            before_step=before_step,
            add_group=self._add_group,
        )
        if former is not None:
            wrapper.num_steps = former.num_steps
        self._prepared.optimizers.append(wrapper)
        return wrapper

    def _add_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        strategy = self._selector.maybe_current
        if strategy is None:
            optimizer.add_param_group(group)
        else:
            strategy.add_group(optimizer, group)

    # Checks

    def _check_foreign(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse optimizers with parameters of no prepared model."""
        if self._policies.leniency.foreign_parameters:
            return
        known = {id(p) for model in self._prepared.models for p in model.parameters()}
        for optimizer in optimizers:
            parameters = self._selector.current.parameters_of(optimizer)
            foreign = [tuple(p.shape) for p in parameters if id(p) not in known]
            if foreign and self._prepared.models:
                raise ForeignOptimizerError(foreign, len(parameters))

    def _may_have_gradients(self, optimizer: AcceleratedOptimizer) -> bool:
        strategy = self._selector.current
        parameters = strategy.parameters_of(optimizer.optimizer)
        return strategy.keeps_gradients or any(p.grad is not None for p in parameters)

    def _check_dtypes(self, strategy: Strategy) -> None:
        """Refuse to step fp16 weights where the loss is scaled: their gradients cannot be unscaled without loss."""
        if self._scaler is None:
            return
        names = {id(p): name for model in self._prepared.models for name, p in strategy.named_parameters(model)}
        for wrapper in self._prepared.optimizers:
            parameters = strategy.parameters_of(wrapper.optimizer)
            halves = [p for p in parameters if p.dtype == torch.float16 and p.requires_grad]
            if halves:
                shown = named([names.get(id(p), f"one of shape {tuple(p.shape)}") for p in halves])
                raise PrepareError(
                    f"{len(halves)} of the optimizer's {len(parameters)} parameters are fp16 ({shown}), under "
                    "mixed_precision='fp16'",
                    "Mixed precision computes in fp16 and keeps the weights in fp32: fp16 gradients cannot be "
                    "unscaled, and small steps would be rounded away",
                    "Prepare model.float(), or load it with dtype=torch.float32 (torch_dtype in older transformers); "
                    "weights that are not trained may stay fp16 with requires_grad_(False)",
                )

    def _check_step(self, optimizer: AcceleratedOptimizer, number: int) -> Strategy:
        """Check before an optimizer's first steps what would otherwise go wrong silently; return the strategy."""
        strategy = self._selector.current
        if number > 1:
            self._first_steps.compare_loaders()
            self._first_steps.stop()
            return strategy
        if self._window.lacks_backward and self._may_have_gradients(optimizer):
            self._window.refuse_foreign_gradients()
        strategy.check_first_backward()
        optimizers = [wrapper.optimizer for wrapper in self._prepared.optimizers]
        leniency = self._policies.leniency
        if not self._prepared.models and not leniency.foreign_parameters:
            check_model_is_prepared(self._prepared.optimizers, self._context.group)
        self._first_steps.note_loaders()
        self._check_foreign(optimizers)
        if leniency.unassigned_parameters:
            return strategy
        missing = unassigned_parameters(self._prepared.models, optimizers, strategy)
        if missing:
            raise UnassignedParametersError(missing)
        return strategy


def _trust_own_positions(models: Iterable[nn.Module]) -> None:
    """Spare models of transformers a wait in each forward."""
    # Needed with the first model.
    from paceline.strategies.own_positions import trust_own_positions

    for model in models:
        trust_own_positions(model)


def _log_pending(warnings: list[str]) -> None:
    """Log and remove warnings that waited for the end of the training."""
    while warnings:
        _LOG.warning("%s", warnings.pop())


def _refuse_offloaded_weights(models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers of weights that are offloaded: their gradients go nowhere, and nothing would be trained."""
    owners = dict(item for model in models for item in _trained_offloaded_weights(model))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    refused = [parameter for group in groups for parameter in group["params"] if id(parameter) in owners]
    if refused:
        kind = type(owners[id(refused[0])]).__name__
        raise PrepareError(
            f"An optimizer has {counted(len(refused), 'weight')} of {kind} that hooks keep in host memory or on disk",
            "They have values only while their module runs, so that no step can change them",
            "Freeze them (requires_grad_(False)) and give the optimizer the others, or shard the whole model (FSDP or "
            "DeepSpeed)",
        )


def _trained_offloaded_weights(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Yield the `id` of each offloaded weight that requires a gradient, with its model."""
    for module in offloaded_modules(model):
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.is_meta:
                yield id(parameter), model


def _placement_flags(args: Sequence[Any], device_placement: Sequence[bool | None] | None) -> dict[int, bool | None]:
    """Whether to move each argument, by `id`; None takes the default."""
    flags = [None] * len(args) if device_placement is None else list(device_placement)
    if len(flags) != len(args):
        raise PrepareError(
            f"device_placement has {len(flags)} entries for {len(args)} arguments",
            "Each entry belongs to one argument",
            "Give one flag (or None) for each argument",
        )
    return {id(arg): flag for arg, flag in zip(args, flags, strict=True)}


def _unique(things: Iterable[object], kind: type[T]) -> list[T]:
    """Each thing of a kind once, in order."""
    return list({id(thing): thing for thing in things if isinstance(thing, kind)}.values())
