"""Weights kept on disk, which is not supported through the switch: the names can be imported."""

from __future__ import annotations

from typing import Any

import torch

from paceline.compat.accelerate.settings.errors import UnsupportedError
from paceline.compat.accelerate.utils.modeling import placement_unsupported

__all__ = [
    "OffloadedWeightsLoader",
    "PrefixedDataset",
    "extract_submodules_state_dict",
    "load_offloaded_weight",
    "offload_state_dict",
    "offload_weight",
    "save_offload_index",
]


class OffloadedWeightsLoader:
    """Weights in memory and on disk; programs test for the type."""

    def __init__(self, state_dict: Any = None, save_folder: Any = None, index: Any = None, device: Any = None) -> None:
        raise UnsupportedError(
            "OffloadedWeightsLoader(…) was made", "Weights cannot be kept on disk here", "Shard the model instead"
        )


class PrefixedDataset:
    """Weights with a prefix before their names; programs test for the type."""

    def __init__(self, dataset: Any, prefix: str) -> None:
        raise UnsupportedError(
            "PrefixedDataset(…) was made", "Weights cannot be kept on disk here", "Shard the model instead"
        )


def extract_submodules_state_dict(
    state_dict: dict[str, torch.Tensor], submodule_names: list[str]
) -> dict[str, torch.Tensor]:
    """Return the part of a state dict that belongs to some modules."""
    return {
        name: value
        for name, value in state_dict.items()
        if any(name == module or name.startswith(f"{module}.") for module in submodule_names)
    }


@placement_unsupported
def load_offloaded_weight(weight_file: Any, weight_info: Any) -> Any:
    """Read a weight from disk."""


@placement_unsupported
def offload_state_dict(save_dir: Any, state_dict: Any) -> Any:
    """Write a state dict to disk, a file for each weight."""


@placement_unsupported
def offload_weight(weight: Any, weight_name: Any, offload_folder: Any, index: Any = None) -> Any:
    """Write a weight to disk."""


@placement_unsupported
def save_offload_index(index: Any, offload_folder: Any) -> Any:
    """Write the list of the weights on disk."""
