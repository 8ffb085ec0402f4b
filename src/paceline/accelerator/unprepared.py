"""Finds what a script trains with but never passed to `prepare`, at the first optimizer steps.

An optimizer, a loader or a model that was not prepared works as in plain PyTorch, on each rank separately, and unseen
by paceline. So a hook on all optimizers of the process checks the first steps; it is removed once the prepared ones
have stepped twice.
"""

from __future__ import annotations

import gc
import math
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, Subset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from paceline.accelerator.stepping import AcceleratedOptimizer
from paceline.collectives.watchdog.locations import here
from paceline.environment.logging import get_logger
from paceline.errors import PacelineError, PrepareError, SteppingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import FrameType

    from torch import nn
    from torch.optim import Optimizer

    from paceline.accelerator.stepping import LossScaler, Window
    from paceline.accelerator.strategy_selection import StrategySelector
    from paceline.collectives import Group
    from paceline.data import LoaderFamily
    from paceline.strategies import Strategy

__all__ = ["FirstSteps"]

_LOG = get_logger(__name__)
_PACELINE = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)


class FirstSteps:
    """Checks the first step of every optimizer in the process.

    Args:
        group: All ranks.
        window: The accumulation window.
        loaders: Knows which prepared loaders are being iterated.
        models: The prepared models; grows.
        scaler: The loss scaler of fp16.
        selector: Knows the strategy.
    """

    def __init__(
        self,
        group: Group,
        window: Window,
        loaders: LoaderFamily,
        models: Sequence[nn.Module],
        scaler: LossScaler | None,
        selector: StrategySelector,
    ) -> None:
        self._group = group
        self._window = window
        self._loaders = loaders
        self._models = models
        self._scaler = scaler
        self._selector = selector
        self._checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # Iterators of plain loaders at the first step, and how many batches they had yielded by then.
        self._running: list[tuple[weakref.ref[Any], int]] = []
        # Warnings about optimizers that wait for their second step, which tells whether a plain loader is in use.
        self._waiting: weakref.WeakKeyDictionary[Optimizer, _Warning] = weakref.WeakKeyDictionary()
        _remove_dead_hooks()
        self._handle = register_optimizer_step_pre_hook(_Hook(self))

    def stop(self) -> None:
        """Check no further: every optimizer of the loop has stepped."""
        self._handle.remove()
        for warning in self._waiting.values():
            _LOG.warning("%s", warning.text(None, self._group.size))
        self._waiting.clear()

    # Optimizers

    def check(self, optimizer: Optimizer) -> PacelineError | str | None:
        """What is wrong with a step of an optimizer that this Accelerator has not prepared: an error or a warning."""
        if _is_called_by_paceline():
            return None
        if optimizer in self._waiting:
            return self._waiting.pop(optimizer).text(self._find_loader(), self._group.size)
        if optimizer in self._checked:
            return None
        self._checked.add(optimizer)
        if _is_inside_prepared_step():
            return None
        problem = self._find_problem(optimizer)
        if not isinstance(problem, _Warning):
            return problem
        self.note_loaders()
        if self._running:
            self._waiting[optimizer] = problem
            return None
        return problem.text(None, self._group.size)

    def _find_problem(self, optimizer: Optimizer) -> PacelineError | _Warning | None:
        name = f"{type(optimizer).__name__}, which was never passed to prepare,"
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        strategy = self._selector.maybe_current
        known = set() if strategy is None else {id(p) for p in strategy.parameters()}
        trains_prepared = any(id(p) in known for p in parameters)
        error = self._find_error(name, optimizer, parameters, trains_prepared=trains_prepared)
        return error or self._find_warning(name, optimizer, parameters, trains_prepared=trains_prepared)

    def _find_error(
        self, name: str, optimizer: Optimizer, parameters: Sequence[Any], *, trains_prepared: bool
    ) -> PacelineError | None:
        strategy = self._selector.maybe_current
        if strategy is not None:
            reason = _why_nothing_is_trained(parameters, strategy, trains_prepared=trains_prepared)
            if reason:
                return PrepareError(f"{name} was stepped", f"{reason}, so it trains nothing", self._remedy(optimizer))
        if trains_prepared or (not self._models and self._window.has_gradients):
            return self._find_mistimed(name, optimizer)
        return None

    def _find_mistimed(self, name: str, optimizer: Optimizer) -> PacelineError | None:
        window, scaler = self._window, self._scaler
        if not window.sync_gradients:
            return SteppingError(
                f"{name} was stepped in the middle of a window of {window.num_steps} micro-batches",
                "Only a prepared optimizer waits until the window's gradients are complete",
                self._remedy(optimizer),
            )
        if scaler is None or not window.has_gradients or scaler.is_unscaled(optimizer):
            return None
        return SteppingError(
            f"{name} was stepped under mixed_precision='fp16'",
            f"Its gradients are multiplied by the loss scale, {scaler.get_scale():g} now",
            self._remedy(optimizer),
        )

    def _find_warning(
        self, name: str, optimizer: Optimizer, parameters: Sequence[Any], *, trains_prepared: bool
    ) -> _Warning | None:
        schedule = _schedule_of(optimizer)
        if trains_prepared:
            seen = (
                f"{name} was stepped at {_location()}: checkpoints do not contain its state, and it ignores windows "
                "and skipped steps"
            )
            return _Warning(seen, schedule, names_loader=False)
        if self._group.size == 1 or not self._trains_separately(parameters):
            return None
        seen = (
            f"{name} was stepped at {_location()}, and its model was not prepared either: each of the "
            f"{self._group.size} ranks trains a copy of its own"
        )
        return _Warning(seen, schedule, names_loader=self._loaders.current is None)

    def _remedy(self, optimizer: Optimizer) -> str:
        """The line to write, with a loader and a schedule that were left out too."""
        self.note_loaders()
        has_loader = any(yielded for _, yielded in self._running)
        return _line_to_write(has_loader=has_loader, has_schedule=bool(_schedule_of(optimizer)))

    def _trains_separately(self, parameters: Sequence[Any]) -> bool:
        """Whether nothing exchanges these parameters' gradients, though the script trains with this Accelerator."""
        if self._models and not self._window.has_gradients:
            # A small model beside those that are prepared.
            return False
        return not is_distributed_by_script(parameters)

    # Loaders

    def note_loaders(self) -> None:
        """Note at the first step which plain loaders are iterated, if several ranks train without a prepared one."""
        if self._group.size > 1 and self._loaders.current is None:
            iterators = _plain_iterators(self._group.size)
            self._running = [(weakref.ref(iterator), iterator._num_yielded) for iterator in iterators]

    def compare_loaders(self) -> None:
        """Warn at the second step of a plain loader that has yielded since: every rank gets all of its batches."""
        loader = self._find_loader()
        if loader is None:
            return
        if self._waiting:
            _, warning = self._waiting.popitem()
            _LOG.warning("%s", warning.text(loader, self._group.size))
            return
        _LOG.warning(
            "A DataLoader over %s, which was never passed to prepare, is in use in the step at %s: each of the %d "
            "ranks iterates over all of its %d samples, unless the script has split them. Write "
            "loader = accelerator.prepare(loader)",
            type(loader).__name__, _location(), self._group.size, len(loader),
        )  # fmt: skip

    def _find_loader(self) -> Any:
        """The data set of a plain loader that has yielded since `note_loaders`; None without one."""
        running, self._running = self._running, []
        if self._loaders.current is not None:
            return None
        iterators = [(reference(), yielded) for reference, yielded in running]
        in_use = [it._dataset for it, yielded in iterators if it is not None and it._num_yielded > yielded]
        return in_use[0] if in_use else None


