"""What a Trainer feeds its loop with: loaders, an optimizer and a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paceline.environment.logging import get_logger
from paceline.errors import ConfigError, PrepareError, Problem, did_you_mean
from paceline.strategies.placeholders import DummyOptim, DummyScheduler
from paceline.trainer.arguments.arguments import TrainingArguments
from paceline.trainer.batches.loaders import drop_columns, make_loader, train_sampler
from paceline.trainer.callbacks.base import length_of
from paceline.trainer.core import TrainerCore
from paceline.trainer.optim import optimizers
from paceline.trainer.optim.deepspeed_clashes import adam_arguments
from paceline.trainer.optim.schedules import make_schedule

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from paceline.data import PreparedDataLoader

__all__ = ["Feeding"]

logger = get_logger(__name__)


class Feeding(TrainerCore):
    """Makes loaders, optimizers and schedules, as the arguments ask."""

    # Optimizer steps of the training, once they are known.
    _planned_steps: int | None = None

    # Data

    def get_train_dataloader(self) -> PreparedDataLoader:
        """The loader of the training set, prepared. Collective: every rank must call it.

        Raises:
            PrepareError: There is no training set.
        """
        if self.train_dataset is None:
            raise PrepareError("Trainer.train() without a train_dataset", "There is nothing to train on", "Give one")
        if hasattr(self.train_dataset, "__len__") and len(self.train_dataset) == 0:
            raise PrepareError(
                "The train_dataset has no samples", "There is nothing to train on", "Look at what was read"
            )
        sampler = self._get_train_sampler(self.train_dataset)
        return self._loader(self.train_dataset, self._batch_plan[0], sampler, saved=True)

    def _training_loader(self) -> PreparedDataLoader:
        loader = self._as_prepared(self.get_train_dataloader(), saved=True)
        if self.args.global_batch_size is not None and self.args.average_tokens_across_devices:
            # Each sample counts once, so that none is needed to fill up the last batch.
            loader.fill_batches = False
        self._require_as_many_batches(loader)
        return loader

    def _as_prepared(self, loader: Any, *, saved: bool = False) -> PreparedDataLoader:
        """What a subclass made need not be prepared yet, nor be a `DataLoader`; again is nothing. Collective."""
        return self.accelerator.prepare_data_loader(loader, saved=saved)

    def _require_as_many_batches(self, loader: PreparedDataLoader) -> None:
        """Refuse to train where some ranks would run out of batches before others."""
        if self.accelerator.even_batches or not self.accelerator.use_distributed:
            return
        counts = self.accelerator.gather_object([length_of(loader)])
        if len(set(counts)) > 1:
            what = f"False, and the ranks get {', '.join(map(str, counts))} batches in a pass"
            why = "one that has no batch left leaves the others waiting for its gradients"
            hint = "leave it out, or set dataloader_drop_last"
            raise ConfigError([Problem("TrainingArguments(…)", "accelerator_config.even_batches", what, why, hint)])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """For subclasses: the order of the training samples; None for data without a length."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        micro, accumulation = self._batch_plan
        name = getattr(self.model, "main_input_name", "input_ids")
        total = micro * accumulation * self.accelerator.num_processes
        return train_sampler(self.args, dataset, total_batch=total, input_name=name)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PreparedDataLoader:
        """The loader of an evaluation set, or of one of several by its name, prepared.

        Raises:
            PrepareError: There is no evaluation set.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self._named_dataset(dataset)
        if dataset is None:
            raise PrepareError("Trainer.evaluate() without an eval_dataset", "There is nothing to measure", "Give one")
        return self._loader(dataset, self.args.per_device_eval_batch_size, None)

    def _named_dataset(self, name: str) -> Any:
        """One of several evaluation sets."""
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if name not in several:
            why = f"The evaluation sets are {', '.join(several)}" if several else "The Trainer has no sets with names"
            raise PrepareError(f"Trainer.evaluate({name!r})", why, did_you_mean(name, several) or "Name one of them")
        return several[name]

    def get_test_dataloader(self, test_dataset: Any) -> PreparedDataLoader:
        """The loader of a test set, prepared."""
        return self._loader(test_dataset, self.args.per_device_eval_batch_size, None)

    def _loader(self, dataset: Any, batch_size: int, sampler: Any, *, saved: bool = False) -> PreparedDataLoader:
        collator = self.data_collator
        if self.args.remove_unused_columns:
            dataset, collator = drop_columns(dataset, collator, self.model, self.label_names)
        device = self.accelerator.device
        if self.accelerator.split_batches:
            # Each rank gets as many rows as the argument says, of a batch that is read as one.
            batch_size *= self.accelerator.num_processes
        said: dict[str, Any] = {"batch_size": batch_size, "sampler": sampler, "device": device}
        # An evaluation leaves nothing out.
        made = make_loader(self.args, dataset, collator, **said, drop_last=self.args.dataloader_drop_last and saved)
        # An evaluation begins at its first sample, also after a resume.
        return self.accelerator.prepare_data_loader(made, saved=saved)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Samples of a loader over all ranks."""
        total = getattr(dataloader, "total_dataset_length", None)
        return int(total) if total else len(getattr(dataloader, "dataset", dataloader))

    # Optimizer and schedule

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Make both, for so many optimizer steps."""
        self._planned_steps = num_training_steps
        self.create_optimizer()
        self.create_scheduler(num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer that the arguments or a DeepSpeed configuration describe, unless one was given."""
        if self.optimizer is not None:
            return self.optimizer
        model = model or self.model
        groups = optimizers.parameter_groups(model, self.get_decay_parameter_names(model), self.args.weight_decay)
        section = self._described("optimizer")
        if section is not None:
            said: dict[str, Any] = adam_arguments(section, self.args)
            self.optimizer = DummyOptim(groups, self.args.learning_rate, self.args.weight_decay, **said)
        else:
            cls, said = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
            if self.optimizer_cls_and_kwargs is None and "warmup_steps" in said and self._planned_steps is not None:
                said["warmup_steps"] = self.args.get_warmup_steps(self._planned_steps)
            self.optimizer = optimizers.build_optimizer(cls, groups, said, self.args)
        return self.optimizer

    @property
    def _describes_schedule(self) -> bool:
        """Whether the arguments describe the schedule, and neither the script nor DeepSpeed's configuration."""
        return self._given_optimizers[1] is None and self._described("scheduler") is None

    def _described(self, section: str) -> dict[str, Any] | None:
        """A section of the DeepSpeed configuration, whether the arguments or the launcher named it."""
        plugin = self.accelerator.deepspeed_plugin
        return None if plugin is None else plugin.settings.get(section)

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[type[Any], dict[str, Any]]:
        """The optimizer's class and its arguments but the parameters."""
        there = None if args.use_cpu else torch.accelerator.current_accelerator(check_available=True)
        return optimizers.optimizer_class(args, there or torch.device("cpu"))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters to which weight decay applies."""
        return optimizers.decaying_names(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule, unless one was given."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        optimizer = optimizer or self.optimizer
        warmup = self.args.get_warmup_steps(num_training_steps)
        if self._described("scheduler") is not None:
            self.lr_scheduler = DummyScheduler(optimizer, num_training_steps, max(1, warmup))
            return self.lr_scheduler
        more: Any = self.args.lr_scheduler_kwargs
        name = "constant" if self.args.optim.startswith("schedule_free") else self.args.lr_scheduler_type
        self.lr_scheduler = make_schedule(name, optimizer, warmup=warmup, total=num_training_steps, arguments=more)
        return self.lr_scheduler
