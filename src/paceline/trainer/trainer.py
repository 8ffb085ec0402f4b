"""`Trainer`: the public class. It composes the loops and leaves everything distributed to the Accelerator."""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paceline.environment.random_generators import set_seed
from paceline.errors import NotBuiltError, PrepareError, explains_keywords
from paceline.strategies.placeholders import DummyOptim, DummyScheduler
from paceline.trainer import model_files, result_files
from paceline.trainer.arguments.accelerator import build_accelerator
from paceline.trainer.arguments.constructor_checks import (
    check_constructor,
    require_own_arguments,
    warn_of_unused_overrides,
)
from paceline.trainer.arguments.deepspeed import adam_arguments
from paceline.trainer.batches.collate import columns_of, label_names_of
from paceline.trainer.batches.loaders import (
    choose_collator,
    named_dataset,
    packed_loader,
    prepared_loader,
    train_sampler,
)
from paceline.trainer.batches.packing import check_packing
from paceline.trainer.callbacks import best_checkpoint
from paceline.trainer.callbacks.base import CallbackHandler, fire
from paceline.trainer.callbacks.builtin import with_defaults
from paceline.trainer.loops import losses
from paceline.trainer.loops.auto_batch_size import agree_on_plan, recorded_micro_batch, run_with_smaller_batches
from paceline.trainer.loops.chunked_loss import ChunkedLoss, enable_chunked_loss
from paceline.trainer.loops.evaluation import EvalLoopOutput, EvaluationLoop, PredictionOutput
from paceline.trainer.loops.length import TrainingLength, require_even_batches, step_size, training_length
from paceline.trainer.loops.prediction import predict_batch, warn_of_lost_order
from paceline.trainer.loops.progress import Progress
from paceline.trainer.loops.resuming import resume_training
from paceline.trainer.loops.start_summary import summarize
from paceline.trainer.loops.training import TrainingLoop, TrainOutput
from paceline.trainer.model_changes import checkpoint_activations, noisy_embeddings
from paceline.trainer.optim import optimizers as optimizer_choice
from paceline.trainer.optim.given import GivenOptimizers
from paceline.trainer.optim.muon import MuonAdamW, muon_groups
from paceline.trainer.optim.schedules import follows_metric, make_schedule
from paceline.trainer.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    from paceline.data import PreparedDataLoader
    from paceline.trainer.arguments.arguments import BatchPlan, TrainingArguments

__all__ = ["Trainer"]


