"""The `fp8_config` section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from paceline.config.schema.base import Fault, Key, Section
from paceline.config.schema.readers import Names
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
    """How fp8 matrix products are scaled, and which layers have them; torchao computes them."""

    key_prefix: ClassVar[str] = "fp8_"

    backend: Literal["AUTO", "AO", "TE", "MSAMP", "NO"] = Field(
        "AUTO",
        description="Library: AO (torchao), which AUTO chooses; TE (Transformer Engine) and MSAMP are not supported.",
    )
    recipe: Literal["tensorwise", "rowwise"] = Field(
        "tensorwise",
        description="One scale for each tensor, which is faster, or one for each row, which is closer to bf16.",
    )
    skip_small_layers: bool = Field(
        True, description="Leave layers in bf16 that would be slower in fp8, by sizes measured on an H100."
    )
    exclude: Names = Field((), description="More layers to leave in bf16: parts of their names, such as `mlp.gate`.")
    enable_fsdp_float8_all_gather: bool = Field(
        True, description="All-gather the weights of these layers in fp8 under FSDP2; recipe tensorwise only."
    )
    pad_inner_dim: bool = Field(
        True, description="Pad batches whose number of tokens is not a multiple of 16, which fp8 products need."
    )
    emulate: bool = Field(
        False,
        description="Round to fp8 and multiply in high precision: for tests on devices without fp8, compiled or not.",
    )
    use_autocast_during_eval: bool = Field(
        False, description="Run evaluation in fp8 too (Transformer Engine); torchao's layers always do."
    )
    margin: Annotated[int, Field(ge=0)] = Field(
        0, description="Margin of the scaling factor, in powers of two (Transformer Engine)."
    )
    interval: Annotated[int, Field(ge=1)] = Field(
        1, description="Steps between updates of the scaling factors (Transformer Engine)."
    )
    fp8_format: Literal["HYBRID", "E4M3", "E5M2"] = Field(
        "HYBRID",
        description="Number format (Transformer Engine). torchao's tensorwise recipe is HYBRID: E4M3 in forward and "
        "E5M2 in backward; rowwise is E4M3.",
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
    use_mxfp8_block_scaling: bool = Field(False, description="Scale in blocks of 32 values (Transformer Engine).")

    def clashes(self) -> Iterator[Fault]:
        """Yield choices that torchao does not have, and settings of other libraries."""
        if self.backend not in ("AUTO", "AO"):
            yield Fault(
                "backend",
                f"{self.backend} is not supported in this release",
                "torchao computes fp8",
                "write AO, or remove the key",
            )
        for field in OTHER_LIBRARIES:
            value, info = getattr(self, field), type(self).model_fields[field]
            if value != info.default:
                yield Fault(
                    field,
                    f"{value!r} is not used",
                    "fp8 is computed by torchao, which scales by the values of the moment",
                    "remove the key",
                )


OTHER_LIBRARIES = (
    "use_autocast_during_eval",
    "margin",
    "interval",
    "fp8_format",
    "amax_history_len",
    "amax_compute_algo",
    "override_linear_precision",
    "opt_level",
    "use_mxfp8_block_scaling",
)
