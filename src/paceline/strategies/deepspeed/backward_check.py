"""Explains backward passes that a DeepSpeed engine would misunderstand, or that end in errors of torch."""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import SteppingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from paceline.strategies.deepspeed.engine import ZeroEngine

_SHAPES = re.compile(
    r"returned an invalid gradient at index \d+ - got (\[.*?\]) but expected shape compatible with (\[.*?\])"
)


def refuse_autograd(zero: ZeroEngine) -> None:
    """Have `torch.autograd.grad` of a model's output refused before the engine takes it for the backward of a loss.

    The engine would reduce gradients that are not there: an error with stages 1 and 2, and wrong steps with stage 3.
    It calls what is replaced here at the beginning of each backward, so that nothing is added to a step.
    """
    engine = zero.engine
    begin_backward = engine._backward_prologue
    name = type(zero.model).__name__
    trained = [p for group in zero.groups for p in group]

    def begin_checked() -> None:
        if not engine._running_engine_backward and not _accumulates(trained):
            raise SteppingError(
                f"torch.autograd.grad was called on the output of {name}",
                "DeepSpeed's engine takes it for the backward of a loss, and the next step would be wrong",
                "Compute what it differentiates with accelerator.unwrap_model(model), under zero_stage 0, 1 or 2, and "
                "the rest of the loss with the prepared model; or use strategy='ddp'",
            )
        begin_backward()

    engine._backward_prologue = begin_checked


def _accumulates(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the backward that is running writes into `grad` of any of these parameters."""
    nodes = [_accumulator(p) for p in parameters if p.requires_grad]
    if None in nodes:
        # Inside of torch.func, whose backward is none of the engine's.
        return True
    try:
        return any(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:
        # torch does not say it of what torch.autograd.grad itself was asked for.
        return False


@torch.enable_grad()
def _accumulator(parameter: nn.Parameter) -> Any:
    """The node of the graph that writes into `parameter.grad`; None where torch.func differentiates."""
    view: Any = parameter.view_as(parameter)
    return None if view.grad_fn is None else view.grad_fn.next_functions[0][0]


def explain_empty_parameters(zero: ZeroEngine, error: RuntimeError) -> None:
    """Explain an error of torch about the shape of a gradient where stage 3 has emptied or gathered the parameter.

    Raises:
        SteppingError: It is about that.
    """
    match = _SHAPES.search(str(error))
    if match is None or "[0]" not in match.groups():
        return
    raise SteppingError(
        f"The loss uses parameters of {type(zero.model).__name__} outside of the forward of the module that owns them, "
        "as a penalty of weights does",
        "With zero_stage 3 most parameters are empty there",
        "Let the optimizer's weight_decay do it, or use zero_stage 1 or 2, where the penalty is right",
    ) from error


@contextmanager
def refusing_foreign_gradients(zero: ZeroEngine) -> Iterator[None]:
    """Refuse that the backward of this engine reaches parameters that another engine trains.

    That one's model may use them here only where no gradient of theirs is computed, as under `torch.no_grad()`.

    Raises:
        SteppingError: It has reached one.
    """
    handles = []
    for name, parameter in zero.foreign.items():
        refuse = partial(_refuse_gradient, type(zero.model).__name__, name)
        handles.append(parameter.register_post_accumulate_grad_hook(refuse))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_gradient(model: str, name: str, _parameter: Tensor) -> None:
    raise SteppingError(
        f"The backward of {model} reached {name}, which another model has, too, and its engine trains",
        "Under ZeRO each engine reduces the gradients of its own backward, and would miss those",
        "Put both into one module that calls them, and prepare that with one optimizer; or run this part of the "
        f"forward of {model} under torch.no_grad(); or use zero_stage 0 or strategy='ddp'",
    )
