"""Saves and loads sharded models and optimizers in the files that programs look for, and helpers around FSDP."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn

from paceline.compat.accelerate.settings.errors import InvalidValueError, MissingKeyError, unsupported
from paceline.compat.accelerate.state import PartialState
from paceline.compat.accelerate.utils.constants import (
    FSDP_MODEL_NAME,
    OPTIMIZER_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from paceline.compat.accelerate.utils.modeling import get_non_persistent_buffers, is_peft_model

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    from paceline.compat.accelerate.settings.fsdp import FullyShardedDataParallelPlugin

__all__ = [
    "FSDP_MODEL_NAME",
    "OPTIMIZER_NAME",
    "SAFE_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "disable_fsdp_ram_efficient_loading",
    "enable_fsdp_ram_efficient_loading",
    "ensure_weights_retied",
    "fsdp2_apply_ac",
    "fsdp2_canonicalize_names",
    "fsdp2_load_full_state_dict",
    "fsdp2_prepare_auto_wrap_policy",
    "fsdp2_prepare_model",
    "fsdp2_switch_optimizer_parameters",
    "get_fsdp2_grad_scaler",
    "get_parameters_from_modules",
    "load_fsdp_model",
    "load_fsdp_optimizer",
    "merge_fsdp_weights",
    "save_fsdp_model",
    "save_fsdp_optimizer",
]

_LOG = logging.getLogger(__name__.removeprefix("paceline.compat."))  # programs filter "accelerate"
_CHECKPOINTED = "_checkpoint_wrapped_module."
_COMPILED = "_orig_mod."


class Run(Protocol):
    """What these functions need of an `Accelerator`."""

    @property
    def process_index(self) -> int:
        """This rank."""
        ...

    @property
    def num_processes(self) -> int:
        """The number of ranks."""
        ...

    def wait_for_everyone(self) -> None:
        """Return when every rank has arrived."""
        ...


def enable_fsdp_ram_efficient_loading() -> None:
    """Let transformers load weights on rank 0 only."""
    os.environ.setdefault("ACCELERATE_USE_FSDP", "True")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "True"


def disable_fsdp_ram_efficient_loading() -> None:
    """Let transformers load weights on every rank."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "False"


def _is_whole(plugin: FullyShardedDataParallelPlugin) -> bool:
    return bool(plugin.state_dict_type.name == "FULL_STATE_DICT")


def _options(plugin: FullyShardedDataParallelPlugin, *, loads: bool = False) -> StateDictOptions:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    whole = _is_whole(plugin)
    return StateDictOptions(
        full_state_dict=whole,
        cpu_offload=whole and not loads,
        # Only rank 0 reads a file with everything.
        broadcast_from_rank0=whole and loads and PartialState().num_processes > 1,
        strict=False,
    )


class _Kind(NamedTuple):
    """What of a run is saved.

    Attributes:
        key: Its key in a file of shards.
        name: How its files and folders begin.
    """

    key: str
    name: str


_MODEL = _Kind("model", FSDP_MODEL_NAME)
_OPTIMIZER = _Kind("optimizer", OPTIMIZER_NAME)


def _named(folder: str | os.PathLike[str], stem: str, index: int, suffix: str) -> Path:
    return Path(folder, f"{stem}{suffix}" if index == 0 else f"{stem}_{index}{suffix}")


