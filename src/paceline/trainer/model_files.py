"""What a Trainer writes: weights for others to load, and checkpoints to go on from."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from paceline.environment.logging import get_logger
from paceline.errors import named
from paceline.strategies import adapters

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from paceline.trainer.trainer import Trainer

__all__ = [
    "PREFIX",
    "STATE_FILE",
    "holds_weights_alone",
    "load_weights",
    "names_of",
    "newest_of",
    "rotate",
    "save_model_files",
    "warn_of_later",
    "write_companions",
]

logger = get_logger(__name__)

PREFIX = "checkpoint-"
STATE_FILE = "trainer_state.json"
ARGUMENTS_FILE = "training_args.json"
_NUMBERED = re.compile(rf"{PREFIX}(\d+)$")


def save_model_files(trainer: Trainer, folder: str | os.PathLike[str]) -> None:
    """Write the weights, and what `from_pretrained` and readers want beside them; of a PEFT model its adapters.

    Collective: every rank must call it.
    """
    if adapters.is_adapted(trainer.model):
        trainer.accelerator.save_adapter(trainer.model_wrapped, folder)
    else:
        trainer.accelerator.save_model(trainer.model_wrapped, folder)
    if trainer.accelerator.is_main_process:
        (Path(folder) / "config.json").unlink(missing_ok=True)
        write_companions(trainer, Path(folder))


def write_companions(trainer: Trainer, folder: Path) -> None:
    """The model's configuration, the tokenizer, and the arguments as JSON."""
    # Adapters have a configuration of their own, which says where their base is.
    for name in () if adapters.is_adapted(trainer.model) else ("config", "generation_config"):
        part: Any = getattr(trainer.model, name, None)
        # A checkpoint has the first already, and its manifest says how long it is.
        if hasattr(part, "save_pretrained") and not (folder / f"{name}.json").exists():
            part.save_pretrained(folder)
    if hasattr(trainer.processing_class, "save_pretrained"):
        trainer.processing_class.save_pretrained(folder)
    (folder / ARGUMENTS_FILE).write_text(trainer.args.to_json_string() + "\n", encoding="utf-8")


def load_weights(trainer: Trainer, folder: Path) -> None:
    """Load weights alone, into a model that may be sharded. Collective: every rank must call it."""
    # Heavy, and seldom needed.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    main = trainer.accelerator.is_main_process
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    whole: dict[str, Any] = {}
    if main and adapters.is_adapted(model):
        whole = adapters.read_adapters(model, folder)
    elif main:
        for file in sorted(folder.glob("*.safetensors")):
            whole |= load_file(file)
    ranks = trainer.accelerator.num_processes
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks > 1, strict=False)
    set_model_state_dict(model, whole, options=options)


def newest_of(output_dir: str) -> Path | None:
    """The checkpoint of most steps, whatever is in it; None if there is none."""
    ordered = _by_steps(output_dir)
    return ordered[-1] if ordered else None


def names_of(output_dir: str) -> list[str]:
    """The names of the checkpoints in a folder, by their steps."""
    return [path.name for path in _by_steps(output_dir)]


def warn_of_later(output_dir: str, resumed_from: str, step: int) -> None:
    """Say which checkpoints of later steps a run finds that goes on from an earlier one."""
    later = [path.name for path in _by_steps(output_dir) if _step_of(path) > step]
    if later:
        logger.warning(
            "This run goes on from %s, and %s holds %s of a run that went further: until they are replaced, "
            "resume_from_checkpoint=True takes them.",
            resumed_from, output_dir, named(later),
        )  # fmt: skip


def holds_weights_alone(folder: Path) -> bool:
    """Whether a checkpoint was written with `save_only_model`."""
    try:
        said = json.loads((folder / ARGUMENTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(said.get("save_only_model"))


def rotate(newest: Path, *, limit: int | None, keep: Sequence[str]) -> None:
    """Remove the oldest checkpoints beside `newest` beyond a limit, but never those in `keep`.

    Those of later steps were left by a run that went further before this one went back: they go first.
    """
    if limit is None:
        return
    step = _step_of(newest)
    ordered = sorted(_by_steps(newest.parent), key=lambda path: (_step_of(path) <= step, _step_of(path)))
    kept = {Path(folder).resolve() for folder in keep}
    doomed = [path for path in ordered if path.resolve() not in kept]
    spare = len(ordered) - max(limit, len(ordered) - len(doomed))
    for path in doomed[: max(0, spare)]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, or what a link leads to; it loses its name first, so that none is ever half there."""
    where = path.resolve()
    if path.is_symlink():
        path.unlink()
    aside = where.with_name(f"{where.name}.partial-{secrets.token_hex(4)}")
    where.rename(aside)
    shutil.rmtree(aside)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _by_steps(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, by the steps in their names."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if _NUMBERED.match(path.name)]
    return sorted(found, key=_step_of)
