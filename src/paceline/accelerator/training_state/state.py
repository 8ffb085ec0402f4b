"""A run's complete training state: what it consists of, and how it is saved and loaded under any strategy.

Tensors have the names of the user's own modules, so the number of ranks and the strategy may differ between saving
and loading. Everything else is JSON. Nothing is unpickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from paceline.accelerator.stepping import steps_taken
from paceline.accelerator.training_state.attributes import attribute_owners
from paceline.accelerator.training_state.registered_tensors import (
    LiveTensors,
    refuse_placeholders,
    restore_object,
    split_sharded,
    state_name,
)
from paceline.checkpoint import Manifest, Slot, TensorShard, from_plain, numbered, rank_document, to_plain
from paceline.checkpoint.folder import TRAINING
from paceline.checkpoint.format.layout import DTYPE_CODES, dtype_name, dtype_named
from paceline.environment.logging import get_logger
from paceline.environment.random_generators import get_rng_states, set_rng_states
from paceline.errors import CheckpointError, StateError, counted, named
from paceline.strategies.adapters import frozen_base, is_adapted
from paceline.strategies.state import is_dtensor, saved_buffers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from paceline.accelerator.stepping import AcceleratedOptimizer, AcceleratedScheduler, LossScaler
    from paceline.accelerator.training_state.attributes import AttributeState
    from paceline.accelerator.training_state.registered_tensors import LoadTarget
    from paceline.checkpoint import Checkpoint
    from paceline.checkpoint.save_load import Content
    from paceline.collectives import Group
    from paceline.data import PreparedDataLoader
    from paceline.strategies import Strategy

__all__ = ["TrainingState", "name_differences"]

_LOG = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Everything that changes while a run trains.

    Attributes:
        strategy: The strategy of the run.
        models: Prepared models.
        optimizers: Prepared optimizers.
        schedulers: Prepared schedulers.
        loaders: Prepared loaders.
        scaler: The fp16 loss scaler; None if there is none, or the engine has its own.
        attributes: What of models and optimizers is not in their tensors.
        custom: Registered objects with `state_dict` and `load_state_dict`.
        omitted: Models whose weights are saved and loaded by hooks.
    """

    strategy: Strategy
    models: Sequence[nn.Module]
    optimizers: Sequence[AcceleratedOptimizer]
    schedulers: Sequence[AcceleratedScheduler]
    loaders: Sequence[PreparedDataLoader]
    scaler: LossScaler | None
    attributes: AttributeState
    custom: Sequence[Any]
    omitted: Sequence[nn.Module] = ()

    def without_weights(self, models: Sequence[nn.Module]) -> TrainingState:
        """The same state without the weights of some models."""
        return replace(self, omitted=models)

    # Saving

    def collect(self) -> tuple[Content, set[str]]:
        """Collect what this rank saves, in live memory.

        Returns:
            The content, and the names of the shards that only an optimizer step changes.

        Raises:
            StateError: Something cannot be saved; names it.
        """
        from paceline.checkpoint.save_load import Common, Content

        frozen = self._frozen_bases()
        shards = {name: shard for name, shard in self.model_shards().items() if name not in frozen}
        # Those of rank 0, as one: batch norm counts on every rank, and each would write some of its own.
        buffers = {name: shards.pop(name) for name in self._buffer_names() if name in shards}
        groups = self._add_optimizer_shards(shards)
        documents = {rank_document(self._rank): json.dumps(self._rank_state())}
        tensors: dict[str, Tensor] = {}
        training = self._training(groups, tensors)
        self._check_custom(tensors, shards)
        sharded, whole = split_sharded(tensors)
        training["sharded"] = sorted(sharded)
        shards |= sharded
        common = Common()
        if self._rank == 0:
            common = Common({**whole, **buffers}, {TRAINING: json.dumps(training), **self._model_config()})
        _refuse_dtypes({**shards, **buffers})
        content = Content(shards=shards, documents=documents, common=common, manifest=self._manifest())
        return content, self._updated_by_step(shards)

    def _check_custom(self, tensors: Mapping[str, Tensor], shards: Mapping[str, TensorShard]) -> None:
        """Refuse copies of parameters that are empty because the engine had released them."""
        if not any(tensor.numel() == 0 for tensor in tensors.values()):
            return
        released, count = [], 0
        for model in self.models:
            named_parameters = dict(self.strategy.named_parameters(model))
            count += len(named_parameters)
            empty = [name for name, parameter in named_parameters.items() if parameter.numel() == 0]
            states = self.strategy.model_state(model) if empty else {}
            released += [name for name in empty if name in states and states[name].numel]
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

    def _rank_state(self) -> dict[str, Any]:
        return {
            "loaders": [to_plain(s.state_dict(), f"loader_{index}") for index, s in enumerate(self.loaders)],
            "generators": to_plain(get_rng_states(self.strategy.context.device), "generators"),
            "attributes": to_plain(self.attributes.capture(self._owners()), "attributes"),
        }

    def _owners(self) -> dict[str, Any]:
        return attribute_owners(self.strategy, self.models, self.optimizers)

    def _manifest(self) -> Manifest:
        position = self.loaders[0].state_dict() if self.loaders else {}
        ties: dict[str, str] = {}
        for index, model in enumerate(self.models):
            family = numbered("model", index)
            pairs = self.strategy.tied_names(model).items()
            ties.update((f"{family}/{alias}", f"{family}/{name}") for alias, name in pairs)
        frozen = self._frozen_bases()
        return Manifest(
            step=steps_taken(self.optimizers),
            epoch=int(position.get("epoch", 0)),
            samples=int(position.get("samples", 0)),
            world_size=self.strategy.context.group.size,
            strategy=self.strategy.name,
            mixed_precision=self.strategy.context.precision.mode,
            ties={alias: name for alias, name in ties.items() if name not in frozen},
        )

    def _model_config(self) -> dict[str, str]:
        """The `config.json` that transformers reads beside a model's weights."""
        if not self.models:
            return {}
        model = self.strategy.unwrap(self.models[0])
        # Beside adapters it would claim that the base model is here.
        config = None if is_adapted(model) else getattr(model, "config", None)
        text = getattr(config, "to_json_string", None)
        return {"config.json": str(text())} if callable(text) else {}

    def _updated_by_step(self, shards: Mapping[str, TensorShard]) -> set[str]:
        """Names of the shards that an optimizer updates, and of its own state."""
        stepped = {id(p) for wrapper in self.optimizers for p in self.strategy.parameters_of(wrapper.optimizer)}
        names = {self._full_name(name) for key, name in self.names().items() if key in stepped}
        return {name for name in shards if name in names or name.startswith("optimizer")}

    @staticmethod
    def _full_name(name: str) -> str:
        if name.startswith("model_") and "/" in name:
            return name
        return f"model/{name}"

    # Loading

    def load(self, checkpoint: Checkpoint, *, strict: bool = True, progress: bool = True) -> None:
        """Load a checkpoint, whatever number of ranks and strategy saved it.

        Collective: every rank must call it.

        Args:
            checkpoint: On this rank's disk; the same save on all ranks.
            strict: Refuse missing and unexpected tensors and objects; if False, log a warning.
            progress: Load everything; if False, only weights, and the state of optimizers that belongs to them.

        Raises:
            CheckpointError: It is damaged, or its tensors do not match those of this run.
            StateError: A state does not fit what was prepared.
        """
        from paceline.checkpoint.save_load import load_shards, run_on_all_ranks

        # Damage that only one rank sees must reach the others before they wait for that rank.
        run_on_all_ranks(
            self._group, "read", checkpoint.folder, lambda: (checkpoint.training, checkpoint.of_rank(self._rank))
        )
        training = checkpoint.training
        steps = [wrapper.num_steps for wrapper in self.optimizers]
        self._allocate_optimizer_state(checkpoint, training, strict=strict)
        shards = self.model_shards()
        self._add_optimizer_shards(shards)
        matching = self._matching(checkpoint, shards, strict=strict)
        if not progress:
            load_shards(checkpoint, matching, self._group)
            self.strategy.state_written()
            for wrapper, taken in zip(self.optimizers, steps, strict=True):
                wrapper.num_steps = taken
            self._load_attributes(checkpoint.of_rank(self._rank) or checkpoint.of_rank(0) or {}, generators=False)
            return
        live = LiveTensors(self.custom)
        targets = self._load_targets(checkpoint, live)
        self._warn_unsharded(training, live)
        load_shards(checkpoint, {**matching, **{name: t.shard for name, t in targets.items()}}, self._group)
        self.strategy.state_written()
        self._load_training(training, {name: t.tensor() for name, t in targets.items()}, live, strict=strict)
        self._load_rank_state(checkpoint, strict=strict)

    def _allocate_optimizer_state(self, checkpoint: Checkpoint, training: Mapping[str, Any], *, strict: bool) -> None:
        for index, (wrapper, saved) in enumerate(_pairs(training, "optimizers", self.optimizers, strict=strict)):
            _check_kind(index, from_plain(saved["groups"]), wrapper.param_groups)
            names = self.names()
            slots = _slots(checkpoint, f"{numbered('optimizer', index)}/")
            self.strategy.make_slots(wrapper.optimizer, names, slots, saved["numbers"])
            self.strategy.set_groups(wrapper.optimizer, names, from_plain(saved["groups"]))
            wrapper.num_steps = int(saved["steps"])

    def _matching(
        self, checkpoint: Checkpoint, shards: Mapping[str, TensorShard], *, strict: bool
    ) -> dict[str, TensorShard]:
        """The shards that the checkpoint has; if strict, it must have all of them and no others."""
        saved = checkpoint.manifest.tensors
        frozen = self._frozen_bases()
        missing = [name for name in shards if name not in saved and name not in frozen]
        unexpected = [name for name in saved if _kind(name) in ("model", "optimizer") and name not in shards]
        problems = name_differences(missing, unexpected)
        if problems and strict:
            raise CheckpointError(
                f"The tensors in {checkpoint.folder} do not match this run",
                "; ".join(problems),
                "Build the same model and optimizer, or load with strict=False",
            )
        if problems:
            _LOG.warning("the tensors in %s do not match this run; %s", checkpoint.folder, "; ".join(problems))
        return {name: shard for name, shard in shards.items() if name in saved}

    def _load_targets(self, checkpoint: Checkpoint, live: LiveTensors) -> dict[str, LoadTarget]:
        """Memory for the tensors of schedulers and of registered objects."""
        return {
            name: live.target(name, record.shape, dtype_named(record.dtype))
            for name, record in checkpoint.manifest.tensors.items()
            if _kind(name) in ("scheduler", "scaler", "engine", "custom")
        }

    def _warn_unsharded(self, training: Mapping[str, Any], live: LiveTensors) -> None:
        """Warn about tensors that were saved sharded and are loaded whole, if the model is sharded in this run."""
        whole = [name for name in training.get("sharded", ()) if name not in live]
        if whole and any(is_dtensor(p) for model in self.models for p in model.parameters()):
            _LOG.warning(
                "%s was saved sharded and is loaded whole: the registered object has no such tensor yet. Create its "
                "tensors before load_state (for an average of parameters, from the prepared model)",
                named(whole),
            )

    def _load_training(
        self, training: Mapping[str, Any], tensors: Mapping[str, Tensor], live: LiveTensors, *, strict: bool
    ) -> None:
        self.strategy.load_engine_state(from_plain(training.get("engine") or {}, tensors))
        for scheduler, saved in _pairs(training, "schedulers", self.schedulers, strict=strict):
            scheduler.load_state_dict(from_plain(saved, tensors))
        for index, (item, saved) in enumerate(_pairs(training, "custom", self.custom, strict=strict)):
            restore_object(index, item, from_plain(saved, tensors), tensors, live)
        if self.scaler is not None and training.get("scaler"):
            self.scaler.load_state_dict(from_plain(training["scaler"], tensors))

    def _load_rank_state(self, checkpoint: Checkpoint, *, strict: bool) -> None:
        own = checkpoint.of_rank(self._rank)
        saved = own or checkpoint.of_rank(0) or {}
        if saved.get("loaders", ()) is None:
            _LOG.info("%s has no loader positions: loaders start a new epoch", checkpoint.folder)
        else:
            for loader, position in _pairs(saved, "loaders", self.loaders, strict=strict):
                loader.load_state_dict(from_plain(position))
        if own is not None and own["generators"]:
            set_rng_states(from_plain(own["generators"]), self.strategy.context.device)
        self._load_attributes(saved, generators=own is not None)
        size = checkpoint.manifest.world_size
        if size != self._group.size:
            # Each rank has its own generators, so another number of ranks cannot continue them exactly.
            _LOG.info(
                "%s was saved by %d ranks and is loaded by %d: random generators from rank %d on are left unchanged",
                checkpoint.folder, size, self._group.size, min(size, self._group.size),
            )  # fmt: skip

    def _load_attributes(self, saved: Mapping[str, Any], *, generators: bool) -> None:
        if saved.get("attributes"):
            self.attributes.restore(from_plain(saved["attributes"]), self._owners(), generators=generators)

    # Names and shards

    @property
    def _group(self) -> Group:
        return self.strategy.context.group

    @property
    def _rank(self) -> int:
        return self._group.rank

    def names(self) -> dict[int, str]:
        """The names of all parameters by `id()`; from the second model on they begin with `model_1/` and so on."""
        names: dict[int, str] = {}
        for index, model in enumerate(self.models):
            prefix = f"{numbered('model', index)}/" if index else ""
            for name, parameter in self.strategy.named_parameters(model):
                names.setdefault(id(parameter), prefix + name)
        return names

    def model_shards(self) -> dict[str, TensorShard]:
        """This rank's shard of every weight, by its name in a checkpoint; without those of `omitted` models."""
        return {
            f"{numbered('model', index)}/{name}": shard
            for index, model in enumerate(self.models)
            if not any(model is other for other in self.omitted)
            for name, shard in self.strategy.model_state(model).items()
        }

    def _buffer_names(self) -> list[str]:
        return [
            f"{numbered('model', index)}/{name}"
            for index, model in enumerate(self.models)
            for name, _ in saved_buffers(self.strategy.unwrap(model))
        ]

    def _frozen_bases(self) -> set[str]:
        """Weights that no checkpoint holds: those of frozen base models under PEFT adapters."""
        trained = {id(p) for wrapper in self.optimizers for p in self.strategy.parameters_of(wrapper.optimizer)}
        return {
            f"{numbered('model', index)}/{name}"
            for index, model in enumerate(self.models)
            for name in frozen_base(self.strategy.unwrap(model), self.strategy.named_parameters(model), trained)
        }

    def _add_optimizer_shards(self, shards: dict[str, TensorShard]) -> list[dict[str, Any]]:
        """Add the tensors of optimizers to `shards`; return the rest of their states."""
        states = []
        for index, wrapper in enumerate(self.optimizers):
            state = self.strategy.optimizer_state(wrapper.optimizer, self.names())
            family = numbered("optimizer", index)
            for name, slots in state.slots.items():
                shards.update((f"{family}/{name}/{key}", shard) for key, shard in slots.items())
            groups = to_plain(state.groups, f"{family}/groups")
            states.append({"groups": groups, "numbers": state.numbers, "steps": wrapper.num_steps})
        return states


