"""Calls of Accelerate's functions whose results its twin must equal; run as a program it records the former's.

python -m tests.compat.twin_cases
torchrun --nproc-per-node 2 -m tests.compat.twin_cases
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import os
import random
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

REAL = "accelerate"
TWIN = "paceline.compat.accelerate"
RECORDED = Path(__file__).parents[1] / "data" / "compat"

Case = Callable[["Package"], Any]


class Pair(NamedTuple):
    first: Any
    second: Any


class Package:
    """Accelerate or its twin, as one of several ranks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = self.module("state").PartialState(cpu=True)
        self.rank: int = self.state.process_index
        self.size: int = self.state.num_processes

    def module(self, name: str) -> Any:
        return import_module(f"{self.name}.{name}")

    @property
    def utils(self) -> Any:
        return self.module("utils")

    def vector(self, length: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.arange(length) + 10 * self.rank).to(dtype)


def outcomes(package: str) -> dict[str, Any]:
    """The result of every case, as JSON; the kind of error where it raised one."""
    states = import_module(f"{package}.state")
    for state in (states.AcceleratorState, states.PartialState, states.GradientState):
        state._reset_state()
    saved = dict(os.environ)
    try:
        size = Package(package).size
        return {name: _outcome(case, Package(package)) for name, case in CASES.items() if size == 1 or name in ON_RANKS}
    finally:
        states.PartialState._reset_state()
        os.environ.clear()
        os.environ.update(saved)


def _outcome(case: Case, package: Package) -> Any:
    torch.manual_seed(package.rank)
    try:
        return encoded(case(package))
    except Exception as error:
        kinds = (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, ImportError)
        return {"error": next((kind.__name__ for kind in kinds if isinstance(error, kind)), type(error).__name__)}


def encoded(value: Any) -> Any:
    """A result as JSON, with the types of containers and the dtypes of tensors."""
    if isinstance(value, torch.Tensor):
        numbers = value.detach().double() if value.is_floating_point() else value
        return {"tensor": str(value.dtype), "shape": list(value.shape), "values": numbers.tolist()}
    if isinstance(value, enum.Enum):
        return {"member": value.name, "value": value.value}
    if isinstance(value, Mapping):
        entries = {str(key): encoded(each) for key, each in value.items()}
        return entries if type(value) is dict else {type(value).__name__: entries}
    if isinstance(value, tuple | list | set):
        entries_ = [encoded(each) for each in (sorted(value, key=str) if isinstance(value, set) else value)]
        return entries_ if type(value) is list else {type(value).__name__: entries_}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: encoded(getattr(value, each.name)) for each in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__name__", None) or f"<{type(value).__name__}>"


CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def each(*choices: Any) -> Callable[[Callable[[Package, Any], Any]], Callable[[Package, Any], Any]]:
    """Register one case for each choice."""

    def register(function: Callable[[Package, Any], Any]) -> Callable[[Package, Any], Any]:
        for index, choice in enumerate(choices):
            CASES[f"{function.__name__}[{index}]"] = partial(_call, function, choice)
        return function

    return register


# Operations

NESTED: dict[str, Callable[[Package], Any]] = {
    "scalar": lambda p: torch.tensor(float(p.rank)),
    "vector": lambda p: p.vector(),
    "bf16": lambda p: p.vector(dtype=torch.bfloat16),
    "bool": lambda p: p.vector() > 5,
    "int16": lambda p: p.vector(dtype=torch.int16),
    "matrix": lambda p: p.vector(6).reshape(2, 3),
    "dict": lambda p: {"a": p.vector(), "b": {"c": p.vector(2)}},
    "tuple": lambda p: (p.vector(), [p.vector(2)]),
    "namedtuple": lambda p: Pair(p.vector(), p.vector(1)),
    "ordered": lambda p: collections.OrderedDict(z=p.vector(), a=p.vector(1)),
    "empty": lambda p: torch.zeros(0, 3),
    "text": lambda p: {"a": p.vector(), "b": "text"},
    "list of text": lambda p: ["a", "b"],
}


def nested(function: Callable[[Package, Any], Any]) -> Callable[[Package, Any], Any]:
    """Register one case for each nested batch."""
    for name, make in NESTED.items():
        CASES[f"{function.__name__}[{name}]"] = partial(_call_nested, function, make)
    return function


