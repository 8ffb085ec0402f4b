"""The rules of a program that is written for Accelerate: what it tolerates, divides by, and asks for the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from paceline.accelerator.policies import Policies
from paceline.accelerator.stepping import WindowPolicy
from paceline.compat.accelerate.data_loader import DataLoaderAdapter, prepare_data_loader
from paceline.compat.accelerate.optimizer import AcceleratedOptimizer
from paceline.compat.accelerate.scheduler import AcceleratedScheduler
from paceline.compat.accelerate.settings.enums import DistributedType
from paceline.compat.accelerate.state import AcceleratorState, InnermostLoader, SharedBoundary
from paceline.compat.accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper, DeepSpeedSchedulerWrapper
from paceline.config import Leniency

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from paceline.collectives import Group
    from paceline.compat.accelerate.settings.plugins import DataLoaderConfiguration

__all__ = ["LoaderRules", "PreparedKinds", "rules_of"]

_LENIENT = Leniency(
    foreign_parameters=True,
    unassigned_parameters=True,
    unread_settings=True,
    clip_inside_window=True,
    save_open_gradients=True,
    script_wins=True,
)


class LoaderRules:
    """Prepares loaders of the classic kind. What programs change in the configuration holds from then on.

    Args:
        config: How data is divided among ranks.
        rng_types: Generators that get rank 0's state at the start of each pass.
        mesh: Returns the mesh of the ranks.
    """

    def __init__(
        self,
        config: DataLoaderConfiguration,
        rng_types: Sequence[Any] | None,
        mesh: Callable[[], DeviceMesh | None],
    ) -> None:
        self.config = config
        self.rng_types = rng_types
        # The slicing function of the call in progress.
        self.slice_fn: Callable[..., Any] | None = None
        self.position = InnermostLoader()
        self.current = None
        self._mesh = mesh

    def prepare(self, loader: Any, *, group: Group, device: torch.device | None, **_: Any) -> Any:
        """See `paceline.data.LoaderFamily`; anything but a loader of torch comes back as it is."""
        if isinstance(loader, DataLoaderAdapter) or not isinstance(loader, DataLoader):
            return loader
        config = self.config
        return prepare_data_loader(
            loader,
            device,
            num_processes=group.size,
            process_index=group.rank,
            split_batches=config.split_batches,
            put_on_device=device is not None,
            rng_types=None if self.rng_types is None else list(self.rng_types),
            dispatch_batches=config.dispatch_batches,
            even_batches=config.even_batches,
            slice_fn_for_dispatch=self.slice_fn,
            use_seedable_sampler=config.use_seedable_sampler,
            data_seed=config.data_seed,
            non_blocking=config.non_blocking,
            use_stateful_dataloader=config.use_stateful_dataloader,
            torch_device_mesh=self._mesh(),
        )


class PreparedKinds:
    """The classes of prepared optimizers and schedulers, which programs ask for.

    Args:
        loaders: Say `split_batches`, as it is when a schedule steps.

    Attributes:
        is_engines_schedule: Whether the call in progress prepares a schedule that an engine of DeepSpeed makes.
    """

    def __init__(self, loaders: LoaderRules) -> None:
        self.is_engines_schedule = False
        self._loaders = loaders

    def optimizer(self, optimizer: Optimizer, **core: Any) -> AcceleratedOptimizer:
        """Wrap an optimizer."""
        is_engines = AcceleratorState().distributed_type == DistributedType.DEEPSPEED
        return (DeepSpeedOptimizerWrapper if is_engines else AcceleratedOptimizer)(optimizer, **core)

    def scheduler(self, scheduler: Any, **core: Any) -> AcceleratedScheduler:
        """Wrap a learning-rate scheduler."""
        kind = DeepSpeedSchedulerWrapper if self.is_engines_schedule else AcceleratedScheduler
        return kind(scheduler, splits_batches=lambda: self._loaders.config.split_batches, **core)


def rules_of(loaders: LoaderRules, kinds: PreparedKinds) -> Policies:
    """The rules of a run with these loaders, optimizers and schedulers."""

    def family(_active: object) -> LoaderRules:
        return loaders

    return Policies(
        leniency=_LENIENT,
        window=WindowPolicy(divide_by="num_steps"),
        boundary=SharedBoundary,
        optimizer=kinds.optimizer,
        scheduler=kinds.scheduler,
        loaders=family,
    )
