"""What a rank of `paceline test` does, as `python -m paceline.cli.selftest.ranks save|load FOLDER`."""

from __future__ import annotations

import gc
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline import Accelerator, GradScalerKwargs, InitProcessGroupKwargs
from paceline.cli.selftest import checks
from paceline.cli.selftest.outcome import run_check
from paceline.cli.selftest.training import prepare
from paceline.cli.sources import LAYOUT, variant
from paceline.config import use_configuration, worker_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.cli.selftest.outcome import Outcome
    from paceline.config import Resolved

_PATIENCE = timedelta(seconds=60)


class RankChecks:
    """Runs the checks on one rank and writes down their results."""

    def __init__(self, folder: Path, resolved: Resolved) -> None:
        self.folder = folder
        self.resolved = resolved
        self.outcomes: list[Outcome] = []
        fsdp = resolved.config.fsdp_config
        self.block_names = (fsdp.transformer_cls_names_to_wrap or ()) if fsdp is not None else ()

    def check(self, section: str, name: str, check: Callable[[], str]) -> bool:
        """Run a check and write its result at once: a later check may hang."""
        outcome = run_check(section, name, check)
        self.outcomes.append(outcome)
        text = json.dumps([one.as_dict() for one in self.outcomes])
        path = self.folder / f"outcomes-{os.environ['RANK']}.json"
        path.with_suffix(".part").write_text(text, encoding="utf-8")
        path.with_suffix(".part").rename(path)
        return outcome.passed

    def sections(self) -> Iterator[tuple[str, Resolved]]:
        """Yield the current configuration, then DDP and FSDP unless it is one of them."""
        config = self.resolved.config
        strategy_now = config.strategy
        size = config.num_processes or 1
        yield f"{strategy_now}, {config.mixed_precision}", self.resolved
        if size > 1:
            # For a model as small as this one auto chooses DDP.
            for strategy in {"auto": ("fsdp",), "ddp": ("fsdp",), "fsdp": ("ddp",)}.get(strategy_now, ("ddp", "fsdp")):
                yield (
                    f"{strategy}, no",
                    variant(self.resolved, (*LAYOUT, "fp8_config"), strategy=strategy, mixed_precision="no"),
                )

    def save(self) -> None:
        """Run all checks up to saving a checkpoint."""
        first, *_ = self.sections()
        with use_configuration(first[1]):
            self._exchange(build())
        for section, resolved in self.sections():
            self._train(section, resolved)

    def _exchange(self, accelerator: Accelerator) -> None:
        """Check what all strategies share; wrong collectives end the run."""
        if not self.check("", "collectives", lambda: checks.check_collectives(accelerator)):
            sys.exit(0)
        self.check("", "data loader", lambda: checks.check_loader(accelerator))

    def _train(self, section: str, resolved: Resolved) -> None:
        kept: dict[str, Any] = {}

        def training(accumulation: int) -> str:
            chosen = variant(resolved, gradient_accumulation_steps=accumulation)
            with use_configuration(chosen):
                accelerator = build()
            run = prepare(accelerator, accelerator.num_processes, accumulation, self.block_names)
            saw, trained = checks.check_training(run, accumulation)
            if accumulation == 1:
                kept.update(run=run, trained=trained)
            return saw

        if self.check(section, "training", lambda: training(1)):
            run = kept["run"]
            self.check(section, "precision", lambda: checks.check_precision(run, kept["trained"]))
            if section.startswith("fsdp") and run.accelerator.num_processes > 1:
                self.check(section, "sharding", lambda: checks.check_sharding(run))
            folder = self.folder / section.partition(",")[0]
            folder.mkdir(exist_ok=True)
            self.check(section, "save", lambda: checks.check_save(run, folder))
            del run
        kept.clear()
        gc.collect()
        if resolved.config.strategy != "deepspeed":
            self.check(section, "accumulation", lambda: training(2))

    def load(self, ranks: int) -> None:
        """Load the checkpoints that `ranks` ranks saved."""
        for file in sorted(self.folder.glob("*/wanted.json")):
            self._load(file.parent, ranks)
            gc.collect()

    def _load(self, folder: Path, ranks: int) -> None:
        precision = json.loads((folder / "wanted.json").read_text(encoding="utf-8"))["precision"]
        without = ("fp8_config",) if precision == "no" else ()
        resolved = variant(self.resolved, without, mixed_precision=precision, gradient_accumulation_steps=1)
        with use_configuration(resolved):
            accelerator = build()
        self.check(folder.name, "load", lambda: checks.check_load(accelerator, folder, ranks, self.block_names))


def build() -> Accelerator:
    """Build an Accelerator that waits at most a minute for other ranks and does not skip its first fp16 steps."""
    config = worker_config(os.environ).config
    handlers: list[object] = [InitProcessGroupKwargs(timeout=_PATIENCE)]
    if config.mixed_precision == "fp16" and config.strategy != "deepspeed":
        handlers.append(GradScalerKwargs(init_scale=256.0))
    return Accelerator(kwargs_handlers=handlers)


def main(phase: str, folder: Path, ranks: int) -> None:
    """Run one phase."""
    run = RankChecks(folder, worker_config(os.environ))
    if phase == "save":
        run.save()
    else:
        run.load(ranks)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
