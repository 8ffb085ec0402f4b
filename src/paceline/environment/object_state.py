"""What changes in a script's own Python objects while a run uses them: their generators and their plain attributes.

A data set with `self.rng = random.Random(0)`, a sampler that counts its epochs in an attribute: nothing asks them for a
`state_dict`, and a resumed run that begins with new ones would read other samples.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import random
import sys
from collections import deque
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = [
    "ObjectState",
    "OwnGenerators",
    "copied",
    "generator_state",
    "is_equal",
    "is_generator",
    "is_script_module",
    "set_generator_state",
]

# Lists and dicts of up to so many objects are searched, and objects in objects up to this depth.
MAX_SEARCHED = 64
MAX_DEPTH = 6
# Elements of lists and arrays that are compared and saved.
MAX_ELEMENTS = 4096

_LIBRARIES = frozenset({
    "PIL", "accelerate", "cv2", "datasets", "deepspeed", "fsspec", "h5py", "jax", "lmdb", "numpy", "paceline", "pandas",
    "polars", "pyarrow", "requests", "s3fs", "tokenizers", "torch", "torchdata", "transformers", "webdataset", "zarr",
})  # fmt: skip
# Of torch, only these contain objects of the script.
_CONTAINERS = ("torch.utils.data.dataset", "torch.utils.data.sampler", "torch.nn.modules.container")


class _Place(NamedTuple):
    """A value that may change.

    Attributes:
        path: Where it stands, for example `dataset.transform.rng`.
        owner: The path of the object whose attribute it is, or is in.
        holder: The attributes, dict, list or cell that contains it.
        key: Its key there.
        value: The value.
    """

    path: str
    owner: str
    holder: Any
    key: Any
    value: Any


class OwnGenerators:
    """The random generators in some objects: of `torch`, `random` and both kinds of numpy, under any name.

    Args:
        roots: The objects, by name.
        without: Objects and generators to leave alone.
    """

    def __init__(self, roots: Mapping[str, Any], without: Iterable[Any] = ()) -> None:
        self._roots = dict(roots)
        self._without = list(without)
        self._base = self.states()

    def __bool__(self) -> bool:
        return bool(self._base)

    def _found(self) -> dict[str, Any]:
        places = _places(self._roots, self._without)
        return {place.path: place.value for place in places if is_generator(place.value)}

    def states(self) -> dict[str, Any]:
        """Return their current states by path."""
        return {path: generator_state(generator) for path, generator in self._found().items()}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Set them to states that `states` returned."""
        for path, generator in self._found().items():
            if path in states:
                set_generator_state(generator, states[path])

    @property
    def base(self) -> dict[str, Any]:
        """Their states in the beginning."""
        return self._base

    @base.setter
    def base(self, states: Mapping[str, Any]) -> None:
        self._base = {**self._base, **states}

    def begin(self, *numbers: int) -> None:
        """Set them to states that depend only on those in the beginning and on these numbers; all 0: the beginning.

        Whatever was drawn before, and however far ahead was read, an epoch then draws the same.

        Args:
            *numbers: The number of the epoch, and whatever else is to make a difference.
        """
        if not any(numbers):
            self.restore(self._base)
            return
        for path, generator in self._found().items():
            _seed(generator, _digest(_state_text(self._base.get(path)), numbers))

    def seed(self, seed: int) -> None:
        """Seed each of them with a number of its own."""
        if not self._base:
            return
        for path, generator in self._found().items():
            _seed(generator, _digest(path, seed))


def _digest(*parts: Any) -> int:
    """Return a number of 63 bits that depends on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def _state_text(state: Any) -> str:
    """Return all of a generator's state as text; `repr` leaves out the middle of long arrays."""
    if isinstance(state, dict):
        return repr({key: _state_text(value) for key, value in state.items()})
    if isinstance(state, tuple):
        return repr([_state_text(item) for item in state])
    if isinstance(state, torch.Tensor | np.ndarray):
        return repr(state.tolist())
    return repr(state)


