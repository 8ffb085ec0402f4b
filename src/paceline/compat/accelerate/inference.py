"""Pipelines for inference: paceline's placement under Accelerate's signature."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from paceline.compat.accelerate.state import current_group
from paceline.placement import pipeline_model

__all__ = ["prepare_pippy"]


def prepare_pippy(
    model: nn.Module,
    split_points: str | Sequence[str] | None = "auto",
    no_split_module_classes: Collection[str] | None = None,
    example_args: Sequence[Any] | None = (),
    example_kwargs: Mapping[str, Any] | None = None,
    num_chunks: int | None = None,
    gather_output: bool | None = False,
) -> nn.Module:
    """Divide a model into one stage for each process, for inference. Every process must call it, and then the model.

    Args:
        model: On the host. Its `forward` is replaced; `pippy_stage` and `hf_split_points` are set.
        split_points: Names of the modules that later stages begin with; "auto" divides the bytes evenly.
        no_split_module_classes: Classes of modules that "auto" does not split.
        example_args: The arguments of one of `num_chunks` parts of a batch.
        example_kwargs: Its keyword arguments.
        num_chunks: Parts of a batch on their way at once; by default as many as there are processes.
        gather_output: Return the output in every process instead of the last.
    """
    pipeline = pipeline_model(
        model,
        example_args or (),
        example_kwargs,
        group=current_group(),
        split_points="auto" if split_points is None else split_points,
        no_split_module_classes=no_split_module_classes,
        chunks=num_chunks,
        gather_output=bool(gather_output),
    )
    holder: Any = model
    holder.hf_split_points = pipeline.split_points
    holder.pippy_stage = pipeline.schedule
    holder._original_forward = model.forward
    holder.forward = pipeline
    return model