def _call(function: Callable[[Package, Any], Any], choice: Any, package: Package) -> Any:
    return function(package, choice)


def _call_nested(function: Callable[[Package, Any], Any], make: Case, package: Package) -> Any:
    return function(package, make(package))


@nested
def gather(p: Package, data: Any) -> Any:
    return p.utils.gather(data)


@nested
def broadcast(p: Package, data: Any) -> Any:
    return p.utils.broadcast(data, from_process=p.size - 1)


@nested
def reduce_default(p: Package, data: Any) -> Any:
    return p.utils.reduce(data)


@each("sum", "mean", "max")
def reduce_floats(p: Package, reduction: str) -> Any:
    return p.utils.reduce({"a": p.vector(), "b": [p.vector(2) * 0.5]}, reduction)


@each("sum", "max", "none")
def reduce_integers(p: Package, reduction: str) -> Any:
    return p.utils.reduce(p.vector(dtype=torch.int64), reduction)


@case
def reduce_scaled(p: Package) -> Any:
    return p.utils.reduce(p.vector(), "sum", scale=3.0)


@case
def reduce_leaves_the_input(p: Package) -> Any:
    data = p.vector()
    p.utils.reduce(data, "sum")
    return data


@each([1, 2], [], ["a", {"b": 1}], (1, 2), {"k": 1, "l": 2}, "text")
def gather_object(p: Package, value: Any) -> Any:
    return p.utils.gather_object(value)


@case
def gather_object_uneven(p: Package) -> Any:
    return p.utils.gather_object(["x"] * (p.rank + 1))


@case
def broadcast_object_list(p: Package) -> Any:
    objects = [p.rank, f"rank {p.rank}", None]
    same = p.utils.broadcast_object_list(objects, from_process=p.size - 1)
    return same, same is objects


@each({}, {"pad_index": -100}, {"pad_first": True, "pad_index": 7}, {"dim": 1}, {"dim": -1}, {"dim": 5}, {"dim": -5})
def pad_across_processes(p: Package, options: dict[str, Any]) -> Any:
    rows = torch.arange(2.0 * (p.rank + 1)).reshape(p.rank + 1, 2)
    return p.utils.pad_across_processes({"a": rows, "b": (rows.T, torch.tensor(1.0))}, **options)


@case
def pad_text(p: Package) -> Any:
    return p.utils.pad_across_processes({"a": "text"})


@case
def copy_tensor_to_devices(p: Package) -> Any:
    return p.utils.copy_tensor_to_devices(p.vector() if p.rank == 0 else None)


@nested
def send_to_device(p: Package, data: Any) -> Any:
    return p.utils.send_to_device(data, torch.device("cpu"))


@case
def send_to_device_skipping(p: Package) -> Any:
    data = {"a": torch.ones(1), "b": {"a": torch.ones(2), "c": torch.ones(3)}}
    moved = p.utils.send_to_device(data, "meta", skip_keys="a")
    return moved["a"].device.type, moved["b"]["a"].device.type, moved["b"]["c"].device.type


@nested
def convert_to_fp32(p: Package, data: Any) -> Any:
    return p.utils.convert_to_fp32(data)


@nested
def listify(p: Package, data: Any) -> Any:
    return p.utils.listify(data)


@nested
def get_data_structure(p: Package, data: Any) -> Any:
    described = p.utils.get_data_structure(data)
    return p.module("utils.operations").get_shape(p.utils.initialize_tensors(described))


@nested
def slice_tensors(p: Package, data: Any) -> Any:
    return p.utils.slice_tensors(data, slice(0, 1))


@nested
def concatenate(p: Package, data: Any) -> Any:
    return p.utils.concatenate([data, data])


@nested
def concatenate_one(p: Package, data: Any) -> Any:
    return p.utils.concatenate([data])


@nested
def find_batch_size(p: Package, data: Any) -> Any:
    return p.utils.find_batch_size(data)


@each([], {}, (), [[]], {"a": {}}, 3, "text", None, [torch.ones(2), "text"])
def find_batch_size_of_others(p: Package, data: Any) -> Any:
    return p.utils.find_batch_size(data)