def _adapters_of(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """What of a state belongs to adapters: what is trained, and the modules that are saved beside them."""
    trained = {name.replace(_CHECKPOINTED, "") for name, p in model.named_parameters() if p.requires_grad}
    return {name: value for name, value in state.items() if name in trained or "modules_to_save" in name}


def _selected(model: nn.Module, state: dict[str, Any], adapter_only: bool) -> dict[str, Any]:
    return _adapters_of(model, state) if adapter_only and is_peft_model(model) else state


def save_fsdp_model(
    fsdp_plugin: FullyShardedDataParallelPlugin,
    accelerator: Run,
    model: nn.Module,
    output_dir: str | os.PathLike[str],
    model_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> None:
    """Write a model's weights, whole or in shards as the plugin says. Collective: every rank must call it.

    Args:
        fsdp_plugin: Says which.
        accelerator: Of the run.
        model: Prepared.
        output_dir: The folder.
        model_index: The number of the model.
        adapter_only: Leave out the frozen weights of a PEFT model.
        use_dcp: Only True: shards are written by torch.distributed.checkpoint.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    _require_dcp(use_dcp)
    state = _selected(model, get_model_state_dict(model, options=_options(fsdp_plugin)), adapter_only)
    _save(accelerator, state, _MODEL, output_dir, model_index, whole=_is_whole(fsdp_plugin))


def load_fsdp_model(
    fsdp_plugin: FullyShardedDataParallelPlugin,
    accelerator: Run,
    model: nn.Module,
    input_dir: str | os.PathLike[str],
    model_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> Any:
    """Read what `save_fsdp_model` wrote. Collective: every rank must call it.

    Args:
        fsdp_plugin: Says whether weights are whole or in shards.
        accelerator: Of the run.
        model: Prepared.
        input_dir: The folder.
        model_index: The number of the model.
        adapter_only: Whether the frozen weights of a PEFT model were left out.
        use_dcp: Only True.

    Returns:
        The names that are missing, and those that are not expected.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    _require_dcp(use_dcp)
    accelerator.wait_for_everyone()
    if _is_whole(fsdp_plugin):
        state = _load_whole(accelerator, _MODEL, input_dir, model_index)
    else:
        state = _selected(model, get_model_state_dict(model, options=_options(fsdp_plugin)), adapter_only)
        state = _load_shards(state, _MODEL, input_dir, model_index)
    return set_model_state_dict(model, state, options=_options(fsdp_plugin, loads=True))


def save_fsdp_optimizer(
    fsdp_plugin: FullyShardedDataParallelPlugin,
    accelerator: Run,
    optimizer: Any,
    model: nn.Module,
    output_dir: str | os.PathLike[str],
    optimizer_index: int = 0,
    use_dcp: bool = True,
) -> None:
    """Write an optimizer's state, whole or in shards as the plugin says. Collective: every rank must call it.

    Args:
        fsdp_plugin: Says which.
        accelerator: Of the run.
        optimizer: Prepared.
        model: Its model.
        output_dir: The folder.
        optimizer_index: The number of the optimizer.
        use_dcp: Only True.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    _require_dcp(use_dcp)
    state = get_optimizer_state_dict(model, _inner(optimizer), options=_options(fsdp_plugin))
    _save(accelerator, state, _OPTIMIZER, output_dir, optimizer_index, whole=_is_whole(fsdp_plugin))


def load_fsdp_optimizer(
    fsdp_plugin: FullyShardedDataParallelPlugin,
    accelerator: Run,
    optimizer: Any,
    model: nn.Module,
    input_dir: str | os.PathLike[str],
    optimizer_index: int = 0,
    adapter_only: bool = False,
    use_dcp: bool = True,
) -> None:
    """Read what `save_fsdp_optimizer` wrote. Collective: every rank must call it.

    Args:
        fsdp_plugin: Says whether the state is whole or in shards.
        accelerator: Of the run.
        optimizer: Prepared.
        model: Its model.
        input_dir: The folder.
        optimizer_index: The number of the optimizer.
        adapter_only: Accepted: the state holds what the optimizer updates.
        use_dcp: Only True.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    _require_dcp(use_dcp)
    accelerator.wait_for_everyone()
    inner = _inner(optimizer)
    if _is_whole(fsdp_plugin):
        state = _load_whole(accelerator, _OPTIMIZER, input_dir, optimizer_index)
    else:
        state = get_optimizer_state_dict(model, inner, options=_options(fsdp_plugin))
        state = _load_shards(state, _OPTIMIZER, input_dir, optimizer_index)
    set_optimizer_state_dict(model, inner, state, options=_options(fsdp_plugin, loads=True))


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def _require_dcp(use_dcp: bool) -> None:
    if not use_dcp:
        raise InvalidValueError(
            "use_dcp=False was passed",
            "Shards are written by torch.distributed.checkpoint, which any number of ranks can read",
            "Leave it out",
        )


def _save(
    run: Run, state: dict[str, Any], kind: _Kind, output_dir: str | os.PathLike[str], index: int, *, whole: bool
) -> None:
    """Write a state: whole on rank 0, or each rank its shards."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    if whole and run.process_index == 0:
        torch.save(state, _named(output_dir, kind.name, index, ".bin"))
    elif not whole:
        _write_shards({kind.key: state}, Path(output_dir, f"{kind.name}_{index}"))
    run.wait_for_everyone()


def _load_whole(run: Run, kind: _Kind, input_dir: str | os.PathLike[str], index: int) -> dict[str, Any]:
    """Read a whole state on rank 0; other ranks get theirs from it when it is set."""
    if run.process_index > 0:
        return {}
    state: dict[str, Any] = torch.load(
        _named(input_dir, kind.name, index, ".bin"), map_location="cpu", weights_only=True
    )
    return state


def _load_shards(state: dict[str, Any], kind: _Kind, input_dir: str | os.PathLike[str], index: int) -> dict[str, Any]:
    """Read this rank's shards into a state; the folder is that of the run's checkpoint, or the shards' own."""
    folder = Path(input_dir)
    if kind.name not in folder.name:
        folder = folder / f"{kind.name}_{index}"
    read: dict[str, Any] = _read_shards({kind.key: state}, folder)[kind.key]
    return read


def _checkpoint_module() -> Any:
    # On first use: importing it takes half a second. Torch does not mark its names as exported.
    return import_module("torch.distributed.checkpoint")


def _write_shards(state: dict[str, Any], folder: Path) -> None:
    dcp = _checkpoint_module()
    folder.mkdir(parents=True, exist_ok=True)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), planner=dcp.DefaultSavePlanner())


