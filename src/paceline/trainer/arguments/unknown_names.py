"""What to say about names that are not fields of `TrainingArguments`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError, Problem, did_you_mean
from paceline.trainer.arguments.parsing import fields_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ABSENT", "problems_with_unknown"]

_NO_HUB = "paceline uploads nothing; use huggingface_hub on output_dir"
_SPACES = "leave it out, or set Trackio's environment variables"
_LIGER = "apply liger_kernel to the model yourself, before it goes to the Trainer"
# Arguments of transformers (several versions) that do not exist here, with what to do instead.
ABSENT = {
    **dict.fromkeys(("hub_model_id", "hub_token", "hub_strategy", "hub_private_repo"), _NO_HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _NO_HUB),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _SPACES),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _LIGER),
    "adafactor": 'write optim="adafactor"',
    "debug": "leave it out: use `paceline launch --debug`, or torch.autograd.set_detect_anomaly",
    "dispatch_batches": "write it into accelerator_config",
    "enable_jit_checkpoint": "leave it out: SIGTERM always saves a checkpoint",
    "eval_use_gather_objects": "write eval_use_gather_object",
    "evaluation_strategy": "write eval_strategy",
    "fsdp_min_num_params": "write min_num_params into fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "write transformer_layer_cls_to_wrap into fsdp_config",
    "group_by_length": 'write train_sampling_strategy="group_by_length"',
    "include_inputs_for_metrics": 'write include_for_metrics=["inputs"]',
    "include_tokens_per_second": "leave it out: `paceline report` shows it",
    "jit_mode_eval": "leave it out: use torch_compile",
    "local_rank": "leave it out: the launcher sets it",
    "log_on_each_node": "leave it out: use log_level_replica",
    "logging_dir": "leave it out: logs go to output_dir",
    "no_cuda": "write use_cpu",
    "optim_target_modules": "leave it out: GaLore, LOMO and APOLLO are not supported; give the Trainer an optimizer",
    "overwrite_output_dir": "leave it out: nothing is overwritten; resume with train(resume_from_checkpoint=True)",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "per_gpu_train_batch_size": "write per_device_train_batch_size",
    "save_on_each_node": "leave it out: every rank writes its own part of a checkpoint",
    "save_safetensors": "leave it out: weights are always safetensors",
    "split_batches": "write it into accelerator_config",
    "torchdynamo": "write torch_compile_backend",
    "use_cache": "leave it out: set model.config.use_cache",
    "use_mps_device": "leave it out: an available accelerator is always used",
}


def problems_with_unknown(
    cls: type[Any], unknown: Sequence[str], values: Mapping[str, Any], where: str, positional: Sequence[Any] = ()
) -> list[Problem]:
    """A problem for each unknown name, and the problems of the other values, so that all are reported at once."""
    problems = [
        Problem(where, name, "unknown name", hint=ABSENT.get(name) or did_you_mean(name, fields_of(cls)))
        for name in unknown
    ]
    try:
        cls(*positional, **{name: value for name, value in values.items() if name not in unknown})
    except ConfigError as error:
        problems += error.problems
    except TypeError:  # a subclass's required field is missing
        pass
    return problems
