"""What to change when memory ran out: the smallest changes first, with what each frees by arithmetic."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.planner.memory_usage import MemoryUsage

__all__ = ["RunSettings", "describe_out_of_memory", "remedies", "requested_bytes"]

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "bytes": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What the remedies need to know of a run.

    Attributes:
        ranks: How many train together.
        micro_batch: Samples in a rank's batch; None if no loader says.
        accumulation: Micro-batches to an optimizer step.
        checkpoints: Whether activations are computed again in the backward pass.
        offloads: Whether parameters rest in host memory.
        on_cpu: Whether the device is the CPU.
    """

    ranks: int = 1
    micro_batch: int | None = None
    accumulation: int = 1
    checkpoints: bool = False
    offloads: bool = False
    on_cpu: bool = False


def requested_bytes(message: str) -> int | None:
    """How much was asked for in vain, from what torch says; None if it does not."""
    found = re.search(r"ried to allocate ([\d.]+) (KiB|MiB|GiB|TiB|bytes)", message)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def describe_out_of_memory(usage: MemoryUsage, run: RunSettings, asked: int | None, *, rank: int, device: str) -> str:
    """Say who holds the memory, what the largest pieces are, and what would help.

    Args:
        usage: Measured where memory ran out.
        run: The run.
        asked: Bytes that could not be had; None if unknown.
        rank: Whose memory.
        device: What to call the device.
    """
    taken = usage.state + usage.other + usage.libraries
    more = f", and {_size(asked)} more were asked for" if asked else ""
    free = f"{_size(usage.free)} of {_size(usage.total)} free"
    lines = [
        f"memory of rank {rank} on {device}: {_size(taken)} in use, {free}{more}",
        f"  parameters {_size(usage.parameters)}, gradients {_size(usage.gradients)}, optimizer state "
        f"{_size(usage.optimizer)}, activations and all else {_size(usage.other)}"
        + (f", libraries {_size(usage.libraries)}" if usage.libraries else ""),
    ]
    if usage.largest:
        lines.append("the largest pieces:")
        lines += [f"  {_size(size)}  {what}" for size, what in usage.largest]
    lines.append("what would help, the smallest change first:")
    lines += [f"  {text}" for text in remedies(usage, run, asked)]
    return "\n".join(lines)


def remedies(usage: MemoryUsage, run: RunSettings, asked: int | None) -> list[str]:
    """The changes, smallest first, up to the first that is enough by itself."""
    # What could not be had must be found beyond what is free; where that much is free, it is not for this process.
    short = None if asked is None else asked - usage.free if asked > usage.free else asked
    found = []
    for text, freed in _changes(usage, run, asked or 0):
        if freed is None:
            found.append(text)
            continue
        enough = short is not None and freed >= short
        found.append(f"{text}: frees about {_size(freed)}" + (", which is enough" if enough else ""))
        if enough:
            return found
    if short:
        found.append(f"none of these is enough by itself: {_size(short)} are missing")
    return found


def _changes(usage: MemoryUsage, run: RunSettings, asked: int) -> Iterator[tuple[str, int | None]]:
    if usage.unused and asked and usage.unused >= asked:
        pieces = f"{_size(usage.unused)} are held in pieces that were too small"
        yield f"the variable PYTORCH_ALLOC_CONF=expandable_segments:True might do: {pieces}", None
    batch, steps = run.micro_batch, run.accumulation
    while batch is not None and batch > 1:
        batch, steps = batch // 2, steps * 2
        words = f"batches of {batch} with gradient_accumulation_steps={steps}, the same optimizer steps"
        yield words, usage.other * (run.micro_batch - batch) // run.micro_batch if run.micro_batch else 0
        if batch * 8 <= (run.micro_batch or 0):
            break
    if not run.checkpoints:
        yield (
            "--fsdp_activation_checkpointing true with --use_fsdp: keeps only the inputs of each block of the "
            f"activations, for one more forward; up to {_size(usage.other)}",
            None,
        )
    if not usage.is_sharded and run.ranks > 1:
        yield f"--use_fsdp: state cut in {run.ranks}", usage.state * (run.ranks - 1) // run.ranks
    elif not usage.is_sharded and not run.on_cpu:
        yield f"--use_fsdp on 2 devices: state ({_size(usage.state)}) cut in 2", usage.state // 2
    if not run.offloads and not run.on_cpu:
        yield "--use_fsdp --fsdp_offload_params true: state in host memory, slower steps", usage.state


def _size(number: int) -> str:
    for unit, words in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.2f} {words}"
    return f"{number} bytes"