@each([], {"a": "text"}, torch.ones(4))
def ignorant_find_batch_size(p: Package, data: Any) -> Any:
    return p.utils.ignorant_find_batch_size(data)


@nested
def find_device(p: Package, data: Any) -> Any:
    return str(p.utils.find_device(data))


@nested
def recursively_apply_strictly(p: Package, data: Any) -> Any:
    return p.utils.recursively_apply(lambda leaf, n: leaf + n, data, 2, error_on_other_type=True)


@case
def recursively_apply_to_text(p: Package) -> Any:
    data = {"a": "x", "b": [1, "y", torch.ones(1)]}
    return p.utils.recursively_apply(str.upper, data, test_type=lambda leaf: isinstance(leaf, str))


@each(*[(batch, ranks) for batch in range(1, 9) for ranks in (1, 2, 3, 4, 8)])
def pad_input_tensors(p: Package, sizes: tuple[int, int]) -> Any:
    return p.utils.pad_input_tensors(torch.ones(sizes[0], 2), *sizes)


@case
def honor_type(p: Package) -> Any:
    return [p.utils.honor_type(like, iter([1, 2])) for like in ([0], (0, 0), Pair(0, 0))]


@case
def convert_outputs_to_fp32(p: Package) -> Any:
    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": x.bfloat16(), "ids": x.long()}

    wrapped = p.utils.convert_outputs_to_fp32(forward)
    return wrapped(torch.ones(2)), wrapped.__wrapped__.model_forward is forward


# Random numbers


@each({}, {"device_specific": True})
def set_seed(p: Package, options: dict[str, Any]) -> Any:
    if p.name == REAL and options:
        p.module("accelerator").Accelerator(cpu=True)  # whose state must exist there
    p.utils.set_seed(11, **options)
    return random.random(), float(np.random.rand()), torch.rand(2)


@case
def synchronize_rng_states(p: Package) -> Any:
    if p.name == REAL:
        p.module("accelerator").Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(100 + p.rank)
    p.utils.synchronize_rng_states(["torch", "generator"], generator)
    return torch.rand(2), torch.rand(2, generator=generator)


@each("cuda", "nothing")
def synchronize_unknown(p: Package, kind: str) -> Any:
    p.utils.synchronize_rng_states([kind])


# The state


SPLITTABLE = {
    "list": list(range(5)),
    "short": ["a"],
    "empty": [],
    "tensor": torch.arange(5.0).reshape(5, 1),
    "dict": {"a": list("vwxyz"), "b": torch.arange(5)},
    "uneven dict": {"a": [1, 2], "b": [1]},
}


@each(*[(name, padded) for name in SPLITTABLE for padded in (False, True)])
def split_between_processes(p: Package, choice: tuple[str, bool]) -> Any:
    inputs = SPLITTABLE[choice[0]]
    inputs = dict(inputs) if isinstance(inputs, dict) else inputs
    with p.state.split_between_processes(inputs, apply_padding=choice[1]) as part:
        return part


@case
def state_values(p: Package) -> Any:
    names = [
        "backend",
        "debug",
        "distributed_type",
        "fork_launched",
        "is_last_process",
        "is_local_main_process",
        "is_main_process",
    ]
    names += ["local_process_index", "num_processes", "process_index", "use_distributed", "initialized"]
    return {name: getattr(p.state, name) for name in names}, str(p.state.device), repr(p.state)


@case
def state_decorators(p: Package) -> Any:
    def who() -> str:
        return f"rank {p.rank}"

    state = p.state
    return [
        state.on_main_process(who)(),
        state.on_local_main_process(who)(),
        state.on_last_process(who)(),
        state.on_process(who, process_index=0)(),
        state.on_process(process_index=1)(who)(),
        state.on_local_process(who, local_process_index=0)(),
    ]


@case
def state_order(p: Package) -> Any:
    with p.state.main_process_first():
        pass
    with p.state.local_main_process_first():
        pass
    p.state.wait_for_everyone()
    return True


@case
def state_without_accelerator(p: Package) -> Any:
    p.module("state").AcceleratorState._reset_state()
    return p.module("state").AcceleratorState()


