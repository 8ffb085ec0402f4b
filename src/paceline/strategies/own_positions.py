"""Spares models of transformers a wait in each forward, in which they read their own position ids.

A model that gets neither position ids nor an attention mask numbers the tokens of each row from 0. transformers then
reads the numbers from the device to find rows in which several samples are packed, and the host can queue nothing
meanwhile. There are none, so it need not look. Ids that a script passes are looked at as ever.
"""

from __future__ import annotations

import inspect
import sys
from threading import local
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["trust_own_positions"]


class _Forwards(local):
    """The forwards of this thread, the innermost last: `id` and class of a module, and whether its ids are trusted."""

    def __init__(self) -> None:
        self.stack: list[tuple[int, type, bool]] = []


_FORWARDS = _Forwards()
# Classes of models whose own ids were read once, and were consecutive.
_CONSECUTIVE: set[type] = set()


def trust_own_positions(model: nn.Module) -> None:
    """Let no model of transformers inside `model` read the position ids that it has made itself, but for the first.

    Args:
        model: About to be prepared. Other models are left alone.
    """
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    masks: Any = sys.modules.get("transformers.masking_utils")
    find = getattr(masks, "find_packed_sequence_indices", None)
    if modeling is None or find is None:
        return
    for module in model.modules():
        if isinstance(module, modeling.PreTrainedModel):
            _watch(module)
    if not isinstance(find, _FindPacked):
        masks.find_packed_sequence_indices = _FindPacked(find)


def _watch(module: nn.Module) -> None:
    names = list(inspect.signature(type(module).forward).parameters)
    if "position_ids" not in names or any(isinstance(hook, _Enter) for hook in module._forward_pre_hooks.values()):
        return
    # Without `self`. Others may make ids that are not consecutive.
    is_of_transformers = type(module).__module__.startswith("transformers.")
    module.register_forward_pre_hook(
        _Enter(names.index("position_ids") - 1, may_trust=is_of_transformers), with_kwargs=True
    )
    module.register_forward_hook(_leave, always_call=True)


class _Enter:
    """Notes that a forward begins.

    Args:
        place: Of `position_ids` among the positional arguments.
        may_trust: Whether ids that the module makes are consecutive.
    """

    def __init__(self, place: int, *, may_trust: bool) -> None:
        self._place = place
        self._may_trust = may_trust

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        given = args[self._place] if len(args) > self._place else kwargs.get("position_ids")
        # A later hook, or another forward in place of the class's, may pass ids.
        is_last = next(reversed(module._forward_pre_hooks.values())) is self and "forward" not in vars(module)
        _drop(module)
        _FORWARDS.stack.append((id(module), type(module), self._may_trust and is_last and given is None))


def _leave(module: nn.Module, *_: Any) -> None:
    _drop(module)


def _drop(module: nn.Module) -> None:
    """End a module's forward and those inside it; an interrupt may have left some."""
    stack = _FORWARDS.stack
    place = next((i for i, (key, _, _) in enumerate(stack) if key == id(module)), None)
    if place is not None:
        del stack[place:]


class _FindPacked:
    """transformers' search for packed rows, without the search where a model has made the ids itself.

    Args:
        find: The search.
    """

    def __init__(self, find: Any) -> None:
        self._find = find

    def __call__(self, position_ids: Tensor) -> Tensor | None:
        _, kind, is_trusted = _FORWARDS.stack[-1] if _FORWARDS.stack else (0, object, False)
        if not is_trusted or torch.compiler.is_compiling():
            found: Tensor | None = self._find(position_ids)
            return found
        if kind in _CONSECUTIVE:
            return None
        found = self._find(position_ids)
        if found is None:
            _CONSECUTIVE.add(kind)
        return found
