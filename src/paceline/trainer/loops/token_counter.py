"""Counting of input tokens, and ending a training after a number of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.accelerator.accelerator import Accelerator
    from paceline.trainer.protocol import TrainerHooks
    from paceline.trainer.state import TrainerState

__all__ = ["TokenCounter"]


class TokenCounter:
    """Counts the input tokens of all ranks.

    Counting waits for nothing, because sizes are known on the host. Counts are summed over ranks on reading, and to
    notice the end of a budget: each time when half of what is left could have been used up.

    Args:
        accelerator: Communicates with the other ranks.
        name: The input that contains the tokens.
        padding: Whether padding counts; else the attention mask decides.
        budget: The number of tokens after which to stop; None never stops.
        seen: Tokens before this run.
    """

    def __init__(self, accelerator: Accelerator, name: str, *, padding: bool, budget: int | None, seen: int) -> None:
        self._accelerator = accelerator
        self._name = name
        self._padding = padding
        self._budget = budget
        self._seen = seen
        self._local: int | Tensor = 0
        self._steps = 0
        self._read_after = 1
        self._most_per_step = 1

    @classmethod
    def for_run(cls, hooks: TrainerHooks) -> TokenCounter | None:
        """The counter that the arguments require; None if they do not."""
        args = hooks.args
        kind = args.include_num_input_tokens_seen
        if kind == "no" and args.max_tokens is None:
            return None
        name = getattr(hooks.model, "main_input_name", "input_ids")
        seen = hooks.state.num_input_tokens_seen
        padding = kind != "non_padding" or args.max_tokens is not None
        return cls(hooks.accelerator, name, padding=padding, budget=args.max_tokens, seen=seen)

    @classmethod
    def for_throughput(cls, hooks: TrainerHooks) -> TokenCounter:
        """A counter of all tokens, padding included, for `metrics.jsonl`."""
        name = getattr(hooks.model, "main_input_name", "input_ids")
        return cls(hooks.accelerator, name, padding=True, budget=None, seen=0)

    def add_tokens(self, inputs: Any) -> None:
        """Count the tokens of a micro-batch, if its main input is token ids."""
        tokens = None
        if isinstance(inputs, Mapping):
            tokens = inputs.get(self._name)
        if tokens is not None and not tokens.is_floating_point():
            self._local = self._local + tokens.numel()

    def add(self, inputs: Any) -> None:
        """Count the tokens of a micro-batch."""
        if not isinstance(inputs, Mapping):
            tokens = inputs
            if isinstance(inputs, list | tuple):
                tokens = inputs[0]
        else:
            tokens = inputs.get(self._name, next(iter(inputs.values())))
        mask = None
        if isinstance(inputs, Mapping) and not self._padding:
            mask = inputs.get("attention_mask")
        if mask is None:
            self._local = self._local + tokens.numel()
        else:
            self._local = self._local + mask.sum()

    def read(self) -> int:
        """The tokens of all ranks so far. Collective: every rank must call it."""
        local = torch.as_tensor(self._local, dtype=torch.int64, device=self._accelerator.device)
        self._seen += int(self._accelerator.reduce(local, "sum"))
        self._local = 0
        return self._seen

    def restore(self, seen: int) -> None:
        """Continue counting from a saved number."""
        self._seen, self._local = seen, 0

    def is_spent(self, state: TrainerState) -> bool:
        """Whether the budget is used up after this step. Collective: every rank must call it."""
        if self._budget is None:
            return False
        self._steps += 1
        if self._steps < self._read_after:
            return False
        before = self._seen
        state.num_input_tokens_seen = self.read()
        self._most_per_step = max(self._most_per_step, -(-(self._seen - before) // self._steps))
        remaining = self._budget - self._seen
        self._steps = 0
        self._read_after = max(1, remaining // (2 * self._most_per_step))
        return remaining <= 0
