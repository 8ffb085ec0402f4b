"""Loading a training state of another library, under any strategy; reports what was loaded and what was skipped.

Every rank maps the files and copies its own shard of each tensor, one tensor at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.accelerator.training_state.registered_tensors import LiveTensors
from paceline.accelerator.training_state.state import name_differences
from paceline.checkpoint import numbered
from paceline.checkpoint.foreign import open_foreign
from paceline.environment.random_generators import set_rng_states
from paceline.errors import CheckpointError, PacelineError, StateError, counted, named_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.accelerator.training_state.state import TrainingState
    from paceline.checkpoint import TensorShard
    from paceline.checkpoint.foreign import LazyTensors, PortableOptimizer, PortableState

__all__ = ["import_foreign_state"]


def import_foreign_state(
    state: TrainingState, folder: Path, *, strict: bool = True, progress: bool = True
) -> list[str]:
    """Load a folder of Accelerate, DeepSpeed or torch.distributed.checkpoint into a prepared run.

    Collective: every rank must call it.

    Args:
        state: The state of this run.
        folder: The same on all ranks.
        strict: Refuse missing and unexpected weights; if False, they are only reported.
        progress: Load everything; if False, only weights and the state of optimizers.

    Returns:
        A line for each thing that was loaded or skipped.

    Raises:
        CheckpointError: It cannot be read, or its weights do not match the model.
        StateError: An optimizer or a registered object does not fit.
    """
    return _Import(state, _open(state, folder), strict).run(progress=progress)


def _open(state: TrainingState, folder: Path) -> PortableState:
    """Open a folder that all ranks can read."""
    group = state.strategy.context.group
    opened: PortableState | None = None
    problem = ""
    try:
        opened = open_foreign(folder, [_parameter_order(state, index) for index in range(len(state.optimizers))])
    except (PacelineError, OSError, ValueError, KeyError, TypeError) as error:
        problem = f"rank {group.rank}: {error}"
    problems = [text for text in group.all_gather_object(problem) if text]
    if problems or opened is None:
        raise CheckpointError(f"{folder} cannot be loaded", problems[0], "")
    return opened


def _parameter_order(state: TrainingState, index: int) -> list[str]:
    """The names of an optimizer's parameters, group by group."""
    groups = state.strategy.optimizer_state(state.optimizers[index].optimizer, state.names()).groups
    return [name for group in groups for name in group["params"]]


