"""The seam for other families of prepared loaders: who prepares a loader, and who knows where the loop is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

    from paceline.collectives import Group
    from paceline.config import DataLoaderConfiguration
    from paceline.data.active_loaders import ActiveLoaders, LoaderStatus
    from paceline.data.loader import PreparedDataLoader

__all__ = ["LoaderFamily", "LoopPosition", "OwnLoaders"]


class LoopPosition(Protocol):
    """How far the loop over the prepared loaders has come, in micro-batches."""

    def begin_micro_batch(self) -> None:
        """Count a micro-batch."""
        ...

    @property
    def remaining(self) -> int | None:
        """How many follow the current one; None if that is not known."""
        ...

    @property
    def loop_ends(self) -> bool:
        """Whether the current one is the last of the loop."""
        ...


class LoaderFamily(Protocol):
    """Prepares loaders of one kind, and knows which of them is being iterated.

    The loaders of a family other than paceline's own have no position in a checkpoint of `save_state`: whoever
    provides them saves it.
    """

    @property
    def position(self) -> LoopPosition:
        """Where the loop is; the accumulation window asks for it in every micro-batch."""
        ...

    @property
    def current(self) -> LoaderStatus | None:
        """The loader that is being iterated: what `gather_for_metrics` counts samples by."""
        ...

    def prepare(
        self,
        loader: Any,
        *,
        group: Group,
        device: torch.device | None,
        config: DataLoaderConfiguration,
        num_merged_ranks: int = 1,
    ) -> DataLoader[Any]:
        """Return a loader that yields this rank's part; one that is prepared already as it is.

        Args:
            loader: The script's own.
            group: The ranks that share the data.
            device: Where batches are copied to; None leaves them where the loader puts them.
            config: How data is divided among the ranks.
            num_merged_ranks: The number of ranks whose batches this process gets as one.
        """
        ...


class OwnLoaders:
    """paceline's own loaders: see `PreparedDataLoader`.

    Args:
        active: Tracks the iterations over them.
    """

    def __init__(self, active: ActiveLoaders) -> None:
        self._active = active

    @property
    def position(self) -> LoopPosition:
        """See `LoaderFamily`."""
        return self._active

    @property
    def current(self) -> LoaderStatus | None:
        """See `LoaderFamily`."""
        return self._active.current

    def prepare(
        self,
        loader: Any,
        *,
        group: Group,
        device: torch.device | None,
        config: DataLoaderConfiguration,
        num_merged_ranks: int = 1,
    ) -> PreparedDataLoader:
        """See `LoaderFamily`."""
        # Not at the start of every program: it is half of this package.
        from paceline.data.prepare import prepare_loader

        return prepare_loader(
            loader, group=group, device=device, config=config, active=self._active, num_merged_ranks=num_merged_ranks
        )
