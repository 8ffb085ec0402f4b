"""What changes in a script's own Python objects while a run uses them: their generators and their plain attributes.

A data set with `self.rng = random.Random(0)`, a sampler that counts its epochs in an attribute: nothing asks them for a
`state_dict`, and a resumed run that begins with new ones would read other samples.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import operator
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from itertools import chain
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from paceline.environment.random_generators import state_of

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
    "PIL", "accelerate", "cv2", "datasets", "deepspeed", "evaluate", "evaluate_modules", "fsspec", "h5py", "jax",
    "lmdb", "numpy", "paceline", "pandas", "polars", "pyarrow", "requests", "s3fs", "tokenizers", "torch",
    "torchdata", "torchmetrics", "transformers", "webdataset", "zarr",
})  # fmt: skip
# Of torch, only these contain objects of the script.
_CONTAINERS = ("torch.utils.data.dataset", "torch.utils.data.sampler", "torch.nn.modules.container")

# With this attribute, classes of this library name the attributes of theirs that hold objects of the script.
SCRIPT_OBJECTS = "_objects_of_script"


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

    Numbers, texts, small arrays, and lists and dicts of them, also nested, are plain. If anything else of an object has
    changed, too (a file that it opened, a cache, a large tensor), none of that object's attributes is saved, because
    they belong together.

    Args:
        roots: The objects, by name.
        without: Objects to leave alone.
        max_elements: How many elements of a list or array are compared and saved.
        weights: Whether weights that were written to have changed: not where the model that is trained may be among
            the objects.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        without: Iterable[Any] = (),
        max_elements: int = MAX_ELEMENTS,
        *,
        weights: bool = False,
    ) -> None:
        self._weights = weights
        self._roots = dict(roots)
        self._without = list(without)
        self._max_elements = max_elements
        self._first = {place.path: self._frozen(place.value) for place in self._places()}
        self._owners = {place.owner for place in _places(self._roots, self._without, max_elements)}

    def _places(self) -> Iterator[_Place]:
        places = _places(self._roots, self._without, self._max_elements)
        return (place for place in places if place.value is not _OBJECT and not is_generator(place.value))

    def _holders(self) -> dict[str, dict[str, Any]]:
        """Return the attributes of every object by its path, those of objects without attributes included."""
        places = _places(self._roots, self._without, self._max_elements)
        return {place.owner: place.holder for place in places if place.value is _OBJECT}

    def _frozen(self, value: Any) -> Any:
        if not _is_plain(value, self._max_elements):
            return _Opaque.of(value, weights=self._weights)
        samples = _samples_in(value)
        return copied(value) if samples is None else _Samples(samples)

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
        for owner, places in changed.items():
            if owner in self._owners or not owner.endswith("]"):
                self._sort(places, values, lost)
            else:
                # An object that was put into a list, and could not be made again.
                lost += [place.path for place in places]
        return {"values": values, "states": states, "lost": lost}

    def _sort(self, places: list[_Place], values: dict[str, Any], lost: list[str]) -> None:
        """Add what has changed of one object to what is saved, or to what is lost."""
        plain = [place for place in places if _is_plain(place.value, self._max_elements)]
        if len(plain) == len(places) and all(map(self._can_restore, places)):
            values.update((place.path, _stored(place.value)) for place in places)
        elif plain or any(_is_iterator(place.value) or _has_weights(place.value) for place in places):
            # A file that was opened is not a reason to worry by itself.
            lost += [place.path for place in places]

    def _can_restore(self, place: _Place) -> bool:
        """Whether this is an attribute, or was there in the beginning: not a new item in a list that has objects."""
        return place.path in self._first or place.path == f"{place.owner}.{place.key}"

    def _has_changed(self, place: _Place) -> bool:
        return not is_equal(self._frozen(place.value), self._first.get(place.path, _MISSING))

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Set what `capture` returned; what it did not return, and is plain, becomes what it was in the beginning."""
        values = {path: _of_stored(value) for path, value in saved["values"].items()}
        lost = set(saved["lost"])
        owners = self._holders()
        for place in list(self._places()):
            if _is_stateful(place.value):
                if place.path in saved["states"]:
                    place.value.load_state_dict(copy.deepcopy(saved["states"][place.path]))
                continue
            value = values.pop(place.path, self._first.get(place.path, _MISSING))
            is_known = value is not _MISSING and not isinstance(value, _Opaque | _Samples)
            if place.path in lost or not is_known or is_equal(place.value, value):
                continue
            _write(place, copied(value))
        for path, value in values.items():
            # An attribute that did not exist in the beginning.
            owner, _, name = path.rpartition(".")
            if owner in owners:
                owners[owner][name] = copied(value)


