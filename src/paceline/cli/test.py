"""`paceline test`: whether this installation trains right, tried out."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.interrupts import import_torch
from paceline.cli.paths import PathType
from paceline.cli.schema_flags import SETTINGS, SchemaCommand, given_flags, schema_options
from paceline.cli.sources import resolve_sources
from paceline.errors import UsageError, WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.cli.selftest.outcome import Outcome
    from paceline.config import Resolved

_HELP = """Try this installation out: launch a small training with your configuration and compare it with known answers.

One process on each device, two on a machine without, are started by the launcher, as under `paceline launch`. Checked
are collectives, the data loader, training beside plain PyTorch with the same global batch, the precision asked for,
gradient accumulation, that FSDP2 really shards, and a checkpoint that one process loads. What your configuration says
is checked first, then DDP and FSDP2 in fp32. It takes less than a minute. The exit code is 0 if all is well, else 1.

\b
    paceline test
    paceline test --config_file fsdp.yaml
    paceline test --num_processes 4 --mixed_precision bf16
    paceline test --cpu --json
"""

_MODULE = "paceline.cli.selftest.ranks"


@click.command(name="test", cls=SchemaCommand, help=_HELP, context_settings=SETTINGS, params=schema_options())
@click.option("--config_file", type=PathType(path_type=Path), help="YAML or JSON file to read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--keep", type=PathType(file_okay=False, path_type=Path), help="Keep what the ranks wrote here.")
def command(config_file: Path | None, as_json: bool, keep: Path | None, **values: Any) -> None:
    """Try the installation out; the text above is what people read."""
    resolved = resolve_sources(given_flags(values), config_file)
    if resolved.config.spans_machines:
        raise UsageError(
            f"The configuration is for {resolved.config.num_machines} machines",
            "This command tries out one",
            "Add --num_machines 1 and --num_processes for this machine",
        )
    with tempfile.TemporaryDirectory(prefix="paceline_test_") as made:
        trial = Trial((keep or Path(made)).absolute(), resolved, as_json)
        passed = trial.run()
    sys.exit(0 if passed else 1)


@dataclass
class Trial:
    """One run of all checks."""

    folder: Path
    resolved: Resolved
    as_json: bool
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self) -> bool:
        """Run everything; print what was found; return whether all is well."""
        begun = time.perf_counter()
        ranks = self.resolved.config.num_processes or 1
        self.folder.mkdir(parents=True, exist_ok=True)
        self._say(f"{ranks} {'processes' if ranks > 1 else 'process'}, {self._source()}")
        self._phase("save", ranks, self.resolved)
        if any(self.folder.glob("*/wanted.json")):
            from paceline.cli.variants import alone

            self._phase("load", ranks, alone(self.resolved))
        seconds = time.perf_counter() - begun
        passed = bool(self.outcomes) and all(outcome.passed for outcome in self.outcomes)
        if self.as_json:
            told = {"passed": passed, "seconds": seconds, "checks": [outcome.as_dict() for outcome in self.outcomes]}
            click.echo(json.dumps(told, indent=2))
        failed = sum(not outcome.passed for outcome in self.outcomes)
        verdict = "PASS" if passed else "FAIL"
        self._say(f"{verdict}  {len(self.outcomes) - failed} of {len(self.outcomes)} checks passed in {seconds:.0f} s")
        return passed

    def _source(self) -> str:
        files = {o.where.partition(":")[0] for o in self.resolved.origins.values() if o.kind == "file"}
        return f"configured by {', '.join(sorted(files))}" if files else "no configuration file"

    def _say(self, line: str) -> None:
        if not self.as_json:
            click.echo(line)

    def _phase(self, name: str, ranks: int, resolved: Resolved) -> None:
        """Launch one phase and take over what its ranks found."""
        from paceline.cli.selftest.outcome import Outcome

        import_torch()
        from paceline.launch import Command, launch

        begun = time.perf_counter()
        what = Command(_MODULE, (name, str(self.folder), str(ranks)), "module")
        failure = None
        try:
            launch(resolved, what, env=os.environ, log_dir=self.folder / f"{name}_output")
        except WorkerError as error:
            failure = error
        found = list(self._found())
        inside = sum(outcome.seconds for outcome in found)
        start = time.perf_counter() - begun - inside
        count = resolved.config.num_processes or 1
        saw = f"{count} {'processes' if count > 1 else 'process'} started, ran and ended"
        if failure is None:
            found.insert(0, Outcome("", "launch" if name == "save" else "launch again", True, start, saw))
        else:
            hint = "Read the traceback above; `paceline env` shows versions and devices"
            found.append(Outcome("", "launch", False, start, str(failure).rstrip(), "A rank failed", hint))
        for outcome in found:
            self.outcomes.append(outcome)
            for line in _lines(outcome):
                self._say(line)

    def _found(self) -> Iterator[Outcome]:
        """Each check once: as the rank saw it that failed, else as the slowest did."""
        from paceline.cli.selftest.outcome import Outcome

        by_rank = []
        for path in sorted(self.folder.glob("outcomes-*.json")):
            by_rank.append([Outcome(**told) for told in json.loads(path.read_text(encoding="utf-8"))])
            path.unlink()
        for index in range(max(map(len, by_rank), default=0)):
            same = [outcomes[index] for outcomes in by_rank if index < len(outcomes)]
            yield min(same, key=lambda outcome: (outcome.passed, -outcome.seconds))


def _lines(outcome: Outcome) -> Iterator[str]:
    """One line in the table, and three more for what failed."""
    tick, cross = ("✓", "✗") if "utf" in (sys.stdout.encoding or "").lower() else ("ok", "FAILED")
    mark = tick if outcome.passed else cross
    head = f"{mark} {outcome.name:<12} {outcome.section:<15} {outcome.seconds:5.1f} s  "
    first, *rest = outcome.saw.splitlines() or [""]
    yield head + first
    yield from (f"    {line}" for line in rest)
    if not outcome.passed:
        yield from (f"    {line}." for line in (outcome.why, outcome.todo) if line)