class Trainer:
    """Trains, evaluates and predicts with any `nn.Module` whose output contains a loss.

    A batch that is a mapping is passed to the model as keyword arguments, a sequence as positional ones. With
    `compute_loss_func`, the model needs no loss: labels are taken out of the batch (`labels`, or the last element of a
    sequence), and the function is called as `compute_loss_func(outputs, labels, num_items_in_batch=n)`; it returns the
    mean over the batch's n targets.

    Each micro-batch's loss is weighted by its number of targets (labels that are not -100), so that an optimizer step
    is that of the whole global batch, however it is split into micro-batches and over ranks.

    Args:
        model: The model; give either this or `model_init`.
        args: All settings; None takes the defaults.
        data_collator: Turns a list of samples into a batch; None pads with `processing_class` if that is a tokenizer,
            else stacks.
        train_dataset: The training samples: mappings, or tuples that torch's `default_collate` takes.
        eval_dataset: The evaluation samples, or a mapping of several sets by name.
        processing_class: A tokenizer or processor: its `pad` collates, and its `save_pretrained` is called where the
            model is saved.
        model_init: Returns the model; every further `train` starts with a new one.
        compute_loss_func: Replaces the model's loss, see above.
        compute_metrics: Turns an `EvalPrediction` into a mapping of numbers. An object with `update` and `compute` gets
            each batch instead, so that no predictions are kept.
        callbacks: Callbacks in addition to the built-in ones.
        optimizers: An optimizer and a scheduler, either of which may be None; they replace those of the arguments.
        optimizer_cls_and_kwargs: An optimizer class and its keyword arguments; they replace `optim`.
        preprocess_logits_for_metrics: Turns (logits, labels) of a batch into what is gathered and kept as predictions.

    Raises:
        ConfigError: The arguments contradict each other, or the launcher's configuration.
        PrepareError: `args` is of another class, or there is not exactly one of `model` and `model_init`.

    Example:
        >>> args = TrainingArguments(output_dir="runs/a", max_steps=2, use_cpu=True, log_level="error")
        >>> trainer = Trainer(model, args, train_dataset=dataset, eval_dataset=dataset)
        >>> trainer.train().global_step
        2
        >>> sorted(trainer.evaluate())[:2]
        ['epoch', 'eval_loss']
    """

    # What a subclass has set of `is_fsdp_enabled` and `is_deepspeed_enabled`.
    _sets_fsdp: bool | None = None
    _sets_deepspeed: bool | None = None

    @explains_keywords({"tokenizer": "write processing_class"})
    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[Any], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Any], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        set_before = frozenset(vars(self))
        self.args: TrainingArguments = require_own_arguments(args)
        set_seed(self.args.seed, deterministic=self.args.full_determinism)
        self.model_init = model_init
        self.compute_loss_func = compute_loss_func
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.processing_class = processing_class
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.data_collator = choose_collator(data_collator, processing_class)
        self.optimizer: Any
        self.lr_scheduler: Any
        self.optimizer, self.lr_scheduler = optimizers
        self._given_optimizers = GivenOptimizers(*optimizers)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self._batch_plan = self.args.batch_plan(self.args.world_size, recorded_micro_batch(self.args))
        self._planned_from = _batch_sizes(self.args)
        # Before the model is made: under ZeRO stage 3 it may be sharded while it is constructed.
        self.create_accelerator_and_postprocess()
        self._agree_on_batch_plan()
        self.model = self._make_model(model)
        self.model_wrapped: nn.Module = self.model
        self._call = losses.ModelCall(self.model, packed=self.args.packing)
        label_names = self.args.label_names
        self.label_names = label_names_of(self.model) if label_names is None else label_names
        self.is_in_train = False
        # Input tokens of all ranks, padding included, as far as they were logged.
        self.tokens_seen = 0
        # Optimizer steps of the training, once they are known.
        self._planned_steps: int | None = None
        # The loss without logits, chosen in the first forward of a training.
        self._chunked_loss: ChunkedLoss | None = None
        self._chooses_loss = False
        # Whether the current evaluation must have labels for `compute_metrics`.
        self._requires_metrics = False
        # Of a schedule-free optimizer, whose averaged weights the model has in `eval`.
        self._optimizer_mode = "train"
        self.state = self._new_state()
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(with_defaults(callbacks or (), self.args, self))
        self._update_callback_things(train_dataloader=None, eval_dataloader=None)
        self._progress = Progress(self)
        self._has_trained = False
        self._own_names = frozenset([*vars(self), "_own_names"]) - set_before
        check_constructor(
            self.args,
            eval_dataset=eval_dataset,
            optimizer=optimizers[0],
            scheduler=optimizers[1],
            optimizer_class=optimizer_cls_and_kwargs,
            compute_metrics=compute_metrics,
            compute_loss_func=compute_loss_func,
            data_collator=data_collator,
            takes=self._columns(),
            deepspeed=self._deepspeed_settings,
        )
        warn_of_unused_overrides(type(self), Trainer, self.args)
        fire(self, "on_init_end")

    # Construction

    def create_accelerator_and_postprocess(self) -> None:
        """Build `accelerator` from the arguments and the launcher's configuration. Collective.

        Raises:
            ConfigError: All problems at once; where arguments and configuration disagree, both sources are named.
        """
        self.accelerator = build_accelerator(self.args, accumulation=self._batch_plan.accumulation)
        if self.args.tf32 is not None:
            torch.set_float32_matmul_precision("high" if self.args.tf32 else "highest")

    def _agree_on_batch_plan(self) -> None:
        plan = agree_on_plan(self.args, self.accelerator, self._batch_plan)
        if plan != self._batch_plan:
            self._batch_plan = plan
            self.create_accelerator_and_postprocess()

    def _make_model(self, model: nn.Module | None) -> nn.Module:
        if (model is None) == (self.model_init is None):
            what = "neither model nor model_init" if model is None else "both model and model_init"
            raise PrepareError(f"Trainer got {what}", "It trains one model", "Give one of the two")
        made = self.call_model_init() if model is None else model
        shards_with_fsdp = self.args.fsdp or self.args.fsdp_config
        # FSDP's plugin does it while sharding.
        if self.args.activation_checkpointing and not shards_with_fsdp:
            checkpoint_activations(made, self.args.activation_checkpointing_kwargs)
        return made

    def call_model_init(self, trial: None = None) -> nn.Module:
        """Make a model with `model_init`.

        Args:
            trial: Always None; passed on if `model_init` takes an argument.

        Returns:
            The new model.

        Raises:
            PrepareError: `model_init` returned None.
        """
        assert self.model_init is not None
        parameters = inspect.signature(self.model_init).parameters.values()
        takes_trial = any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        made: nn.Module | None = self.model_init(trial) if takes_trial else self.model_init()
        if made is None:
            raise PrepareError("model_init returned None", "It must return the model", "Add the return statement")
        return made

    @property
    def _objects_of_script(self) -> list[str]:
        """The attributes that a subclass or the script added, and the functions given: checkpoints have their state."""
        given = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
        return [name for name in vars(self) if name in given or name not in self._own_names]

    def _new_state(self) -> TrainerState:
        is_local_main, is_main = self.accelerator.is_local_main_process, self.accelerator.is_main_process
        return TrainerState(is_local_process_zero=is_local_main, is_world_process_zero=is_main)

    def _update_callback_things(self, **more: Any) -> None:
        """Set what callbacks get at every event from here on."""
        things = {"model": self.model, "processing_class": self.processing_class, "optimizer": self.optimizer}
        self.callback_handler.things |= {**things, "lr_scheduler": self.lr_scheduler, **more}

    @property
    def _deepspeed_settings(self) -> dict[str, Any] | None:
        """The DeepSpeed configuration, from the arguments or the launcher; None under another strategy."""
        plugin = self.accelerator.deepspeed_plugin
        return None if plugin is None else plugin.settings

    def _deepspeed_section(self, name: str) -> dict[str, Any] | None:
        return (self._deepspeed_settings or {}).get(name)

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train to the end. Collective: every rank must call it.

        Args:
            resume_from_checkpoint: The folder of a checkpoint, or True for the newest complete one in `output_dir`;
                there must be one. `get_last_checkpoint(output_dir)` starts the first run afresh and resumes later ones.
            trial: Must be None: paceline has no hyperparameter search.
            ignore_keys_for_eval: Model outputs that are not predictions, for evaluations during training.

        Returns:
            Steps, mean loss and metrics of this call.

        Raises:
            ConfigError: The length of the training cannot be computed.
            CheckpointError: The checkpoint is missing or damaged, training cannot be resumed from it, or `output_dir`
                has checkpoints of another training.
            NotBuiltError: `trial` is not None.

        Example:
            >>> output = trainer.train()
            >>> output.global_step, sorted(output.metrics)[:2]
            (4, ['epoch', 'total_flos'])
        """
        if trial is not None:
            raise NotBuiltError("train(trial=…)", "Let the search construct one Trainer per trial")
        requested = resume_from_checkpoint
        if str(resume_from_checkpoint).lower() in ("none", "false"):
            requested = None
        if requested is None and self.args.save_strategy != "no":
            # A further training of this Trainer, and restarted ranks, replace their own checkpoints.
            may_replace = self._has_trained or self.args.world.restart_count > 0
            model_files.refuse_used_folder(self, may_replace=may_replace)
        self.is_in_train = self._chooses_loss = True
        try:
            loop = self._prepare_training(ignore_keys_for_eval)
            if requested is not None:
                self._resume(loop, requested)
            self._print_summary(loop)
            with noisy_embeddings(self.model, self.args.neftune_noise_alpha):
                self._run(loop)
            return self._finish(loop)
        finally:
            self.is_in_train = self._chooses_loss = False
            if self._chunked_loss is not None:
                self._chunked_loss.remove()
                self._chunked_loss = None
            self.accelerator.on_preemption(None)

    def _prepare_training(self, ignore_keys: list[str] | None) -> TrainingLoop:
        """Prepare loader, model, optimizer and scheduler, and build the loop over them."""
        self.optimizer, self.lr_scheduler = self._given_optimizers.choose(self.optimizer, self.lr_scheduler)
        if self._has_trained:
            self._start_over()
        self._has_trained = True
        self._follow_changed_batches()
        loader = self._training_loader()
        length = self.set_initial_training_values(self.args, loader)
        self.create_optimizer_and_scheduler(length.max_steps)
        # Of a training that failed, or of the script: they would be added to the first step's.
        self.model.zero_grad(set_to_none=True)
        self._prepare_model()
        self._set_optimizer_mode("train")
        self.state = self._state_for(length, loader)
        self._update_callback_things(train_dataloader=loader, eval_dataloader=None)
        loop = TrainingLoop(losses.LoopInputs(self, self._call, self.model_wrapped, loader, ignore_keys), length)
        self._progress.begin(loop)
        self.accelerator.register_for_checkpointing(self._progress)
        self._save_when_preempted(loader)
        return loop

    def _follow_changed_batches(self) -> None:
        """Split optimizer steps anew if the script changed batch sizes in `args` since they were split last."""
        sizes = _batch_sizes(self.args)
        if sizes == self._planned_from:
            return
        self._planned_from = sizes
        self._batch_plan = self.args.batch_plan(self.accelerator.num_processes)
        self.accelerator.gradient_accumulation_steps = self._batch_plan.accumulation

    def _start_over(self) -> None:
        """Release what the previous training prepared; make a new model if there is `model_init`."""
        self.accelerator.free_memory()
        if self.model_init is not None:
            set_seed(self.args.seed, deterministic=self.args.full_determinism)
            self.model = self.model_wrapped = self._make_model(None)
            self._given_optimizers.forget_old_model()
            self.optimizer = self._given_optimizers.optimizer
            self._call = losses.ModelCall(self.model, packed=self.args.packing)

    def _prepare_model(self) -> None:
        """Prepare model, optimizer and scheduler. Collective."""
        if follows_metric(self.lr_scheduler):
            # Not prepared, because it does not step with the optimizer.
            self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.lr_scheduler.optimizer = self.optimizer
            self.accelerator.register_for_checkpointing(self.lr_scheduler)
        else:
            prepared = self.accelerator.prepare(self.model, self.optimizer, self.lr_scheduler)
            self.model_wrapped, self.optimizer, self.lr_scheduler = prepared
        self._given_optimizers.note_prepared(self.optimizer, self.lr_scheduler)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> TrainingLength:
        """Compute the length of the training.

        Args:
            args: The arguments.
            dataloader: The prepared loader of the training set.

        Returns:
            Optimizer steps, epochs and samples of the whole training.

        Example:
            >>> trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader()).max_steps
            4
        """
        batch_size = self._batch_plan.micro_batch * self._batch_plan.accumulation * self.accelerator.num_processes
        return training_length(args, dataloader, accumulation=self._batch_plan.accumulation, batch_size=batch_size)

    def _state_for(self, length: TrainingLength, loader: Any) -> TrainerState:
        state = self._new_state()
        state.max_steps, state.num_train_epochs = length.max_steps, length.num_train_epochs
        state.train_batch_size = self._batch_plan.micro_batch
        size = step_size(length, loader, self._batch_plan.accumulation)
        state.samples_per_step, state.updates_per_pass = size.samples, size.per_epoch
        best_checkpoint.forget_other_metric(state, self.args)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(state, name, self.args.interval(name, length.max_steps))
        return state

    def _resume(self, loop: TrainingLoop, requested: str | bool) -> None:
        given = self._given_optimizers
        has_own_schedule = given.scheduler is not None or self._deepspeed_section("scheduler") is not None
        resume_training(
            self,
            loop,
            self._progress,
            requested,
            has_own_optimizer=given.optimizer is not None or given.scheduler is not None,
            has_own_schedule=has_own_schedule,
        )

    def _print_summary(self, loop: TrainingLoop) -> None:
        """Print what is about to be trained, unless `log_level` hides information."""
        if self.args.log_level not in ("warning", "error", "critical"):
            self.accelerator.print(summarize(self, loop), flush=True)

    def _run(self, loop: TrainingLoop) -> None:
        if not self.args.auto_find_batch_size:
            return loop.run()

        def prepare_again(plan: BatchPlan) -> None:
            self._batch_plan = plan
            self._prepare_again(loop)

        return run_with_smaller_batches(self, loop, self._batch_plan, prepare_again)

    def _prepare_again(self, loop: TrainingLoop) -> None:
        """Prepare the same model, optimizer and scheduler for other batch sizes, and continue at the same sample."""
        optimizer, scheduler, steps = self.optimizer.optimizer, self.lr_scheduler, self.optimizer.num_steps
        self.accelerator.free_memory()
        self.accelerator.gradient_accumulation_steps = self._batch_plan.accumulation
        loader = self._training_loader()
        loader.load_state_dict(loop.position)
        self.optimizer, self.lr_scheduler = optimizer, getattr(scheduler, "scheduler", scheduler)
        self._prepare_model()
        self.optimizer.num_steps = steps
        self._save_when_preempted(loader)
        self._update_callback_things(train_dataloader=loader)
        loop.attach(loader, self.model_wrapped)

    def _save_when_preempted(self, loader: PreparedDataLoader) -> None:
        """Save before a batch of the training set when a signal asks for it. Collective: every rank must call it.

        Never within an evaluation: that may have changed weights, metrics and callbacks for its duration.
        """
        if self.args.save_strategy != "no" and not self.args.save_only_model:
            self.accelerator.on_preemption(self.save_checkpoint, loader)

    def _finish(self, loop: TrainingLoop) -> TrainOutput:
        """Log the metrics of the training, and load the best checkpoint if the arguments say so. Collective."""
        metrics = loop.metrics()
        metrics["epoch"] = self.state.epoch
        self.log(dict(metrics))
        self.accelerator.wait_for_save()
        # From here on, averaged weights are evaluated and saved, if the optimizer has such.
        self._set_optimizer_mode("eval")
        if self.args.load_best_model_at_end:
            model_files.load_best(self)
            self._set_optimizer_mode("eval")
        fire(self, "on_train_end")
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def _set_optimizer_mode(self, mode: str) -> None:
        """Call `train` or `eval` of a schedule-free optimizer, which swaps the weights. Only during training."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.is_in_train and callable(getattr(inner, mode, None)):
            getattr(inner, mode)()
            self._optimizer_mode = mode

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Give the model the averaged weights of a schedule-free optimizer for the body."""
        before = self._optimizer_mode
        self._set_optimizer_mode("eval")
        try:
            yield
        finally:
            self._set_optimizer_mode(before)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Run the forward and backward of one micro-batch. Subclasses may override it.

        Args:
            model: As prepared.
            inputs: The micro-batch, on the device.
            num_items_in_batch: The number of its targets, shape []; None weights all micro-batches equally.

        Returns:
            The mean loss over its targets, detached, shape [], on the device.

        Example:
            >>> class Scaled(Trainer):
            ...     def training_step(self, model, inputs, num_items_in_batch=None):
            ...         inputs["x"] = inputs["x"] * 2
            ...         return super().training_step(model, inputs, num_items_in_batch)
            >>> Scaled(model, args, train_dataset=dataset).train().global_step
            4
        """
        # Both are checked: DeepSpeed's engine in evaluation mode may wrap a model in training mode, and vice versa.
        if not (model.training and self.model.training):
            model.train()
        inputs = self._prepare_inputs(inputs)
        loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is None:
            self.accelerator.backward(loss)
        else:
            self.accelerator.backward(loss * num_items_in_batch, weight=num_items_in_batch)
        return loss.detach()

    def _prepare_inputs(self, inputs: Any) -> Any:
        """For subclasses: change a batch before the model gets it. It is on the device already."""
        return inputs

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """Compute the loss of a micro-batch. Subclasses may override it.

        Args:
            model: As prepared.
            inputs: The micro-batch, on the device.
            return_outputs: Whether to return the model's outputs as well.
            num_items_in_batch: The number of targets, shape [], for models and functions that divide a sum by it.

        Returns:
            The mean loss over the targets, shape [], with gradients; with `return_outputs`, (loss, outputs).

        Raises:
            PacelineError: The model returned no loss.

        Example:
            >>> class Absolute(Trainer):
            ...     def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ...         outputs = model(inputs["x"])
            ...         loss = (outputs["logits"] - inputs["labels"]).abs().mean()
            ...         return (loss, outputs) if return_outputs else loss
            >>> Absolute(model, args, train_dataset=dataset).train().global_step
            4
        """
        with self._loss_region(model, inputs, num_items_in_batch, needs_outputs=return_outputs):
            loss, outputs = losses.compute_loss(
                self._call,
                model,
                inputs,
                loss_function=self.compute_loss_func,
                label_smoothing=self.args.label_smoothing_factor,
                num_items=num_items_in_batch,
            )
        return (loss, outputs) if return_outputs else loss

    def _loss_region(
        self, model: nn.Module, inputs: Any, num_items: Tensor | None, *, needs_outputs: bool
    ) -> AbstractContextManager[None]:
        """Where the model computes its loss in chunks, if it does. Collective in the first step."""
        if not self.is_in_train or not torch.is_grad_enabled():
            return nullcontext()
        if self._chooses_loss:
            self._chooses_loss = False
            if self.args.packing and "position_ids" in inputs:
                check_packing(self.accelerator, self.model, partial(self._own_loss, model), inputs, self._columns())
            self._chunked_loss = enable_chunked_loss(
                self.accelerator,
                self.model,
                lambda rows: self._call(model, rows, num_items),
                inputs,
                wanted=self.args.chunked_loss,
                obstacle=self._obstacle_to_chunks(),
            )
        return nullcontext() if self._chunked_loss is None or needs_outputs else self._chunked_loss.during()

    def _own_loss(self, model: nn.Module, inputs: Any) -> Tensor | None:
        return losses.maybe_loss(self._call(model, inputs))

    def _columns(self) -> frozenset[str] | None:
        return columns_of(self.model, self.label_names)

    def _obstacle_to_chunks(self) -> str | None:
        """Why this Trainer needs the logits, if it does."""
        if type(self).compute_loss is not Trainer.compute_loss:
            return f"{type(self).__name__} overrides compute_loss, which may read the logits"
        if self.compute_loss_func is not None:
            return "compute_loss_func reads the outputs"
        if self.args.label_smoothing_factor > 0:
            return "label_smoothing_factor is computed from the logits"
        return None

    def compute_loss_context_manager(self) -> AbstractContextManager[None]:
        """The run's precision, for a `training_step` that calls other modules. Prepared models need no context.

        Returns:
            A context manager.

        Example:
            >>> with trainer.compute_loss_context_manager():
            ...     loss = model(torch.zeros(1, 3))["logits"].sum()
        """
        return self.accelerator.autocast()

    def autocast_smart_context_manager(self, cache_enabled: bool = True) -> AbstractContextManager[None]:
        """Older name of `compute_loss_context_manager`.

        Args:
            cache_enabled: Ignored; transformers has it.

        Returns:
            A context manager.
        """
        return self.compute_loss_context_manager()

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the loss and metrics of an evaluation set, and log them. Collective: every rank must call it.

        Args:
            eval_dataset: A data set, the name of one of several, or a mapping of several; None takes the Trainer's.
            ignore_keys: Model outputs that are not predictions.
            metric_key_prefix: Prepended to the metric names; with several sets, followed by the name of each.

        Returns:
            The metrics of all sets, with their prefix.

        Raises:
            PrepareError: There is no such evaluation set.
            DataError: `compute_metrics` needs labels, but the batches have none.

        Example:
            >>> metrics = trainer.evaluate()
            >>> metrics["eval_loss"] > 0
            True
        """
        is_given = eval_dataset is not None
        dataset = eval_dataset if is_given else self.eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part if is_given else name, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        loader = self.get_eval_dataloader(eval_dataset)
        output = self.evaluation_loop(loader, metric_key_prefix=metric_key_prefix, ignore_keys=ignore_keys)
        self.log(output.metrics)
        fire(self, "on_evaluate", metrics=output.metrics)
        return output.metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict for every sample of a data set. Collective: every rank must call it.

        Args:
            test_dataset: The samples; labels are optional.
            ignore_keys: Model outputs that are not predictions.
            metric_key_prefix: Prepended to the metric names.

        Returns:
            Predictions and labels in the order of the data set, and metrics if there are labels. With
            `dispatch_batches=False` a stream's order is lost on several ranks, with a warning.

        Example:
            >>> trainer.predict(dataset).predictions.shape
            (16, 1)
        """
        loader = self.get_test_dataloader(test_dataset)
        warn_of_lost_order(self.accelerator, test_dataset)
        output = self.evaluation_loop(
            loader, metric_key_prefix=metric_key_prefix, ignore_keys=ignore_keys, prediction_loss_only=False
        )
        fire(self, "on_predict", metrics=output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str = "",
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run one pass over a loader without gradients, as `evaluate` and `predict` do. Collective.

        Args:
            dataloader: A loader; it need not be prepared.
            description: Ignored; transformers has it.
            prediction_loss_only: Whether to keep no predictions; None takes the argument, and requires labels for
                `compute_metrics`.
            ignore_keys: Model outputs that are not predictions.
            metric_key_prefix: Prepended to the metric names.

        Returns:
            Predictions, labels, metrics, and the number of samples over all ranks.

        Raises:
            DataError: `compute_metrics` needs labels, but the batches have none.

        Example:
            >>> trainer.evaluation_loop(trainer.get_eval_dataloader(), prediction_loss_only=True).num_samples
            16
        """
        dataloader = self._as_prepared(dataloader)
        self._requires_metrics = prediction_loss_only is None
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if self._requires_metrics and self.compute_metrics is None:
            loss_only = True
        self.callback_handler.things["eval_dataloader"] = dataloader
        with self._averaged_weights():
            loop = EvaluationLoop(
                losses.LoopInputs(self, self._call, self._model_for_evaluation(), dataloader, ignore_keys),
                prefix=metric_key_prefix,
                loss_only=loss_only,
                requires_metrics=self._requires_metrics,
            )
            return loop.run()

    def _model_for_evaluation(self) -> nn.Module:
        if self.model_wrapped is not self.model or self.is_in_train:
            return self.model_wrapped
        if self.args.bf16_full_eval:
            self.model.to(torch.bfloat16)
        elif self.args.fp16_full_eval:
            self.model.to(torch.float16)
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Run the forward of one batch without gradients. Subclasses may override it.

        Args:
            model: As prepared, in evaluation mode.
            inputs: The batch, on the device.
            prediction_loss_only: Whether to return no predictions and labels.
            ignore_keys: Model outputs that are not predictions.

        Returns:
            The mean loss, shape []; predictions; labels. Each is None if there is none.

        Raises:
            DataError: `label_names` names labels that the batch does not have.
        """
        # An overridden `compute_loss` finds its labels itself if `label_names` is [].
        overrides = type(self).compute_loss is not Trainer.compute_loss
        has_own_loss = not self.label_names and overrides
        return predict_batch(
            self,
            self._call,
            model,
            self._prepare_inputs(inputs),
            loss_only=prediction_loss_only,
            ignore_keys=ignore_keys,
            has_own_loss=has_own_loss or self.compute_loss_func is not None,
            needs_labels=self._requires_metrics,
            computes_loss=overrides or self.args.label_smoothing_factor > 0,
        )

    # Data

    def get_train_dataloader(self) -> PreparedDataLoader:
        """Build the loader of the training set. Collective: every rank must call it. Subclasses may override it.

        Returns:
            A prepared loader, whose position is saved in checkpoints. Overrides may return any loader.

        Raises:
            PrepareError: There is no training set, or it is empty.

        Example:
            >>> class InOrder(Trainer):
            ...     def get_train_dataloader(self):
            ...         return torch.utils.data.DataLoader(self.train_dataset, batch_size=8)
            >>> InOrder(model, args, train_dataset=dataset).train().global_step
            4
        """
        if self.train_dataset is None:
            raise PrepareError("Trainer.train() without a train_dataset", "There is nothing to train on", "Give one")
        if hasattr(self.train_dataset, "__len__") and len(self.train_dataset) == 0:
            hint = "Check the dataset's path and filters"
            raise PrepareError("The train_dataset has no samples", "There is nothing to train on", hint)
        if self.args.packing:
            return packed_loader(self.accelerator, self.args, self.train_dataset, self.model, self._batch_plan)
        sampler = self._get_train_sampler(self.train_dataset)
        return self._loader(self.train_dataset, sampler=sampler, batch_size=self._batch_plan.micro_batch)

    def _training_loader(self) -> PreparedDataLoader:
        loader = self._as_prepared(self.get_train_dataloader(), saved=True)
        if self.args.global_batch_size is not None and self.args.average_tokens_across_devices:
            # Each sample counts once, so the last batch is not filled up with others.
            loader.fill_batches = False
        require_even_batches(self.accelerator, loader)
        return loader

    def _as_prepared(self, loader: Any, *, saved: bool = False) -> PreparedDataLoader:
        """Prepare a loader that a subclass or script made, unless it did. Collective."""
        return self.accelerator.prepare_data_loader(loader, saved=saved)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """For subclasses: the sampler of the training set; None for a stream."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self._batch_plan.micro_batch * self._batch_plan.accumulation * self.accelerator.num_processes
        name = getattr(self.model, "main_input_name", "input_ids")
        return train_sampler(self.args, dataset, total_batch=batch_size, input_name=name)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PreparedDataLoader:
        """Build the loader of an evaluation set. Collective: every rank must call it. Subclasses may override it.

        Args:
            eval_dataset: A data set, or the name of one of several; None takes the Trainer's.

        Returns:
            A prepared loader; overrides may return any loader.

        Raises:
            PrepareError: There is no such evaluation set.

        Example:
            >>> len(trainer.get_eval_dataloader())
            2
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = named_dataset(self.eval_dataset, dataset)
        if dataset is None:
            raise PrepareError("Trainer.evaluate() without an eval_dataset", "There is nothing to evaluate", "Give one")
        return self._loader(dataset)

    def get_test_dataloader(self, test_dataset: Any) -> PreparedDataLoader:
        """Build the loader of a test set. Collective: every rank must call it. Subclasses may override it.

        Args:
            test_dataset: The samples.

        Returns:
            A prepared loader; overrides may return any loader.

        Example:
            >>> len(trainer.get_test_dataloader(dataset))
            2
        """
        return self._loader(test_dataset)

    def _loader(self, dataset: Any, *, sampler: Any = None, batch_size: int | None = None) -> PreparedDataLoader:
        return prepared_loader(
            self.accelerator,
            self.args,
            dataset,
            self.data_collator,
            self.model,
            self.label_names,
            sampler=sampler,
            batch_size=batch_size,
        )

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Count the samples of a loader.

        Args:
            dataloader: A loader.

        Returns:
            Its samples over all ranks.

        Example:
            >>> trainer.num_examples(trainer.get_eval_dataloader())
            16
        """
        total = getattr(dataloader, "total_dataset_length", None)
        if total:
            return int(total)
        return len(getattr(dataloader, "dataset", dataloader))

    def get_total_train_batch_size(self, args: TrainingArguments | None = None) -> int:
        """Count the samples of a micro-batch over all ranks.

        Args:
            args: Ignored; transformers has it.

        Returns:
            The number of samples; times the accumulation steps, that of an optimizer step.

        Example:
            >>> trainer.get_total_train_batch_size()
            8
        """
        return self._batch_plan.micro_batch * self.accelerator.num_processes

    # Optimizer and scheduler

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Create both; `train` calls it. Subclasses may override it, or the two methods that it calls.

        Args:
            num_training_steps: Optimizer steps of the whole training.
        """
        self._planned_steps = num_training_steps
        self.create_optimizer()
        self.create_scheduler(num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Create the optimizer from the arguments or the DeepSpeed configuration, unless one was given.

        Args:
            model: The model to optimize; None takes the Trainer's model.

        Returns:
            The optimizer, which becomes `optimizer`.

        Raises:
            MissingExtraError: The package of the optimizer is not installed.
            ConfigError: `optim_args` names an argument that the optimizer does not have.

        Example:
            >>> class WithSGD(Trainer):
            ...     def create_optimizer(self, model=None):
            ...         self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            ...         return self.optimizer
            >>> WithSGD(model, args, train_dataset=dataset).train().global_step
            4
        """
        if self.optimizer is not None:
            return self.optimizer
        model = model or self.model
        names = self.get_decay_parameter_names(model)
        groups = optimizer_choice.parameter_groups(model, names, self.args.weight_decay)
        section = self._deepspeed_section("optimizer")
        if section is None:
            cls, options = self._optimizer_class_and_options()
            if issubclass(cls, MuonAdamW):
                groups = muon_groups(model, groups)
            self.optimizer = optimizer_choice.build_optimizer(cls, groups, options, self.args)
        else:
            options = adam_arguments(section, self.args)
            self.optimizer = DummyOptim(groups, self.args.learning_rate, self.args.weight_decay, **options)
        self._given_optimizers.note_made(optimizer=self.optimizer)
        return self.optimizer

    def _optimizer_class_and_options(self) -> tuple[type[Any], dict[str, Any]]:
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        cls, options = self.get_optimizer_cls_and_kwargs(self.args)
        if "warmup_steps" in options and self._planned_steps is not None:
            options["warmup_steps"] = self.args.get_warmup_steps(self._planned_steps)
        return cls, options

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[type[Any], dict[str, Any]]:
        """Look up the optimizer of the arguments.

        Args:
            args: The arguments.
            model: Ignored; transformers has it.

        Returns:
            Its class, and its keyword arguments without the parameters.

        Example:
            >>> Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim="sgd", learning_rate=0.1))
            (<class 'torch.optim.sgd.SGD'>, {'lr': 0.1, 'weight_decay': 0.0})
        """
        device = None
        if not args.use_cpu:
            device = torch.accelerator.current_accelerator(check_available=True)
        return optimizer_choice.optimizer_class(args, device or torch.device("cpu"))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """List the parameters that get weight decay. Subclasses may override it.

        Args:
            model: The model.

        Returns:
            Their names: all parameters except biases and norms.

        Example:
            >>> trainer.get_decay_parameter_names(model)
            ['linear.weight']
        """
        return optimizer_choice.decaying_names(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the learning-rate scheduler from the arguments or the DeepSpeed configuration, unless one was given.

        Args:
            num_training_steps: Optimizer steps of the whole training.
            optimizer: The optimizer; None takes the Trainer's.

        Returns:
            The scheduler, which becomes `lr_scheduler`.

        Raises:
            ConfigError: `lr_scheduler_kwargs` has an unknown argument, or lacks a required one.
        """
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        optimizer = optimizer or self.optimizer
        warmup = self.args.get_warmup_steps(num_training_steps)
        if self._deepspeed_section("scheduler") is not None:
            self.lr_scheduler = DummyScheduler(optimizer, num_training_steps, max(1, warmup))
            self._given_optimizers.note_made(scheduler=self.lr_scheduler)
            return self.lr_scheduler
        options: Any = self.args.lr_scheduler_kwargs
        name = "constant"
        if not self.args.optim.startswith("schedule_free"):
            name = self.args.lr_scheduler_type
        if name == "reduce_lr_on_plateau":
            options = {"mode": "max" if self.args.greater_is_better else "min", **(options or {})}
        self.lr_scheduler = make_schedule(name, optimizer, warmup=warmup, total=num_training_steps, arguments=options)
        self._given_optimizers.note_made(scheduler=self.lr_scheduler)
        return self.lr_scheduler

    def get_learning_rates(self) -> list[float]:
        """Look up the current learning rates.

        Returns:
            The rate of each parameter group; [] before `train` or `create_optimizer`.

        Example:
            >>> trainer.get_learning_rates()
            []
        """
        if self.optimizer is None:
            return []
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_num_trainable_parameters(self) -> int:
        """Count the trainable parameters.

        Returns:
            The number of elements that require gradients; if they are sharded, those of this rank.

        Example:
            >>> trainer.get_num_trainable_parameters()
            4
        """
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    # Saving

    def save_checkpoint(self) -> None:
        """Write everything needed to resume into `output_dir/checkpoint-STEP`, and remove old checkpoints.

        Collective: every rank must call it.

        Example:
            >>> class SaveAtThree(TrainerCallback):
            ...     def on_step_end(self, args, state, control, **things):
            ...         control.should_save = state.global_step == 3
            >>> trainer.add_callback(SaveAtThree())
            >>> _ = trainer.train()
            >>> (Path(args.output_dir) / "checkpoint-3" / "trainer_state.json").exists()
            True
        """
        folder = model_files.checkpoint_folder(self)
        best_checkpoint.note_checkpoint(self.state, folder, greater=bool(self.args.greater_is_better))
        self._progress.before_save()
        model_files.write_checkpoint(self, folder)

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the weights as safetensors, with what `from_pretrained` needs. Collective: every rank must call it.

        With a schedule-free optimizer, these are the averaged weights, which are also evaluated.

        Args:
            output_dir: The folder; None takes `output_dir` of the arguments.

        Example:
            >>> trainer.save_model("trained")
            >>> sorted(path.name for path in Path("trained").iterdir())
            ['model.safetensors', 'training_args.json']
        """
        with self._averaged_weights():
            model_files.save_model_files(self, Path(output_dir or self.args.output_dir).expanduser())

    def save_state(self) -> None:
        """Write `trainer_state.json` into `output_dir`, on rank 0.

        Example:
            >>> trainer.save_state()
            >>> TrainerState.load_from_json(Path(args.output_dir) / "trainer_state.json").global_step
            0
        """
        if self.accelerator.is_main_process:
            model_files.save_state_file(self)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,  # noqa: A002  # transformers' name
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        dataset: str | Sequence[str] | None = None,
        dataset_args: str | Sequence[str] | None = None,
    ) -> None:
        """Write `README.md` into `output_dir`, on rank 0: how the model was trained, and its last evaluation.

        The parameters become the page's YAML front matter, as model hubs read it; those that are None are left out.

        Args:
            language: Language of the training data, for example "en".
            license: License of the model, for example "apache-2.0".
            tags: Keywords for search.
            model_name: Name of the model, and title of the page.
            finetuned_from: Name of the base model.
            tasks: Tasks, for example "text-classification".
            dataset_tags: Identifiers of the data sets.
            dataset: Human-readable names of the data sets.
            dataset_args: Configurations or splits of the data sets.

        Example:
            >>> trainer.create_model_card(model_name="Small", license="mit")
            >>> (Path(args.output_dir) / "README.md").read_text().splitlines()[1]
            'license: "mit"'
        """
        if not self.accelerator.is_main_process:
            return
        properties: dict[str, Any] = {
            "language": language,
            "license": license,
            "model_name": model_name,
            "base_model": finetuned_from,
        }
        lists = {"tags": tags, "tasks": tasks, "datasets": dataset_tags, "dataset": dataset}
        lists["dataset_args"] = dataset_args
        properties |= {name: result_files.as_list(value) for name, value in lists.items()}
        result_files.write_model_card(self.args, self.state, properties)

    # Metrics and logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add an entry to `state.log_history`, and pass it to the callbacks and trackers.

        Args:
            logs: Names and numbers; `epoch` is added.
            start_time: Ignored; transformers has it.

        Example:
            >>> trainer.log({"temperature": 0.5})
            >>> trainer.state.log_history[-1]
            {'temperature': 0.5, 'epoch': 0.0, 'step': 0}
        """
        logs.setdefault("epoch", round(self.state.epoch, 6))
        self.state.log_history.append({**logs, "step": self.state.global_step})
        fire(self, "on_log", logs=logs)

    def metrics_format(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Format metrics for display.

        Args:
            metrics: Names and values.

        Returns:
            The metrics with runtimes as hours, minutes and seconds, and other numbers with four decimals.

        Example:
            >>> trainer.metrics_format({"eval_runtime": 61.5, "eval_loss": 0.123456})
            {'eval_runtime': '0:01:01.50', 'eval_loss': 0.1235}
        """
        return result_files.format_metrics(metrics)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print metrics, on rank 0.

        Args:
            split: What they were computed on: "train", "eval" or "test".
            metrics: Names and values.

        Example:
            >>> trainer.log_metrics("eval", {"eval_loss": 0.5})
            ***** eval metrics *****
              eval_loss = 0.5
        """
        if self.accelerator.is_main_process:
            print(result_files.as_text(split, metrics), flush=True)

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Write metrics to `SPLIT_results.json` in `output_dir`, on rank 0.

        Args:
            split: What they were computed on: "train", "eval" or "test".
            metrics: Names and values.
            combined: Whether to merge them into `all_results.json` as well.

        Example:
            >>> trainer.save_metrics("eval", {"eval_loss": 0.5})
            >>> sorted(path.name for path in Path(args.output_dir).glob("*_results.json"))
            ['all_results.json', 'eval_results.json']
        """
        if self.accelerator.is_main_process:
            result_files.write_results(self.args.output_dir, split, metrics, combined=combined)

    # Callbacks and processes

    def add_callback(self, callback: Any) -> None:
        """Add a callback.

        Args:
            callback: An instance of `TrainerCallback`, or a class, which is instantiated without arguments.

        Example:
            >>> trainer.add_callback(TrainerCallback())
            >>> type(trainer.pop_callback(TrainerCallback)).__name__
            'TrainerCallback'
        """
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback and return it.

        Args:
            callback: An instance, or a class whose first instance is removed.

        Returns:
            The callback; None if there is none.

        Example:
            >>> trainer.pop_callback(TrainerCallback) is None
            True
        """
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback.

        Args:
            callback: An instance, or a class whose first instance is removed.

        Example:
            >>> from paceline.trainer import ProgressCallback
            >>> trainer.remove_callback(ProgressCallback)
        """
        self.callback_handler.pop_callback(callback)

    def is_local_process_zero(self) -> bool:
        """Tell whether this is the first rank of its machine.

        Returns:
            Whether it is.

        Example:
            >>> trainer.is_local_process_zero()
            True
        """
        return self.accelerator.is_local_main_process

    @property
    def is_fsdp_enabled(self) -> bool:
        """Whether the model is sharded by FSDP2. Under `strategy="auto"` only once a model was prepared."""
        return self.accelerator.strategy.name == "fsdp" if self._sets_fsdp is None else self._sets_fsdp

    @is_fsdp_enabled.setter
    def is_fsdp_enabled(self, value: bool) -> None:
        # Subclasses written for transformers set it in create_accelerator_and_postprocess.
        self._sets_fsdp = value

    @property
    def is_deepspeed_enabled(self) -> bool:
        """Whether the model is trained by DeepSpeed. Under `strategy="auto"` only once a model was prepared."""
        return self.accelerator.strategy.name == "deepspeed" if self._sets_deepspeed is None else self._sets_deepspeed

    @is_deepspeed_enabled.setter
    def is_deepspeed_enabled(self, value: bool) -> None:
        self._sets_deepspeed = value

    def is_world_process_zero(self) -> bool:
        """Tell whether this is rank 0.

        Returns:
            Whether it is.

        Example:
            >>> trainer.is_world_process_zero()
            True
        """
        return self.accelerator.is_main_process

    def end(self) -> None:
        """Close the trackers; otherwise they are closed when the process ends. Collective: every rank must call it.

        Example:
            >>> trainer.end()
        """
        self.accelerator.end_training()

    # Not supported

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported.

        Args:
            *args: Ignored.
            **kwargs: Ignored.

        Returns:
            Never.

        Raises:
            NotBuiltError: Always.
        """
        raise NotBuiltError("hyperparameter_search", "Let the search construct one Trainer per trial")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: paceline uploads nothing.

        Args:
            *args: Ignored.
            **kwargs: Ignored.

        Returns:
            Never.

        Raises:
            NotBuiltError: Always.
        """
        raise NotBuiltError("push_to_hub", "Call trainer.save_model(), and huggingface_hub on output_dir")


def _batch_sizes(args: TrainingArguments) -> tuple[int, int, int | None]:
    """The arguments that decide how an optimizer step is split."""
    return args.per_device_train_batch_size, args.gradient_accumulation_steps, args.global_batch_size
