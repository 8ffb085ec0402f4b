"""Checkpoints in Accelerate's files, which programs open by name: `model.safetensors`, `optimizer.bin` and so on."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.checkpoint import save_weights
from paceline.compat.accelerate.settings.enums import DistributedType
from paceline.compat.accelerate.settings.errors import InvalidValueError, NotInitializedError, WrongTypeError
from paceline.compat.accelerate.state import PartialState
from paceline.compat.accelerate.utils.constants import (
    MODEL_NAME,
    OPTIMIZER_NAME,
    RNG_STATE_NAME,
    SAFE_MODEL_NAME,
    SAMPLER_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    WEIGHTS_NAME,
)
from paceline.compat.accelerate.utils.other import id_tensor_storage, save
from paceline.compat.samplers import SeedableRandomSampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


__all__ = [
    "load_accelerator_state",
    "load_custom_state",
    "load_state",
    "save_accelerator_state",
    "save_custom_state",
    "save_model",
    "save_state",
]

_LOG = logging.getLogger(__name__.removeprefix("paceline.compat."))  # programs filter "accelerate"
_NUMBERED = re.compile(r"checkpoint_\d+")


def _file(folder: Path, stem: str, index: int, suffix: str) -> Path:
    return folder / (f"{stem}{suffix}" if index == 0 else f"{stem}_{index}{suffix}")


def save_accelerator_state(
    output_dir: str | os.PathLike[str],
    model_states: Sequence[dict[str, Any]],
    optimizers: Sequence[Any],
    schedulers: Sequence[Any],
    dataloaders: Sequence[Any],
    process_index: int,
    step: int,
    scaler: Any = None,
    save_on_each_node: bool = False,
    safe_serialization: bool = True,
) -> Path:
    """Write the states of a training.

    Args:
        output_dir: The folder.
        model_states: The weights of each model.
        optimizers: Prepared.
        schedulers: Prepared.
        dataloaders: Prepared.
        process_index: This rank.
        step: Micro-batches since the last loader ended.
        scaler: The loss scaler.
        save_on_each_node: Write on the first rank of each machine.
        safe_serialization: Write weights as safetensors; else as files of torch.

    Returns:
        The folder.
    """
    folder = Path(output_dir)

    def write(thing: Any, file: Path, *, safe: bool = False) -> None:
        save(thing, file, save_on_each_node=save_on_each_node, safe_serialization=safe)

    stem, suffix = (SAFE_MODEL_NAME, ".safetensors") if safe_serialization else (MODEL_NAME, ".bin")
    for index, weights in enumerate(model_states):
        write(weights, _file(folder, stem, index, suffix), safe=safe_serialization)
    for index, optimizer in enumerate(optimizers):
        write(optimizer.state_dict(), _file(folder, OPTIMIZER_NAME, index, ".bin"))
    for index, scheduler in enumerate(schedulers):
        write(scheduler.state_dict(), _file(folder, SCHEDULER_NAME, index, ".bin"))
    for index, loader in enumerate(dataloaders):
        sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
        if isinstance(sampler, SeedableRandomSampler):
            write(sampler, _file(folder, SAMPLER_NAME, index, ".bin"))
        if getattr(loader, "use_stateful_dataloader", False):
            torch.save(loader.state_dict(), _file(folder, "dl_state_dict", index, f"_{process_index}.bin"))
    if scaler is not None:
        write(scaler.state_dict(), folder / SCALER_NAME)
    torch.save(_random_states(step), folder / f"{RNG_STATE_NAME}_{process_index}.pkl")
    return folder


def _random_states(step: int) -> dict[str, Any]:
    states: dict[str, Any] = {
        "step": step,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["torch_cuda_manual_seed"] = torch.cuda.get_rng_state_all()
    return states


def load_accelerator_state(
    input_dir: str | os.PathLike[str],
    models: Sequence[nn.Module],
    optimizers: Sequence[Any],
    schedulers: Sequence[Any],
    dataloaders: Sequence[Any],
    process_index: int,
    scaler: Any = None,
    map_location: Any = None,
    load_kwargs: dict[str, Any] | None = None,
    **load_model_func_kwargs: Any,
) -> dict[str, Any]:
    """Read the states of a training.

    Args:
        input_dir: The folder.
        models: Prepared.
        optimizers: Prepared.
        schedulers: Prepared.
        dataloaders: Prepared.
        process_index: This rank.
        scaler: The loss scaler.
        map_location: "cpu" or "on_device".
        load_kwargs: Arguments of `torch.load`.
        load_model_func_kwargs: Arguments of `load_state_dict` of the models.

    Returns:
        What else the Accelerator takes over: `step`.

    Raises:
        WrongTypeError: `map_location` is something else.
    """
    if map_location not in (None, "cpu", "on_device"):
        raise WrongTypeError(
            f"Unsupported optimizer map location passed: {map_location!r}",
            "There is no such choice",
            "Use cpu, on_device, or leave it out",
        )
    folder = Path(input_dir)
    where = PartialState().device if map_location == "on_device" else torch.device("cpu")
    for index, model in enumerate(models):
        weights = _weights(folder, index, where)
        _add_shared(weights, model)
        model.load_state_dict(weights, **load_model_func_kwargs)
    options = {"map_location": where, "weights_only": True, **(load_kwargs or {})}
    for index, optimizer in enumerate(optimizers):
        optimizer.load_state_dict(torch.load(_file(folder, OPTIMIZER_NAME, index, ".bin"), **options))
    for index, scheduler in enumerate(schedulers):
        # Schedules hold objects of the program.
        options = {"weights_only": False, **(load_kwargs or {})}
        scheduler.load_state_dict(torch.load(_file(folder, SCHEDULER_NAME, index, ".bin"), **options))
    for index, loader in enumerate(dataloaders):
        _load_loader(loader, folder, index, process_index)
    if scaler is not None:
        scaler.load_state_dict(torch.load(folder / SCALER_NAME, weights_only=True))
    return _load_random_states(folder / f"{RNG_STATE_NAME}_{process_index}.pkl")


def _weights(folder: Path, index: int, where: torch.device) -> dict[str, Any]:
    file = _file(folder, SAFE_MODEL_NAME, index, ".safetensors")
    if file.exists():
        from safetensors.torch import load_file

        return load_file(file, device=str(where))
    weights: dict[str, Any] = torch.load(
        _file(folder, MODEL_NAME, index, ".bin"), map_location=where, weights_only=True
    )
    return weights


def _add_shared(weights: dict[str, Any], model: nn.Module) -> None:
    """Add the second names of shared tensors, of which a safetensors file has one."""
    present: dict[Any, str] = {}
    missing: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            memory = (id_tensor_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
            if name in weights:
                present[memory] = name
            else:
                missing[name] = memory
    for name, memory in missing.items():
        if memory in present:
            weights[name] = weights[present[memory]]


def _load_loader(loader: Any, folder: Path, index: int, process_index: int) -> None:
    file = _file(folder, SAMPLER_NAME, index, ".bin")
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    if isinstance(sampler, SeedableRandomSampler) and file.exists():
        loader.set_sampler(torch.load(file, weights_only=False))
    if getattr(loader, "use_stateful_dataloader", False):
        own = _file(folder, "dl_state_dict", index, f"_{process_index}.bin")
        # Accelerate writes one file, of whichever rank came last.
        shared = _file(folder, "dl_state_dict", index, ".bin")
        loader.load_state_dict(torch.load(own if own.exists() else shared, weights_only=False))


def _load_random_states(file: Path) -> dict[str, Any]:
    if not file.exists():
        _LOG.warning("%s is missing: the random generators of this rank keep their states", file)
        return {}
    states = torch.load(file, weights_only=False)
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if torch.cuda.is_available() and "torch_cuda_manual_seed" in states:
        torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"])
    return {"step": states["step"]} if "step" in states else {}


def save_custom_state(obj: Any, path: Any, index: int = 0, save_on_each_node: bool = False) -> None:
    """Write the state of a registered object.

    Args:
        obj: The object.
        path: The folder.
        index: Its number.
        save_on_each_node: Write on the first rank of each machine.
    """
    save(obj.state_dict(), Path(path, f"custom_checkpoint_{index}.pkl"), save_on_each_node=save_on_each_node)


def load_custom_state(obj: Any, path: Any, index: int = 0) -> None:
    """Read the state of a registered object.

    Args:
        obj: The object.
        path: The folder.
        index: Its number.
    """
    file = Path(path, f"custom_checkpoint_{index}.pkl")
    obj.load_state_dict(torch.load(file, map_location="cpu", weights_only=False))


# The Accelerator's own methods


def save_state(
    accelerator: Any,
    output_dir: str | os.PathLike[str] | None,
    safe_serialization: bool,
    model_options: dict[str, Any],
) -> Path:
    """See `Accelerator.save_state`.

    Raises:
        InvalidValueError: The numbered folder exists.
        WrongTypeError: No folder is given, and none is numbered.
    """
    folder = _folder_to_write(accelerator, output_dir)
    if accelerator.is_main_process or accelerator.project_configuration.save_on_each_node:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    models, weights, optimizers, schedulers = _collect(accelerator, folder, model_options)
    for hook in list(accelerator._save_model_state_pre_hook.values()):
        hook(models, weights, str(folder))
    save_accelerator_state(
        folder,
        weights,
        optimizers,
        schedulers,
        accelerator._dataloaders,
        accelerator.process_index,
        accelerator.step,
        accelerator.scaler,
        save_on_each_node=accelerator.project_configuration.save_on_each_node,
        safe_serialization=safe_serialization,
    )
    for index, each in enumerate(accelerator._custom_objects):
        save_custom_state(each, folder, index, accelerator.project_configuration.save_on_each_node)
    accelerator.wait_for_everyone()
    accelerator.project_configuration.iteration += 1
    return folder


def _collect(
    accelerator: Any, folder: Path, model_options: dict[str, Any]
) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """The models with their weights, and the optimizers and schedulers, that are not written by an engine."""
    models, optimizers, schedulers = list(accelerator._models), list(accelerator._optimizers), accelerator._schedulers
    if accelerator.distributed_type == DistributedType.FSDP:
        from paceline.compat.accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

        plugin = accelerator.state.fsdp_plugin
        for index, model in enumerate(models):
            save_fsdp_model(plugin, accelerator, model, folder, index, **model_options)
        for index, optimizer in enumerate(optimizers):
            save_fsdp_optimizer(plugin, accelerator, optimizer, models[min(index, len(models) - 1)], folder, index)
        return models, [], [], list(schedulers)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        for index, engine in enumerate(models):
            name = MODEL_NAME if index == 0 else f"{MODEL_NAME}_{index}"
            engine.save_checkpoint(str(folder), name, **model_options)
        return models, [], [], list(schedulers)
    weights = [accelerator.get_state_dict(model) for model in models]
    return models, weights, optimizers, list(schedulers)


def _folder_to_write(accelerator: Any, output_dir: str | os.PathLike[str] | None) -> Path:
    settings = accelerator.project_configuration
    if not settings.automatic_checkpoint_naming:
        if output_dir is None:
            raise WrongTypeError(
                "save_state() was called without a folder",
                "automatic_checkpoint_naming is off",
                "Pass output_dir, or set automatic_checkpoint_naming in ProjectConfiguration",
            )
        return Path(output_dir).expanduser()
    parent = Path(str(accelerator.project_dir), "checkpoints")
    folder = parent / f"checkpoint_{accelerator.save_iteration}"
    if folder.exists():
        raise InvalidValueError(
            f"{folder} exists",
            "save_state would overwrite it",
            "Set ProjectConfiguration(iteration=…) to a number that is free",
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _drop_oldest(parent, settings.total_limit)
    return folder


def _numbered(parent: Path) -> list[Path]:
    """The numbered checkpoints, from the lowest number."""
    found = [each for each in parent.glob("checkpoint_*") if _NUMBERED.fullmatch(each.name)]
    return sorted(found, key=lambda each: int(each.name.rpartition("_")[2]))


def _drop_oldest(parent: Path, limit: int | None) -> None:
    """Make room for one more."""
    if limit is None:
        return
    existing = _numbered(parent)
    for each in existing[: max(0, len(existing) + 1 - limit)]:
        shutil.rmtree(each)


def load_state(
    accelerator: Any,
    input_dir: str | os.PathLike[str] | None,
    load_kwargs: dict[str, Any] | None,
    model_options: dict[str, Any],
) -> None:
    """See `Accelerator.load_state`.

    Raises:
        InvalidValueError: There is no such folder.
        NotInitializedError: Other objects are registered than were saved.
    """
    folder = _folder_to_read(accelerator, input_dir)
    models, optimizers = list(accelerator._models), list(accelerator._optimizers)
    location = model_options.pop("map_location", None)
    for hook in list(accelerator._load_model_state_pre_hook.values()):
        hook(models, str(folder))
    if accelerator.distributed_type == DistributedType.FSDP:
        from paceline.compat.accelerate.utils.fsdp_utils import load_fsdp_model, load_fsdp_optimizer

        plugin = accelerator.state.fsdp_plugin
        for index, model in enumerate(models):
            load_fsdp_model(plugin, accelerator, model, folder, index, **model_options)
        for index, optimizer in enumerate(optimizers):
            load_fsdp_optimizer(plugin, accelerator, optimizer, models[min(index, len(models) - 1)], folder, index)
        models, optimizers, model_options = [], [], {}
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        for index, engine in enumerate(models):
            engine.load_checkpoint(str(folder), MODEL_NAME if index == 0 else f"{MODEL_NAME}_{index}", **model_options)
        models, optimizers, model_options = [], [], {}
    else:
        models = [accelerator.unwrap_model(model) for model in models]
    kept = load_accelerator_state(
        folder,
        models,
        optimizers,
        accelerator._schedulers,
        accelerator._dataloaders,
        accelerator.process_index,
        accelerator.scaler,
        location,
        load_kwargs,
        **model_options,
    )
    accelerator.step = kept.get("step", accelerator.step)
    _load_registered(accelerator, folder)


def _load_registered(accelerator: Any, folder: Path) -> None:
    saved = sorted(each.name for each in folder.glob("custom_checkpoint_*.pkl"))
    registered = accelerator._custom_objects
    if len(saved) != len(registered):
        raise NotInitializedError(
            f"{folder} holds {len(saved)} registered objects, and {len(registered)} are registered now",
            "Their states are matched by number",
            "Register the same objects in the same order",
        )
    for index, each in enumerate(registered):
        load_custom_state(each, folder, index)


def _folder_to_read(accelerator: Any, input_dir: str | os.PathLike[str] | None) -> Path:
    if input_dir is not None:
        folder = Path(input_dir).expanduser()
    elif accelerator.project_configuration.automatic_checkpoint_naming:
        numbered = _numbered(Path(str(accelerator.project_dir), "checkpoints"))
        if not numbered:
            raise InvalidValueError(
                f"There is no checkpoint under {accelerator.project_dir}", "Nothing was saved there", "Pass input_dir"
            )
        folder = numbered[-1]
    else:
        raise InvalidValueError(
            "load_state() was called without a folder", "automatic_checkpoint_naming is off", "Pass input_dir"
        )
    if not folder.is_dir():
        raise InvalidValueError(f"{folder} does not exist", "There is nothing to load", "Check the path")
    return folder


def save_model(
    accelerator: Any,
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    max_shard_size: int | str,
    safe_serialization: bool,
) -> None:
    """See `Accelerator.save_model`."""
    folder = Path(save_directory)
    if folder.is_file():
        _LOG.error("%s is a file: the model is not saved", folder)
        return
    weights = _all_weights(accelerator, model)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if safe_serialization:
            save_weights(weights, folder, max_shard_size=max_shard_size)
        else:
            for old in (*folder.glob("pytorch_model*.bin"), *folder.glob("pytorch_model.bin.index.json")):
                old.unlink()
            _save_parts(weights, folder, max_shard_size)
    accelerator.wait_for_everyone()


def _all_weights(accelerator: Any, model: nn.Module) -> dict[str, Any]:
    """The weights of a model, those that are offloaded to host memory or disk too."""
    from paceline.placement import get_state_dict_offloaded_model, has_offloaded_params

    if any(map(has_offloaded_params, model.modules())):
        return get_state_dict_offloaded_model(model)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise NotInitializedError(
            f"{', '.join(empty[:3])} of {type(model).__name__} have no values",
            "They are on the meta device",
            "Load them",
        )
    weights: dict[str, Any] = accelerator.get_state_dict(model)
    return weights


def _save_parts(weights: dict[str, Any], folder: Path, max_shard_size: int | str) -> None:
    """Write files of torch, none larger than `max_shard_size`, with an index if there are several."""
    from paceline.compat.accelerate.utils.modeling import convert_file_size_to_int

    limit = convert_file_size_to_int(max_shard_size)
    parts: list[dict[str, Any]] = [{}]
    size = 0
    for name, value in weights.items():
        if parts[-1] and size + value.nbytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = value
        size += value.nbytes
    if len(parts) == 1:
        torch.save(parts[0], folder / WEIGHTS_NAME)
        return
    names = [f"{MODEL_NAME}-{number:05d}-of-{len(parts):05d}.bin" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    total = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    Path(folder, f"{WEIGHTS_NAME}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