_numel_of = torch.Tensor.numel
_requires_grad_of = operator.attrgetter("requires_grad")
_version_of = operator.attrgetter("_version")

_MISSING: Any = object()
# In place of a value: this is an object, whose attributes are the holder.
_OBJECT: Any = object()

_MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter, "defaultdict": dict}
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "deque": deque}
_PLAIN_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
_PLAIN_CONTAINERS = (*_PLAIN_MAPPINGS, list, tuple, set, deque)


def _stored(value: Any) -> Any:
    """Return a copy of a plain value that a checkpoint can contain."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return {"kind": "tensor", "items": value.detach().cpu(), "device": value.device.type}
    if type(value) not in _PLAIN_CONTAINERS:
        return copied(value)
    if isinstance(value, dict):
        items = [[key, _stored(item)] for key, item in value.items()]
    else:
        items = list(value) if _is_flat(value) else list(map(_stored, value))
    return {"kind": type(value).__name__, "items": items}


def _of_stored(stored: Any) -> Any:
    if not isinstance(stored, dict):
        return stored
    items = stored["items"]
    if stored["kind"] == "tensor":
        device = torch.accelerator.current_accelerator(check_available=True)
        return items.to(device) if device is not None and device.type == stored["device"] else items
    if stored["kind"] in _MAPPINGS:
        return _MAPPINGS[stored["kind"]]({key: _of_stored(item) for key, item in items})
    if dict in set(map(type, items)):
        items = map(_of_stored, items)
    return _SEQUENCES[stored["kind"]](items)


class _Opaque(NamedTuple):
    """Stands for a value that is not plain; a changed one is another object, has another length, or was written to."""

    identity: int
    length: int

    @classmethod
    def of(cls, value: Any, *, weights: bool) -> _Opaque:
        if _is_iterator(value):
            # An iterator changes whenever something is taken from it, which cannot be seen.
            return cls(id(value), -2)
        items: Any = [value]
        length = -1
        if isinstance(value, list | dict | set | deque):
            items, length = value.values() if isinstance(value, dict) else value, len(value)
        return cls(id(value), length + sum(_writes(item, weights=weights) for item in items))


class _Samples:
    """Stands for many tensors, the data of a data set: they have changed if others are there, or one was written to.

    Copying and comparing them for each epoch would take as long as reading them.

    Args:
        items: The tensors, and numbers between them.
    """

    def __init__(self, items: list[Any]) -> None:
        self._items = items
        tensors = _tensors_in(items)
        try:
            self._versions = list(map(_version_of, tensors))
        except RuntimeError:
            # Tensors of inference mode have none.
            self._versions = list(map(_version, tensors))

    def is_as(self, other: _Samples) -> bool:
        """Whether these are the same objects with the same values."""
        is_same = len(self._items) == len(other._items) and all(map(operator.is_, self._items, other._items))
        return is_same and self._versions == other._versions


def _samples_in(value: Any) -> list[Any] | None:
    """Return the items of a long list of tensors, or of tuples of tensors and numbers; None for anything else."""
    if type(value) not in (list, tuple, deque) or len(value) <= MAX_SEARCHED:
        return None
    kinds = set(map(type, value))
    items = list(chain.from_iterable(value)) if kinds == {tuple} else list(value)
    kinds = set(map(type, items))
    return items if torch.Tensor in kinds and kinds <= {torch.Tensor, *_SCALARS} else None


def _tensors_in(items: list[Any]) -> list[torch.Tensor]:
    return [item for item in items if type(item) is torch.Tensor]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _writes(value: Any, *, weights: bool) -> int:
    """Return how often a tensor, or those of a module, were written to in place."""
    tensors: Iterable[Any] = ()
    if isinstance(value, torch.Tensor) and (weights or not isinstance(value, torch.nn.Parameter)):
        tensors = [value]
    elif isinstance(value, torch.nn.Module) and weights:
        tensors = [*value.parameters(), *value.buffers()]
    return sum(map(_version, tensors))


def _has_weights(value: Any) -> bool:
    return isinstance(value, torch.Tensor | torch.nn.Module)


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
    if isinstance(one, _Samples):
        return one.is_as(other)
    if isinstance(one, torch.Tensor):
        return _is_equal_tensor(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if type(one) in _PLAIN_CONTAINERS:
        return _is_equal_inside(one, other)
    return bool(one == other) or (one != one and other != other)


def _is_equal_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    is_alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return is_alike and torch.equal(one, other)


def _is_equal_inside(one: Any, other: Any) -> bool:
    if _is_flat(one) and _is_flat(other):
        return bool(one == other)
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(key in other and is_equal(item, other[key]) for key, item in one.items())
    return all(map(is_equal, one, other))


def _write(place: _Place, value: Any) -> None:
    """Write a value, into the same object where others may hold it, too."""
    current = place.value
    if isinstance(current, np.ndarray) and isinstance(value, np.ndarray) and current.shape == value.shape:
        current[...] = value
        return
    value = _filled(current, value)
    if value is current:
        return
    if isinstance(place.holder, CellType):
        place.holder.cell_contents = value
    else:
        place.holder[place.key] = value


def _filled(current: Any, value: Any) -> Any:
    """Return `current` with the items of `value` if both are of one kind, so that it keeps its type; else `value`."""
    if isinstance(current, torch.Tensor) and isinstance(value, torch.Tensor):
        return value.to(current.device) if value.device.type == "cpu" else value
    if isinstance(current, dict) and isinstance(value, dict):
        before = dict(current)
        current.clear()
        for key, item in value.items():
            current[key] = _filled(before.get(key, _new_item(current)), item)
        return current
    kind = next((kind for kind in (list, set, deque) if isinstance(current, kind)), None)
    if kind is None or not isinstance(value, kind):
        return value
    current.clear()
    (current.update if kind is set else current.extend)(value)
    return current


def _new_item(mapping: Any) -> Any:
    """Return what a `defaultdict` has under a new key."""
    factory = mapping.default_factory if isinstance(mapping, defaultdict) else None
    return _MISSING if factory is None else factory()


_SCALARS = frozenset({type(None), bool, int, float, str, np.bool_, np.int32, np.int64, np.float32, np.float64})


def copied(value: Any) -> Any:
    """Return a copy of a plain value, and of the lists and dicts in it."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) not in _PLAIN_CONTAINERS or _is_flat(value):
        return copy.copy(value)
    if isinstance(value, deque):
        return deque(map(copied, value), value.maxlen)
    if not isinstance(value, dict):
        return type(value)(map(copied, value))
    result = copy.copy(value)
    for key, item in value.items():
        result[key] = copied(item)
    return result


