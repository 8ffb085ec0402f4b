"""Taking over a training that another library has saved, under any strategy: what fits, with a line for each thing.

Every rank maps the files and copies its own runs of each tensor, one tensor at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint.foreign import open_foreign
from paceline.environment.rng_state import set_rng_states
from paceline.errors import CheckpointError, PacelineError, StateError, named, named_ranks
from paceline.training_state.registered_tensors import LiveTensors
from paceline.training_state.state import numbered

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.checkpoint import TensorShard
    from paceline.checkpoint.foreign import ForeignOptimizer, ForeignState, Tensors
    from paceline.training_state.state import TrainingState

__all__ = ["import_foreign_state"]


def import_foreign_state(state: TrainingState, folder: Path, *, strict: bool = True) -> list[str]:
    """Fill a prepared run from a folder of Accelerate, DeepSpeed or torch.distributed.checkpoint.

    Collective: every rank must call it.

    Args:
        state: Of this run.
        folder: The same on all ranks.
        strict: Refuse weights that are missing or too many; else they are named in a line.

    Returns:
        A sentence for each thing that was taken or left.

    Raises:
        CheckpointError: It cannot be read, or holds other weights than this run.
        StateError: An optimizer or an object of the script does not fit.
    """
    return _Adoption(state, _open(state, folder), strict).lines()


def _open(state: TrainingState, folder: Path) -> ForeignState:
    """Open a folder that all ranks can read."""
    group = state.strategy.context.group
    found: ForeignState | None = None
    problem = ""
    try:
        found = open_foreign(folder, [_order(state, index) for index in range(len(state.optimizers))])
    except (PacelineError, OSError, ValueError, KeyError, TypeError) as error:
        problem = f"rank {group.rank}: {error}"
    problems = [text for text in group.all_gather_object(problem) if text]
    if problems or found is None:
        raise CheckpointError(f"{folder} cannot be loaded", problems[0], "")
    return found


def _order(state: TrainingState, index: int) -> list[str]:
    """The names of an optimizer's parameters, group by group."""
    groups = state.strategy.optimizer_state(state.optimizers[index].optimizer, state.names()).groups
    return [name for group in groups for name in group["params"]]


