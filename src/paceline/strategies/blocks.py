"""Finds the modules that are sharded and gathered as one unit."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from paceline.errors import PrepareError, UnknownBlockError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from paceline.config import FullyShardedDataParallelPlugin

# A bigger model with a single unit would be gathered whole in every forward, which saves no memory.
BIG_MODEL_BYTES = 1_000_000_000

# Modules that only contain others: they are never called, so their parameters would never be gathered.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True)
class Units:
    """The blocks of a model, inner ones before outer ones; everything outside of them belongs to the root.

    Attributes:
        names: The blocks' names in the model.
        classes: Pairs of class name and number of blocks.
        how: How they were chosen, for the summary.
    """

    names: tuple[str, ...]
    classes: tuple[tuple[str, int], ...]
    how: str

    def __str__(self) -> str:
        if not self.names:
            return f"1 unit: the whole model ({self.how})"
        parts = " + ".join(f"{count} {name}" for name, count in self.classes)
        return f"{len(self.names) + 1} units: {parts} + the rest ({self.how})"


def find_units(model: nn.Module, plugin: FullyShardedDataParallelPlugin, *, source: str = "") -> Units:
    """Find the blocks of `model` by class name, by its `_no_split_modules`, by size or by repeated structure.

    Args:
        model: Of any size.
        plugin: The settings.
        source: Where classes are named, for the error about one that is not there.

    Raises:
        UnknownBlockError: The model has no class with a configured name.
        PrepareError: A big model has a single unit, or TRANSFORMER_BASED_WRAP has no class to wrap.
    """
    blocks, how = _choose(model, plugin, source)
    chosen = {id(block) for block in blocks}
    units = [(name, module) for name, module in model.named_modules() if id(module) in chosen and name]
    if not units and plugin.auto_wrap_policy == "TRANSFORMER_BASED_WRAP":
        _refuse_no_class(model, how)
    elif not units and plugin.auto_wrap_policy != "NO_WRAP":
        _refuse_one_big_unit(model, how)
    classes = Counter(class_name(module) for _, module in units)
    # named_modules() lists outer modules first; an inner unit must be sharded before the one that contains it.
    return Units(tuple(name for name, _ in reversed(units)), tuple(classes.items()), how)


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of modules of a class of which the model has several: compiled once, they are used often.

    Args:
        model: Of any size.

    Returns:
        Inner blocks before outer ones; empty if nothing is repeated.
    """
    from paceline.config import FullyShardedDataParallelPlugin

    chosen = {id(block) for block in _choose(model, FullyShardedDataParallelPlugin())[0]}
    named = [(name, module) for name, module in model.named_modules() if id(module) in chosen and name]
    counts = Counter(class_name(module) for _, module in named)
    return [name for name, module in reversed(named) if counts[class_name(module)] > 1]


def _choose(model: nn.Module, plugin: FullyShardedDataParallelPlugin, source: str = "") -> tuple[list[nn.Module], str]:
    if plugin.auto_wrap_policy == "NO_WRAP":
        return [], "NO_WRAP"
    if plugin.auto_wrap_policy == "SIZE_BASED_WRAP":
        minimum = plugin.min_num_params
        return list(_by_size(model, minimum)), f"at least {minimum:,} parameters each"
    if plugin.transformer_cls_names_to_wrap:
        names = plugin.transformer_cls_names_to_wrap
        present = _class_names(model)
        unknown = [name for name in names if name not in present]
        if unknown:
            found = dict.fromkeys(map(class_name, _without_names(model)[0]))
            candidates = [name for name in present if name != class_name(model)]
            raise UnknownBlockError(unknown, candidates, found=found, source=source)
        return _by_class(model, names), f"class {', '.join(names)} as configured"
    return _without_names(model)


def _without_names(model: nn.Module) -> tuple[list[nn.Module], str]:
    hint = [name for name in getattr(model, "_no_split_modules", None) or () if name in _class_names(model)]
    if hint:
        return _by_class(model, hint), "the model's own _no_split_modules"
    repeated = _by_structure(model)
    return repeated, "repeated blocks" if repeated else "no repeated blocks"


