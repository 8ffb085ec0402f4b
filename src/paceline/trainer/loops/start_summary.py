"""What a training is about to do, in a few lines at its start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from paceline.trainer.loops.training import TrainingLoop
    from paceline.trainer.trainer import Trainer

__all__ = ["summarize"]

_WIDTH = 11


def summarize(trainer: Trainer, loop: TrainingLoop) -> str:
    """Lines of `what   value`: strategy and why, parameters, length, global batch, precision."""
    rows = {
        "strategy": _strategy(trainer),
        "parameters": _parameters(trainer.model),
        "steps": _length(trainer, loop),
        "batch": _batch(trainer, loop.loader),
        "precision": _precision(trainer),
    }
    return "\n".join(["Training", *(f"  {what:<{_WIDTH}} {value}" for what, value in rows.items())])


def _strategy(trainer: Trainer) -> str:
    accelerator = trainer.accelerator
    reason = accelerator.strategy_reason
    for ours in ("fsdp", "deepspeed", "strategy"):
        if getattr(trainer.args, ours):
            # The Trainer hands on what its arguments say.
            reason = reason.partition("Accelerator(")[0] + f"TrainingArguments({ours}=…)"
            break
    return f"{reason}; {_count(accelerator.num_processes, 'rank')} on {accelerator.device.type}"


def _parameters(model: nn.Module) -> str:
    total = trained = 0
    for parameter in model.parameters():
        # ZeRO stage 3 leaves nothing of a parameter between two uses.
        count = getattr(parameter, "ds_numel", parameter.numel())
        total += count
        trained += count if parameter.requires_grad else 0
    share = "" if trained == total else f" ({100 * trained / total:.3g} %)"
    return f"{trained:,} trained of {total:,}{share}"


def _length(trainer: Trainer, loop: TrainingLoop) -> str:
    state = trainer.state
    gone_on = [f"going on after step {state.global_step:,}"] if state.global_step else []
    return ", ".join([f"{state.max_steps:,}", *_passes(trainer, loop), *gone_on])


def _passes(trainer: Trainer, loop: TrainingLoop) -> Iterator[str]:
    plan, samples = loop.plan, loop.loader.total_dataset_length
    if plan.num_train_epochs >= 2**31:
        yield "over data of unknown length"
        return
    args = trainer.args
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps * plan.epoch_of_update
    yield f"{epochs:.4g} {'epoch' if epochs == 1 else 'epochs'} of {_count(plan.updates_per_pass, 'step')}"
    yield "an unknown number of samples" if samples is None else f"{_count(samples, 'sample')} an epoch"


def _batch(trainer: Trainer, loader: Any) -> str:
    ranks, total = trainer.accelerator.num_processes, loader.total_batch_size
    micro_batches = trainer.accelerator.gradient_accumulation_steps
    if total is None:
        return f"as the loader yields them x {_count(ranks, 'rank')} x {_count(micro_batches, 'micro-batch')}"
    return (
        f"{total * micro_batches:,} samples = {_count(ranks, 'rank')} x {total // ranks} x "
        f"{_count(micro_batches, 'micro-batch')}"
    )


def _precision(trainer: Trainer) -> str:
    mode = trainer.accelerator.mixed_precision
    weights = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()}))
    return f"{weights or 'float32'} throughout" if mode == "no" else f"{mode} mixed precision, weights {weights}"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
