"""`paceline checkpoint`: lists, inspects, verifies, exports and converts checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.click_helpers import DTYPES, PathType, examples
from paceline.errors import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from paceline.checkpoint import CatalogEntry, Checkpoint
    from paceline.checkpoint.foreign import PortableState
    from paceline.checkpoint.portable_state import PortableOptimizer

_HELP = """List, inspect and verify checkpoints; export their weights; convert them to other formats.

\b
    paceline checkpoint list runs/a
    paceline checkpoint inspect runs/a/checkpoints/checkpoint_3 --tensors
    paceline checkpoint verify runs/a/checkpoints/*
    paceline checkpoint export runs/a/checkpoints/checkpoint_3 weights --dtype bf16
    paceline checkpoint convert old_accelerate_run converted --to paceline

Folders of Accelerate, of the transformers Trainer, of DeepSpeed (all ZeRO stages and the universal layout) and of
torch.distributed.checkpoint are read as well as paceline's own. No code in them is run: a pickled file that names
anything but tensors and plain values is refused.
"""
_FOLDER = PathType(exists=True, file_okay=False, path_type=Path)


@click.group(name="checkpoint", help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Group the commands; `_HELP` is what users read."""


# list


@command.command(
    name="list",
    short_help="Show checkpoints, newest first, and whether they are complete.",
    epilog=examples(
        "paceline checkpoint list runs/a",
        "paceline checkpoint list runs/a --json",
    ),
)
@click.argument("folder", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_command(folder: Path, as_json: bool) -> None:
    """Show the checkpoints under FOLDER, newest first: a project's folder, or its `checkpoints` folder.

    A checkpoint is complete when it has a manifest and every file has the size in the manifest. `load_state()` loads
    the newest complete one. `paceline checkpoint verify` checks the contents of the files.
    """
    rows = list(_rows(folder))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo(f"There is no checkpoint in {folder}{_inspect_hint(folder)}.")
        return
    columns = ["name", "format", "step", "epoch", "samples of the epoch", "size", "saved by", "created", "state"]
    _print_table([row | {"samples of the epoch": row.get("samples", "")} for row in rows], columns)
    for row in rows:
        if row["problem"]:
            click.echo(f"{row['name']}: {row['problem']}")


def _inspect_hint(folder: Path) -> str:
    from paceline.checkpoint.foreign import detect_format
    from paceline.checkpoint.format.manifest import MANIFEST

    is_one = (folder / MANIFEST).exists() or detect_format(folder) is not None
    return f"; it is a checkpoint itself: paceline checkpoint inspect {folder}" if is_one else ""


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    from paceline.checkpoint import find_checkpoints
    from paceline.checkpoint.foreign import detect_format

    checkpoints = find_checkpoints(folder)
    known = {found.folder for found in checkpoints}
    yield from (_row(found, folder) for found in checkpoints)
    for root in filter(Path.is_dir, (folder, folder / "checkpoints")):
        for path in sorted(root.iterdir(), key=_newest_first):
            kind = None
            if path not in known and path.is_dir():
                kind = detect_format(path)
            if kind is not None:
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                name = str(path.relative_to(folder))
                yield {"name": name, "format": kind, "size": size, "state": "", "problem": ""}


def _newest_first(path: Path) -> tuple[bool, int, str]:
    """Sort numbered folders first, the highest number first; then the others by name."""
    from paceline.checkpoint.folder import number_of

    number = number_of(path)
    return number is None, -(number or 0), path.name


def _row(found: CatalogEntry, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": str(found.folder.relative_to(folder)), "format": "paceline"}
    if found.checkpoint is None:
        return row | {"state": "incomplete", "problem": found.problem}
    manifest = found.checkpoint.manifest
    return row | {
        "step": manifest.step, "epoch": manifest.epoch, "samples": manifest.samples, "size": _size_of(found.checkpoint),
        "saved by": f"{counted(manifest.world_size, 'rank')}, {manifest.strategy}",
        "created": manifest.created[:19].replace("T", " "), "state": "complete", "problem": "",
    }  # fmt: skip


def _size_of(checkpoint: Checkpoint) -> int:
    return sum(record.size for record in checkpoint.manifest.files.values())


# inspect


@command.command(
    name="inspect",
    short_help="Show what one checkpoint holds.",
    epilog=examples(
        "paceline checkpoint inspect runs/a/checkpoints/checkpoint_3",
        "paceline checkpoint inspect --tensors pytorch_model_fsdp_0",
    ),
)
@click.argument("checkpoint", type=_FOLDER)
@click.option("--tensors", is_flag=True, help="List every tensor with its shape and dtype.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def inspect_command(checkpoint: Path, tensors: bool, as_json: bool) -> None:
    """Show what one checkpoint holds, of paceline or another library: step, weights, optimizer, size."""
    from paceline.checkpoint.foreign import open_any

    state = open_any(checkpoint)
    summary = _summary(state)
    rows = list(_tensor_rows(state))
    if as_json:
        click.echo(json.dumps(summary | ({"tensors": rows} if tensors else {}), indent=2))
        return
    width = max(map(len, summary))
    for name, value in summary.items():
        for index, line in enumerate(value if isinstance(value, list) else [value]):
            click.echo(f"{name if not index else '':<{width}}  {line}")
    if tensors:
        click.echo()
        _print_table(rows, ["tensor", "shape", "dtype", "size"])


def _summary(state: PortableState) -> dict[str, Any]:
    summary: dict[str, Any] = {"folder": str(state.folder), "format": state.kind, "step": state.step}
    if state.kind == "paceline":
        summary |= _manifest_summary(state.folder)
    slots = [state.weights.slot(name) for name in state.weights]
    count = sum(_numel(slot.shape) for slot in slots)
    dtypes = sorted({str(slot.dtype).removeprefix("torch.") for slot in slots})
    summary["weights"] = f"{count:,} elements in {len(slots)} tensors, {', '.join(dtypes) or 'none'}"
    for index, optimizer in enumerate(state.optimizers):
        summary[f"optimizer {index}" if index else "optimizer"] = _describe_optimizer(optimizer)
    others = {
        "scheduler": len(state.schedulers),
        "custom object": len(state.custom),
        "loss scaler": int(state.scaler is not None),
        "set of generators": len(state.generators),
    }
    summary["also"] = ", ".join(f"{name}: {count}" for name, count in others.items() if count) or "nothing"
    if state.notes:
        summary["notes"] = list(state.notes)
    return summary


def _describe_optimizer(optimizer: PortableOptimizer) -> str:
    kinds = sorted({slot for tensors in optimizer.slots.values() for slot in tensors})
    state = ", ".join(kinds) or "no tensors"
    return f"{state} of {len(optimizer.slots)} parameters in {len(optimizer.groups)} groups"


def _manifest_summary(folder: Path) -> dict[str, Any]:
    from paceline.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    manifest = checkpoint.manifest
    return {
        "epoch": manifest.epoch,
        "samples": f"{manifest.samples:,} of the epoch",
        "saved by": f"{counted(manifest.world_size, 'rank')}, {manifest.strategy}",
        "precision": manifest.mixed_precision,
        "created": manifest.created,
        "paceline": manifest.paceline,
        "torch": manifest.torch,
        "size": f"{_size(_size_of(checkpoint))} in {len(manifest.files)} files",
    }


def _tensor_rows(state: PortableState) -> Iterator[dict[str, Any]]:
    from paceline.checkpoint import numbered

    families = [("model", state.weights)]
    for index, optimizer in enumerate(state.optimizers):
        family = numbered("optimizer", index)
        families += [(f"{family}/{name}", tensors) for name, tensors in optimizer.slots.items()]
    for family, tensors in families:
        for name in tensors:
            slot = tensors.slot(name)
            size = _numel(slot.shape) * slot.dtype.itemsize
            dtype = str(slot.dtype).removeprefix("torch.")
            yield {"tensor": f"{family}/{name}", "shape": list(slot.shape), "dtype": dtype, "size": size}


def _numel(shape: Sequence[int]) -> int:
    from math import prod

    return prod(shape)


# verify


@command.command(
    name="verify",
    short_help="Read every byte of checkpoints and compare it with their checksums.",
    epilog=examples(
        "paceline checkpoint verify runs/a/checkpoints/*",
    ),
)
@click.argument("checkpoints", nargs=-1, required=True, type=_FOLDER)
def verify_command(checkpoints: tuple[Path, ...]) -> None:
    """Read every byte of each checkpoint and compare it with the checksums.

    Folders of other libraries have no checksums: every tensor in them is read. The exit code is 0 if all checkpoints
    are complete and undamaged, else 1.
    """
    from paceline.checkpoint.catalog import what_is_wrong
    from paceline.errors import PacelineError

    wrong = 0
    for folder in checkpoints:
        try:
            click.echo(f"complete  {folder}: {_verify(folder)}")
        except PacelineError as error:
            wrong += 1
            click.echo(f"DAMAGED   {folder}: {what_is_wrong(error, folder)}")
    sys.exit(1 if wrong else 0)


def _verify(folder: Path) -> str:
    from paceline.checkpoint import open_checkpoint
    from paceline.checkpoint.foreign import detect_format, open_foreign

    if detect_format(folder) is None:
        checkpoint = open_checkpoint(folder)
        with _progress(f"verify {folder.name}", _size_of(checkpoint)) as advance:
            checkpoint.verify(advance)
        return f"{_size(_size_of(checkpoint))} in {len(checkpoint.manifest.files)} files"
    state = open_foreign(folder)
    rows = list(_tensor_rows(state))
    with _progress(f"read {folder.name}", sum(row["size"] for row in rows)) as advance:
        for tensors in (state.weights, *(slots for o in state.optimizers for slots in o.slots.values())):
            for name in tensors:
                value = tensors[name]
                advance(value.numel() * value.element_size())
    return f"{len(rows)} tensors could be read; folders of {state.kind} have no checksums"


# export


@command.command(
    name="export",
    short_help="Write the weights as safetensors.",
    epilog=examples(
        "paceline checkpoint export runs/a/checkpoints/checkpoint_3 model",
        "paceline checkpoint export --dtype bf16 --max_shard_size 5GB global_step100 model",
    ),
)
@click.argument("checkpoint", type=_FOLDER)
@click.argument("out", type=PathType(file_okay=False, path_type=Path))
@click.option(
    "--max_shard_size",
    "--max-shard-size",
    default="10GB",
    show_default=True,
    help="Maximum size of a file, such as 5GB or 500MiB.",
)
@click.option("--dtype", type=click.Choice([*DTYPES]), help="Convert floating-point weights to this dtype.")
@click.option(
    "--model", "model_index", default=0, show_default=True, help="Index of the model, if several were prepared."
)
def export_command(checkpoint: Path, out: Path, max_shard_size: str, dtype: str | None, model_index: int) -> None:
    """Write the weights of a checkpoint into OUT as safetensors, as `from_pretrained` reads them.

    CHECKPOINT can be of paceline, Accelerate, DeepSpeed or torch.distributed.checkpoint. One tensor at a time is in
    memory. The model's `config.json` is copied if there is one.
    """
    export(checkpoint, out, max_shard_size=max_shard_size, dtype=dtype, model_index=model_index)


def export(
    source: Path, out: Path, *, max_shard_size: str = "10GB", dtype: str | None = None, model_index: int = 0
) -> None:
    """Write the weights of a checkpoint as safetensors; see `paceline checkpoint export --help`."""
    import shutil

    import torch

    from paceline.checkpoint import parse_size
    from paceline.checkpoint.foreign import open_any
    from paceline.checkpoint.io.weights import stream_weights

    limit = parse_size(max_shard_size)
    _refuse_state(out)
    state = open_any(source)
    tensors = state.model(model_index)
    total = sum(_numel(tensors.slot(name).shape) * tensors.slot(name).dtype.itemsize for name in tensors)
    wanted = None
    if dtype is not None:
        wanted = getattr(torch, DTYPES[dtype])
    with _progress(f"export {source.name}", total) as advance:
        files = stream_weights(tensors, out, max_file_bytes=limit, dtype=wanted, progress=advance)
    if (source / "config.json").is_file():
        shutil.copyfile(source / "config.json", out / "config.json")
    size = sum(path.stat().st_size for path in files)
    click.echo(f"{counted(len(tensors), 'tensor')}, {_size(size)} in {counted(len(files), 'file')} in {out}")


def _refuse_state(out: Path) -> None:
    """Refuse to write into a checkpoint, which would no longer be complete."""
    from paceline.checkpoint.foreign import detect_format
    from paceline.checkpoint.format.manifest import MANIFEST
    from paceline.errors import UsageError

    if (out / MANIFEST).exists() or detect_format(out) not in (None, "weights"):
        raise UsageError(f"{out} holds a checkpoint", "Its weights would be overwritten", "Name another folder")


# convert


@command.command(
    name="convert",
    short_help="Convert a checkpoint to the format of another library.",
    epilog=examples(
        "paceline checkpoint convert --to deepspeed runs/a/checkpoints/checkpoint_3 universal",
        "paceline checkpoint convert --to paceline global_step100 converted",
    ),
)
@click.argument("source", type=_FOLDER)
@click.argument("out", type=PathType(file_okay=False, path_type=Path))
@click.option("--to", "to", required=True, type=click.Choice(["paceline", "accelerate", "fsdp", "deepspeed"]))
@click.option(
    "--parameters",
    type=PathType(exists=True, dir_okay=False, path_type=Path),
    help="File with the optimizer's parameter names, one per line, group by group; for formats that number them.",
)
def convert_command(source: Path, out: Path, to: str, parameters: Path | None) -> None:
    """Convert a checkpoint to the format of another library, on the CPU, with one tensor at a time in memory.

    \b
    paceline    what save_state writes
    accelerate  model.safetensors and optimizer.bin, which plain torch and Accelerate under DDP read
    fsdp        pytorch_model_fsdp_0 and optimizer_0, which Accelerate under FSDP and torch's DCP read
    deepspeed   the universal layout, read with {"checkpoint": {"load_universal": true}} at ZeRO stages 1, 2 and 3

    SOURCE can be any of these, DeepSpeed's own folders of every stage, and checkpoints of the transformers Trainer.
    Accelerate's optimizer.bin numbers its parameters in the order of the optimizer's groups: give their names with
    --parameters, or load the folder in the script itself with `accelerator.load_state`, which knows them.
    """  # noqa: D301
    from paceline.checkpoint.foreign import open_any
    from paceline.checkpoint.foreign.writers import WRITERS, total_bytes
    from paceline.errors import UsageError

    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty", "Old and new files would be mixed", "Name another folder")
    names = None
    if parameters is not None:
        names = [parameters.read_text(encoding="utf-8").split()]
    state = open_any(source, names)
    with _progress(f"convert {source.name}", total_bytes(state)) as advance:
        left = WRITERS[to](state, out, advance)
    if state.has_loader_positions:
        left = [*left, "skipped: loader positions; a run that loads the result starts a new epoch"]
    contents = f"{counted(len(state.weights), 'weight')}, {counted(len(state.optimizers), 'optimizer')}"
    click.echo(
        f"{state.kind} to {to}: {contents}, "
        f"step {state.step}, {_size(sum(path.stat().st_size for path in out.rglob('*') if path.is_file()))} in {out}"
    )
    for line in (*state.notes, *left):
        click.echo(f"note: {line}")


# Output


def _print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    numbers = {"step", "epoch", "samples of the epoch", "size"}
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(column, row.get(column, "")) for column in columns))
    console.print(table)


def _cell(column: str, value: Any) -> str:
    if column == "size" and isinstance(value, int):
        return _size(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return f"{value:,}"


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


def _progress(what: str, total: int) -> Any:
    """Show a progress bar; the yielded function takes the bytes done since the last call."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    @contextmanager
    def shown() -> Iterator[Callable[[int], None]]:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task(what, total=total)
            yield lambda count: bars.advance(task, count)

    return shown()
