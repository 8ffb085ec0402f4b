"""What a Trainer is made of, and how it calls the model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paceline.environment.logging import get_logger
from paceline.environment.seeding import set_seed
from paceline.errors import ConfigError, PacelineError, PrepareError, Problem
from paceline.trainer.arguments.accelerator import build_accelerator
from paceline.trainer.arguments.arguments import TrainingArguments
from paceline.trainer.batches.collate import label_names_of
from paceline.trainer.batches.loaders import choose_collator
from paceline.trainer.callbacks.base import (
    CallbackHandler,
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
)
from paceline.trainer.callbacks.profiling import ProfileCallback
from paceline.trainer.callbacks.tracking import TrackingCallback
from paceline.trainer.loops import losses
from paceline.trainer.loops.auto_batch_size import agree_on_micro_batch, noted_micro_batch
from paceline.trainer.loops.progress import Progress
from paceline.trainer.model_changes import checkpoint_activations
from paceline.trainer.optim.deepspeed_clashes import find_clashes
from paceline.trainer.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer


__all__ = ["TrainerCore"]

logger = get_logger(__name__)

_DONE_AT = {"on_log": "should_log", "on_evaluate": "should_evaluate", "on_save": "should_save"}


def _own_arguments(args: Any) -> TrainingArguments:
    """Arguments of this package; those of another are named as such.

    Raises:
        PrepareError: They are of another class.
    """
    if isinstance(args, TrainingArguments):
        return args
    module, kind = type(args).__module__, type(args).__name__
    origins = [made.__module__.partition(".")[0] for made in type(args).__mro__]
    saw = f"Trainer got {module}.{kind} as args"
    if "transformers" in origins:
        hint = "Write from paceline import TrainingArguments: its fields have the same names"
        raise PrepareError(saw, "That is read by the Trainer of transformers, and this one has fields of its own", hint)
    hint = "Write TrainingArguments(**args)" if isinstance(args, Mapping) else "Write TrainingArguments(output_dir=…)"
    raise PrepareError(saw, "It holds nothing that a training could be told", hint)


class TrainerCore:
    """What a Trainer is made of: the constructor, how it calls the model, and whom it tells.

    The arguments are those of `Trainer`.
    """

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
        self.args = TrainingArguments() if args is None else _own_arguments(args)
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
        self.optimizer, self.lr_scheduler = self._given_optimizers = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self._batch_plan = self.args.batch_plan(self.args.world_size, noted_micro_batch(self.args))
        # Before the model: under ZeRO 3 it may be sharded while it is made.
        self.create_accelerator_and_postprocess()
        agree_on_micro_batch(self)
        self.model = self._make_model(model)
        self.model_wrapped: nn.Module = self.model
        self._call = losses.ModelCall(self.model)
        # Whether the model divides a sum by `num_items_in_batch` itself.
        self.divides_by_items = self._call.counts_items
        named = self.args.label_names
        self.label_names = label_names_of(self.model) if named is None else named
        self.is_in_train = False
        self.tokens_seen = 0
        self._ignore_keys: list[str] | None = None
        self.scheduler_follows_metric = False
        self.state = self._new_state()
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(self._callbacks(callbacks or ()))
        self._show_callbacks(train_dataloader=None, eval_dataloader=None)
        self._progress = Progress(self)
        self._trained = False
        self._check()
        self.fire("on_init_end")

    # Building

    def create_accelerator_and_postprocess(self) -> None:
        """Build the Accelerator; what the launcher's configuration and the arguments say differently is an error.

        Raises:
            ConfigError: With everything that is wrong, naming both sources.
        """
        self.accelerator = build_accelerator(self.args, accumulation=self._batch_plan[1])
        if self.args.tf32 is not None:
            torch.set_float32_matmul_precision("high" if self.args.tf32 else "highest")

    def _make_model(self, model: nn.Module | None) -> nn.Module:
        if (model is None) == (self.model_init is None):
            what = "neither model nor model_init" if model is None else "both model and model_init"
            raise PrepareError(f"Trainer got {what}", "It trains one model", "Give one of the two")
        made = self.call_model_init() if model is None else model
        if self.args.activation_checkpointing and not self._shards_by_fsdp:
            checkpoint_activations(made, self.args.activation_checkpointing_kwargs)
        return made

    def call_model_init(self, trial: None = None) -> nn.Module:
        """A new model from `model_init`, which may take the trial of a search: there is none here."""
        assert self.model_init is not None
        parameters = inspect.signature(self.model_init).parameters.values()
        takes_trial = any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        made: nn.Module | None = self.model_init(trial) if takes_trial else self.model_init()
        if made is None:
            raise PrepareError("model_init returned None", "It makes the model", "Return the model")
        return made

    @property
    def _shards_by_fsdp(self) -> bool:
        """Whether the arguments hand activation checkpointing to the FSDP plugin."""
        return bool(self.args.fsdp or self.args.fsdp_config)

    def _callbacks(self, more: Sequence[Any]) -> list[Any]:
        quiet = self.args.disable_tqdm
        if quiet is None:
            # A bar redraws itself, which a file shows as so many lines.
            quiet = not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        shown = PrinterCallback() if quiet else ProgressCallback()
        profiling = [ProfileCallback(self.accelerator, self.args.profile_steps)] if self.args.profile_steps else []
        return [DefaultFlowCallback(), TrackingCallback(self), *profiling, *more, shown]

    def _show_callbacks(self, **more: Any) -> None:
        """What callbacks are handed at every event from here on."""
        things = {"model": self.model, "processing_class": self.processing_class, "optimizer": self.optimizer}
        self.callback_handler.things |= {**things, "lr_scheduler": self.lr_scheduler, **more}

    def _new_state(self) -> TrainerState:
        accelerator = self.accelerator
        return TrainerState(
            is_local_process_zero=accelerator.is_local_main_process, is_world_process_zero=accelerator.is_main_process
        )

    def _check(self) -> None:
        """Refuse what cannot work before anything is trained."""
        problems = []
        if self.args.eval_strategy != "no" and self.eval_dataset is None:
            what = f"{self.args.eval_strategy!r} without an eval_dataset"
            problems.append(Problem("TrainingArguments(…)", "eval_strategy", what, hint="give one to the Trainer"))
        if self.optimizer_cls_and_kwargs is not None and self._given_optimizers[0] is not None:
            what = "given together with optimizer_cls_and_kwargs"
            problems.append(Problem("Trainer(…)", "optimizers", what, hint="give one of them"))
        given = {"optim_args": self._given_optimizers[0] or self.optimizer_cls_and_kwargs}
        given["lr_scheduler_kwargs"] = self._given_optimizers[1]
        for name, instead in given.items():
            if getattr(self.args, name) and instead is not None:
                why = "what was given is used as it is"
                problems.append(
                    Problem("TrainingArguments(…)", name, "given beside one made already", why, "leave it out")
                )
        if self.compute_metrics is not None and self.args.prediction_loss_only:
            what, why = "given together with compute_metrics", "it keeps nothing that could be measured"
            problems.append(Problem("TrainingArguments(…)", "prediction_loss_only", what, why, "give one of them"))
        if self.compute_loss_func is not None and self.args.label_smoothing_factor > 0:
            what, why = "given together with compute_loss_func", "the function decides what the loss is"
            problems.append(Problem("TrainingArguments(…)", "label_smoothing_factor", what, why, "give one of them"))
        if self.accelerator.deepspeed_plugin is not None:
            problems += find_clashes(self.args, self.accelerator.deepspeed_plugin.settings)
        if problems:
            raise ConfigError(problems)

    # The model and its loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        """For subclasses: change a batch before the model sees it. It is on the device already."""
        return inputs

    def count_items(self, inputs: Any) -> Tensor | None:
        """The targets of a micro-batch by which its loss is weighted, shape []; None without labels."""
        if not self.args.average_tokens_across_devices:
            return None
        is_mapping = hasattr(inputs, "get")
        labels = inputs.get("shift_labels") if is_mapping else None
        if labels is not None:
            counted: Tensor = labels.ne(losses.IGNORED).sum()
            return counted
        return self._call.count(losses.find_labels(inputs, last_is_target=self.compute_loss_func is not None))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The loss of a micro-batch: the mean over its targets, shape [].

        Args:
            model: As prepared.
            inputs: The micro-batch.
            return_outputs: Return (loss, outputs).
            num_items_in_batch: Its targets, for models and functions that divide a sum by it themselves.
        """
        own = self.compute_loss_func is not None
        labels = losses.find_labels(inputs, last_is_target=own)
        smoothing = self.args.label_smoothing_factor
        apart = labels is not None and (own or smoothing > 0)
        if apart and not self._call.requires_labels:
            inputs = losses.without_labels(inputs)
        outputs = self._call(model, inputs, None if apart else num_items_in_batch)
        if self.compute_loss_func is not None:
            items = None if num_items_in_batch is None else num_items_in_batch.clamp(min=1)
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=items)
        elif apart:
            loss = losses.smoothed_loss(outputs, labels, smoothing, shift=self._call.shifts_labels)
        elif smoothing > 0:
            raise PacelineError(
                f"label_smoothing_factor={smoothing}, and the batch has no 'labels'",
                "The loss is the model's own then, and nothing would be smoothed",
                "Call them labels in a mapping, or leave the factor out",
            )
        else:
            loss = losses.loss_of(outputs)
        return (loss, outputs) if return_outputs else loss

    # Callbacks and facts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add an entry to the history and hand it to the callbacks."""
        logs.setdefault("epoch", round(self.state.epoch, 6))
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.fire("on_log", logs=logs)

    def fire(self, event: str, **more: Any) -> None:
        """Call an event on all callbacks."""
        done = _DONE_AT.get(event)
        if done is not None:
            # Before they are called: what they ask for is a new wish.
            setattr(self.control, done, False)
        self.control = self.callback_handler.fire(event, self.args, self.state, self.control, **more)

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or a class of which one is made."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first of a class, and return it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or the first of a class."""
        self.callback_handler.pop_callback(callback)

    def end(self) -> None:
        """Close the trackers; the end of the process does it too."""
        self.accelerator.end_training()

    def is_local_process_zero(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.accelerator.is_local_main_process

    def is_world_process_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.accelerator.is_main_process

    def get_total_train_batch_size(self, args: TrainingArguments | None = None) -> int:
        """Samples of a micro-batch over all ranks."""
        return self._batch_plan[0] * self.accelerator.num_processes
