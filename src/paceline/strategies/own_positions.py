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
    """The forwards that this thread is in, the innermost last: each module, and whether it makes its position ids."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, bool]] = []


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
        if isinstance(module, modeling.PreTrainedModel) and type(module).__module__.startswith("transformers."):
            _watch(module)
    if not isinstance(find, _FindPacked):
        masks.find_packed_sequence_indices = _FindPacked(find)


def _watch(module: nn.Module) -> None:
    names = list(inspect.signature(type(module).forward).parameters)
    if "position_ids" not in names or any(isinstance(hook, _Enter) for hook in module._forward_pre_hooks.values()):
        return
    # Without `self`.
    module.register_forward_pre_hook(_Enter(names.index("position_ids") - 1), with_kwargs=True)
    module.register_forward_hook(_leave, always_call=True)


class _Enter:
    """Notes that a forward begins.

    Args:
        place: Of `position_ids` among the positional arguments.
    """

    def __init__(self, place: int) -> None:
        self._place = place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        given = args[self._place] if len(args) > self._place else kwargs.get("position_ids")
        _FORWARDS.stack.append((module, given is None))


def _leave(module: nn.Module, *_: Any) -> None:
    # After an error in another hook, the forward may not have been noted.
    if _FORWARDS.stack and _FORWARDS.stack[-1][0] is module:
        _FORWARDS.stack.pop()


class _FindPacked:
    """transformers' search for packed rows, without the search where a model has made the ids itself.

    Args:
        find: The search.
    """

    def __init__(self, find: Any) -> None:
        self._find = find

    def __call__(self, position_ids: Tensor) -> Tensor | None:
        module, makes_ids = _FORWARDS.stack[-1] if _FORWARDS.stack else (None, False)
        if not makes_ids or torch.compiler.is_compiling():
            found: Tensor | None = self._find(position_ids)
            return found
        if type(module) in _CONSECUTIVE:
            return None
        found = self._find(position_ids)
        if found is None:
            _CONSECUTIVE.add(type(module))
        return found
