"""Refuses torch's own clipping of gradients that ZeRO keeps: it would find none of them, and clip nothing."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch

from paceline.environment.logging import get_logger
from paceline.errors import SteppingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.strategies.deepspeed.engine import EngineRegistry, ZeroEngine

_LOG = get_logger(__name__)
# Whether clipping is refused, or only gets a warning.
_registries: weakref.WeakKeyDictionary[EngineRegistry, bool] = weakref.WeakKeyDictionary()


def watch_clipping(engines: EngineRegistry, *, refuses: bool) -> None:
    """Have `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_` refuse parameters of these engines.

    Their parameters' `grad` is None after a backward, which torch takes for nothing to clip.

    Args:
        engines: Those that are there when the script clips.
        refuses: Whether it is an error; else it gets one warning.
    """
    _replace_inside(torch.nn.utils.clip_grad_norm_, "clip_grad_norm_")
    _replace_inside(torch.nn.utils.clip_grad_value_, "clip_grad_value_")
    _registries[engines] = refuses


def _replace_inside(function: Any, name: str) -> None:
    """Check before the function that torch's own wrapper calls: a script may have imported the wrapper by its name."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cell = cells.get("func")
    if cell is not None and not hasattr(cell.cell_contents, "is_checked"):
        cell.cell_contents = _checked(cell.cell_contents, name)


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(parameters, *args, **kwargs)
        listed = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        _refuse(listed, name)
        return function(listed, *args, **kwargs)

    checked.is_checked = True  # type: ignore[attr-defined]
    return checked


def _finds_nothing(zero: ZeroEngine, parameters: Sequence[Any]) -> bool:
    """Whether these parameters are of the engine, and torch finds no gradients that belong to them."""
    if not parameters:
        return zero.window_ended and zero.hides_parameters
    kept = zero.keeps_gradients_of
    return any(id(p) in kept and p.grad is None for p in parameters)


def _refuse(parameters: Sequence[Any], name: str) -> None:
    """Refuse parameters whose gradients an engine keeps.

    Raises:
        SteppingError: There are some.
    """
    for engines, refuses in list(_registries.items()):
        if not any(_finds_nothing(zero, parameters) for zero in engines):
            continue
        error = SteppingError(
            f"torch.nn.utils.{name} was called under ZeRO",
            "Its engine keeps the gradients, and parameter.grad is None, so nothing would be clipped",
            f"Call accelerator.{name}(model.parameters(), ...)",
        )
        if refuses:
            raise error
        _LOG.warning("%s", error)
        # One warning is enough.
        del _registries[engines]
