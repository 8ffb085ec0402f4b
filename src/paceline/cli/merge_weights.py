"""`paceline merge-weights`: Accelerate's name of `paceline checkpoint export`."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from paceline.cli.checkpoint import export
from paceline.cli.click_helpers import PathType, examples
from paceline.errors import UsageError


@click.command(
    name="merge-weights",
    epilog=examples("paceline merge-weights runs/a/pytorch_model_fsdp_0 model"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("checkpoint", type=PathType(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=PathType(file_okay=False, path_type=Path), default=Path())
@click.option(
    "--remove_checkpoint_dir",
    "--remove-checkpoint-dir",
    is_flag=True,
    help="Remove CHECKPOINT after its weights are written.",
)
@click.option("--unsafe_serialization", "--unsafe-serialization", is_flag=True, hidden=True)
def command(checkpoint: Path, out: Path, remove_checkpoint_dir: bool, unsafe_serialization: bool) -> None:
    """Merge a sharded checkpoint into safetensors weights in OUT: short for `paceline checkpoint export`.

    OUT defaults to the current folder. CHECKPOINT is for example the folder `pytorch_model_fsdp_0` of an Accelerate
    run under FSDP, or any folder that `paceline checkpoint inspect` can read.
    """
    if unsafe_serialization:
        raise UsageError(
            "--unsafe_serialization was given", "Pickled weights run code when they are loaded", "Leave it out"
        )
    if remove_checkpoint_dir and out.resolve().is_relative_to(checkpoint.resolve()):
        raise UsageError(
            f"--remove_checkpoint_dir would remove {out}", "It lies within the checkpoint", "Name another OUT"
        )
    export(checkpoint, out)
    if remove_checkpoint_dir:
        # Of a link, remove the checkpoint it points to, then the link.
        shutil.rmtree(checkpoint.resolve())
        if checkpoint.is_symlink():
            checkpoint.unlink()
        click.echo(f"removed {checkpoint}")
