"""The checks of `paceline test`: each returns a line with its result, or raises `CheckFailed`."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from paceline.cli.selftest.outcome import CheckFailed
from paceline.cli.selftest.training import BATCH_SIZE, checksums, prepare, train, train_in_plain_torch
from paceline.errors import counted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline import Accelerator
    from paceline.cli.selftest.training import SmallTraining, Trained

__all__ = [
    "check_collectives",
    "check_load",
    "check_loader",
    "check_precision",
    "check_save",
    "check_sharding",
    "check_training",
]

_TOLERANCES = {"no": 1e-4, "bf16": 5e-2, "fp16": 2e-2, "fp8": 0.3}
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_collectives(accelerator: Accelerator) -> str:
    """Exchange numbers with known results. Collective: every rank must call it."""
    size, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    local = torch.full((3,), float(rank + 1), device=device)
    uneven = accelerator.pad_across_processes(torch.full((rank + 1,), 1.0, device=device))
    answers = {
        "sum": (accelerator.reduce(local, "sum").tolist(), [size * (size + 1) / 2] * 3),
        "mean": (accelerator.reduce(local, "mean").tolist(), [(size + 1) / 2] * 3),
        "gather": (accelerator.gather(local[:1]).tolist(), [float(r + 1) for r in range(size)]),
        "padding": (list(uneven.shape), [size]),
    }
    for name, (got, wanted) in answers.items():
        if got != wanted:
            raise CheckFailed(
                f"{name} over {size} ranks gave {got} on rank {rank}, not {wanted}",
                f"The backend ({accelerator.device}) returns wrong numbers, so no training can be right",
                "Check drivers and network; for NCCL try NCCL_P2P_DISABLE=1 to find a broken link between GPUs",
            )
    accelerator.wait_for_everyone()
    return f"{', '.join(answers)} and barrier over {_ranks(accelerator)}"


def _ranks(accelerator: Accelerator) -> str:
    return counted(accelerator.num_processes, "rank")


def check_loader(accelerator: Accelerator) -> str:
    """Read a shuffled epoch whose length no batch size divides. Collective: every rank must call it."""
    samples = BATCH_SIZE * accelerator.num_processes * 3 + 3
    plain = DataLoader(TensorDataset(torch.arange(samples)), batch_size=BATCH_SIZE, shuffle=True)
    loader = accelerator.prepare_data_loader(plain, saved=False)
    epochs = []
    for _ in range(2):
        seen: list[int] = []
        for (batch,) in loader:
            seen += accelerator.gather_for_metrics(batch).tolist()
        epochs.append(seen)
    if any(sorted(seen) != list(range(samples)) for seen in epochs) or epochs[0] == epochs[1]:
        raise CheckFailed(
            f"an epoch of {samples} samples gave {len(epochs[0])}, {len(set(epochs[0]))} of them different",
            "Each sample must come once, in a different order each epoch",
            "Report this as a bug of paceline, with the output of `paceline env`",
        )
    return f"{samples} samples over {_ranks(accelerator)}: each once, in a different order each epoch"


def check_training(run: SmallTraining, accumulation: int) -> tuple[str, Trained]:
    """Train a few steps beside plain PyTorch on the whole global batch. Collective: every rank must call it."""
    accelerator = run.accelerator
    size, precision = accelerator.num_processes, accelerator.mixed_precision
    trained = train(run)
    wanted = train_in_plain_torch(accelerator.device, BATCH_SIZE * size * accumulation, precision)
    tolerance = _TOLERANCES[precision]
    pairs = [*zip(trained.losses, wanted.losses, strict=True), *zip(trained.norms, wanted.norms, strict=True)]
    worst = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)
    if not worst <= tolerance:
        raise CheckFailed(
            f"losses {_shown(trained.losses)} and gradient norms {_shown(trained.norms)}; plain PyTorch with the same "
            f"global batch gives {_shown(wanted.losses)} and {_shown(wanted.norms)}",
            f"They differ by {worst:.1e}, more than the {tolerance:g} that rounding explains in {precision}",
            "Check that all machines have the same versions (paceline env); else report this as a bug",
        )
    batch = f"{size} x {BATCH_SIZE} samples" if accumulation == 1 else f"{size} x {accumulation} x {BATCH_SIZE} samples"
    return f"{len(trained.losses)} steps of {batch} as in plain PyTorch, to {worst:.0e}", trained


def _shown(numbers: Sequence[float]) -> str:
    return "[" + ", ".join(f"{number:.5g}" for number in numbers) + "]"


def check_precision(run: SmallTraining, trained: Trained) -> str:
    """Check the dtype in which a layer computed."""
    precision = run.accelerator.mixed_precision
    wanted = _DTYPES.get(precision)
    kept = next(run.model.parameters()).dtype
    if wanted is not None and trained.dtype is not wanted:
        raise CheckFailed(
            f"a layer computed in {trained.dtype} under mixed_precision={precision}",
            f"It should be {wanted}",
            "Report this as a bug of paceline, with the output of `paceline env`",
        )
    return f"{precision}: layers compute in {_name(trained.dtype)}, weights are kept in {_name(kept)}"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def check_sharding(run: SmallTraining) -> str:
    """Count the parameters that this rank holds. Collective: every rank must call it."""
    size = run.accelerator.num_processes
    parameters = list(run.model.parameters())
    total = sum(p.numel() for p in parameters)
    local = sum(_local(parameter).numel() for parameter in parameters)
    counts = run.accelerator.gather(torch.tensor([local], device=run.accelerator.device)).tolist()
    replicas = sum(counts) / total
    # Only whole rows are sharded, so the ranks' parts differ in size.
    if local > total / size * 1.3 or not math.isclose(replicas, 1.0):
        raise CheckFailed(
            f"the ranks hold {counts} of {total} parameters",
            f"Under FSDP each of {size} ranks should hold its share, and together all of them once",
            "Check fsdp_sharding_strategy and parallelism_config in the configuration",
        )
    return f"each of {size} ranks holds {100 * max(counts) / total:.0f} % of {total:,} parameters, {_bytes(run)} in all"


def _bytes(run: SmallTraining) -> str:
    """Return the memory of this rank's weights and optimizer state, in words."""
    tensors = [t for state in run.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    tensors += list(run.model.parameters())
    size = sum(_local(tensor).nbytes for tensor in tensors)
    return f"{size / 1024:.0f} KiB of weights and optimizer"


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_save(run: SmallTraining, folder: Path) -> str:
    """Save, and write down what another layout must load. Collective: every rank must call it."""
    accelerator = run.accelerator
    accelerator.save_state(folder / "state", blocking=True)
    weights = checksums(accelerator.get_state_dict(run.model))
    # The loop was left early: only a loaded state continues it.
    accelerator.load_state(folder / "state")
    after = train(run, 2)
    if accelerator.is_main_process:
        expected = {
            "weights": weights,
            "losses": after.losses,
            "norms": after.norms,
            "precision": accelerator.mixed_precision,
        }
        (folder / "wanted.json").write_text(json.dumps(expected), encoding="utf-8")
    accelerator.wait_for_everyone()
    tensors = len(list(run.model.parameters()))
    return f"{tensors} tensors and their optimizer state, written by {_ranks(accelerator)}"


def check_load(accelerator: Accelerator, folder: Path, ranks: int, block_names: Sequence[str]) -> str:
    """Load what `ranks` ranks saved, and continue. Collective: every rank must call it."""
    wanted = json.loads((folder / "wanted.json").read_text(encoding="utf-8"))
    run = prepare(accelerator, ranks, 1, block_names)
    accelerator.load_state(folder / "state")
    found = checksums(accelerator.get_state_dict(run.model))
    wrong = [name for name, checksum in wanted["weights"].items() if found.get(name) != checksum]
    if wrong:
        raise CheckFailed(
            f"{len(wrong)} of {len(wanted['weights'])} tensors differ after loading, {wrong[0]} for example",
            "Loaded tensors must be bit-equal to the saved ones",
            "Check the disk (paceline checkpoint verify); else report this as a bug",
        )
    after = train(run, 2)
    pairs = [*zip(after.losses, wanted["losses"], strict=True), *zip(after.norms, wanted["norms"], strict=True)]
    worst = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)
    if not worst <= _TOLERANCES[wanted["precision"]]:
        raise CheckFailed(
            f"losses {_shown(after.losses)} after loading, {_shown(wanted['losses'])} without",
            "The optimizer or the loader continued from another state",
            "Report this as a bug of paceline, with the output of `paceline env`",
        )
    return f"{len(found)} tensors bit-equal on 1 process, and training continues with the same losses"
