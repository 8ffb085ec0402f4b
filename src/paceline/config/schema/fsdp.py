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
    """Read torch's two offload policies by class name, without importing torch."""
    return {"CPUOffloadPolicy": True, "OffloadPolicy": False}.get(type(value).__name__, value)


class FullyShardedDataParallelPlugin(Section):
    """How FSDP2 (`fully_shard`) shards parameters, gradients and optimizer state; used under strategy fsdp."""

    key_prefix: ClassVar[str] = "fsdp_"

    fsdp_version: Annotated[Literal[2], Key(more_choices=("1",))] = Field(
        2, description="Version of FSDP, always 2; files of version 1 are translated."
    )
    reshard_after_forward: Annotated[bool | Annotated[int, Field(ge=1)], Key(counts="rank")] = Field(
        True,
        description="Free all-gathered parameters after forward. A number reshards them over that many ranks instead.",
    )
    cpu_offload: Annotated[bool, BeforeValidator(_as_flag), Key("fsdp_offload_params", ("fsdp_cpu_offload",))] = Field(
        False,
        description="Keep parameters, gradients and optimizer state in host memory; the optimizer steps on the CPU.",
    )
    auto_wrap_policy: WrapPolicy | None = Field(
        None, description="How the model is cut into sharding units; None finds its repeated blocks."
    )
    transformer_cls_names_to_wrap: Annotated[Names, Key("fsdp_transformer_layer_cls_to_wrap")] = Field(
        (), description="Module classes that become sharding units, under TRANSFORMER_BASED_WRAP."
    )
    min_num_params: Annotated[int, Field(ge=1), Key(counts="parameter")] = Field(
        100_000_000, description="Minimum number of parameters of a sharding unit, under SIZE_BASED_WRAP."
    )
    state_dict_type: StateDictType = Field(
        "SHARDED_STATE_DICT", description="Whether checkpoints hold each rank's shards or full tensors."
    )
    cpu_ram_efficient_loading: bool = Field(
        True, description="Load weights on rank 0 only, and send the other ranks their shards."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute the activations of each sharding unit in backward instead of storing them."
    )
    activation_checkpointing_policy: Literal["full", "products"] = Field(
        "full",
        description="What is recomputed: full: everything but the inputs of a unit; products: all but the results of "
        "matrix products and attention, which takes more memory and less time.",
    )
    activation_checkpointing_offload: bool = Field(
        False, description="Store the inputs of recomputed units in host memory, under activation checkpointing."
    )
    ignored_modules: str | None = Field(
        None, description="Regular expression for modules that stay unsharded; it must match the full name."
    )
    keep_last_unit: bool = Field(
        False,
        description="Keep the last unit, and what is in none, gathered after forward, since the backward begins with "
        "them; only where fsdp_reshard_after_forward is true.",
    )
    prefetch_units: Annotated[int, Field(ge=0), Key(counts="unit")] = Field(
        0, description="Units that are all-gathered ahead explicitly; 0 leaves it to FSDP2, which looks one ahead."
    )
    separate_reduce_scatter_group: bool = Field(
        False,
        description="Reduce gradients in a process group of their own, so that all-gathers need not wait (torch 2.13).",
    )
    reduce_scatter_buffers: Annotated[int, Field(ge=1), Key(counts="buffer")] = Field(
        1, description="Buffers of gradients that may wait to be reduced; more avoid stalls (torch 2.13)."
    )
    find_unused_parameters: bool = Field(
        False,
        description="Let parameters without gradient take part in the reduction with zeros, where ranks may use "
        "different ones (torch 2.13). A unit that only some ranks use also needs fsdp_reshard_after_forward: false.",
    )
    param_dtype: Dtype = Field(None, description="Dtype of all-gathered parameters; None takes mixed_precision.")
    reduce_dtype: Dtype = Field(None, description="Dtype in which gradients are reduced; None means fp32.")
    output_dtype: Dtype = Field(None, description="Dtype of the outputs; None takes mixed_precision.")

    @classmethod
    def fold(cls, values: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
        """Split `mixed_precision_policy` into the three dtypes; name the replacement of version 1 arguments."""
        rest = dict(values)
        policy = rest.pop("mixed_precision_policy", None)
        faults = [
            Fault(
                name,
                f"{name}={rest.pop(name)!r} belongs to FSDP version 1",
                "paceline uses version 2 only",
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
        """Yield the fields whose values contradict each other."""
        if self.activation_checkpointing_offload and not self.activation_checkpointing:
            yield Fault(
                "activation_checkpointing_offload",
                "true without activation checkpointing",
                "it offloads what activation checkpointing stores",
                "set fsdp_activation_checkpointing to true as well",
            )
        if self.activation_checkpointing_policy != "full" and not self.activation_checkpointing:
            yield Fault(
                "activation_checkpointing_policy",
                f"{self.activation_checkpointing_policy} without activation checkpointing",
                "nothing is recomputed",
                "set fsdp_activation_checkpointing to true as well",
            )
        policy = self.auto_wrap_policy
        if self.transformer_cls_names_to_wrap and policy in ("NO_WRAP", "SIZE_BASED_WRAP"):
            yield Fault(
                "transformer_cls_names_to_wrap",
                f"{','.join(self.transformer_cls_names_to_wrap)} is not used",
                f"fsdp_auto_wrap_policy {policy} does not use classes",
                "set fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP or remove the classes",
            )
        if self.min_num_params != 100_000_000 and policy != "SIZE_BASED_WRAP":
            yield Fault(
                "min_num_params",
                f"{self.min_num_params} is not used",
                "only fsdp_auto_wrap_policy SIZE_BASED_WRAP uses sizes",
                "set that policy or remove the number",
            )
        yield from self._pattern_faults()

    def _pattern_faults(self) -> Iterator[Fault]:
        if self.ignored_modules is None:
            return
        try:
            re.compile(self.ignored_modules)
        except re.error as error:
            yield Fault("ignored_modules", f"{self.ignored_modules!r} is not a regular expression", str(error))


_PRECISIONS = ("fp32", "bf16", "fp16")

_VERSION_1_HINTS = {
    "sharding_strategy": "write reshard_after_forward=True for FULL_SHARD, =False for SHARD_GRAD_OP",
    "backward_prefetch": "leave it out: version 2 always prefetches in backward",
    "forward_prefetch": "leave it out: version 2 has no such switch",
    "use_orig_params": "leave it out: version 2 always keeps the original parameters",
    "sync_module_states": "leave it out: cpu_ram_efficient_loading loads on rank 0 and broadcasts",
    "limit_all_gathers": "leave it out: version 2 limits the memory of all-gathers itself",
}


def _dtypes_of(policy: Any) -> tuple[dict[str, Any], list[Fault]]:
    """Read a precision name, a mapping, or an object with torch's three attributes."""
    if policy is None:
        return {}, []
    if isinstance(policy, str):
        return _dtypes_of_name(policy)
    given = _policy_fields(policy)
    if not given or not _POLICY_FIELDS.issuperset(given):
        why = f"it has {', '.join(_DTYPE_FIELDS)}"
        return {}, [Fault("mixed_precision_policy", f"{policy!r} is not a precision policy", why)]
    if given.get("cast_forward_inputs", True) is not True:
        what = "cast_forward_inputs=False is not supported"
        return {}, [Fault("mixed_precision_policy", what, hint="cast in the model")]
    return {name: as_dtype_name(given[name]) for name in _DTYPE_FIELDS if given.get(name) is not None}, []


_DTYPE_FIELDS = ("param_dtype", "reduce_dtype", "output_dtype")
_POLICY_FIELDS = frozenset({*_DTYPE_FIELDS, "cast_forward_inputs"})


def _dtypes_of_name(name: str) -> tuple[dict[str, Any], list[Fault]]:
    dtype = "bf16"
    if name.casefold() != "fp8":
        dtype = as_dtype_name(name)
    if dtype not in _PRECISIONS:
        why = f"it must be one of {', '.join(_PRECISIONS)}, fp8"
        return {}, [Fault("mixed_precision_policy", f"{name!r} is not allowed", why)]
    return {"param_dtype": dtype, "output_dtype": dtype}, []


def _policy_fields(policy: Any) -> dict[str, Any]:
    if isinstance(policy, dict):
        return policy
    return {field: getattr(policy, field) for field in _POLICY_FIELDS if hasattr(policy, field)}


class FsdpVersion1(Section):
    """Keys that only FSDP version 1 had; they are translated."""

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
        description="Version 1 only; fsdp_cpu_ram_efficient_loading broadcasts rank 0's weights.",
    )
