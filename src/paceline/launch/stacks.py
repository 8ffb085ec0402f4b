"""The stacks that ranks wrote when they waited for each other: beside their logs, where they have some."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.environment.error_file import stacks_folder

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.launch.failures import RankExit
    from paceline.launch.supervision import AttemptOutcome

__all__ = ["keep_stacks"]


def keep_stacks(outcome: AttemptOutcome, run_id: str, attempt: int, log_dir: Path) -> AttemptOutcome:
    """Move the stacks of one start of the ranks into the folder of their logs, and say so in what they left.

    Args:
        outcome: How they ended.
        run_id: Of the launch.
        attempt: How often ranks were started before.
        log_dir: Folder of the logs.
    """
    written, kept = stacks_folder(run_id, attempt), log_dir.absolute() / stacks_folder(run_id, attempt).name
    if not written.is_dir():
        return outcome
    with contextlib.suppress(OSError):  # then they stay where they are
        shutil.move(written, kept)
        return replace(outcome, ends=tuple(_moved(end, str(written), str(kept)) for end in outcome.ends))
    return outcome


def _moved(end: RankExit, written: str, kept: str) -> RankExit:
    account = end.account
    if account is None:
        return end
    return replace(end, account=replace(account, traceback=account.traceback.replace(written, kept)))
