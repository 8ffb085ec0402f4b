"""A training that may be asked to make room: one rank sends itself SIGTERM after a step."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from paceline import TrainerCallback
from tests.support.trainer import run

CHANGES = {"save_strategy": "steps", "save_steps": 280, "max_steps": 300, "logging_steps": 100}


class Asked(TrainerCallback):
    """Sends the signal, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **things: Any) -> None:
        """Ask after the step that was named, and leave the ranks time to agree before the training is over."""
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if state.global_step >= self.step:
            time.sleep(0.02)


if __name__ == "__main__":
    folder, step = sys.argv[1], int(sys.argv[2])
    log, trainer = run(CHANGES, folder, resume=None if step else True, callbacks=[Asked(step)] if step else [])
    if trainer.accelerator.is_main_process:
        Path(folder, "log.json").write_text(json.dumps(log), encoding="utf-8")
