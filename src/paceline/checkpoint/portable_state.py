"""A training state in neutral form, read from any format: whole tensors by name, each read only when accessed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from paceline.checkpoint.format.shards import Slot
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from paceline.checkpoint.format.shards import Number

_MODEL = re.compile(r"model_\d+/")

__all__ = ["LazyTensors", "PortableOptimizer", "PortableState", "TensorSource"]


@dataclass(frozen=True, slots=True)
class TensorSource:
    """How one whole tensor is read.

    Attributes:
        slot: Its shape and dtype.
        read: Reads it. Nothing is cached, so only the tensors in use take memory.
    """

    slot: Slot
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSource:
        """A tensor that is in memory already, or mapped from a file."""
        return cls(Slot(tuple(tensor.shape), tensor.dtype), lambda: tensor)

    @classmethod
    def of_pieces(cls, shape: Sequence[int], pieces: Sequence[Tensor]) -> TensorSource:
        """A tensor whose elements, in row-major order, are those of `pieces` one after another."""
        dtype = pieces[0].dtype if pieces else torch.float32
        return cls(Slot(tuple(shape), dtype), lambda: torch.cat([p.reshape(-1) for p in pieces]).view(tuple(shape)))


class LazyTensors(Mapping[str, "Tensor"]):
    """Tensors by name; each is read again on every access, so that only those in use take memory."""

    def __init__(self, sources: Mapping[str, TensorSource] | None = None) -> None:
        self.sources = dict(sources or {})

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self.sources[name].read()

    @override
    def __contains__(self, name: object) -> bool:
        # Mapping's own version would read the tensor.
        return name in self.sources

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    @override
    def __len__(self) -> int:
        return len(self.sources)

    def slot(self, name: str) -> Slot:
        """Shape and dtype of a tensor, without reading it."""
        return self.sources[name].slot


@dataclass(slots=True)
class PortableOptimizer:
    """One optimizer's state by parameter name: the fields of `OptimizerState`, with whole tensors."""

    slots: dict[str, LazyTensors] = field(default_factory=dict)
    numbers: dict[str, dict[str, Number]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps taken: the highest count of any parameter."""
        counts = [float(tensors["step"]) for tensors in self.slots.values() if "step" in tensors]
        counts += [float(numbers.get("step") or 0) for numbers in self.numbers.values()]
        return int(max(counts, default=0))


@dataclass(slots=True, kw_only=True)
class PortableState:
    """The training state in a folder, whatever library wrote it.

    Attributes:
        kind: The name of the format.
        folder: Its path.
        weights: Parameters and buffers by their names in the user's module; those of a second model begin with
            `model_1/`. Tied weights are here once; their other names are in `ties`.
        ties: Other names of tensors in `weights`, each with the name that it has there.
        optimizers: In the order in which they were prepared.
        schedulers: Their state dicts.
        scaler: The state dict of a loss scaler.
        generators: Random generators by rank, as `get_rng_states` returns them.
        custom: State dicts of registered objects.
        step: Optimizer steps taken.
        epoch: Current epoch; 0 if the folder does not say.
        notes: Sentences about what was left out, and why.
        has_loader_positions: Whether the checkpoint has positions of loaders, which a converted one has not.
    """

    kind: str
    folder: Path
    weights: LazyTensors = field(default_factory=LazyTensors)
    ties: dict[str, str] = field(default_factory=dict)
    optimizers: list[PortableOptimizer] = field(default_factory=list)
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, Any] | None = None
    generators: dict[int, dict[str, Any]] = field(default_factory=dict)
    custom: list[Any] = field(default_factory=list)
    step: int = 0
    epoch: int = 0
    notes: list[str] = field(default_factory=list)
    has_loader_positions: bool = False

    def model(self, index: int) -> LazyTensors:
        """The weights of one model, by their names in that model.

        Raises:
            CheckpointError: There is no such model.
        """
        prefix = ""
        names = [name for name in self.weights if not _MODEL.match(name)]
        if index:
            prefix = f"model_{index}/"
            names = [name for name in self.weights if name.startswith(prefix)]
        if not names:
            raise CheckpointError(f"{self.folder} holds no weights of model {index}", "", "Models are counted from 0")
        return LazyTensors({name.removeprefix(prefix): self.weights.sources[name] for name in names})

    def infer_step(self) -> None:
        """Take the number of steps from the optimizers if the folder itself does not say."""
        if not self.step:
            self.step = max((optimizer.steps for optimizer in self.optimizers), default=0)
