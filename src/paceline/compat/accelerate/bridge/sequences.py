"""Ulysses attention under DeepSpeed: ranks that share each sequence exchange tokens for heads inside attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.compat.accelerate.settings.errors import InvalidValueError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from paceline.compat.accelerate.parallelism_config import ParallelismConfig

__all__ = ["divide", "restore_attention", "share_attention"]

# What DeepSpeed has replaced in transformers' table of attention functions, for all models of the process.
_replaced: dict[str, Any] = {}

_GLOBAL = {"full_attention"}
# A fused kernel gets the window as an argument; under sdpa it is in the mask, which Ulysses attention drops.
_LOCAL = {"sliding_attention", "chunked_attention"}


def share_attention(model: nn.Module, sizes: ParallelismConfig, *, ranks: int, micro_batch: int) -> Any:
    """Let the attention of a transformers model work on sequences that are divided over ranks.

    DeepSpeed replaces that attention in the whole process: the model of the last call is the one that is trained.
    Collective: every rank must call it.

    Args:
        model: Of transformers, loaded with the attention that `sp_handler` names.
        sizes: Says how many ranks share a sequence.
        ranks: Of the run.
        micro_batch: Samples in a batch.

    Returns:
        DeepSpeed's description of the process groups, for its engine.

    Raises:
        InvalidValueError: The ranks cannot be divided, or the model has no configuration.
        UnsupportedError: Some layers mix tokens in a way that a part of a sequence cannot tell.
    """
    if ranks % sizes.sp_size:
        raise InvalidValueError(
            f"sp_size is {sizes.sp_size}, with {ranks} ranks",
            "Every sequence needs as many ranks as any other",
            "Choose a divisor of the number of ranks",
        )
    config = getattr(model, "config", None)
    if config is None:
        raise InvalidValueError(
            f"sp_size is {sizes.sp_size}, and {type(model).__name__} has no attribute config",
            "DeepSpeed divides the attention of transformers' models",
            "Set sp_size to 1, or prepare a model of transformers",
        )
    handler = sizes.sp_handler
    assert handler is not None, "made with the sizes"
    attention = handler.sp_attn_implementation or "sdpa"
    _check_layers(config, attention)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    restore_attention()
    if attention in ALL_ATTENTION_FUNCTIONS:
        _replaced[attention] = ALL_ATTENTION_FUNCTIONS[attention]
    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=attention,
        sequence_parallel_size=sizes.sp_size,
        micro_batch_size=micro_batch,
        seq_length=handler.sp_seq_length,
        seq_length_is_variable=handler.sp_seq_length_is_variable,
        # An evaluation may run on loaders that nobody divided.
        disable_in_eval=True,
    )


def restore_attention() -> None:
    """Undo `share_attention`, for an engine whose ranks share no sequences, or others."""
    if not _replaced:
        return
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    while _replaced:
        name, function = _replaced.popitem()
        ALL_ATTENTION_FUNCTIONS[name] = function
    # It makes new groups for each model, and refuses to while it has some.
    parallel_state_sp._release_sequence_parallel_groups()
    groups.mpu = None


def _check_layers(config: Any, attention: str) -> None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(text, "layer_types", None) or ())
    others = kinds - (_GLOBAL if attention == "sdpa" else _GLOBAL | _LOCAL)
    if others:
        raise UnsupportedError(
            f"Sequences are to be divided over ranks, and the model has layers of the kind {', '.join(sorted(others))}",
            f"Under {attention} such a layer would see each part of a sequence as a sequence of its own",
            "Set sp_size to 1, or for sliding windows load the model with flash attention",
        )


def divide(loader: Any, device: torch.device) -> Any:
    """Return a loader whose batches have this rank's part of each sequence.

    Args:
        loader: Prepared. Its batches are dicts with `input_ids`, `position_ids` and `labels`.
        device: This rank's.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter
    from deepspeed.utils import groups

    return UlyssesSPDataLoaderAdapter(
        loader,
        sp_rank=groups._get_sequence_parallel_rank(),
        sp_group=groups._get_sequence_parallel_group(),
        sp_world_size=groups._get_sequence_parallel_world_size(),
        device=device,
    )