class _Adoption:
    """One run taking over one folder."""

    def __init__(self, state: TrainingState, found: ForeignState, strict: bool) -> None:
        self._state = state
        self._found = found
        self._strict = strict
        self._lines: list[str] = []

    def lines(self) -> list[str]:
        """Take everything, in an order in which nothing is lost; say what."""
        self._take_weights()
        self._take_optimizers()
        self._state.strategy.state_written()
        self._take_each("scheduler", self._state.schedulers, self._found.schedulers)
        live = LiveTensors(self._state.custom) if self._found.custom else None
        custom = [held if live is None else live.fitted(i, held) for i, held in enumerate(self._found.custom)]
        self._take_each("custom object", self._state.custom, custom)
        self._take_scaler()
        self._take_generators()
        if self._state.loaders:
            self._lines.append("left: positions of loaders; the folder has none, so the next pass begins an epoch")
        return [*self._lines, *self._found.notes]

    def _take_weights(self) -> None:
        shards = {name.removeprefix("model/"): part for name, part in self._state.model_parts().items()}
        aliases = self._aliases()
        weights = self._found.weights
        held = {name: next((n for n in (name, *aliases.get(name, ())) if n in weights), None) for name in shards}
        missing = [name for name, source in held.items() if source is None]
        known = set(shards) | {alias for others in aliases.values() for alias in others}
        unexpected = [name for name in weights if name not in known]
        sides = [f"missing from it: {named(missing)}"] if missing else []
        sides += [f"only in it: {named(unexpected)}"] if unexpected else []
        if sides and self._strict:
            raise CheckpointError(
                f"{self._found.folder} holds other weights than this run",
                "; ".join(sides),
                "Build the same model, or load with strict=False",
            )
        for name, part in shards.items():
            source = held[name]
            if source is not None:
                _fill(name, part, weights, source)
        self._lines += [f"took: {len(shards) - len(missing)} weights", *(f"left: weights {side}" for side in sides)]

    def _aliases(self) -> dict[str, list[str]]:
        """For each weight the further names of it, of which a folder may have any."""
        found: dict[str, list[str]] = {}
        for index, model in enumerate(self._state.models):
            prefix = f"{numbered('model', index)}/" if index else ""
            for alias, name in self._state.strategy.tied_names(model).items():
                found.setdefault(prefix + name, []).append(prefix + alias)
        return found

    def _take_optimizers(self) -> None:
        mine, theirs = self._state.optimizers, self._found.optimizers
        if not theirs:
            self._lines += ["left: optimizer; the folder has none, so it begins anew"] if mine else []
            return
        self._compare_counts("optimizer", len(mine), len(theirs))
        for index, held in enumerate(theirs[: len(mine)]):
            self._take_optimizer(index, held)
            self._lines.append(f"took: optimizer {index}, at step {mine[index].num_steps}")

    def _take_optimizer(self, index: int, held: ForeignOptimizer) -> None:
        wrapper, strategy, names = self._state.optimizers[index], self._state.strategy, self._state.names()
        slots = {name: {slot: tensors.slot(slot) for slot in tensors} for name, tensors in held.slots.items()}
        strategy.make_slots(wrapper.optimizer, names, slots, held.numbers)
        mine = strategy.optimizer_state(wrapper.optimizer, names)
        strategy.set_groups(wrapper.optimizer, names, _in_order(held.groups, mine.groups))
        for name, shards in mine.slots.items():
            for slot, part in shards.items():
                _fill(f"{name}: {slot}", part, held.slots[name], slot)
        wrapper.num_steps = self._found.step or held.steps

    def _compare_counts(self, what: str, mine: int, theirs: int) -> None:
        if mine == theirs:
            return
        seen = f"{theirs} {what}s, and there are {mine} here"
        if self._strict:
            raise StateError(
                f"{self._found.folder} holds {seen}",
                "They are matched by the order in which they were prepared or registered",
                "Prepare and register the same objects in the same order before load_state, or load with strict=False, "
                "which leaves the others out",
            )
        self._lines.append(f"left: all but the first {min(mine, theirs)} of {seen}")

    def _take_each(self, what: str, mine: Sequence[Any], theirs: Sequence[Any]) -> None:
        if theirs:
            self._compare_counts(what, len(mine), len(theirs))
        if mine and not theirs:
            self._lines.append(f"left: {what}s; the folder has none")
        for index, (item, held) in enumerate(zip(mine, theirs, strict=False)):
            if held is None:
                continue
            item.load_state_dict(held)
            counted = held.get("last_epoch") if isinstance(held, dict) and what == "scheduler" else None
            if counted is not None and self._found.step and counted != self._found.step:
                self._lines.append(
                    f"took: scheduler {index} at {counted} after {self._found.step} optimizer steps, as it was; here "
                    "it moves once per optimizer step, so check how many steps it was built for"
                )
            else:
                self._lines.append(f"took: {what} {index}")

    def _take_scaler(self) -> None:
        scaler, held = self._state.scaler, self._found.scaler
        if scaler is not None and held:
            scaler.load_state_dict(held)
            self._lines.append("took: loss scaler")

    def _take_generators(self) -> None:
        strategy = self._state.strategy
        held = self._found.generators.get(strategy.context.group.rank)
        whole = held is not None and {"python", "numpy", "torch"} <= held.keys()
        if held is not None and whole:
            set_rng_states(held, strategy.context.device)
        taken = strategy.context.group.all_gather_object(whole)
        ranks = [rank for rank, did in enumerate(taken) if did]
        if ranks:
            self._lines.append(f"took: random generators of {named_ranks(ranks)}")
        if len(ranks) < len(taken):
            self._lines.append("left: random generators of the other ranks; the folder has none for them")


def _fill(name: str, part: TensorShard, tensors: Tensors, source: str) -> None:
    """Copy this rank's run out of a whole tensor, which is let go afterwards."""
    shape = tensors.slot(source).shape
    if shape != part.shape:
        raise CheckpointError(
            f"{name} has shape {shape} in the folder and {part.shape} here",
            "A tensor of another shape cannot be loaded",
            "Build the model that was saved",
        )
    if part.stop > part.start:
        values = tensors[source].reshape(-1)[part.start : part.stop]
        with torch.no_grad():
            part.write(part.start, values.to(device=part.values.device, dtype=part.dtype))


def _in_order(theirs: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Saved groups with their parameters in this run's order, where the same ones stand in each group."""
    if len(theirs) != len(mine) or any(set(a["params"]) != set(b["params"]) for a, b in zip(theirs, mine, strict=True)):
        return [dict(group) for group in theirs]
    return [{**held, "params": list(own["params"])} for held, own in zip(theirs, mine, strict=True)]
