"""Names of Megatron-LM, which paceline does not drive: importable, and an error where they are used."""

from __future__ import annotations

from typing import Any

from paceline.compat.accelerate.settings.errors import UnsupportedError, unsupported

__all__ = [
    "AbstractTrainStep",
    "BertTrainStep",
    "GPTTrainStep",
    "MegatronLMDummyDataLoader",
    "MegatronLMDummyScheduler",
    "T5TrainStep",
    "add_model_config_to_megatron_parser",
    "avg_losses_across_data_parallel_group",
]

_WHY = "paceline does not drive Megatron-LM"
_TODO = "Train with FullyShardedDataParallelPlugin or DeepSpeedPlugin"


class _OfMegatron:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise UnsupportedError(f"{type(self).__name__}(…) was made", _WHY, _TODO)


class AbstractTrainStep(_OfMegatron):
    """A training step of Megatron-LM."""


class BertTrainStep(AbstractTrainStep):
    """A training step of BERT."""


class GPTTrainStep(AbstractTrainStep):
    """A training step of GPT."""


class T5TrainStep(AbstractTrainStep):
    """A training step of T5."""


class MegatronLMDummyDataLoader(_OfMegatron):
    """A placeholder for a loader that Megatron-LM makes."""


class MegatronLMDummyScheduler(_OfMegatron):
    """A placeholder for a schedule that Megatron-LM makes."""


@unsupported(_WHY, _TODO)
def avg_losses_across_data_parallel_group(losses: Any) -> Any:
    """Average losses over Megatron-LM's replicas."""


@unsupported(_WHY, _TODO)
def add_model_config_to_megatron_parser(model_type: str) -> Any:
    """Register how a kind of model is described to Megatron-LM."""