def _read_shards(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    dcp = _checkpoint_module()
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), planner=dcp.DefaultLoadPlanner())
    return state


def merge_fsdp_weights(
    checkpoint_dir: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
    remove_checkpoint_dir: bool = False,
) -> None:
    """Write a sharded model as one file, on rank 0.

    Args:
        checkpoint_dir: The folder with the shards.
        output_path: The folder for the file.
        safe_serialization: Write safetensors; else a file of torch.
        remove_checkpoint_dir: Delete the shards afterwards.

    Raises:
        InvalidValueError: There are no shards.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from paceline.compat.accelerate.utils.other import save

    folder, output = Path(checkpoint_dir), Path(output_path)
    if not (folder / ".metadata").exists():
        inner = [each.name for each in folder.iterdir() if (each / ".metadata").exists()] if folder.exists() else []
        hint = f"Pass one of its folders: {', '.join(inner)}" if inner else "Pass the folder with the .distcp files"
        raise InvalidValueError(f"{folder} holds no shards", "There is no .metadata file in it", hint)
    state = PartialState()
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        whole = output / WEIGHTS_NAME
        dcp_to_torch_save(folder, whole)
        weights = torch.load(whole, map_location="cpu", weights_only=True)
        weights = weights.get("model", weights)
        if safe_serialization:
            save(weights, output / SAFE_WEIGHTS_NAME, safe_serialization=True)
            whole.unlink()
        else:
            torch.save(weights, whole)
        if remove_checkpoint_dir:
            shutil.rmtree(folder)
    state.wait_for_everyone()


def ensure_weights_retied(
    param_init_fn: Callable[[nn.Module], Any], model: nn.Module, device: torch.device
) -> Callable[[nn.Module], Any]:
    """Return a function that gives modules memory, and keeps tied weights tied.

    Args:
        param_init_fn: Gives one module memory.
        model: Whose weights may be tied.
        device: Accepted.
    """
    ties: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            ties.setdefault(id(parameter), []).append((module, name))
    shared = [owners for owners in ties.values() if len(owners) > 1]

    def initialize(module: nn.Module) -> Any:
        result = param_init_fn(module)
        for owners in shared:
            for owner, name in owners:
                if owner is module:
                    for other, other_name in owners:
                        setattr(other, other_name, getattr(module, name))
        return result

    return initialize


def fsdp2_canonicalize_names(named_params: dict[str, Any]) -> dict[str, Any]:
    """Return parameters under the names that they have in the program's own module."""
    return {name.replace(_CHECKPOINTED, "").replace(_COMPILED, ""): value for name, value in named_params.items()}