def _by_class(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    wanted = set(names)
    return [module for module in model.modules() if class_name(module) in wanted]


def class_name(module: nn.Module) -> str:
    """The name of a module's class, without the prefix that sharding adds."""
    kind = type(module)
    # Nothing is sharded where FSDP2 was never imported, which takes half a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and issubclass(kind, fsdp.FSDPModule) and len(kind.__bases__) > 1:
        # fully_shard makes `FSDPBlock(FSDPModule, Block)` of it.
        kind = kind.__bases__[1]
    return kind.__name__


def _class_names(model: nn.Module) -> list[str]:
    """The class names in the model, the one with most parameters first."""
    sizes: dict[str, int] = {}
    for module in model.modules():
        if not isinstance(module, _CONTAINERS):
            size = sum(p.numel() for p in module.parameters())
            sizes[class_name(module)] = max(size, sizes.get(class_name(module), 0))
    return sorted(sizes, key=lambda name: -sizes[name])


def _by_size(model: nn.Module, minimum: int) -> Iterator[nn.Module]:
    """Yield the smallest modules with at least `minimum` parameters that are in no module yielded before.

    A module with one of two tied weights is left to the unit that contains both.
    """
    taken: set[int] = set()
    for module in reversed(list(model.modules())):
        if module is model or isinstance(module, _CONTAINERS) or _splits_tied_weights(model, module):
            continue
        own = {id(p): p for p in module.parameters() if id(p) not in taken}
        if own and sum(p.numel() for p in own.values()) >= minimum:
            taken.update(own)
            yield module


def _splits_tied_weights(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module outside of `module` shares a parameter with it."""
    own = {id(p) for p in module.parameters()}
    inside = set(module.modules())
    return any(
        id(p) in own for other in model.modules() if other not in inside for p in other.parameters(recurse=False)
    )


def _by_structure(model: nn.Module) -> list[nn.Module]:
    """Take the outermost families of siblings of one class in a ModuleList, else in a Sequential."""
    for container in (nn.ModuleList, nn.Sequential):
        families = [
            family for module in model.modules() if isinstance(module, container) for family in _families(module)
        ]
        if families:
            outer = [f for f in families if not any(_inside(f[0], g) for g in families if g is not f)]
            return [module for family in outer for module in family]
    return []


def _families(container: nn.Module) -> Iterator[list[nn.Module]]:
    by_class: dict[type, list[nn.Module]] = {}
    for child in container.children():
        # A bare Linear is not a block: gathering layers one by one costs more than it saves.
        if any(True for _ in child.children()) and any(True for _ in child.parameters()):
            by_class.setdefault(type(child), []).append(child)
    yield from (family for family in by_class.values() if len(family) > 1)


def _inside(module: nn.Module, family: list[nn.Module]) -> bool:
    return any(module is inner for block in family for inner in block.modules())


def _refuse_no_class(model: nn.Module, how: str) -> None:
    raise PrepareError(
        f"fsdp_auto_wrap_policy is TRANSFORMER_BASED_WRAP, and {type(model).__name__} has no class to wrap ({how})",
        "No class is configured, and the model has neither _no_split_modules nor repeated blocks",
        "Name classes in fsdp_transformer_layer_cls_to_wrap "
        f"({', '.join(_class_names(model)[1:12]) or 'it has none'}), or set NO_WRAP to shard it as one unit",
    )


def _refuse_one_big_unit(model: nn.Module, how: str) -> None:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > BIG_MODEL_BYTES:
        raise PrepareError(
            f"{type(model).__name__} has {size / 1e9:.1f} GB of parameters and no block to shard on its own ({how})",
            "As one unit it would be gathered whole in every forward, which saves no memory",
            "Name the class of its repeated blocks in fsdp_transformer_layer_cls_to_wrap; its classes are "
            f"{', '.join(_class_names(model)[1:12])}",
        )
