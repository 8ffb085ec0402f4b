"""Settings of data loaders, gradient accumulation and the project's folders."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from paceline.config.schema.base import Fault, Section
from paceline.config.schema.readers import FilePath


class DataLoaderConfiguration(Section):
    """How prepared data loaders divide data among ranks."""

    split_batches: bool = Field(
        False,
        description="The loader's batch size is the global one, split over ranks; else it is per rank.",
    )
    dispatch_batches: bool | None = Field(
        None,
        description="Rank 0 reads all batches and sends each rank its part; otherwise every rank reads its own.",
    )
    even_batches: bool = Field(
        True, description="Fill the last global batch, so that all ranks get the same number of samples."
    )
    use_seedable_sampler: bool = Field(
        True, description="Shuffle with torch's initial seed; False draws a seed when the loader is prepared."
    )
    data_seed: int | None = Field(
        None, description="Seed of the shuffle; None takes the loader's generator or torch's seed."
    )
    non_blocking: bool | None = Field(None, description="Copy batches to the device asynchronously; None means True.")
    streams_are_sharded: bool = Field(
        False, description="Each rank's iterable dataset already yields only the samples of that rank."
    )
    use_stateful_dataloader: bool = Field(
        False,
        description="Read iterable datasets with torchdata's StatefulDataLoader, which saves their position in "
        "worker processes; map-style datasets do not need it.",
    )


class GradientAccumulationPlugin(Section):
    """How many micro-batches make one optimizer step, and when gradients are averaged."""

    num_steps: Annotated[int, Field(ge=1)] = Field(1, description="Micro-batches of one optimizer step.")
    adjust_scheduler: bool = Field(True, description="Step schedulers once per optimizer step; must be true.")
    sync_with_dataloader: bool = Field(
        True, description="Take an optimizer step at the end of an epoch, however few micro-batches it has."
    )
    sync_each_batch: bool = Field(
        False, description="Average gradients in every micro-batch: less memory under FSDP, more communication."
    )

    def clashes(self) -> Iterator[Fault]:
        """Refuse `adjust_scheduler=False`, which would step schedulers once per micro-batch."""
        if not self.adjust_scheduler:
            yield Fault(
                "adjust_scheduler",
                "adjust_scheduler=False cannot be used",
                "a scheduler steps once per optimizer step",
                "leave it out, and count the schedule in optimizer steps",
            )


class ProjectConfiguration(Section):
    """Where a run keeps its files, and how many checkpoints."""

    project_dir: FilePath | None = Field(
        None, description="Folder of the run: checkpoints, and trackers without logging_dir."
    )
    logging_dir: FilePath | None = Field(None, description="Folder of trackers; None means project_dir.")
    automatic_checkpoint_naming: bool = Field(
        False, description="Let save_state write numbered checkpoints under project_dir/checkpoints."
    )
    total_limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Number of checkpoints to keep, the newest; None keeps all."
    )
    iteration: Annotated[int, Field(ge=0)] = Field(0, description="Number of the next checkpoint.")
    save_in_background: bool = Field(
        False, description="Let save_state return once the state is copied, and write it while training continues."
    )
    save_on_signals: tuple[str, ...] = Field(
        ("SIGTERM", "SIGUSR1"),
        description="Signals on which a run with automatic_checkpoint_naming saves and exits with code 75.",
    )
    save_on_each_node: bool = Field(
        False, description="Write shared files on every machine's first rank, for machines without a shared disk."
    )

    def clashes(self) -> Iterator[Fault]:
        """Yield the fields whose values contradict each other."""
        unknown = [name for name in self.save_on_signals if name not in signal.Signals.__members__]
        if unknown:
            yield Fault("save_on_signals", f"{unknown} are not signals", hint="write names such as SIGTERM")