class ObjectState:
    """What has changed in some objects since this was made, as far as it can be saved.

    Numbers, texts, small arrays, and lists and dicts of them are plain. If anything else of an object has changed, too
    (a file that it opened, a cache), none of that object's attributes is saved, because they belong together.

    Args:
        roots: The objects, by name.
        without: Objects to leave alone.
        max_elements: How many elements of a list or array are compared and saved.
    """

    def __init__(self, roots: Mapping[str, Any], without: Iterable[Any] = (), max_elements: int = MAX_ELEMENTS) -> None:
        self._roots = dict(roots)
        self._without = list(without)
        self._max_elements = max_elements
        self._first = {place.path: self._frozen(place.value) for place in self._places()}

    def _places(self) -> Iterator[_Place]:
        places = _places(self._roots, self._without, self._max_elements)
        return (place for place in places if not is_generator(place.value))

    def _frozen(self, value: Any) -> Any:
        if _is_plain(value, self._max_elements):
            return copied(value)
        return _Opaque.of(value)

    def capture(self) -> dict[str, Any]:
        """Return what has changed.

        Returns:
            `values` by path; `states` of objects with a `state_dict`; and `lost`: the paths of what has changed and
            cannot be saved.
        """
        states: dict[str, Any] = {}
        values: dict[str, Any] = {}
        lost: list[str] = []
        changed: dict[str, list[_Place]] = {}
        for place in self._places():
            if not _is_stateful(place.value):
                if self._has_changed(place):
                    changed.setdefault(place.owner, []).append(place)
                continue
            state = place.value.state_dict()
            if _is_storable(state):
                states[place.path] = copy.deepcopy(state)
            else:
                lost.append(place.path)
        for places in changed.values():
            self._sort(places, values, lost)
        return {"values": values, "states": states, "lost": lost}

    def _sort(self, places: list[_Place], values: dict[str, Any], lost: list[str]) -> None:
        """Add what has changed of one object to what is saved, or to what is lost."""
        plain = [place for place in places if _is_plain(place.value, self._max_elements)]
        if len(plain) == len(places):
            values.update((place.path, _stored(place.value)) for place in places)
        elif plain or any(_is_iterator(place.value) for place in places):
            # A file that was opened is no reason to worry by itself.
            lost += [place.path for place in places]

    def _has_changed(self, place: _Place) -> bool:
        return not is_equal(self._frozen(place.value), self._first.get(place.path, _MISSING))

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Set what `capture` returned; what it did not return, and is plain, becomes what it was in the beginning."""
        values = {path: _of_stored(value) for path, value in saved["values"].items()}
        lost = set(saved["lost"])
        owners = {}
        for place in list(self._places()):
            if _is_stateful(place.value):
                if place.path in saved["states"]:
                    place.value.load_state_dict(copy.deepcopy(saved["states"][place.path]))
                continue
            if isinstance(place.holder, dict):
                owners[place.owner] = place.holder
            value = values.pop(place.path, self._first.get(place.path, _MISSING))
            if place.path in lost or value is _MISSING or isinstance(value, _Opaque) or is_equal(place.value, value):
                continue
            _write(place, copied(value))
        for path, value in values.items():
            # An attribute that did not exist in the beginning.
            owner, _, name = path.rpartition(".")
            if owner in owners:
                owners[owner][name] = copied(value)


_MISSING: Any = object()


def _stored(value: Any) -> Any:
    """Return a copy that a checkpoint can contain."""
    if isinstance(value, set | deque):
        return {"kind": type(value).__name__, "items": list(value)}
    return {"kind": "", "items": copied(value)}


def _of_stored(stored: Mapping[str, Any]) -> Any:
    if stored["kind"] == "set":
        return set(stored["items"])
    if stored["kind"] == "deque":
        return deque(stored["items"])
    return stored["items"]


class _Opaque(NamedTuple):
    """Stands for a value that is not plain; a changed one is another object, or has another length."""

    identity: int
    length: int

    @classmethod
    def of(cls, value: Any) -> _Opaque:
        if _is_iterator(value):
            # An iterator changes whenever something is taken from it, which cannot be seen.
            return cls(id(value), -2)
        length = len(value) if isinstance(value, list | dict | set | deque) else -1
        return cls(id(value), length)


def _is_iterator(value: Any) -> bool:
    return hasattr(type(value), "__next__")


def _is_stateful(value: Any) -> bool:
    """Whether an object saves its own state; modules and classes do not count."""
    if isinstance(value, type | torch.nn.Module | _Opaque) or not _is_of_script(value):
        return False
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def is_equal(one: Any, other: Any) -> bool:
    """Whether two values have one type and are the same; NaN is the same as itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, _Opaque):
        return one == other and one.length != -2
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other) or (one != one and other != other)


def _write(place: _Place, value: Any) -> None:
    """Write a value, into the same object where others may hold it, too."""
    current = place.value
    if isinstance(current, list) and isinstance(value, list):
        current[:] = value
    elif isinstance(current, dict | set) and type(value) is type(current):
        current.clear()
        current.update(value)
    elif isinstance(current, deque) and isinstance(value, deque):
        current.clear()
        current.extend(value)
    elif isinstance(current, np.ndarray) and isinstance(value, np.ndarray) and current.shape == value.shape:
        current[...] = value
    elif isinstance(place.holder, CellType):
        place.holder.cell_contents = value
    else:
        place.holder[place.key] = value


_SCALARS = frozenset({type(None), bool, int, float, str})


