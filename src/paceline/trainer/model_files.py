"""Files of a Trainer: weights that other libraries load, and checkpoints to resume from."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from paceline.checkpoint import find_checkpoints, find_foreign, newest_checkpoint, number_of, remove_checkpoint
from paceline.environment.logging import get_logger
from paceline.errors import CheckpointError, named
from paceline.strategies import adapters
from paceline.trainer.callbacks import best_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.trainer.protocol import TrainerHooks

__all__ = [
    "STATE_FILE",
    "checkpoint_folder",
    "get_last_checkpoint",
    "has_only_weights",
    "load_best",
    "newest_foreign",
    "newest_of",
    "refuse_used_folder",
    "save_model_files",
    "save_state_file",
    "warn_of_later",
    "write_checkpoint",
]

logger = get_logger(__name__)

_PREFIX = "checkpoint-"
STATE_FILE = "trainer_state.json"
_ARGUMENTS_FILE = "training_args.json"
_NUMBERED = re.compile(rf"{_PREFIX}(\d+)$")


def refuse_used_folder(hooks: TrainerHooks, *, may_replace: bool) -> None:
    """Refuse to start a training in a folder with checkpoints of another. Collective: every rank must call it.

    Args:
        hooks: Has the folder in its arguments.
        may_replace: Whether the checkpoints may be of this run.

    Raises:
        CheckpointError: There are checkpoints.
    """
    output_dir, accelerator = hooks.args.output_dir, hooks.accelerator
    existing = []
    if accelerator.is_main_process and not may_replace:
        existing = [path.name for path in _by_steps(output_dir)]
    existing = accelerator.broadcast_object_list([existing])[0]
    if existing:
        raise CheckpointError(
            f"A new training would save into {output_dir}, which has {named(existing)} of another one",
            "Some would be replaced, and later mixed up with its own when it is resumed or cleaned up",
            "Resume with train(resume_from_checkpoint=True), choose another output_dir, or move the checkpoints away",
        )


def checkpoint_folder(hooks: TrainerHooks) -> str:
    """The folder of the checkpoint at the current step."""
    return os.fspath(Path(hooks.args.output_dir) / f"{_PREFIX}{hooks.state.global_step}")


def write_checkpoint(hooks: TrainerHooks, folder: str) -> None:
    """Write a checkpoint, and remove old ones beyond `save_total_limit`. Collective: every rank must call it."""
    accelerator = hooks.accelerator
    if hooks.args.save_only_model:
        hooks.save_model(folder)
    else:
        accelerator.save_state(folder)
        if adapters.is_adapted(hooks.model):
            # In addition to the training state, which PEFT cannot read.
            accelerator.save_adapter(hooks.model_wrapped, folder)
    if accelerator.is_main_process:
        hooks.state.save_to_json(Path(folder) / STATE_FILE)
        _write_companions(hooks, Path(folder))
        keep = [path for path in (folder, hooks.state.best_model_checkpoint) if path]
        _rotate(Path(folder), limit=hooks.args.save_total_limit, keep=keep)


def save_state_file(hooks: TrainerHooks) -> None:
    """Write `trainer_state.json` into `output_dir`."""
    folder = Path(hooks.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    hooks.state.save_to_json(folder / STATE_FILE)


def load_best(hooks: TrainerHooks) -> None:
    """Load the best checkpoint, with a warning if a better step was not saved. Collective: every rank must call it."""
    state = hooks.state
    folder, step = state.best_model_checkpoint, state.best_global_step
    if not best_checkpoint.is_best_saved(state):
        what = "no evaluation gave a number" if step is None else f"step {step}, the best, was not saved"
        result = "keeping the last weights" if folder is None else f"{folder} is the best one that was"
        logger.warning("load_best_model_at_end: %s; %s.", what, result)
    if folder is None:
        return
    logger.info("Loading the best checkpoint %s (%s).", folder, state.best_saved_metric)
    if hooks.args.save_only_model:
        _load_weights(hooks, Path(folder))
        return
    # The run is where it is: only the weights go back.
    hooks.accelerator.load_state(folder, progress=False)


def save_model_files(hooks: TrainerHooks, folder: str | os.PathLike[str]) -> None:
    """Write the weights (of a PEFT model, its adapters) and the files that `from_pretrained` needs with them.

    Collective: every rank must call it.
    """
    if adapters.is_adapted(hooks.model):
        hooks.accelerator.save_adapter(hooks.model_wrapped, folder)
    else:
        hooks.accelerator.save_model(hooks.model_wrapped, folder)
    if hooks.accelerator.is_main_process:
        (Path(folder) / "config.json").unlink(missing_ok=True)
        _write_companions(hooks, Path(folder))


def _write_companions(hooks: TrainerHooks, folder: Path) -> None:
    """Write the model's configuration, the tokenizer, and the arguments as JSON."""
    # Adapters have their own configuration, which names their base model.
    for name in () if adapters.is_adapted(hooks.model) else ("config", "generation_config"):
        part: Any = getattr(hooks.model, name, None)
        # A checkpoint has config.json already, and its size is in the manifest.
        if hasattr(part, "save_pretrained") and not (folder / f"{name}.json").exists():
            part.save_pretrained(folder)
    if hasattr(hooks.processing_class, "save_pretrained"):
        hooks.processing_class.save_pretrained(folder)
    (folder / _ARGUMENTS_FILE).write_text(hooks.args.to_json_string() + "\n", encoding="utf-8")