@case
def gradient_state(p: Package) -> Any:
    module, plugin = p.module("state"), p.utils.GradientAccumulationPlugin
    module.GradientState._reset_state()
    state = module.GradientState()
    before = repr(state), state.num_steps, state.adjust_scheduler, state.sync_with_dataloader, state.remainder
    module.GradientState(plugin(num_steps=4, adjust_scheduler=False))

    class Loader:
        end_of_dataloader, remainder = True, 3

    loader, inner = Loader(), Loader()
    state._add_dataloader(loader)
    state._add_dataloader(inner)
    during = (
        state.end_of_dataloader,
        state.remainder,
        state.active_dataloader is inner,
        len(state.dataloader_references),
    )
    state._remove_dataloader(inner)
    del loader
    after = state.in_dataloader, state.end_of_dataloader, state.num_steps, state.plugin_kwargs
    state._set_sync_gradients(False)
    answer = before, during, after, module.GradientState().sync_gradients
    module.GradientState._reset_state()
    return answer, module.GradientState._shared_state


# All that follows does not depend on the number of ranks.
ON_RANKS = frozenset(CASES)

# Handlers and plugins


@case
def enumerations(p: Package) -> Any:
    u = p.utils
    return [
        "no" in u.PrecisionType,
        "INDUCTOR" in u.DynamoBackend,
        "nothing" in u.LoggerType,
        u.DistributedType.FSDP == "FSDP",
        str(u.DistributedType.FSDP),
        str(u.LoggerType.WANDB),
        u.LoggerType.list(),
        u.DynamoBackend.INDUCTOR == "INDUCTOR",
        u.PrecisionType("bf16"),
        f"{u.DistributedType.MULTI_CPU.value}",
    ]


HANDLERS = {
    "AutocastKwargs": {"enabled": False},
    "DistributedDataParallelKwargs": {"find_unused_parameters": True, "comm_hook": "fp16", "bucket_cap_mb": 5},
    "GradScalerKwargs": {"init_scale": 2.0, "enabled": False},
    "InitProcessGroupKwargs": {"backend": "gloo"},
    "ProfileKwargs": {"with_flops": True, "output_trace_dir": "traces"},
    "GradientAccumulationPlugin": {"num_steps": 3, "sync_each_batch": True},
    "TorchDynamoPlugin": {"backend": "inductor", "use_regional_compilation": True, "dynamic": True},
}


@each(*[(name, kwargs) for name, given in HANDLERS.items() for kwargs in ({}, given)])
def handlers(p: Package, choice: tuple[str, dict[str, Any]]) -> Any:
    handler = getattr(p.utils, choice[0])(**choice[1])
    kwargs, fields = handler.to_kwargs(), handler.to_dict()
    return {name: str(value) for name, value in kwargs.items()}, {name: str(value) for name, value in fields.items()}


@each({}, {"backend": None, "mode": None}, {"backend": "eager"}, {"disable": True})
def dynamo_from_environment(p: Package, kwargs: dict[str, Any]) -> Any:
    with p.utils.patch_environment(
        accelerate_dynamo_backend="AOT_EAGER",
        accelerate_dynamo_mode="max-autotune",
        accelerate_dynamo_use_dynamic="true",
        accelerate_dynamo_use_fullgraph="1",
    ):
        plugin = p.utils.TorchDynamoPlugin(**kwargs)
        return plugin, plugin.to_kwargs()


@case
def project(p: Package) -> Any:
    config = p.utils.ProjectConfiguration(project_dir="a")
    other = p.utils.ProjectConfiguration(project_dir="a", logging_dir="b")
    other.set_directories("c")
    return config, other


@case
def data_loader_configuration(p: Package) -> Any:
    config = p.utils.DataLoaderConfiguration()
    config.data_seed = 7
    config.dispatch_batches = True
    return config


PARALLEL: tuple[dict[str, Any], ...] = (
    {},
    {"dp_shard_size": 4},
    {"dp_replicate_size": 2, "dp_shard_size": 2},
    {"cp_size": 2, "dp_shard_size": 2},
    {"sp_size": 2},
    {"dp_shard_size": 0},
    {"cp_size": 2, "sp_size": 2},
    {"cp_size": 2, "dp_replicate_size": 2},
    {"cp_backend": "other"},
)


