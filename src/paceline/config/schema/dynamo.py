"""The `dynamo_config` section: `torch.compile`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from paceline.config.schema.base import Fault, Key, Section

Backend = Literal[
    "auto",
    "no",
    "eager",
    "aot_eager",
    "inductor",
    "aot_ts_nvfuser",
    "nvprims_nvfuser",
    "cudagraphs",
    "ofi",
    "fx2trt",
    "onnxrt",
    "tensorrt",
    "aot_torchxla_trace_once",
    "torchxla_trace_once",
    "ipex",
    "tvm",
    "hpu_backend",
    "neuron",
]
# The other fields are chosen by auto itself.
_USED_BY_AUTO = ("disable", "cache_dir", "cache_limit_gb", "activation_memory_budget", "cuda_graphs")
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class TorchDynamoPlugin(Section):
    """How prepared models are compiled by `torch.compile`."""

    key_prefix: ClassVar[str] = "dynamo_"

    backend: Backend = Field(
        "auto",
        description="Backend of torch.compile. auto: on CUDA, the model's repeated blocks are compiled by inductor "
        "after the first steps if the run is long enough, and stay so if steps get shorter; elsewhere nothing is. "
        "no: models are not compiled.",
    )
    mode: Mode = Field("default", description="Mode of torch.compile: what it optimises for.")
    fullgraph: Annotated[bool, Key("dynamo_use_fullgraph", ("dynamo_fullgraph",))] = Field(
        False, description="Raise an error at a graph break instead of compiling several graphs."
    )
    dynamic: Annotated[bool | None, Key("dynamo_use_dynamic", ("dynamo_dynamic",))] = Field(
        None, description="Compile for dynamic shapes; None lets torch decide when a shape changes."
    )
    options: Annotated[dict[str, Any] | None, Key(has_flag=False)] = Field(
        None, description="Options of the backend, as torch.compile(options=…) takes them."
    )
    disable: bool = Field(False, description="Turn torch.compile off everywhere, for debugging.")
    use_regional_compilation: bool = Field(
        False,
        description="Compile the model's repeated block once instead of the whole model: a much shorter first step.",
    )

    cache_dir: str | None = Field(
        None,
        description="Folder that keeps compiled code between runs; none: TORCHINDUCTOR_CACHE_DIR if that is set, else "
        "paceline/compiled in the user's cache folder.",
    )
    cache_limit_gb: Annotated[float, Field(gt=0), Key(unit="GB")] = Field(
        20.0, description="Size in GB above which that folder is emptied before a run compiles."
    )
    activation_memory_budget: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="How much of the activations compiled code keeps for the backward, from 0 (recompute all that it "
        "can) to 1 (keep what is fastest).",
    )

    cuda_graphs: bool = Field(
        True,
        description="Let auto replay compiled blocks as CUDA graphs where the host is slower than the GPU and that "
        "makes steps shorter, under one process or DDP.",
    )

    def clashes(self) -> Iterator[Fault]:
        """Yield settings that have no effect because nothing is compiled, or auto chooses them."""
        if self.backend == "eager" and self.activation_memory_budget < 1:
            yield Fault(
                "activation_memory_budget",
                f"{self.activation_memory_budget:g} is not used",
                "dynamo_backend is eager, which does not divide forward and backward",
                "set dynamo_backend to inductor",
            )
        if self.backend not in ("no", "auto"):
            return
        why = "so nothing is compiled" if self.backend == "no" else "which chooses by itself"
        for field, info in type(self).model_fields.items():
            value = getattr(self, field)
            takes_effect = field == "backend" or (self.backend == "auto" and field in _USED_BY_AUTO)
            if not takes_effect and value and value != info.default:
                yield Fault(
                    field,
                    f"{value!r} is not used",
                    f"dynamo_backend is {self.backend}, {why}",
                    "set dynamo_backend to inductor or remove the key",
                )