def get_parameters_from_modules(
    modules: str | Iterable[nn.Module] | None, model: nn.Module, device: torch.device
) -> set[nn.Parameter]:
    """Return the parameters of modules, on a device: those that FSDP leaves whole.

    Args:
        modules: Modules, or a pattern that matches the whole name of modules.
        model: Contains them.
        device: Where the modules are moved to.
    """
    import re

    if modules is None:
        return set()
    chosen: list[nn.Module] = []
    if isinstance(modules, str):
        chosen = [module for name, module in model.named_modules() if re.fullmatch(modules, name)]
    else:
        chosen = list(modules)
    return {parameter for module in chosen for parameter in module.to(device).parameters()}


def fsdp2_load_full_state_dict(
    accelerator: Run, model: nn.Module, full_sd: dict[str, Any], cpu_offload: bool = False
) -> None:
    """Give a sharded model rank 0's whole weights. Collective: every rank must call it.

    Args:
        accelerator: Of the run.
        model: Sharded.
        full_sd: The weights, on rank 0.
        cpu_offload: Whether the shards are in host memory.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1, strict=False)
    set_model_state_dict(model, copy.copy(full_sd), options=options)


def get_fsdp2_grad_scaler(**kwargs: Any) -> torch.amp.GradScaler:
    """Return a loss scaler."""
    return torch.amp.GradScaler(**kwargs)


_sharded_in_prepare = unsupported(
    "paceline shards a model and its optimizer in prepare()", "Call accelerator.prepare(model, optimizer)"
)


def fsdp2_prepare_model(accelerator: Any, model: nn.Module) -> nn.Module:
    """Shard a model that has no optimizer of its own in this run, such as a reference model, in place.

    Collective: every rank must call it.

    Args:
        accelerator: Of the run. Its plugin says what is a unit, how it computes, and whether rank 0 alone has weights.
        model: Whole, or sharded already.

    Returns:
        The model itself.

    Raises:
        InvalidValueError: The plugin is for version 1 of FSDP.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(getattr(model, "_orig_mod", model), FSDPModule):
        return model
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 1:
        raise InvalidValueError(
            "fsdp2_prepare_model was called with a plugin for version 1 of FSDP",
            "The settings of the two differ",
            "Write fsdp_version: 2, or call accelerator.prepare_model(model)",
        )
    if accelerator.mixed_precision != "no":
        _keep_in_fp32(model)
    if not plugin.cpu_ram_efficient_loading:
        _shard(accelerator, model)
        return model
    weights = model.state_dict()
    unsaved = get_non_persistent_buffers(model, recurse=True, fqns=True)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name in unsaved}
    # Whatever the other ranks hold is replaced by rank 0's values; meanwhile nobody needs memory for it.
    model = model.to(torch.device("meta"))
    _tie(model)
    _shard(accelerator, model)
    is_on_host = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
    fsdp2_load_full_state_dict(accelerator, model, weights, cpu_offload=is_on_host)
    for name, buffer in buffers.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner).register_buffer(key, buffer.to(accelerator.device), persistent=False)
    _tie(model)
    return model


