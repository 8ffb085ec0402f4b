"""What a script trains with and never prepared, found at its first optimizer steps.

An optimizer, a loader or a model that `prepare` has not seen works as in plain PyTorch: alone. Nobody is asked before
it acts, so a hook on all optimizers of the process looks at the first steps, and is taken off once the prepared ones
have stepped twice.
"""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from paceline.environment.logging import get_logger
from paceline.errors import PrepareError, SteppingError
from paceline.stepping import AcceleratedOptimizer
from paceline.watchdog.places import here

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
        self._has_looked_at_loaders = False
        itself = weakref.ref(self)

        def before_step(optimizer: Optimizer, *_: object) -> None:
            first_steps = itself()
            if first_steps is not None and not torch.compiler.is_compiling():
                first_steps._look(optimizer)

        self._stop = weakref.finalize(self, register_optimizer_step_pre_hook(before_step).remove)

    def stop(self) -> None:
        """Look no further: every optimizer of the loop has had its turn."""
        self._stop()

    # Optimizers

    def _look(self, optimizer: Optimizer) -> None:
        if optimizer in self._judged or _is_called_by_us():
            return
        self._judged.add(optimizer)
        if not _is_inside_prepared_step():
            self._judge(optimizer)

    def _judge(self, optimizer: Optimizer) -> None:
        """Say what is wrong with a step of an optimizer that nobody has prepared.

        Raises:
            PrepareError: It trains nothing.
            SteppingError: Its step cannot be right at this moment.
        """
        held = [p for group in optimizer.param_groups for p in group["params"]]
        strategy = self._strategy()
        is_ours = strategy is not None and self._holds_prepared(held, strategy)
        self._check_moment(optimizer, is_ours=is_ours)
        if is_ours:
            _LOG.warning(
                "%s, stepped at %s, was never passed to prepare: checkpoints do not hold its state, and it knows of no "
                "window and no skipped step. Write model, optimizer = accelerator.prepare(model, optimizer)",
                type(optimizer).__name__, _place(),
            )  # fmt: skip
        elif self._group.size > 1 and self._trains_alone(held):
            _LOG.warning(
                "%s, stepped at %s, trains a model that was never passed to prepare: each of the %d ranks trains a "
                "copy of its own. Write model, optimizer, loader = accelerator.prepare(model, optimizer, loader)",
                type(optimizer).__name__, _place(), self._group.size,
            )  # fmt: skip
            self.look_at_loaders()

    def _holds_prepared(self, held: Iterable[Any], strategy: Strategy) -> bool:
        name = type(strategy).__name__.removesuffix("Strategy")
        if any(strategy.replaced(p) for p in held):
            raise _unprepared(f"{name} has put others in place of the parameters that it holds, so it trains nothing")
        known = {id(p) for p in strategy.parameters()}
        is_ours = any(id(p) in known for p in held)
        if is_ours and strategy.keeps_gradients:
            raise _unprepared(f"{name} keeps the gradients to itself, so it trains nothing")
        return is_ours

    def _check_moment(self, optimizer: Optimizer, *, is_ours: bool) -> None:
        window = self._window
        concerns = is_ours or (not self._models and window.has_gradients)
        if concerns and not window.sync_gradients:
            raise SteppingError(
                f"{type(optimizer).__name__}, which was never passed to prepare, was stepped in the middle of a window "
                f"of {window.num_steps} micro-batches",
                "Only a prepared optimizer waits until the window's gradients are complete",
                "Write model, optimizer = accelerator.prepare(model, optimizer)",
            )
        scaler = self._scaler
        if concerns and window.has_gradients and scaler is not None and not scaler.is_unscaled(optimizer):
            raise SteppingError(
                f"{type(optimizer).__name__}, which was never passed to prepare, was stepped under "
                "mixed_precision='fp16'",
                f"Its gradients are multiplied by the loss scale, {scaler.get_scale():g} now",
                "Write model, optimizer = accelerator.prepare(model, optimizer)",
            )

    def _trains_alone(self, held: Sequence[Any]) -> bool:
        """Whether nothing exchanges these parameters' gradients, though the script trains with this Accelerator."""
        if self._models and not self._window.has_gradients:
            # A small model beside those that are trained together.
            return False
        return not is_spread_by_hand(held)

    # Loaders

    def look_at_loaders(self) -> None:
        """Warn of a plain loader that several ranks go through as a whole."""
        if self._has_looked_at_loaders or self._group.size == 1:
            return
        self._has_looked_at_loaders = True
        if self._loaders.current is not None:
            return
        found = next((it for it in _plain_iterators()), None)
        if found is not None:
            _LOG.warning(
                "A DataLoader over %s was never passed to prepare and is in use at %s: each of the %d ranks goes "
                "through all of its %d samples, unless this rank's part was chosen before. Write "
                "loader = accelerator.prepare(loader)",
                type(found._dataset).__name__, _place(), self._group.size, len(found._dataset),
            )  # fmt: skip


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
            "Write model, optimizer = accelerator.prepare(model, optimizer)",
        )


def is_spread_by_hand(held: Sequence[Any]) -> bool:
    """Whether the script itself has sharded these parameters or wrapped their model in DDP."""
    if any(hasattr(p, "device_mesh") for p in held):
        return True
    ids = {id(p) for p in held}
    wrapped = [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]
    return any(id(p) in ids for model in wrapped for p in model.parameters())


def _plain_iterators() -> Iterable[Any]:
    """Running iterators of plain loaders that deal out all of a map-style data set, in torch's own orders."""
    for thing in gc.get_objects():
        if not issubclass(type(thing), _BaseDataLoaderIter):
            continue
        sampler = thing._index_sampler
        order = sampler.sampler if type(sampler) is BatchSampler else sampler
        if type(order) in (RandomSampler, SequentialSampler):
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


def _unprepared(why: str) -> PrepareError:
    return PrepareError(
        "An optimizer that was never passed to prepare was stepped",
        why,
        "Write model, optimizer = accelerator.prepare(model, optimizer)",
    )


def _place() -> str:
    place = here()
    return "an unknown line" if place is None else f"{place.where} ({place.code})"
