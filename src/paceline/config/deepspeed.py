"""The `deepspeed_config` section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from paceline.config.base import Fault, Key, Section
from paceline.config.readers import Names

Offload = Literal["none", "cpu", "nvme"]
Count = Annotated[int, Field(ge=1)]
Launcher = Literal["pdsh", "standard", "openmpi", "mvapich", "mpich", "nossh", "slurm"]

FILE_FIELDS: Final = (
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero3_save_16bit_model",
)
"""Fields that a DeepSpeed JSON file sets itself, so that they cannot be given beside it."""


class DeepSpeedPlugin(Section):
    """How DeepSpeed's engine shards and offloads."""

    key_prefix: ClassVar[str] = ""

    hf_ds_config: Annotated[str | dict[str, Any] | None, Key("deepspeed_config_file")] = Field(
        None, description="Path of a DeepSpeed JSON file, which then sets what it holds."
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        2, description="What is sharded: 1 optimizer state, 2 also gradients, 3 also parameters."
    )
    offload_optimizer_device: Offload = Field("none", description="Where optimizer state is kept.")
    offload_param_device: Offload = Field("none", description="Where parameters are kept under stage 3.")
    offload_optimizer_nvme_path: str | None = Field(None, description="Folder on NVMe for optimizer state.")
    offload_param_nvme_path: str | None = Field(None, description="Folder on NVMe for parameters.")
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
    deepspeed_hostfile: str | None = Field(None, description="Host file of the multi-node launcher.")
    deepspeed_exclusion_filter: str | None = Field(None, description="Hosts left out by the multi-node launcher.")
    deepspeed_inclusion_filter: str | None = Field(None, description="Hosts used by the multi-node launcher.")

    def clashes(self) -> Iterator[Fault]:
        """Yield what cannot go together within the section."""
        if self.hf_ds_config is not None and self.hf_ds_config != "none":
            yield from self._beside_file()
            return
        for part in ("optimizer", "param"):
            yield from self._offload_faults(part)
        if self.zero_stage < 3:
            yield from self._stage_3_faults()

    def _beside_file(self) -> Iterator[Fault]:
        for field in FILE_FIELDS:
            value = getattr(self, field)
            if field in self.model_fields_set and value is not None and value != "auto":
                yield Fault(
                    field,
                    f"{value!r} is given beside deepspeed_config_file",
                    "the DeepSpeed file sets it itself",
                    "write it in one of the two places",
                )

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