def rebind(optimizer: Any, before: dict[str, Any], after: dict[str, Any], model: nn.Module) -> None:
    """Let an optimizer update the parameters of a model that has been sharded.

    Args:
        optimizer: Of the parameters before, without a state.
        before: Parameters by name.
        after: The same of the sharded model.
        model: Whose they are.

    Raises:
        InvalidValueError: The name of a tied weight is gone.
        MissingKeyError: Another name is gone.
    """
    missing = [name for name in before if name not in after]
    config = getattr(model, "config", None)
    tied = {"lm_head.weight", *(getattr(model, "_tied_weights_keys", None) or ())}
    if tied.intersection(missing) and getattr(config, "tie_word_embeddings", False):
        raise InvalidValueError(
            f"FSDP2 mapping failed: the model has lost {', '.join(missing)}",
            "It has tied embeddings, and sharding leaves one name of a tensor with two",
            "Set model.config.tie_word_embeddings = False, or tie the weights before the optimizer is made",
        )
    if missing:
        raise MissingKeyError(
            f"Parameters missing after FSDP2 wrapping: {', '.join(missing)}",
            "The optimizer would go on with parameters that nothing reads",
            "Make the optimizer from model.parameters(), of the model that is prepared",
        )
    renewed = {id(parameter): after[name] for name, parameter in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [renewed.get(id(parameter), parameter) for parameter in group["params"]]


def _tie(model: nn.Module) -> None:
    """Tie the weights of a model of transformers again."""
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def _keep_in_fp32(model: nn.Module) -> None:
    """Hold what is trained in fp32: the policy computes in 16 bits. Units must have parameters of one dtype."""
    from torch.distributed.tensor import DTensor

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad or parameter.dtype == torch.float32:
                continue
            whole = parameter.detach().to(torch.float32)
            if isinstance(parameter, DTensor):
                # Its dtype cannot be changed in place.
                setattr(module, name, nn.Parameter(whole))
            else:
                parameter.data = whole


def _shard(accelerator: Any, model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    options: dict[str, Any] = {
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
    }
    if plugin.cpu_offload is not None:
        options["offload_policy"] = plugin.cpu_offload
    if plugin.ignored_modules is not None:
        options["ignored_params"] = get_parameters_from_modules(plugin.ignored_modules, model, accelerator.device)
    plugin.set_auto_wrap_policy(model)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
    units = [] if is_unit is None else [module for module in model.modules() if module is not model and is_unit(module)]
    # Inner ones first: what they hold is no longer the outer one's.
    for module in reversed(units):
        if not isinstance(module, FSDPModule):
            fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(model, **options)


@_sharded_in_prepare
def fsdp2_apply_ac(accelerator: Run, model: nn.Module) -> nn.Module:
    """Not supported: the plugin says whether activations are recomputed."""
    raise NotImplementedError


@_sharded_in_prepare
def fsdp2_switch_optimizer_parameters(optimizer: Any, mapping: dict[Any, Any]) -> None:
    """Not supported: see `Accelerator.prepare`."""
    raise NotImplementedError


def fsdp2_prepare_auto_wrap_policy(
    fsdp2_plugin: FullyShardedDataParallelPlugin, model: nn.Module
) -> Callable[[nn.Module], bool] | None:
    """Return a function that says whether a module is a unit; None where the model is the only one.

    Args:
        fsdp2_plugin: With a policy that `set_auto_wrap_policy` has bound, or a function of the program.
        model: Contains the modules.
    """
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    policy: Any = fsdp2_plugin.auto_wrap_policy
    bound = getattr(policy, "keywords", {})
    if policy is None:
        return None
    if getattr(policy, "func", policy) is transformer_auto_wrap_policy:
        classes = tuple(bound["transformer_layer_cls"])
        return lambda module: isinstance(module, classes)
    if getattr(policy, "func", policy) is size_based_auto_wrap_policy:
        least = bound["min_num_params"]
        return lambda module: sum(p.numel() for p in module.parameters()) >= least
    # FSDP's own contract: called with recurse=False, a policy says whether a module is wrapped.
    return lambda module: bool(policy(module, False, sum(p.numel() for p in module.parameters())))
