"""`paceline launch`: its flags are made from the configuration's one schema."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.config import find_config_file, options, resolve
from paceline.launch import Command, detect, launch, plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.config import Option, Resolved

_TRUE_OR_FALSE = {"true", "false", "yes", "no", "on", "off", "1", "0"}

_HELP = """Run SCRIPT on all devices of this machine, or as many processes as you ask for.

Without flags and without a configuration file everything is detected: one process for each GPU, two on a
machine without. Flags stand before the script; what follows it is the script's own. Flags may be written with
- or _, and a flag beats the environment (PACELINE_MIXED_PRECISION=bf16), which beats the file.

\b
    paceline launch train.py --lr 1e-3
    paceline launch --num_processes 4 --mixed_precision bf16 train.py
    paceline launch --use_fsdp --fsdp_offload_params true train.py
    paceline launch --config_file fsdp.yaml -m my_package.train
    paceline launch --dry-run train.py
"""

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


class _LaunchCommand(click.Command):
    """Shows flags by topic, and takes true/false flags with a value or without one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._with_values(ctx, args)))

    def _with_values(self, ctx: click.Context, args: list[str]) -> Iterator[str]:
        """Rewrite `--flag` and `--flag false` of a true/false setting as `--flag=...`."""
        known = {
            name: param
            for param in self.get_params(ctx)
            if isinstance(param, click.Option)
            for name in (*param.opts, *param.secondary_opts)
        }
        rest = list(args)
        while rest:
            token = rest.pop(0)
            option = known.get(_underscored(token))
            if option is None:
                yield token
                if not token.startswith("-") or token == "--":
                    break
                continue
            takes_value = not option.is_flag and not option.count
            if option.metavar == "BOOL":
                word = rest.pop(0) if rest and rest[0].lower() in _TRUE_OR_FALSE else "true"
                yield f"{token}={word}"
            else:
                yield token
                if takes_value and rest:
                    yield rest.pop(0)
        yield from rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
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
        shown = "" if option.default in (None, "", (), False) else f"  [default: {option.default}]"
        super().__init__(
            [f"--{option.flag}", f"flag_{option.flag}"],
            # Values stay text here: the schema reads them, so that all problems are reported at once.
            type=str,
            metavar={"bool": "BOOL", "choice": "|".join(option.choices)}.get(option.kind, option.kind.upper()),
            help=f"{option.description}{shown}",
        )


def _underscored(name: str) -> str:
    return name.replace("-", "_") if not name.startswith("-") else "--" + name.lstrip("-").replace("-", "_")


def _normalize(name: str) -> str:
    return name.replace("-", "_")


@click.command(
    name="launch",
    cls=_LaunchCommand,
    help=_HELP,
    context_settings={
        "allow_interspersed_args": False,
        "token_normalize_func": _normalize,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
    params=[_SchemaOption(option) for option in options()],
)
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--config_file", type=click.Path(path_type=Path), help="YAML or JSON file to read.")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as in `python -m`.")
@click.option("--no_python", is_flag=True, help="SCRIPT is a program to run as it is.")
@click.option("--dry_run", is_flag=True, help="Print the processes and their variables; start nothing.")
@click.option("--log_dir", type=click.Path(path_type=Path), help="Write each rank's output into files here.")
@click.option("-t", "--tee", is_flag=True, help="With --log_dir: show the ranks' lines as well.")
@click.option("-q", "--quiet", is_flag=True, help="Do not print notes about the configuration.")
def command(
    script: str,
    arguments: tuple[str, ...],
    config_file: Path | None,
    module: bool,
    no_python: bool,
    dry_run: bool,
    log_dir: Path | None,
    tee: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Run a script; the text above is what people read."""
    if module and no_python:
        raise click.UsageError("--module and --no_python exclude each other: a module needs Python.")
    flags = {name.removeprefix("flag_"): value for name, value in values.items() if value is not None}
    resolved = _resolve(flags, config_file)
    if not quiet:
        for note in resolved.notes:
            click.echo(f"paceline: {note}", err=True)
    kind: Any = "module" if module else "program" if no_python else "script"
    what = Command(script=script, arguments=arguments, kind=kind)
    if dry_run:
        click.echo(str(plan(resolved, what, os.environ)))
        return
    launch(resolved, what, env=os.environ, log_dir=log_dir, tee=tee)


def _resolve(flags: dict[str, object], config_file: Path | None) -> Resolved:
    file = find_config_file(os.environ, config_file)
    resolved = resolve(flags=flags, env=os.environ, file=file)
    if resolved.config.num_processes is not None:
        return resolved
    # What is there depends on whether the CPU was asked for, which any source may have done.
    found = detect(os.environ, resolved.config.use_cpu)
    return resolve(flags=flags, env=os.environ, file=file, detected=found)
