"""The reference page of all settings, written from the schema."""

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

A setting can be given as a flag of `paceline launch`, as an environment variable, or as a key of a YAML or JSON
file. A flag overrides the environment, which overrides the file, which overrides what is detected, which overrides
the default. An unknown name, a wrong value and a key that the chosen strategy does not read are errors, all reported
before any process starts.

```bash
paceline config                      # answer a few questions, and write the file
paceline config show --explain       # every value, its source, and what it does
paceline config check a.yaml b.yaml  # report all problems of files
paceline config check a.yaml --model my_package.models:build  # also check block classes against the model
paceline config convert old.yaml     # convert a file of Accelerate or DeepSpeed, or a torchrun command line
paceline config schema               # print the JSON Schema, with which editors complete and check the file
```

The file is the one named by `--config_file`, else by PACELINE_CONFIG_FILE, else `default_config.yaml` in PACELINE_HOME,
else in `~/.cache/paceline` (or under XDG_CACHE_HOME), else the file that Accelerate's own command wrote; a note tells
you when that one is read. Flags can be written with `-` or `_`. In a section, keys can be written without the prefix.

After `paceline config schema > paceline.schema.json`, editors with the YAML language server complete, explain and check
a file that begins with `# yaml-language-server: $schema=paceline.schema.json`.

For shell completion of commands, flags and choices, append the output of `paceline completion bash` to `~/.bashrc`,
that of `paceline completion zsh` to `~/.zshrc`, or write that of `paceline completion fish` to
`~/.config/fish/completions/paceline.fish`.
"""
_TABLE: Final = "| Key | What it does | Value | Default | Flag | Variable |\n|---|---|---|---|---|---|"


def reference_page() -> str:
    """Write the page in Markdown."""
    parts = [_HEAD, "## Top level\n", "\n".join(_table(RunConfig, "")), "\n".join(_switches())]
    for setting in settings_of(RunConfig):
        if setting.field in sections():
            model = sections()[setting.field][0]
            parts += [f"\n## `{setting.key}`\n\n{setting.description}\n", "\n".join(_table(model, setting.field))]
    parts += ["\n## Only in files of FSDP version 1\n", "They are translated, with a note for each.\n"]
    parts.append("\n".join(f"- `{setting.key}`: {setting.description}" for setting in settings_of(FsdpVersion1)))
    names = ", ".join(f"`{name}`" for name in sorted(RESERVED - {"PACELINE_CONFIG"}))
    parts += ["\n## Variables that are not settings\n", f"{names}. The launcher passes `PACELINE_CONFIG` to the ranks."]
    return "\n".join(parts) + "\n"


def _table(model: type[Section], section: str) -> Iterator[str]:
    yield _TABLE
    for setting in settings_of(model):
        if section or setting.field not in sections():
            yield f"| {' | '.join(_cells(setting))} |"


def _cells(setting: Setting) -> tuple[str, ...]:
    flag = f"`--{setting.flag}`" if setting.has_flag else ""
    variable = ""
    if setting.has_flag:
        variable = f"`{PREFIX}{setting.flag.upper()}`"
    allowed = setting.shape.allowed.removeprefix("one of ")
    return f"`{setting.key}`", _meaning(setting), allowed, f"`{_default(setting.default)}`", flag, variable


def _default(value: Any) -> str:
    if value is None:
        return "none"
    return yaml_value(value)


def _meaning(setting: Setting) -> str:
    labels = "; ".join(f"`{name}`: {text}" for name, text in setting.labels)
    old = ", ".join(f"`{name}`" for name in setting.aliases)
    return f"{setting.description}{f' {labels}.' if labels else ''}{f' Also {old}.' if old else ''}"


def _switches() -> Iterator[str]:
    """List the flags that set a value of another setting."""
    keys = {setting.flag for setting in all_settings().values()}
    yield "\nFlags that set one of these:\n"
    for option in options():
        if option.flag not in keys:
            yield f"- `--{option.flag}`: {option.description}"
