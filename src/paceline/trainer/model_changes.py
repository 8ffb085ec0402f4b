"""What changes a model while it is trained: recomputed activations, noise on embeddings."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from paceline.errors import PrepareError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["checkpoint_activations", "noisy_embeddings"]


def checkpoint_activations(model: nn.Module, settings: Any) -> None:
    """Compute a model's repeated blocks again in backward rather than keep their activations.

    Args:
        model: With a method of its own for it, as models of transformers have, or with repeated blocks in a
            `ModuleList` or `Sequential`.
        settings: Arguments of `torch.utils.checkpoint.checkpoint`, and `every_n_layers`.

    Raises:
        PrepareError: There are no repeated blocks.
    """
    said = {"use_reentrant": False, **(settings or {})}
    every = said.pop("every_n_layers", 1)
    own = getattr(model, "gradient_checkpointing_enable", None)
    if callable(own) and every == 1:
        own(gradient_checkpointing_kwargs=said)
        return
    blocks = _repeated_blocks(model)
    if not blocks:
        raise PrepareError(
            f"activation_checkpointing was asked for, and {type(model).__name__} has no repeated blocks",
            "Only whole blocks are computed again",
            "Put the blocks into an nn.ModuleList, or call torch.utils.checkpoint in forward",
        )
    for block in blocks[::every]:
        # On the object, not around it: names of parameters stay as they are.
        block.forward = partial(_recomputed, block, block.forward, said)


def _recomputed(block: nn.Module, forward: Any, said: dict[str, Any], *inputs: Any, **more: Any) -> Any:
    if not block.training or not torch.is_grad_enabled():
        return forward(*inputs, **more)
    return checkpoint(forward, *inputs, **said, **more)


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The children of lists of modules that have the commonest class with parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    blocks = [block for part in lists for block in part if any(True for _ in block.parameters())]
    kinds = Counter(type(block) for block in blocks if any(True for _ in block.children()))
    if not kinds:
        return []
    commonest, count = kinds.most_common(1)[0]
    return [block for block in blocks if type(block) is commonest] if count > 1 else []


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Add uniform noise to input embeddings inside (NEFTune), in training mode only.

    Raises:
        PrepareError: The model does not say where its embeddings are.
    """
    if alpha is None:
        yield
        return
    find = getattr(model, "get_input_embeddings", None)
    if find is None:
        raise PrepareError(
            f"neftune_noise_alpha={alpha}, and {type(model).__name__} has no get_input_embeddings",
            "The noise goes onto the input embeddings",
            "Give the model that method, or leave the argument out",
        )

    def add_noise(module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        reach = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-reach, reach)

    handle = find().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
