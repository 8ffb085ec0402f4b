"""Pipeline parallelism for inference: not supported through the switch, but importable."""

from __future__ import annotations

from typing import Any

from torch import nn

from paceline.compat.accelerate.settings.errors import unsupported

__all__ = ["prepare_pippy"]


@unsupported(
    "Pipeline parallelism for inference is not supported through the switch",
    "Place the model with a device_map, shard it (FSDP or DeepSpeed), or divide it with torch.distributed.pipelining",
)
def prepare_pippy(
    model: nn.Module,
    split_points: Any = "auto",
    no_split_module_classes: Any = None,
    example_args: Any = (),
    example_kwargs: Any = None,
    num_chunks: int | None = None,
    gather_output: bool = False,
) -> Any:
    """Divide a model into stages on several devices."""
