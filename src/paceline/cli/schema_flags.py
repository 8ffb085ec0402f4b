"""Flags made from the configuration's schema, for every command that takes a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from paceline.config import options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paceline.config import Option

__all__ = ["SETTINGS", "SchemaCommand", "complete_files", "given_flags", "schema_options"]

_OPTIONAL_VALUES = {
    "BOOL": ({"true", "false", "yes", "no", "on", "off", "1", "0"}, "true"),
    "STREAMS": ({"0", "1", "2", "3"}, "3"),
}
"""Flags with an optional value, by metavar: the values, and the one that a missing value stands for."""
_PREFIX = "flag_"
_OWN = "The command"
"""The heading of flags that set no part of the configuration."""

_NO_TPU = "TPUs are not supported in this release; leave it out"
_NO_SAGEMAKER = "SageMaker is not supported in this release; leave it out"
_RENDEZVOUS = "write --main_process_ip and --main_process_port"
_INSTEAD = {
    "role": "all ranks have the same role; leave it out",
    "no_tpu_cluster": _NO_TPU,
    "aws_access_key_id": _NO_SAGEMAKER,
    "aws_secret_access_key": _NO_SAGEMAKER,
    "fp16": "write --mixed_precision fp16",
    "bf16": "write --mixed_precision bf16",
    "ipex": "torch itself has what IPEX added; leave it out",
    "use_xpu": "devices are detected without it; leave it out",
    "nproc_per_node": "write --num_processes, the number over all machines",
    "nnodes": "write --num_machines",
    "node_rank": "write --machine_rank",
    "master_addr": _RENDEZVOUS,
    "master_port": _RENDEZVOUS,
    "rdzv_endpoint": _RENDEZVOUS,
    "rdzv_id": "each launch has its own id; leave it out",
    "standalone": "one machine needs no rendezvous; leave it out",
    "redirects": "write --log_dir, which writes both streams of every rank to files",
}
"""Flags of Accelerate (past and present) and torchrun that `paceline launch` does not have, with what to do."""


def _underscored(name: str) -> str:
    if not name.startswith("-"):
        return name.replace("-", "_")
    return "--" + name.lstrip("-").replace("-", "_")


def _normalize(name: str) -> str:
    return name.replace("-", "_")


SETTINGS = {
    "token_normalize_func": _normalize,
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
}
"""Context settings of commands with these flags: they can be written with - or _."""


class SchemaCommand(click.Command):
    """A command that groups flags by topic and takes boolean flags with or without a value.

    Args:
        shows_own_last: Whether help lists the command's own flags after those of the configuration.
        settings: The arguments of `click.Command`.
    """

    def __init__(self, *, shows_own_last: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self._shows_own_last = shows_own_last

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give every flag a value before click parses the line; name the replacement of another launcher's flag."""
        try:
            return super().parse_args(ctx, list(self._with_values(ctx, args)))
        except click.NoSuchOption as error:
            instead = _INSTEAD.get(_normalize(error.option_name.lstrip("-")))
            if instead is None:
                raise
            raise click.UsageError(f"There is no {error.option_name} here: {instead}.", ctx) from None

    def _with_values(self, ctx: click.Context, args: list[str]) -> Iterator[str]:
        """Yield the arguments, with the value of every flag that was given without one."""
        known = self._options_by_name(ctx)
        rest = list(args)
        while rest:
            token = rest.pop(0)
            yield token
            option = known.get(token) or known.get(_underscored(token))
            if option is not None:
                yield from _take_value(option, rest)
            elif not token.startswith("-") or token == "--":
                break
        yield from rest

    def _options_by_name(self, ctx: click.Context) -> dict[str, click.Option]:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        return {name: option for option in options for name in (*option.opts, *option.secondary_opts)}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags topic by topic."""
        groups: dict[str, list[tuple[str, str]]] = {}
        if not self._shows_own_last:
            groups[_OWN] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(param, "topic", _OWN), []).append(record)
        for topic, records in groups.items():
            with formatter.section(topic):
                formatter.write_dl(records)


def _take_value(option: click.Option, rest: list[str]) -> Iterator[str]:
    """Take the value of a flag from the arguments that follow it, else its default value."""
    if option.metavar in _OPTIONAL_VALUES:
        words, default = _OPTIONAL_VALUES[option.metavar]
        if rest and rest[0].lower() in words:
            default = rest.pop(0)
        yield default
    elif rest and not option.is_flag and not option.count:
        yield rest.pop(0)


class _SchemaOption(click.Option):
    """A flag made from the schema."""

    def __init__(self, option: Option) -> None:
        self.topic = option.topic
        self._words = ("true", "false") if option.kind == "bool" else option.choices
        shown = "" if option.default in (None, "", (), False) else f"  [default: {option.default}]"
        super().__init__(
            [f"--{option.flag}", f"{_PREFIX}{option.flag}"],
            # Values stay text here: the schema reads them, so that all problems are reported at once.
            type=str,
            metavar={"bool": "BOOL", "choice": "|".join(option.choices)}.get(option.kind, option.kind.upper()),
            help=f"{option.description}{shown}",
            hidden=not option.is_supported,
        )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the choices of a setting; files where it takes any text."""
        items = [CompletionItem(word) for word in self._words if word.startswith(incomplete)]
        if self._words:
            return items
        return [CompletionItem(incomplete, type="file")]


def schema_options() -> list[click.Parameter]:
    """Return a flag for each setting that has one."""
    return [_SchemaOption(option) for option in options()]


def given_flags(values: Mapping[str, object]) -> dict[str, object]:
    """Return the flags that were given, as `resolve` takes them."""
    return {name.removeprefix(_PREFIX): value for name, value in values.items() if value is not None}


def complete_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete file names."""
    return [CompletionItem(incomplete, type="file")]
