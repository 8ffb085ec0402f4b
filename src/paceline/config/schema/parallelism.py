"""The `parallelism_config` section: the sizes of the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from paceline.config.schema.base import Fault, Key, Section

Size = Annotated[int, Field(ge=1)]


class ParallelismConfig(Section):
    """The sizes of the device mesh; they must multiply to the number of processes."""

    key_prefix: ClassVar[str] = "parallelism_config_"

    dp_replicate_size: Annotated[Size, Key(counts="replica")] = Field(
        1, description="Number of copies (replicas) of the sharded model."
    )
    dp_shard_size: Annotated[Size, Key(counts="rank")] = Field(
        1, description="Ranks over which each copy is sharded; without it, all ranks of a copy."
    )
    tp_size: Annotated[Size, Key(counts="rank")] = Field(
        1, description="Ranks that share each layer's matrices (tensor parallelism)."
    )
    cp_size: Annotated[Size, Key(counts="rank")] = Field(
        1, description="Ranks that share each sequence by ring attention (context parallelism)."
    )
    cp_backend: Literal["torch"] = Field("torch", description="Implementation of context parallelism.")
    cp_comm_strategy: Literal["allgather", "alltoall"] = Field(
        "allgather", description="How keys and values are exchanged between the ranks of a sequence."
    )
    sp_size: Annotated[Size, Key(counts="rank")] = Field(
        1, description="Ranks that share each sequence by Ulysses attention (sequence parallelism)."
    )
    sp_backend: Literal["deepspeed"] = Field("deepspeed", description="Implementation of sequence parallelism.")
    sp_seq_length: Annotated[Size | None, Key(counts="token")] = Field(
        None, description="Length of every sequence, in tokens, where it never varies."
    )
    sp_seq_length_is_variable: bool = Field(True, description="Sequences vary in length between batches.")
    sp_attn_implementation: str = Field("sdpa", description="Attention kernel under sequence parallelism.")

    @property
    def total_size(self) -> int:
        """The number of ranks that the mesh has."""
        return prod((self.dp_replicate_size, self.dp_shard_size, self.tp_size, self.cp_size, self.sp_size))

    def clashes(self) -> Iterator[Fault]:
        """Yield the fields whose values contradict each other."""
        if self.cp_size > 1 and self.sp_size > 1:
            yield Fault(
                "sp_size",
                f"{self.sp_size} conflicts with cp_size {self.cp_size}",
                "both divide the sequence",
                "set one of them to 1",
            )
        if self.sp_attn_implementation in ("eager", "flex_attention"):
            yield Fault(
                "sp_attn_implementation",
                f"{self.sp_attn_implementation!r} cannot be used",
                "Ulysses attention needs a fused kernel",
                "write sdpa or flash_attention_2",
            )
        for part in ("cp", "sp"):
            yield from self._unused(part)

    def _unused(self, part: str) -> Iterator[Fault]:
        if getattr(self, f"{part}_size") > 1:
            return
        for field, info in type(self).model_fields.items():
            value = getattr(self, field)
            if field.startswith(f"{part}_") and field != f"{part}_size" and value != info.default:
                yield Fault(
                    field,
                    f"{value!r} is not used",
                    f"{part}_size is 1",
                    f"set {self.key_prefix}{part}_size or remove the key",
                )
