"""fp8: which linear layers multiply in 8-bit floats, and how torchao's layers take their place.

The weights stay what they are, fp32 masters, so checkpoints are those of a bf16 run. A layer is changed in place: its
class becomes torchao's, and its hooks, names, parameters and everything that refers to it stay.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from paceline.errors import MissingExtraError, PrepareError, did_you_mean
from paceline.strategies.precision.fp8_gathering import GatheredWeights
from paceline.strategies.precision.fp8_layers import ORIGINAL, plain_local

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from paceline.config import FP8Config

__all__ = ["Fp8Layers", "convert_layers"]

# What the tensor cores multiply in one go.
_MULTIPLE = 16


@dataclass(slots=True)
class Fp8Layers:
    """The linear layers of one model that multiply in fp8.

    Attributes:
        names: Their names in the model.
        left: Why other linear layers stay in bf16, and how many for each reason.
        recipe: How they are scaled.
        gathered: Those whose weights FSDP2 gathers in fp8.
    """

    names: list[str]
    left: Counter[str]
    recipe: str
    _config: Any
    gathered: GatheredWeights = field(default_factory=GatheredWeights)

    def describe(self) -> str:
        """Say in one line which layers are converted, and why others are not."""
        ends = Counter(name.rpartition(".")[2] for name in self.names)
        which = ", ".join(f"{count} {end}" for end, count in ends.items())
        kept = "; ".join(f"{count} {reason}" for reason, count in self.left.items())
        gathered = "; weights are gathered in fp8" if self.gathered else ""
        return f"fp8 {self.recipe}: {which}{gathered}" + (f"; in bf16: {kept}" if kept else "")

    def gather_in_fp8(
        self, modules: Iterable[nn.Module], replace: Callable[[nn.Parameter, nn.Parameter], None], num_shards: int
    ) -> None:
        """Let FSDP2 gather the weights of these modules' fp8 layers in fp8; call it just before they are sharded.

        Args:
            modules: Any modules; those that are not fp8 layers are passed over.
            replace: Puts a new parameter in place of an old one.
            num_shards: Over how many ranks a weight is divided.
        """
        if not self._config.enable_fsdp_float8_all_gather:
            return
        for layer in modules:
            if ORIGINAL not in vars(layer):
                continue
            weight: Any = layer.weight
            if len(weight) % num_shards:
                # torchao casts a shard without the rows that FSDP2 adds, so ranks would gather different sizes.
                continue
            self.gathered.add(layer)
            is_plain = plain_local(weight) is weight
            if is_plain:
                # torchao wraps the weight of a layer that it makes; the layer itself is here already.
                bare = nn.Linear(1, 1, bias=False, device="meta")
                bare.weight = weight
                replace(weight, _torchao_layer(bare, self._config).weight)


def convert_layers(
    model: nn.Module, settings: FP8Config | None, blocks: Collection[str], *, gathers: bool = False
) -> Fp8Layers:
    """Let the large linear layers of a model multiply in fp8.

    Args:
        model: Changed in place.
        settings: Which layers, and how they are scaled.
        blocks: Names of the model's repeated blocks: a layer outside of them may be its last one.
        gathers: Whether FSDP2 will gather its weights.

    Raises:
        MissingExtraError: torchao is not installed.
        PrepareError: No layer can be converted, or a name in `exclude` is in no layer's name.
    """
    from paceline.config import FP8Config

    settings = settings or FP8Config()
    config = _torchao_config(settings, gathers=gathers)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    _check_excluded(linears, settings)
    last = _last_layers(model, linears, blocks)
    chosen: list[str] = []
    left: Counter[str] = Counter()
    for name, layer in linears.items():
        reason = _why_not(name, layer, settings, last)
        if reason:
            left[reason] += 1
        else:
            chosen.append(name)
    if not chosen:
        found = ", ".join(f"{count} {reason}" for reason, count in left.items()) or "it has no linear layer"
        raise PrepareError(
            f"mixed_precision is fp8, and no layer of {type(model).__name__} can be converted ({found})",
            "Nothing would be computed in fp8",
            "Use mixed_precision='bf16'"
            + (", or set fp8_skip_small_layers to false" if settings.skip_small_layers else ""),
        )
    for name in chosen:
        _convert(linears[name], config)
    return Fp8Layers(chosen, left, settings.recipe, config)


def _torchao_config(settings: FP8Config, *, gathers: bool) -> Any:
    try:
        from torchao.float8 import Float8LinearConfig
    except ImportError as error:
        raise MissingExtraError("torchao", "torchao", "mixed_precision='fp8'") from error
    from dataclasses import replace

    tensorwise = settings.recipe == "tensorwise"
    return replace(
        Float8LinearConfig.from_recipe_name(settings.recipe),
        enable_fsdp_float8_all_gather=gathers and tensorwise and settings.enable_fsdp_float8_all_gather,
        pad_inner_dim=settings.pad_inner_dim,
        emulate=settings.emulate,
    )


def _torchao_layer(layer: nn.Linear, config: Any) -> Any:
    from torchao.float8 import convert_to_float8_training

    return convert_to_float8_training(layer, config=config)


def _convert(layer: nn.Linear, config: Any) -> None:
    """Change the class of a layer to torchao's, with the attributes that it adds."""
    from dataclasses import replace

    made = _torchao_layer(
        nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta"),
        replace(config, enable_fsdp_float8_all_gather=False),
    )
    added = {name: value for name, value in vars(made).items() if name not in vars(layer)}
    if "config" in added:
        added["config"] = config
    vars(layer).update(added)
    vars(layer)[ORIGINAL] = (type(layer), tuple(added))
    layer.__class__ = type(made)


def _check_excluded(names: Iterable[str], settings: FP8Config) -> None:
    listed = list(names)
    for part in settings.exclude:
        if not any(part in name for name in listed):
            ends = {name.rpartition(".")[2] for name in listed}
            raise PrepareError(
                f"fp8_exclude names {part!r}, and no linear layer has that in its name",
                "The layer that it means would be computed in fp8",
                did_you_mean(part, ends) or f"Layers are called {', '.join(sorted(ends)[:8])}",
            )


def _last_layers(model: nn.Module, linears: dict[str, nn.Linear], blocks: Collection[str]) -> set[int]:
    """The output layer, whose rounding errors go straight into the loss: `id`s of the model's own, tied and last."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = {id(output)}
    for inner in model.modules():
        method = getattr(inner, "get_output_embeddings", None)
        if callable(method) and inner is not model:
            found.add(id(method()))
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found |= {id(layer) for layer in linears.values() if id(layer.weight) in embedded}
    name = next(reversed(linears), None)
    if name is not None and not any(name.startswith(f"{block}.") for block in blocks):
        found.add(id(linears[name]))
    return found


def _why_not(name: str, layer: nn.Linear, settings: FP8Config, last: set[int]) -> str:
    """Why a layer stays in bf16; empty if it does not."""
    rows, columns = layer.out_features, layer.in_features
    if id(layer) in last:
        return "last"
    if any(part in name for part in settings.exclude):
        return "excluded"
    if rows % _MULTIPLE or columns % _MULTIPLE:
        return f"not divisible by {_MULTIPLE}"
    if settings.skip_small_layers and _is_small(rows, columns, settings.recipe):
        return "too small"
    return ""


def _is_small(rows: int, columns: int, recipe: str) -> bool:
    """Whether fp8 is slower than bf16, as torchao's authors measured on an H100 with 16,384 tokens."""
    if recipe == "tensorwise":
        return columns <= 4096 and rows <= 1024
    return rows <= 2048 or columns <= 1024 or (rows <= 4096 and columns <= 2048)
