"""The summary that is printed at the start of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.errors import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from paceline.trainer.loops.training import TrainingLoop
    from paceline.trainer.protocol import TrainerHooks

__all__ = ["summarize"]

_WIDTH = 11


def summarize(hooks: TrainerHooks, loop: TrainingLoop) -> str:
    """Lines with strategy (and why it was chosen), parameters, length, global batch and precision."""
    rows = {
        "strategy": _strategy(hooks),
        "parameters": _parameters(hooks.model),
        "steps": _length(hooks, loop),
        "batch": _batch(hooks, loop.loader),
        "precision": _precision(hooks),
    }
    return "\n".join(["Training", *(f"  {what:<{_WIDTH}} {value}" for what, value in rows.items())])


def _strategy(hooks: TrainerHooks) -> str:
    accelerator = hooks.accelerator
    reason = accelerator.strategy_reason
    for field in ("fsdp", "deepspeed", "strategy"):
        if getattr(hooks.args, field):
            # The Trainer's arguments become the Accelerator's; name those that the user wrote.
            reason = reason.partition("Accelerator(")[0] + f"TrainingArguments({field}=…)"
            break
    return f"{reason}; {counted(accelerator.num_processes, 'rank')} on {accelerator.device.type}"


def _parameters(model: nn.Module) -> str:
    total = trained = 0
    for parameter in model.parameters():
        # Under ZeRO stage 3, parameters are empty between two uses.
        count = getattr(parameter, "ds_numel", parameter.numel())
        total += count
        trained += count if parameter.requires_grad else 0
    share = "" if trained == total else f" ({100 * trained / total:.3g} %)"
    return f"{trained:,} trained of {total:,}{share}"


def _length(hooks: TrainerHooks, loop: TrainingLoop) -> str:
    state = hooks.state
    resumed = [f"resumed after step {state.global_step:,}"] if state.global_step else []
    return ", ".join([f"{state.max_steps:,}", *_epochs(hooks, loop), *resumed])


def _epochs(hooks: TrainerHooks, loop: TrainingLoop) -> Iterator[str]:
    length, samples = loop.length, loop.loader.total_dataset_length
    if length.num_train_epochs >= 2**31:
        yield "over data of unknown length"
        return
    args = hooks.args
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps * length.epochs_per_step
    yield f"{epochs:.4g} {'epoch' if epochs == 1 else 'epochs'} of {counted(length.steps_per_epoch, 'step')}"
    yield "an unknown number of samples" if samples is None else f"{counted(samples, 'sample')} an epoch"


def _batch(hooks: TrainerHooks, loader: Any) -> str:
    ranks, total = hooks.accelerator.num_processes, loader.total_batch_size
    micro_batches = hooks.accelerator.gradient_accumulation_steps
    if total is None:
        return f"as the loader yields them x {counted(ranks, 'rank')} x {counted(micro_batches, 'micro-batch')}"
    return (
        f"{counted(total * micro_batches, 'sample')} = {counted(ranks, 'rank')} x "
        f"{counted(micro_batches, 'micro-batch')} x {counted(total // ranks, 'sample')}"
    )


def _precision(hooks: TrainerHooks) -> str:
    mode = hooks.accelerator.mixed_precision
    weights = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in hooks.model.parameters()}))
    return f"{weights or 'float32'} throughout" if mode == "no" else f"{mode} mixed precision, weights {weights}"
