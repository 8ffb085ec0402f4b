"""Which modules are sharded and gathered as one unit, and how they were found."""

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

# A model above this with a single unit would be gathered whole in every forward: no memory saved at all.
BIG_MODEL_BYTES = 1_000_000_000

# Modules that only hold others: they are never called, so their parameters would never be gathered.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True)
class Units:
    """The blocks of a model, inner ones before outer ones; what is in none belongs to the root.

    Attributes:
        names: Where each block stands in the model.
        classes: How many blocks of each class.
        how: How they were found, as half a sentence.
    """

    names: tuple[str, ...]
    classes: tuple[tuple[str, int], ...]
    how: str

    def __str__(self) -> str:
        if not self.names:
            return f"1 unit: the whole model ({self.how})"
        parts = " + ".join(f"{count} {name}" for name, count in self.classes)
        return f"{len(self.names) + 1} units: {parts} + the rest ({self.how})"


def find_units(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> Units:
    """Find the blocks of `model` by class name, by its own hint, by size or by repeated structure.

    Raises:
        UnknownBlockError: A class was named that the model does not have.
        PrepareError: A big model came out as one unit, or TRANSFORMER_BASED_WRAP found no class to wrap.
    """
    blocks, how = _choose(model, plugin)
    chosen = {id(block) for block in blocks}
    found = [(name, module) for name, module in model.named_modules() if id(module) in chosen and name]
    if not found and plugin.auto_wrap_policy == "TRANSFORMER_BASED_WRAP":
        _refuse_no_class(model, how)
    elif not found and plugin.auto_wrap_policy != "NO_WRAP":
        _refuse_one_big_unit(model, how)
    classes = Counter(class_name(module) for _, module in found)
    # named_modules() goes from the outside in; an inner unit must be sharded before the one around it.
    return Units(tuple(name for name, _ in reversed(found)), tuple(classes.items()), how)


def _choose(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> tuple[list[nn.Module], str]:
    if plugin.auto_wrap_policy == "NO_WRAP":
        return [], "no wrapping was asked for"
    if plugin.auto_wrap_policy == "SIZE_BASED_WRAP":
        least = plugin.min_num_params
        return list(_by_size(model, least)), f"at least {least:,} parameters each"
    if plugin.transformer_cls_names_to_wrap:
        names = plugin.transformer_cls_names_to_wrap
        return _by_class(model, names), f"class {', '.join(names)} as named"
    hint = [name for name in getattr(model, "_no_split_modules", None) or () if name in _class_names(model)]
    if hint:
        return _by_class(model, hint), "the model's own _no_split_modules"
    repeated = _by_structure(model)
    return repeated, "found as repeated blocks" if repeated else "no block of it is repeated"


def _by_class(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    present = _class_names(model)
    unknown = [name for name in names if name not in present]
    if unknown:
        raise UnknownBlockError(unknown, [name for name in present if name != class_name(model)])
    wanted = set(names)
    return [module for module in model.modules() if class_name(module) in wanted]


def class_name(module: nn.Module) -> str:
    """The name of a module's class; of one that is sharded, that which it had before."""
    kind = type(module)
    # Nothing is sharded where FSDP2 was never imported, which takes half a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and issubclass(kind, fsdp.FSDPModule) and len(kind.__bases__) > 1:
        # fully_shard makes `FSDPBlock(FSDPModule, Block)` of it.
        kind = kind.__bases__[1]
    return kind.__name__


def _class_names(model: nn.Module) -> list[str]:
    """The class names in the model, those with most parameters first."""
    sizes: dict[str, int] = {}
    for module in model.modules():
        if not isinstance(module, _CONTAINERS):
            size = sum(p.numel() for p in module.parameters())
            sizes[class_name(module)] = max(size, sizes.get(class_name(module), 0))
    return sorted(sizes, key=lambda name: -sizes[name])


def _by_size(model: nn.Module, least: int) -> Iterator[nn.Module]:
    """Yield the smallest modules that hold `least` parameters not held by a smaller one yielded before.

    A module that holds one half of a tie is left to the unit around both halves.
    """
    taken: set[int] = set()
    for module in reversed(list(model.modules())):
        if module is model or isinstance(module, _CONTAINERS) or _cuts_a_tie(model, module):
            continue
        own = {id(p): p for p in module.parameters() if id(p) not in taken}
        if own and sum(p.numel() for p in own.values()) >= least:
            taken.update(own)
            yield module


def _cuts_a_tie(model: nn.Module, module: nn.Module) -> bool:
    """Whether a parameter of `module` is also held by a module outside it."""
    own = {id(p) for p in module.parameters()}
    inside = set(module.modules())
    return any(
        id(p) in own for other in model.modules() if other not in inside for p in other.parameters(recurse=False)
    )


def _by_structure(model: nn.Module) -> list[nn.Module]:
    """Take the largest family of like siblings: modules of one class in one ModuleList, else one Sequential."""
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
        # A bare Linear is a layer, not a block: gathering layers one by one costs more than it saves.
        if any(True for _ in child.children()) and any(True for _ in child.parameters()):
            by_class.setdefault(type(child), []).append(child)
    yield from (family for family in by_class.values() if len(family) > 1)


def _inside(module: nn.Module, family: list[nn.Module]) -> bool:
    return any(module is inner for block in family for inner in block.modules())


def _refuse_no_class(model: nn.Module, how: str) -> None:
    raise PrepareError(
        f"fsdp_auto_wrap_policy is TRANSFORMER_BASED_WRAP, and {type(model).__name__} has no class to wrap ({how})",
        "No class is named, the model has no _no_split_modules, and no block of it is repeated",
        "Name classes in fsdp_transformer_layer_cls_to_wrap "
        f"({', '.join(_class_names(model)[1:12]) or 'it has none'}), or set NO_WRAP to shard it as one unit",
    )


def _refuse_one_big_unit(model: nn.Module, how: str) -> None:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > BIG_MODEL_BYTES:
        raise PrepareError(
            f"{type(model).__name__} has {size / 1e9:.1f} GB of parameters and no block to shard on its own ({how})",
            "As one unit it would be gathered whole in every forward, so nothing would be saved",
            "Name the class of its repeated blocks in fsdp_transformer_layer_cls_to_wrap; its classes are "
            f"{', '.join(_class_names(model)[1:12])}",
        )
