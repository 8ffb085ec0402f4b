"""The `fsdp_config` section: FSDP2, and the keys that only files of FSDP version 1 hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from paceline.config.schema.base import Fault, Key, Section
from paceline.config.schema.readers import Names, as_dtype_name

Dtype = Annotated[Literal["fp32", "bf16", "fp16"] | None, BeforeValidator(as_dtype_name)]
WrapPolicy = Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"]
StateDictType = Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"]
ShardingStrategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"]
BackwardPrefetch = Literal["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"]


def _as_flag(value: Any) -> Any:
    """Understand torch's two offload policies by their names, without importing torch."""
    return {"CPUOffloadPolicy": True, "OffloadPolicy": False}.get(type(value).__name__, value)


class FullyShardedDataParallelPlugin(Section):
    """How parameters, gradients and optimizer state are sharded by `fully_shard`."""

    key_prefix: ClassVar[str] = "fsdp_"

    fsdp_version: Annotated[Literal[2], Key(more_choices=("1",))] = Field(
        2, description="Version of FSDP; files of version 1 are translated."
    )
    reshard_after_forward: bool | Annotated[int, Field(ge=1)] = Field(
        True,
        description="Free gathered parameters after forward; a number keeps them among so many ranks.",
    )
    cpu_offload: Annotated[bool, BeforeValidator(_as_flag), Key("fsdp_offload_params", ("fsdp_cpu_offload",))] = Field(
        False, description="Keep parameters, gradients and optimizer state in host memory."
    )
    auto_wrap_policy: WrapPolicy | None = Field(
        None, description="How sharding units are chosen; None finds the model's repeated blocks."
    )
    transformer_cls_names_to_wrap: Annotated[Names, Key("fsdp_transformer_layer_cls_to_wrap")] = Field(
        (), description="Classes whose modules become sharding units."
    )
    min_num_params: Annotated[int, Field(ge=1)] = Field(
        100_000_000, description="Parameters that a unit must have under SIZE_BASED_WRAP."
    )
    state_dict_type: StateDictType = Field(
        "SHARDED_STATE_DICT", description="Whether checkpoints hold each rank's shards or whole tensors."
    )
    cpu_ram_efficient_loading: bool = Field(
        True, description="Load weights on rank 0 only and send the others their shards."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute each unit's activations in backward instead of keeping them."
    )
    activation_checkpointing_offload: bool = Field(
        False, description="Keep the inputs of recomputed units in host memory."
    )
    ignored_modules: str | None = Field(
        None, description="Regular expression that matches the whole names of modules left unsharded."
    )
    param_dtype: Dtype = Field(None, description="Precision of gathered parameters; None: from mixed_precision.")
    reduce_dtype: Dtype = Field(None, description="Precision in which gradients are averaged; None: fp32.")
    output_dtype: Dtype = Field(None, description="Precision of the outputs; None: from mixed_precision.")

    @classmethod
    def fold(cls, values: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
        """Fold `mixed_precision_policy` into the three precisions; point from version 1 to version 2."""
        rest = dict(values)
        policy = rest.pop("mixed_precision_policy", None)
        faults = [
            Fault(
                name,
                f"{name}={rest.pop(name)!r} belongs to FSDP version 1",
                "paceline has version 2 only",
                hint,
            )
            for name, hint in _VERSION_1_HINTS.items()
            if name in rest
        ]
        dtypes, policy_faults = _dtypes_of(policy)
        for name, dtype in dtypes.items():
            if rest.get(name) is not None and as_dtype_name(rest[name]) != dtype:
                policy_faults.append(
                    Fault(
                        name,
                        f"{rest[name]!r} differs from {dtype!r} of mixed_precision_policy",
                        hint="give one",
                    )
                )
            rest[name] = dtype
        return rest, faults + policy_faults

    def clashes(self) -> Iterator[Fault]:
        """Yield what cannot go together within the section."""
        if self.activation_checkpointing_offload and not self.activation_checkpointing:
            yield Fault(
                "activation_checkpointing_offload",
                "true without activation checkpointing",
                "it moves what activation checkpointing keeps",
                "set fsdp_activation_checkpointing to true as well",
            )
        policy = self.auto_wrap_policy
        if self.transformer_cls_names_to_wrap and policy in ("NO_WRAP", "SIZE_BASED_WRAP"):
            yield Fault(
                "transformer_cls_names_to_wrap",
                f"{','.join(self.transformer_cls_names_to_wrap)} is not used",
                f"fsdp_auto_wrap_policy {policy} does not look at classes",
                "set fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP or remove the classes",
            )
        if self.min_num_params != 100_000_000 and policy != "SIZE_BASED_WRAP":
            yield Fault(
                "min_num_params",
                f"{self.min_num_params} is not used",
                "only fsdp_auto_wrap_policy SIZE_BASED_WRAP looks at sizes",
                "set that policy or remove the number",
            )
        yield from self._pattern_faults()

    def _pattern_faults(self) -> Iterator[Fault]:
        if self.ignored_modules is None:
            return
        try:
            re.compile(self.ignored_modules)
        except re.error as error:
            yield Fault("ignored_modules", f"{self.ignored_modules!r} is no regular expression", str(error))


_PRECISIONS = ("fp32", "bf16", "fp16")

_VERSION_1_HINTS = {
    "sharding_strategy": "write reshard_after_forward=True for FULL_SHARD, =False for SHARD_GRAD_OP",
    "backward_prefetch": "leave it out: version 2 always prefetches in backward",
    "forward_prefetch": "leave it out: version 2 has no such switch",
    "use_orig_params": "leave it out: version 2 always keeps the original parameters",
    "sync_module_states": "leave it out: cpu_ram_efficient_loading loads on rank 0 and shares out",
    "limit_all_gathers": "leave it out: version 2 bounds the memory of gathers by itself",
}


def _dtypes_of(policy: Any) -> tuple[dict[str, Any], list[Fault]]:
    """Read a precision name, a mapping, or anything with torch's three attributes."""
    if policy is None:
        return {}, []
    if isinstance(policy, str):
        dtype = "bf16" if policy.casefold() == "fp8" else as_dtype_name(policy)
        if dtype not in _PRECISIONS:
            why = f"it must be one of {', '.join(_PRECISIONS)}, fp8"
            return {}, [Fault("mixed_precision_policy", f"{policy!r} is not allowed", why)]
        return {"param_dtype": dtype, "output_dtype": dtype}, []
    fields = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")
    given = policy if isinstance(policy, dict) else {f: getattr(policy, f) for f in fields if hasattr(policy, f)}
    unknown = [str(name) for name in given if name not in fields]
    if unknown or not given:
        return {}, [Fault("mixed_precision_policy", f"{policy!r} is no precision policy", f"it has {fields[:3]}")]
    if given.get("cast_forward_inputs", True) is not True:
        return {}, [
            Fault(
                "mixed_precision_policy",
                "cast_forward_inputs=False is not carried out",
                hint="cast in the model",
            )
        ]
    return {name: as_dtype_name(given[name]) for name in fields[:3] if given.get(name) is not None}, []


class FsdpVersion1(Section):
    """Keys that only FSDP version 1 had."""

    key_prefix: ClassVar[str] = "fsdp_"

    sharding_strategy: ShardingStrategy | None = Field(
        None, description="Version 1 name of fsdp_reshard_after_forward."
    )
    backward_prefetch: Annotated[
        BackwardPrefetch | None, Key("fsdp_backward_prefetch", ("fsdp_backward_prefetch_policy",))
    ] = Field(None, description="Version 1 only; version 2 always prefetches before the backward of a unit.")
    forward_prefetch: bool | None = Field(None, description="Version 1 only; version 2 has no such switch.")
    use_orig_params: bool | None = Field(
        None, description="Version 1 only; version 2 always keeps the original parameters."
    )
    sync_module_states: bool | None = Field(
        None,
        description="Version 1 only; fsdp_cpu_ram_efficient_loading shares out rank 0's weights.",
    )
