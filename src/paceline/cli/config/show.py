"""`paceline config show`: every value, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.click_helpers import PathType
from paceline.cli.schema_flags import SETTINGS, SchemaCommand, given_flags, schema_options
from paceline.cli.sources import resolve_sources
from paceline.config.deepspeed_file.settings import FILE_KEY
from paceline.config.deepspeed_file.values import left_open, printable_settings
from paceline.config.packages import missing_packages
from paceline.config.schema.names import all_settings, sections
from paceline.config.sources.writing import yaml_value

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.config import Origin, Resolved

    Row = tuple[str, Any, Origin]

_READ_WHEN = {
    "fsdp_config": "is read under strategy fsdp, also where auto chooses it",
    "deepspeed_config": "is read under strategy deepspeed",
    "parallelism_config": "is read under strategy fsdp, also where auto chooses it",
    "fp8_config": "is read under mixed_precision fp8",
    "mpirun_config": "is read where mpirun starts the ranks",
    "megatron_lm_config": "is never read: Megatron-LM is not supported",
}
"""When a run reads the sections that have no values unless something sets them or the strategy needs them."""

_HELP = """Show the values that `paceline launch` with the same flags would use, and the source of each.

The source of a value is a flag, an environment variable, a line of a file, detection on this machine, or the
default. Without --explain only values that are set or detected are listed. Under DeepSpeed its own JSON follows, as
far as the configuration determines it.

\b
    paceline config show
    paceline config show --explain
    paceline config show --json --use_deepspeed --zero_stage 3 --mixed_precision bf16
"""


@click.command(name="show", cls=SchemaCommand, help=_HELP, context_settings=SETTINGS, params=schema_options())
@click.option("--config_file", type=PathType(path_type=Path), help="YAML or JSON file to read.")
@click.option("--explain", is_flag=True, help="List every value, also defaults, with what it does.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every value, its source, and DeepSpeed's JSON.")
def command(config_file: Path | None, explain: bool, as_json: bool, **values: Any) -> None:
    """Show the configuration; `_HELP` is what users read."""
    resolved = resolve_sources(given_flags(values), config_file, starts_ranks=False)
    if as_json:
        click.echo(json.dumps(_document(resolved), indent=2, default=str))
        return
    missing = map(str, missing_packages(resolved.config, resolved.origins))
    for note in (*resolved.notes, *missing):
        click.echo(f"paceline: {note}", err=True)
    rows = _rows(resolved)
    set_rows = [row for row in rows if row[2].kind != "default"]
    click.echo("\n".join(_table(rows if explain else set_rows, explain)))
    if explain:
        click.echo(_sections_left_out(resolved))
    else:
        click.echo(f"{len(rows) - len(set_rows)} more values have their defaults; --explain lists them.")
    _show_deepspeed(resolved)


def _rows(resolved: Resolved) -> list[Row]:
    """Return all values; DeepSpeed's own JSON is shown separately."""
    return [
        (key, "(below)" if key == FILE_KEY and isinstance(value, dict) else value, origin)
        for key, value, origin in resolved.explain()
    ]


def _table(rows: Iterable[Row], explain: bool) -> list[str]:
    cells = [(key, yaml_value(value), origin.where) for key, value, origin in rows]
    if not cells:
        return ["Every value has its default."]
    widths = [max(len(row[column]) for row in cells) for column in (0, 1)]
    lines = []
    for key, value, where in cells:
        lines.append(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {where}")
        if explain:
            lines.append(f"    {all_settings()[key].description}")
    return lines


def _sections_left_out(resolved: Resolved) -> str:
    """Name the sections of which nothing is listed, and say when a run reads them."""
    listed = {key.partition(".")[0] for key, _, _ in resolved.explain()}
    left_out = [f"{name} {_READ_WHEN[name]}" for name in sections() if name not in listed]
    return f"Sections that nothing sets are not listed: {'; '.join(left_out)}."


def _show_deepspeed(resolved: Resolved) -> None:
    settings = _deepspeed(resolved)
    if settings is None:
        return
    click.echo("\nDeepSpeed's own configuration, as far as it is known before the run:")
    click.echo(json.dumps(settings, indent=2))
    filled = list(left_open(settings))
    if filled:
        click.echo('\nThe run fills what is "auto":')
    for path, source in filled:
        click.echo(f"  {path}: {source or 'no value for this one, so a run refuses it; write a value'}")


def _deepspeed(resolved: Resolved) -> dict[str, Any] | None:
    plugin = resolved.config.deepspeed_config
    if resolved.config.strategy != "deepspeed" or plugin is None:
        return None
    return printable_settings(plugin, resolved.config)


def _document(resolved: Resolved) -> dict[str, Any]:
    document: dict[str, Any] = {
        "values": {
            key: {"value": value, "origin": {"kind": origin.kind, "where": origin.where}}
            for key, value, origin in resolved.explain()
        },
        "notes": list(resolved.notes),
    }
    settings = _deepspeed(resolved)
    if settings is not None:
        document["deepspeed"] = {"settings": settings, "filled_by_the_run": dict(left_open(settings))}
    return document
