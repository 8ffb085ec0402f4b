"""What a script trains with and never prepared, found at its first optimizer steps.

An optimizer, a loader or a model that `prepare` has not seen works as in plain PyTorch: alone. Nobody is asked before
it acts, so a hook on all optimizers of the process looks at the first steps, and is taken off once the prepared ones
have stepped twice.
"""

from __future__ import annotations

import gc
import math
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, Subset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from paceline.environment.logging import get_logger
from paceline.errors import PacelineError, PrepareError, SteppingError
from paceline.stepping import AcceleratedOptimizer
from paceline.watchdog.locations import here

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import FrameType

    from torch import nn
    from torch.optim import Optimizer

    from paceline.collectives import Group
    from paceline.data import ActiveLoaders
    from paceline.precision import LossScaler
    from paceline.stepping import Window
    from paceline.strategies import Strategy

__all__ = ["FirstSteps"]

_LOG = get_logger(__name__)
_REMEDY = "Write model, optimizer = accelerator.prepare(model, optimizer)"
_OURS = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)


class FirstSteps:
    """Judges the first steps of every optimizer in the process.

    Args:
        group: The ranks.
        window: What `accumulate` and `backward` have done.
        loaders: Which prepared loaders are in use.
        models: Those prepared, also later.
        scaler: Of fp16.
        strategy: Tells which strategy was decided, if any.
    """

    def __init__(
        self,
        group: Group,
        window: Window,
        loaders: ActiveLoaders,
        models: Sequence[nn.Module],
        scaler: LossScaler | None,
        strategy: Callable[[], Strategy | None],
    ) -> None:
        self._group = group
        self._window = window
        self._loaders = loaders
        self._models = models
        self._scaler = scaler
        self._strategy = strategy
        self._judged: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # Plain loaders in use at the first step, and how many batches they had given by then.
        self._running: list[tuple[weakref.ref[Any], int]] = []
        _forget_the_dead()
        self._handle = register_optimizer_step_pre_hook(_Hook(self))

    def stop(self) -> None:
        """Look no further: every optimizer of the loop has had its turn."""
        self._handle.remove()

    # Optimizers

    def judge(self, optimizer: Optimizer) -> PacelineError | str | None:
        """What is wrong with a step of an optimizer that this Accelerator has not prepared: an error or a warning."""
        if optimizer in self._judged or _is_called_by_us():
            return None
        self._judged.add(optimizer)
        if _is_inside_prepared_step():
            return None
        name = f"{type(optimizer).__name__}, which was never passed to prepare,"
        held = [p for group in optimizer.param_groups for p in group["params"]]
        strategy = self._strategy()
        known = set() if strategy is None else {id(p) for p in strategy.parameters()}
        is_ours = any(id(p) in known for p in held)
        why = "" if strategy is None else _why_nothing_is_trained(held, strategy, is_ours=is_ours)
        if why:
            return PrepareError(f"{name} was stepped", f"{why}, so it trains nothing", _REMEDY)
        if is_ours or (not self._models and self._window.has_gradients):
            error = self._mistimed(name, optimizer)
            if error is not None:
                return error
        if is_ours:
            return (
                f"{name} was stepped at {_place()}: checkpoints do not hold its state, and it knows of no window and "
                f"no skipped step. {_REMEDY}"
            )
        if self._group.size == 1 or not self._trains_alone(held):
            return None
        return (
            f"{name} was stepped at {_place()}, and neither was its model: each of the {self._group.size} ranks "
            "trains a copy of its own. Write model, optimizer, loader = accelerator.prepare(model, optimizer, loader)"
        )

    def _mistimed(self, name: str, optimizer: Optimizer) -> PacelineError | None:
        window, scaler = self._window, self._scaler
        if not window.sync_gradients:
            return SteppingError(
                f"{name} was stepped in the middle of a window of {window.num_steps} micro-batches",
                "Only a prepared optimizer waits until the window's gradients are complete",
                _REMEDY,
            )
        if scaler is None or not window.has_gradients or scaler.is_unscaled(optimizer):
            return None
        return SteppingError(
            f"{name} was stepped under mixed_precision='fp16'",
            f"Its gradients are multiplied by the loss scale, {scaler.get_scale():g} now",
            _REMEDY,
        )

    def _trains_alone(self, held: Sequence[Any]) -> bool:
        """Whether nothing exchanges these parameters' gradients, though the script trains with this Accelerator."""
        if self._models and not self._window.has_gradients:
            # A small model beside those that are trained together.
            return False
        return not is_spread_by_hand(held)

    # Loaders

    def note_loaders(self) -> None:
        """Note at the first step which plain loaders there are, where several ranks train and no prepared one runs."""
        if self._group.size > 1 and self._loaders.current is None:
            found = _plain_iterators(self._group.size)
            self._running = [(weakref.ref(iterator), iterator._num_yielded) for iterator in found]

    def compare_loaders(self) -> None:
        """Warn at the second step of a plain loader that has given batches since, all of them to every rank."""
        running, self._running = self._running, []
        iterators = [(reference(), given) for reference, given in running]
        found = next((it for it, given in iterators if it is not None and it._num_yielded > given), None)
        if found is not None and self._loaders.current is None:
            _LOG.warning(
                "A DataLoader over %s, which was never passed to prepare, is in use at %s: each of the %d ranks goes "
                "through all of its %d samples, unless a part was chosen for each before. Write "
                "loader = accelerator.prepare(loader)",
                type(found._dataset).__name__, _place(), self._group.size, len(found._dataset),
            )  # fmt: skip