@each(*PARALLEL)
def parallelism(p: Package, kwargs: dict[str, Any]) -> Any:
    config = p.utils.ParallelismConfig(**kwargs)
    names = "dp_dim_names non_dp_dim_names dp_shard_cp_dim_names dp_cp_dim_names fsdp_dim_names active_mesh_dims"
    names += " total_size data_parallel_size non_data_parallel_size dp_replicate_enabled dp_shard_enabled tp_enabled"
    names += " cp_enabled sp_enabled device_mesh cp_backend sp_backend cp_handler sp_handler tp_handler"
    return {name: getattr(config, name) for name in names.split()}


@case
def parallelism_from_environment(p: Package) -> Any:
    names = {"dp_shard_size": 2, "cp_size": 2, "cp_comm_strategy": "alltoall"}
    with p.utils.patch_environment(**{f"parallelism_config_{name}": value for name, value in names.items()}):
        config = p.utils.ParallelismConfig()
        return config.dp_shard_size, config.cp_size, config.cp_handler.cp_comm_strategy


FSDP: tuple[dict[str, Any], ...] = (
    {},
    {"fsdp_version": 2},
    {"fsdp_version": 2, "reshard_after_forward": False, "cpu_offload": True},
    {"fsdp_version": 2, "reshard_after_forward": "false", "state_dict_type": "FULL_STATE_DICT"},
    {"fsdp_version": 2, "mixed_precision_policy": "bf16"},
    {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Block"]},
    {"fsdp_version": 2, "auto_wrap_policy": "size_based_wrap", "min_num_params": 10},
    {"fsdp_version": 2, "auto_wrap_policy": "nothing"},
    {"fsdp_version": 2, "state_dict_type": "LOCAL_STATE_DICT"},
    {"fsdp_version": 2, "forward_prefetch": True},
    {"fsdp_version": 2, "reshard_after_forward": 2},
    {"fsdp_version": 2, "sharding_strategy": "FULL_SHARD"},
    {"fsdp_version": 2, "activation_checkpointing_offload": True},
    {"fsdp_version": 2, "activation_checkpointing_offload": True, "activation_checkpointing": True},
    {"fsdp_version": 1, "sharding_strategy": "SHARD_GRAD_OP", "backward_prefetch": "BACKWARD_POST"},
    {"fsdp_version": 1, "sharding_strategy": "HYBRID_SHARD_ZERO2", "backward_prefetch": "no_prefetch"},
    {"fsdp_version": 1, "sharding_strategy": "2", "state_dict_type": "SHARDED_STATE_DICT"},
    {"fsdp_version": 1, "mixed_precision_policy": "fp16", "use_orig_params": True},
    {"fsdp_version": 1, "reshard_after_forward": True},
    {"fsdp_version": 2, "mixed_precision_policy": {"param_dtype": torch.bfloat16}},
    {"fsdp_version": 2, "mixed_precision_policy": "fp4"},
)


@each(*FSDP)
def fsdp_plugin(p: Package, kwargs: dict[str, Any]) -> Any:
    return p.utils.FullyShardedDataParallelPlugin(**kwargs)


@case
def fsdp_from_environment(p: Package) -> Any:
    values = {
        "version": 2,
        "reshard_after_forward": "false",
        "offload_params": "true",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_cls_to_wrap": "Block,Other",
        "state_dict_type": "FULL_STATE_DICT",
        "activation_checkpointing": "true",
        "cpu_ram_efficient_loading": "true",
        "ignored_modules": "head.*",
    }
    with p.utils.patch_environment(**{f"fsdp_{name}": value for name, value in values.items()}):
        return p.utils.FullyShardedDataParallelPlugin()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)


class Model(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(3), persistent=False)


@each("transformer_based_wrap", "size_based_wrap", "no_wrap")
def fsdp_set_auto_wrap_policy(p: Package, policy: str) -> Any:
    plugin = p.utils.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy, min_num_params=9)
    plugin.set_auto_wrap_policy(Model())
    bound = plugin.auto_wrap_policy
    if bound is None:
        return None
    return bound.func.__name__, bound.keywords.get("min_num_params"), bound.keywords.get("transformer_layer_cls")


@each(("bf16", False), ("fp16", True), (torch.float32, True), ("fp8", True), ("int8", True))
def fsdp_set_mixed_precision(p: Package, choice: Any) -> Any:
    answers = []
    for version in (1, 2):
        plugin = p.utils.FullyShardedDataParallelPlugin(fsdp_version=version, mixed_precision_policy="fp32")
        plugin.set_mixed_precision(choice[0], override=choice[1])
        answers.append(plugin.mixed_precision_policy)
    return answers


