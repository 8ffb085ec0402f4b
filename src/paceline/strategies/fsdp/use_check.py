"""Checks now and then that the backward of every rank has reached the same parameters.

FSDP2 reduces the gradients of a unit as one buffer, of those parameters that have one. Where ranks have used different
ones, the gradient of one parameter is added to that of another, in silence if the buffers are equally large.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.errors import SteppingError, named

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from paceline.collectives import Group

_EVERY = 256


class UseCheck:
    """Compares over the ranks which parameters have a gradient, before steps 1, 2, 4 ... 128, 256, 512, 768 ...

    Args:
        group: The ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._next_step = 1

    def stepped(self) -> None:
        """Count a step."""
        self._next_step += 1

    def before_step(self, parameters: Sequence[nn.Parameter], name_of: Callable[[nn.Parameter], str]) -> None:
        """Compare if it is due. Collective: every rank must call it.

        Raises:
            SteppingError: Ranks have used different parameters; it names them.
        """
        number = self._next_step
        if self._group.size == 1 or not parameters or (number % _EVERY and (number > _EVERY or number & (number - 1))):
            return
        users = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        device = parameters[0].device
        counts = self._group.all_reduce(users.to(device)).tolist()
        unequal = [p for p, count in zip(parameters, counts, strict=True) if count not in (0, self._group.size)]
        if unequal:
            raise SteppingError(
                f"Some ranks have used {named([name_of(p) for p in unequal], 4)} in this step, and others have not",
                "FSDP2 reduces the gradients of a unit as one buffer, so that gradients of different parameters would "
                "be added up",
                "Set fsdp_find_unused_parameters: true (torch 2.13), or let every rank use the same parameters",
            )
