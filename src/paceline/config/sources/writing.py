"""Writes a configuration as YAML, each key under a comment."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from paceline.config.schema.names import all_settings, sections

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["as_yaml", "replace_file", "yaml_value"]


def as_yaml(values: Mapping[str, object], header: Sequence[str] = ()) -> str:
    """Write values as a configuration file, each under a comment with its description.

    Args:
        values: Dotted key to value; sections come after the top level, keys in the order of the schema.
        header: Lines of comment for the top.

    Returns:
        The text of the file.
    """
    lines = [f"# {line}".rstrip() for line in header]
    for section in ("", *sections()):
        body = list(_section(values, section))
        if body and section:
            lines += ["", f"{section}:"]
        elif body and lines:
            lines.append("")
        lines += body
    return "\n".join(lines) + "\n"


def _section(values: Mapping[str, object], section: str) -> Iterator[str]:
    indent = "  " if section else ""
    for dotted, setting in all_settings().items():
        if dotted.rpartition(".")[0] == section and dotted in values:
            if setting.description:
                yield f"{indent}# {setting.description}"
            yield f"{indent}{setting.key}: {yaml_value(values[dotted])}"


def yaml_value(value: object) -> str:
    """Write one value on one line of YAML."""
    plain = value
    if isinstance(value, tuple):
        plain = list(value)
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()


def replace_file(path: Path, text: str) -> Path | None:
    """Write a file atomically; keep an old one as FILE.bak and return that path."""
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = None
    if path.exists():
        kept = path.with_name(f"{path.name}.bak")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a configuration keeps its mode, and is public by default.
        Path(name).chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        if kept is not None:
            shutil.copy2(path, kept)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    return kept