ZERO = {"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}, "gradient_clipping": "auto"}
DEEPSPEED: tuple[dict[str, Any], ...] = (
    {},
    {"zero_stage": 3, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0},
    {"zero_stage": 3, "offload_param_device": "nvme", "offload_param_nvme_path": "disk"},
    {"zero_stage": 1, "zero3_init_flag": False, "zero3_save_16bit_model": True},
    {"hf_ds_config": ZERO},
    {"hf_ds_config": json.dumps(ZERO)},
    {"hf_ds_config": ZERO, "offload_param_device": "cpu", "gradient_clipping": 0.5},
    {"hf_ds_config": {"fp16": {"enabled": "auto"}}},
    {"hf_ds_config": "no/such/file.json"},
)


def _deepspeed_fields(plugin: Any) -> Any:
    names = "gradient_accumulation_steps gradient_clipping zero_stage offload_optimizer_device offload_param_device"
    names += " offload_param_nvme_path zero3_init_flag zero3_save_16bit_model selected deepspeed_config"
    return {name: getattr(plugin, name) for name in names.split()}


@each(*DEEPSPEED)
def deepspeed_plugin(p: Package, kwargs: dict[str, Any]) -> Any:
    return _deepspeed_fields(p.utils.DeepSpeedPlugin(**kwargs))


@case
def deepspeed_from_environment(p: Package) -> Any:
    names = {
        "zero_stage": 3,
        "offload_optimizer_device": "cpu",
        "zero3_init": "false",
        "zero3_save_16bit_model": "true",
    }
    values = {f"accelerate_deepspeed_{name}": value for name, value in names.items()}
    with p.utils.patch_environment(
        **values, accelerate_gradient_clipping="0.3", accelerate_gradient_accumulation_steps=4
    ):
        return _deepspeed_fields(p.utils.DeepSpeedPlugin())


@each("no", "fp16", "bf16", "fp8")
def deepspeed_precision(p: Package, precision: str) -> Any:
    answers: list[Any] = []
    for config in ({}, {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, {"bf16": {"enabled": True}}):
        plugin = p.utils.DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}, **config})
        try:
            plugin.set_mixed_precision(precision)
        except ValueError:
            answers.append("refused")
        else:
            answers.append({name: plugin.deepspeed_config.get(name) for name in ("fp16", "bf16")})
    return answers


@case
def deepspeed_filling(p: Package) -> Any:
    config = {"zero_optimization": {"stage": 2}, "optimizer": {"params": {"lr": "auto", "eps": 1e-8}}}
    plugin = p.utils.DeepSpeedPlugin(hf_ds_config=config)
    is_auto = plugin.is_auto("optimizer.params.lr"), plugin.is_auto("nothing.here")
    plugin.deepspeed_config_process(**{"optimizer.params.lr": 0.1, "optimizer.params.eps": 1e-8})
    refused = []
    try:
        plugin.deepspeed_config_process(**{"optimizer.params.eps": 1e-3})
    except ValueError:
        refused.append("mismatch")
    plugin.hf_ds_config.config["optimizer"]["params"]["lr"] = "auto"
    try:
        plugin.fill_match("optimizer.params.lr")
    except ValueError:
        refused.append("auto")
    return is_auto, plugin.get_value("optimizer.params.eps"), plugin.get_value("x.y", 5), refused


@case
def deepspeed_file(p: Package) -> Any:
    make = type(p.utils.DeepSpeedPlugin().hf_ds_config)
    config = make({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "a": {"b": False, "c": 1}})
    answers = [config.is_zero2(), config.is_zero3(), config.is_offload(), config.get_value("a.x", 4)]
    answers += [config.is_true("a.c"), config.is_true("a.b"), config.is_false("a.b"), config.is_false("a.x")]
    answers += [config.find_config_node("a.b"), config.find_config_node("z.b")]
    config.del_config_sub_tree("a.b")
    config.del_config_sub_tree("q.r")
    try:
        config.del_config_sub_tree("q.r", must_exist=True)
    except ValueError:
        answers.append("missing")
    return [*answers, config.config]


