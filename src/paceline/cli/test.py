"""`paceline test`: checks this installation with a small training."""

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

from paceline.cli.click_helpers import PathType
from paceline.cli.interrupts import import_torch
from paceline.cli.schema_flags import SETTINGS, SchemaCommand, given_flags, schema_options
from paceline.cli.sources import one_process, resolve_sources
from paceline.errors import UsageError, WorkerError, counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.cli.selftest.outcome import Outcome
    from paceline.config import Resolved

_HELP = """Check this installation: launch a small training with your configuration and compare it with known results.

The launcher starts one process on each device, two on a machine without, as under `paceline launch`. The checks cover
collectives, the data loader, training compared with plain PyTorch on the same global batch, the configured precision,
gradient accumulation, sharding under FSDP2, and a checkpoint that one process loads. Your configuration is checked
first, then DDP and FSDP2 in fp32. It takes less than a minute. The exit code is 0 if all checks pass, else 1.

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
@click.option(
    "--keep", type=PathType(file_okay=False, path_type=Path), help="Keep the output of the ranks in this folder."
)
def command(config_file: Path | None, as_json: bool, keep: Path | None, **values: Any) -> None:
    """Try the installation out; `_HELP` is what users read."""
    resolved = resolve_sources(given_flags(values), config_file)
    if resolved.config.spans_machines:
        raise UsageError(
            f"The configuration is for {resolved.config.num_machines} machines",
            "This command checks one machine",
            "Add --num_machines 1 and --num_processes for this machine",
        )
    with tempfile.TemporaryDirectory(prefix="paceline_test_") as made:
        trial = Trial((keep or Path(made)).absolute(), resolved, as_json)
        passed = trial.run()
    sys.exit(0 if passed else 1)


@dataclass
class Trial:
    """Runs all checks and prints their results."""

    folder: Path
    resolved: Resolved
    as_json: bool
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self) -> bool:
        """Run all checks; return whether all of them passed."""
        begun = time.perf_counter()
        ranks = self.resolved.config.num_processes or 1
        self.folder.mkdir(parents=True, exist_ok=True)
        self._say(f"{counted(ranks, 'process')}, {self._source()}")
        self._phase("save", ranks, self.resolved)
        if any(self.folder.glob("*/wanted.json")):
            self._phase("load", ranks, one_process(self.resolved))
        seconds = time.perf_counter() - begun
        passed = bool(self.outcomes) and all(outcome.passed for outcome in self.outcomes)
        if self.as_json:
            document = {
                "passed": passed,
                "seconds": seconds,
                "checks": [outcome.as_dict() for outcome in self.outcomes],
            }
            click.echo(json.dumps(document, indent=2))
        failed = sum(not outcome.passed for outcome in self.outcomes)
        verdict = "PASS" if passed else "FAIL"
        self._say(f"{verdict}  {len(self.outcomes) - failed} of {len(self.outcomes)} checks passed in {seconds:.0f} s")
        return passed

    def _source(self) -> str:
        files = {o.where.partition(":")[0] for o in self.resolved.origins.values() if o.kind == "file"}
        if files:
            return f"configured by {', '.join(sorted(files))}"
        return "no configuration file"

    def _say(self, line: str) -> None:
        if not self.as_json:
            click.echo(line)

    def _phase(self, name: str, ranks: int, resolved: Resolved) -> None:
        """Launch one phase and add the results of its ranks."""
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
        outcomes = list(self._outcomes_of_ranks())
        inside = sum(outcome.seconds for outcome in outcomes)
        start = time.perf_counter() - begun - inside
        count = resolved.config.num_processes or 1
        saw = f"{counted(count, 'process')} started, ran and ended"
        if failure is None:
            outcomes.insert(0, Outcome("", "launch" if name == "save" else "launch again", True, start, saw))
        else:
            hint = "Read the traceback above; `paceline env` shows versions and devices"
            outcomes.append(Outcome("", "launch", False, start, str(failure).rstrip(), "A rank failed", hint))
        for outcome in outcomes:
            self.outcomes.append(outcome)
            for line in _lines(outcome):
                self._say(line)

    def _outcomes_of_ranks(self) -> Iterator[Outcome]:
        """Yield each check once: from a rank where it failed, else from the slowest."""
        from paceline.cli.selftest.outcome import Outcome

        by_rank = []
        for path in sorted(self.folder.glob("outcomes-*.json")):
            by_rank.append([Outcome(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))])
            path.unlink()
        for index in range(max(map(len, by_rank), default=0)):
            same = [outcomes[index] for outcomes in by_rank if index < len(outcomes)]
            yield min(same, key=lambda outcome: (outcome.passed, -outcome.seconds))


def _lines(outcome: Outcome) -> Iterator[str]:
    """Yield a line of the table, and three more for a failed check."""
    tick, cross = ("✓", "✗") if "utf" in (sys.stdout.encoding or "").lower() else ("ok", "FAILED")
    mark = tick if outcome.passed else cross
    head = f"{mark} {outcome.name:<12} {outcome.section:<15} {outcome.seconds:5.1f} s  "
    first, *rest = outcome.saw.splitlines() or [""]
    yield head + first
    yield from (f"    {line}" for line in rest)
    if not outcome.passed:
        yield from (f"    {line}." for line in (outcome.why, outcome.todo) if line)
