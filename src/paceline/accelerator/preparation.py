"""The part of the facade that makes models, optimizers, loaders and schedulers fit the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from paceline.accelerator.unprepared import check_model_is_prepared
from paceline.data import PreparedDataLoader, looks_like_batches, prepare_loader, skip_first_batches
from paceline.errors import ForeignOptimizerError, PrepareError, UnassignedParametersError, named
from paceline.stepping import AcceleratedOptimizer, AcceleratedScheduler, is_scheduler, unassigned
from paceline.strategies.placeholders import DummyScheduler

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from paceline.accelerator.assembly import RunComponents
    from paceline.accelerator.recording import ParityRecorder, Recorder
    from paceline.accelerator.unprepared import FirstSteps
    from paceline.config import DataLoaderConfiguration
    from paceline.data import ActiveLoaders
    from paceline.precision import LossScaler
    from paceline.stepping import ScheduleLengths, Window
    from paceline.strategies import RunContext, Strategy
    from paceline.training_state.manager import Checkpointing

__all__ = ["Preparing"]

T = TypeVar("T")


class Preparing:
    """What was prepared, the strategy that it is prepared for, and when that is decided."""

    device_placement: bool
    dataloader_config: DataLoaderConfiguration
    step_scheduler_with_optimizer: bool
    scaler: LossScaler | None
    _components: RunComponents
    _loaders: ActiveLoaders
    _window: Window
    _checkpointing: Checkpointing
    _first_steps: FirstSteps
    _lengths: ScheduleLengths
    _recorder: Recorder | ParityRecorder | None
    _own_strategy: object
    _strategy: Strategy | None
    _reason: str
    _models: list[nn.Module]
    _optimizers: list[AcceleratedOptimizer]
    _schedulers: list[AcceleratedScheduler]
    _dataloaders: list[PreparedDataLoader]

    @property
    def strategy(self) -> Strategy:
        """The strategy in force; under `auto` it is decided when the first model is prepared."""
        if self._strategy is None:
            raise PrepareError(
                "The strategy was asked for before a model was prepared",
                "strategy='auto' looks at the model's size to decide",
                "Call accelerator.prepare(model, ...) first, or name a strategy",
            )
        return self._strategy

    def prepare(self, *args: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """Make models, optimizers, loaders and schedulers fit the run.

        They come back in the order given; one alone comes back by itself. What is none of them, or was prepared
        before, comes back as it is; on several ranks an iterable of batches that is no `DataLoader` is one of them.
        An optimizer may be made before or after its model is prepared.
        Collective: every rank must call it.

        Args:
            args: In any order.
            device_placement: One flag an argument, to override `device_placement` of the constructor.

        Raises:
            PrepareError: Something cannot be trained, sharded or stepped.
            DataError: A loader cannot be shared out.
        """
        flags = list(device_placement) if device_placement is not None else [None] * len(args)
        if len(flags) != len(args):
            raise PrepareError(
                f"device_placement has {len(flags)} entries for {len(args)} arguments",
                "Each entry belongs to one argument",
                "Give one flag (or None) for each argument",
            )
        place = {id(arg): flag for arg, flag in zip(args, flags, strict=True)}
        done: dict[int, Any] = {}
        for loader in _unique(args, DataLoader):
            done[id(loader)] = self.prepare_data_loader(loader, place[id(loader)])
        models = [m for m in _unique(args, nn.Module) if not self._knows_model(m)]
        optimizers = [o for o in _unique(args, Optimizer) if not self._knows(o, self._optimizers)]
        done |= self._prepare_trained(models, optimizers, place, _unique(args, DummyScheduler))
        for other in args:
            if id(other) in done or isinstance(other, (nn.Module, Optimizer)):
                continue
            if is_scheduler(other) or isinstance(other, DummyScheduler):
                done[id(other)] = self.prepare_scheduler(other)
            elif self._components.group.size > 1 and looks_like_batches(other):
                # As it is, every rank would go through all of it.
                done[id(other)] = self.prepare_data_loader(other, place[id(other)])
        result = [done.get(id(arg), arg) for arg in args]
        return result[0] if len(result) == 1 else tuple(result)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Prepare one model; with `evaluation_mode` it is only placed, and no gradients are exchanged for it."""
        if self._knows_model(model):
            return model
        place = self.device_placement if device_placement is None else device_placement
        if evaluation_mode:
            return self._decided([model], []).prepare_evaluation(model, place=place)
        prepared: nn.Module = self._prepare_trained([model], [], {id(model): place})[id(model)]
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """Prepare one optimizer, before or after the model whose parameters it holds."""
        if isinstance(optimizer, AcceleratedOptimizer) and self._knows(optimizer, self._optimizers):
            return optimizer
        prepared: AcceleratedOptimizer = self._prepare_trained([], [optimizer], {})[id(optimizer)]
        return prepared

    def prepare_data_loader(
        self, data_loader: Any, device_placement: bool | None = None, *, saved: bool = True
    ) -> PreparedDataLoader:
        """Make a loader yield this rank's share, on the device ahead of need.

        Args:
            data_loader: Any `DataLoader`; another iterable of batches is read as it is, by one rank, or as
                `dispatch_batches` or `streams_are_sharded` say.
            device_placement: Overrides the constructor's.
            saved: Whether its position belongs to the training state; not for loaders that always begin at their
                first sample, of which there may be any number.
        """
        place = self.device_placement if device_placement is None else device_placement
        recording = self._components.resolved.recording
        prepared = prepare_loader(
            data_loader,
            group=self._components.group,
            device=self._components.context.device if place else None,
            config=self.dataloader_config,
            active=self._loaders,
            num_merged_ranks=1 if recording is None else recording.plays,
        )
        if saved and prepared not in self._dataloaders:
            self._dataloaders.append(prepared)
            self._lengths.add_loader(data_loader, prepared)
        return prepared

    def skip_first_batches(self, dataloader: DataLoader[Any], num_batches: int = 0) -> DataLoader[Any]:
        """Return a view of a loader whose first pass begins `num_batches` batches later; see the function.

        Not needed after `load_state`, which lets prepared loaders go on by themselves, and harmless there.
        """
        return skip_first_batches(dataloader, num_batches)

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """Make a scheduler move once for each step that its optimizer takes."""
        if isinstance(scheduler, AcceleratedScheduler):
            if self._knows(scheduler, self._schedulers):
                return scheduler
            # It was forgotten by free_memory, or belongs to another Accelerator.
            scheduler = scheduler.scheduler
        if self._strategy is not None:
            scheduler = self._strategy.resolve_placeholder_scheduler(scheduler)
        inner = getattr(scheduler, "optimizer", None)
        inner = inner.optimizer if isinstance(inner, AcceleratedOptimizer) else inner
        if self._strategy is not None and isinstance(inner, Optimizer):
            inner = self._strategy.resolve_placeholder_optimizer(inner)
        own = [o for o in self._optimizers if inner is o.optimizer]
        prepared = AcceleratedScheduler(
            scheduler,
            window=self._window,
            optimizers=own or self._optimizers,
            step_with_optimizer=self.step_scheduler_with_optimizer,
        )
        self._schedulers.append(prepared)
        self._lengths.add_scheduler(prepared)
        return prepared

    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module:
        """The user's own module behind a prepared one; under FSDP2 that module is the sharded one.

        Args:
            model: Prepared or not.
            keep_fp32_wrapper: Accepted: `forward` of a prepared model is the user's own in any case.
            keep_torch_compile: False also takes off what `torch.compile(model)` has put around the module.
        """
        inner = self._strategy.unwrap(model) if self._strategy is not None else model
        if keep_torch_compile:
            return inner
        original: nn.Module = getattr(inner, "_orig_mod", inner)
        return original

    def init_module(self) -> AbstractContextManager[Any]:
        """Build big models inside: under ZeRO stage 3 each parameter is sharded as soon as it is made.

        Elsewhere it changes nothing; FSDP2 takes models built under `torch.device("meta")`.
        """
        return self.strategy.init_module()

    def gather_parameters(
        self, parameters: nn.Module | nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = None
    ) -> AbstractContextManager[Any]:
        """Hold sharded parameters whole inside, for reading or changing them.

        Collective: every rank must call it.

        Args:
            parameters: Of a prepared model, or the whole model.
            modifier_rank: Whose changes all ranks take over; None if nothing is changed.

        Raises:
            PrepareError: The strategy cannot.
        """
        if isinstance(parameters, nn.Parameter):
            parameters = [parameters]
        listed = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        return self.strategy.gather_parameters(list(listed), modifier_rank)

    def _prepare_trained(
        self,
        models: list[nn.Module],
        optimizers: list[Optimizer],
        place: dict[int, bool | None],
        schedules: Sequence[DummyScheduler] = (),
    ) -> dict[int, Any]:
        if not models and not optimizers:
            return {}
        strategy = self._decided(models, optimizers) if models else self._strategy
        wrappers = [self._wrap_optimizer(optimizer) for optimizer in optimizers]
        done: dict[int, Any] = {id(o): w for o, w in zip(optimizers, wrappers, strict=True)}
        if strategy is not None:
            flags = [place.get(id(model)) for model in models]
            where = [self.device_placement if flag is None else flag for flag in flags]
            # Optimizers prepared before their model still hold what it was made of.
            known = [wrapper.optimizer for wrapper in self._optimizers]
            strategy.micro_batch = self._micro_batch()
            strategy.schedules = schedules
            prepared = strategy.prepare(models, known, place=where)
            self._models.extend(prepared)
            for wrapper in self._optimizers:
                wrapper.optimizer = strategy.resolve_placeholder_optimizer(wrapper.optimizer)
            done.update((id(m), p) for m, p in zip(models, prepared, strict=True))
            self._check_dtypes(strategy, self._optimizers)
        if models:
            self._check_foreign(optimizers)
        return done

    def _micro_batch(self) -> int | None:
        """Samples in a rank's smallest batch, as far as the prepared loaders say."""
        sizes = [loader.batch_size for loader in self._dataloaders]
        return min((size for size in sizes if size is not None), default=None)

    def _wrap_optimizer(self, optimizer: Optimizer) -> AcceleratedOptimizer:
        before_step = self._checkpointing.before_step
        if self._recorder is not None:
            before_step = self._recorder.watching(before_step, len(self._optimizers))
        # One that is wrapped already was forgotten by free_memory, or belongs to another Accelerator.
        before = optimizer if isinstance(optimizer, AcceleratedOptimizer) else None
        wrapper = AcceleratedOptimizer(
            optimizer if before is None else before.optimizer,
            window=self._window,
            scaler=self.scaler,
            check_step=self._check_step,
            before_step=before_step,
            add_group=self._add_group,
        )
        if before is not None:
            wrapper.num_steps = before.num_steps
        self._optimizers.append(wrapper)
        return wrapper

    def _add_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        if self._strategy is None:
            optimizer.add_param_group(group)
        else:
            self._strategy.add_group(optimizer, group)

    def _decide_early(self) -> tuple[Strategy | None, str]:
        """The strategy and why, where that does not depend on the model."""
        if self._own_strategy is not None:
            return _build_strategy(self._own_strategy, self._components.context), "asked for by the script"
        if self._components.context.config.strategy == "auto" and self._components.group.size > 1:
            return None, ""
        return _decide(self._components, (), ())

    def _decided(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> Strategy:
        if self._strategy is None:
            known = [*optimizers, *(wrapper.optimizer for wrapper in self._optimizers)]
            self._strategy, self._reason = _decide(self._components, models, known)
        return self._strategy

    def _knows_model(self, model: object) -> bool:
        return self._knows(model, self._models)

    @staticmethod
    def _knows(thing: object, prepared: Sequence[object]) -> bool:
        """Whether something was prepared here and not forgotten since."""
        return any(thing is known for known in prepared)

    def _check_foreign(self, optimizers: Iterable[Optimizer]) -> None:
        known = {id(p) for model in self._models for p in model.parameters()}
        for optimizer in optimizers:
            held = self.strategy.parameters_of(optimizer)
            foreign = [tuple(p.shape) for p in held if id(p) not in known]
            if foreign and self._models:
                raise ForeignOptimizerError(foreign, len(held))

    def _may_have_gradients(self, optimizer: AcceleratedOptimizer) -> bool:
        held = self.strategy.parameters_of(optimizer.optimizer)
        return self.strategy.keeps_gradients or any(p.grad is not None for p in held)

    def _check_dtypes(self, strategy: Strategy, optimizers: Iterable[AcceleratedOptimizer]) -> None:
        """Refuse to step fp16 weights where the loss is scaled: their gradients cannot be unscaled without loss."""
        if self.scaler is None:
            return
        names = {id(p): n for model in self._models for n, p in strategy.named_parameters(model)}
        for optimizer in optimizers:
            held = strategy.parameters_of(optimizer.optimizer)
            halves = [p for p in held if p.dtype == torch.float16 and p.requires_grad]
            if halves:
                found = named([names.get(id(p), f"one of shape {tuple(p.shape)}") for p in halves])
                raise PrepareError(
                    f"{len(halves)} of the optimizer's {len(held)} parameters are fp16 ({found}), under "
                    "mixed_precision='fp16'",
                    "Mixed precision computes in fp16 and keeps the weights in fp32: fp16 gradients cannot be "
                    "unscaled, and small steps would be rounded away",
                    "Prepare model.float(), or load it with dtype=torch.float32 (torch_dtype in older transformers); "
                    "weights that are not trained may stay fp16 with requires_grad_(False)",
                )

    def _check_step(self, optimizer: AcceleratedOptimizer, number: int) -> Strategy:
        """Look for what would go wrong in silence, before the first steps of each optimizer."""
        if number > 1:
            self._first_steps.compare_loaders()
            self._first_steps.stop()
            return self.strategy
        if self._window.lacks_backward and self._may_have_gradients(optimizer):
            self._window.refuse_foreign_gradients()
        self.strategy.check_first_backward()
        if not self._models:
            check_model_is_prepared(self._optimizers, self._components.group)
        self._first_steps.note_loaders()
        self._check_foreign(wrapper.optimizer for wrapper in self._optimizers)
        missing = unassigned(self._models, [w.optimizer for w in self._optimizers], self.strategy)
        if missing:
            raise UnassignedParametersError(missing)
        return self.strategy


def _unique(things: Iterable[object], kind: type[T]) -> list[T]:
    """Each thing of a kind once, in order."""
    return list({id(thing): thing for thing in things if isinstance(thing, kind)}.values())


def _decide(
    components: RunComponents, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]
) -> tuple[Strategy, str]:
    # It stands on the schema, which a mere import must not wait for.
    from paceline.accelerator.assembly import decide_strategy

    return decide_strategy(components, models, optimizers)


def _build_strategy(strategy: object, context: RunContext) -> Strategy:
    from paceline.strategies import Strategy

    made = strategy(context) if callable(strategy) else strategy
    if isinstance(made, Strategy):
        return made
    raise PrepareError(
        f"strategy={strategy!r}",
        "A strategy is a name, or a class derived from paceline.strategies.Strategy",
        "Choose auto, single, ddp, fsdp or deepspeed",
    )
