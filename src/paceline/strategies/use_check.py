"""Checks now and then that the backward of every rank has reached the same parameters.

FSDP2 and ZeRO reduce gradients as one buffer, of those parameters that have one. Where ranks have used different ones,
the gradient of one parameter is added to that of another, in silence if the buffers are equally large.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.errors import SteppingError, named
from paceline.strategies.check_schedule import is_due

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from paceline.collectives import Group


class UseCheck:
    """Compares over the ranks which parameters have a gradient, before steps 1, 2, 4 ... 128, 256, 512, 768 ...

    Args:
        group: The ranks.
        engine: What reduces the gradients, as it is called in the error.
        remedy: What lets ranks use different parameters.
    """

    def __init__(self, group: Group, engine: str, remedy: str) -> None:
        self._group = group
        self._engine = engine
        self._remedy = remedy
        self._next_step = 1

    def stepped(self) -> None:
        """Count a step."""
        self._next_step += 1

    @property
    def is_due(self) -> bool:
        """Whether the next step is one to compare before."""
        return self._group.size > 1 and is_due(self._next_step)

    def compare(
        self, parameters: Sequence[nn.Parameter], used: Sequence[bool], name_of: Callable[[nn.Parameter], str]
    ) -> None:
        """Compare which of the parameters each rank has used. Collective: every rank must call it.

        Raises:
            SteppingError: Ranks have used different ones; it names them.
        """
        if not parameters:
            return
        # In host memory, so that nobody waits for a device.
        users = torch.tensor(used, dtype=torch.int32)
        counts = self._group.all_reduce(users).tolist()
        unequal = [p for p, count in zip(parameters, counts, strict=True) if count not in (0, self._group.size)]
        if unequal:
            raise SteppingError(
                f"Some ranks have used {named([name_of(p) for p in unequal], 4)} in this step, and others have not",
                f"{self._engine} reduces gradients as one buffer, and would add up those of different parameters",
                f"Let every rank use the same parameters, or {self._remedy}",
            )
