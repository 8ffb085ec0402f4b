"""`paceline merge-weights`: Accelerate's name for `paceline checkpoint export`."""

from __future__ import annotations

from pathlib import Path

import click

from paceline.cli.checkpoint import export
from paceline.cli.examples import examples


@click.command(
    name="merge-weights",
    epilog=examples("paceline merge-weights runs/a/pytorch_model_fsdp_0 model"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def command(checkpoint: Path, out: Path) -> None:
    """Merge a sharded checkpoint into safetensors weights in OUT: short for `paceline checkpoint export`.

    CHECKPOINT is for example the folder `pytorch_model_fsdp_0` of an Accelerate run under FSDP, or any folder that
    `paceline checkpoint inspect` can read.
    """
    export(checkpoint, out)
