"""`paceline env`: shows what a bug report needs."""

from __future__ import annotations

import json
import os

import click

from paceline.accelerator.environment_report import environment_report
from paceline.cli.click_helpers import examples


@click.command(
    name="env",
    epilog=examples("paceline env", "paceline env --json > machine.json"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(as_json: bool) -> None:
    """Show versions, devices and the configuration file, ready to paste into a bug report."""
    report = environment_report(os.environ)
    click.echo(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text())