def copied(value: Any) -> Any:
    """Return a copy of a plain value; what is in a list or a dict cannot change."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _is_storable(state: Any) -> bool:
    """Whether a checkpoint can contain a state."""
    if isinstance(state, dict):
        return all(_is_storable(item) for pair in state.items() for item in pair)
    if type(state) in (list, tuple):
        return all(map(_is_storable, state))
    if isinstance(state, np.ndarray):
        return not state.dtype.hasobject
    return isinstance(state, torch.Tensor | np.generic) or type(state) in _SCALARS


def _is_plain(value: Any, max_elements: int) -> bool:
    """Whether a value is a scalar, or a small array or container of scalars."""
    if isinstance(value, torch.Tensor):
        return type(value) is torch.Tensor and not value.requires_grad and value.numel() <= max_elements
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject and value.size <= max_elements
    if type(value) not in (dict, list, tuple, set, deque):
        return type(value) in _SCALARS
    if len(value) > max_elements:
        return False
    is_plain = _SCALARS.issuperset(map(type, value))
    return is_plain and (not isinstance(value, dict) or _SCALARS.issuperset(map(type, value.values())))


def _places(roots: Mapping[str, Any], without: Iterable[Any], max_elements: int = MAX_ELEMENTS) -> Iterator[_Place]:
    """Yield every value in the objects that may change, generators included."""
    seen = set(map(id, without))
    holder: dict[str, Any] = dict(roots)
    for name in roots:
        yield from _places_in(_Place(name, name, holder, name, holder[name]), seen, 0, max_elements)


def _places_in(place: _Place, seen: set[int], depth: int, max_elements: int) -> Iterator[_Place]:
    value = place.value
    if is_generator(value):
        if id(value) not in seen:
            seen.add(id(value))
            yield place
        return
    if id(value) in seen:
        return
    inner = None
    if depth < MAX_DEPTH and not _is_stateful(value):
        inner = _inside(place, max_elements)
    if inner is None:
        # The roots themselves are nobody's attributes.
        if depth or _is_stateful(value):
            yield place
        return
    seen.add(id(value))
    for part in inner:
        yield from _places_in(part, seen, depth + 1, max_elements)


def _inside(place: _Place, max_elements: int) -> Iterable[_Place] | None:
    """Return what an object or a container of objects contains; None for a value without anything to search."""
    value = place.value
    if isinstance(value, FunctionType | MethodType | functools.partial):
        return _inside_function(place)
    if isinstance(value, list | tuple | dict):
        if _is_plain(value, max_elements) or len(value) > MAX_SEARCHED:
            return None
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [_Place(f"{place.path}[{key!r}]", place.owner, value, key, item) for key, item in items]
    if not _is_of_script(value):
        return None
    attributes = vars(value)
    own = [_Place(f"{place.path}.{name}", place.path, attributes, name, item) for name, item in attributes.items()]
    return own + _global_generators(place, _methods(type(value)))


def _inside_function(place: _Place) -> list[_Place]:
    function, path = place.value, place.path
    if isinstance(function, functools.partial):
        parts: dict[str, Any] = {"func": function.func, **function.keywords}
        parts.update((str(index), value) for index, value in enumerate(function.args))
        return [_Place(f"{path}.{name}", path, parts, name, value) for name, value in parts.items()]
    if isinstance(function, MethodType):
        return [_Place(f"{path}.self", path, {}, "self", function.__self__)]
    if not is_script_module(function.__module__):
        return []
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    places = []
    for name, cell in cells:
        try:
            places.append(_Place(f"{path}.{name}", path, cell, name, cell.cell_contents))
        except ValueError:
            # The name has no value yet.
            continue
    return places + _global_generators(place, [function])


def _methods(kind: type) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        if is_script_module(base.__module__):
            yield from (value for value in vars(base).values() if isinstance(value, FunctionType))


def _global_generators(place: _Place, functions: Iterable[FunctionType]) -> list[_Place]:
    """Return the generators among the global variables of the script that functions use."""
    found = {}
    for function in functions:
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if is_generator(value):
                found[name] = _Place(f"{place.path}.{name}", place.path, function.__globals__, name, value)
    return list(found.values())


def is_script_module(module: str | None) -> bool:
    """Whether a module of this name belongs to the script, not to Python or a large library."""
    name = module or ""
    top = name.partition(".")[0]
    return (top not in _LIBRARIES and top not in sys.stdlib_module_names) or name in ("__main__", "__mp_main__")


def _is_of_script(value: Any) -> bool:
    """Whether a value is an object of a class of the script, or one of torch's that contains such objects."""
    if not hasattr(value, "__dict__") or isinstance(value, type | BuiltinFunctionType):
        return False
    if isinstance(value, torch.Tensor | np.ndarray):
        return False
    kinds = [kind for kind in type(value).__mro__ if kind is not object]
    return bool(kinds) and (is_script_module(kinds[0].__module__) or kinds[0].__module__ in _CONTAINERS)


# Generators of each kind


def is_generator(value: Any) -> bool:
    """Whether a value is a random generator that is not a global one."""
    if not isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        return False
    is_global = any(value is each for each in (torch.default_generator, np.random.mtrand._rand, random._inst))
    return not is_global and not isinstance(value, random.SystemRandom)


def generator_state(generator: Any) -> Any:
    """Return a generator's state, as tuples, dicts, numbers, arrays and tensors."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_generator_state(generator: Any, state: Any) -> None:
    """Restore what `generator_state` returned."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed([seed & 0xFFFFFFFF, seed >> 32])
    else:
        make: Callable[[int], Any] = type(generator.bit_generator)
        generator.bit_generator.state = make(seed).state
