"""Lets a causal language model of transformers compute its training loss without its logits.

Such a model computes `logits = head(hidden)` and hands them to `model.loss_function`. During a training step the head
returns the hidden states unchanged, and the loss function calls the head a second time, with the targets: inside the
head's own forward its weight is whole under every strategy, and `paceline.nn.linear_cross_entropy` computes the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paceline.errors import PrepareError
from paceline.nn import linear_cross_entropy
from paceline.trainer.loops.losses import maybe_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.accelerator.accelerator import Accelerator

__all__ = ["ChunkedLoss", "enable_chunked_loss"]

# Smaller logits cost little, and a step that is compared with another trainer's stays the same to the last digit.
_MIN_CLASSES = 16_384
_TRIAL_TOKENS = 4096


class ChunkedLoss:
    """The loss of one model, in chunks of tokens while `during` is open, and the model's own otherwise.

    Args:
        model: A causal language model of transformers.
        head: Its output embedding.
    """

    def __init__(self, model: Any, head: nn.Linear) -> None:
        self._model, self._head = model, head
        self._dense_head: Callable[[Tensor], Tensor] = head.forward
        self._dense_loss: Callable[..., Tensor] = model.loss_function
        # What is wrong with the model, found while it is tried out.
        self.problem: str | None = None
        self._is_open = False
        self._is_trial = False
        self._standing_in: Tensor | None = None
        self._targets: Tensor | None = None
        self._num_items: Tensor | None = None
        head.forward = self._head_forward  # type: ignore[method-assign, assignment]
        model.loss_function = self._loss
        self._hook = model.register_forward_hook(self._without_logits)

    def remove(self) -> None:
        """Restore the model."""
        del self._head.forward
        self._model.loss_function = self._dense_loss
        self._hook.remove()

    @contextmanager
    def during(self, *, trial: bool = False) -> Iterator[None]:
        """Compute the losses of forwards in the body in chunks.

        Args:
            trial: Whether a model that does something else with its logits is noted in `problem`, and its forward goes
                on with a loss of nan: an error would leave the engine in the middle of a forward.
        """
        self._is_open, self._is_trial = True, trial
        try:
            yield
        finally:
            self._is_open = self._is_trial = False
            self._standing_in = self._targets = self._num_items = None

    def _head_forward(self, hidden: Tensor) -> Tensor:
        if not self._is_open:
            return self._dense_head(hidden)
        if self._targets is None:
            self._standing_in = hidden
            return hidden
        head = self._head
        return linear_cross_entropy(hidden, head.weight, self._targets, head.bias, num_items_in_batch=self._num_items)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What the model calls in place of its loss function, with the same arguments."""
        if not self._is_open:
            more = {} if shift_labels is None else {"shift_labels": shift_labels}
            return self._dense_loss(
                logits=logits,
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                **more,
                **kwargs,
            )
        if not _is_same(logits, self._standing_in):
            self._report("changes its logits before the loss")
            return logits.new_full((), torch.nan)
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        if ignore_index != -100:
            targets = targets.masked_fill(targets.eq(ignore_index), -100)
        self._targets, self._num_items = targets.to(logits.device), num_items_in_batch
        loss: Tensor = self._head(logits)
        self._targets = self._num_items = None
        return loss

    def _without_logits(self, _model: nn.Module, _inputs: Any, output: Any) -> Any:
        """Take the hidden states out of the place of the logits, where nobody expects them."""
        if not self._is_open:
            return None
        if not isinstance(output, Mapping) or not _is_same(output.get("logits"), self._standing_in):
            self._report("returns something else than its logits")
            return None
        kind: Any = type(output)
        return kind(**{name: value for name, value in output.items() if name != "logits"})

    def _report(self, what: str) -> None:
        """Note a problem that a trial has found.

        Raises:
            PrepareError: The trial is over, and this batch is trained on.
        """
        # What follows from the first one is not the reason.
        self.problem = self.problem or f"{type(self._model).__name__} {what}"
        if not self._is_trial:
            raise PrepareError(
                f"{self.problem}, which it did not for the first batch",
                "The loss is computed without logits",
                "Set chunked_loss=False",
            )


def _is_same(found: Any, expected: Tensor | None) -> bool:
    """Whether two tensors are the same values in the same memory: engines return a view of a module's output."""
    if expected is None or not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return found.data_ptr() == expected.data_ptr() and found._version == expected._version


