"""`Trainer`: the public face; everything distributed is left to the Accelerator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paceline.accelerator.oom_report import find_out_of_memory
from paceline.environment.logging import get_logger
from paceline.environment.seeding import set_seed
from paceline.errors import CheckpointError, DamagedCheckpointError, NotBuiltError, named
from paceline.strategies import adapters
from paceline.trainer import model_files as saving
from paceline.trainer.arguments.arguments import TrainingArguments
from paceline.trainer.callbacks import best_checkpoint as best
from paceline.trainer.loops import losses
from paceline.trainer.loops.auto_batch_size import can_retry_in_process, halve_micro_batch, record_halved_batch
from paceline.trainer.loops.resuming import carry_over, pace_of, take_over
from paceline.trainer.loops.start_summary import summarize
from paceline.trainer.loops.training import Plan, TrainingLoop, TrainOutput, plan_training
from paceline.trainer.model_changes import noisy_embeddings
from paceline.trainer.optim import optimizers
from paceline.trainer.scripted import Scripted
from paceline.trainer.state import TrainerState

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["Trainer"]

logger = get_logger(__name__)


class Trainer(Scripted):
    """Trains, evaluates and predicts with a model whose output carries a loss.

    Batches that are mappings become keywords of the model, sequences its positions. With `compute_loss_func` the
    model needs no loss of its own: labels are taken out of the batch (`labels`, or the last of a sequence) and the
    function is called as `compute_loss_func(outputs, labels, num_items_in_batch=n)`; it returns the mean over the
    batch's n targets.

    Losses are weighted by how many targets each micro-batch has that are not -100, so that an optimizer step is the
    step of the whole global batch at once, however it is split over micro-batches and ranks.

    Args:
        model: Any `nn.Module`.
        args: What to do; the defaults when left out.
        data_collator: From a list of samples to a batch.
        train_dataset: Of samples: mappings, or tuples as `default_collate` of torch takes them.
        eval_dataset: The same, or a mapping of several by name.
        processing_class: A tokenizer: its `pad` collates, its `save_pretrained` is called beside the model's files.
        model_init: Makes the model in place of `model`; each further `train` begins with a new one.
        compute_loss_func: See above.
        compute_metrics: From an `EvalPrediction` to a mapping of numbers. An object with `update` and `compute`
            gets one batch after the other, so that nothing has to be kept.
        callbacks: Callbacks besides the built-in ones.
        optimizers: An optimizer and a scheduler in place of those that the arguments describe.
        optimizer_cls_and_kwargs: A class and arguments in place of `optim`.
        preprocess_logits_for_metrics: From (logits, labels) of a batch to what is gathered and kept.
    """

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train to the end. Collective: every rank must call it.

        Args:
            resume_from_checkpoint: A folder, or True for the newest whole checkpoint under `output_dir`.
            trial: Only None: paceline searches for no hyper-parameters.
            ignore_keys_for_eval: Outputs of the model that are no predictions.

        Raises:
            ConfigError: The length of the training cannot be known.
            CheckpointError: The checkpoint is missing or broken.
        """
        if trial is not None:
            raise NotBuiltError("train(trial=…)", "Let the search build one Trainer for each trial")
        self._ignore_keys = ignore_keys_for_eval
        asked = None if str(resume_from_checkpoint).lower() in ("none", "false") else resume_from_checkpoint
        if asked is None and self.args.save_strategy != "no":
            self._refuse_used_folder()
        self.is_in_train = True
        try:
            loop = self._prepare_training()
            self._resume(asked, loop)
            self._say_what_begins(loop)
            with noisy_embeddings(self.model, self.args.neftune_noise_alpha):
                self._run(loop)
            return self._conclude(loop)
        finally:
            self.is_in_train = False
            self.accelerator.on_preemption(None)

    def _refuse_used_folder(self) -> None:
        """Refuse to mix the checkpoints of a new training with those of another. Collective."""
        # Ranks that a launcher starts again replace what they saved before; so does a further training of this Trainer.
        own = self._trained or self.args.world.restart_count > 0
        found = [saving.names_of(self.args.output_dir) if self.is_world_process_zero() and not own else []]
        names = self.accelerator.broadcast_object_list(found)[0]
        if names:
            raise CheckpointError(
                f"A new training is to save into {self.args.output_dir}, which holds {named(names)} of another",
                "Some would be replaced, and the others would be taken for its own when it is resumed or cleaned up",
                "Go on from them with train(resume_from_checkpoint=True), choose another output_dir, or move them away",
            )

    def _prepare_training(self) -> TrainingLoop:
        if self._trained:
            self.accelerator.free_memory()
            if self.model_init is not None:
                set_seed(self.args.seed, deterministic=self.args.full_determinism)
                self.model = self.model_wrapped = self._make_model(None)
                self._call = losses.ModelCall(self.model)
        self._trained = True
        loader = self._train_loader = self._training_loader()
        plan = self.set_initial_training_values(self.args, loader)
        self.optimizer, self.lr_scheduler = self._given_optimizers
        self.create_optimizer_and_scheduler(plan.max_steps)
        self._prepare_model()
        self._switch_optimizer("train")
        self.state = self._state_of(plan)
        self._show_callbacks(train_dataloader=loader, eval_dataloader=None)
        loop = TrainingLoop(self, self.model_wrapped, loader, plan)
        self._progress.loop = loop
        self.accelerator.register_for_checkpointing(self._progress)
        if self.args.save_strategy != "no" and not self.args.save_only_model:
            self.accelerator.on_preemption(self.save_checkpoint)
        return loop

    def _say_what_begins(self, loop: TrainingLoop) -> None:
        """Print what is about to be done, on the main process, unless only warnings were asked for."""
        if self.args.log_level not in ("warning", "error", "critical"):
            text = summarize(self, loop)
            self.accelerator.print(text, flush=True)

    def _resume(self, asked: str | bool | None, loop: TrainingLoop) -> None:
        if asked is None:
            return
        newest = str(asked).lower() == "true"
        place = None if newest else Path(str(asked)).expanduser()
        told = optimizers.settings_of(self.optimizer)
        try:
            # Without a folder all ranks agree on the newest whole one, with a line for each that was skipped.
            found = self.accelerator.load_state(place)
        except DamagedCheckpointError as error:
            weights = place or saving.newest_of(self.args.output_dir)
            if weights is None or not saving.holds_weights_alone(weights):
                raise
            what = f"resume_from_checkpoint: {weights} holds weights alone"
            hint = "Begin anew with these weights in the model, or train without save_only_model"
            raise CheckpointError(what, "It was written with save_only_model", hint) from error
        if found is None:
            raise CheckpointError(
                f"resume_from_checkpoint=True, and there is no checkpoint under {self.args.output_dir}",
                "There is nothing to go on from",
                "Name a checkpoint, or leave it out to begin",
            )
        self._say_what_is_kept(told)
        carry_over(self, loop, self._progress.saved_pace or take_over(self, loop, found), found)
        self._find_best_again(found)
        if self.is_world_process_zero():
            saving.warn_of_later(self.args.output_dir, found, self.state.global_step)
        if self.args.ignore_data_skip:
            loop.loader.set_epoch(self.state.passes + 1)
        loop.resume()

    def _find_best_again(self, resumed_from: str) -> None:
        # Of machines with disks of their own, rank 0's is where weights are loaded from and old checkpoints removed.
        seen = [best.find_best_again(self.state, Path(resumed_from)) if self.is_world_process_zero() else None]
        best.go_on(self.state, resumed_from, self.accelerator.broadcast_object_list(seen)[0])
        best.watch_metric(self.state, self.args)

    def _say_what_is_kept(self, told: list[dict[str, Any]]) -> None:
        """Warn of settings that a checkpoint brought back, and that the arguments want otherwise by now."""
        if self._given_optimizers != (None, None):
            return
        for name, (asked_for, kept) in optimizers.differences(told, optimizers.settings_of(self.optimizer)).items():
            logger.warning(
                "The optimizer goes on with the checkpoint's %s = %s, not with %s, which this run's arguments say.",
                name, kept, asked_for,
            )  # fmt: skip

    def _run(self, loop: TrainingLoop) -> None:
        """Train; with `auto_find_batch_size`, use smaller micro-batches when memory runs out."""
        if not self.args.auto_find_batch_size:
            return loop.run()
        by_itself, begun = can_retry_in_process(self), False
        while True:
            try:
                return loop.run() if not begun else loop.run_until_done()
            except (MemoryError, RuntimeError) as error:
                # A smaller batch helps neither an evaluation nor an optimizer, and the latter may be half done.
                if find_out_of_memory(error) is None or not loop.in_batch or self._batch_plan[0] == 1:
                    raise
                if not by_itself:
                    record_halved_batch(self)
                    raise
            begun = True
            halve_micro_batch(self, loop)

    def rebuild(self, loop: TrainingLoop) -> None:
        """Build the Accelerator anew around the same model, optimizer and schedule, and go on at the same sample."""
        optimizer, scheduler = self.optimizer.optimizer, self.lr_scheduler
        before = self.accelerator
        self.create_accelerator_and_postprocess()
        self.accelerator.transfer_trackers(before)
        self._train_loader = loop.loader = self._training_loader()
        loop.loader.load_state_dict(loop.position)
        self.optimizer, self.lr_scheduler = optimizer, getattr(scheduler, "scheduler", scheduler)
        self._prepare_model()
        self._show_callbacks(train_dataloader=loop.loader)
        loop.attach(self.accelerator, self.model_wrapped)

    def _prepare_model(self) -> None:
        self.scheduler_follows_metric = isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        together = [self.model, self.optimizer] + ([] if self.scheduler_follows_metric else [self.lr_scheduler])
        prepared = self.accelerator.prepare(*together)
        self.model_wrapped, self.optimizer = prepared[:2]
        if self.scheduler_follows_metric:
            self.lr_scheduler.optimizer = self.optimizer
            self.accelerator.register_for_checkpointing(self.lr_scheduler)
        else:
            self.lr_scheduler = prepared[2]

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Plan:
        """How many steps and passes there will be."""
        micro, accumulation = self._batch_plan
        total = micro * accumulation * self.accelerator.num_processes
        return plan_training(args, dataloader, accumulation=accumulation, total_batch=total)

    def _state_of(self, plan: Plan) -> TrainerState:
        state = self._new_state()
        state.max_steps, state.num_train_epochs = plan.max_steps, plan.num_train_epochs
        state.train_batch_size = self._batch_plan[0]
        pace = pace_of(plan, self._train_loader, self._batch_plan[1])
        state.samples_per_step, state.updates_per_pass = pace.samples_per_step, pace.updates_per_pass
        best.watch_metric(state, self.args)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(state, name, self.args.interval(name, plan.max_steps))
        return state

    def _conclude(self, loop: TrainingLoop) -> TrainOutput:
        metrics = loop.metrics()
        metrics["epoch"] = self.state.epoch
        self.log(dict(metrics))
        self.accelerator.wait_for_save()
        # What is evaluated and saved from here on are the averaged weights, where the optimizer keeps such.
        self._switch_optimizer("eval")
        if self.args.load_best_model_at_end:
            self._load_best(self.state.best_model_checkpoint)
        self.fire("on_train_end")
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def _load_best(self, folder: str | None) -> None:
        step = self.state.best_global_step
        if not best.is_best_saved(self.state):
            found = "no evaluation gave a number" if step is None else f"nothing was saved at step {step}, the best"
            taken = "the last weights stay" if folder is None else f"{folder} was the best that was saved"
            logger.warning("load_best_model_at_end: %s; %s.", found, taken)
        if folder is None:
            return
        logger.info("Loading the best checkpoint %s (%s).", folder, self.state.best_saved_metric)
        if self.args.save_only_model:
            saving.load_weights(self, Path(folder))
            return
        kept = self.state.state_dict()
        self.accelerator.load_state(folder)
        self.state.load_state_dict(kept)
        self._switch_optimizer("eval")

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            model: As prepared.
            inputs: The micro-batch, on the device.
            num_items_in_batch: Its targets, shape []; None counts micro-batches instead.

        Returns:
            The mean loss over its targets, detached, shape [], on the device.
        """
        # Both: an engine of DeepSpeed that was put into evaluation mode puts only what it wraps there.
        if not (model.training and self.model.training):
            model.train()
        inputs = self._prepare_inputs(inputs)
        loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is None:
            self.accelerator.backward(loss)
        else:
            self.accelerator.backward(loss * num_items_in_batch, weight=num_items_in_batch)
        return loss.detach()

    # Saving

    def save_checkpoint(self) -> None:
        """Write everything that is needed to go on into `output_dir`, and remove what is too old.

        Collective: every rank must call it.
        """
        folder = self._checkpoint_folder()
        best.note_checkpoint(self.state, folder, greater=bool(self.args.greater_is_better))
        self._progress.before_save()
        if self.args.save_only_model:
            self.save_model(folder)
        else:
            self.accelerator.save_state(folder)
            if adapters.is_adapted(self.model):
                # Beside the training state, which has no form that PEFT reads.
                self.accelerator.save_adapter(self.model_wrapped, folder)
        if self.accelerator.is_main_process:
            self.state.save_to_json(Path(folder) / saving.STATE_FILE)
            saving.write_companions(self, Path(folder))
            kept = [path for path in (folder, self.state.best_model_checkpoint) if path]
            saving.rotate(Path(folder), limit=self.args.save_total_limit, keep=kept)

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the weights so that `from_pretrained` and safetensors read them. Collective.

        Of a schedule-free optimizer these are the averaged weights, as they are evaluated.
        """
        self._switch_optimizer("eval")
        saving.save_model_files(self, Path(output_dir or self.args.output_dir).expanduser())
        self._switch_optimizer("train")
