"""Notices weights that the script changed where ZeRO would lose the change.

From stage 1 on, the optimizer updates fp32 values of its own, and each step overwrites the parameters of the forward
with them. What a script writes into a parameter (weight clipping, `load_state_dict`, a pruning mask) takes part in the
next forward, and is gone after the step.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import SteppingError, named
from paceline.strategies.check_schedule import is_due

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from paceline.strategies.deepspeed.partitions import Partitions


class WeightCheck:
    """Compares the weights of one model with what its engine wrote into them.

    Torch counts the writes to a tensor, so that nothing has to be read; those of a step are accepted after it. Writes
    through `parameter.data` are not counted: before steps 1, 2, 4 ... 128, 256, 512, 768 ... the values are
    compared as well.

    Args:
        partitions: Of the model's engine.
        parameters: All of the model, with their names.
    """

    def __init__(self, partitions: Partitions, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._partitions = partitions
        self._parameters = [(name, p) for name, p in parameters if partitions.is_updated(p)]
        self._versions: list[int] = []
        self._steps = 0
        self.accept()

    def accept(self) -> None:
        """Take the weights as they are now for those of the engine."""
        self._versions = [p._version for _, p in self._parameters]

    def accept_loads(self, engine: Any) -> None:
        """Have weights that DeepSpeed's own `load_checkpoint` reads taken for the engine's.

        Programs of transformers and Accelerate call it. It brings the fp32 values in step with the weights.
        """
        load = engine.load_checkpoint

        @functools.wraps(load)
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            loaded = load(*args, **kwargs)
            self.accept()
            return loaded

        engine.load_checkpoint = load_checkpoint

    def before_step(self) -> None:
        """Check before a step.

        Raises:
            SteppingError: The step would undo a change of the script; it names the parameters.
        """
        self._steps += 1
        self.check_writes()
        if is_due(self._steps):
            self._check_values()

    def check_writes(self) -> None:
        """Check for counted writes.

        Raises:
            SteppingError: There were some; it names the parameters.
        """
        pairs = zip(self._parameters, self._versions, strict=True)
        written = [name for (name, p), version in pairs if p._version != version]
        if written:
            raise _lost(written)

    @torch.no_grad()
    def _check_values(self) -> None:
        differ = []
        for name, parameter in self._parameters:
            copies = self._partitions.forward_copies(parameter)
            if copies is None:
                continue
            seen, written = copies
            # A weight that is not a number is no change of the script's.
            changed = (seen != written) & ~(seen.isnan() & written.isnan())
            differ.append((name, changed.any()))
        if differ and bool(torch.stack([changed for _, changed in differ]).any()):
            raise _lost([name for name, changed in differ if changed])


def _lost(names: list[str]) -> SteppingError:
    return SteppingError(
        f"The script has changed {named(names, 4)} since the engine wrote them",
        "ZeRO keeps fp32 values of its own, which the next step and every checkpoint would use instead",
        "Change weights in `with accelerator.gather_parameters(model, modifier_rank=0):`, on that rank",
    )
