"""Settings of loaders, of the accumulation window and of the project's folders."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from paceline.config.schema.base import Fault, Section
from paceline.config.schema.readers import FilePath


class DataLoaderConfiguration(Section):
    """How prepared loaders share data out among ranks."""

    split_batches: bool = Field(
        False, description="Whether the loader's batch size is the global one, split over ranks."
    )
    dispatch_batches: bool | None = Field(
        None,
        description="Whether rank 0 reads all data and sends the others their part; streams are split otherwise.",
    )
    even_batches: bool = Field(True, description="Fill the last global batch so that all ranks get as much.")
    use_seedable_sampler: bool = Field(
        True, description="Take the seed that torch was given; False draws a new one when the loader is prepared."
    )
    data_seed: int | None = Field(None, description="Seed of the order; None takes the loader's or torch's own.")
    non_blocking: bool | None = Field(
        None, description="Let the host go on while a batch is copied to the device; None means True."
    )
    streams_are_sharded: bool = Field(
        False, description="Whether every rank's iterable dataset already yields only its own samples."
    )
    use_stateful_dataloader: bool = Field(
        False,
        description="Whether streams are read by torchdata's loader, which saves where a stateful one is in its "
        "workers; map-style data needs no such thing.",
    )


class GradientAccumulationPlugin(Section):
    """When an optimizer step is real."""

    num_steps: Annotated[int, Field(ge=1)] = Field(1, description="Micro-batches of one optimizer step.")
    adjust_scheduler: bool = Field(True, description="Step schedulers once per optimizer step; always true.")
    sync_with_dataloader: bool = Field(True, description="Take a step at the end of a pass, however short the window.")
    sync_each_batch: bool = Field(
        False, description="Average gradients in every micro-batch, which takes less memory and more time."
    )

    def clashes(self) -> Iterator[Fault]:
        """Refuse the meaning of `adjust_scheduler=False`, which would step schedulers per micro-batch."""
        if not self.adjust_scheduler:
            yield Fault(
                "adjust_scheduler",
                "adjust_scheduler=False cannot be used",
                "a scheduler steps once per optimizer step",
                "leave it out and count your schedule in optimizer steps",
            )


class ProjectConfiguration(Section):
    """Where a run keeps its files."""

    project_dir: FilePath | None = Field(None, description="Folder of checkpoints.")
    logging_dir: FilePath | None = Field(None, description="Folder of trackers; None is the project's folder.")
    automatic_checkpoint_naming: bool = Field(False, description="Number checkpoints under project_dir/checkpoints.")
    total_limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Checkpoints kept; None keeps all.")
    iteration: Annotated[int, Field(ge=0)] = Field(0, description="Number of the next checkpoint.")
    save_in_background: bool = Field(
        False, description="Let save_state return once the state is copied, and write it while training goes on."
    )
    save_on_signals: tuple[str, ...] = Field(
        ("SIGTERM", "SIGUSR1"),
        description="Signals that make a run with automatic_checkpoint_naming save and end with exit code 75.",
    )
    save_on_each_node: bool = Field(False, description="Write shared files on every machine's first rank.")

    def clashes(self) -> Iterator[Fault]:
        """Yield what cannot go together within the section."""
        unknown = [name for name in self.save_on_signals if name not in signal.Signals.__members__]
        if unknown:
            yield Fault("save_on_signals", f"{unknown} are no signals", hint="write names such as SIGTERM")
