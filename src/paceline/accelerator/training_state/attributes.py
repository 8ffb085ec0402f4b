"""The state of models and optimizers outside of their tensors: counters, generators, extra state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paceline.environment.object_state import (
    ObjectState,
    copied,
    generator_state,
    is_equal,
    is_generator,
    is_script_module,
    set_generator_state,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from paceline.accelerator.stepping import AcceleratedOptimizer
    from paceline.strategies import Strategy

__all__ = ["AttributeState", "attribute_owners"]

# Elements of a buffer that is not persistent, and is saved nevertheless if it has changed.
MAX_ELEMENTS = 4096


def attribute_owners(
    strategy: Strategy | None, models: Iterable[nn.Module], optimizers: Iterable[AcceleratedOptimizer]
) -> dict[str, Any]:
    """Return models and optimizers without what wraps them, by name.

    Args:
        strategy: Unwraps the models; without one there are only the optimizers.
        models: Prepared models.
        optimizers: Prepared optimizers.
    """
    # Not at the start of every program.
    from paceline.checkpoint import numbered

    owners: dict[str, Any] = {numbered("optimizer", i): wrapper.optimizer for i, wrapper in enumerate(optimizers)}
    if strategy is not None:
        owners |= {numbered("model", i): strategy.unwrap(model) for i, model in enumerate(models)}
    return owners


class AttributeState:
    """What a `state_dict` of a module or an optimizer leaves out, although training changes it.

    Saved are numbers and random generators in attributes of the script's own classes, small buffers that are not
    persistent, `get_extra_state` of modules, what an optimizer keeps in its `state` under a name, and what functions of
    a schedule count. Numbers and buffers only if they have changed since they were prepared, so that a script may set
    others when it resumes.
    """

    def __init__(self) -> None:
        self._first: dict[str, Any] = {}
        self._functions: dict[str, ObjectState] = {}

    def note(self, owners: Mapping[str, Any]) -> None:
        """Note the attributes of objects that were prepared.

        Args:
            owners: Models and optimizers without what wraps them, by a name that is always the same.
        """
        for path, _, _, value in _attributes(owners):
            if not is_generator(value):
                self._first.setdefault(path, copied(value))

    def note_functions(self, name: str, scheduler: Any) -> None:
        """Note the functions of a scheduler, which may count something themselves."""
        functions = list(_functions_of(scheduler))
        if functions:
            self._functions[name] = ObjectState({name: functions})

    def clear(self) -> None:
        """Forget everything."""
        self._first.clear()
        self._functions.clear()

    def capture(self, owners: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of these objects on this rank."""
        values, generators = {}, {}
        for path, _, _, value in _attributes(owners):
            if is_generator(value):
                generators[path] = generator_state(value)
            elif path in self._first and not is_equal(value, self._first[path]):
                values[path] = copied(value)
        return {
            "values": values,
            "generators": generators,
            "extra": {path: _plain(module.get_extra_state()) for path, module in _with_extra_state(owners)},
            "named": {name: _named_state(thing) for name, thing in owners.items() if _named_state(thing)},
            "functions": {name: state.capture() for name, state in self._functions.items()},
        }

    def restore(self, saved: Mapping[str, Any], owners: Mapping[str, Any], *, generators: bool) -> None:
        """Restore what `capture` returned; what had not changed becomes what it was when it was prepared.

        Args:
            saved: The state.
            owners: The same objects.
            generators: Whether the state is that of this rank, so that generators continue.
        """
        for path, holder, name, value in list(_attributes(owners)):
            if is_generator(value):
                if generators and path in saved["generators"]:
                    set_generator_state(value, saved["generators"][path])
                continue
            target = saved["values"].get(path, self._first.get(path, value))
            if isinstance(value, torch.Tensor):
                value.copy_(target)
            else:
                holder[name] = target
        for path, module in _with_extra_state(owners):
            if path in saved["extra"]:
                module.set_extra_state(saved["extra"][path])
        for name, state in saved["named"].items():
            if name in owners:
                owners[name].state.update(state)
        for name, functions in self._functions.items():
            if name in saved["functions"]:
                functions.restore(saved["functions"][name])


def _modules(owners: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every object, and the modules of each model, with a name."""
    for name, thing in owners.items():
        if not isinstance(thing, nn.Module):
            yield name, thing
            continue
        for path, module in thing.named_modules():
            yield f"{name}.{path}", module


def _attributes(owners: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """Yield path, holder, name and value of what may change."""
    for path, thing in _modules(owners):
        if is_script_module(type(thing).__module__):
            for name, value in list(vars(thing).items()):
                if not name.startswith("_") and name != "training" and _may_count(value):
                    yield f"{path}.{name}", vars(thing), name, value
        if isinstance(thing, nn.Module):
            for name in sorted(thing._non_persistent_buffers_set):
                buffer = thing._buffers.get(name)
                if type(buffer) is torch.Tensor and buffer.numel() <= MAX_ELEMENTS:
                    yield f"{path}.{name}", thing._buffers, name, buffer


def _may_count(value: Any) -> bool:
    return type(value) in (bool, int, float) or is_generator(value)


def _with_extra_state(owners: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    for path, thing in _modules(owners):
        if isinstance(thing, nn.Module) and type(thing).get_extra_state is not nn.Module.get_extra_state:
            yield path, thing


def _plain(state: Any) -> Any:
    """Return extra state as something that a checkpoint can contain."""
    return state.getvalue() if isinstance(state, io.BytesIO) else state


def _named_state(optimizer: Any) -> dict[str, Any]:
    """Return what an optimizer keeps under names, not under parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return {}
    state: dict[Any, Any] = optimizer.state
    return {key: value for key, value in state.items() if isinstance(key, str)}


def _functions_of(scheduler: Any) -> Iterator[Any]:
    """Yield the functions of a scheduler and of those inside it; objects have a state that torch saves."""
    yield from getattr(scheduler, "lr_lambdas", None) or ()
    inner: Iterable[Any] = getattr(scheduler, "_schedulers", None) or ()
    for other in inner:
        yield from _functions_of(other)