@dataclass(frozen=True, slots=True)
class _Warning:
    """What is said of an optimizer that was not prepared, and of all that was left out with it.

    Attributes:
        seen: The optimizer, and what is wrong.
        schedule: The class of its learning rate schedule; empty without one.
        names_loader: Whether the line to write has a loader, even if none is known to be in use.
    """

    seen: str
    schedule: str
    names_loader: bool

    def text(self, data: Any, ranks: int) -> str:
        """The warning.

        Args:
            data: The data set of a plain loader in use; None without one.
            ranks: Their number.
        """
        parts = [self.seen]
        if data is not None:
            parts.append(
                f"A DataLoader over {type(data).__name__} was not prepared either: each of the {ranks} ranks iterates "
                f"over all of its {len(data)} samples, unless the script has split them"
            )
        if self.schedule:
            parts.append(f"Nor was {self.schedule}, its schedule")
        has_loader = data is not None or self.names_loader
        parts.append(_line_to_write(has_loader=has_loader, has_schedule=bool(self.schedule)))
        return ". ".join(parts)


def _line_to_write(*, has_loader: bool, has_schedule: bool) -> str:
    names = ["model", "optimizer"]
    if has_loader:
        names.append("loader")
    if has_schedule:
        names.append("scheduler")
    return f"Write {', '.join(names)} = accelerator.prepare({', '.join(names)})"


