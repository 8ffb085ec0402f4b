"""`paceline report`: writes one page about a run from its files."""

from __future__ import annotations

from pathlib import Path

import click

from paceline.cli.click_helpers import PathType
from paceline.cli.report.page import build_page
from paceline.cli.report.reading import read_run
from paceline.cli.report.series import Rates

__all__ = ["command"]

_HELP = """Write one HTML page about a run from the files in RUN_DIR.

RUN_DIR is the output_dir of a Trainer, or the project_dir or logging_dir of a script that called init_trackers. The
page shows loss, learning rate, gradient norm, throughput, memory and MFU against steps and time, the configuration
with the source of each value, and the environment. It is one file that needs no network.

MFU (model FLOPs utilisation) counts 6 operations per parameter and token, over the peak in the device's data sheet.
Where one of them is unknown, the page says so; give it with the flags below.

\b
    paceline report runs/a
    paceline report runs/a --output a.html --peak_tflops 989
"""


@click.command(name="report", help=_HELP)
@click.argument("run_dir", type=PathType(path_type=Path))
@click.option(
    "--output", type=PathType(dir_okay=False, path_type=Path), help="File to write; default: RUN_DIR/report.html."
)
@click.option(
    "--peak_tflops", "--peak-tflops", type=float, help="Peak of one device, in TFLOP/s (10^12 operations per second)."
)
@click.option("--flops_per_token", "--flops-per-token", type=float, help="Operations of a training step per token.")
def command(run_dir: Path, output: Path | None, peak_tflops: float | None, flops_per_token: float | None) -> None:
    """Write the page; `_HELP` is what users read."""
    run = read_run(run_dir)
    peak = None if peak_tflops is None else peak_tflops * 1e12
    page = output or run_dir / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(build_page(run, Rates.of(run, peak=peak, flops_per_token=flops_per_token)), encoding="utf-8")
    click.echo(f"wrote {page}: {len(run.entries)} log entries, {len(run.series)} series")
