"""`paceline report`: one page about a run, from the files that it left."""

from __future__ import annotations

from pathlib import Path

import click

from paceline.cli.paths import PathType
from paceline.cli.report.page import build_page
from paceline.cli.report.reading import read_run
from paceline.cli.report.series import Rates

__all__ = ["command"]

_HELP = """Write one HTML page about the run that left its files in RUN_DIR.

RUN_DIR is the output_dir of a Trainer, or the project_dir or logging_dir of a script that called init_trackers. The
page shows loss, learning rate, gradient norm, throughput, memory and MFU against steps and time, the configuration
with the origin of each value, and the environment. It needs no network, and can be sent as it is.

MFU takes 6 operations for each parameter and token, and the device's peak from its vendor's data sheet. Where one of
them is not known, the page says so; give it here.

\b
    paceline report runs/a
    paceline report runs/a --output a.html --peak_tflops 989
"""


@click.command(name="report", help=_HELP)
@click.argument("run_dir", type=PathType(path_type=Path))
@click.option("--output", type=PathType(dir_okay=False, path_type=Path), help="The page; RUN_DIR/report.html if not.")
@click.option("--peak_tflops", "--peak-tflops", type=float, help="Most that one device reaches, in 10^12 operations/s.")
@click.option("--flops_per_token", "--flops-per-token", type=float, help="Operations of a training step for a token.")
def command(run_dir: Path, output: Path | None, peak_tflops: float | None, flops_per_token: float | None) -> None:
    """Write the page; the text above is what people read."""
    run = read_run(run_dir)
    peak = None if peak_tflops is None else peak_tflops * 1e12
    place = output or run_dir / "report.html"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(build_page(run, Rates.of(run, peak=peak, flops_per_token=flops_per_token)), encoding="utf-8")
    click.echo(f"wrote {place}: {len(run.entries)} log entries, {len(run.series)} series")