def _schedule_of(optimizer: Optimizer) -> str:
    """The class of the schedule that changes an optimizer's learning rate; empty without one."""
    for thing in gc.get_objects():
        if issubclass(type(thing), LRScheduler) and getattr(thing, "optimizer", None) is optimizer:
            return type(thing).__name__
    return ""


class _Hook:
    """The hook that every optimizer of the process calls before a step; it keeps no Accelerator alive."""

    def __init__(self, first_steps: FirstSteps) -> None:
        self.reference = weakref.ref(first_steps)

    def __call__(self, optimizer: Optimizer, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        problem = self._check(optimizer)
        if problem is None:
            return
        # An Accelerator that the script no longer uses may only be waiting for the garbage collector.
        gc.collect()
        if self.reference() is None:
            return
        if isinstance(problem, PacelineError):
            raise problem
        _LOG.warning("%s", problem)

    def _check(self, optimizer: Optimizer) -> PacelineError | str | None:
        first_steps = self.reference()
        return None if first_steps is None else first_steps.check(optimizer)


def _remove_dead_hooks() -> None:
    """Remove hooks whose Accelerator is gone.

    Not from a finalizer: the garbage collector may run while torch iterates over its hooks.
    """
    for key, hook in list(_global_optimizer_pre_hooks.items()):
        if isinstance(hook, _Hook) and hook.reference() is None:
            del _global_optimizer_pre_hooks[key]


def _why_nothing_is_trained(parameters: Iterable[Any], strategy: Strategy, *, trains_prepared: bool) -> str:
    """Why stepping these parameters changes no prepared model; empty if it does, or if they belong to none."""
    name = type(strategy).__name__.removesuffix("Strategy")
    if any(strategy.replaced(p) for p in parameters):
        return f"{name} has replaced the parameters that it updates"
    return f"{name} keeps the gradients internally" if trains_prepared and strategy.keeps_gradients else ""


def check_model_is_prepared(optimizers: Iterable[AcceleratedOptimizer], group: Group) -> None:
    """Refuse prepared optimizers of a model that was not prepared, and whose gradients nothing exchanges.

    Raises:
        PrepareError: There is one.
    """
    parameters = [
        p for optimizer in optimizers for param_group in optimizer.param_groups for p in param_group["params"]
    ]
    if group.size > 1 and not is_distributed_by_script(parameters):
        raise PrepareError(
            "An optimizer was passed to prepare, but no model",
            f"Nothing exchanges its gradients, so each of {group.size} ranks would train a model of its own",
            _line_to_write(has_loader=False, has_schedule=False),
        )


def is_distributed_by_script(parameters: Sequence[Any]) -> bool:
    """Whether the script itself has sharded these parameters or wrapped their model in DDP."""
    if any(hasattr(p, "device_mesh") for p in parameters):
        return True
    ids = {id(p) for p in parameters}
    wrapped = [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]
    return any(id(p) in ids for model in wrapped for p in model.parameters())


def _plain_iterators(ranks: int) -> Iterable[Any]:
    """Iterators of plain loaders that yield all of a map-style data set, in one of torch's own orders.

    A `Subset` no larger than a rank's share is assumed to be this rank's part.
    """
    for thing in gc.get_objects():
        if not issubclass(type(thing), _BaseDataLoaderIter):
            continue
        sampler = thing._index_sampler
        order = sampler.sampler if type(sampler) is BatchSampler else sampler
        data = thing._dataset
        is_share = isinstance(data, Subset) and len(data) <= math.ceil(len(data.dataset) / ranks)  # type: ignore[arg-type]
        if type(order) in (RandomSampler, SequentialSampler) and not is_share:
            yield thing


def _is_called_by_paceline() -> bool:
    """Whether it is this package that steps: a prepared optimizer, or one whose memory is measured."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_PACELINE)


def _is_inside_prepared_step() -> bool:
    """Whether a prepared optimizer, of this Accelerator or another, is what steps, or steps another inside."""
    code = AcceleratedOptimizer.step.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _location() -> str:
    location = here()
    return "an unknown line" if location is None else f"{location.where} ({location.code})"
