"""The `deepspeed_config` section."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from paceline.config.schema.base import Fault, Key, Section
from paceline.config.schema.readers import FilePath, Names

Offload = Literal["none", "cpu", "nvme"]
Count = Annotated[int, Field(ge=1)]
Launcher = Literal["pdsh", "standard", "openmpi", "mvapich", "mpich", "nossh", "slurm"]


class DeepSpeedPlugin(Section):
    """How DeepSpeed's ZeRO shards and offloads; used under strategy deepspeed."""

    key_prefix: ClassVar[str] = ""

    hf_ds_config: Annotated[str | dict[str, Any] | None, Key("deepspeed_config_file")] = Field(
        None, description="DeepSpeed's own JSON: a path (or in Python a dict). What it sets need not be set here."
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        2, description="ZeRO stage: 0 shards nothing, 1 optimizer state, 2 also gradients, 3 also parameters."
    )
    offload_optimizer_device: Offload = Field(
        "none", description="Where optimizer state is kept: on the device (none), in host memory or on NVMe."
    )
    offload_param_device: Offload = Field(
        "none", description="Where parameters are kept under stage 3: on the device (none), in host memory or on NVMe."
    )
    offload_optimizer_nvme_path: FilePath | None = Field(
        None, description="Folder for optimizer state, under offload_optimizer_device nvme."
    )
    offload_param_nvme_path: FilePath | None = Field(
        None, description="Folder for parameters, under offload_param_device nvme."
    )
    gradient_accumulation_steps: Annotated[Count | Literal["auto"], Key(has_flag=False, counts="micro-batch")] = Field(
        "auto", description="Micro-batches per optimizer step; auto takes the top-level setting."
    )
    gradient_clipping: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Maximum gradient norm, 0 for none; auto takes that of the script's clip_grad_norm_.",
    )
    zero3_init_flag: bool | None = Field(
        None, description="Shard a model while it is built, under stage 3; None: exactly under stage 3."
    )
    zero3_save_16bit_model: bool = Field(
        False, description="Gather 16-bit weights into whole tensors when a stage 3 model is saved."
    )
    transformer_moe_cls_names: Annotated[Names, Key("deepspeed_moe_layer_cls_names")] = Field(
        (), description="Module classes (mixture of experts) whose parameters stage 3 gathers together."
    )
    deepspeed_multinode_launcher: Launcher = Field(
        "pdsh",
        description="Program that starts the ranks on the other machines; standard: the command runs on every machine.",
    )
    deepspeed_hostfile: FilePath | None = Field(
        None, description="Host file of the multi-node launcher: a line `name slots=N` for each machine."
    )
    deepspeed_exclusion_filter: str | None = Field(
        None, description="Hosts or devices that the multi-node launcher leaves out, such as worker-1@worker-2:0,1."
    )
    deepspeed_inclusion_filter: str | None = Field(
        None, description="Hosts or devices that the multi-node launcher uses, such as worker-1@worker-2:0,1."
    )

    @property
    def settings(self) -> dict[str, Any]:
        """A copy of DeepSpeed's own configuration, once it is read; empty without one."""
        if isinstance(self.hf_ds_config, dict):
            return copy.deepcopy(self.hf_ds_config)
        return {}

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """Accelerate's name for `settings`, where scripts look for an optimizer or scheduler section."""
        return self.settings

    def zero_section(self) -> dict[str, Any]:
        """Return the `zero_optimization` section, merged from the fields and DeepSpeed's own configuration."""
        section: dict[str, Any] = self.settings.get("zero_optimization", {})
        section["stage"] = self.zero_stage
        for part in ("optimizer", "param"):
            device, path = getattr(self, f"offload_{part}_device"), getattr(self, f"offload_{part}_nvme_path")
            if device != "none":
                offload = section.setdefault(f"offload_{part}", {})
                offload["device"] = device
                if path not in (None, "none"):
                    offload["nvme_path"] = path
        if self.zero3_save_16bit_model:
            section["stage3_gather_16bit_weights_on_model_save"] = True
        return section

    def clashes(self) -> Iterator[Fault]:
        """Yield the fields whose values contradict each other."""
        if self.hf_ds_config not in (None, "none") and "zero_stage" not in self.model_fields_set:
            return  # DeepSpeed's own configuration sets the stage, and is read later.
        for part in ("optimizer", "param"):
            yield from self._offload_faults(part)
        if self.offload_optimizer_device != "none":
            yield from self._offload_stage_faults()
        if self.zero_stage < 3:
            yield from self._stage_3_faults()

    def _offload_faults(self, part: str) -> Iterator[Fault]:
        device = getattr(self, f"offload_{part}_device")
        path = getattr(self, f"offload_{part}_nvme_path")
        if device == "nvme" and path in (None, "none"):
            yield Fault(f"offload_{part}_device", "nvme without a folder", hint=f"set offload_{part}_nvme_path")
        if device != "nvme" and path not in (None, "none"):
            yield Fault(
                f"offload_{part}_nvme_path",
                f"{path!r} is not used",
                f"offload_{part}_device is {device}",
                f"set offload_{part}_device to nvme or remove the folder",
            )

    def _offload_stage_faults(self) -> Iterator[Fault]:
        device, least = self.offload_optimizer_device, 3 if self.offload_optimizer_device == "nvme" else 1
        if self.zero_stage < least:
            why = "stage 0 does not shard the optimizer"
            if device == "nvme":
                why = "only stage 3 keeps optimizer state on a disk"
            what = f"{device} with zero_stage {self.zero_stage}"
            yield Fault("offload_optimizer_device", what, why, f"set zero_stage to {least}, or remove the device")

    def _stage_3_faults(self) -> Iterator[Fault]:
        values = (
            ("offload_param_device", self.offload_param_device, self.offload_param_device != "none"),
            ("zero3_init_flag", "true", self.zero3_init_flag),
            ("zero3_save_16bit_model", "true", self.zero3_save_16bit_model),
        )
        for field, value, used in values:
            if used:
                yield Fault(
                    field,
                    f"{value} with zero_stage {self.zero_stage}",
                    "only stage 3 shards parameters",
                    f"set zero_stage to 3 or remove {field}",
                )
