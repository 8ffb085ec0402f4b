"""What a Trainer writes: weights for others to load, and checkpoints to go on from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

if TYPE_CHECKING:
    import os

    from paceline.trainer.trainer import Trainer

__all__ = [
    "PREFIX",
    "STATE_FILE",
    "holds_weights_alone",
    "load_weights",
    "newest_of",
    "rotate",
    "save_model_files",
    "write_companions",
]

PREFIX = "checkpoint-"
STATE_FILE = "trainer_state.json"
ARGUMENTS_FILE = "training_args.json"
_NUMBERED = re.compile(rf"{PREFIX}(\d+)$")


def save_model_files(trainer: Trainer, folder: str | os.PathLike[str]) -> None:
    """Write the weights, and what `from_pretrained` and readers want beside them.

    Collective: every rank must call it.
    """
    trainer.accelerator.save_model(trainer.model_wrapped, folder)
    if trainer.accelerator.is_main_process:
        (Path(folder) / "config.json").unlink(missing_ok=True)
        write_companions(trainer, Path(folder))


def write_companions(trainer: Trainer, folder: Path) -> None:
    """The model's configuration, the tokenizer, and the arguments as JSON."""
    for name in ("config", "generation_config"):
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
    whole: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")) if main else ():
        whole |= load_file(file)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    ranks = trainer.accelerator.num_processes
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks > 1, strict=False)
    set_model_state_dict(model, whole, options=options)


def newest_of(output_dir: str) -> Path | None:
    """The checkpoint of most steps, whatever is in it; None if there is none."""
    ordered = _by_steps(output_dir)
    return ordered[-1] if ordered else None


def holds_weights_alone(folder: Path) -> bool:
    """Whether a checkpoint was written with `save_only_model`."""
    try:
        said = json.loads((folder / ARGUMENTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(said.get("save_only_model"))


def rotate(output_dir: str, *, limit: int | None, keep: set[str]) -> None:
    """Remove the oldest checkpoints beyond a limit, but never those in `keep`."""
    if limit is None:
        return
    ordered = _by_steps(output_dir)
    kept = {Path(folder).name for folder in keep}
    spare = len(ordered) - max(limit, len([path for path in ordered if path.name in kept]))
    for path in ordered:
        if spare <= 0:
            break
        if path.name not in kept:
            shutil.rmtree(path)
            spare -= 1


def _by_steps(output_dir: str) -> list[Path]:
    """The checkpoints in a folder, by the steps in their names."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if _NUMBERED.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))
