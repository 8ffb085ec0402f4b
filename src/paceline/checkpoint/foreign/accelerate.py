"""Reading folders of Accelerate's `save_state`, and checkpoints of the transformers Trainer, which are similar."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from paceline.checkpoint.foreign.dcp import DcpFolder, is_dcp, read_dcp, read_optimizer
from paceline.checkpoint.foreign.deepspeed import is_deepspeed, read_deepspeed
from paceline.checkpoint.foreign.pickles import load_pickled
from paceline.checkpoint.foreign.torch_optimizer import name_optimizer, own_names
from paceline.checkpoint.foreign.weight_files import read_weight_files
from paceline.checkpoint.portable_state import PortableState
from paceline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["is_accelerate", "read_accelerate"]

_OPTIMIZERS = ("optimizer{}.bin", "optimizer{}.pt")
_SCHEDULERS = ("scheduler{}.bin", "scheduler{}.pt")
_WEIGHTS = (
    "model{}.safetensors", "model{}.safetensors.index.json", "pytorch_model{}.bin", "pytorch_model{}.bin.index.json",
    "pytorch_model_fsdp{}.bin",
)  # fmt: skip
_RANDOM = re.compile(r"(?:random_states|rng_state)(?:_(\d+))?\.(?:pkl|pth)")
_LEFT_OUT = {
    "sampler.bin": "loader positions are counted in samples here, and it has none",
    "dl_state_dict.bin": "all ranks wrote to this file, so it has the position of only one",
}


def is_accelerate(folder: Path) -> bool:
    """Whether a folder holds a training state that Accelerate or the transformers Trainer saved."""
    names = {path.name for path in folder.iterdir()}
    marks = {"optimizer.bin", "optimizer.pt", "scheduler.bin", "optimizer_0", "pytorch_model_fsdp_0", "scheduler.pt"}
    return bool(names & marks) or any(_RANDOM.fullmatch(name) for name in names)


def read_accelerate(folder: Path, parameters: Sequence[Sequence[str]] | None = None) -> PortableState:
    """Read such a folder.

    Args:
        folder: The folder that `save_state` wrote.
        parameters: For each optimizer the names of its parameters, group by group: `optimizer.bin` numbers them.

    Raises:
        CheckpointError: A file in it cannot be read.
    """
    state = PortableState(kind="accelerate", folder=folder)
    # Accelerate has DeepSpeed save into a subfolder of that name, the Trainer into the folder itself.
    engines = [path for path in (folder / "pytorch_model", folder) if path.is_dir() and is_deepspeed(path)]
    if engines:
        state = read_deepspeed(engines[0], parameters)
        state.folder = folder
    else:
        _read_models(folder, state)
        _read_optimizers(folder, state, parameters)
    schedulers = [load_pickled(path) for path in _numbered(folder, _SCHEDULERS)]
    state.schedulers = schedulers or state.schedulers
    if (folder / "scaler.pt").is_file():
        state.scaler = load_pickled(folder / "scaler.pt")
    _read_ranks(folder, state)
    _read_custom(folder, state)
    _read_trainer(folder, state)
    state.notes += [f"skipped: {name}; {why}" for name, why in _LEFT_OUT.items() if (folder / name).exists()]
    state.infer_step()
    return state


def _numbered(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """The files of the first object, of the second, and so on; for each the first of its possible names."""
    for index in range(1000):
        suffix = f"_{index}" if index else ""
        candidates = [folder / pattern.format(suffix) for pattern in patterns]
        existing = [path for path in candidates if path.is_file()]
        if not existing:
            return
        yield existing[0]


def _read_models(folder: Path, state: PortableState) -> None:
    for index, path in enumerate(_numbered(folder, _WEIGHTS)):
        prefix = f"model_{index}/" if index else ""
        sources = read_weight_files(path)
        state.weights.sources.update({prefix + name: source for name, source in sources.items()})
    for index in range(1000):
        sharded = folder / f"pytorch_model_fsdp_{index}"
        if not is_dcp(sharded):
            break
        prefix = f"model_{index}/" if index else ""
        sources = read_dcp(sharded).weights.sources
        state.weights.sources.update({prefix + name: source for name, source in sources.items()})
    local = sorted(path.name for path in folder.glob("pytorch_model_fsdp*_rank*.bin"))
    if local and not state.weights:
        raise CheckpointError(
            f"{folder} holds {', '.join(local[:3])}",
            "They are local shards, and only the run that saved them knows their position in the weights",
            "Save with SHARDED_STATE_DICT or FULL_STATE_DICT",
        )


def _read_optimizers(folder: Path, state: PortableState, parameters: Sequence[Sequence[str]] | None) -> None:
    for index, path in enumerate(_numbered(folder, _OPTIMIZERS)):
        saved = load_pickled(path)
        names = own_names(saved)
        if names is None and parameters is not None:
            if index >= len(parameters):
                state.notes.append(f"skipped: {path.name}; this run has no such optimizer")
                continue
            names = list(parameters[index])
        if names is None:
            state.notes.append(f"skipped: {path.name}; it numbers its parameters, and their names are not known")
        else:
            state.optimizers.append(name_optimizer(saved, names, path))
    for index in range(1000):
        if not is_dcp(folder / f"optimizer_{index}"):
            break
        state.optimizers.append(read_optimizer(DcpFolder(folder / f"optimizer_{index}")))


def _read_ranks(folder: Path, state: PortableState) -> None:
    for path in sorted(folder.iterdir()):
        matched = _RANDOM.fullmatch(path.name)
        if not matched:
            continue
        saved = load_pickled(path)
        rank = int(matched[1] or 0)
        state.generators[rank] = _generators(saved, rank)
        if not rank and isinstance(saved.get("step"), int):
            state.step = max(state.step, saved["step"])


def _generators(saved: dict[str, Any], rank: int) -> dict[str, Any]:
    """One rank's random generators, by the names of `get_rng_states`."""

    def first(*names: str) -> Any:
        return next((saved[name] for name in names if name in saved), None)

    generators = {
        "python": first("random_state", "python"),
        "numpy": first("numpy_random_seed", "numpy"),
        "torch": first("torch_manual_seed", "cpu"),
    }
    devices = first("torch_cuda_manual_seed", "cuda")
    if isinstance(devices, (list, tuple)):
        # Accelerate saves those of all devices of the machine.
        devices = devices[rank % len(devices)] if devices else None
    if devices is not None:
        generators["cuda"] = devices
    return {name: value for name, value in generators.items() if value is not None}


def _read_custom(folder: Path, state: PortableState) -> None:
    for index in range(1000):
        path = folder / f"custom_checkpoint_{index}.pkl"
        if not path.is_file():
            return
        try:
            state.custom.append(load_pickled(path))
        except CheckpointError as error:
            state.custom.append(None)
            state.notes.append(f"skipped: {path.name}; {error}")


def _read_trainer(folder: Path, state: PortableState) -> None:
    path = folder / "trainer_state.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        state.step = int(saved.get("global_step") or 0)
        state.epoch = int(saved.get("epoch") or 0)
