"""The training loop: passes, windows of micro-batches, and what is due after each step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from paceline.errors import ConfigError, Problem
from paceline.trainer.loops.loss_meter import LossMeter
from paceline.trainer.loops.token_counter import TokenCounter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paceline.accelerator.accelerator import Accelerator
    from paceline.trainer.arguments.arguments import TrainingArguments
    from paceline.trainer.trainer import Trainer

__all__ = ["Plan", "TrainOutput", "TrainingLoop", "plan_training"]


class TrainOutput(NamedTuple):
    """What `train` returns.

    Attributes:
        global_step: Optimizer steps that were taken.
        training_loss: Mean loss of the steps of this call.
        metrics: Times, rates and that loss.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train.

    Attributes:
        max_steps: Optimizer steps of the whole training.
        num_train_epochs: Passes of the whole training, the last one counted whole.
        updates_per_pass: Optimizer steps of a pass; all of them where the data has no length.
        epoch_of_update: The part of a pass that a whole optimizer step is.
        batch_size: Samples of an optimizer step over all ranks.
        num_samples: Samples of the whole training.
    """

    max_steps: int
    num_train_epochs: int
    updates_per_pass: int
    epoch_of_update: float
    batch_size: int
    num_samples: int


def plan_training(args: TrainingArguments, loader: Any, *, accumulation: int, total_batch: int) -> Plan:
    """Work out the steps and passes.

    Raises:
        ConfigError: The data has no length and nobody said how many steps to take.
    """
    try:
        batches: int | None = len(loader)
    except TypeError:
        batches = None
    if batches is None:
        if args.max_steps <= 0:
            what = "is missing for data that has no length"
            raise ConfigError([Problem("TrainingArguments(…)", "max_steps", what, hint="say how many steps to take")])
        samples = args.max_steps * total_batch
        return Plan(args.max_steps, 2**31, args.max_steps, 1 / args.max_steps, total_batch, samples)
    updates, share = max(1, math.ceil(batches / accumulation)), accumulation / batches
    length = getattr(loader, "total_dataset_length", None)
    if args.global_batch_size is not None and length:
        # By samples, so that neither depends on how a step is split: a pass that drops ends with its last whole step.
        updates = max(1, length // total_batch) if args.dataloader_drop_last else math.ceil(length / total_batch)
        share = 1 / updates if args.dataloader_drop_last else total_batch / length
    if args.max_steps > 0:
        passes = math.ceil(args.max_steps / updates)
        return Plan(args.max_steps, passes, updates, share, total_batch, args.max_steps * total_batch)
    steps = math.ceil(args.num_train_epochs * updates)
    samples = length or batches * total_batch
    passes = math.ceil(args.num_train_epochs)
    return Plan(steps, passes, updates, share, total_batch, int(samples * args.num_train_epochs))


class TrainingLoop:
    """One run of `train`: everything is prepared when it begins.

    Args:
        trainer: Whose steps, callbacks and state.
        model: As prepared.
        loader: As prepared.
        plan: How long.
    """

    def __init__(self, trainer: Trainer, model: nn.Module, loader: Any, plan: Plan) -> None:
        self.trainer = trainer
        self.model = model
        self.loader = loader
        self.plan = plan
        self.accelerator = trainer.accelerator
        self.args = trainer.args
        # Listed once: a walk over the model in every step would cost more than the step of a small one.
        self.parameters = list(model.parameters())
        self.meter = LossMeter(self.accelerator, only_finite=self.args.logging_nan_inf_filter)
        self.tokens = TokenCounter.for_run(trainer)
        # Sizes are known to the host, so that throughput in tokens costs no wait.
        self.seen = TokenCounter.for_throughput(trainer)
        # Samples over all ranks, where batches vary in size; else they follow from the steps.
        self.samples = 0
        # Whether the first batch may still show that an evaluation will find no labels.
        self._doubts_labels = bool(self.args.label_names) and trainer.eval_dataset is not None
        self._counts_samples = getattr(loader, "total_batch_size", None) is None
        self.grad_norm: Tensor | None = None
        self.learning_rate = 0.0
        self._opens_window = True
        self._resumed = False
        # Whether memory that runs out now may do so for the size of the micro-batch.
        self.in_batch = False
        self.position: dict[str, Any] = loader.state_dict()
        self.logged_at = trainer.state.global_step
        self.begun = time.perf_counter()
        self.began_at = trainer.state.global_step

    def attach(self, accelerator: Accelerator, model: nn.Module) -> None:
        """Go on with another Accelerator around the same training."""
        self.accelerator, self.model = accelerator, model
        self.parameters = list(model.parameters())
        self._opens_window = True

    def resume(self) -> None:
        """Take over where the state says that a training was, after it was loaded."""
        self.began_at = self.trainer.state.global_step
        self._resumed = True

    def run(self) -> None:
        """Train to the end. Collective: every rank must call it."""
        trainer = self.trainer
        trainer.control.new_training()
        trainer.fire("on_train_begin")
        if self.args.eval_on_start and not self._resumed:
            trainer.evaluate_in_training()
        if self._resumed:
            # What was due when the checkpoint was written, and not done yet.
            self.after_step()
        self.run_until_done()

    def run_until_done(self) -> None:
        """Train from here to the end. Collective: every rank must call it."""
        trainer, state = self.trainer, self.trainer.state
        trainer.control.should_training_stop |= state.global_step >= state.max_steps
        if state.updates_in_pass >= self.plan.updates_per_pass:
            # Saved with the last step of a pass, and before what is due at its end.
            self._end_pass()
        # With max_steps it is the steps that count: passes that a callback cuts short, or another batch size in the
        # run that is resumed, make more of them than were planned.
        passes = self.plan.num_train_epochs if self.args.max_steps <= 0 else math.inf
        while state.passes < passes and not trainer.control.should_training_stop:
            self._one_pass()
        self.meter.read()

    def _one_pass(self) -> None:
        trainer = self.trainer
        trainer.control.new_epoch()
        trainer.fire("on_epoch_begin")
        self.in_batch = True
        for inputs in self.loader:
            self._micro_batch(inputs)
            self.in_batch = True
            if self.accelerator.sync_gradients and self.args.auto_find_batch_size:
                self.position = self.loader.state_dict()
            if self.accelerator.sync_gradients and self._is_over():
                break
        self._end_pass()

    def _end_pass(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        self.in_batch = False
        if self._is_pass_over():
            state.passes += 1
            state.updates_in_pass = 0
        trainer.fire("on_epoch_end")
        self.after_step()

    def _is_pass_over(self) -> bool:
        """Whether the next pass would be another one: not where a training that is stopped could go on within it."""
        control = self.trainer.control
        is_whole = self.trainer.state.updates_in_pass >= self.plan.updates_per_pass
        return is_whole or control.should_epoch_stop or not control.should_training_stop

    def _is_over(self) -> bool:
        control, dropped = self.trainer.control, self.args.global_batch_size and self.args.dataloader_drop_last
        whole = dropped and self.trainer.state.updates_in_pass >= self.plan.updates_per_pass
        return bool(control.should_epoch_stop or control.should_training_stop or whole)

    def _count_items(self, inputs: Any) -> Tensor | None:
        """The targets by which a micro-batch's loss is weighted, shape []; None weighs all alike.

        With a global batch size each sample counts once: the loader leaves the last batch of a pass short, and a rank
        that has no sample left takes part with no weight.
        """
        trainer = self.trainer
        items = trainer.count_items(inputs)
        if self.loader.fill_batches:
            return items
        counts, rank = self.loader.counts, self.accelerator.process_index
        if items is None:
            if trainer.divides_by_items:
                return None
            items = torch.full((), counts.rows[rank], dtype=torch.int64, device=self.accelerator.device)
        return items if counts.real[rank] else torch.zeros_like(items)

    def _micro_batch(self, inputs: Any) -> None:
        trainer, accelerator = self.trainer, self.accelerator
        if self._opens_window:
            trainer.control.new_step()
            trainer.fire("on_step_begin")
        if self._doubts_labels:
            self._doubts_labels = False
            trainer.doubt_labels(inputs)
        with accelerator.accumulate(self.model):
            items = self._count_items(inputs)
            if self.tokens is not None:
                self.tokens.add(inputs)
            self.seen.add_tokens(inputs)
            if self._counts_samples:
                self.samples += sum(self.loader.counts.real)
            self.meter.add(trainer.training_step(self.model, inputs, items), items)
            if accelerator.sync_gradients:
                self.in_batch = False
                self._optimizer_step()
        if accelerator.sync_gradients:
            self._opens_window = True
            self._end_step()
        else:
            self._opens_window = False
            trainer.fire("on_substep_end")

    def _optimizer_step(self) -> None:
        trainer, optimizer, scheduler = self.trainer, self.trainer.optimizer, self.trainer.lr_scheduler
        if self.args.max_grad_norm > 0:
            self.grad_norm = self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        trainer.fire("on_pre_optimizer_step")
        optimizer.step()
        trainer.fire("on_optimizer_step")
        self.learning_rate = optimizer.param_groups[0]["lr"]
        if not trainer.scheduler_follows_metric:
            scheduler.step()
        optimizer.zero_grad()

    def _end_step(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        self.meter.end_step()
        state.global_step += 1
        state.updates_in_pass += 1
        state.epoch = state.passes + min(1.0, state.updates_in_pass * self.plan.epoch_of_update)
        if self.tokens is not None and self.tokens.is_spent(state):
            trainer.control.should_training_stop = True
        every = self.args.torch_empty_cache_steps
        if every is not None and state.global_step % every == 0 and self.accelerator.device.type != "cpu":
            torch.accelerator.empty_cache()
        trainer.fire("on_step_end")
        self.after_step()

    def after_step(self) -> None:
        """Log, evaluate and save, if that is due. Collective: every rank must call it."""
        trainer = self.trainer
        # Read anew each time: a callback may have put another control in its place.
        if trainer.control.should_log and trainer.state.global_step > self.logged_at:
            self._log()
        trainer.control.should_log = False
        if trainer.control.should_evaluate:
            better = trainer.note_metrics(trainer.evaluate_in_training())
            trainer.control.should_evaluate = False
            if self.args.save_strategy == "best":
                # Besides what a callback asks for.
                trainer.control.should_save |= better
        if trainer.control.should_save:
            trainer.control.should_save = False
            trainer.save_checkpoint()
            trainer.fire("on_save")

    def _log(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        loss, there = self.meter.read()
        logs: dict[str, float] = {"loss": loss} if there else {}
        if self.grad_norm is not None:
            logs["grad_norm"] = float(self.grad_norm)
        logs["learning_rate"] = float(self.learning_rate)
        if self.tokens is not None:
            state.num_input_tokens_seen = self.tokens.read()
            logs["num_input_tokens_seen"] = state.num_input_tokens_seen
        trainer.tokens_seen = self.seen.read()
        self.logged_at = state.global_step
        trainer.log(logs)

    def metrics(self) -> dict[str, float]:
        """Times, rates and the mean loss of this call."""
        took = max(time.perf_counter() - self.begun, 1e-9)
        steps = self.trainer.state.global_step - self.began_at
        samples = self.samples if self._counts_samples else steps * self.trainer.state.samples_per_step
        memory = {} if self.args.skip_memory_metrics else {"peak_memory_bytes": float(self.accelerator.peak_memory())}
        return {
            **memory,
            "train_runtime": took,
            "train_samples_per_second": samples / took,
            "train_steps_per_second": steps / took,
            "total_flos": 0.0,
            "train_loss": self.meter.mean_of_all(),
        }