# Models, memory, and the rest


@each(3, "5MB", "1.5GiB", "10KB", "2gb", "7 GB", "GB", "-1KB", "ten")
def convert_file_size_to_int(p: Package, size: Any) -> Any:
    return p.utils.convert_file_size_to_int(size)


@each(torch.float32, torch.bfloat16, torch.bool, torch.int8, torch.float8_e4m3fn, torch.int64)
def dtype_byte_size(p: Package, dtype: torch.dtype) -> Any:
    return p.utils.dtype_byte_size(dtype)


@case
def sizes(p: Package) -> Any:
    model, u = Model(), p.utils
    everything = u.compute_module_sizes(model)
    children = list(model.named_children())
    return [
        dict(everything),
        dict(u.compute_module_sizes(model, dtype="float16")),
        dict(u.compute_module_sizes(model, special_dtypes={"embedding.weight": torch.float16})),
        u.get_max_layer_size(children, everything, []),
        u.get_max_layer_size(children, everything, ["Block"]),
        u.calculate_maximum_sizes(model),
    ]


@case
def names_of_tensors(p: Package) -> Any:
    model, u = Model(), p.utils
    modeling = p.module("utils.modeling")
    tied = u.find_tied_parameters(model)
    model.head.weight = nn.Parameter(torch.zeros(5, 4))
    u.retie_parameters(model, tied)
    options: tuple[dict[str, Any], ...] = (
        {},
        {"recurse": True},
        {"recurse": True, "include_buffers": False},
        {"recurse": True, "remove_non_persistent": True},
    )
    return [
        tied,
        model.head.weight is model.embedding.weight,
        *[[name for name, _ in u.named_module_tensors(model, **each)] for each in options],
        modeling.get_non_persistent_buffers(model),
        p.module("utils.dataclasses").get_module_class_from_name(model, "Block"),
        p.module("utils.dataclasses").get_module_class_from_name(model, "Nothing"),
        [type(module).__name__ for module in u.get_module_children_bottom_up(model)],
        [name for name, _ in u.get_module_children_bottom_up(model, return_fqns=True)],
        u.id_tensor_storage(model.head.weight) == u.id_tensor_storage(model.embedding.weight),
        u.has_offloaded_params(model),
        u.model_has_dtensor(model),
        u.is_peft_model(model),
    ]


@each(
    {"a.b": 0, "a.c": 0, "d": 0},
    {"a.b": 0, "a.c": 0, "d": 1},
    {"a.b.x": 0, "a.b.y": 0, "a.c": "cpu", "d.e": "disk", "d.f": "disk"},
    {"": 0},
    {},
)
def clean_device_map(p: Package, device_map: dict[str, Any]) -> Any:
    cleaned = p.module("utils.modeling").clean_device_map(dict(device_map))
    return dict(sorted(cleaned.items()))


@each({0: "1GB", "cpu": 5}, {0: 0.5, "cpu": 1.5}, {"cpu": "2MB", 1: 3, "disk": 4}, {"tpu": 1})
def get_max_memory(p: Package, given: dict[Any, Any]) -> Any:
    return list(p.utils.get_max_memory(given).items())


@case
def max_memory_of_this_machine(p: Package) -> Any:
    return list(p.utils.get_max_memory())


@case
def extract_model(p: Package) -> Any:
    model = Model()
    extract = p.utils.extract_model_from_parallel
    wrapped = nn.DataParallel(model)
    answers = [extract(model) is model, extract(wrapped) is model, extract(nn.Sequential(wrapped))[0] is wrapped]
    return [*answers, extract(nn.Sequential(wrapped), recursive=True)[0] is model]


@case
def state_dict_without_aliases(p: Package) -> Any:
    shared = torch.arange(4.0)
    given = {"a": shared, "b": shared, "c": shared.reshape(2, 2).T}
    return p.utils.clean_state_dict_for_safetensors(given)


def _executable(p: Package, fits: int, error: Exception, **options: Any) -> Any:
    tried = []

    def run(batch_size: int, offset: int) -> int:
        tried.append(batch_size)
        if batch_size > fits:
            raise error
        return batch_size + offset

    runs = p.utils.find_executable_batch_size(starting_batch_size=8, **options)(run)
    return [runs(1), runs(2), tried]


