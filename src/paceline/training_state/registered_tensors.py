"""The tensors that objects of the script hold, out and in: of what is sharded, each rank brings its own part.

An average of FSDP2's parameters, say, is sharded as they are. It is saved like them, in parts that make one whole
tensor, and comes back as the object has it when it is loaded: sharded, in whatever layout, or whole.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint import TensorShard, from_plain, to_plain
from paceline.environment.logging import get_logger
from paceline.errors import PacelineError, StateError, named

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.distributed.tensor import DTensor

__all__ = ["LiveTensors", "Room", "give_back", "is_sharded", "refuse_placeholders", "split_sharded"]

_LOG = get_logger(__name__)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks (a DTensor)."""
    # Nobody has made one as long as the module was not imported, which takes half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


# Out


def split_sharded(tensors: Mapping[str, Tensor]) -> tuple[dict[str, TensorShard], dict[str, TensorShard]]:
    """This rank's parts of sharded tensors, and the others, which are whole.

    Collective, where a tensor is cut otherwise than into runs of rows: such a one is gathered.
    """
    sharded, whole = {}, {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            sharded[name] = _part_of(tensor)  # type: ignore[arg-type]
        else:
            whole[name] = TensorShard.whole(tensor)
    return sharded, whole


@torch.no_grad()
def _part_of(tensor: DTensor) -> TensorShard:
    if not _is_cut_by_rows(tensor):
        return TensorShard.whole(tensor.full_tensor())
    local = tensor.to_local().detach()
    start = _first_element(tensor) if local.numel() else 0
    return TensorShard(tuple(tensor.shape), start, local)


def _is_cut_by_rows(tensor: DTensor) -> bool:
    """Whether each rank holds one run of the tensor laid out row by row."""
    from torch.distributed.tensor import Replicate, Shard

    # Not isinstance: a strided shard is one of rows that do not follow each other.
    return all(type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in tensor.placements)


def _first_element(tensor: DTensor) -> int:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0] * tensor.shape[1:].numel() if offset else 0


def refuse_placeholders(tensors: Mapping[str, Tensor], released: Iterable[str], count: int) -> None:
    """Refuse empty copies of parameters whose values the engine has taken away (ZeRO stage 3).

    Args:
        tensors: Of the script's objects.
        released: Names of the parameters that are empty between two forwards.
        count: How many parameters the models have.

    Raises:
        StateError: An object holds such copies; names them.
    """
    empty = [name for name, tensor in tensors.items() if tuple(tensor.shape) == (0,)]
    if not empty:
        return
    siblings: dict[str, int] = {}
    for name in tensors:
        siblings[name.rpartition(".")[0]] = siblings.get(name.rpartition(".")[0], 0) + 1
    endings = tuple(f".{name}" for name in released)
    # Averages are kept by name, or in a list of all parameters.
    copies = [name for name in empty if name.endswith(endings) or siblings[name.rpartition(".")[0]] == count]
    if endings and copies:
        raise StateError(
            f"{named(copies)} of registered objects are empty copies of parameters",
            "The engine shards every parameter, and leaves an empty one in its place between two forwards",
            "Take copies inside `with accelerator.gather_parameters(model):`, where the parameters are whole",
        )


# In