class _Import:
    """Loads one foreign state into one run."""

    def __init__(self, state: TrainingState, foreign: PortableState, strict: bool) -> None:
        self._state = state
        self._foreign = foreign
        self._strict = strict
        self._lines: list[str] = []

    def run(self, *, progress: bool) -> list[str]:
        """Load everything, or without the progress of the run; return the report."""
        self._load_weights()
        self._load_optimizers()
        self._state.strategy.state_written()
        if not progress:
            return self._lines
        self._load_each("scheduler", self._state.schedulers, self._foreign.schedulers)
        self._load_each("custom object", self._state.custom, self._custom_states())
        self._load_scaler()
        self._load_generators()
        if self._state.loaders:
            self._lines.append("skipped: loader positions; the folder has none, so loaders start a new epoch")
        return [*self._lines, *self._foreign.notes]

    def _custom_states(self) -> list[Any]:
        """The states of custom objects, with the tensors sharded that the objects have sharded."""
        if not self._foreign.custom:
            return []
        live = LiveTensors(self._state.custom)
        return [live.shard_like_live(index, saved) for index, saved in enumerate(self._foreign.custom)]

    def _load_weights(self) -> None:
        shards = {name.removeprefix("model/"): shard for name, shard in self._state.model_shards().items()}
        aliases = self._aliases()
        sources = {name: self._source_name(name, aliases) for name in shards}
        missing = [name for name, source in sources.items() if source is None]
        problems = self._mismatches(missing, set(shards).union(*aliases.values()))
        for name, source in sources.items():
            if source is not None:
                _fill(name, shards[name], self._foreign.weights, source)
        self._lines.append(f"loaded: {len(shards) - len(missing)} weights")
        self._lines += [f"skipped: weights {problem}" for problem in problems]

    def _source_name(self, name: str, aliases: Mapping[str, Sequence[str]]) -> str | None:
        """The name under which the folder has a weight, or None."""
        names = (name, *aliases.get(name, ()))
        return next((each for each in names if each in self._foreign.weights), None)

    def _mismatches(self, missing: Sequence[str], known: set[str]) -> list[str]:
        """What differs between the weights of the folder and of the model; an error if strict."""
        unexpected = [name for name in self._foreign.weights if name not in known]
        problems = name_differences(missing, unexpected)
        if problems and self._strict:
            raise CheckpointError(
                f"The weights in {self._foreign.folder} do not match the model",
                "; ".join(problems),
                "Build the same model, or load with strict=False",
            )
        return problems

    def _aliases(self) -> dict[str, list[str]]:
        """For each tied weight its other names; a folder may have any of them."""
        aliases: dict[str, list[str]] = {}
        for index, model in enumerate(self._state.models):
            prefix = ""
            if index:
                prefix = f"{numbered('model', index)}/"
            for alias, name in self._state.strategy.tied_names(model).items():
                aliases.setdefault(prefix + name, []).append(prefix + alias)
        return aliases

    def _load_optimizers(self) -> None:
        optimizers, saved = self._state.optimizers, self._foreign.optimizers
        if not saved:
            self._lines += ["skipped: optimizer; the folder has none, so its state starts empty"] if optimizers else []
            return
        self._compare_counts("optimizer", len(optimizers), len(saved))
        for index, optimizer in enumerate(saved[: len(optimizers)]):
            self._load_optimizer(index, optimizer)
            self._lines.append(f"loaded: optimizer {index}, at step {optimizers[index].num_steps}")

    def _load_optimizer(self, index: int, saved: PortableOptimizer) -> None:
        wrapper, strategy, names = self._state.optimizers[index], self._state.strategy, self._state.names()
        slots = {name: {slot: tensors.slot(slot) for slot in tensors} for name, tensors in saved.slots.items()}
        strategy.make_slots(wrapper.optimizer, names, slots, saved.numbers)
        live = strategy.optimizer_state(wrapper.optimizer, names)
        strategy.set_groups(wrapper.optimizer, names, _in_live_order(saved.groups, live.groups))
        for name, shards in live.slots.items():
            for slot, shard in shards.items():
                _fill(f"{name}: {slot}", shard, saved.slots[name], slot)
        wrapper.num_steps = self._foreign.step or saved.steps

    def _compare_counts(self, what: str, num_prepared: int, num_saved: int) -> None:
        if num_prepared == num_saved:
            return
        counts = f"{counted(num_saved, what)}, and this run has {num_prepared}"
        if self._strict:
            raise StateError(
                f"{self._foreign.folder} holds {counts}",
                "They are matched by the order in which they were prepared or registered",
                "Prepare and register the same objects in the same order before load_state, or load with strict=False, "
                "which skips the others",
            )
        self._lines.append(f"skipped: all but the first {min(num_prepared, num_saved)} of {counts}")

    def _load_each(self, what: str, prepared: Sequence[Any], states: Sequence[Any]) -> None:
        if states:
            self._compare_counts(what, len(prepared), len(states))
        elif prepared:
            self._lines.append(f"skipped: {what}s; the folder has none")
        for index, (item, saved) in enumerate(zip(prepared, states, strict=False)):
            if saved is None:
                continue
            item.load_state_dict(saved)
            epoch = None
            if isinstance(saved, dict) and what == "scheduler":
                epoch = saved.get("last_epoch")
            if epoch is not None and self._foreign.step and epoch != self._foreign.step:
                self._lines.append(
                    f"loaded: scheduler {index} at {epoch} after {self._foreign.step} optimizer steps, unchanged; here "
                    "it advances once per optimizer step, so check the number of steps that it was built for"
                )
            else:
                self._lines.append(f"loaded: {what} {index}")

    def _load_scaler(self) -> None:
        scaler, saved = self._state.scaler, self._foreign.scaler
        if scaler is not None and saved:
            scaler.load_state_dict(saved)
            self._lines.append("loaded: loss scaler")

    def _load_generators(self) -> None:
        context = self._state.strategy.context
        saved = self._foreign.generators.get(context.group.rank, {})
        complete = {"python", "numpy", "torch"} <= saved.keys()
        if complete:
            set_rng_states(saved, context.device)
        loaded = context.group.all_gather_object(complete)
        ranks = [rank for rank, done in enumerate(loaded) if done]
        if ranks:
            self._lines.append(f"loaded: random generators of {named_ranks(ranks)}")
        if len(ranks) < len(loaded):
            self._lines.append("skipped: random generators of the other ranks; the folder has none for them")


def _fill(name: str, shard: TensorShard, tensors: LazyTensors, source: str) -> None:
    """Copy this rank's shard from a whole tensor, which is released afterwards."""
    shape = tensors.slot(source).shape
    if shape != shard.shape:
        raise CheckpointError(
            f"{name} has shape {shape} in the folder and {shard.shape} in this run",
            "A tensor of another shape cannot be loaded",
            "Build the model that was saved",
        )
    if shard.stop > shard.start:
        values = tensors[source].reshape(-1)[shard.start : shard.stop]
        with torch.no_grad():
            shard.write(shard.start, values.to(device=shard.values.device, dtype=shard.dtype))


def _in_live_order(saved: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Saved groups with their parameters in this run's order, if every group has the same parameters."""
    same = len(saved) == len(live) and all(
        set(group["params"]) == set(own["params"]) for group, own in zip(saved, live, strict=True)
    )
    if not same:
        return [dict(group) for group in saved]
    return [{**group, "params": list(own["params"])} for group, own in zip(saved, live, strict=True)]