OUT_OF_MEMORY = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


@each(
    (6, OUT_OF_MEMORY),
    (-1, OUT_OF_MEMORY),
    (6, RuntimeError("something else")),
    (6, ValueError("CUDA out of memory.")),
    (6, RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.")),
)
def find_executable_batch_size(p: Package, choice: tuple[int, Exception]) -> Any:
    return _executable(p, *choice)


@case
def find_executable_batch_size_by_function(p: Package) -> Any:
    smaller = iter([7, 5, 3])
    return _executable(p, 4, OUT_OF_MEMORY, reduce_batch_size_fn=lambda: next(smaller))


@case
def find_executable_batch_size_misused(p: Package) -> Any:
    return p.utils.find_executable_batch_size(lambda batch_size: batch_size)(32)


@case
def release_memory(p: Package) -> Any:
    return p.utils.release_memory(torch.ones(1), "x"), p.utils.release_memory()


@each(10, 2048, 5_000_000, 7.5e15, 0)
def convert_bytes(p: Package, size: float) -> Any:
    return p.utils.convert_bytes(size)


@case
def small_helpers(p: Package) -> Any:
    u = p.utils
    return [
        u.merge_dicts({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": 4}),
        u.get_pretty_name(Model),
        u.get_pretty_name(Model()),
        u.get_pretty_name(len),
        u.recursive_getattr(Model(), "blocks.training"),
        u.is_namedtuple(Pair(1, 2)),
        u.is_namedtuple((1, 2)),
        u.is_torch_tensor(torch.ones(1)),
        u.is_torch_tensor([1]),
        u.is_torch_version(">=", "2.0"),
        u.compare_versions("numpy", "<", "1.0"),
        u.is_compiled_module(Model()),
        u.convert_dict_to_env_variables({"A": "1", "B": "a b", "": "x", "C": ""}),
        u.are_libraries_initialized("torch", "no_such_library"),
        u.get_model_tp_size(Model()),
    ]


@each("yes", "On", "0", "maybe")
def str_to_bool(p: Package, word: str) -> Any:
    return p.utils.str_to_bool(word), p.utils.str_to_bool(word, to_bool=True)


@case
def variables(p: Package) -> Any:
    u = p.utils
    with u.patch_environment(twin_number="3", twin_flag="true"):
        inside = [u.get_int_from_env(["TWIN_NONE", "TWIN_NUMBER"], 7), u.parse_flag_from_env("TWIN_FLAG")]
        inside.append(u.parse_choice_from_env("TWIN_NONE", "default"))
        with u.clear_environment():
            inside.append(u.get_int_from_env(["TWIN_NUMBER"], 7))

    def sets() -> None:
        os.environ["ACCELERATE_TWIN"] = "1"

    u.purge_accelerate_environment(sets)()
    return [*inside, "TWIN_NUMBER" in os.environ, "ACCELERATE_TWIN" in os.environ]


@case
def packages(p: Package) -> Any:
    module = p.module("utils.imports")
    # Those that depend on the environment of whoever recorded them are compared live.
    wanted = "torch_distributed cuda xpu npu mlu musa hpu sdaa neuron mps pippy weights_only megatron_lm torch_xla rocm"
    return {name: bool(getattr(module, f"is_{name}_available")()) for name in wanted.split()}


@case
def loads_safely(p: Package) -> Any:
    import io

    buffer = io.BytesIO()
    p.utils.save({"state": np.random.RandomState(0).get_state(), "tensor": torch.ones(2)}, buffer)
    buffer.seek(0)
    if p.rank:
        return None
    loaded = p.utils.load(buffer)
    return [list(loaded), loaded["tensor"], int(loaded["state"][1][0])]


def main() -> None:
    results = outcomes(REAL)
    size = int(os.environ.get("WORLD_SIZE", 1))
    answers: list[Any] = [results]
    if size > 1:
        answers = [None] * size
        dist.all_gather_object(answers, results)
    if int(os.environ.get("RANK", 0)) == 0:
        file = RECORDED / f"twin_{size}.json"
        # One line a case: a change shows as one line.
        lines = [json.dumps({name: [answer[name] for answer in answers]})[1:-1] for name in results]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(len(lines), "cases in", file.name)


if __name__ == "__main__":
    main()
