"""Changes of a model for training: activation checkpointing, and NEFTune noise on embeddings."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from paceline.errors import PrepareError
from paceline.strategies.activation_checkpointing import keep_products

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["checkpoint_activations", "noisy_embeddings"]


def checkpoint_activations(model: nn.Module, settings: Any) -> None:
    """Recompute the activations of a model's repeated blocks in the backward pass instead of storing them.

    Args:
        model: Has `gradient_checkpointing_enable`, as models of transformers do, or repeated blocks in a `ModuleList`
            or `Sequential`.
        settings: Arguments of `torch.utils.checkpoint.checkpoint`, `every_n_layers`, and `policy`: `full`, or
            `products`, which keeps the results of matrix products and attention.

    Raises:
        PrepareError: The model has no repeated blocks, or there is no such policy.
    """
    options = {"use_reentrant": False, **(settings or {})}
    every = options.pop("every_n_layers", 1)
    policy = options.pop("policy", "full")
    if policy not in ("full", "products"):
        raise PrepareError(
            f"activation_checkpointing_kwargs has policy={policy!r}", "There is none", "Write full or products"
        )
    if policy == "products":
        options["context_fn"] = keep_products()
    own = getattr(model, "gradient_checkpointing_enable", None)
    if callable(own) and every == 1:
        own(gradient_checkpointing_kwargs=options)
        return
    blocks = _repeated_blocks(model)
    if not blocks:
        raise PrepareError(
            f"activation_checkpointing, but {type(model).__name__} has no repeated blocks",
            "Only whole blocks are recomputed",
            "Put the blocks into an nn.ModuleList, or call torch.utils.checkpoint in forward",
        )
    for block in blocks[::every]:
        # On the instance rather than in a wrapper, so that parameter names do not change.
        block.forward = partial(_recomputed, block, block.forward, options)


def _recomputed(block: nn.Module, forward: Any, options: dict[str, Any], *inputs: Any, **more: Any) -> Any:
    if not block.training or not torch.is_grad_enabled():
        return forward(*inputs, **more)
    return checkpoint(forward, *inputs, **options, **more)


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of module lists that are of the most common class with parameters and children."""
    blocks = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            blocks += [block for block in module if next(block.parameters(), None) is not None]
    classes = Counter(type(block) for block in blocks if next(block.children(), None) is not None)
    if not classes:
        return []
    most_common, count = classes.most_common(1)[0]
    if count > 1:
        return [block for block in blocks if type(block) is most_common]
    return []


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Add uniform noise to the input embeddings while in training mode (NEFTune, arXiv 2310.05914).

    Raises:
        PrepareError: The model has no `get_input_embeddings`.
    """
    if alpha is None:
        yield
        return
    find = getattr(model, "get_input_embeddings", None)
    if find is None:
        raise PrepareError(
            f"neftune_noise_alpha={alpha}, but {type(model).__name__} has no get_input_embeddings",
            "The noise is added to the input embeddings",
            "Add that method to the model, or leave the argument out",
        )

    def add_noise(module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        bound = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-bound, bound)

    handle = find().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
