"""The reference page of all settings, made from the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from paceline.config.schema.base import Section, settings_of
from paceline.config.schema.fsdp import FsdpVersion1
from paceline.config.schema.names import all_settings, options, sections
from paceline.config.schema.run import RunConfig
from paceline.config.sources.layers import PREFIX, RESERVED
from paceline.config.sources.writing import yaml_value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.config.schema.base import Setting

__all__ = ["reference_page"]

_HEAD: Final = """\
# Configuration

<!-- Written from the schema: RENEW_SNAPSHOTS=1 python -m pytest tests/docs/test_configuration.py -->

A setting can be given as a flag of `paceline launch`, as a variable of the environment, or as a key of a YAML or
JSON file. A flag beats the environment, which beats the file, which beats what is detected, which beats the
default. A name or value that nobody understands, and a key that the chosen strategy does not read, is an error
before any process starts.

```bash
paceline config                      # asks what matters on this machine, and writes the file
paceline config show --explain       # every value in force, its source, and what it decides
paceline config check a.yaml b.yaml  # everything that is wrong with files
paceline config check a.yaml --model my_package.models:build  # block classes too, against the model
paceline config convert old.yaml     # a file of Accelerate or DeepSpeed, or a line of torchrun
paceline config schema               # JSON Schema, from which editors complete and check
```

The file is the one of `--config_file`, else the one that PACELINE_CONFIG_FILE names, else `default_config.yaml` in
PACELINE_HOME, else in `~/.cache/paceline` (XDG_CACHE_HOME counts), else the one that Accelerate's own command wrote,
which is then said. Flags may be written with `-` or `_`. In a section, a key may be written without its prefix.

Editors with the YAML language server complete, explain and check a file that begins with
`# yaml-language-server: $schema=paceline.schema.json`, after `paceline config schema > paceline.schema.json`.

To let a shell complete commands, flags and their choices, append the output of `paceline completion bash` to
`~/.bashrc`, that of `paceline completion zsh` to `~/.zshrc`, or write that of `paceline completion fish` to
`~/.config/fish/completions/paceline.fish`.
"""
_TABLE: Final = "| Key | What it decides | Value | Default | Flag | Variable |\n|---|---|---|---|---|---|"


def reference_page() -> str:
    """Write the page in Markdown."""
    parts = [_HEAD, "## Top level\n", "\n".join(_table(RunConfig, "")), "\n".join(_switches())]
    for setting in settings_of(RunConfig):
        if setting.field in sections():
            model = sections()[setting.field][0]
            parts += [f"\n## `{setting.key}`\n\n{setting.description}\n", "\n".join(_table(model, setting.field))]
    parts += ["\n## Only in files of FSDP version 1\n", "They are translated, with a line for each.\n"]
    parts.append("\n".join(f"- `{setting.key}`: {setting.description}" for setting in settings_of(FsdpVersion1)))
    names = ", ".join(f"`{name}`" for name in sorted(RESERVED - {"PACELINE_CONFIG"}))
    parts += ["\n## Variables that are no settings\n", f"{names}. The launcher hands ranks `PACELINE_CONFIG`."]
    return "\n".join(parts) + "\n"


def _table(model: type[Section], section: str) -> Iterator[str]:
    yield _TABLE
    for setting in settings_of(model):
        if section or setting.field not in sections():
            yield f"| {' | '.join(_cells(setting))} |"


def _cells(setting: Setting) -> tuple[str, ...]:
    flag = f"`--{setting.flag}`" if setting.has_flag else ""
    variable = f"`{PREFIX}{setting.flag.upper()}`" if setting.has_flag else ""
    allowed = setting.shape.allowed.removeprefix("one of ")
    return f"`{setting.key}`", _meaning(setting), allowed, f"`{_default(setting.default)}`", flag, variable


def _default(value: Any) -> str:
    return "none" if value is None else yaml_value(value)


def _meaning(setting: Setting) -> str:
    labels = "; ".join(f"`{name}`: {text}" for name, text in setting.labels)
    old = ", ".join(f"`{name}`" for name in setting.aliases)
    return f"{setting.description}{f' {labels}.' if labels else ''}{f' Also {old}.' if old else ''}"


def _switches() -> Iterator[str]:
    """The flags that stand for a value of another setting."""
    keys = {setting.flag for setting in all_settings().values()}
    yield "\nFlags that are short for one of these:\n"
    for option in options():
        if option.flag not in keys:
            yield f"- `--{option.flag}`: {option.description}"