def enable_chunked_loss(
    accelerator: Accelerator,
    model: nn.Module,
    call: Callable[[Any], Any],
    inputs: Any,
    *,
    wanted: bool | None,
    obstacle: str | None,
) -> ChunkedLoss | None:
    """Let a model compute its loss in chunks, if that gives the same loss for a batch. Collective.

    Args:
        accelerator: Of the training.
        model: Not wrapped.
        call: Calls the prepared model with a batch, and returns its outputs.
        inputs: The first batch.
        wanted: True requires it, False forbids it, None lets the model decide.
        obstacle: Why it is impossible in this training, if it is.

    Returns:
        None if the model's own loss is to be used.

    Raises:
        PrepareError: It is required and impossible.
    """
    if wanted is False:
        return None
    user: Any = model
    base: Any = user.get_base_model() if hasattr(user, "get_base_model") else user
    obstacle = obstacle or _obstacle_in(base, any_size=bool(wanted))
    if obstacle is None:
        chunked = ChunkedLoss(base, base.get_output_embeddings())
        obstacle = _difference(accelerator, model, chunked, lambda: call(_few_rows(inputs)))
        if obstacle is None:
            return chunked
        chunked.remove()
    if wanted:
        raise PrepareError(
            f"chunked_loss=True, but {obstacle}",
            "The loss cannot be computed without the logits",
            "Leave chunked_loss out",
        )
    if _is_causal(base) and not _is_small(base):
        accelerator.print(f"The loss is computed from all logits at once: {obstacle}", flush=True)
    return None


def _is_causal(base: Any) -> bool:
    if not hasattr(base, "main_input_name") or not hasattr(base, "loss_function"):
        return False
    # A model without a type of its own, such as GPT-2, has the same loss.
    is_causal = getattr(base.loss_function, "__name__", "") == "ForCausalLMLoss"
    return is_causal or str(getattr(base, "loss_type", "")).startswith("ForCausalLM")


def _is_small(base: Any) -> bool:
    return bool(base.get_output_embeddings() is not None and _num_classes(base) < _MIN_CLASSES)


def _num_classes(base: Any) -> int:
    return int(base.get_output_embeddings().out_features)


def _obstacle_in(base: Any, *, any_size: bool) -> str | None:
    """Why a model's loss cannot be computed in chunks; None if it can."""
    name = type(base).__name__
    if not _is_causal(base) or not hasattr(base, "get_output_embeddings"):
        return f"{name} is not a causal language model of transformers"
    head = base.get_output_embeddings()
    # The class may be FSDP2's, made of nn.Linear.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return f"the head of {name} is a {type(head).__name__}, not a plain nn.Linear"
    if _has_foreign_hooks(head):
        return f"the head of {name} has forward hooks, which may read the logits"
    if base._compiled_call_impl is not None:
        return f"{name} is compiled as a whole, which removes most of the cost"
    if getattr(base.loss_function, "__name__", "") != "ForCausalLMLoss":
        return f"{name} has a loss function of its own"
    if not any_size and _is_small(base):
        return f"{head.out_features:,} classes are few"
    return None


def _has_foreign_hooks(head: nn.Module) -> bool:
    """Whether a module has forward hooks of others than the engines that shard it."""
    hooks = [*head._forward_hooks.values(), *head._forward_pre_hooks.values()]
    return not all(
        str(getattr(hook, "__module__", "")).startswith(("torch.distributed.", "deepspeed.")) for hook in hooks
    )


def _few_rows(inputs: Any) -> Any:
    """The rows with most targets, about 4096 tokens: all logits of a batch may not fit where the training does."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return inputs
    by_row = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    if any(len(tensor) != len(labels) for tensor in by_row.values()):
        return inputs
    count = max(1, _TRIAL_TOKENS // max(1, labels.shape[1]))
    rows = labels.ne(-100).sum(1).argsort(descending=True, stable=True)[:count]
    return {**inputs, **{name: tensor[rows] for name, tensor in by_row.items()}}


@torch.no_grad()
def _difference(
    accelerator: Accelerator, model: nn.Module, chunked: ChunkedLoss, call: Callable[[], Any]
) -> str | None:
    """What differs between the losses of one batch, on any rank. Collective: every rank must call it."""
    was_training = model.training
    # Without dropout, both forwards compute the same.
    model.eval()
    try:
        expected = maybe_loss(call())
        with chunked.during(trial=True):
            found = maybe_loss(call())
    finally:
        model.train(was_training)
    nothing = torch.full((), torch.nan, device=accelerator.device)
    losses = [nothing if loss is None else loss.float().reshape(()) for loss in (expected, found)]
    everywhere = accelerator.gather(torch.stack([*losses, nothing if chunked.problem else nothing.new_zeros(())])[None])
    if bool(everywhere[:, 2].isnan().any()):
        return chunked.problem or "another rank's model changes its logits"
    # A rank's rows may have no target; then the loss is 0 or nan in either way.
    compared = everywhere[everywhere[:, 0].abs() > 0]
    if not len(compared):
        return "the first batch has no targets to compare by"
    gaps = torch.nan_to_num((compared[:, 0] - compared[:, 1]).abs(), nan=torch.inf)
    # Both losses come from logits of the same precision.
    excess = gaps - (1e-4 * compared[:, 0].abs() + 1e-5)
    if not bool((excess > 0).any()):
        return None
    one, other = compared[int(excess.argmax()), :2].tolist()
    return f"the first batch has a loss of {one:.6g} that way, and {other:.6g} in chunks"
