"""The training loop: epochs, optimizer steps of several micro-batches, and what is due after each step."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from paceline.trainer.callbacks.base import fire
from paceline.trainer.callbacks.best_checkpoint import note_metrics, read_metric
from paceline.trainer.loops.loss_meter import LossMeter
from paceline.trainer.loops.losses import LoopInputs, count_items
from paceline.trainer.loops.prediction import warn_of_missing_labels
from paceline.trainer.loops.token_counter import TokenCounter
from paceline.trainer.optim.schedules import follows_metric

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paceline.trainer.loops.length import TrainingLength

__all__ = ["TrainOutput", "TrainingLoop"]


class TrainOutput(NamedTuple):
    """What `train` returns.

    Attributes:
        global_step: Optimizer steps so far.
        training_loss: Mean loss of all steps, also of those before a checkpoint from which it was resumed.
        metrics: Runtime in seconds, throughput, and that loss.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class TrainingLoop:
    """One training, constructed when everything is prepared.

    Args:
        inputs: What it runs on.
        length: How long to train.
    """

    def __init__(self, inputs: LoopInputs, length: TrainingLength) -> None:
        self.hooks = hooks = inputs.hooks
        self.call = inputs.call
        self.model = model = inputs.model
        self.loader = loader = inputs.loader
        self.ignore_keys = inputs.ignore_keys
        self.length = length
        self.accelerator = hooks.accelerator
        self.args = hooks.args
        # Listed once: walking over the modules in every step would take longer than the step of a small model.
        self.parameters = list(model.parameters())
        self.meter = LossMeter(self.accelerator, only_finite=self.args.logging_nan_inf_filter)
        self.tokens = TokenCounter.for_run(hooks)
        self.all_tokens = TokenCounter.for_throughput(hooks)
        # Of all ranks, each once. None: a loader that batches by itself does not tell.
        self.samples: int | None = 0
        self._batch_size: int | None = getattr(loader, "total_batch_size", None)
        # Whether to look for labels in the first batch.
        self._checks_labels = bool(self.args.label_names) and hooks.eval_dataset is not None
        self.grad_norm: Tensor | None = None
        self.learning_rate = 0.0
        self._starts_step = True
        self._is_resumed = False
        # Whether running out of memory now could be due to the size of the micro-batch.
        self.in_batch = False
        # Of the loader before the current optimizer step, for `auto_find_batch_size`.
        self.position: dict[str, Any] = {}
        self.logged_at = hooks.state.global_step
        self._started = time.perf_counter()
        self._first_step = hooks.state.global_step

    def attach(self, loader: Any, model: nn.Module) -> None:
        """Continue with another loader of the same samples, and the model as it was prepared again."""
        self.loader, self.model = loader, model
        self._batch_size = getattr(loader, "total_batch_size", None)
        self.parameters = list(model.parameters())
        self._starts_step = True

    def resume(self) -> None:
        """Continue from the state of a checkpoint that was loaded."""
        self._first_step = self.hooks.state.global_step
        self._is_resumed = True

    def run(self) -> None:
        """Train to the end. Collective: every rank must call it."""
        self.hooks.control.new_training()
        fire(self.hooks, "on_train_begin")
        if self.args.eval_on_start and not self._is_resumed:
            # Without a step of the schedule, which follows what training changes.
            self.hooks.evaluate(ignore_keys=self.ignore_keys)
        if self._is_resumed:
            # What was requested, but not done yet, when the checkpoint was written.
            self._do_what_is_due()
        self.run_until_done()

    def run_until_done(self) -> None:
        """Train from the current step to the end. Collective: every rank must call it."""
        hooks, state = self.hooks, self.hooks.state
        hooks.control.should_training_stop |= state.global_step >= state.max_steps
        if state.updates_in_pass >= self.length.steps_per_epoch:
            # The checkpoint was written after the last step of an epoch, before what is due at its end.
            self._end_epoch()
        # With max_steps, the number of epochs follows: callbacks that end epochs early, or a resume with another batch
        # size, make it larger than was computed.
        epochs = self.length.num_train_epochs if self.args.max_steps <= 0 else math.inf
        while state.passes < epochs and not hooks.control.should_training_stop:
            self._run_epoch()
        self.meter.read()

    def _run_epoch(self) -> None:
        self.hooks.control.new_epoch()
        fire(self.hooks, "on_epoch_begin")
        if self.args.auto_find_batch_size:
            self.position = self._position_of_epoch()
        self.in_batch = True
        for inputs in self.loader:
            self._micro_batch(inputs)
            self.in_batch = True
            if not self.accelerator.sync_gradients:
                continue
            if self.args.auto_find_batch_size:
                self.position = self.loader.state_dict()
            if self._stops_epoch():
                break
        self._end_epoch()

    def _position_of_epoch(self) -> dict[str, Any]:
        """Where the loader begins, or resumes, the epoch that comes next."""
        position: dict[str, Any] = self.loader.state_dict()
        is_within = not position["ended"] and bool(position["samples"] or position["batches"])
        if is_within and not self.hooks.state.updates_in_pass:
            # The last epoch was ended early, and another loader would continue with its rest.
            self.loader.set_epoch(position["epoch"] + 1)
            position = self.loader.state_dict()
        return position

    def _end_epoch(self) -> None:
        state = self.hooks.state
        self.in_batch = False
        if self._is_epoch_over():
            state.passes += 1
            state.updates_in_pass = 0
        fire(self.hooks, "on_epoch_end")
        self._do_what_is_due()

    def _is_epoch_over(self) -> bool:
        """Whether to count the epoch; not if the training was stopped and could be resumed within it."""
        control = self.hooks.control
        is_complete = self.hooks.state.updates_in_pass >= self.length.steps_per_epoch
        return is_complete or control.should_epoch_stop or not control.should_training_stop

    def _stops_epoch(self) -> bool:
        control = self.hooks.control
        drops_rest = self.args.global_batch_size and self.args.dataloader_drop_last
        is_complete = drops_rest and self.hooks.state.updates_in_pass >= self.length.steps_per_epoch
        return bool(control.should_epoch_stop or control.should_training_stop or is_complete)

    def _count_items(self, inputs: Any) -> Tensor | None:
        """The targets by which a micro-batch's loss is weighted, shape []; None weighs all micro-batches equally.

        With a global batch size each sample counts once: the last batch of an epoch stays short, and a rank without
        samples left gets a batch with weight 0.
        """
        items = count_items(self.hooks, self.call, inputs)
        if self.loader.fill_batches:
            return items
        counts, rank = self.loader.counts, self.accelerator.process_index
        if items is None:
            if self.call.takes_num_items:
                return None
            items = torch.full((), counts.rows[rank], dtype=torch.int64, device=self.accelerator.device)
        if counts.real[rank]:
            return items
        return torch.zeros_like(items)

    def _micro_batch(self, inputs: Any) -> None:
        hooks, accelerator = self.hooks, self.accelerator
        if self._starts_step:
            hooks.control.new_step()
            fire(hooks, "on_step_begin")
        if self._checks_labels:
            self._checks_labels = False
            warn_of_missing_labels(hooks.label_names, inputs)
        with accelerator.accumulate(self.model):
            items = self._count_items(inputs)
            self._count_inputs(inputs)
            self.meter.add(hooks.training_step(self.model, inputs, items), items)
            if accelerator.sync_gradients:
                self.in_batch = False
                self._optimizer_step()
        self._starts_step = accelerator.sync_gradients
        if accelerator.sync_gradients:
            self._end_step()
        else:
            fire(hooks, "on_substep_end")

    def _count_inputs(self, inputs: Any) -> None:
        if self.tokens is not None:
            self.tokens.add(inputs)
        self.all_tokens.add_tokens(inputs)
        if self.samples is None:
            return
        if self._batch_size is not None and not self.loader.end_of_dataloader:
            self.samples += self._batch_size
            return
        # The last batch may be short, or be filled up; others differ in size.
        counts = self.loader.counts
        self.samples = self.samples + sum(counts.real) if counts.counted else None

    def _optimizer_step(self) -> None:
        hooks, optimizer = self.hooks, self.hooks.optimizer
        if self.args.max_grad_norm > 0:
            self.grad_norm = self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        fire(hooks, "on_pre_optimizer_step")
        optimizer.step()
        fire(hooks, "on_optimizer_step")
        self.learning_rate = optimizer.param_groups[0]["lr"]
        if not follows_metric(hooks.lr_scheduler):
            hooks.lr_scheduler.step()
        optimizer.zero_grad()

    def _end_step(self) -> None:
        hooks, state = self.hooks, self.hooks.state
        self.meter.end_step()
        state.global_step += 1
        state.updates_in_pass += 1
        state.epoch = state.passes + min(1.0, state.updates_in_pass * self.length.epochs_per_step)
        if self.tokens is not None and self.tokens.is_spent(state):
            hooks.control.should_training_stop = True
        every = self.args.torch_empty_cache_steps
        if every is not None and state.global_step % every == 0 and self.accelerator.device.type != "cpu":
            torch.accelerator.empty_cache()
        fire(hooks, "on_step_end")
        self._do_what_is_due()

    def _do_what_is_due(self) -> None:
        """Log, evaluate and save, if requested. Collective: every rank must call it."""
        hooks = self.hooks
        # `hooks.control` is read each time, because a callback may replace it.
        if hooks.control.should_log and hooks.state.global_step > self.logged_at:
            self._log()
        hooks.control.should_log = False
        if hooks.control.should_evaluate:
            is_best = note_metrics(hooks.state, self.args, self._evaluate())
            hooks.control.should_evaluate = False
            if self.args.save_strategy == "best":
                hooks.control.should_save |= is_best
        if hooks.control.should_save:
            hooks.control.should_save = False
            hooks.save_checkpoint()
            fire(hooks, "on_save")

    def _evaluate(self) -> dict[str, float]:
        """Evaluate, and step a scheduler that follows the metric. Collective: every rank must call it."""
        metrics = self.hooks.evaluate(ignore_keys=self.ignore_keys)
        if follows_metric(self.hooks.lr_scheduler):
            self.hooks.lr_scheduler.step(read_metric(self.args.metric_for_best_model, metrics))
        return metrics

    def _log(self) -> None:
        hooks, state = self.hooks, self.hooks.state
        loss, has_loss = self.meter.read()
        logs: dict[str, float] = {"loss": loss} if has_loss else {}
        if self.grad_norm is not None:
            logs["grad_norm"] = float(self.grad_norm)
        logs["learning_rate"] = float(self.learning_rate)
        if self.tokens is not None:
            state.num_input_tokens_seen = self.tokens.read()
            logs["num_input_tokens_seen"] = state.num_input_tokens_seen
        hooks.tokens_seen = self.all_tokens.read()
        self.logged_at = state.global_step
        hooks.log(logs)

    def metrics(self) -> dict[str, float]:
        """Runtime in seconds and throughput of this call, and the mean loss of the whole training."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        steps = self.hooks.state.global_step - self._first_step
        memory = {}
        if not self.args.skip_memory_metrics:
            memory = {"peak_memory_bytes": float(self.accelerator.peak_memory())}
        throughput = {} if self.samples is None else {"train_samples_per_second": self.samples / seconds}
        return {
            **memory,
            "train_runtime": seconds,
            **throughput,
            "train_steps_per_second": steps / seconds,
            "total_flos": 0.0,
            "train_loss": self.meter.mean_of_all(),
        }
