"""Saving and loading the tensors of registered objects, of which some may be sharded (DTensors).

An average of FSDP2's parameters, for example, is sharded like them. Each rank saves its shard of the whole tensor, and
when it is loaded, the tensor gets the layout that the object has then: sharded in any way, or whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint import TensorShard, from_plain, to_plain
from paceline.environment.logging import get_logger
from paceline.errors import PacelineError, StateError, named
from paceline.strategies.state import first_element, is_dtensor, is_sharded_by_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.distributed.tensor import DTensor

__all__ = [
    "LiveTensors",
    "LoadTarget",
    "refuse_placeholders",
    "restore_object",
    "split_sharded",
    "state_name",
]

_LOG = get_logger(__name__)


# Saving


def split_sharded(tensors: Mapping[str, Tensor]) -> tuple[dict[str, TensorShard], dict[str, TensorShard]]:
    """Split tensors into this rank's shards of sharded ones, and whole ones.

    Collective: every rank must call it, as a tensor that is not sharded by rows is gathered.
    """
    sharded, whole = {}, {}
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            sharded[name] = _shard_of(tensor)
        else:
            whole[name] = TensorShard.whole(tensor)
    return sharded, whole


@torch.no_grad()
def _shard_of(tensor: DTensor) -> TensorShard:
    if not is_sharded_by_rows(tensor):
        return TensorShard.whole(tensor.full_tensor())
    local = tensor.to_local().detach()
    return TensorShard(tuple(tensor.shape), first_element(tensor, local), local)


def refuse_placeholders(tensors: Mapping[str, Tensor], released: Iterable[str], count: int) -> None:
    """Refuse empty copies of parameters that the engine had released (ZeRO stage 3).

    Args:
        tensors: Tensors of registered objects, by name.
        released: Names of the parameters that are empty between two forwards.
        count: How many parameters the models have.

    Raises:
        StateError: An object has such copies; names them.
    """
    empty = [name for name, tensor in tensors.items() if tuple(tensor.shape) == (0,)]
    if not empty:
        return
    siblings: dict[str, int] = {}
    for name in tensors:
        siblings[name.rpartition(".")[0]] = siblings.get(name.rpartition(".")[0], 0) + 1
    endings = tuple(f".{name}" for name in released)
    # Averages are stored by name, or in a list of all parameters.
    copies = [name for name in empty if name.endswith(endings) or siblings[name.rpartition(".")[0]] == count]
    if endings and copies:
        raise StateError(
            f"{named(copies)} of registered objects are empty copies of parameters",
            "The engine shards every parameter, and leaves an empty one in its place between two forwards",
            "Copy them inside `with accelerator.gather_parameters(model):`, where the parameters are whole",
        )


# Loading


class LiveTensors:
    """The current tensors of registered objects, by their names in a checkpoint.

    Args:
        custom: The objects, in the order in which they were registered.
    """

    def __init__(self, custom: Sequence[Any]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for index, item in enumerate(custom):
            tensors: dict[str, Tensor] = {}
            try:
                to_plain(item.state_dict(), state_name(index), tensors)
            except Exception as error:
                # Some objects can load a state before they can return one.
                _LOG.debug("registered object %d has no state before it is loaded: %s", index, error)
            self._tensors.update(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def target(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> LoadTarget:
        """Memory for a saved tensor, with the layout and device of the object's own; if it has none, whole on the CPU.

        Raises:
            StateError: The object has a sharded tensor of another shape, or a partial one (pending reduction).
        """
        live = self._tensors.get(name)
        if live is None or not is_dtensor(live):
            device = "cpu" if live is None else live.device
            return LoadTarget(TensorShard(shape, 0, torch.empty(shape, dtype=dtype, device=device)))
        if tuple(live.shape) != shape:
            raise StateError(
                f"{name} has shape {shape} in the checkpoint and {tuple(live.shape)} in this run, sharded",
                "A sharded tensor is loaded with the shape and layout that the object already has",
                "Build the object from the model that was saved",
            )
        return LoadTarget.like(live, dtype)

    def shard_like_live(self, index: int, state: Any) -> Any:
        """A state of whole tensors, with those sharded that the object has sharded."""
        tensors: dict[str, Tensor] = {}
        plain = to_plain(state, state_name(index), tensors)
        if not any(name in self and is_dtensor(self._tensors[name]) for name in tensors):
            return state
        fitted = {}
        for name, tensor in tensors.items():
            target = self.target(name, tuple(tensor.shape), tensor.dtype)
            shard = target.shard
            shard.write(shard.start, tensor.reshape(-1)[shard.start : shard.stop])
            fitted[name] = target.tensor()
        return from_plain(plain, fitted)


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """Memory that a saved tensor is read into.

    Attributes:
        shard: What this rank reads.
        template: A DTensor with the layout that the result gets; None for a whole tensor.
    """

    shard: TensorShard
    template: DTensor | None = None

    @classmethod
    @torch.no_grad()
    def like(cls, template: DTensor, dtype: torch.dtype) -> LoadTarget:
        """Memory for this rank's rows of a tensor like `template`, or for all of it if it is not sharded by rows."""
        shape = tuple(template.shape)
        if any(placement.is_partial() for placement in template.placements):
            raise StateError(
                f"A registered object has a tensor of shape {shape} placed {tuple(template.placements)}",
                "Its ranks have summands, and the checkpoint has the sum",
                "Return redistributed tensors from state_dict()",
            )
        local = template.to_local()
        by_rows = is_sharded_by_rows(template)
        start = first_element(template, local) if by_rows else 0
        values = torch.empty(local.shape if by_rows else shape, dtype=dtype, device=local.device)
        return cls(TensorShard(shape, start, values), template)

    def tensor(self) -> Tensor:
        """The tensor that was read, in the layout of the template."""
        if self.template is None:
            return self.shard.values
        from torch.distributed.tensor import DTensor, distribute_tensor

        values, shape = self.shard.values, self.template.shape
        mesh, placements = self.template.device_mesh, self.template.placements
        if not is_sharded_by_rows(self.template):
            # Every rank has read all of it, so nothing has to be sent.
            return distribute_tensor(values, mesh, placements, src_data_rank=None)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(values, mesh, placements, run_check=False, shape=shape, stride=stride)