def _refuse_dtypes(shards: Mapping[str, TensorShard]) -> None:
    """Refuse tensors of a dtype that the files cannot hold."""
    unfit = {name: dtype_name(shard.dtype) for name, shard in shards.items()}
    unfit = {name: dtype for name, dtype in unfit.items() if dtype not in DTYPE_CODES}
    if unfit:
        dtypes = named(sorted(set(unfit.values())))
        raise StateError(
            f"{named(list(unfit))} of the models or their optimizers have the dtype {dtypes}",
            "safetensors files cannot hold it",
            "Use another dtype, such as complex64; or store the parts of complex128 as float64 (torch.view_as_real) "
            "and use torch.view_as_complex in the forward",
        )


def name_differences(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    """What differs between the tensors of a folder and those of a run, as parts of a sentence."""
    parts = (("missing from it", missing), ("only in it", unexpected))
    return [f"{what}: {named(names)}" for what, names in parts if names]


def _kind(name: str) -> str:
    """What a tensor of a checkpoint belongs to: `model` for `model_1/head.weight`."""
    return name.partition("/")[0].partition("_")[0]


def _slots(checkpoint: Checkpoint, prefix: str) -> dict[str, dict[str, Slot]]:
    slots: dict[str, dict[str, Slot]] = {}
    for full, record in checkpoint.manifest.tensors.items():
        if full.startswith(prefix):
            name, _, key = full.removeprefix(prefix).rpartition("/")
            slots.setdefault(name, {})[key] = Slot(record.shape, dtype_named(record.dtype))
    return slots


_LABELS = {"custom": "registered object"}


def _pairs(state: Mapping[str, Any], what: str, prepared: Sequence[Any], *, strict: bool) -> list[tuple[Any, Any]]:
    """Each prepared object with its saved state."""
    saved = state.get(what) or []
    objects = counted(len(saved), _LABELS.get(what, what.removesuffix("s")))
    counts = f"The checkpoint holds {objects}, and this run has {len(prepared)}"
    if len(saved) != len(prepared) and strict:
        raise StateError(
            counts,
            "They are matched by the order in which they were prepared or registered",
            "Prepare and register the same objects in the same order before load_state, or load with strict=False, "
            "which skips the others",
        )
    if len(saved) != len(prepared):
        _LOG.warning("%s: the first %d were loaded", counts, min(len(saved), len(prepared)))
    return list(zip(prepared, saved, strict=False))


_SET_BY_SCHEDULERS = {"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


def _check_kind(index: int, saved: Sequence[Mapping[str, Any]], prepared: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the state of another kind of optimizer: each kind has hyperparameters that the other lacks.

    Only numbers are compared: flags differ between versions, and engines add their own.
    """
    saved_numbers, prepared_numbers = _hyperparameters(saved), _hyperparameters(prepared)
    only_saved = sorted(saved_numbers - prepared_numbers)
    only_prepared = sorted(prepared_numbers - saved_numbers)
    if saved and prepared and only_saved and only_prepared:
        raise StateError(
            f"Optimizer {index} of the checkpoint has {named(only_saved)}, but the one in this run has "
            f"{named(only_prepared)}",
            "They are of different kinds, so the state of one cannot be loaded into the other",
            "Create the optimizer that was saved; to load only the weights, prepare the model without one and use "
            "strict=False",
        )


def _hyperparameters(groups: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names of the numbers in parameter groups, without those that schedulers add."""
    numbers = {key for group in groups for key, value in group.items() if _is_numeric(value)}
    return numbers - _SET_BY_SCHEDULERS - {"params"}


def _is_numeric(value: Any) -> bool:
    return isinstance(value, (int, float, list, tuple)) and not isinstance(value, bool)
