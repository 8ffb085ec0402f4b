"""A run's whole training state: what is in it, how it goes to disk and comes back, under any strategy.

Tensors go by the names that they have in the user's own modules, so ranks, strategies and engines may differ between
saving and loading. Everything else is JSON. Nothing that is loaded is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint import Manifest, Slot, TensorShard, from_plain, rank_document, to_plain
from paceline.checkpoint.folder import TRAINING
from paceline.checkpoint.format.layout import dtype_named
from paceline.environment.generators import generators_state, load_generators_state
from paceline.environment.logging import get_logger
from paceline.errors import CheckpointError, StateError, named
from paceline.stepping import steps_taken
from paceline.strategies.adapters import frozen_base, is_adapted
from paceline.training_state.registered_tensors import (
    LiveTensors,
    give_back,
    is_sharded,
    refuse_placeholders,
    split_sharded,
    state_name,
)
from paceline.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from paceline.checkpoint import Checkpoint
    from paceline.checkpoint.writing import Content
    from paceline.data import PreparedDataLoader
    from paceline.precision import LossScaler
    from paceline.stepping import AcceleratedOptimizer, AcceleratedScheduler
    from paceline.strategies import Strategy
    from paceline.training_state.registered_tensors import Room

__all__ = ["TrainingState"]

_LOG = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Everything that changes while a run trains.

    Attributes:
        strategy: In force.
        models: As `prepare` returned them.
        optimizers: As `prepare` returned them.
        schedulers: As `prepare` returned them.
        loaders: As `prepare` returned them.
        scaler: Of fp16, where the strategy's engine has none.
        custom: Objects of the script with `state_dict` and `load_state_dict`.
        omitted: Models whose weights somebody else saves and loads.
    """

    strategy: Strategy
    models: Sequence[nn.Module]
    optimizers: Sequence[AcceleratedOptimizer]
    schedulers: Sequence[AcceleratedScheduler]
    loaders: Sequence[PreparedDataLoader]
    scaler: LossScaler | None
    custom: Sequence[Any]
    omitted: Sequence[nn.Module] = ()

    def without_weights(self, models: Sequence[nn.Module]) -> TrainingState:
        """The same state less the weights of some models."""
        return replace(self, omitted=models)

    # Out

    def take(self) -> tuple[Content, set[str]]:
        """What this rank brings to a checkpoint, in live memory, and which parts only an optimizer's step changes.

        Raises:
            StateError: Something cannot be saved; names it.
        """
        from paceline.checkpoint.writing import Common, Content

        left_out = self._frozen_bases()
        shards = {name: part for name, part in self.model_parts().items() if name not in left_out}
        groups = self._optimizer_parts(shards)
        documents = {rank_document(self._rank): json.dumps(self._own())}
        tensors: dict[str, Tensor] = {}
        training = self._training(groups, tensors)
        self._check_custom(tensors, shards)
        sharded, whole = split_sharded(tensors)
        training["sharded"] = sorted(sharded)
        shards |= sharded
        common = Common()
        if self._rank == 0:
            common = Common(whole, {TRAINING: json.dumps(training), **self._model_config()})
        content = Content(shards=shards, documents=documents, common=common, facts=self._facts())
        return content, self._updated_by_step(shards)

    def _check_custom(self, tensors: Mapping[str, Tensor], shards: Mapping[str, TensorShard]) -> None:
        """Refuse copies of parameters that hold nothing, because the engine had released them."""
        if not any(tensor.numel() == 0 for tensor in tensors.values()):
            return
        released, count = [], 0
        for model in self.models:
            named_parameters = dict(self.strategy.named_parameters(model))
            count += len(named_parameters)
            empty = [name for name, parameter in named_parameters.items() if parameter.numel() == 0]
            held = self.strategy.model_state(model) if empty else {}
            released += [name for name in empty if name in held and held[name].numel]
        refuse_placeholders(tensors, released, count)

    def _training(self, groups: list[dict[str, Any]], tensors: dict[str, Tensor]) -> dict[str, Any]:
        def plain(states: Sequence[Any], what: str) -> list[Any]:
            return [to_plain(s.state_dict(), f"{what}_{index}/state", tensors) for index, s in enumerate(states)]

        return {
            "optimizers": groups,
            "schedulers": plain(self.schedulers, "scheduler"),
            "scaler": None if self.scaler is None else to_plain(self.scaler.state_dict(), "scaler/state", tensors),
            "engine": to_plain(self.strategy.engine_state(), "engine/state", tensors),
            "engine_settings": self.strategy.settings,
            "custom": [to_plain(item.state_dict(), state_name(i), tensors) for i, item in enumerate(self.custom)],
        }

    def _own(self) -> dict[str, Any]:
        return {
            "loaders": [to_plain(s.state_dict(), f"loader_{index}") for index, s in enumerate(self.loaders)],
            "generators": to_plain(generators_state(self.strategy.context.device), "generators"),
        }

    def _facts(self) -> Manifest:
        position = self.loaders[0].state_dict() if self.loaders else {}
        ties: dict[str, str] = {}
        for index, model in enumerate(self.models):
            family = numbered("model", index)
            pairs = self.strategy.tied_names(model).items()
            ties.update((f"{family}/{alias}", f"{family}/{name}") for alias, name in pairs)
        left_out = self._frozen_bases()
        return Manifest(
            id="",
            paceline=__version__,
            torch=torch.__version__,
            created=datetime.now(timezone.utc).isoformat(),
            step=steps_taken(self.optimizers),
            epoch=int(position.get("epoch", 0)),
            samples=int(position.get("samples", 0)),
            world_size=self.strategy.context.group.size,
            strategy=self.strategy.name,
            mixed_precision=self.strategy.context.precision.mode,
            ties={alias: name for alias, name in ties.items() if name not in left_out},
        )

    def _model_config(self) -> dict[str, str]:
        """The description that transformers reads beside a model's weights."""
        model = self.strategy.unwrap(self.models[0]) if self.models else None
        # Beside adapters it would say that the base model is here.
        config = None if model is None or is_adapted(model) else getattr(model, "config", None)
        text = getattr(config, "to_json_string", None)
        return {"config.json": str(text())} if callable(text) else {}

    def _updated_by_step(self, shards: Mapping[str, TensorShard]) -> set[str]:
        """Names of what an optimizer updates, and of its own state."""
        stepped = {id(p) for wrapper in self.optimizers for p in self.strategy.parameters_of(wrapper.optimizer)}
        names = {f"{self._family(name)}" for key, name in self.names().items() if key in stepped}
        return {name for name in shards if name in names or name.startswith("optimizer")}

    @staticmethod
    def _family(name: str) -> str:
        return name if name.startswith("model_") and "/" in name else f"model/{name}"

    # In

    def load(self, checkpoint: Checkpoint, *, strict: bool = True) -> None:
        """Bring everything back, whatever the ranks and the strategy that saved it.

        Collective: every rank must call it.

        Raises:
            CheckpointError: It is damaged, or holds other tensors than this run.
            StateError: A state does not fit what was prepared.
        """
        from paceline.checkpoint.writing import load_shards, run_on_all_ranks

        # Damage that only one rank sees must reach the others before they wait for it.
        run_on_all_ranks(
            self._group, "read", checkpoint.folder, lambda: (checkpoint.training, checkpoint.of_rank(self._rank))
        )
        training = checkpoint.training
        self._make_room(checkpoint, training, strict=strict)
        shards = self.model_parts()
        self._optimizer_parts(shards)
        known = self._check_names(checkpoint, shards, strict=strict)
        live = LiveTensors(self.custom)
        rooms = self._rooms(checkpoint, live)
        self._tell_unsharded(training, live)
        load_shards(checkpoint, {**known, **{name: room.part for name, room in rooms.items()}}, self._group)
        self.strategy.state_written()
        self._load_training(training, {name: room.tensor() for name, room in rooms.items()}, live, strict=strict)
        self._load_own(checkpoint, strict=strict)

    def _make_room(self, checkpoint: Checkpoint, training: Mapping[str, Any], *, strict: bool) -> None:
        for index, (wrapper, held) in enumerate(_pairs(training, "optimizers", self.optimizers, strict=strict)):
            _check_kind(index, from_plain(held["groups"]), wrapper.param_groups)
            names = self.names()
            slots = _slots(checkpoint, f"{numbered('optimizer', index)}/")
            self.strategy.make_slots(wrapper.optimizer, names, slots, held["numbers"])
            self.strategy.set_groups(wrapper.optimizer, names, from_plain(held["groups"]))
            wrapper.num_steps = int(held["steps"])

    def _check_names(
        self, checkpoint: Checkpoint, shards: Mapping[str, TensorShard], *, strict: bool
    ) -> dict[str, TensorShard]:
        held = checkpoint.manifest.tensors
        left_out = self._frozen_bases()
        missing = [name for name in shards if name not in held and name not in left_out]
        ours = [name for name in held if name.partition("/")[0].partition("_")[0] in ("model", "optimizer")]
        unexpected = [name for name in ours if name not in shards]
        sides = [f"missing from it: {named(missing)}"] if missing else []
        sides += [f"only in it: {named(unexpected)}"] if unexpected else []
        if sides and strict:
            raise CheckpointError(
                f"{checkpoint.folder} holds other tensors than this run",
                "; ".join(sides),
                "Build the same model and optimizer, or load with strict=False",
            )
        if sides:
            _LOG.warning("%s holds other tensors than this run; %s", checkpoint.folder, "; ".join(sides))
        return {name: part for name, part in shards.items() if name in held}

    def _rooms(self, checkpoint: Checkpoint, live: LiveTensors) -> dict[str, Room]:
        """Room for the tensors of schedulers and of the script's own objects."""
        return {
            name: live.room(name, record.shape, dtype_named(record.dtype))
            for name, record in checkpoint.manifest.tensors.items()
            if name.partition("_")[0] in ("custom", "scheduler") or name.startswith(("scaler/", "engine/"))
        }

    def _tell_unsharded(self, training: Mapping[str, Any], live: LiveTensors) -> None:
        """Say which tensors were sharded and come back whole, where the object could have them sharded again."""
        whole = [name for name in training.get("sharded", ()) if name not in live]
        if whole and any(is_sharded(p) for model in self.models for p in model.parameters()):
            _LOG.warning(
                "%s was saved sharded and comes back whole: the registered object holds nothing there yet. Give it "
                "its tensors before load_state (an average of parameters: from the prepared model)",
                named(whole),
            )

    def _load_training(
        self, training: Mapping[str, Any], tensors: Mapping[str, Tensor], live: LiveTensors, *, strict: bool
    ) -> None:
        self.strategy.load_engine_state(from_plain(training.get("engine") or {}, tensors))
        for scheduler, held in _pairs(training, "schedulers", self.schedulers, strict=strict):
            scheduler.load_state_dict(from_plain(held, tensors))
        for index, (item, held) in enumerate(_pairs(training, "custom", self.custom, strict=strict)):
            give_back(index, item, from_plain(held, tensors), tensors, live)
        if self.scaler is not None and training.get("scaler"):
            self.scaler.load_state_dict(from_plain(training["scaler"], tensors))

    def _load_own(self, checkpoint: Checkpoint, *, strict: bool) -> None:
        saved = checkpoint.of_rank(self._rank)
        own = saved or checkpoint.of_rank(0) or {}
        if own.get("loaders", ()) is None:
            _LOG.info("%s holds no positions of loaders: the next pass begins an epoch", checkpoint.folder)
        else:
            for loader, held in _pairs(own, "loaders", self.loaders, strict=strict):
                loader.load_state_dict(from_plain(held))
        if saved is not None and saved["generators"]:
            load_generators_state(from_plain(saved["generators"]), self.strategy.context.device)
        size = checkpoint.manifest.world_size
        if size != self._group.size:
            # A generator belongs to a rank; there is no right answer for more of them, or fewer.
            _LOG.info(
                "%s was saved by %d ranks and is loaded by %d: random generators of ranks from %d on go on as they are",
                checkpoint.folder, size, self._group.size, min(size, self._group.size),
            )  # fmt: skip

    # What it is made of

    @property
    def _group(self) -> Any:
        return self.strategy.context.group

    @property
    def _rank(self) -> int:
        rank: int = self._group.rank
        return rank

    def names(self) -> dict[int, str]:
        """The names of all parameters by identity; those of further models begin with their family."""
        names: dict[int, str] = {}
        for index, model in enumerate(self.models):
            prefix = f"{numbered('model', index)}/" if index else ""
            for name, parameter in self.strategy.named_parameters(model):
                names.setdefault(id(parameter), prefix + name)
        return names

    def model_parts(self) -> dict[str, TensorShard]:
        """This rank's part of every weight that is not left to somebody else, by its name in a checkpoint."""
        return {
            f"{numbered('model', index)}/{name}": part
            for index, model in enumerate(self.models)
            if not any(model is other for other in self.omitted)
            for name, part in self.strategy.model_state(model).items()
        }

    def _frozen_bases(self) -> set[str]:
        """Weights that no checkpoint holds: of base models under PEFT's adapters, as they came from elsewhere."""
        trained = {id(p) for wrapper in self.optimizers for p in self.strategy.parameters_of(wrapper.optimizer)}
        return {
            f"{numbered('model', index)}/{name}"
            for index, model in enumerate(self.models)
            for name in frozen_base(self.strategy.unwrap(model), self.strategy.named_parameters(model), trained)
        }

    def _optimizer_parts(self, shards: dict[str, TensorShard]) -> list[dict[str, Any]]:
        """Add the optimizers' tensors to `shards`; return what else there is to each."""
        found = []
        for index, wrapper in enumerate(self.optimizers):
            state = self.strategy.optimizer_state(wrapper.optimizer, self.names())
            family = numbered("optimizer", index)
            for name, slots in state.slots.items():
                shards.update((f"{family}/{name}/{key}", part) for key, part in slots.items())
            found.append({"groups": state.groups, "numbers": state.numbers, "steps": wrapper.num_steps})
        return found