def state_name(index: int) -> str:
    """The prefix of the names of a registered object's tensors."""
    return f"custom_{index}/state"


def restore_object(index: int, item: Any, state: Any, saved: Iterable[str], live: LiveTensors) -> None:
    """Call a registered object's `load_state_dict`.

    Args:
        index: Its position among the registered objects.
        item: The object.
        state: The state to load.
        saved: Names of all tensors in the checkpoint.
        live: The current tensors of the objects.

    Raises:
        StateError: `load_state_dict` failed; lists the tensors that only one side has.
    """
    try:
        item.load_state_dict(state)
    except PacelineError:
        raise
    except Exception as error:
        prefix = f"{state_name(index)}."
        saved_names = {name.removeprefix(prefix) for name in saved if name.startswith(prefix)}
        live_names = {name.removeprefix(prefix) for name in live.names if name.startswith(prefix)}
        only_saved, only_live = sorted(saved_names - live_names), sorted(live_names - saved_names)
        differences = []
        if only_saved and live_names:
            differences.append(f"only saved: {named(only_saved)}")
        if only_live:
            differences.append(f"only here: {named(only_live)}")
        raise StateError(
            f"Registered object {index} ({type(item).__name__}) did not load its state: "
            f"{type(error).__name__}: {error}",
            "; ".join(differences) or "Its load_state_dict raised this error",
            "Build it from accelerator.unwrap_model(model), whose names are the same under every strategy"
            if differences
            else "Make load_state_dict accept what state_dict returns",
        ) from error