def _is_flat(value: Any) -> bool:
    """Whether everything in a container is a scalar."""
    return _SCALARS.issuperset(map(type, value.values() if isinstance(value, dict) else value))


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
    """Whether a value is a scalar, a small array, or a small container of plain values."""
    return _count_elements(value, max_elements, 0) <= max_elements


def _count_elements(value: Any, most: int, depth: int) -> int:
    """Return how many scalars a plain value has; more than `most` if it has too many, or is not plain."""
    if type(value) not in _PLAIN_CONTAINERS:
        return _size_of_leaf(value, most)
    if len(value) > most or depth > MAX_DEPTH:
        return most + 1
    if _is_flat(value):
        return len(value) if _has_plain_keys(value) else most + 1
    samples = _samples_in(value)
    if samples is not None:
        tensors = _tensors_in(samples)
        size = sum(map(_numel_of, tensors)) + len(samples) - len(tensors)
        return most + 1 if any(map(_requires_grad_of, tensors)) else size
    count = 0 if _has_plain_keys(value) else most + 1
    for item in value.values() if isinstance(value, dict) else value:
        if count > most:
            break
        count += max(1, _count_elements(item, most, depth + 1))
    return count


def _size_of_leaf(value: Any, most: int) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() if type(value) is torch.Tensor and not value.requires_grad else most + 1
    if isinstance(value, np.ndarray):
        return most + 1 if value.dtype.hasobject else value.size
    return 1 if type(value) in _SCALARS else most + 1


def _has_plain_keys(value: Any) -> bool:
    return not isinstance(value, dict) or _SCALARS.issuperset(map(type, value))


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
        if len(value) > MAX_SEARCHED or _is_plain(value, max_elements):
            return None
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [_Place(f"{place.path}[{key!r}]", place.owner, value, key, item) for key, item in items]
    declared: Any = None
    if hasattr(type(value), SCRIPT_OBJECTS):
        declared = getattr(value, SCRIPT_OBJECTS)
    elif not _is_of_script(value):
        return None
    attributes = vars(value)
    names = list(attributes) if declared is None else declared
    own = [_Place(f"{place.path}.{name}", place.path, attributes, name, attributes[name]) for name in names]
    own.append(_Place(place.path, place.path, attributes, "", _OBJECT))
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


@functools.cache
def _generator_types() -> tuple[type, ...]:
    """The classes of generators; `numpy.random` is imported when they are first asked for."""
    return (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def is_generator(value: Any) -> bool:
    """Whether a value is a random generator that is not a global one."""
    if not isinstance(value, _generator_types()):
        return False
    is_global = any(value is each for each in (torch.default_generator, np.random.mtrand._rand, random._inst))
    return not is_global and not isinstance(value, random.SystemRandom)


def generator_state(generator: Any) -> Any:
    """Return a generator's state, as tuples, dicts, numbers, arrays and tensors."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, torch.Generator):
        return state_of(generator)
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
