"""What arguments know of the process that reads them: its rank, its device, whose turn it is."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING

from paceline.accelerator.accelerator import Accelerator
from paceline.config import InitProcessGroupKwargs
from paceline.environment.world import World

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

__all__ = ["Launched", "ParallelMode"]


class ParallelMode(Enum):
    """Whether ranks train together, in transformers' words."""

    NOT_PARALLEL = "not_parallel"
    DISTRIBUTED = "distributed"


class Launched:
    """What follows from the launcher; scripts ask it of their arguments before there is a Trainer."""

    if TYPE_CHECKING:
        use_cpu: bool
        ddp_backend: str | None
        ddp_timeout: int
        log_level: str
        log_level_replica: str

    @property
    def world(self) -> World:
        """Which rank this is, among how many, as the launcher says."""
        return World.read(os.environ)

    @property
    def world_size(self) -> int:
        """Ranks that train together."""
        return self.world.size

    @property
    def process_index(self) -> int:
        """This rank."""
        return self.world.rank

    @property
    def local_process_index(self) -> int:
        """This rank on its machine."""
        return self.world.local_rank

    @property
    def local_rank(self) -> int:
        """This rank on its machine; -1 where it is alone, as scripts know it."""
        return self.world.local_rank if self.world_size > 1 else -1

    @property
    def should_log(self) -> bool:
        """Whether this rank writes logs."""
        return self.world.is_main

    @property
    def should_save(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.world.is_main

    @property
    def parallel_mode(self) -> ParallelMode:
        """Whether ranks train together."""
        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    @property
    def device(self) -> torch.device:
        """This rank's device. Opens the process group. Collective: every rank must call it."""
        return self._early().device

    @property
    def n_gpu(self) -> int:
        """Devices of this process: one, or none on a processor. Collective, as `device`."""
        return int(self.device.type != "cpu")

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """How long a collective may wait."""
        return timedelta(seconds=self.ddp_timeout)

    def get_process_log_level(self) -> int:
        """The level of this process's messages, as a number of `logging`."""
        level = self.log_level if self.should_log else self.log_level_replica
        if level == "passive":
            return logging.getLogger("paceline").getEffectiveLevel()
        return int(getattr(logging, level.upper()))

    def main_process_first(self, local: bool = True, desc: str = "work") -> AbstractContextManager[None]:
        """Let one rank run the body before the others do, which then find its files.

        Collective: every rank must call it.

        Args:
            local: The first rank of each machine, which has a disk of its own; else rank 0 of all.
            desc: Taken as transformers does; who waits says for what line by itself.
        """
        if self.world_size == 1:
            return nullcontext()
        early = self._early()
        return early.local_main_process_first() if local else early.main_process_first()

    def _early(self) -> Accelerator:
        """Before the Trainer makes its own, which joins the same process group."""
        opening = InitProcessGroupKwargs(backend=self.ddp_backend, timeout=self.ddp_timeout_delta)
        return Accelerator(cpu=True if self.use_cpu else None, kwargs_handlers=[opening])