def _load_weights(hooks: TrainerHooks, folder: Path) -> None:
    """Load only weights, into a model that may be sharded. Collective: every rank must call it."""
    # Imported here because it is slow and seldom needed.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    is_main = hooks.accelerator.is_main_process
    model = hooks.accelerator.unwrap_model(hooks.model_wrapped)
    weights: dict[str, Any] = {}
    if is_main and adapters.is_adapted(model):
        weights = adapters.read_adapters(model, folder)
    elif is_main:
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
    ranks = hooks.accelerator.num_processes
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks > 1, strict=False)
    set_model_state_dict(model, weights, options=options)


def newest_of(output_dir: str) -> Path | None:
    """The checkpoint with the most steps, complete or not; None if there is none."""
    ordered = _by_steps(output_dir)
    return ordered[-1] if ordered else None


def newest_foreign(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest training state of another library; None if there is none, or a complete checkpoint is as new."""
    foreign = next(iter(find_foreign(output_dir)), None)
    if foreign is None:
        return None
    complete = next((entry.folder for entry in find_checkpoints(output_dir) if entry.checkpoint is not None), None)
    is_newer = complete is None or (number_of(complete) or 0) < (number_of(foreign) or 0)
    return foreign if is_newer else None


def get_last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint that `train(resume_from_checkpoint=True)` would take; None if there is none.

    A script that passes it to `train` can be started again at any time: it begins, or goes on where it was.

    Args:
        folder: The `output_dir` of a training; it need not exist.

    Returns:
        The folder of the newest complete checkpoint, which transformers' Trainer may have written.

    Example:
        >>> get_last_checkpoint("runs/new") is None
        True
    """
    root = Path(folder).expanduser()
    foreign = newest_foreign(root)
    if foreign is not None:
        return str(foreign)
    newest = newest_checkpoint(root)
    return None if newest is None else str(newest.folder)


def warn_of_later(output_dir: str, resumed_from: str, step: int) -> None:
    """Warn of checkpoints with more steps than the one that is resumed."""
    later = [path.name for path in _by_steps(output_dir) if _step_of(path) > step]
    if later:
        logger.warning(
            "This run resumes from %s, and %s has %s of a run that went further: until they are replaced, "
            "resume_from_checkpoint=True takes them.",
            resumed_from, output_dir, named(later),
        )  # fmt: skip


def has_only_weights(folder: Path) -> bool:
    """Whether a checkpoint was written with `save_only_model`."""
    try:
        arguments = json.loads((folder / _ARGUMENTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(arguments.get("save_only_model"))


def _rotate(newest: Path, *, limit: int | None, keep: Sequence[str]) -> None:
    """Remove the oldest checkpoints beyond a limit, but never those in `keep`.

    Those with more steps than `newest` are of a run that went further before this one went back: they go first.
    """
    if limit is None:
        return
    step = _step_of(newest)
    ordered = sorted(_by_steps(newest.parent), key=lambda path: (_step_of(path) <= step, _step_of(path)))
    kept = {Path(folder).resolve() for folder in keep}
    removable = [path for path in ordered if path.resolve() not in kept]
    excess = len(ordered) - max(limit, len(ordered) - len(removable))
    for path in removable[: max(0, excess)]:
        remove_checkpoint(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _by_steps(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, sorted by their steps."""
    checkpoints = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if _NUMBERED.match(path.name)]
    return sorted(checkpoints, key=_step_of)
