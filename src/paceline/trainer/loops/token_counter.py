"""Counting input tokens, and ending a training when enough of them were seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.accelerator.accelerator import Accelerator
    from paceline.trainer.state import TrainerState
    from paceline.trainer.trainer import Trainer

__all__ = ["TokenCounter"]


class TokenCounter:
    """Input tokens of all ranks.

    Sizes are known to the host, so that counting waits for nothing. Ranks are asked for theirs when the count is
    read, and near the end of a budget: the next question comes when half of what is left could be used up.

    Args:
        accelerator: The ranks.
        name: The input that holds the tokens.
        padding: Whether padding counts; else the attention mask says what is real.
        budget: When to stop; None never does.
        seen: Tokens before this run.
    """

    def __init__(self, accelerator: Accelerator, name: str, *, padding: bool, budget: int | None, seen: int) -> None:
        self._accelerator = accelerator
        self._name = name
        self._padding = padding
        self._budget = budget
        self._seen = seen
        self._own: int | Tensor = 0
        self._steps = 0
        self._ask_after = 1
        self._most = 1

    @classmethod
    def for_run(cls, trainer: Trainer) -> TokenCounter | None:
        """The counter that the arguments ask for, or None."""
        args = trainer.args
        kind = args.include_num_input_tokens_seen
        if kind == "no" and args.max_tokens is None:
            return None
        name = getattr(trainer.model, "main_input_name", "input_ids")
        seen = trainer.state.num_input_tokens_seen
        padding = kind != "non_padding" or args.max_tokens is not None
        return cls(trainer.accelerator, name, padding=padding, budget=args.max_tokens, seen=seen)

    @classmethod
    def for_throughput(cls, trainer: Trainer) -> TokenCounter:
        """A counter of everything that goes through the model, padding included, for `metrics.jsonl`."""
        name = getattr(trainer.model, "main_input_name", "input_ids")
        return cls(trainer.accelerator, name, padding=True, budget=None, seen=0)

    def add_tokens(self, inputs: Any) -> None:
        """Count the tokens of a micro-batch, if its main input is token numbers."""
        tokens = inputs.get(self._name) if isinstance(inputs, Mapping) else None
        if tokens is not None and not tokens.is_floating_point():
            self._own = self._own + tokens.numel()

    def add(self, inputs: Any) -> None:
        """Count the tokens of a micro-batch."""
        if not isinstance(inputs, Mapping):
            tokens = inputs[0] if isinstance(inputs, list | tuple) else inputs
        else:
            tokens = inputs.get(self._name, next(iter(inputs.values())))
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) and not self._padding else None
        self._own = self._own + (tokens.numel() if mask is None else mask.sum())

    def read(self) -> int:
        """All tokens so far. Collective: every rank must call it."""
        own = torch.as_tensor(self._own, dtype=torch.int64, device=self._accelerator.device)
        self._seen += int(self._accelerator.reduce(own, "sum"))
        self._own = 0
        return self._seen

    def go_on_from(self, seen: int) -> None:
        """Count from so many tokens on."""
        self._seen, self._own = seen, 0

    def is_spent(self, state: TrainerState) -> bool:
        """Whether the budget is used up after this step. Collective: every rank must call it."""
        if self._budget is None:
            return False
        self._steps += 1
        if self._steps < self._ask_after:
            return False
        before = self._seen
        state.num_input_tokens_seen = self.read()
        self._most = max(self._most, -(-(self._seen - before) // self._steps))
        left = self._budget - self._seen
        self._steps = 0
        self._ask_after = max(1, left // (2 * self._most))
        return left <= 0
