"""The report on an out-of-memory error: who uses the memory, and what to change, the smallest change first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.environment.byte_sizes import read_byte_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.planner.memory_usage import MemoryUsage

__all__ = ["RunSettings", "describe_out_of_memory", "find_remedies", "requested_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """The settings of a run that matter for the remedies.

    Attributes:
        ranks: Number of ranks.
        micro_batch: Samples in a rank's micro-batch; None if unknown.
        accumulation: Micro-batches per optimizer step.
        checkpoints: Whether activation checkpointing is on.
        offloads: Whether parameters are offloaded to host memory.
        on_cpu: Whether the device is the CPU.
    """

    ranks: int = 1
    micro_batch: int | None = None
    accumulation: int = 1
    checkpoints: bool = False
    offloads: bool = False
    on_cpu: bool = False


def requested_bytes(message: str) -> int | None:
    """Return the bytes that could not be allocated, from torch's error message; None if it does not tell."""
    match = re.search(r"ried to allocate ([\d.]+ (?:[KMGT]iB|bytes))", message)
    found = read_byte_size(match[1].removesuffix("bytes")) if match is not None else None
    return None if found is None else found.number


def describe_out_of_memory(
    usage: MemoryUsage, run: RunSettings, requested: int | None, *, rank: int, device: str
) -> str:
    """Return a report: what uses the memory, the largest allocations, and what would help.

    Args:
        usage: Measured where memory ran out.
        run: Settings of the run.
        requested: Bytes that could not be allocated; None if unknown.
        rank: The rank that ran out of memory.
        device: The device's name.
    """
    used = usage.state + usage.other + usage.libraries
    more = ""
    if requested:
        more = f", and {_size(requested)} more were requested"
    free = f"{_size(usage.free)} of {_size(usage.total)} free"
    lines = [
        f"memory of rank {rank} on {device}: {_size(used)} in use, {free}{more}",
        f"  parameters {_size(usage.parameters)}, gradients {_size(usage.gradients)}, optimizer state "
        f"{_size(usage.optimizer)}, activations and all else {_size(usage.other)}"
        + (f", libraries {_size(usage.libraries)}" if usage.libraries else ""),
    ]
    if usage.largest:
        lines.append("the largest allocations:")
        lines += [f"  {_size(size)}  {what}" for size, what in usage.largest]
    lines.append("what would help, the smallest change first:")
    lines += [f"  {text}" for text in find_remedies(usage, run, requested)]
    return "\n".join(lines)


def find_remedies(usage: MemoryUsage, run: RunSettings, requested: int | None) -> list[str]:
    """Return the possible changes, smallest first, up to the first that is enough by itself."""
    missing = _missing_bytes(usage, requested)
    lines = []
    for text, freed in _changes(usage, run, requested or 0):
        if freed is None:
            lines.append(text)
            continue
        is_enough = missing is not None and freed >= missing
        lines.append(f"{text}: frees about {_size(freed)}" + (", which is enough" if is_enough else ""))
        if is_enough:
            return lines
    if missing:
        lines.append(f"none of these is enough by itself: {_size(missing)} are missing")
    return lines


def _missing_bytes(usage: MemoryUsage, requested: int | None) -> int | None:
    """The bytes to free. Where as much as was requested is free, it is not available to this process."""
    if requested is None or requested <= usage.free:
        return requested
    return requested - usage.free


def _changes(usage: MemoryUsage, run: RunSettings, requested: int) -> Iterator[tuple[str, int | None]]:
    """Yield each change with the bytes that it frees; None where that is unknown."""
    if requested and usage.unused >= requested:
        pieces = f"{_size(usage.unused)} are reserved in blocks that are too small"
        yield f"the variable PYTORCH_ALLOC_CONF=expandable_segments:True may be enough: {pieces}", None
    yield from _smaller_batches(usage, run)
    if not run.checkpoints:
        yield (
            "--fsdp_activation_checkpointing true with --use_fsdp: stores only the inputs of each block and recomputes "
            f"its activations, at the cost of one more forward; up to {_size(usage.other)}",
            None,
        )
    yield from _sharding(usage, run)


def _smaller_batches(usage: MemoryUsage, run: RunSettings) -> Iterator[tuple[str, int]]:
    """Yield batches of a half, a quarter and an eighth."""
    if run.micro_batch is None:
        return
    batch, steps = run.micro_batch, run.accumulation
    while batch > 1 and batch * 8 > run.micro_batch:
        batch, steps = batch // 2, steps * 2
        text = f"batches of {batch} with gradient_accumulation_steps={steps}, the same optimizer steps"
        yield text, usage.other * (run.micro_batch - batch) // run.micro_batch


def _sharding(usage: MemoryUsage, run: RunSettings) -> Iterator[tuple[str, int]]:
    if not usage.is_sharded and run.ranks > 1:
        yield f"--use_fsdp: state sharded over {run.ranks}", usage.state * (run.ranks - 1) // run.ranks
    elif not usage.is_sharded and not run.on_cpu:
        yield f"--use_fsdp on 2 devices: state ({_size(usage.state)}) sharded over 2", usage.state // 2
    if not run.offloads and not run.on_cpu:
        yield "--use_fsdp --fsdp_offload_params true: state in host memory, slower steps", usage.state


def _size(number: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number} bytes"