class LiveTensors:
    """The tensors that registered objects hold now, by the names that a checkpoint has for them.

    Args:
        custom: The objects, in the order in which they were registered.
    """

    def __init__(self, custom: Sequence[Any]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for index, item in enumerate(custom):
            found: dict[str, Tensor] = {}
            try:
                to_plain(item.state_dict(), state_name(index), found)
            except Exception as error:
                # It may be able to take a state before it can give one.
                _LOG.debug("registered object %d gives no state before it is loaded: %s", index, error)
            self._tensors.update(found)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """Of all of them."""
        return list(self._tensors)

    def room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Room:
        """Memory for a saved tensor, laid out and placed as the object has it; whole and on the host if it has none.

        Raises:
            StateError: The object has a sharded one of another shape, or one that is not summed up yet.
        """
        live = self._tensors.get(name)
        if live is None or not is_sharded(live):
            device = "cpu" if live is None else live.device
            return Room(TensorShard(shape, 0, torch.empty(shape, dtype=dtype, device=device)))
        if tuple(live.shape) != shape:
            raise StateError(
                f"{name} has shape {shape} in the checkpoint and {tuple(live.shape)} here, sharded",
                "A registered object gets its tensors as it has them",
                "Build the object from the model that was saved",
            )
        return Room.like(live, dtype)  # type: ignore[arg-type]

    def fitted(self, index: int, state: Any) -> Any:
        """A state of whole tensors with those sharded that the object has sharded."""
        tensors: dict[str, Tensor] = {}
        plain = to_plain(state, state_name(index), tensors)
        if not any(name in self and is_sharded(self._tensors[name]) for name in tensors):
            return state
        fitted = {}
        for name, tensor in tensors.items():
            room = self.room(name, tuple(tensor.shape), tensor.dtype)
            run = tensor.reshape(-1)[room.part.start : room.part.stop]
            room.part.write(room.part.start, run)
            fitted[name] = room.tensor()
        return from_plain(plain, fitted)


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that a saved tensor is read into.

    Attributes:
        part: What this rank reads.
        model: The sharded tensor that it comes back like; None for a whole one.
    """

    part: TensorShard
    model: DTensor | None = None

    @classmethod
    @torch.no_grad()
    def like(cls, model: DTensor, dtype: torch.dtype) -> Room:
        """Room for the rows that this rank holds of a tensor like `model`, or for all where it is cut otherwise."""
        if any(placement.is_partial() for placement in model.placements):
            raise StateError(
                f"A registered object holds a tensor of shape {tuple(model.shape)} placed {tuple(model.placements)}",
                "Its ranks hold summands of it, and what is loaded is the sum",
                "Let state_dict() give redistributed tensors",
            )
        local = model.to_local()
        if _is_cut_by_rows(model):
            start = _first_element(model) if local.numel() else 0
            values = torch.empty(local.shape, dtype=dtype, device=local.device)
            return cls(TensorShard(tuple(model.shape), start, values), model)
        return cls(
            TensorShard(tuple(model.shape), 0, torch.empty(model.shape, dtype=dtype, device=local.device)), model
        )

    def tensor(self) -> Tensor:
        """What was read, in the layout of the object."""
        model = self.model
        if model is None:
            return self.part.values
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not _is_cut_by_rows(model):
            # Every rank has read all of it, so none has to be sent its part.
            return distribute_tensor(self.part.values, model.device_mesh, model.placements, src_data_rank=None)
        stride = torch.empty(model.shape, device="meta").stride()
        return DTensor.from_local(
            self.part.values, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=stride
        )


def state_name(index: int) -> str:
    """What the names of a registered object's tensors begin with."""
    return f"custom_{index}/state"


def give_back(index: int, item: Any, state: Any, saved: Iterable[str], live: LiveTensors) -> None:
    """Let a registered object take its state.

    Args:
        index: Its place among them.
        item: The object.
        state: What it gave when it was saved.
        saved: Names of all tensors in the checkpoint.
        live: What the objects hold.

    Raises:
        StateError: It failed; says which tensors only one side has.
    """
    try:
        item.load_state_dict(state)
    except PacelineError:
        raise
    except Exception as error:
        prefix = f"{state_name(index)}."
        theirs = {name.removeprefix(prefix) for name in saved if name.startswith(prefix)}
        ours = {name.removeprefix(prefix) for name in live.names if name.startswith(prefix)}
        sides = [("only saved", theirs - ours), ("only here", ours - theirs)]
        told = [f"{side}: {named(sorted(names))}" for side, names in sides if names and ours]
        raise StateError(
            f"Registered object {index} ({type(item).__name__}) did not take its state: "
            f"{type(error).__name__}: {error}",
            "; ".join(told) or "Its load_state_dict raised this",
            "Build it from accelerator.unwrap_model(model), whose names are the same under every strategy"
            if told
            else "Let load_state_dict take what state_dict gives",
        ) from error
