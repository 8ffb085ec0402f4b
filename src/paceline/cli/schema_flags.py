"""Flags made from the configuration's one schema, for every command that takes a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from paceline.cli.other_launchers import instead_of
from paceline.config import options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config import Option

__all__ = ["SETTINGS", "SchemaCommand", "complete_files", "given_flags", "schema_options"]

_OPTIONAL_VALUES = {
    "BOOL": ({"true", "false", "yes", "no", "on", "off", "1", "0"}, "true"),
    "STREAMS": ({"0", "1", "2", "3"}, "3"),
}
"""Metavar of a flag whose value may be left out, to the values that it takes, and to what stands for none."""
_PREFIX = "flag_"

_TITLES = {
    "": "What runs where",
    "ddp_config": "DDP",
    "fsdp_config": "FSDP",
    "deepspeed_config": "DeepSpeed",
    "parallelism_config": "Mesh",
    "fp8_config": "fp8",
    "dynamo_config": "torch.compile",
    "mpirun_config": "MPI",
    "megatron_lm_config": "Megatron-LM",
}


def _underscored(name: str) -> str:
    return name.replace("-", "_") if not name.startswith("-") else "--" + name.lstrip("-").replace("-", "_")


def _normalize(name: str) -> str:
    return name.replace("-", "_")


SETTINGS = {
    "token_normalize_func": _normalize,
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
}
"""How a command with such flags is set up: they may be written with - or _."""


class SchemaCommand(click.Command):
    """Shows flags by topic, takes true/false flags with a value or without one, and knows other launchers' flags."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give every flag its value before click reads the line; say what stands for a flag of another launcher."""
        try:
            return super().parse_args(ctx, list(self._with_values(ctx, args)))
        except click.NoSuchOption as error:
            instead = instead_of(error.option_name)
            if instead is None:
                raise
            raise click.UsageError(f"There is no {error.option_name} here: {instead}.", ctx) from None

    def _with_values(self, ctx: click.Context, args: list[str]) -> Iterator[str]:
        """Write out the value of every flag that may stand without one."""
        known = {
            name: param
            for param in self.get_params(ctx)
            if isinstance(param, click.Option)
            for name in (*param.opts, *param.secondary_opts)
        }
        rest = list(args)
        while rest:
            token = rest.pop(0)
            option = known.get(token) or known.get(_underscored(token))
            if option is None:
                yield token
                if not token.startswith("-") or token == "--":
                    break
                continue
            takes_value = not option.is_flag and not option.count
            yield token
            if option.metavar in _OPTIONAL_VALUES:
                words, silent = _OPTIONAL_VALUES[option.metavar]
                yield rest.pop(0) if rest and rest[0].lower() in words else silent
            elif takes_value and rest:
                yield rest.pop(0)
        yield from rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags topic by topic."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(param, "topic", "The command"), []).append(record)
        for topic, records in groups.items():
            with formatter.section(topic):
                formatter.write_dl(records)


class _SchemaOption(click.Option):
    """A flag made from the schema."""

    def __init__(self, option: Option) -> None:
        self.topic = _TITLES.get(option.section, option.section)
        self._words = ("true", "false") if option.kind == "bool" else option.choices
        shown = "" if option.default in (None, "", (), False) else f"  [default: {option.default}]"
        super().__init__(
            [f"--{option.flag}", f"{_PREFIX}{option.flag}"],
            # Values stay text here: the schema reads them, so that all problems are reported at once.
            type=str,
            metavar={"bool": "BOOL", "choice": "|".join(option.choices)}.get(option.kind, option.kind.upper()),
            help=f"{option.description}{shown}",
        )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the choices of a setting; files where it takes any text."""
        found = [CompletionItem(word) for word in self._words if word.startswith(incomplete)]
        return found if self._words else [CompletionItem(incomplete, type="file")]


def schema_options() -> list[click.Parameter]:
    """Make one flag for each setting that has one."""
    return [_SchemaOption(option) for option in options()]


def given_flags(values: Mapping[str, object]) -> dict[str, object]:
    """Return the flags that were really typed, as `resolve` takes them."""
    return {name.removeprefix(_PREFIX): value for name, value in values.items() if value is not None}


def complete_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell offer its files."""
    return [CompletionItem(incomplete, type="file")]
