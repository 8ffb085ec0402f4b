"""PEFT adapters: which weights of a `PeftModel` belong to its base, and how its adapters are saved and loaded."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import CheckpointError, named
from paceline.strategies.activation_checkpointing import plain_name

if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from pathlib import Path

    from torch import Tensor, nn

__all__ = ["embedding_names", "frozen_base", "is_adapted", "read_adapters", "write_adapters"]

_WEIGHTS = "adapter_model.safetensors"
# Modules of a base model that PEFT trains as a whole, or a few rows of.
_TRAINED_WHOLE = (".modules_to_save.", ".trainable_tokens_", ".token_adapter.")


def is_adapted(module: nn.Module) -> bool:
    """Whether an unwrapped module is a `PeftModel`."""
    # There is none unless the script has imported PEFT.
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.PeftModel)


def frozen_base(
    module: nn.Module, named: Iterable[tuple[str, nn.Parameter]], trained: Container[int] = ()
) -> frozenset[str]:
    """The names of a `PeftModel`'s weights that are unchanged from its base model; empty for any other module.

    Weights of adapters are not among them, even if they are frozen because the adapter is not active.

    Args:
        module: An unwrapped module.
        named: Its parameters by their names in the user's own module.
        trained: The `id`s of parameters that an optimizer has: they may have been trained before they were frozen.
    """
    if not is_adapted(module):
        return frozenset()
    adapters: Any = module
    tuner = getattr(adapters.base_model, "prefix", None)
    if not adapters.active_peft_config.is_prompt_learning and not isinstance(tuner, str):
        return frozenset()
    marks = (*_TRAINED_WHOLE, tuner) if isinstance(tuner, str) else _TRAINED_WHOLE
    return frozenset(
        name
        for name, parameter in named
        if name.startswith("base_model.")
        and not parameter.requires_grad
        and id(parameter) not in trained
        and not any(mark in name for mark in marks)
    )


def embedding_names(module: nn.Module) -> frozenset[str]:
    """The names of a model's input and output embeddings, which PEFT saves if an adapter has resized them."""
    layers = [getattr(module, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    weights = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    return frozenset(
        plain_name(name) for name, p in module.named_parameters(remove_duplicate=False) if id(p) in weights
    )


def write_adapters(module: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
    """Write the adapters of a `PeftModel` as PEFT does, from a state dict of unsharded weights."""
    adapted: Any = module
    adapted.save_pretrained(str(folder), state_dict=state)
    for path in folder.rglob(_WEIGHTS):
        # safetensors lets only the owner read its files; adapter_config.json has the permissions of the umask.
        shutil.copymode(path.with_name("adapter_config.json"), path)


def read_adapters(module: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Read the weights that `save_pretrained` of a `PeftModel` wrote, by their names in the model.

    Raises:
        CheckpointError: The file of an adapter is missing, or its weights do not match the model.
    """
    from peft import get_peft_model_state_dict

    adapted: Any = module
    names = [plain_name(name) for name in module.state_dict()]
    state: dict[str, Tensor] = {}
    for adapter in adapted.peft_config:
        path = (folder if adapter == "default" else folder / adapter) / _WEIGHTS
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", f"The model has an adapter {adapter!r}", "Pass another folder")
        # Empty tensors in place of the weights show under which name PEFT saves which weight.
        marks = {name: torch.empty(0) for name in names}
        by_mark = {id(mark): name for name, mark in marks.items()}
        saved_as = get_peft_model_state_dict(adapted, state_dict=marks, adapter_name=adapter)
        own = {saved: by_mark[id(mark)] for saved, mark in saved_as.items() if id(mark) in by_mark}
        from safetensors.torch import load_file

        saved_state = load_file(path)
        unknown = sorted(set(saved_state) ^ set(own))
        if unknown:
            raise CheckpointError(
                f"{path} does not match the adapter {adapter!r} of this model",
                f"Only one of them has {named(unknown)}",
                "Build the model with the adapter_config.json in that folder",
            )
        state |= {own[saved]: tensor for saved, tensor in saved_state.items()}
    return state
