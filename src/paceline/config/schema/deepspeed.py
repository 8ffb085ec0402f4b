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
    """How DeepSpeed's engine shards and offloads."""

    key_prefix: ClassVar[str] = ""

    hf_ds_config: Annotated[str | dict[str, Any] | None, Key("deepspeed_config_file")] = Field(
        None, description="DeepSpeed's own JSON: a path (or in Python a dict); what it sets need not be said again."
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        2, description="What is sharded: 1 optimizer state, 2 also gradients, 3 also parameters."
    )
    offload_optimizer_device: Offload = Field("none", description="Where optimizer state is kept.")
    offload_param_device: Offload = Field("none", description="Where parameters are kept under stage 3.")
    offload_optimizer_nvme_path: FilePath | None = Field(None, description="Folder on NVMe for optimizer state.")
    offload_param_nvme_path: FilePath | None = Field(None, description="Folder on NVMe for parameters.")
    gradient_accumulation_steps: Annotated[Count | Literal["auto"], Key(has_flag=False)] = Field(
        "auto", description="Micro-batches of one optimizer step; auto takes the top-level setting."
    )
    gradient_clipping: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="Largest gradient norm; auto takes the one that the script clips to."
    )
    zero3_init_flag: bool | None = Field(
        None, description="Shard a model while it is being built; None: exactly under stage 3."
    )
    zero3_save_16bit_model: bool = Field(False, description="Gather 16-bit weights when a stage 3 model is saved.")
    transformer_moe_cls_names: Annotated[Names, Key("deepspeed_moe_layer_cls_names")] = Field(
        (), description="Mixture-of-experts classes that stage 3 gathers as a whole."
    )
    deepspeed_multinode_launcher: Launcher = Field("pdsh", description="Program that starts the other machines.")
    deepspeed_hostfile: FilePath | None = Field(None, description="Host file of the multi-node launcher.")
    deepspeed_exclusion_filter: str | None = Field(None, description="Hosts left out by the multi-node launcher.")
    deepspeed_inclusion_filter: str | None = Field(None, description="Hosts used by the multi-node launcher.")

    @property
    def settings(self) -> dict[str, Any]:
        """A copy of DeepSpeed's own configuration, once it was read; empty without one."""
        return copy.deepcopy(self.hf_ds_config) if isinstance(self.hf_ds_config, dict) else {}

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """Accelerate's name for `settings`: scripts look there for an optimizer or a scheduler section."""
        return self.settings

    def zero_section(self) -> dict[str, Any]:
        """The `zero_optimization` section that the fields and DeepSpeed's own configuration make together."""
        section: dict[str, Any] = self.settings.get("zero_optimization", {})
        section["stage"] = self.zero_stage
        for part in ("optimizer", "param"):
            device, path = getattr(self, f"offload_{part}_device"), getattr(self, f"offload_{part}_nvme_path")
            if device != "none":
                there = section.setdefault(f"offload_{part}", {})
                there["device"] = device
                if path not in (None, "none"):
                    there["nvme_path"] = path
        if self.zero3_save_16bit_model:
            section["stage3_gather_16bit_weights_on_model_save"] = True
        return section

    def clashes(self) -> Iterator[Fault]:
        """Yield what cannot go together within the section."""
        if self.hf_ds_config not in (None, "none") and "zero_stage" not in self.model_fields_set:
            return  # DeepSpeed's own configuration says the stage, and is looked into later.
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
            why = "stage 0 leaves the optimizer alone"
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