class _Hook:
    """What every optimizer of the process calls before it steps; it keeps no Accelerator alive."""

    def __init__(self, first_steps: FirstSteps) -> None:
        self.reference = weakref.ref(first_steps)

    def __call__(self, optimizer: Optimizer, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        found = self._judge(optimizer)
        if found is None:
            return
        # An Accelerator that the script has let go of may still be waiting for the collector.
        gc.collect()
        if self.reference() is None:
            return
        if isinstance(found, PacelineError):
            raise found
        _LOG.warning("%s", found)

    def _judge(self, optimizer: Optimizer) -> PacelineError | str | None:
        first_steps = self.reference()
        return None if first_steps is None else first_steps.judge(optimizer)


def _forget_the_dead() -> None:
    """Take off hooks whose Accelerator is gone.

    Not when it goes: the collector may run while torch goes through its hooks.
    """
    for key, hook in list(_global_optimizer_pre_hooks.items()):
        if isinstance(hook, _Hook) and hook.reference() is None:
            del _global_optimizer_pre_hooks[key]


def _why_nothing_is_trained(held: Iterable[Any], strategy: Strategy, *, is_ours: bool) -> str:
    """Why stepping these parameters changes no prepared model; empty if it does, or if they are of none."""
    name = type(strategy).__name__.removesuffix("Strategy")
    if any(strategy.replaced(p) for p in held):
        return f"{name} has put others in place of the parameters that it holds"
    return f"{name} keeps the gradients to itself" if is_ours and strategy.keeps_gradients else ""


def check_model_is_prepared(optimizers: Iterable[AcceleratedOptimizer], group: Group) -> None:
    """Refuse prepared optimizers of a model that nobody prepared, and whose gradients nobody exchanges.

    Raises:
        PrepareError: There is one.
    """
    held = [p for optimizer in optimizers for of in optimizer.param_groups for p in of["params"]]
    if group.size > 1 and not is_spread_by_hand(held):
        raise PrepareError(
            "An optimizer was passed to prepare, and no model",
            f"Nothing exchanges its gradients, so each of {group.size} ranks would train a model of its own",
            _REMEDY,
        )


def is_spread_by_hand(held: Sequence[Any]) -> bool:
    """Whether the script itself has sharded these parameters or wrapped their model in DDP."""
    if any(hasattr(p, "device_mesh") for p in held):
        return True
    ids = {id(p) for p in held}
    wrapped = [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]
    return any(id(p) in ids for model in wrapped for p in model.parameters())


def _plain_iterators(ranks: int) -> Iterable[Any]:
    """Running iterators of plain loaders that deal out all of a map-style data set, in torch's own orders.

    A `Subset` of no more than a rank's share is taken for one that the script has cut out for it.
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


def _is_called_by_us() -> bool:
    """Whether it is this package that steps: a prepared optimizer, or one that is measured."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_OURS)


def _is_inside_prepared_step() -> bool:
    """Whether a prepared optimizer, of this Accelerator or another, is what steps, or steps another inside."""
    code = AcceleratedOptimizer.step.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _place() -> str:
    place = here()
    return "an unknown line" if place is None else f"{place.where} ({place.code})"
