"""The `fp8_config` section."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from paceline.config.schema.base import Key, Section
from paceline.config.schema.shapes import FALSE_WORDS, TRUE_WORDS


def _as_bools(value: Any) -> Any:
    parts = value
    if isinstance(value, str):
        parts = value.strip("()[] ").split(",")
    if not isinstance(parts, list):
        return parts
    return tuple(_as_bool(part) for part in parts)


def _as_bool(part: Any) -> Any:
    word = str(part).strip().casefold()
    return word in TRUE_WORDS if word in TRUE_WORDS | FALSE_WORDS else part


class FP8Config(Section):
    """How fp8 matrix products are scaled; checked, and not supported in this release."""

    key_prefix: ClassVar[str] = "fp8_"

    backend: Literal["AUTO", "AO", "TE", "MSAMP", "NO"] = Field(
        "AUTO",
        description="Library: AO (torchao), TE (Transformer Engine) or MSAMP; AUTO chooses.",
    )
    use_autocast_during_eval: bool = Field(False, description="Run evaluation in fp8 too.")
    margin: Annotated[int, Field(ge=0)] = Field(
        0, description="Margin of the scaling factor, in powers of two (Transformer Engine)."
    )
    interval: Annotated[int, Field(ge=1)] = Field(
        1, description="Steps between updates of the scaling factors (Transformer Engine)."
    )
    fp8_format: Literal["HYBRID", "E4M3", "E5M2"] = Field(
        "HYBRID", description="Number format; HYBRID is E4M3 in forward and E5M2 in backward."
    )
    amax_history_len: Annotated[int, Field(ge=1), Key("fp8_amax_history_len", ("fp8_amax_history_length",))] = Field(
        1024, description="Steps of the history of largest absolute values (Transformer Engine)."
    )
    amax_compute_algo: Annotated[
        Literal["most_recent", "max"], Key("fp8_amax_compute_algo", ("fp8_amax_compute_algorithm",))
    ] = Field("most_recent", description="How the largest value is chosen from that history (Transformer Engine).")
    override_linear_precision: Annotated[tuple[bool, bool, bool], BeforeValidator(_as_bools)] = Field(
        (False, False, False),
        description="Whether forward, data gradients and weight gradients stay in high precision (Transformer Engine).",
    )
    opt_level: Annotated[Literal["O1", "O2"], Key("fp8_opt_level", ("fp8_optimization_level",))] = Field(
        "O2", description="Optimisation level of MS-AMP."
    )
    enable_fsdp_float8_all_gather: bool = Field(True, description="All-gather sharded parameters in fp8 (torchao).")
    pad_inner_dim: bool = Field(True, description="Pad matrices to multiples of 16 (torchao).")
    use_mxfp8_block_scaling: bool = Field(False, description="Scale in blocks of 32 values (Transformer Engine).")