def numbered(what: str, index: int) -> str:
    """The name of a family of tensors: `model`, `model_1`, `model_2`..."""
    return f"{what}_{index}" if index else what


def _slots(checkpoint: Checkpoint, prefix: str) -> dict[str, dict[str, Slot]]:
    found: dict[str, dict[str, Slot]] = {}
    for full, record in checkpoint.manifest.tensors.items():
        if full.startswith(prefix):
            name, _, key = full.removeprefix(prefix).rpartition("/")
            found.setdefault(name, {})[key] = Slot(record.shape, dtype_named(record.dtype))
    return found


_SPOKEN = {"custom": "registered objects"}


def _pairs(saved: Mapping[str, Any], what: str, mine: Sequence[Any], *, strict: bool) -> list[tuple[Any, Any]]:
    held = saved.get(what) or []
    seen = f"The checkpoint holds {len(held)} {_SPOKEN.get(what, what)}, and there are {len(mine)} here"
    if len(held) != len(mine) and strict:
        raise StateError(
            seen,
            "They are matched by the order in which they were prepared or registered",
            "Prepare and register the same objects in the same order before load_state, or load with strict=False, "
            "which leaves the others out",
        )
    if len(held) != len(mine):
        _LOG.warning("%s: the first %d were loaded", seen, min(len(held), len(mine)))
    return list(zip(mine, held, strict=False))


_OF_SCHEDULES = {"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


def _check_kind(index: int, saved: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the state of another kind of optimizer: each has numbers that the other does not know.

    Only numbers tell: switches come and go with versions, and engines have some of their own.
    """

    def numbers(groups: Sequence[Mapping[str, Any]]) -> set[str]:
        return {
            key
            for group in groups
            for key, value in group.items()
            if key != "params" and isinstance(value, (int, float, list, tuple)) and not isinstance(value, bool)
        } - _OF_SCHEDULES

    theirs, ours = numbers(saved) - numbers(mine), numbers(mine) - numbers(saved)
    if saved and mine and theirs and ours:
        raise StateError(
            f"Optimizer {index} of the checkpoint has {named(sorted(theirs))}, and the one here {named(sorted(ours))}",
            "They are of different kinds, and the state of one means nothing to the other",
            "Make the optimizer that was saved; for the weights alone, prepare the model without one and load with "
            "strict=False",
        )
